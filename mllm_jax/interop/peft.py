"""LoRA adapters as PEFT writes them: adapter_config.json and adapter_model.safetensors (or .bin), read and merged."""

import contextlib
import dataclasses
import math
import pathlib
import re
from collections.abc import Sequence
from typing import Any

import jax

from mllm_jax import limits
from mllm_jax.interop import families
from mllm_jax.interop.assemble import Report, read_tree
from mllm_jax.interop.connector_names import connector_part
from mllm_jax.interop.hub import read_json, resolve_path
from mllm_jax.interop.parts import Part, llm_part, plan_parts, vision_part
from mllm_jax.interop.rules import TRANSPOSE, Rule
from mllm_jax.interop.source import Source
from mllm_jax.models import lora
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.encoders import EncodersConfig
from mllm_jax.models.lora import LoRA
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.paths import flatten, unflatten

CONFIG, WEIGHTS = "adapter_config.json", ("adapter_model.safetensors", "adapter_model.bin")
PREFIX = "base_model.model."
# Settings that are read, or that leave what the adapter computes as it is.
_KNOWN = frozenset(
    """
    peft_type r lora_alpha lora_dropout use_rslora init_lora_weights modules_to_save
    task_type auto_mapping base_model_name_or_path revision peft_version inference_mode target_modules exclude_modules
    layers_pattern megatron_config megatron_core loftq_config eva_config corda_config runtime_config qalora_group_size
    """.split()
)
# Every other setting changes the computation, and must have one of these values or the one named: "not used".
_OFF: tuple[Any, ...] = (None, False, [], {}, "", 0)
_ALSO_OFF = {"bias": "none", "ensure_weight_tying": True, "lora_ga_config": None}
# Starting points that leave the base as it is. The others (PiSSA, OLoRA, CorDA, LoftQ) train against a base of their
# own, unless PEFT converted the adapter when it saved it, and then it says so here.
PLAIN_STARTS = (True, False, None, "gaussian", "eva", "orthogonal")


def is_adapter(directory: pathlib.Path) -> bool:
    """Whether a directory holds a PEFT adapter."""
    return (directory / CONFIG).exists()


def adapter_rules(rules: Sequence[Rule]) -> tuple[Rule, ...]:
    """Rows for A and B of every linear layer among `rules`."""
    found = []
    for rule in rules:
        if rule.transform is TRANSPOSE and rule.path.endswith("/kernel") and rule.share == (0, 1):
            stem, name = rule.path.removesuffix("kernel"), rule.name.removesuffix(".weight")
            found.append(Rule(f"{stem}lora_a", f"{name}.lora_A.weight", TRANSPOSE))
            found.append(Rule(f"{stem}lora_b", f"{name}.lora_B.weight", TRANSPOSE))
    return tuple(found)


def read_lora(directory: pathlib.Path) -> LoRA:
    """Rank, scale and dropout of an adapter; targets are set by `load_adapter` from the tensors.

    Raises:
      ValueError: a setting that changes the computation and is not supported.
    """
    file = directory / CONFIG
    fields = read_json(file)
    if fields.get("peft_type", "LORA") != "LORA":
        raise ValueError(f"{file}: peft_type={fields['peft_type']!r}; supported: 'LORA'")
    for key in fields.keys() - _KNOWN:
        if fields[key] not in _OFF and fields[key] != _ALSO_OFF.get(key):
            raise ValueError(f"{file}: {key}={fields[key]!r} is not supported")
    if (start := fields.get("init_lora_weights", True)) not in PLAIN_STARTS:
        raise ValueError(
            f"{file}: init_lora_weights={start!r} goes with a changed base; save the adapter with PEFT's "
            "path_initial_model_for_weight_conversion, which turns it into one for the original base"
        )
    rank, alpha, dropout = fields.get("r"), fields.get("lora_alpha"), fields.get("lora_dropout", 0.0)
    if type(rank) is not int or rank < 1:
        raise ValueError(f"{file}: r={rank!r} must be a positive whole number")
    for key, value in (("lora_alpha", alpha), ("lora_dropout", dropout)):
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{file}: {key}={value!r} must be a number")
    limits.check("MAX_WIDTH", rank, f"{file}: r")
    return LoRA(rank, float(alpha), float(dropout), rank_stabilized=bool(fields.get("use_rslora", False)))


def _read(directory: pathlib.Path, parts: Sequence[Part], rank: int) -> tuple[dict[str, Any], Report]:
    """What an adapter holds for these parts: `lora_a`, `lora_b` beside kernels, and whole parameters.

    Raises:
      ValueError: a tensor that no part has, or one of a pair or of a block that is missing; it is named.
    """
    files_here = [directory / name for name in WEIGHTS if (directory / name).exists()]
    if not files_here:
        raise FileNotFoundError(f"{directory} holds no {' or '.join(WEIGHTS)}")
    source = Source(directory, files_here[:1])
    chosen = []
    for part in parts:
        spellings = tuple(tuple((PREFIX + t, ours) for t, ours in each) for each in part.spellings)
        rules, shapes = [], {}
        for rule in (*adapter_rules(part.rules), *part.rules):
            if not Part("", "", (rule,), {}, spellings).found(source):
                continue
            rules.append(rule)
            kernel = re.sub(r"lora_[ab]$", "kernel", rule.path)
            shape = part.shapes.get(kernel, ())
            if rule.path.endswith("/lora_a"):
                shape = (*shape[:-1], rank)
            elif rule.path.endswith("/lora_b"):
                shape = (*shape[:-2], rank, shape[-1])
            shapes[rule.path] = shape
        for path in shapes:
            other = path[:-1] + {"a": "b", "b": "a"}.get(path[-1], "")
            if re.search(r"/lora_[ab]$", path) and other not in shapes:
                raise ValueError(f"{files_here[0]}: {path!r} is there without {other!r}")
        if rules:
            what = f"an adapter of {part.what}"
            chosen.append(Part(part.path, what, tuple(rules), shapes, spellings, (), part.blocks))
    if not chosen:
        raise ValueError(f"{files_here[0]}: no adapter of {' or '.join(part.what for part in parts)}")
    placements, shapes, report = plan_parts(source, chosen)
    _check_saved(directory, source)
    return read_tree(source, placements, shapes), report


def _check_saved(directory: pathlib.Path, source: Source) -> None:
    """Every module that the config calls trained as a whole is there."""
    modules = read_json(directory / CONFIG).get("modules_to_save") or ()
    for module in modules:
        if not any(f".{module}." in name for name in source):
            raise ValueError(
                f"{directory / CONFIG}: modules_to_save has {module!r}, but no tensor of it is stored"
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
      Settings (with `targets`), {"blocks": {"q": {"lora_a", "lora_b"}, ...}} with parameters that were trained as a
      whole (`modules_to_save`), and the report.

    Raises:
      ValueError: tensors that do not fit the LLM; they are named.
    """
    directory = resolve_path(path)
    settings = read_lora(directory)
    part = llm_part(config, families.for_config(families.LLMS, config))
    tree, report = _read(directory, [part], settings.rank)
    if dtype is not None:
        tree = jax.tree.map(lambda x: x.astype(dtype), tree)
    names = sorted({each.split("/")[-2] for each in flatten(tree) if each.endswith("/lora_a")})
    targets = rf"llm/blocks/({'|'.join(names)})/kernel"
    return dataclasses.replace(settings, targets=targets), tree, report


def merge_adapter(
    path: str | pathlib.Path, model: ModelConfig, params: dict[str, Any]
) -> tuple[dict[str, Any], Report]:
    """A multimodal model with an adapter merged into LLM, vision tower and connector.

    Args:
      path: a directory or hub id: LoRA of linear layers of any part, in the names of llava-hf or LLaVA, and modules
        that were trained as a whole (`modules_to_save`: connector, embedding, head).

    Raises:
      ValueError: tensors that do not fit the model; they are named.
    """
    directory = resolve_path(path)
    settings = read_lora(directory)
    parts = [llm_part(model.llm, families.for_config(families.LLMS, model.llm), "llm")]
    if not isinstance(model.vision, EncodersConfig):
        depth = model.make_connector().request().deepest
        parts.append(
            vision_part(model.vision, families.for_config(families.VISION, model.vision), depth, "vision")
        )
    for layout in ("llava-hf", "llava"):
        with contextlib.suppress(ValueError):  # that layout has no names for this connector
            parts.append(connector_part(model, layout))
            break
    tree, report = _read(directory, parts, settings.rank)
    flat = flatten(params) | flatten(tree)
    return jax.device_get(lora.merge(unflatten(flat), settings)), report


def add_adapter(llm: dict[str, Any], adapter: dict[str, Any]) -> dict[str, Any]:
    """The LLM's parameters with adapters beside their kernels, and with what was trained as a whole."""
    return unflatten(flatten(llm) | flatten(adapter))
