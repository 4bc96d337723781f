"""Our readings of single answers against the official ones, where a data folder holds those."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mllm_jax.evaluation import caption_metrics, ptb_tokenizer
from mllm_jax.evaluation.benchmarks import get_benchmark
from mllm_jax.evaluation.benchmarks.answers import Answer
from mllm_jax.evaluation.predictions import Problems

Pairs = list[tuple[Any, Any]]  # (official, ours)


@dataclasses.dataclass(frozen=True)
class Reading:
    """What of a graded answer is compared with what the official script says of it.

    Attributes:
        what: its name.
        official: (answer, its place in the file, the file of official readings or None) -> the official reading.
        ours: answer -> ours.
        file: what the end of the answers' name becomes in the name of that file; no file if None.
    """

    what: str
    official: Callable[[Answer, int, Any], Any]
    ours: Callable[[Answer], Any]
    file: tuple[str, str] | None = None


def _reading(answer: Answer) -> Any:
    return answer.notes["reading"]


READINGS: dict[str, Reading | None] = {
    "captions": None,  # readings of all captions together: `_captions`
    "mathvista": Reading("normalised extraction", lambda a, i, _: a.row["official_prediction"], _reading),
    "mmmu": Reading(
        "parsed letter, open answers right or wrong",
        lambda a, i, o: o[a.id]["parsed" if a.row["question_type"] == "multiple-choice" else "correct"],
        _reading,
        ("_responses.jsonl", "_per_sample.json"),
    ),
    "mmmu_pro": Reading("parsed letter", lambda a, i, _: a.row["official_parsed"], _reading),
    "relaxed_accuracy": Reading(
        "right or wrong", lambda a, i, _: a.row["relaxed_correct"], lambda a: a.credit
    ),
    "textvqa": Reading(
        "accuracy of each question",
        lambda a, i, o: o["vqa_accuracy"][i],
        lambda a: round(a.credit, 10),
        (".jsonl", "_per_question.json"),
    ),
    "vqav2": Reading(
        "accuracy of each question",
        lambda a, i, o: o[str(a.id)],
        lambda a: round(100 * a.credit, 10),
        (".json", "_per_question.json"),
    ),
}


def readings(folder: Path, answers: str, annotations: Path | None) -> Iterator[tuple[str, Pairs]]:
    """What is compared of a file of answers, with a pair per answer; nothing without official readings."""
    reading, official = READINGS[folder.name], None
    if reading is None:
        yield from _captions(folder, answers.removesuffix("_predictions.json"))
        return
    if reading.file is not None:
        end, replaced = reading.file
        path = folder / (answers.removesuffix(end) + replaced)
        if not answers.endswith(end) or not path.is_file():
            return
        official = _json(path)
    graded = get_benchmark(folder.name).grade_files(folder / answers, annotations, Problems())
    pairs = [(reading.official(answer, i, official), reading.ours(answer)) for i, answer in enumerate(graded)]
    yield reading.what, pairs


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _captions(folder: Path, stem: str) -> Iterator[tuple[str, Pairs]]:
    parts = ("tokenized", "per_image", "references", "predictions")
    paths = [folder / f"{stem}_{part}.json" for part in parts]
    if not all(path.is_file() for path in paths):
        return
    official, per_image, references, predictions = map(_json, paths)
    captions = {str(row["image_id"]): row["caption"] for row in predictions}
    keys = list(official["references"])
    refs = [official["references"][key] for key in keys]
    said = [line[0] if isinstance(line := official["predictions"][key], list) else line for key in keys]
    ours = ptb_tokenizer.tokenize([caption for key in keys for caption in references[key]])
    pairs = list(zip([line for lines in refs for line in lines], ours, strict=True))
    pairs += list(zip(said, ptb_tokenizer.tokenize([captions[key] for key in keys]), strict=True))
    yield "tokens without Java", pairs
    for name, values in (
        ("CIDEr", caption_metrics.cider(said, refs)),
        ("ROUGE_L", [caption_metrics.rouge_l(s, r) for s, r in zip(said, refs, strict=True)]),
    ):
        pairs = [(per_image[name][key], round(v, 8)) for key, v in zip(keys, values, strict=True)]
        yield f"{name} of each image (8 decimals)", pairs
