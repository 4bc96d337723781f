"""Stored scores under another grouping of sub-tasks, without asking or scoring again."""

from collections.abc import Mapping
from typing import Any

from mllm_jax.evaluation.grouping import GROUPS, Table, group_scores, grouped, load_groups
from mllm_jax.evaluation.tables import COLUMNS, row_dicts, score_rows


def regroup(benchmark: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """A benchmark of `summary.json` with the groups of `table`; as it is, if the table does not have it.

    Args:
      benchmark: `{kind, groups, rows, scores}`.
      table: from `grouping.load_groups`.

    Raises:
      ValueError: the table has the benchmark, but not one of its sub-tasks.
    """
    kind = benchmark["kind"].removesuffix("_cn")
    if kind not in table or not benchmark["rows"]:
        return dict(benchmark)
    scores = _regrouped(benchmark["scores"], kind, table)
    for path in COLUMNS.values():
        if len(path) == 1 and path[0] in scores:
            scores[path[0]] = _regrouped(scores[path[0]], kind, table)
    entries = table[kind]
    groups = {n: entries[n].group if n in entries else "" for n in benchmark["scores"]["subtasks"]}
    known = [*GROUPS, *filter(None, groups.values()), ""]
    groups = {name: groups[name] for name in sorted(groups, key=lambda name: known.index(groups[name]))}
    return dict(benchmark) | {
        "groups": groups,
        "scores": scores,
        "rows": row_dicts(score_rows(scores, groups)),
    }


def _regrouped(scores: Mapping[str, Any], kind: str, table: Table) -> dict[str, Any]:
    if not scores.get("subtasks"):
        return dict(scores)
    if scores.get("unit") == "points":  # MME
        points = scores["subtasks"]
        return dict(scores) | {
            "groups": group_scores(kind, points, "sum", table),
            "group_mean": group_scores(kind, points, "macro", table),
            "group_normalised": group_scores(kind, points, "normalised", table),
        }
    shipped = load_groups().get(kind, {})  # what has no group there (SEED-Bench's videos) needs none
    counts = {name: cell for name, cell in scores["counts"].items() if name in shipped or name in table[kind]}
    found = grouped(kind, counts, table)
    return dict(scores) | {"groups": found["micro"], "group_scores": found}
