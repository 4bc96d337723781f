"""`lmms-eval --model mllm_jax`: the classes that lmms-eval finds through the entry-point group `lmms_eval.models`.

    lmms-eval --model mllm_jax --model_args path=runs/mine --tasks mme,pope --batch_size 16
    lmms-eval --model mllm_jax --model_args path=models/llava,template=vicuna_v1 --tasks seedbench_ppl --force_simple

`--model_args` are `path` (also `pretrained`), the arguments of `mllm_jax.load` (template, stage, aspect, dtype, tower,
tokenizer), `max_new_tokens` (in place of the tasks'), `overlong` (error, empty), `seed`, and keys of the configuration
that begin with `mesh.` or `video.` (`mesh.tensor=4,video.frames=4`; docs/config.md, the latter under model.video).
"""

import functools
import os
from typing import Any

SIMPLE, CHAT = "MllmJax", "MllmJaxChat"


class Pair(tuple):
    """A likelihood. lmms-eval makes a string of any other result, and of what its cache gives back.

    The cache keeps nothing that is empty when stripped.
    """

    def strip(self) -> str:
        """Nothing."""
        return ""


def make_classes(base: type, result: Any, counts: Any) -> dict[str, type]:
    """The simple and the chat class, by their names.

    Args:
      base, result, counts: the harness's `lmms`, `GenerationResult` and `TokenCounts`.
    """

    class MllmJax(base):
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
            from mllm_jax.harness import setup  # JAX is not wanted where models are only listed

            if int(os.environ.get("WORLD_SIZE") or 1) > 1:
                raise ValueError(
                    "WORLD_SIZE is above 1: start lmms-eval as one process, not by accelerate or torchrun; it uses all "
                    "devices of the machine (--model_args mesh.fsdp=-1,mesh.data=1 to split the parameters, too)"
                )
            self.adapter = setup.make_adapter(path, arguments, batch_size, chat=not self.is_simple)

        def generate_until(self, requests: list[Any]) -> list[Any]:
            """Answers, in the order of the requests."""
            found = self.adapter.generate_until(requests, self.task_dict)
            return [result(each.text, counts(each.input_tokens, each.output_tokens)) for each in found]

        def generate_until_multi_round(self, requests: list[Any]) -> list[Any]:
            """The answers of each request's rounds."""
            return [
                result(each) for each in self.adapter.generate_until_multi_round(requests, self.task_dict)
            ]

        def loglikelihood(self, requests: list[Any]) -> list[Any]:
            """Of each continuation its likelihood (see `Adapter.loglikelihood`), and whether it is the greedy one."""
            return [result(Pair(each)) for each in self.adapter.loglikelihood(requests, self.task_dict)]

    class MllmJaxChat(MllmJax):
        """A model, asked by messages."""

        is_simple = False

    return {SIMPLE: MllmJax, CHAT: MllmJaxChat}


@functools.cache
def _classes() -> dict[str, type]:
    from lmms_eval.api.instance import GenerationResult, TokenCounts
    from lmms_eval.api.model import lmms

    return make_classes(lmms, GenerationResult, TokenCounts)


def __getattr__(name: str) -> type:
    """The classes, made when the harness asks for them: without it this module can still be imported."""
    if name in (SIMPLE, CHAT):
        return _classes()[name]
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def manifest() -> Any:
    """What the entry point names."""
    from lmms_eval.models.registry_v2 import ModelManifest

    return ModelManifest(
        "mllm_jax",
        simple_class_path=f"{__name__}.{SIMPLE}",
        chat_class_path=f"{__name__}.{CHAT}",
        aliases=("mllm-jax",),
    )
