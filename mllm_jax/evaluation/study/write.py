"""Writes the pages of a study from its summaries: `study.md`, `study.html`, `report.csv`, `report.json` and charts."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax import files
from mllm_jax.evaluation.report.page import render_markdown, render_page
from mllm_jax.evaluation.report.runs import ReportError
from mllm_jax.evaluation.study.content import find_answers, find_time_answers, make_sections
from mllm_jax.evaluation.study.cost import cost_section
from mllm_jax.evaluation.study.findings import ABSENT, Answer
from mllm_jax.evaluation.study.intervals import interval
from mllm_jax.evaluation.study.rates import rates_section
from mllm_jax.evaluation.study.results import Study, csv_rows
from mllm_jax.evaluation.study.summary import KINDS, read_summary, recipe_name
from mllm_jax.evaluation.study.times import Times
from mllm_jax.storage import Path, as_path, make_folder

IMAGES = "images/study"


def write_study(sources: Sequence[str | Path], out: str | Path, baseline: str | None = None) -> Path:
    """Reports summaries of `mllm-jax study`.

    Args:
      sources: files of `study collect`, `study latency` and `study cost`. Studies stand first, then sweeps of learning
        rates, of which only the scores are shown, then costs; within a kind in the order given.
      out: folder of the pages; what is there of them is replaced.
      baseline: connector that the others are compared with; see `make_sections`.

    Returns:
      The HTML page's path.

    Raises:
      ReportError: a file that is none of these, or whose runs cannot be compared; times without their study, or
        twice; a baseline that no cell has.
    """
    out, sections, rows, facts, connectors = as_path(out), [], [], [], {}
    make_folder(out)
    read = {source: read_summary(source) for source in sources}
    _check_names(read)
    latencies = _latencies(read)
    for source, summary in sorted(read.items(), key=lambda item: KINDS.index(item[1]["kind"])):
        try:
            if summary["kind"] == "latency":
                continue
            if summary["kind"] == "cost":
                sections.append(cost_section(summary))
                continue
            study = Study(summary)
            if summary["kind"] == "rates":
                sections.append(rates_section(study))
                continue
            connectors |= dict.fromkeys(study.connectors)
            times = Times(study, latencies.get(recipe_name(summary)))
            sections += make_sections(study, summary, baseline, out, IMAGES, times)
        except ReportError:
            raise
        except (KeyError, TypeError, ValueError, LookupError, ArithmeticError, AttributeError) as error:
            raise ReportError(
                f"{source} is damaged ({type(error).__name__}: {error}); collect it again"
            ) from error
        rows += csv_rows(study)
        facts.append(_as_json(study, summary, times))
    if connectors and baseline is not None and baseline not in connectors:
        raise ReportError(
            f"no cell has the connector {baseline!r} (--baseline); give one of {', '.join(connectors)}"
        )
    title = "The study"
    files.write_text(out / "study.md", render_markdown(title, sections))
    files.write_text(out / "report.csv", _csv(rows))
    files.write_json(out / "report.json", {"studies": facts})
    page = out / "study.html"
    files.write_text(page, render_page(title, sections, out))
    return page


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(column for row in rows for column in row))
    writer = csv.DictWriter(text, columns, restval="", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def _check_names(read: Mapping[str | Path, Mapping[str, Any]]) -> None:
    """Charts are called by the recipe, so that it can have one study."""
    found: dict[str, str | Path] = {}
    for source, summary in read.items():
        if summary["kind"] == "study" and (other := found.setdefault(recipe_name(summary), source)) != source:
            raise ReportError(
                f"{other} and {source} are both of {summary['recipe']}; `mllm-jax study collect` makes one of them"
            )


def _latencies(read: Mapping[str | Path, Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Recipe -> its times."""
    found: dict[str, Mapping[str, Any]] = {}
    studied = {recipe_name(summary) for summary in read.values() if summary["kind"] == "study"}
    for source, summary in read.items():
        recipe = recipe_name(summary)
        if summary["kind"] != "latency":
            continue
        if recipe not in studied:
            raise ReportError(
                f"{source}: times of {summary['recipe']}, whose results are not given; give them too"
            )
        if recipe in found:
            raise ReportError(f"{source}: further times of {summary['recipe']}; give one file of them")
        found[recipe] = summary
    return found


def _as_json(study: Study, summary: Mapping[str, Any], times: Times) -> dict[str, Any]:
    """Scores of all abilities and groups with their intervals, and what is said of the findings."""
    scores, findings = {}, {}
    for name, benchmark in study.benchmarks.items():
        scores[name] = {
            variant: {
                score: dict(zip(("score", "low", "high"), interval(values), strict=True))
                for score, values in samples.items()
            }
            for variant, samples in benchmark.samples.items()
        }
        findings[name] = [_finding(found) for found in find_answers(benchmark, summary)]
    return {
        "recipe": study.recipe,
        "scores": scores,
        "findings": findings,
        "seconds": times.seconds,
        "time_findings": [_finding(found) for found in find_time_answers(times, summary)],
    }


def _finding(found: Answer) -> dict[str, Any]:
    asked = {"claim": found.finding.claim, "score": found.finding.score, "expect": found.finding.expect}
    numbers = {"value": found.value, "low": found.low, "high": found.high}
    return {**asked, **({} if found.verdict == ABSENT else numbers), "verdict": found.verdict}
