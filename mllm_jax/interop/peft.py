"""LoRA adapters in PEFT's format: adapter_config.json and adapter_model.safetensors (or .bin)."""

import pathlib
import re
from typing import Any

from mllm_jax import files
from mllm_jax.interop import families
from mllm_jax.interop.assemble import Report, read_tree, write_plan
from mllm_jax.interop.families.base import Family
from mllm_jax.interop.hub import read_json, resolve_path
from mllm_jax.interop.native import refuse_existing
from mllm_jax.interop.parts import Part, Spelling, llm_shapes, plan_parts
from mllm_jax.interop.rules import TRANSPOSE, Rule
from mllm_jax.interop.safetensors_io import write_sharded
from mllm_jax.interop.source import Source
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.lora import LoRA
from mllm_jax.models.paths import flatten

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# Where the adapted LLM hangs: alone, in LLaVA's own class, in llava-hf (transformers 4 and 5).
SPELLINGS: tuple[Spelling, ...] = (
    ((PREFIX, ""),),
    ((f"{PREFIX}language_model.", ""),),
    ((f"{PREFIX}model.language_model.", "model."),),
)
# Settings that change the computation and that we do not have, with the values that mean "not used".
_OFF, _NONE = (False, None), ([], {}, None)
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "bias": ("none", None),
    **dict.fromkeys(("fan_in_fan_out", "lora_bias", "use_dora", "use_qalora"), _OFF),
    **dict.fromkeys(("rank_pattern", "alpha_pattern", "modules_to_save", "layers_to_transform"), _NONE),
    **dict.fromkeys(("layer_replication", "target_parameters", "trainable_token_indices"), _NONE),
    **dict.fromkeys(
        ("alora_invocation_tokens", "arrow_config", "kasa_config", "use_bdlora"), (*_NONE, False)
    ),
}
# Starting points that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ) train against a base of their
# own, unless PEFT converted the adapter when it saved it, and then it says so here.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def is_adapter(directory: pathlib.Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (directory / CONFIG).exists()


def adapter_rules(family: Family, config: DecoderConfig) -> tuple[Rule, ...]:
    """Rows for A and B of every linear layer in the blocks."""
    rules = []
    for rule in family.rules(config):
        if rule.stacked and rule.path.endswith("/kernel"):
            stem, name = rule.path.removesuffix("kernel"), rule.name.removesuffix(".weight")
            rules.append(Rule(f"{stem}lora_a", f"{name}.lora_A.weight", TRANSPOSE))
            rules.append(Rule(f"{stem}lora_b", f"{name}.lora_B.weight", TRANSPOSE))
    return tuple(rules)


def read_lora(directory: pathlib.Path) -> LoRA:
    """Rank, scale and dropout of an adapter; targets are set by `load_adapter` from the tensors.

    Raises:
      ValueError: a setting that changes the computation and is not supported.
    """
    fields = read_json(directory / CONFIG)
    if fields.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{directory / CONFIG}: peft_type={fields['peft_type']!r}; supported: 'LORA'")
    for key, unused in UNSUPPORTED.items():
        if key in fields and fields[key] not in unused:
            raise ValueError(f"{directory / CONFIG}: {key}={fields[key]!r} is not supported")
    if (start := fields.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise ValueError(
            f"{directory / CONFIG}: init_lora_weights={start!r} goes with a changed base; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which turns it into one for the original base"
        )
    return LoRA(
        rank=fields["r"],
        alpha=float(fields["lora_alpha"]),
        dropout=float(fields.get("lora_dropout", 0.0)),
        rank_stabilized=fields.get("use_rslora", False),
    )


def load_adapter(
    path: str | pathlib.Path, config: DecoderConfig, dtype: Any = None
) -> tuple[LoRA, dict[str, Any], Report]:
    """An LLM's adapters.

    Args:
      path: a directory or hub id.
      config: the LLM they belong to.
      dtype: of the result; None keeps the stored one.

    Returns:
      Settings (with `targets`), {"blocks": {"q": {"lora_a", "lora_b"}, ...}}, and the report.

    Raises:
      ValueError: tensors that do not fit the LLM; they are named.
    """
    directory = resolve_path(path)
    lora = read_lora(directory)
    family = families.for_config(families.LLMS, config)
    files = [directory / name for name in WEIGHTS if (directory / name).exists()]
    if not files:
        raise FileNotFoundError(f"{directory} holds no {' or '.join(WEIGHTS)}")
    source = Source(directory, files[:1])
    every = adapter_rules(family, config)
    parts = [Part("", "a LoRA adapter", (rule,), {}, SPELLINGS) for rule in every]
    rules = [rule for rule, part in zip(every, parts, strict=True) if part.found(source)]
    if not rules:
        raise ValueError(f"{files[0]}: no adapter of a linear layer of this {family.model_type} LLM")
    kernels = llm_shapes(config)
    shapes = {}
    for rule in rules:
        layers, inside, outside = kernels[re.sub(r"lora_[ab]$", "kernel", rule.path)]
        shapes[rule.path] = (
            (layers, inside, lora.rank) if rule.path.endswith("_a") else (layers, lora.rank, outside)
        )
    part = Part("", "a LoRA adapter", tuple(rules), shapes, SPELLINGS)
    placements, shapes, report = plan_parts(source, [part])
    names = sorted({rule.path.split("/")[-2] for rule in rules})
    targets = rf"llm/blocks/({'|'.join(names)})/kernel"
    params = read_tree(source, placements, shapes, dtype)
    return LoRA(lora.rank, lora.alpha, lora.dropout, targets, lora.rank_stabilized), params, report


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
    directory = pathlib.Path(directory)
    refuse_existing(directory)
    family = families.for_config(families.LLMS, config)
    leaves = {path: leaf for path, leaf in flatten(params).items() if re.search(r"/lora_[ab]$", path)}
    if not leaves:
        raise ValueError("these parameters hold no LoRA adapters")
    rules = [rule for rule in adapter_rules(family, config) if rule.path in leaves]
    tensors = write_plan(leaves, rules, prefixes=(("", PREFIX),))
    modules = sorted({rule.name.removesuffix(".lora_A.weight").rsplit(".", 1)[-1] for rule in rules[::2]})
    fields = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": lora.rank,
        "lora_alpha": lora.alpha,
        "lora_dropout": lora.dropout,
        "use_rslora": lora.rank_stabilized,
        "target_modules": modules,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
    }
    directory.mkdir(parents=True, exist_ok=True)
    files.write_json(directory / CONFIG, fields, indent=2)
    write_sharded(directory, tensors)
    (directory / "model.safetensors").rename(directory / WEIGHTS[0])


def add_adapter(llm: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """The LLM's parameters with adapters beside their kernels."""
    blocks = {name: {**leaves, **adapter["blocks"].get(name, {})} for name, leaves in llm["blocks"].items()}
    return {**llm, "blocks": blocks}
