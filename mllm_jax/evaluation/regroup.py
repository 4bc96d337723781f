"""Stored scores under another grouping of sub-tasks, without asking or scoring again."""

from collections.abc import Collection, Mapping
from typing import Any

from mllm_jax.evaluation.grouping import GROUPS, Table, group_scores, grouped, load_groups
from mllm_jax.evaluation.tables import COLUMNS, row_dicts, score_rows


def regroup(benchmark: Mapping[str, Any], table: Table) -> dict[str, Any]:
    """A benchmark of `summary.json` with the groups of `table`; as it is, if the table does not have it.

    Every condition is regrouped (`tables.COLUMNS`), and `groups` stays what it is for the benchmark: the mean over
    sub-tasks where `micro_groups` stands beside it (`benchmarks/mini.py`), else all questions pooled.

    Args:
      benchmark: `{kind, groups, rows, scores}`.
      table: from `grouping.load_groups`.

    Raises:
      ValueError: the table has the benchmark, but not one of its sub-tasks; or the stored scores do not say how many
        questions of each sub-task were right.
    """
    kind = base_kind(benchmark["kind"])
    if kind not in table or not benchmark["rows"]:
        return dict(benchmark)
    stored = benchmark["groups"]
    # Sub-tasks without a group so far (SEED-Bench's videos) need none.
    needed = {*load_groups().get(kind, ()), *table[kind], *(name for name in stored if stored[name])}
    scores: dict[str, Any] = dict(benchmark["scores"])
    for path in COLUMNS.values():
        scores = _regrouped_at(scores, path, kind, table, needed)
    entries = table[kind]
    groups = {n: entries[n].group if n in entries else "" for n in benchmark["scores"]["subtasks"]}
    known = [*GROUPS, *filter(None, groups.values()), ""]
    groups = {name: groups[name] for name in sorted(groups, key=lambda name: known.index(groups[name]))}
    return dict(benchmark) | {
        "groups": groups,
        "scores": scores,
        "rows": row_dicts(score_rows(scores, groups)),
    }


def base_kind(kind: str) -> str:
    """The key of a benchmark in grouping files: `mmbench_cn` has the sub-tasks of `mmbench`."""
    return kind.removesuffix("_cn")


def _regrouped_at(
    scores: Mapping[str, Any], path: tuple[str, ...], kind: str, table: Table, needed: Collection[str]
) -> dict[str, Any]:
    """`scores` with the object at `path` regrouped, if there is one."""
    if not path:
        return _regrouped(scores, kind, table, needed)
    inner = scores.get(path[0])
    if not isinstance(inner, Mapping):
        return dict(scores)
    return dict(scores) | {path[0]: _regrouped_at(inner, path[1:], kind, table, needed)}


def _regrouped(scores: Mapping[str, Any], kind: str, table: Table, needed: Collection[str]) -> dict[str, Any]:
    if not scores.get("subtasks"):
        return dict(scores)
    if scores.get("unit") == "points":  # MME
        points = scores["subtasks"]
        found = {
            "groups": group_scores(kind, points, "sum", table),
            "group_mean": group_scores(kind, points, "macro", table),
            "group_normalised": group_scores(kind, points, "normalised", table),
        }
        if "mme_authors" in table:
            found["group_authors"] = group_scores("mme_authors", points, "sum", table)
        return dict(scores) | found
    if "counts" not in scores:
        raise ValueError(
            f"the stored scores of {kind!r} do not say how many questions of each sub-task were right, so that its "
            f"sub-tasks cannot be regrouped; leave {kind!r} out of the grouping file"
        )
    combined = grouped(kind, {n: cell for n, cell in scores["counts"].items() if n in needed}, table)
    scale = 100.0 if scores.get("unit") == "percent" else 1.0
    ways = {way: {g: scale * v for g, v in combined[way].items()} for way in ("micro", "macro")}
    if "micro_groups" in scores:
        own = {"groups": ways["macro"], "micro_groups": ways["micro"]}
    else:
        own = {"groups": ways["micro"]}
    return dict(scores) | own | {"group_scores": combined}
