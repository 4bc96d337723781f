"""From named tensors to a parameter tree and back, by a table of rules; nothing lost, nothing set twice."""

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np

from mllm_jax.interop.rules import Rule
from mllm_jax.interop.source import Source
from mllm_jax.models.paths import flatten, unflatten

Shape = tuple[int, ...]
Piece = tuple[Rule, Any, int | None]  # a row, its parameter, the block
Planned = tuple[str, np.dtype, Shape, Callable[[], np.ndarray]]  # name, dtype, shape, what makes the tensor


@dataclasses.dataclass(frozen=True)
class Report:
    """What became of the tensors of a source.

    Attributes:
      used: names read.
      ignored: {name: why}.
    """

    used: tuple[str, ...]
    ignored: Mapping[str, str]

    def __add__(self, other: "Report") -> "Report":
        return Report(self.used + other.used, {**self.ignored, **other.ignored})


@dataclasses.dataclass(frozen=True)
class Placement:
    """Where a source tensor, or a share of it (`Rule.share`), goes."""

    name: str
    path: str
    index: int | None  # block, None when not stacked
    rule: Rule


def plan(
    source: Source,
    rules: Sequence[Rule],
    shapes: Mapping[str, Shape],
    candidates: Callable[[str], list[str]],
    ignored: Iterable[tuple[str, str]] = (),
    neighbours: Iterable[tuple[str, str]] = (),
) -> tuple[list[Placement], Report]:
    """Decides what happens to every tensor of `source` before any is read.

    Args:
      shapes: {path: shape} of every parameter to be set.
      candidates: a source's name -> the names it may have in the rules.
      ignored: (regex over candidates, why) of tensors known not to be used.
      neighbours: (regex over a source's names, why) of tensors that belong elsewhere.

    Raises:
      ValueError: a tensor neither used nor known, a parameter without a source or with two, a shape that
        differs; each is named.
    """
    where, ignored, neighbours = source.directory, list(ignored), list(neighbours)
    by_path = {rule.path: rule for rule in rules}
    for path in shapes:
        if path not in by_path:
            raise ValueError(f"the weight-name table has no row for parameter {path!r}")
    placements: dict[tuple[str, int | None], Placement] = {}
    reasons: dict[str, str] = {}
    for name in source:
        names = candidates(name)
        spots = [spot for spot in (_spots(n, rules, shapes) for n in names) if spot]
        places = [spot for spot in spots if not isinstance(spot, str)]
        for path, index, rule in places[0] if places else ():
            if (path, index) in placements or len(places) > 1:
                other = placements[path, index].name if (path, index) in placements else name
                raise ValueError(f"{where}: {other!r} and {name!r} both set {path!r}")
            placements[path, index] = Placement(name, path, index, rule)
        if places:
            _check_whole(name, [rule for *_, rule in places[0]])
            continue
        known = [why for regex, why in ignored if any(re.fullmatch(regex, n) for n in names)]
        known += spots or [why for regex, why in neighbours if re.fullmatch(regex, name)]
        reason = next(iter(known), None)
        if reason is None:
            raise ValueError(f"{where}: no parameter takes tensor {name!r} and it is not known to be unused")
        reasons[name] = reason
    for path, shape in shapes.items():
        rule = by_path[path]
        for index in range(shape[0]) if rule.stacked else (None,):
            if (path, index) not in placements:
                name = rule.name.replace("{i}", str(index)).split(":", 1)[-1]
                raise ValueError(f"{where} holds no tensor {name!r} (parameter {path!r})")
            placement = placements[path, index]
            if rest := _unread(source, placement, shape if index is None else shape[1:]):
                reasons[f"{placement.name} (in part)"] = rest
    return list(placements.values()), Report(
        tuple(dict.fromkeys(p.name for p in placements.values())), reasons
    )


def _spots(
    name: str, rules: Sequence[Rule], shapes: Mapping[str, Shape]
) -> list[tuple[str, int | None, Rule]] | str:
    """(path, block, rule) of each parameter that a tensor sets, or why it is not needed; [] for an unknown one."""
    spots = []
    for rule in rules:
        index = rule.index(name)
        if index is None:
            continue
        depth = shapes[rule.path][0] if rule.stacked and rule.path in shapes else 0
        if rule.stacked and index >= depth:
            return f"block {index} is deeper than the deepest hidden state used"
        if rule.path not in shapes:
            continue
        spots.append((rule.path, index if rule.stacked else None, rule))
    return spots


def _check_whole(name: str, rules: Sequence[Rule]) -> None:
    """Checks that parameters take, or make, all of a tensor.

    Raises:
      ValueError: naming the parameters that do.
    """
    count = rules[0].share[1]
    if [rule.share for rule in rules] != [(k, count) for k in range(count)]:
        paths = ", ".join(repr(rule.path) for rule in rules)
        raise ValueError(f"{name!r} holds {count} parameters, here only {paths}")


def _unread(source: Source, placement: Placement, wanted: Shape) -> str:
    """Why a part of a tensor is left out; "" when all of it is read.

    Raises:
      ValueError: the tensor does not give the parameter, or holds more than is read without a known reason.
    """
    stored, transform = source.shape(placement.name), placement.rule.transform
    part = found = back = None
    with contextlib.suppress(ValueError, IndexError):
        part = placement.rule.part(_of_shape(stored)).shape
        read = transform.read(_of_shape(part))
        found, back = read.shape, transform.write(read).shape
    if found != wanted or (back != part and not transform.leaves_out):
        gives = "no such layout" if found is None or found == wanted else found
        raise ValueError(
            f"{source.directory}: parameter {placement.path!r} needs shape {wanted}, {placement.name!r} gives "
            f"{gives} (stored as {stored})"
        )
    return transform.leaves_out if back != part else ""


def _of_shape(shape: Shape) -> np.ndarray:
    """An array of this shape that takes no memory."""
    return np.broadcast_to(np.zeros((), np.int8), shape)


def leaf_dtypes(source: Source, placements: Sequence[Placement]) -> dict[str, np.dtype]:
    """{path: dtype}; blocks stored in different dtypes are stacked in one that holds them all."""
    dtypes: dict[str, np.dtype] = {}
    for placement in placements:
        stored = source.dtype(placement.name)
        dtypes[placement.path] = np.dtype(jnp.promote_types(dtypes.get(placement.path, stored), stored))
    return dtypes


def read_tree(
    source: Source, placements: Sequence[Placement], shapes: Mapping[str, Shape], dtype: Any = None
) -> dict[str, Any]:
    """Reads placed tensors into NumPy arrays, one at a time.

    Args:
      dtype: of the result; None keeps the source's.
    """
    dtypes = leaf_dtypes(source, placements)
    leaves = {path: np.empty(shape, dtype or dtypes[path]) for path, shape in shapes.items()}
    for placement in placements:
        array = placement.rule.read(source.read(placement.name))
        leaves[placement.path][placement.index if placement.index is not None else ...] = array
    return unflatten(leaves)


def write_plan(
    params: Mapping[str, Any],
    rules: Sequence[Rule],
    dtype: Any = None,
    prefixes: Sequence[tuple[str, str]] = (),
) -> list[Planned]:
    """Tensors for `write_safetensors`, in the table's order of names, each made when it is written.

    Args:
      prefixes: (prefix in the table, prefix to write).

    Raises:
      ValueError: a parameter without a row, a row without its parameter, or a tensor without all of its rows.
    """
    leaves = dict(flatten(dict(params)))
    pieces: dict[str, list[Piece]] = {}  # more than one where a tensor holds several parameters
    for rule in rules:
        if rule.path not in leaves:
            raise ValueError(f"parameter {rule.path!r} is missing: {rule.name!r} cannot be written")
        leaf = leaves.pop(rule.path)
        for index in range(leaf.shape[0]) if rule.stacked else (None,):
            name = rule.name if index is None else rule.name.replace("{i}", str(index))
            for ours, theirs in prefixes:
                if name.startswith(ours):
                    name = theirs + name[len(ours) :]
                    break
            pieces.setdefault(name, []).append((rule, leaf, index))
    if leaves:
        raise ValueError(f"the weight-name table has no row for parameter {next(iter(leaves))!r}")
    return [_tensor(name, rows, dtype) for name, rows in pieces.items()]


def _tensor(name: str, pieces: Sequence[Piece], dtype: Any) -> Planned:
    """A tensor of `write_plan` of the parameters, or blocks of them, that it holds one behind the other."""
    _check_whole(name, [rule for rule, *_ in pieces])
    target = np.dtype(dtype or functools.reduce(jnp.promote_types, (leaf.dtype for _, leaf, _ in pieces)))
    shapes = [
        rule.transform.write(_of_shape(leaf.shape if index is None else leaf.shape[1:])).shape
        for rule, leaf, index in pieces
    ]
    shape = shapes[0] if len(shapes) == 1 else (sum(each[0] for each in shapes), *shapes[0][1:])

    def make() -> np.ndarray:
        arrays = [
            rule.transform.write(np.asarray(leaf if index is None else leaf[index])).astype(
                target, copy=False
            )
            for rule, leaf, index in pieces
        ]
        return arrays[0] if len(arrays) == 1 else np.concatenate(arrays)

    return name, target, shape, make
