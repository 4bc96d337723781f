"""One report of one or several runs: a self-contained HTML page, the same as Markdown, and JSON.

The content is a list of sections (`sections.py`) made once; `html_page.py` and the Markdown writer below only dress it.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation import plots
from mllm_jax.evaluation.html_page import render_page
from mllm_jax.evaluation.runs import Run, differing_keys, load_runs
from mllm_jax.evaluation.sections import Examples, Part, Picture, Section, Table
from mllm_jax.evaluation.store import write_json
from mllm_jax.evaluation.tables import columns_of, label, percent

BASELINES = {"blind": "blind", "majority": "majority answer"}


def write_report(directories: Sequence[str | Path], out: str | Path) -> Path:
    """Reports finished runs.

    Args:
      directories: work directories that hold an evaluation.
      out: folder for `report.html`, `report.md`, `report.json` and the pictures; made if needed, older reports in
        it are replaced.

    Returns:
      The page's path.

    Raises:
      ReportError: a folder without evaluation, or given twice.
    """
    runs, out = load_runs(directories), Path(out)
    out.mkdir(parents=True, exist_ok=True)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = _sections(runs, out)
    page = out / "report.html"
    page.write_text(render_page(title, sections, out), encoding="utf-8")
    (out / "report.md").write_text(_markdown(title, sections), encoding="utf-8")
    write_json(out / "report.json", {"runs": [_as_json(run) for run in runs]})
    return page


def _as_json(run: Run) -> dict[str, Any]:
    kept = {"name": run.name, "model": run.model, "costs": run.costs, "benchmarks": run.benchmarks}
    final = {stage: records[-1]["loss"] for stage, records in run.metrics.items()}
    return kept | {"final_loss": final, "config": run.config}


def _sections(runs: Sequence[Run], out: Path) -> list[Section]:
    found: list[Section] = []
    names = list(dict.fromkeys(name for run in runs for name in run.benchmarks))
    for name in names:
        found += _benchmark(name, [run for run in runs if name in run.benchmarks], out, len(names) > 1)
    found.append(Section("Models and cost", (_models(runs), *_differences(runs))))
    if trained := {run.name: run.metrics for run in runs if run.metrics}:
        plots.plot_loss_curves(trained, out / "loss.png")
        found.append(Section("Training", (Picture("loss.png", "Training loss of every stage"),)))
    return found


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
    rows = tuple((name, *values) for name, values in facts.items())
    return Table(("", *(run.name for run in runs)), rows)


def _differences(runs: Sequence[Run]) -> list[Part]:
    if len(runs) < 2 or not (keys := differing_keys(runs)):
        return []
    rows = tuple((key, *values) for key, values in keys.items())
    return ["Configuration keys that differ:", Table(("key", *(run.name for run in runs)), rows)]


def _benchmark(name: str, runs: Sequence[Run], out: Path, several: bool) -> list[Section]:
    suffix = f"_{name}" if several else ""
    scores = [run.benchmarks[name]["scores"] for run in runs]
    about = f"{scores[0]['n']} questions."
    unread = [
        f"{score['unparsed']} of {score.get('rows', score['n'])}{f' ({run.name})' if len(runs) > 1 else ''}"
        for run, score in zip(runs, scores, strict=True)
        if score["unparsed"]
    ]
    if unread:
        about += f" Answers that could not be read count as wrong: {', '.join(unread)}."
    if runs[0].benchmarks[name]["kind"] == "mini":
        about += (
            " A question counts if it is answered right under every rotation of its options (circular evaluation); "
            "“open” asks the same without options."
        )
    parts: list[Part] = [about]
    sections = []
    if runs[0].rows(name):
        parts += [_table(name, runs, groups=True)]
        parts += _radars(name, runs, out, suffix)
        sections.append(Section(name, tuple(parts)))
        sections.append(Section(f"{name}: abilities", (_table(name, runs, groups=False),), level=3))
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
            sections.append(Section(title, (*note, shown), level=3))
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
    rows = []
    for key in keys:
        cells = []
        for _, run, column in columns:
            row = tables[run].get(key)
            cells.append(percent(row.values.get(column) if row else None))
        rows.append((label(key[1]), str(first[key].n or ""), *cells))
    strong = frozenset(index for index, key in enumerate(keys) if key[0] == "all")
    return Table(("%", "n", *(column for column, _, _ in columns)), tuple(rows), strong)


def _radars(name: str, runs: Sequence[Run], out: Path, suffix: str) -> list[Picture]:
    """One radar chart per picture size."""
    found = []
    sizes = list(dict.fromkeys(run.model["image_size"] for run in runs))
    for size in sizes:
        same = [run for run in runs if run.model["image_size"] == size]
        groups = same[0].benchmarks[name]["groups"]
        if len(groups) < 3:
            continue
        series = []
        for run in same:
            series += _series(run, name, f"{run.name} ({run.model['visual_tokens']})", ("model",))
        if len(same) == 1:
            series = _series(same[0], name, "model", ("model", *BASELINES))
        else:
            series += _series(same[0], name, "", ("majority",))
        file = f"radar{suffix}{f'_{size}px' if len(sizes) > 1 else ''}.png"
        visual = f", {same[0].model['visual_tokens']} visual tokens" if len(same) == 1 else ""
        plots.plot_radar(series, groups, out / file, f"{name}, {size} px{visual}")
        found.append(Picture(file, f"Accuracy on each ability of {name} at {size} px"))
    return found


def _series(run: Run, name: str, title: str, columns: Sequence[str]) -> list[plots.Series]:
    rows = [row for row in run.rows(name) if row.level == "ability"]
    found = []
    for column in columns:
        values = {row.name: row.values[column] for row in rows if column in row.values}
        if values:
            found.append(plots.Series(BASELINES.get(column, title), values, column))
    return found


def _costs(name: str, runs: Sequence[Run], out: Path, suffix: str) -> list[Section]:
    """Accuracy against each cost that all runs know, where there is something to compare."""
    pictures = []
    if len(runs) > 1:
        for cost, file in (("visual tokens per image", "tokens"), ("seconds per update", "time")):
            if not all(cost in run.costs for run in runs):
                continue
            points = []
            for run in runs:
                levels = {row.level for row in run.rows(name)}
                level = "group" if "group" in levels else "all"
                scores = {row.name: row.values["model"] for row in run.rows(name) if row.level == level}
                points.append((run.name, run.costs[cost], scores))
            plots.plot_cost(points, cost, out / f"cost_{file}{suffix}.png")
            pictures.append(Picture(f"cost_{file}{suffix}.png", f"Accuracy on {name} against {cost}"))
    return [Section(f"{name}: accuracy against cost", tuple(pictures), level=3)] if pictures else []


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
                picture = part.sheet if isinstance(part, Examples) else part
                lines += [f"![{picture.description}]({picture.file})", ""]
    return "\n".join(lines)


def _markdown_table(table: Table) -> list[str]:
    def line(cells: Sequence[str]) -> str:
        return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |"

    rows = [
        tuple(f"**{cell}**" if cell else cell for cell in row) if index in table.strong else row
        for index, row in enumerate(table.rows)
    ]
    return [line(table.head), "|---|" + "---:|" * (len(table.head) - 1), *map(line, rows)]
