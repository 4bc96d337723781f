"""What the report of one or several runs says: a list of sections, and the figures in them."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.grouping import Table as Groups
from mllm_jax.evaluation.grouping import paper_axes
from mllm_jax.evaluation.report import cost_plot, losses, radar
from mllm_jax.evaluation.report.example_sheet import plot_examples
from mllm_jax.evaluation.report.runs import Run, differing_keys
from mllm_jax.evaluation.report.sections import Examples, Figure, Figures, Part, Section, Table
from mllm_jax.evaluation.tables import columns_of, combined_groups, label, percent

BASELINES = {"blind": "blind", "majority": "majority answer"}
_COSTS = {"visual tokens per image": "tokens", "seconds per update": "time"}  # cost -> in file names
_MANY_KEYS = 10  # longer lists of differing keys are shown when asked for
_WIDE = 4  # more runs than this stand under each other instead of beside each other


def make_sections(runs: Sequence[Run], out: Path, table: Groups | None) -> list[Section]:
    """Every section of the report; their figures are written into `out`.

    Args:
      table: another grouping than the one that the runs were scored with; None for none.
    """
    found: list[Section] = []
    names = list(dict.fromkeys(name for run in runs for name in run.benchmarks))
    for name in names:
        asked = [run for run in runs if name in run.benchmarks]
        found += _benchmark(name, asked, out, f"_{_slug(name)}" if len(names) > 1 else "", table)
    found.append(Section("Models and cost", (_models(runs),)))
    found += _differences(runs)
    if trained := {run.name: run.metrics for run in runs if run.metrics}:
        found.append(Section("Training", (_losses(trained, out),)))
    return found


def _slug(name: str) -> str:
    """A name as a part of a file's name."""
    return re.sub(r"[^A-Za-z0-9_-]", "_", name)


def _losses(trained: dict[str, Any], out: Path) -> Figures:
    """A figure per stage."""
    figures = []
    for stage in dict.fromkeys(stage for stages in trained.values() for stage in stages):
        file = f"loss_{_slug(stage)}.png"
        runs = {name: {stage: stages[stage]} for name, stages in trained.items() if stage in stages}
        losses.plot_loss_curves(runs, out / file)
        figures.append(Figure(file, f"Training loss, stage {stage}"))
    return Figures(tuple(figures))


def _models(runs: Sequence[Run]) -> Table:
    facts: dict[str, list[str]] = {}

    def add(name: str, values: Sequence[Any]) -> None:
        if any(value not in (None, "", {}) for value in values):
            facts[name] = ["–" if value in (None, "", {}) else str(value) for value in values]

    models = [run.model for run in runs]
    add("connector", [model["connector"] for model in models])
    options = [model["connector_options"] for model in models]
    add("its options", [", ".join(f"{k} = {v}" for k, v in one.items()) for one in options])
    add("image size, px", [model["image_size"] for model in models])
    add("vision tower", [model["vision"] for model in models])
    add("LLM", [model["llm"] for model in models])
    for part in ("vision", "connector", "llm"):
        add(f"parameters, {part}", [f"{model['parameters'].get(part, 0):,}" for model in models])
    for key in dict.fromkeys(key for run in runs for key in run.costs):
        values = [run.costs.get(key) for run in runs]
        add(key, [None if v is None else f"{v:,.0f}" if v >= 10 else f"{v:.3g}" for v in values])
    for name in dict.fromkeys(name for run in runs for name in run.benchmarks) if len(runs) > 1 else ():
        add(f"unread answers, {name}", [_unread(run, name) for run in runs])
    rows = tuple((name, *values) for name, values in facts.items())
    return _turned(Table(("", *(run.name for run in runs)), rows), runs)


def _unread(run: Run, name: str) -> str:
    scores = run.benchmarks[name]["scores"] if name in run.benchmarks else {}
    return f"{scores['unparsed']} of {scores.get('rows', scores['n'])}" if scores.get("unparsed") else ""


def _turned(table: Table, runs: Sequence[Run]) -> Table:
    return table.turned() if len(runs) > _WIDE else table


def _differences(runs: Sequence[Run]) -> list[Section]:
    if len(runs) < 2 or not (keys := differing_keys(runs)):
        return []
    rows = tuple((key, *values) for key, values in keys.items())
    table = _turned(Table(("key", *(run.name for run in runs)), rows), runs)
    title = f"Configuration keys that differ ({len(rows)})"
    return [Section(title, (table,), level=3, folded=len(rows) > _MANY_KEYS)]


def _benchmark(name: str, runs: Sequence[Run], out: Path, suffix: str, table: Groups | None) -> list[Section]:
    parts: list[Part] = _about(name, runs)
    sections = [Section(name, ())]  # its parts are complete at the end
    if runs[0].rows(name):
        combined = _combined(name, runs)
        parts.append(_table(name, runs, groups=True))
        parts += combined if len(runs) == 1 else ()
        parts += _radars(name, runs, out, suffix, table)
        sections.append(Section(f"{name}: abilities", (_table(name, runs, groups=False),), level=3))
        if combined and len(runs) > 1:
            title = f"{name}: groups, micro and macro"
            sections.append(Section(title, tuple(combined), level=3, folded=True))
        sections += _costs(name, runs, out, suffix)
    sections[0] = Section(name, tuple(parts))
    for number, run in enumerate(runs):
        if examples := run.examples.get(name):
            file = f"examples{suffix}{'' if len(runs) == 1 else f'_{number + 1}'}.png"
            plot_examples(examples, out / file)
            title = f"{name}: examples" + (f" of {run.name}" if len(runs) > 1 else "")
            judged = any(one["right"] is not None for one in examples)
            note = ("Right and wrong answers take turns here, whatever their share.",) if judged else ()
            shown = Examples(examples, Figure(file, f"Example answers of {run.name}"))
            sections.append(Section(title, (*note, shown), level=3, folded=len(runs) > 1))
    return sections


def _about(name: str, runs: Sequence[Run]) -> list[Part]:
    """How many questions there are and how they count, and what the numbers below must not be taken for."""
    counts = [run.benchmarks[name]["scores"]["n"] for run in runs]
    said = f"{counts[0]} questions." if len(set(counts)) == 1 else ""
    unread = [_unread(run, name) for run in runs]
    if len(runs) == 1 and unread[0]:
        said += f" Answers that could not be read count as wrong: {unread[0]}."
    elif any(unread):
        said += " Answers that could not be read count as wrong; how many, stands under “Models and cost”."
    if runs[0].benchmarks[name]["kind"] == "mini":
        said += (
            " A question counts if it is answered right under every rotation of its options (circular evaluation); "
            "“open” asks the same without options."
        )
    parts: list[Part] = [said.strip()] if said else []
    digests = {run.digests.get(name, "") for run in runs} - {""}
    if len(set(counts)) > 1 or len(digests) > 1:
        parts.append(_unlike(name, runs, counts))
    if len(runs) == 1 and any("likelihood" in row.values for row in runs[0].rows(name)):
        parts.append(
            "“likelihood” is another way of asking: the option to which the model gives the highest probability "
            "counts as its answer, so that nothing has to be written or read. A model that does not answer in the form "
            "of an option can be high there and near zero under “model”; the two are not to be compared."
        )
        if (chance := runs[0].asked(name).chance) is not None:
            parts[-1] += f" Guessing among the options gives {percent(chance)} %, either way."
    return parts


def _unlike(name: str, runs: Sequence[Run], counts: Sequence[int]) -> str:
    """That the runs were not asked the same; no difference between them is worked out, only what they share."""
    numbers = ", ".join(f"{run.name} {n}" for run, n in zip(runs, counts, strict=True))
    said = f"These runs were not asked the same questions ({numbers})"
    ids = [run.asked(name).ids for run in runs]
    if all(ids):
        common = len(frozenset.intersection(*ids))
        said += f"; {common} question ids are common to all of them"
        if all(one == ids[0] for one in ids):
            said = f"These runs were asked the same {common} question ids, but in other words, or with other options"
    return f"{said}. Their figures are not to be compared with each other."


def _table(name: str, runs: Sequence[Run], groups: bool) -> Table:
    """Scores in percent: all conditions of one run, or several runs side by side with the majority answer.

    Where the runs' numbers of questions differ, each has its own column of them.
    """
    tables = {run.name: {(row.level, row.name): row for row in run.rows(name)} for run in runs}
    keys = dict.fromkeys(key for rows in tables.values() for key in rows if (key[0] == "ability") != groups)
    counts = {key: [rows[key].n if key in rows else 0 for rows in tables.values()] for key in keys}
    alike = all(len(set(ns)) == 1 for ns in counts.values())
    if len(runs) == 1:
        columns = [
            (column, runs[0].name, column) for column in columns_of(list(tables[runs[0].name].values()))
        ]
    else:
        columns = [(run.name, run.name, "model") for run in runs]
        columns += [(f"{run.name}, blind", run.name, "blind") for run in runs] if groups else []
        if alike:
            columns += [("majority", runs[0].name, "majority")]
        else:
            columns += [(f"{run.name}, majority", run.name, "majority") for run in runs]
        held = {
            (run, column) for run, rows in tables.items() for row in rows.values() for column in row.values
        }
        columns = [one for one in columns if one[1:] in held]
    rows = []
    for key in keys:
        found = [tables[run].get(key) for _, run, _ in columns]
        cells = [
            percent(row.values.get(column) if row else None)
            for row, (_, _, column) in zip(found, columns, strict=True)
        ]
        shown = counts[key][:1] if alike else counts[key]
        rows.append((label(key[1]), *(str(n or "") for n in shown), *cells))
    strong = frozenset(index for index, key in enumerate(keys) if key[0] == "all")
    number = ("n",) if alike else tuple(f"n, {run.name}" for run in runs)
    table = Table(("%", *number, *(column for column, _, _ in columns)), tuple(rows), strong)
    return _turned(table, runs)


def _combined(name: str, runs: Sequence[Run]) -> list[Part]:
    """Group scores in every way of combining sub-tasks, as the paper leaves that open."""
    found = {run.name: combined_groups(run.benchmarks[name]["scores"]) for run in runs}
    groups = list(dict.fromkeys(g for ways in found.values() for values in ways.values() for g in values))
    rows = tuple(
        (way if len(runs) == 1 else f"{run}, {way}", *(values.get(group, "–") for group in groups))
        for run, ways in found.items()
        for way, values in ways.items()
    )
    if not rows:
        return []
    about = (
        "The model's groups as their abilities combine (micro: questions pooled, macro: mean of abilities):"
    )
    return [about, Table(("", *map(label, groups)), rows)]


def _radars(name: str, runs: Sequence[Run], out: Path, suffix: str, table: Groups | None) -> list[Part]:
    """Radar charts per image size; of several runs also one with a scale per axis, as in the paper.

    Where the paper's own axes are known (MMBench), the charts have those, else every ability.
    """
    found: list[Part] = []
    sizes = sorted({run.model["image_size"] for run in runs})
    for size in sizes:
        same = [run for run in runs if run.model["image_size"] == size]
        groups = same[0].benchmarks[name]["groups"]
        axes = [axis for axis in paper_axes(same[0].benchmarks[name]["kind"], table) if axis in groups]
        if len(axes) >= 3:
            if not found:
                found.append(f"The charts show the {len(axes)} abilities here that are on the paper's chart.")
            groups = {axis: groups[axis] for axis in axes}
        if len(groups) < 3:
            continue
        if len(same) == 1:
            series = _series(same[0], name, "model", ("model", *BASELINES))
        else:
            series = []
            for run in same:
                series += _series(run, name, f"{run.name}, {run.model['visual_tokens']} tokens", ("model",))
        title = f"{name}, {size} px"
        stem = f"radar{suffix}{f'_{size}px' if len(sizes) > 1 else ''}"
        if len(same) == 1:
            title += f", {same[0].model['visual_tokens']} visual tokens"
        said = f"Accuracy on each ability of {name} at {size} px"
        figures = [Figure(f"{stem}.png", said)]
        majority = _series(same[0], name, "", ("majority",)) if len(same) > 1 else []
        radar.plot_radar([*series, *majority], groups, out / figures[0].file, title)
        if len(same) > 1:
            figures.append(Figure(f"{stem}_own_scales.png", f"{said}, a scale per axis"))
            radar.plot_radar(
                series, groups, out / figures[1].file, f"{title}, a scale per axis", own_scales=True
            )
        found.append(Figures(tuple(figures)))
    return found


def _series(run: Run, name: str, title: str, columns: Sequence[str]) -> list[radar.Series]:
    rows = [row for row in run.rows(name) if row.level == "ability"]
    found = []
    for column in columns:
        values = {row.name: row.values[column] for row in rows if column in row.values}
        if values:
            found.append(radar.Series(BASELINES.get(column, title), values, column))
    return found


def _costs(name: str, runs: Sequence[Run], out: Path, suffix: str) -> list[Section]:
    """Accuracy of each group against each cost that all runs know, where there is something to compare."""
    if len(runs) < 2:
        return []
    strips = []
    for cost, word in _COSTS.items():
        if not all(cost in run.costs for run in runs) or len({run.costs[cost] for run in runs}) < 2:
            continue
        points = _cost_points(name, runs, cost)
        figures = []
        for group in dict.fromkeys(group for point in points for group in point.scores):
            # Names of groups are anyone's: "a b" and "a_b" must not share a file.
            file = f"cost_{word}{suffix}_{len(figures) + 1}_{_slug(group)}.png"
            cost_plot.plot_cost(points, group, cost, out / file)
            figures.append(Figure(file, f"Accuracy on {name}, {label(group)}, against {cost}"))
        strips.append(Figures(tuple(figures)))
    return [Section(f"{name}: accuracy against cost", tuple(strips), level=3)] if strips else []


def _cost_points(name: str, runs: Sequence[Run], cost: str) -> list[cost_plot.CostPoint]:
    """Runs of one connector at several resolutions are a series; if that does not tell runs apart, each is its own."""
    kinds = [(run.model["connector"], run.model["image_size"]) for run in runs]
    sizes = len({size for _, size in kinds}) > 1
    joined = len(set(kinds)) == len(kinds) and sizes
    points = []
    for run, (connector, size) in zip(runs, kinds, strict=True):
        levels = {row.level for row in run.rows(name)}
        level = "group" if "group" in levels else "all"
        scores = {
            r.name: r.values["model"] for r in run.rows(name) if r.level == level and "model" in r.values
        }
        series = str(connector) if joined else run.name
        points.append(cost_plot.CostPoint(series, f"{size} px" if sizes else "", run.costs[cost], scores))
    return points  # in the order of the runs, so that colours are those of the other charts
