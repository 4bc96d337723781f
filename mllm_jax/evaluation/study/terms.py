"""What runs of a study have to have in common: their configuration, without what the cells are there to vary.

It is read from the runs themselves, so that an option of the command line, a recipe that has been changed since, or a
cell's note that is not of its run do not go unnoticed.
"""

import pathlib
from collections.abc import Mapping
from typing import Any

from ml_collections import ConfigDict

from mllm_jax.config import changes_scores, items
from mllm_jax.evaluation.report.runs import ReportError
from mllm_jax.schema import Key

CONNECTOR = "model.connector."
NAMED = ("path", "json")  # ends of keys whose files make a difference, wherever they lie
CHOOSING = ("data.broken", "data.overlong")  # resumable, but they choose samples


def terms(config: ConfigDict, overrides: Mapping[str, Any], run: str) -> dict[str, Any]:
    """Key -> value of what the run shares with those that it can be compared with.

    Places, and what changes a run's speed alone, are no terms; of a file its name is one.

    Args:
      config: of the run.
      overrides: what its cell sets, as the sweep noted it.
      run: its name, for messages.

    Raises:
      ReportError: the run has other values than its cell.
    """
    found = {}
    for key, node, value in items(config):
        if key in overrides:
            if value != overrides[key]:
                raise ReportError(
                    f"{run} ran with {key} = {value!r}, but its cell has {overrides[key]!r}; run the cell in another "
                    "--workdir"
                )
        elif _is_term(key, node):
            found[key] = pathlib.PurePath(value).name if node.path and isinstance(value, str) else value
    return found


def joined(held: Mapping[str, Any], found: Mapping[str, Any], one: str, other: str) -> dict[str, Any]:
    """The terms of both; a key that only one of them has is what cells of the other set.

    Args:
      one, other: whose they are, for messages.

    Raises:
      ReportError: they differ.
    """
    for key in held.keys() & found.keys():
        if held[key] != found[key]:
            raise ReportError(
                f"{other} ran with {key} = {found[key]!r} and {one} with {held[key]!r}, so they cannot be compared"
            )
    return {**held, **found}


def _is_term(key: str, node: Key) -> bool:
    if key == "seed" or (key.startswith(CONNECTOR) and key != CONNECTOR + "path"):
        return False
    if node.path:
        return key.rpartition(".")[2] in NAMED
    if key.startswith("eval."):
        return changes_scores(key)
    return key in CHOOSING or not node.resumable
