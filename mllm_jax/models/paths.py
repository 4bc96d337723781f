"""Parameter trees by path: freezing, rates, sharding and weight names all speak of `llm/blocks/q/kernel`."""

import re
from collections.abc import Iterable
from typing import Any

import flax.traverse_util
import jax

Tree = dict[str, Any]


def path_of(key_path: tuple) -> str:
    """A JAX key path of nested dicts as "a/b/c"."""
    return "/".join(str(key.key) for key in key_path)


def flatten(tree: Tree) -> dict[str, Any]:
    """Nested dict -> {"a/b/c": leaf}."""
    return flax.traverse_util.flatten_dict(tree, sep="/")


def unflatten(flat: dict[str, Any]) -> Tree:
    """{"a/b/c": leaf} -> nested dict."""
    return flax.traverse_util.unflatten_dict(flat, sep="/")


def split(tree: Tree, patterns: Iterable[str]) -> tuple[Tree, Tree]:
    """(leaves whose path fully matches a pattern, the rest).

    Raises:
      ValueError: a pattern that matches nothing.
    """
    flat = flatten(tree)
    chosen: set[str] = set()
    for pattern in patterns:
        found = {path for path in flat if re.fullmatch(pattern, path)}
        if not found:
            tops = ", ".join(sorted({path.split("/")[0] + "/..." for path in flat}))
            raise ValueError(f"pattern {pattern!r} matches no parameter; paths look like {tops}")
        chosen |= found
    inside = {path: leaf for path, leaf in flat.items() if path in chosen}
    outside = {path: leaf for path, leaf in flat.items() if path not in chosen}
    return unflatten(inside), unflatten(outside)


def merge(*trees: Tree) -> Tree:
    """One nested dict from disjoint parts.

    Raises:
      ValueError: two parts hold the same path.
    """
    flat: dict[str, Any] = {}
    for tree in trees:
        part = flatten(tree)
        if both := flat.keys() & part.keys():
            raise ValueError(f"parameter {min(both)!r} is in two parts")
        flat |= part
    return unflatten(flat)


def count(tree: Any) -> int:
    """Number of scalars in a tree of arrays or shapes."""
    return sum(int(leaf.size) for leaf in jax.tree.leaves(tree))
