"""LoRA adapters written as PEFT does: of an LLM, or of all that a stage trains in a llava-hf model."""

import pathlib
import re
from collections.abc import Collection, Iterable, Sequence
from typing import Any

import numpy as np

from mllm_jax import files
from mllm_jax.interop import families
from mllm_jax.interop.assemble import Shape, write_plan
from mllm_jax.interop.connector_names import connector_part
from mllm_jax.interop.native import refuse_existing
from mllm_jax.interop.parts import Part, Spelling, llm_part, vision_part
from mllm_jax.interop.peft import CONFIG, PREFIX, WEIGHTS, adapter_rules
from mllm_jax.interop.rules import Rule
from mllm_jax.interop.safetensors_io import write_sharded
from mllm_jax.interop.towers import blocks_of
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.encoders import EncodersConfig
from mllm_jax.models.lora import ADAPTERS, LoRA
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.paths import flatten

# Prefixes in transformers 5's LlavaForConditionalGeneration of the names in the tables of rules.
PLACES: dict[str, Spelling] = {
    "vision": (("model.vision_tower.", ""),),
    "connector": (("model.multi_modal_projector.", ""),),
    "llm": (("model.language_model.", "model."), ("lm_head.", "lm_head.")),
}
WHOLE_CONNECTOR = "multi_modal_projector"

Tensors = list[tuple[str, np.dtype, Shape, Any]]


def save_adapter(
    directory: str | pathlib.Path, lora: LoRA, config: DecoderConfig, params: dict[str, Any], base: str = ""
) -> None:
    """Writes the adapters in an LLM's parameters as PEFT does.

    Args:
      params: the LLM's parameters, or its adapters alone.
      base: name of the base model, for PEFT's own loading.

    Raises:
      ValueError: no adapters there.
      FileExistsError: the directory holds weights.
    """
    rules = families.for_config(families.LLMS, config).rules(config)
    tensors, used = _adapters(flatten(params), rules, (("", ""),))
    if not tensors:
        raise ValueError("these parameters hold no LoRA adapters")
    names = {rule.name.removesuffix(".lora_A.weight").rsplit(".", 1)[-1] for rule in used[::2]}
    _write(directory, lora, tensors, sorted(names), [], base, "CAUSAL_LM")


def save_model_adapter(
    directory: str | pathlib.Path,
    lora: LoRA,
    model: ModelConfig,
    params: dict[str, Any],
    trained: Collection[str] = (),
    base: str = "",
) -> None:
    """Writes what a stage trained in a llava-hf model as PEFT does, in the names of transformers 5.

    The adapters of LLM and vision tower, the connector as a whole, and every module that holds a parameter in
    `trained` (`modules_to_save`). `PeftModel.from_pretrained` puts them on a LlavaForConditionalGeneration with the
    LLM and tower that the stage began with.

    Args:
      lora: rank, scale and dropout of the adapters.
      model: the computation, with a connector that the llava-hf layout has.
      params: the whole model, adapters beside their kernels.
      trained: paths of parameters that were trained themselves, such as "llm/embedding".
      base: name of the llava-hf model, for PEFT's own loading.

    Raises:
      ValueError: no adapters there, or something in the model that a llava-hf model does not have; it is named.
      FileExistsError: the directory holds weights.

    Example:
        save_model_adapter("adapter", LoRA(rank=8, alpha=16), model, params, base="llava-hf/llava-1.5-7b-hf")
    """
    if isinstance(model.vision, EncodersConfig):
        raise ValueError(
            "transformers' LLaVA has one vision tower; adapters of fused ones cannot be written for it"
        )
    if "separators/newline" in trained:
        raise ValueError(
            "PEFT saves modules, and the newline of images in tiles (separators/newline), which was trained, is in "
            "none; export LLaVA's format (llava-adapter), or another one with the adapters merged"
        )
    depth = blocks_of(params["vision"])
    parts = [
        vision_part(model.vision, families.for_config(families.VISION, model.vision), depth, "vision"),
        connector_part(model, "llava-hf"),
        llm_part(model.llm, families.for_config(families.LLMS, model.llm), "llm"),
    ]
    tensors: Tensors = []
    targets: list[str] = []
    saved = [WHOLE_CONNECTOR]
    for part in parts:
        leaves, place = flatten(params[part.path]), PLACES[part.path]
        adapters, used = _adapters(leaves, part.rules, place)
        tensors += adapters
        targets += _pattern(used[::2], place, leaves)
        if part.path == "connector":
            whole = set(part.shapes)
        else:
            whole, modules = _modules(
                part, {path for path in part.shapes if part.key(path) in trained}, leaves
            )
            saved += [_spelled(f"{module}.", place)[:-1] for module in modules]
        rules = [rule for rule in part.rules if rule.path in whole]
        chosen = {path: leaves[path] for path in sorted(whole)}
        tensors += write_plan(chosen, rules, prefixes=_prefixes(place))
    if not targets:
        raise ValueError("these parameters hold no LoRA adapters")
    tied = {"ensure_weight_tying": True} if model.llm.tied and "llm/embedding" in trained else {}
    _write(directory, lora, tensors, "|".join(targets), saved, base, None, **tied)


def _prefixes(place: Spelling) -> tuple[tuple[str, str], ...]:
    """(prefix in the table, prefix in PEFT's file), as `write_plan` takes them."""
    return tuple((ours, PREFIX + theirs) for theirs, ours in place)


def _spelled(name: str, place: Spelling) -> str:
    return next(theirs + name.removeprefix(ours) for theirs, ours in place if name.startswith(ours))


def _adapters(leaves: dict[str, Any], rules: Sequence[Rule], place: Spelling) -> tuple[Tensors, list[Rule]]:
    """The tensors of A and B, and their rules, A and B of a layer one after the other.

    Raises:
      ValueError: an adapter of a layer that PEFT has no adapter of this kind for.
    """
    adapters = {path: leaf for path, leaf in leaves.items() if re.fullmatch(ADAPTERS, path)}
    used = [rule for rule in adapter_rules(rules) if rule.path in adapters]
    return write_plan(adapters, used, prefixes=_prefixes(place)), used


def _pattern(rules: Iterable[Rule], place: Spelling, leaves: dict[str, Any]) -> list[str]:
    """Regular expressions over module names that match exactly the adapted layers of a part, for `target_modules`."""
    ends: dict[tuple[str, int], list[str]] = {}
    for rule in rules:
        head, _, tail = _spelled(rule.name.removesuffix(".lora_A.weight"), place).partition("{i}")
        ends.setdefault((head, leaves[rule.path].shape[0] if tail else 0), []).append(re.escape(tail))
    return [
        f"{re.escape(head)}({'|'.join(map(str, range(depth)))})({'|'.join(tails)})"
        if depth
        else re.escape(head)
        for (head, depth), tails in ends.items()
    ]


def _modules(part: Part, trained: set[str], leaves: dict[str, Any]) -> tuple[set[str], list[str]]:
    """The parameters of all modules that hold a trained one, and the names of these modules in the table.

    Raises:
      ValueError: an adapted layer of which something else is trained as well.
    """
    owner = {rule.path: rule.name.rpartition(".")[0] for rule in part.rules if rule.path in part.shapes}
    modules = {owner[path]: path for path in sorted(trained)}

    def inside(name: str, others: Collection[str]) -> bool:
        return any(f"{name}.".startswith(f"{module}.") for module in others)

    whole = {path for path, name in owner.items() if inside(name, modules)}
    if both := sorted(path for path in whole if f"{path.rpartition('/')[0]}/lora_a" in leaves):
        raise ValueError(
            f"{part.key(both[0])!r} belongs to a layer that is adapted and of which a parameter is trained too; PEFT "
            "cannot have both in one adapter"
        )
    names = []
    for module, path in modules.items():
        if inside(module, modules.keys() - {module}):
            continue
        blocks = range(leaves[path].shape[0]) if "{i}" in module else (None,)
        names += [module if i is None else module.replace("{i}", str(i)) for i in blocks]
    return whole, names


def _write(
    directory: str | pathlib.Path,
    lora: LoRA,
    tensors: Tensors,
    targets: str | list[str],
    saved: list[str],
    base: str,
    task: str | None,
    **others: Any,
) -> None:
    directory = pathlib.Path(directory)
    refuse_existing(directory)
    fields = {
        "peft_type": "LORA",
        "task_type": task,
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": targets,
        "modules_to_save": saved or None,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        **others,
    }
    directory.mkdir(parents=True, exist_ok=True)
    files.write_json(directory / CONFIG, fields, indent=2)
    write_sharded(directory, tensors)
    (directory / "model.safetensors").rename(directory / WEIGHTS[0])
