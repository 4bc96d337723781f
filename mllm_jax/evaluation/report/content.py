"""What the report of one or several runs says: a list of sections, and the figures in them."""

import re
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax.evaluation.grouping import Table as Groups
from mllm_jax.evaluation.grouping import paper_axes
from mllm_jax.evaluation.report import cost_plot, losses, radar
from mllm_jax.evaluation.report.example_sheet import plot_examples
from mllm_jax.evaluation.report.paired import ALL, RESAMPLES, Comparison
from mllm_jax.evaluation.report.questions import guessing, read_questions
from mllm_jax.evaluation.report.runs import Run, differing_keys
from mllm_jax.evaluation.report.sections import Examples, Figure, Figures, Part, Section, Table
from mllm_jax.evaluation.tables import Row, columns_of, combined_groups, label, percent
from mllm_jax.storage import Path

BASELINES = {"blind": "blind", "majority": "majority answer"}
_COSTS = {"visual tokens per image": "tokens", "seconds per update": "time"}  # cost -> in file names
_MANY_KEYS = 10  # longer lists of differing keys are shown when asked for
_WIDE = 4  # more runs than this stand under each other instead of beside each other


def make_sections(
    runs: Sequence[Run],
    out: Path,
    table: Groups | None,
    baseline: Run,
    compared: Mapping[str, Sequence[Comparison]],
) -> list[Section]:
    """Every section of the report; their figures are written into `out`.

    Args:
      table: another grouping than the one that the runs were scored with; None for none.
      baseline: the run that the others are compared with.
      compared: benchmark -> the other runs beside the baseline.
    """
    found: list[Section] = []
    names = list(dict.fromkeys(name for run in runs for name in run.benchmarks))
    for name in names:
        asked = [run for run in runs if name in run.benchmarks]
        first, *more = _benchmark(name, asked, out, f"_{_slug(name)}" if len(names) > 1 else "", table)
        found += [first, *_paired(name, asked, baseline, compared.get(name, ())), *more]
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
    models = [run.model for run in runs]
    facts: dict[str, list[Any]] = {
        "connector": [model["connector"] for model in models],
        "its options": [
            ", ".join(f"{key} = {value}" for key, value in model["connector_options"].items())
            for model in models
        ],
        "image size, px": [model["image_size"] for model in models],
        "vision tower": [model["vision"] for model in models],
        "LLM": [model["llm"] for model in models],
    }
    for part in ("vision", "connector", "llm"):
        facts[f"parameters, {part}"] = [f"{model['parameters'].get(part, 0):,}" for model in models]
    for key in dict.fromkeys(key for run in runs for key in run.costs):
        values = [run.costs.get(key) for run in runs]
        facts[key] = [None if v is None else f"{v:,.0f}" if v >= 10 else f"{v:.3g}" for v in values]
    for name in dict.fromkeys(name for run in runs for name in run.benchmarks) if len(runs) > 1 else ():
        facts[f"unread answers, {name}"] = [_unread(run, name) for run in runs]
    unknown = (None, "", {})
    rows = (
        (name, *("–" if value in unknown else str(value) for value in values))
        for name, values in facts.items()
        if any(value not in unknown for value in values)
    )
    return _turned(Table(("", *(run.name for run in runs)), tuple(rows)), runs)


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
    if runs[0].benchmarks[name]["kind"] in ("mini", "mini_video"):
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
        if (chance := guessing(runs[0], name)) is not None:
            parts[-1] += f" Guessing among the options gives {percent(chance)} %, either way."
    return parts


def _unlike(name: str, runs: Sequence[Run], counts: Sequence[int]) -> str:
    """That the runs were not asked the same, and how much they share."""
    numbers = ", ".join(f"{run.name} {n}" for run, n in zip(runs, counts, strict=True))
    said = f"These runs were not asked the same questions ({numbers})"
    ids = [read_questions(run, name).keys() for run in runs]
    if all(ids):
        common = len(set(ids[0]).intersection(*ids))
        said += f"; {common} question ids are common to all of them"
        if all(one == ids[0] for one in ids):
            said = f"These runs were asked the same {common} question ids, but in other words, or with other options"
    return f"{said}. Their figures are not to be compared with each other."


def _paired(
    name: str, runs: Sequence[Run], baseline: Run, comparisons: Sequence[Comparison]
) -> list[Section]:
    """Differences from the baseline, on common questions alone."""
    if len(runs) < 2 or not runs[0].rows(name):
        return []
    title = f"{name}: differences from {baseline.name}"
    if not comparisons:
        return [Section(title, (f"None: {baseline.name} was not asked {name}.",), level=3)]
    parts: list[Part] = [f"No difference is shown: {one.absent}." for one in comparisons if one.absent]
    found = [(one.run, difference) for one in comparisons for difference in one.differences]
    if found:
        about = (
            "Computed only on the n questions that both runs were asked in the same words: what one of them earns on "
            "average, in percent (with several rotations of its options, all have to be right), the questions of a "
            "group pooled; scores that are made in another way (F1, points, means of sub-tasks) can differ from that. "
            f"The interval holds 95 % of {RESAMPLES:,} bootstrap samples of these questions."
        )
        alone = len(comparisons) == 1
        rows = tuple(
            (
                label(one.group) if alone else f"{run}, {label(one.group)}",
                str(one.n),
                percent(one.baseline),
                percent(one.score),
                f"{100 * one.difference:+.1f}",
                f"[{100 * one.low:+.1f}, {100 * one.high:+.1f}]",
            )
            for run, one in found
        )
        head = ("%", "n", baseline.name, found[0][0] if alone else "run", "difference", "95 % interval")
        strong = frozenset(index for index, (_, one) in enumerate(found) if one.group == ALL)
        parts = [about, Table(head, rows, strong), *parts]
    return [Section(title, tuple(parts), level=3)]


def _table(name: str, runs: Sequence[Run], groups: bool) -> Table:
    """Scores in percent: all conditions of one run, or several runs side by side with the majority answer.

    Where the runs' numbers of questions differ, each has its own column of them.
    """
    tables = [{(row.level, row.name): row for row in run.rows(name)} for run in runs]
    keys = dict.fromkeys(key for rows in tables for key in rows if (key[0] == "ability") != groups)
    none = Row("", "", "", 0, {})
    alike = all(len({rows.get(key, none).n for rows in tables}) == 1 for key in keys)
    if len(runs) == 1:
        columns = [(column, tables[0], column) for column in columns_of(runs[0].rows(name))]
    else:
        named = [(run.name, rows) for run, rows in zip(runs, tables, strict=True)]
        columns = [(run, rows, "model") for run, rows in named]
        columns += [(f"{run}, blind", rows, "blind") for run, rows in named if groups]
        columns += [(f"{run}, majority", rows, "majority") for run, rows in named if not alike]
        columns += [("majority", tables[0], "majority")] if alike else []
        columns = [one for one in columns if any(one[2] in row.values for row in one[1].values())]
    rows = tuple(
        (
            label(key[1]),
            *(str(rows.get(key, none).n or "") for rows in tables[: 1 if alike else None]),
            *(percent(rows.get(key, none).values.get(column)) for _, rows, column in columns),
        )
        for key in keys
    )
    number = ("n",) if alike else tuple(f"n, {run.name}" for run in runs)
    strong = frozenset(index for index, key in enumerate(keys) if key[0] == "all")
    return _turned(Table(("%", *number, *(column for column, _, _ in columns)), rows, strong), runs)


def _combined(name: str, runs: Sequence[Run]) -> list[Part]:
    """Group scores in every way of combining sub-tasks, as the paper leaves that open."""
    found = [
        (way if len(runs) == 1 else f"{run.name}, {way}", values)
        for run in runs
        for way, values in combined_groups(run.benchmarks[name]["scores"]).items()
    ]
    if not found:
        return []
    groups = dict.fromkeys(group for _, values in found for group in values)
    rows = tuple((way, *(values.get(group, "–") for group in groups)) for way, values in found)
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
        first = same[0]
        groups = first.benchmarks[name]["groups"]
        axes = [axis for axis in paper_axes(first.benchmarks[name]["kind"], table) if axis in groups]
        if len(axes) >= 3:
            if not found:
                found.append(f"The charts show the {len(axes)} abilities here that are on the paper's chart.")
            groups = {axis: groups[axis] for axis in axes}
        if len(groups) < 3:
            continue
        title, said = f"{name}, {size} px", f"Accuracy on each ability of {name} at {size} px"
        file = f"radar{suffix}{f'_{size}px' if len(sizes) > 1 else ''}.png"
        figures = [Figure(file, said)]
        if len(same) == 1:
            title += f", {first.model['visual_tokens']} visual tokens"
            shown = [
                _series(first, name, BASELINES.get(column, column), column)
                for column in ("model", *BASELINES)
            ]
            radar.plot_radar(_held(shown), groups, out / file, title)
        else:
            models = [_series(run, name, f"{run.name}, {run.model['visual_tokens']} tokens") for run in same]
            majority = _series(first, name, BASELINES["majority"], "majority")
            radar.plot_radar(_held([*models, majority]), groups, out / file, title)
            own = Figure(file.replace(".png", "_own_scales.png"), f"{said}, a scale per axis")
            title += ", a scale per axis"
            radar.plot_radar(_held(models), groups, out / own.file, title, own_scales=True)
            figures.append(own)
        found.append(Figures(tuple(figures)))
    return found


def _series(run: Run, name: str, title: str, column: str = "model") -> radar.Series:
    rows = [row for row in run.rows(name) if row.level == "ability" and column in row.values]
    return radar.Series(title, {row.name: row.values[column] for row in rows}, column)


def _held(series: Sequence[radar.Series]) -> list[radar.Series]:
    """Those that hold any score."""
    return [one for one in series if one.values]


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
    """Runs of one connector at several resolutions are a series; if that does not tell runs apart, each is its own.

    In the order of the runs, so that colors are those of the other charts.
    """
    kinds = [(run.model["connector"], run.model["image_size"]) for run in runs]
    sizes = len({size for _, size in kinds}) > 1
    joined = len(set(kinds)) == len(kinds) and sizes
    points = []
    for run, (connector, size) in zip(runs, kinds, strict=True):
        rows = [row for row in run.rows(name) if "model" in row.values]
        level = "group" if any(row.level == "group" for row in run.rows(name)) else "all"
        scores = {row.name: row.values["model"] for row in rows if row.level == level}
        series = str(connector) if joined else run.name
        points.append(cost_plot.CostPoint(series, f"{size} px" if sizes else "", run.costs[cost], scores))
    return points
