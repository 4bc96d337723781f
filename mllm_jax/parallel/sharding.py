"""How parameters are laid out on the mesh: one ordered list of path patterns.

A weight matrix is split over `fsdp` along one side and over `tensor` along the other, column-parallel into a block's
inner width and row-parallel out of it; what belongs to a matrix (bias, adapters, int8 scales) is split with it. Devices
of `sequence` hold different positions, as those of `fsdp` hold different rows, and share parameters in the same way.
Blocks are stacked for `scan`, so their arrays have a leading layer axis.

No head is ever split: `tensor` divides the number of heads, not the fused width (models/heads.py). Where it cannot,
attention is whole on every device of a group (28 heads on 8 devices); the MLP is split all the same. Nor are fused
halves put on different devices (`_is_fused`).
"""

import re
from typing import Any

import jax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from mllm_jax.models.heads import split
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.paths import path_of

TOWER = r"vision(/tower_\d+)?"  # one tower, or one of several fused
STAGE = r"(/stage_\d+)?"  # of a ConvNeXt
INTO = rf"(llm|{TOWER}{STAGE})/blocks/(q|k|v|gate|up|fc1)"  # into a block's inner width
OUT_OF = rf"(llm|{TOWER}{STAGE})/blocks/(o|out|down|fc2)"

RULES: tuple[tuple[str, P], ...] = (
    (r"llm/embedding", P("tensor", "fsdp")),
    (r"llm/head", P("fsdp", "tensor")),
    (r"llm/head_bias", P("tensor")),
    (rf"{INTO}/kernel", P(None, "fsdp", "tensor")),
    (rf"{INTO}/(bias|kernel_scale)", P(None, "tensor")),
    (rf"{INTO}/lora_a", P(None, "fsdp")),
    (rf"{INTO}/lora_b", P(None, "fsdp", "tensor")),
    (rf"{OUT_OF}/kernel", P(None, "tensor", "fsdp")),
    (rf"{OUT_OF}/(bias|kernel_scale)", P()),
    (rf"{OUT_OF}/lora_a", P(None, "tensor", "fsdp")),
    (rf"{OUT_OF}/lora_b", P(None, None, "fsdp")),
    (rf"(llm|{TOWER})/blocks/((post_)?norm[12]|[qk]_norm)/(scale|bias)", P()),
    (r"llm/final_norm/(scale|bias)", P()),
    (rf"{TOWER}/(patch_embed/(kernel|bias)|pos_embed|class_token|registers|pre_norm/(scale|bias))", P()),
    (rf"{TOWER}/blocks/scale[12]", P()),
    (rf"{TOWER}/(stem|stem_norm)/(kernel|scale|bias)", P()),
    (rf"{TOWER}/stage_\d+/(norm|down|blocks/norm|blocks/conv)/(kernel|scale|bias)", P()),
    (rf"{TOWER}/stage_\d+/blocks/gamma", P()),
    # Connectors are small next to the LLM, and a new one must work without an edit here.
    (r"connector/.*", P()),
    (r"separators/newline", P()),
)


def spec_of(path: str) -> P:
    """The PartitionSpec of one parameter path.

    Raises:
      ValueError: not exactly one rule matches.
    """
    specs = [spec for pattern, spec in RULES if re.fullmatch(pattern, path)]
    if len(specs) != 1:
        raise ValueError(
            f"parameter {path!r} matches {len(specs)} sharding rules, not one; edit parallel/sharding.py"
        )
    return specs[0]


def _splits_heads(path: str, config: ModelConfig, tensor: int) -> bool | None:
    """Whether `tensor` devices share the heads of a matrix of attention; None for other parameters."""
    found = re.fullmatch(r"(llm|vision)(?:/tower_(\d+))?/blocks/(q|k|v|o|out)/.*", path)
    if not found:
        return None
    part, tower, matrix = found.groups()
    geometry = config.llm if part == "llm" else config.vision
    if tower is not None:
        geometry = geometry.towers[int(tower)]
    of_queries, of_keys = split(geometry.heads, getattr(geometry, "kv_heads", geometry.heads), tensor)
    return (of_keys if matrix in "kv" else of_queries) == tensor


def _is_fused(path: str, config: ModelConfig) -> bool:
    """Whether a parameter's columns are two halves that belong together pairwise: fc1 of a gated tower (DINOv2-giant).

    An even split would put the halves on different devices. So `tensor` leaves it whole, and the activations alone are
    split (`Dense.parts`).
    """
    found = re.fullmatch(r"vision(?:/tower_(\d+))?/blocks/fc1/(kernel|kernel_scale|bias|lora_b)", path)
    if not found:
        return False
    tower = config.vision if found[1] is None else config.vision.towers[int(found[1])]
    return tower.gated


def _fit(path: str, shape: tuple[int, ...], mesh: Mesh | AbstractMesh, config: ModelConfig) -> P:
    """The spec of a parameter without mesh axes that do not divide its heads or dimensions (odd vocabularies)."""
    spec, by_heads = spec_of(path), _splits_heads(path, config, mesh.shape["tensor"])
    axes = []
    for size, axis in zip(shape, (*spec, *(None,) * (len(shape) - len(spec))), strict=True):
        fits = axis is None or size % mesh.shape[axis] == 0
        if axis == "tensor" and by_heads is not None:
            fits = by_heads
        if axis == "tensor" and _is_fused(path, config):
            fits = False
        also = mesh.shape.get("sequence", 1)
        if axis == "fsdp" and also > 1 and size % (mesh.shape[axis] * also) == 0:
            axis = ("fsdp", "sequence")
        axes.append(axis if fits else None)
    return P(*axes)


def param_shardings(params: Any, mesh: Mesh | AbstractMesh, config: ModelConfig) -> Any:
    """NamedShardings for a parameter tree (arrays or shapes) with top-level keys like the model's.

    Args:
      config: of the model that the parameters belong to; it knows the heads that a fused width is made of.
    """
    return jax.tree_util.tree_map_with_path(
        lambda path, leaf: NamedSharding(mesh, _fit(path_of(path), leaf.shape, mesh, config)), params
    )
