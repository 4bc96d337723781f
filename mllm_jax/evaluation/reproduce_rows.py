"""Row by row checks of a data folder: our readings of single answers against the official ones."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mllm_jax.evaluation import caption_metrics, ptb_tokenizer
from mllm_jax.evaluation.benchmarks import mathvista, mmmu_parse, mmmu_pro, relaxed_accuracy, textvqa, vqav2

# answers checked, what is compared, pairs (official, ours)
Rows = tuple[str, str, list[tuple[Any, Any]]]


def _json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8-sig"))


def _lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8-sig").split("\n") if line]


def _vqav2(folder: Path) -> Iterator[Rows]:
    rows = _json(next(folder.glob("*_annotations.json")))["annotations"]
    human = {row["question_id"]: [a["answer"] for a in row["answers"]] for row in rows}
    for path in sorted(folder.glob("*_per_question.json")):
        official = _json(path)
        name = path.name.replace("_per_question", "")
        pairs = [
            (
                official[str(row["question_id"])],
                100 * vqav2.score_question(row["answer"], human[row["question_id"]]),
            )
            for row in _json(folder / name)
        ]
        yield name, "accuracy of each question", [(a, round(b, 10)) for a, b in pairs]


def _textvqa(folder: Path) -> Iterator[Rows]:
    items = {row["question_id"]: row for row in _json(next(folder.glob("val*.json")))["data"]}
    for path in sorted(folder.glob("*_per_question.json")):
        name = path.name.replace("_per_question.json", ".jsonl")
        rows = _lines(folder / name)
        ours = [textvqa.score_question(row["text"], items[row["question_id"]]["answers"]) for row in rows]
        pairs = list(zip(_json(path)["vqa_accuracy"], ours, strict=True))
        yield name, "accuracy of each question", [(a, round(b, 10)) for a, b in pairs]


def _mathvista(folder: Path) -> Iterator[Rows]:
    for path in sorted(folder.glob("*.jsonl")):
        pairs = [
            (row["official_prediction"], mathvista.normalize(row["extraction"], row)) for row in _lines(path)
        ]
        yield path.name, "normalised extraction", pairs


def _mmmu(folder: Path) -> Iterator[Rows]:
    for path in sorted(folder.glob("*_responses.jsonl")):
        official = _json(folder / path.name.replace("_responses.jsonl", "_per_sample.json"))
        fallback, pairs = mmmu_parse.Fallback(), []
        for row in _lines(path):
            if row["question_type"] != "multiple-choice":
                right = mmmu_parse.open_is_right(mmmu_parse.parse_open(row["response"]), row["answer"])
                pairs.append((official[row["id"]]["correct"], right))
                continue
            choice = mmmu_parse.find_choice(row["response"], row["all_choices"], row["index2ans"])
            drawn = choice or fallback.draw(row["all_choices"])
            pairs.append((official[row["id"]]["parsed"], drawn))
        yield path.name, "parsed letter, open answers right or wrong", pairs


def _mmmu_pro(folder: Path) -> Iterator[Rows]:
    for path in sorted(folder.glob("*.jsonl")):
        pairs = []
        for row in _lines(path):
            options = dict(zip("ABCDEFGHIJ", map(str, row["options"]), strict=False))
            pairs.append((row["official_parsed"], mmmu_pro.find_choice(row["response"], options)))
        yield path.name, "parsed letter", pairs


def _relaxed_accuracy(folder: Path) -> Iterator[Rows]:
    for path in sorted(folder.glob("*.jsonl")):
        rows = _lines(path)
        pairs = [
            (r["relaxed_correct"], relaxed_accuracy.is_right(r["prediction"], r["target"])) for r in rows
        ]
        yield path.name, "right or wrong", pairs


def _captions(folder: Path) -> Iterator[Rows]:
    for path in sorted(folder.glob("*_tokenized.json")):
        stem = path.name.removesuffix("_tokenized.json")
        official = _json(path)
        references = _json(folder / f"{stem}_references.json")
        predictions = {
            str(row["image_id"]): row["caption"] for row in _json(folder / f"{stem}_predictions.json")
        }
        keys = list(official["references"])
        wanted = [line for key in keys for line in official["references"][key]]
        ours = ptb_tokenizer.tokenize([caption for key in keys for caption in references[key]])
        pairs = list(zip(wanted, ours, strict=True))
        said = [official["predictions"][key] for key in keys]
        said = [line[0] if isinstance(line, list) else line for line in said]
        pairs += list(zip(said, ptb_tokenizer.tokenize([predictions[key] for key in keys]), strict=True))
        yield f"{stem}_predictions.json", "tokens without Java", pairs
        per_image = _json(folder / f"{stem}_per_image.json")
        refs = [official["references"][key] for key in keys]
        for name, values in (
            ("CIDEr", caption_metrics.cider(said, refs)),
            ("ROUGE_L", [caption_metrics.rouge_l(s, r) for s, r in zip(said, refs, strict=True)]),
        ):
            pairs = [(per_image[name][key], round(v, 8)) for key, v in zip(keys, values, strict=True)]
            yield f"{stem}_predictions.json", f"{name} of each image (8 decimals)", pairs


CHECKS: dict[str, Callable[[Path], Iterator[Rows]]] = {
    "captions": _captions,
    "mathvista": _mathvista,
    "mmmu": _mmmu,
    "mmmu_pro": _mmmu_pro,
    "relaxed_accuracy": _relaxed_accuracy,
    "textvqa": _textvqa,
    "vqav2": _vqav2,
}
