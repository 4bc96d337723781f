"""Writes the report of one or several runs: `report.html`, `report.md`, `report.json` and the figures."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mllm_jax import files
from mllm_jax.evaluation.benchmarks import BENCHMARKS
from mllm_jax.evaluation.grouping import Table as Groups
from mllm_jax.evaluation.grouping import load_groups
from mllm_jax.evaluation.regroup import base_kind
from mllm_jax.evaluation.report.content import make_sections
from mllm_jax.evaluation.report.page import render_markdown, render_page
from mllm_jax.evaluation.report.paired import compare
from mllm_jax.evaluation.report.runs import ReportError, Run, load_runs
from mllm_jax.evaluation.report.sections import Section
from mllm_jax.schema import did_you_mean
from mllm_jax.storage import Path, as_path, make_folder, resolve


def write_report(
    directories: Sequence[str | Path],
    out: str | Path,
    groups: str | Path | None = None,
    baseline: str | None = None,
) -> Path:
    """Reports finished runs.

    Args:
      directories: work directories that hold an evaluation.
      out: folder for `report.html`, `report.md`, `report.json` and the figures; made if needed, older reports in
        it are replaced.
      groups: a grouping file, instead of the groups that the runs were scored with.
      baseline: name (or folder) of the run that the others are compared with on common questions; the first if None.

    Returns:
      The page's path.

    Raises:
      ReportError: a folder without evaluation, or given twice; a grouping file that cannot be used, or that groups
        no benchmark of these runs; a baseline that is none of them.
    """
    try:
        table = None if groups is None else load_groups(as_path(groups))
    except ValueError as error:
        raise ReportError(str(error)) from error
    runs, out = load_runs(directories, table), as_path(out)
    about = "" if table is None else _about_groups(runs, table, groups)
    first = _find(runs, baseline)
    compared = {
        name: compare([run for run in runs if name in run.benchmarks], first, name)
        for name in first.benchmarks
    }
    make_folder(out)
    title = runs[0].name if len(runs) == 1 else f"{len(runs)} runs compared"
    sections = make_sections(runs, out, table, first, compared)
    if about:
        sections.insert(0, Section("Grouping", (about,)))
    page = out / "report.html"
    files.write_text(page, render_page(title, sections, out))
    files.write_text(out / "report.md", render_markdown(title, sections))
    facts: dict[str, Any] = {} if groups is None else {"groups": str(groups)}
    facts["runs"] = [_as_json(run) for run in runs]
    if len(runs) > 1:
        facts["baseline"] = first.name
        facts["differences"] = {name: [dataclasses.asdict(c) for c in cs] for name, cs in compared.items()}
    files.write_json(out / "report.json", facts)
    return page


def _find(runs: Sequence[Run], baseline: str | None) -> Run:
    """The run of that name or folder, the first one if there is no name.

    Raises:
      ReportError: there is none.
    """
    if baseline is None:
        return runs[0]
    for run in runs:
        if baseline == run.name or resolve(as_path(baseline)) == run.directory:
            return run
    names = [run.name for run in runs]
    raise ReportError(
        f"the baseline {baseline!r} is none of the runs; {did_you_mean(baseline, names)}there are {', '.join(names)}"
    )


def _about_groups(runs: Sequence[Run], table: Groups, file: str | Path | None) -> str:
    """Which file the groups come from, and what of it is used.

    Raises:
      ReportError: a name in it is no benchmark, or it groups none of those here.
    """
    known = {*map(base_kind, BENCHMARKS), *load_groups()}
    for name in table:
        if name not in known:
            raise ReportError(
                f"{file}: {name!r} is no benchmark; {did_you_mean(name, known)}there are {', '.join(sorted(known))}"
            )
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
