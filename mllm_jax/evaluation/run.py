"""Evaluates a model on the benchmarks of a configuration and writes what there is to look at."""

from collections.abc import Mapping
from typing import Any

import jax
from ml_collections import ConfigDict
from rich.console import Console

from mllm_jax import files
from mllm_jax.console import make_console, say
from mllm_jax.data.reading import read_object
from mllm_jax.evaluation.answer import CONDITIONS, Settings, answer_benchmark
from mllm_jax.evaluation.benchmarks import Benchmark, BenchmarkError, Published, read_benchmark
from mllm_jax.evaluation.examples import make_examples
from mllm_jax.evaluation.grouping import ability_of
from mllm_jax.evaluation.report.shapes import check_shape
from mllm_jax.evaluation.store import StoreError
from mllm_jax.evaluation.tables import markdown_table, print_scores, row_dicts, score_rows
from mllm_jax.inference.batching import DEFAULT_BUCKETS
from mllm_jax.inference.model import Model
from mllm_jax.parallel import processes
from mllm_jax.storage import Path, as_path


def evaluate(
    model: Model,
    config: ConfigDict,
    workdir: str | Path,
    console: Console | None = None,
    video: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Answers, scores and reports; what is answered already is kept.

    Writes `WORKDIR/eval/NAME/` (answers and scores of each benchmark, see `answer.py`; in `submission/` what its server
    or official script takes, see `benchmarks.published`) and, over all of them,
    `WORKDIR/eval/` `table.md`, `summary.json`, radar chart and examples as PNG, and `report.html`, `.md`, `.json`.
    All processes compute; the first one writes.

    Args:
      model: the model.
      config: `benchmarks` (name -> kind, path, images), `batch_size`, `max_new_tokens`, `blind`, `likelihood`,
        `examples` and, if wanted, `buckets` (lengths to which questions are padded), `threads` and `overlong` (see
        `answer.Settings`). A benchmark may have `options` (see `benchmarks.Published`), `prepared` (a folder where it
        is prepared as tensorflow-datasets data first) and a `max_new_tokens` of its own; without it (or 0) the official
        limit holds, and where there is none the common one.
      workdir: the run's work directory.
      console: where progress and tables are shown.
      video: how videos are read; see `answer.Settings`.

    Returns:
      The contents of `summary.json`; benchmarks that the same model answered earlier are in it too.

    Raises:
      BenchmarkError, DataError, ImageError, SampleTooLong: see `answer.answer_benchmark`; all benchmarks are read
        before the first is answered.
      StoreError: the folder holds the evaluation of another model.
    """
    console = console or make_console()
    workdir = as_path(workdir)
    out = workdir / "eval"
    try:
        for name in config.benchmarks:
            files.check_name(name, "benchmark")
    except ValueError as error:
        raise BenchmarkError(str(error)) from error
    benchmarks = {name: open_benchmark(values) for name, values in config.benchmarks.items()}
    limits = {
        name: config.benchmarks[name].get("max_new_tokens", 0)
        or benchmark.max_new_tokens
        or config.max_new_tokens
        for name, benchmark in benchmarks.items()
    }
    for name, limit in limits.items():
        check_limit(model, name, limit)
    for name, benchmark in benchmarks.items():
        if not isinstance(benchmark, Published):
            continue
        if outside := benchmark.ungrouped:
            say(console, f"{name}: sub-tasks outside the groups, with own rows: {', '.join(outside)}")
        if benchmark.missing_videos:
            say(console, f"{name}: {benchmark.missing_videos}")
    described = describe(model)
    with processes.together("earlier summary read"):
        summary = earlier_summary(out, described)
    tables = []
    for name, benchmark in benchmarks.items():
        settings = Settings(
            max_new_tokens=limits[name],
            overlong=config.get("overlong", "error"),
            video=video or {},
            batch_size=config.batch_size,
            buckets=tuple(config.get("buckets", DEFAULT_BUCKETS)),
            threads=config.get("threads", 4),
        )
        scores = answer_benchmark(
            model,
            benchmark,
            out / name,
            settings,
            name=name,
            blind=config.blind,
            likelihood=config.likelihood,
            console=console,
        )
        with processes.together(f"{name} summarised"):
            if jax.process_index() == 0:
                groups = ability_groups(benchmark)
                # Others are called as the scorer calls them.
                groups |= {task: "" for task in scores["subtasks"] if task not in groups}
                rows = score_rows(scores, groups)
                if config.examples:
                    examples = make_examples(model, benchmark, out / name, config.examples)
                    files.write_json(out / name / "examples.json", examples)
                summary["benchmarks"][name] = {
                    "kind": benchmark.name,
                    "groups": groups,
                    "rows": row_dicts(rows),
                    "scores": scores,
                }
                if rows:
                    print_scores(console, f"{name}: {scores['n']} questions", rows)
                    tables.append(f"## {name}\n\n{markdown_table(rows)}\n")
                say(console, _summary_line(name, scores))
                for line in benchmark.submit(out / name) if isinstance(benchmark, Published) else ():
                    say(console, f"{name}: {line}")
    with processes.together("report written"):
        if jax.process_index() == 0:
            files.write_json(out / "summary.json", summary)
            files.write_text(out / "table.md", "\n".join(tables))
            from mllm_jax.evaluation.report.write import write_report  # slow to import: matplotlib

            report = write_report([workdir], out)
            say(console, f"report: {report}", "bold")
    return summary


def open_benchmark(values: ConfigDict) -> Benchmark:
    """A benchmark of the configuration: from its files, or from what was prepared from them in the folder `prepared`.

    Raises:
      BenchmarkError, DataError: see `read_benchmark` and `prepared.prepare`.
    """
    given = (values.kind, values.path, values.get("images") or None)
    options = dict(values.get("options", {}))
    folder = values.get("prepared", "")
    if not folder:
        with processes.together(f"{values.kind} read"):
            return read_benchmark(*given, **options)
    from mllm_jax.evaluation.prepared import prepare

    kind, path, images = given
    return processes.first_then_others(
        lambda: prepare(kind, path, folder, images, **options), f"{kind} prepared"
    )


def check_limit(model: Model, name: str, max_new_tokens: int) -> None:
    """Refuses an answer length that leaves no room for a question.

    Raises:
      BenchmarkError: names the benchmark and the fix.
    """
    room = model.config.llm.max_positions - model.config.visual_layout.slot.num_tokens
    if max_new_tokens >= room:
        raise BenchmarkError(
            f"{name}: answers of up to {max_new_tokens} tokens do not fit the model's context of "
            f"{model.config.llm.max_positions} beside an image; lower --max_new_tokens (recorded with the answers)"
        )


def _summary_line(name: str, scores: dict[str, Any]) -> str:
    """The headline in one line, for scores that are no fractions and benchmarks that are not scored here."""
    if scores["score"] is None:
        return f"{name}: {scores['n']} answers, {scores['unparsed']} unparsed; no score here"
    others = {c: scores[c]["score"] for c in CONDITIONS[1:] if c in scores}
    beside = "".join(f", {c.replace('_', ' ')} {_rounded(value)}" for c, value in others.items())
    unit = "" if scores["unit"] == "fraction" else f" {scores['unit']}"
    unread = f"{scores['unparsed']} of {scores.get('rows', scores['n'])} answers unparsed"
    return f"{name}: {_rounded(scores['score'])}{unit}{beside}; {unread}"


def _rounded(value: float | None) -> str:
    return "incomplete" if value is None else f"{value:.4g}"


def earlier_summary(out: Path, model: dict[str, Any]) -> dict[str, Any]:
    """The summary so far: other benchmarks that this model answered before stay in it.

    Raises:
      StoreError: another model's, or a damaged file.
    """
    path = out / "summary.json"
    found: dict[str, Any] = {"model": model, "benchmarks": {}}
    if path.is_file():
        try:
            found = read_object(path)
            check_shape(found, {"model": {}, "benchmarks": {...: {}}}, str(path))
        except ValueError as error:
            raise StoreError(
                f"{error}; move that folder away, or evaluate into another one (eval.py --out)"
            ) from error
    there = found["model"].get("fingerprint")
    if there != model["fingerprint"]:
        raise StoreError(
            f"{out} holds the evaluation of another model (fingerprint {there}, this one is "
            f"{model['fingerprint']}); move that folder away, or evaluate into another one (eval.py --out)"
        )
    return found


def ability_groups(benchmark: Benchmark) -> dict[str, str]:
    """Ability -> group ("" if none) of a benchmark's questions, groups together, in the order of the file."""
    abilities: dict[str, str] = {}
    for question in benchmark.questions:
        if ability := ability_of(question.row):
            abilities.setdefault(ability, str(question.row.get("group") or ""))
    known = ("coarse", "fine", "reasoning")
    groups = [g for g in known if g in abilities.values()]
    groups += [g for g in dict.fromkeys(abilities.values()) if g not in known]
    ordered = sorted(abilities, key=lambda name: groups.index(abilities[name]))
    return {name: abilities[name] for name in ordered}


def describe(model: Model) -> dict[str, Any]:
    """What a report says of a model."""
    config = model.config
    vision, llm = config.vision, config.llm
    return {
        "connector": config.connector,
        "connector_options": dict(config.connector_options),
        "visual_tokens": config.image_layout.most_tokens,
        "image_size": config.image_size,
        "vision": vision.title,
        "llm": f"{llm.depth} x {llm.width}, vocabulary {llm.vocab}",
        "parameters": {
            name: sum(int(leaf.size) for leaf in jax.tree.leaves(part)) for name, part in model.params.items()
        },
        "dtype": config.dtype,
        "template": model.template,
        "fingerprint": model.fingerprint,
    }
