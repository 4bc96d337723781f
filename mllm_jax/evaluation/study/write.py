"""Writes the pages of a study from its summaries: `study.md`, `study.html`, `report.csv`, `report.json` and charts."""

import csv
import io
from collections.abc import Mapping, Sequence
from typing import Any

from mllm_jax import files
from mllm_jax.evaluation.report.page import render_markdown, render_page
from mllm_jax.evaluation.report.runs import ReportError
from mllm_jax.evaluation.study.content import find_answers, make_sections
from mllm_jax.evaluation.study.cost import cost_section
from mllm_jax.evaluation.study.findings import ABSENT
from mllm_jax.evaluation.study.intervals import interval
from mllm_jax.evaluation.study.rates import rates_section
from mllm_jax.evaluation.study.results import Study, csv_rows
from mllm_jax.evaluation.study.summary import KINDS, read_summary
from mllm_jax.storage import Path, as_path, make_folder

IMAGES = "images/study"


def write_study(sources: Sequence[str | Path], out: str | Path, baseline: str) -> Path:
    """Reports summaries of `mllm-jax study`.

    Args:
      sources: files of `study collect`, `study latency` and `study cost`. Studies stand first, then sweeps of learning
        rates, of which only the scores are shown, then costs; each as they are given.
      out: folder of the pages; what is there of them is replaced.
      baseline: connector that the others are compared with.

    Returns:
      The HTML page's path.

    Raises:
      ReportError: a file that is none of these, or whose runs cannot be compared.
    """
    out, sections, rows, facts = as_path(out), [], [], []
    make_folder(out)
    read = {source: read_summary(source) for source in sources}
    latencies = {one["recipe"]: one["cells"] for one in read.values() if one["kind"] == "latency"}
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
            latency = latencies.get(study.recipe, {})
            sections += make_sections(study, summary, baseline, out, IMAGES, latency)
        except ReportError:
            raise
        except (KeyError, TypeError, ValueError, LookupError) as error:
            raise ReportError(
                f"{source} is damaged ({type(error).__name__}: {error}); collect it again"
            ) from error
        rows += csv_rows(study)
        facts.append(_as_json(study, summary, latency))
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


def _as_json(
    study: Study, summary: Mapping[str, Any], latency: Mapping[str, Mapping[str, float]]
) -> dict[str, Any]:
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
        findings[name] = [
            {
                "claim": found.finding.claim, "score": found.finding.score, "expect": found.finding.expect,
                "verdict": found.verdict,
            }
            | ({} if found.verdict == ABSENT else {key: getattr(found, key) for key in ("difference", "low", "high")})
            for found in find_answers(study, benchmark, summary, latency)
        ]  # fmt: skip
    return {"recipe": study.recipe, "scores": scores, "findings": findings}
