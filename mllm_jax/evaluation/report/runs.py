"""Finished runs as a report reads them: scores, configuration and training log of a work directory."""

import dataclasses
import json
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from flax.traverse_util import flatten_dict

from mllm_jax import storage
from mllm_jax.evaluation.grouping import Table
from mllm_jax.evaluation.regroup import regroup
from mllm_jax.evaluation.report.example_sheet import image_of
from mllm_jax.evaluation.report.losses import read_metrics
from mllm_jax.evaluation.report.shapes import NUMBER, check_shape
from mllm_jax.evaluation.tables import Row, rows_from_dicts
from mllm_jax.files import check_name
from mllm_jax.storage import Path, as_path


class ReportError(ValueError):
    """A run that cannot be reported; the message names the file and what to do."""


@dataclasses.dataclass(frozen=True)
class Run:
    """One work directory.

    Attributes:
      name: how the report calls it; unique.
      directory: where it is.
      model: what `run.describe` wrote.
      benchmarks: name -> {kind, groups, rows, scores} as in `summary.json`.
      config: the run's resolved configuration; {} if it was not trained here.
      metrics: stage -> records of the training log; {} without one.
      examples: benchmark -> examples.
      digests: benchmark -> a digest of its questions, prompts and options; none for those evaluated long ago.
    """

    name: str
    directory: Path
    model: Mapping[str, Any]
    benchmarks: Mapping[str, Mapping[str, Any]]
    config: Mapping[str, Any]
    metrics: Mapping[str, Sequence[Mapping[str, Any]]]
    examples: Mapping[str, Sequence[Mapping[str, Any]]]
    digests: Mapping[str, str]

    def rows(self, benchmark: str) -> list[Row]:
        """The run's table of a benchmark; empty if it was not asked."""
        return rows_from_dicts(self.benchmarks.get(benchmark, {}).get("rows", ()))

    @property
    def costs(self) -> dict[str, float]:
        """Visual tokens per image and, of the last stage, the medians of the time per update and of tokens/s."""
        found = {"visual tokens per image": float(self.model["visual_tokens"])}
        if self.metrics:
            records = list(self.metrics.values())[-1]
            for key, name in _MEASURED.items():
                if values := [v for record in records if isinstance(v := record.get(key), NUMBER)]:
                    found[name] = statistics.median(values)
        return found


def load_run(directory: Path, name: str, table: Table | None = None) -> Run:
    """Reads a work directory; with a grouping `table`, under its groups.

    Raises:
      ReportError: it holds no evaluation, or one of its files is damaged or not of this library's making, or the table
        lacks a sub-task.
    """
    out = directory / "eval"
    if not (out / "summary.json").is_file():
        raise ReportError(
            f"{directory} holds no evaluation (eval/summary.json); run eval.py --workdir={directory}"
        )
    summary = _read(out / "summary.json", _SUMMARY)
    examples, digests = {}, {}
    try:
        for benchmark in summary["benchmarks"]:
            check_name(benchmark, "benchmark")
            if (path := out / benchmark / "examples.json").is_file():
                examples[benchmark] = _read(path, _EXAMPLES)
                for uri in (uri for one in examples[benchmark] for uri in one["pictures"]):
                    image_of(uri, str(path))
            if (path := out / benchmark / "manifest.json").is_file():
                digests[benchmark] = str(_read(path, {}).get("benchmark", ""))
        if table is not None:
            summary["benchmarks"] = {name: regroup(one, table) for name, one in summary["benchmarks"].items()}
        config = _read(directory / "config.json", {}) if (directory / "config.json").is_file() else {}
        log = directory / "metrics.jsonl"
        metrics = read_metrics(log) if log.is_file() and storage.size(log) else {}
    except ReportError:
        raise
    except ValueError as error:
        raise ReportError(f"{directory}: {error}") from error
    return Run(name, directory, summary["model"], summary["benchmarks"], config, metrics, examples, digests)


def load_runs(directories: Sequence[str | Path], table: Table | None = None) -> list[Run]:
    """Reads several work directories, each named by as much of its path as tells them apart.

    Raises:
      ReportError: one of them cannot be reported, or is given twice.
    """
    paths = [storage.resolve(as_path(directory)) for directory in directories]
    for path in paths:
        if paths.count(path) > 1:
            raise ReportError(f"{path} is given twice")
    length = 1
    names = [path.name for path in paths]
    while len(set(names)) < len(names):
        length += 1
        names = ["/".join(path.parts[-length:]) for path in paths]
    return [load_run(path, name, table) for path, name in zip(paths, names, strict=True)]


def _read(path: Path, shape: Any) -> Any:
    try:
        value = json.loads(storage.read_text(path))
        check_shape(value, shape, "its contents")
    except (OSError, ValueError, RecursionError) as error:
        raise ReportError(f"{path} cannot be read: {error}") from error
    return value


# Key of the training log -> the cost's name.
_MEASURED = {"step_seconds": "seconds per update", "tokens_per_second": "training tokens/s"}
_BY_NAME = {...: NUMBER}
_SCORES = {
    "n": int,
    "groups?": _BY_NAME,
    "micro_groups?": _BY_NAME,
    "group_normalised?": _BY_NAME,
    "group_mean?": _BY_NAME,
    "group_scores?": {...: _BY_NAME},
}
_ROW = {"level": str, "name": str, "group": str, "n": int, "values": _BY_NAME}
_SUMMARY = {
    "model": {
        "connector": str, "connector_options": {}, "visual_tokens": NUMBER, "image_size": NUMBER, "vision": str,
        "llm": str, "parameters": {...: int},
    },
    "benchmarks": {...: {"kind": str, "groups": {...: str}, "rows": [_ROW], "scores": _SCORES}},
}  # fmt: skip
_EXAMPLES = [{
    "pictures": [str], "question": str, "answers": [str], "text": str, "right": (bool, type(None)),
    "credit?": NUMBER, "ability": str,
}]  # fmt: skip


def differing_keys(runs: Sequence[Run]) -> dict[str, list[str]]:
    """Configuration keys whose values differ between runs -> one value per run; a dash where a run lacks it."""
    flat = [flatten_dict(run.config, sep=".") for run in runs]
    keys = sorted({key for values in flat for key in values})
    shown = {key: [json.dumps(values[key]) if key in values else "–" for values in flat] for key in keys}
    return {key: values for key, values in shown.items() if len(set(values)) > 1}
