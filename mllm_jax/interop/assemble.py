"""From named tensors to a parameter tree and back, by a table of rules; nothing lost, nothing set twice."""

import dataclasses
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mllm_jax.interop.rules import Rule
from mllm_jax.interop.source import Source
from mllm_jax.models.paths import flatten, unflatten

Shape = tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the tensors of a source.

    Attributes:
      used: names read.
      ignored: {name: why}.
    """

    used: tuple[str, ...]
    ignored: Mapping[str, str]


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where one source tensor goes."""

    name: str
    path: str
    index: int | None  # block, None when not stacked
    rule: Rule


def plan(
    source: Source,
    rules: Sequence[Rule],
    shapes: Mapping[str, Shape],
    canonical: Callable[[str], str | None],
    ignored: Iterable[tuple[str, str]] = (),
) -> tuple[list[Placement], Report]:
    """Decides what happens to every tensor of `source` before any is read.

    Args:
      shapes: {path: shape} of every parameter to be set.
      canonical: a source's name -> the name in the rules, or None when it belongs to another part.
      ignored: (regex over canonical or full source names, why) of tensors known not to be used.

    Raises:
      ValueError: a tensor neither used nor known, a parameter without a source, a shape that differs; each is
        named.
    """
    ignored = list(ignored)
    by_path = {rule.path: rule for rule in rules}
    missing_rule = [path for path in shapes if path not in by_path]
    if missing_rule:
        raise ValueError(f"the weight-name table has no row for parameter {missing_rule[0]!r}")
    placements: dict[tuple[str, int | None], Placement] = {}
    reasons: dict[str, str] = {}
    for name in source:
        ours = canonical(name)
        spot = _spot(ours, rules, shapes) if ours is not None else None
        if isinstance(spot, tuple):
            path, index, rule = spot
            if (path, index) in placements:
                raise ValueError(
                    f"{source.directory}: {placements[path, index].name!r} and {name!r} both set {path!r}"
                )
            placements[path, index] = Placement(name, path, index, rule)
            continue
        reason = spot or next(
            (why for regex, why in ignored if any(re.fullmatch(regex, n) for n in (ours, name) if n)), None
        )
        if reason is None:
            raise ValueError(
                f"{source.directory}: no parameter takes tensor {name!r} and it is not known to be unused"
            )
        reasons[name] = reason
    for path, shape in shapes.items():
        rule = by_path[path]
        for index in range(shape[0]) if rule.stacked else (None,):
            if (path, index) not in placements:
                name = rule.name if index is None else rule.name.replace("{i}", str(index))
                raise ValueError(f"{source.directory} holds no tensor {name!r} (parameter {path!r})")
            placement = placements[path, index]
            theirs = source.shape(placement.name)
            found = _shape_after(rule, theirs)
            wanted = shape if index is None else shape[1:]
            if found != wanted:
                raise ValueError(
                    f"{source.directory}: parameter {path!r} needs shape {wanted}, {placement.name!r} gives "
                    f"{'no such layout' if found is None else found} (stored as {theirs})"
                )
    return list(placements.values()), Report(tuple(p.name for p in placements.values()), reasons)


def _spot(
    name: str, rules: Sequence[Rule], shapes: Mapping[str, Shape]
) -> tuple[str, int | None, Rule] | str | None:
    """(path, block, rule), or why a matching tensor is not needed, or None for an unknown one."""
    for rule in rules:
        index = rule.index(name)
        if index is None:
            continue
        if rule.path not in shapes:
            return "not part of this configuration"
        if rule.stacked and index >= shapes[rule.path][0]:
            return f"block {index} is deeper than the deepest hidden state used"
        return rule.path, index if rule.stacked else None, rule
    return None


def _shape_after(rule: Rule, shape: Shape) -> Shape | None:
    try:
        return rule.transform.read(np.broadcast_to(np.zeros((), np.int8), shape)).shape
    except ValueError:
        return None


def read_tree(
    source: Source, placements: Sequence[Placement], shapes: Mapping[str, Shape], dtype: Any = None
) -> dict[str, Any]:
    """Reads placed tensors into NumPy arrays, one at a time.

    Args:
      dtype: of the result; None keeps the source's.
    """
    dtypes: dict[str, np.dtype] = {}
    for placement in placements:  # blocks stored in different dtypes are stacked in one that holds them all
        stored = source.dtype(placement.name)
        dtypes[placement.path] = jnp.promote_types(dtypes.get(placement.path, stored), stored)
    leaves = {path: np.empty(shape, dtype or dtypes[path]) for path, shape in shapes.items()}
    for placement in placements:
        array = placement.rule.transform.read(source.read(placement.name))
        leaves[placement.path][placement.index if placement.index is not None else ...] = array
    return unflatten(leaves)


def write_plan(
    params: Mapping[str, Any], rules: Sequence[Rule], dtype: Any = None
) -> list[tuple[str, np.dtype, Shape, Callable[[], np.ndarray]]]:
    """Tensors for `write_safetensors`, in the table's order of names, each made when it is written.

    Raises:
      ValueError: a parameter without a row, or a row without its parameter.
    """
    leaves = dict(flatten(dict(params)))
    tensors = []
    for rule in rules:
        if rule.path not in leaves:
            raise ValueError(f"parameter {rule.path!r} is missing: {rule.name!r} cannot be written")
        leaf = leaves.pop(rule.path)
        target = np.dtype(dtype or leaf.dtype)
        for index in range(leaf.shape[0]) if rule.stacked else (None,):

            def make(leaf=leaf, index=index, rule=rule, target=target):
                array = np.asarray(leaf if index is None else leaf[index])
                return rule.transform.write(array).astype(target)

            shape = leaf.shape if index is None else leaf.shape[1:]
            shape = rule.transform.write(np.broadcast_to(np.zeros((), np.int8), shape)).shape
            name = rule.name if index is None else rule.name.replace("{i}", str(index))
            tensors.append((name, target, shape, make))
    if leaves:
        raise ValueError(f"the weight-name table has no row for parameter {next(iter(leaves))!r}")
    return tensors
