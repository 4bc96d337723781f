"""`lmms-eval --model mllm_jax`: the classes that lmms-eval finds through the entry-point group `lmms_eval.models`.

    lmms-eval --model mllm_jax --model_args path=runs/mine --tasks mme,pope --batch_size 16
    lmms-eval --model mllm_jax --model_args path=models/llava,template=vicuna_v1 --tasks seedbench_ppl --force_simple

`--model_args` are `path` (also `pretrained`), the arguments of `mllm_jax.load` (template, stage, aspect, dtype, tower,
tokenizer), `max_new_tokens` (in place of the tasks'), `overlong` (error, empty), `seed`, and keys of the configuration
that begin with `mesh.` or `video.` (`mesh.tensor=4,video.frames=4`; docs/config.md, the latter under model.video).
"""

import os
from typing import Any

from lmms_eval.api.instance import GenerationResult, TokenCounts
from lmms_eval.api.model import lmms


class MllmJax(lmms):
    """A model, asked by texts and lists of images and videos.

    Raises:
      ConfigError: not a model, or an argument that is not known.
      ValueError: several processes: one uses all devices of the machine.
    """

    is_simple = True

    def __init__(
        self, path: str = "", batch_size: int | str = 16, max_batch_size: Any = None, **arguments: Any
    ):
        super().__init__()
        from mllm_jax.harness import setup

        if int(os.environ.get("WORLD_SIZE") or 1) > 1:
            raise ValueError(
                "WORLD_SIZE is above 1: start lmms_eval as one process, without accelerate or torchrun; it uses all "
                "devices of the machine (--model_args mesh.fsdp=-1,mesh.data=1 to split the parameters, too)"
            )
        self.adapter = setup.make_adapter(path, arguments, batch_size, chat=not self.is_simple)

    def generate_until(self, requests: list[Any]) -> list[GenerationResult]:
        """Answers, in the order of the requests."""
        found = self.adapter.generate_until(requests, self.task_dict)
        return [
            GenerationResult(each.text, TokenCounts(each.input_tokens, each.output_tokens)) for each in found
        ]

    def generate_until_multi_round(self, requests: list[Any]) -> list[GenerationResult]:
        """The answers of each request's rounds."""
        found = self.adapter.generate_until_multi_round(requests, self.task_dict)
        return [GenerationResult(rounds) for rounds in found]

    def loglikelihood(self, requests: list[Any]) -> list[GenerationResult]:
        """Of each continuation its likelihood (see `Adapter.loglikelihood`) and whether greedy decoding gives it."""
        return [GenerationResult(Pair(each)) for each in self.adapter.loglikelihood(requests, self.task_dict)]


class MllmJaxChat(MllmJax):
    """A model, asked by messages."""

    is_simple = False


class Pair(tuple):
    """A likelihood. lmms-eval makes a string of any other result, and of what its cache gives back.

    The cache keeps nothing that is empty when stripped.
    """

    def strip(self) -> str:
        """Nothing."""
        return ""


def manifest() -> Any:
    """What the entry point names."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "mllm_jax",
        simple_class_path=f"{__name__}.{MllmJax.__name__}",
        chat_class_path=f"{__name__}.{MllmJaxChat.__name__}",
        aliases=("mllm-jax",),
    )
