"""One report of one or several runs: a self-contained HTML page, the same as Markdown, and JSON.

The content is a list of sections (`sections.py`) made once; `page.py` and the Markdown writer below only dress it.
"""

import difflib
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_jax import files
from mllm_jax.evaluation.grouping import Table as Groups
from mllm_jax.evaluation.grouping import load_groups, paper_axes
from mllm_jax.evaluation.regroup import base_kind
from mllm_jax.evaluation.report import cost_plot, plots, radar
from mllm_jax.evaluation.report.page import render_page
from mllm_jax.evaluation.report.runs import ReportError, Run, differing_keys, load_runs
from mllm_jax.evaluation.report.sections import Examples, Part, Picture, Section, Strip, Table
from mllm_jax.evaluation.tables import columns_of, combined_groups, label, percent

BASELINES = {"blind": "blind", "majority": "majority answer"}
_COSTS = {"visual tokens per image": "tokens", "seconds per update": "time"}  # cost -> in file names
_MANY_KEYS = 10  # longer lists of differing keys are shown when asked for
_WIDE = 4  # more runs than this stand under each other instead of beside each other


def write_report(
    directories: Sequence[str | Path], out: str | Path, groups: str | Path | None = None
) -> Path:
    """Reports finished runs.

    Args:
      directories: work directories that hold an evaluation.
      out: folder for `report.html`, `report.md`, `report.json` and the pictures; made if needed, older reports in
        it are replaced.
      groups: a grouping file, instead of the groups that the runs were scored with.

    Returns:
      The page's path.

    Raises:
      ReportError: a folder without evaluation, or given twice; a grouping file that cannot be used, or that groups
        no benchmark of these runs.
    """
    try:
        table = None if groups is None else load_groups(Path(groups))
    except ValueError as error:
        raise ReportError(str(error)) from error
    runs, out = load_runs(directories, table), Path(out)
    about = "" if table is None else _about_groups(runs, table, groups)
    out.mkdir(parents=True, exist_ok=True)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = _sections(runs, out, table)
    if about:
        sections.insert(0, Section("Grouping", (about,)))
    page = out / "report.html"
    files.write_text(page, render_page(title, sections, out))
    files.write_text(out / "report.md", _markdown(title, sections))
    grouping = {} if groups is None else {"groups": str(groups)}
    files.write_json(out / "report.json", grouping | {"runs": [_as_json(run) for run in runs]})
    return page


def _about_groups(runs: Sequence[Run], table: Groups, file: str | Path | None) -> str:
    """Which file the groups come from, and what of it is used.

    Raises:
      ReportError: a name in it is no benchmark, or it groups none of those here.
    """
    # Its readers of official files take a while to import; only this needs the names.
    from mllm_jax.evaluation.benchmarks import BENCHMARKS

    known = {*map(base_kind, BENCHMARKS), *load_groups()}
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]!r}?" if near else f"; there are {', '.join(sorted(known))}"
            raise ReportError(f"{file}: {name!r} is no benchmark{hint}")
    here = {base_kind(one["kind"]) for run in runs for one in run.benchmarks.values() if one["rows"]}
    used = [name for name in table if name in here]
    if not used:
        raise ReportError(
            f"{file} groups {', '.join(table) or 'nothing'}, but the benchmarks scored here are "
            f"{', '.join(sorted(here)) or 'none'}; add one of them to the file, or leave --groups out"
        )
    if "mme" in used and "mme_authors" in table:
        used.append("mme_authors")
    about = f"Sub-tasks of {', '.join(used)} are grouped by {file}."
    if unused := [name for name in table if name not in used]:
        about += f" It also groups {', '.join(unused)}, of which no scores are shown here."
    if rest := sorted(here - set(used)):
        about += f" It does not have {', '.join(rest)}, whose groups are as stored."
    return about


def _as_json(run: Run) -> dict[str, Any]:
    kept = {"name": run.name, "model": run.model, "costs": run.costs, "benchmarks": run.benchmarks}
    final = {stage: records[-1]["loss"] for stage, records in run.metrics.items()}
    return kept | {"final_loss": final, "config": run.config}


def _sections(runs: Sequence[Run], out: Path, table: Groups | None) -> list[Section]:
    found: list[Section] = []
    names = list(dict.fromkeys(name for run in runs for name in run.benchmarks))
    for name in names:
        asked = [run for run in runs if name in run.benchmarks]
        found += _benchmark(name, asked, out, f"_{name}" if len(names) > 1 else "", table)
    found.append(Section("Models and cost", (_models(runs),)))
    found += _differences(runs)
    if trained := {run.name: run.metrics for run in runs if run.metrics}:
        found.append(Section("Training", (_losses(trained, out),)))
    return found


def _losses(trained: dict[str, Any], out: Path) -> Strip:
    """A picture per stage."""
    pictures = []
    for stage in dict.fromkeys(stage for stages in trained.values() for stage in stages):
        file = f"loss_{re.sub(r'[^A-Za-z0-9_-]', '_', stage)}.png"
        runs = {name: {stage: stages[stage]} for name, stages in trained.items() if stage in stages}
        plots.plot_loss_curves(runs, out / file)
        pictures.append(Picture(file, f"Training loss, stage {stage}"))
    return Strip(tuple(pictures))


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
    scores = [run.benchmarks[name]["scores"] for run in runs]
    about = f"{scores[0]['n']} questions."
    unread = [_unread(run, name) for run in runs]
    if len(runs) == 1 and unread[0]:
        about += f" Answers that could not be read count as wrong: {unread[0]}."
    elif any(unread):
        about += " Answers that could not be read count as wrong; how many, stands under “Models and cost”."
    if runs[0].benchmarks[name]["kind"] == "mini":
        about += (
            " A question counts if it is answered right under every rotation of its options (circular evaluation); "
            "“open” asks the same without options."
        )
    parts: list[Part] = [about]
    sections = []
    if runs[0].rows(name):
        combined = _combined(name, runs)
        parts.append(_table(name, runs, groups=True))
        parts += combined if len(runs) == 1 else ()
        parts += _radars(name, runs, out, suffix, table)
        sections.append(Section(name, tuple(parts)))
        sections.append(Section(f"{name}: abilities", (_table(name, runs, groups=False),), level=3))
        if combined and len(runs) > 1:
            title = f"{name}: groups, micro and macro"
            sections.append(Section(title, tuple(combined), level=3, folded=True))
        sections += _costs(name, runs, out, suffix)
    else:
        sections.append(Section(name, tuple(parts)))
    for number, run in enumerate(runs):
        if examples := run.examples.get(name):
            file = f"examples{suffix}{'' if len(runs) == 1 else f'_{number + 1}'}.png"
            plots.plot_examples(examples, out / file)
            title = f"{name}: examples" + (f" of {run.name}" if len(runs) > 1 else "")
            judged = any(one["right"] is not None for one in examples)
            note = ("Right and wrong answers take turns here, whatever their share.",) if judged else ()
            shown = Examples(examples, Picture(file, f"Example answers of {run.name}"))
            sections.append(Section(title, (*note, shown), level=3, folded=len(runs) > 1))
    return sections


def _table(name: str, runs: Sequence[Run], groups: bool) -> Table:
    """Scores in percent: all conditions of one run, or several runs side by side with the majority answer."""
    tables = {run.name: {(row.level, row.name): row for row in run.rows(name)} for run in runs}
    first = tables[runs[0].name]
    keys = [key for key in first if (key[0] == "ability") != groups]
    if len(runs) == 1:
        columns = [(column, runs[0].name, column) for column in columns_of(list(first.values()))]
    else:
        columns = [(run.name, run.name, "model") for run in runs]
        columns += [(f"{run.name}, blind", run.name, "blind") for run in runs] if groups else []
        columns += [("majority", runs[0].name, "majority")]
        held = {
            (run, column) for run, rows in tables.items() for row in rows.values() for column in row.values
        }
        columns = [one for one in columns if one[1:] in held]
    rows = []
    for key in keys:
        cells = []
        for _, run, column in columns:
            row = tables[run].get(key)
            cells.append(percent(row.values.get(column) if row else None))
        rows.append((label(key[1]), str(first[key].n or ""), *cells))
    strong = frozenset(index for index, key in enumerate(keys) if key[0] == "all")
    table = Table(("%", "n", *(column for column, _, _ in columns)), tuple(rows), strong)
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
    """Radar charts per picture size; of several runs also one with a scale per axis, as in the paper.

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
        pictures = [Picture(f"{stem}.png", said)]
        majority = _series(same[0], name, "", ("majority",)) if len(same) > 1 else []
        radar.plot_radar([*series, *majority], groups, out / pictures[0].file, title)
        if len(same) > 1:
            pictures.append(Picture(f"{stem}_own_scales.png", f"{said}, a scale per axis"))
            radar.plot_radar(
                series, groups, out / pictures[1].file, f"{title}, a scale per axis", own_scales=True
            )
        found.append(Strip(tuple(pictures)))
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
        pictures = []
        for group in dict.fromkeys(group for point in points for group in point.scores):
            # Names of groups are anyone's: "a b" and "a_b" must not share a file.
            file = f"cost_{word}{suffix}_{len(pictures) + 1}_{re.sub(r'[^A-Za-z0-9_-]', '_', group)}.png"
            cost_plot.plot_cost(points, group, cost, out / file)
            pictures.append(Picture(file, f"Accuracy on {name}, {label(group)}, against {cost}"))
        strips.append(Strip(tuple(pictures)))
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


def _markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += ["#" * section.level + " " + section.title, ""]
        for part in section.parts:
            if isinstance(part, str):
                lines += [part, ""]
            elif isinstance(part, Table):
                lines += [*_markdown_table(part), ""]
            else:
                pictures = (part.sheet,) if isinstance(part, Examples) else part.pictures
                lines += [line for one in pictures for line in (f"![{one.description}]({one.file})", "")]
    return "\n".join(lines)


def _markdown_table(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = [
        tuple(f"**{cell}**" if cell else cell for cell in row) if index in table.strong else row
        for index, row in enumerate(table.rows)
    ]
    return [line(table.head), "|---|" + "---:|" * (len(table.head) - 1), *map(line, rows)]
