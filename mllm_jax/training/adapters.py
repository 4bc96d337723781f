"""Stages with LoRA adapters and an int8 base: what they add to a model's parameters, and what a later stage takes over.

A stage with `lora.rank` trains its adapters besides what `trainable` names. The kernels that they adapt stay frozen;
with `quantize_base="int8"` all frozen kernels of the LLM's blocks are kept as int8.
"""

import dataclasses
import re
from collections.abc import Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mllm_jax.inference.runs import is_quantized, lora_settings
from mllm_jax.models import lora, paths, quantize
from mllm_jax.models.lora import LoRA

Tree = dict[str, Any]

INT8_TARGETS = r"llm/blocks/.*/kernel"


def trainable(stage: ConfigDict) -> tuple[str, ...]:
    """Path patterns of everything that a stage trains."""
    return (*stage.trainable, *([lora.ADAPTERS] if lora_settings(stage) else []))


def quantized(stage: ConfigDict, frozen: Tree) -> Tree:
    """The frozen parameters of a stage as it keeps them.

    Raises:
      ValueError: int8 is asked for and there is no frozen kernel in the LLM's blocks.
    """
    return quantize.quantize(frozen, INT8_TARGETS) if is_quantized(stage) else frozen


def abstract_split(params: Tree, stage: ConfigDict) -> tuple[Tree, Tree]:
    """Shapes of what a stage trains and of what it keeps frozen, adapters and int8 included.

    Args:
      params: shapes of the model's parameters without either.

    Raises:
      ValueError: a pattern that matches nothing, or a kernel that is adapted and trained itself.
    """
    adapters, adapted = lora_settings(stage), set()
    if adapters:
        adapted = set(lora.target_paths(params, adapters))
        params = jax.eval_shape(lambda p: lora.add(p, adapters, jax.random.key(0)), params)
    trained, frozen = paths.split(params, trainable(stage))
    if both := sorted(adapted & paths.flatten(trained).keys()):
        raise ValueError(
            f"{both[0]!r} is trained itself and adapted by lora.targets too; leave it out of 'trainable' (adapters are "
            "trained without being named there), or set lora.rank=0"
        )
    return trained, jax.eval_shape(lambda p: quantized(stage, p), frozen)


def add(params: Tree, stage: ConfigDict, rng: jax.Array, dtype: str) -> Tree:
    """The parameters with fresh adapters (host arrays), if the stage has any that are not there yet."""
    adapters = lora_settings(stage)
    if adapters is None or lora.split(params)[1]:
        return params
    fresh = jax.jit(lambda key: lora.split(lora.add(params, adapters, key, dtype))[1])(rng)
    return paths.merge(params, jax.device_get(fresh))


def carry_over(pretrained: Tree, before: Tree, earlier: Sequence[ConfigDict], stage: ConfigDict) -> Tree:
    """Pretrained parameters with what earlier stages have learned.

    Adapters of the stage before are trained further by a stage of the same settings (dropout aside), and otherwise
    merged into the kernels as they were before any int8.

    Args:
      before: the whole model after the stage before.
      earlier: the stages so far, in order.
    """
    patterns, last = _learned(earlier)
    base, adapters = lora.split(before)
    learned, _ = paths.split(base, patterns) if patterns else ({}, {})
    flat = paths.flatten(pretrained) | paths.flatten(learned)
    if last is None:
        return paths.unflatten(flat)
    if not _same(last, lora_settings(stage)):
        where = paths.flatten(base)
        for path in lora.target_paths(pretrained, last):  # merged where the adapters are
            flat[path] = jax.device_put(flat[path], where[path].sharding)
        return lora.merge(paths.unflatten(flat | paths.flatten(adapters)), last)
    return paths.unflatten(flat | paths.flatten(adapters))


def lost_kernel(params: Tree, stages: Sequence[ConfigDict]) -> tuple[int, str] | None:
    """(index of a stage, path): a kernel that earlier stages have changed and this one, not the last, keeps as int8.

    What pretrained checkpoints hold is read again by the stage after; this could not be.

    Args:
      params: shapes of the model's parameters.
    """
    kernels = [path for path in paths.flatten(params) if re.fullmatch(INT8_TARGETS, path)]
    for index, stage in enumerate(stages[:-1]):
        changed, last = _learned(stages[:index])
        if last is not None and not _same(last, lora_settings(stage)):
            changed.append(last.targets)  # merged when this stage begins
        for path in kernels if is_quantized(stage) else ():
            if _matches(path, changed) and not _matches(path, trainable(stage)):
                return index, path
    return None


def _learned(stages: Sequence[ConfigDict]) -> tuple[list[str], LoRA | None]:
    """Patterns of base parameters that stages have changed, and the adapters that the last one leaves beside them."""
    patterns: list[str] = []
    last: LoRA | None = None
    for stage in stages:
        if last is not None and not _same(last, lora_settings(stage)):
            patterns.append(last.targets)
        last = lora_settings(stage)
        patterns += stage.trainable
    return patterns, last


def _matches(path: str, patterns: Sequence[str]) -> bool:
    return any(re.fullmatch(pattern, path) for pattern in patterns)


def _same(one: LoRA, other: LoRA | None) -> bool:
    return other is not None and dataclasses.replace(one, dropout=other.dropout) == other
