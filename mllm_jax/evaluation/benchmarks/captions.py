"""COCO captions (Chen et al. 2015) and region captions of RefCOCO/+/g: BLEU-1..4, ROUGE-L, CIDEr, METEOR.

The headline is CIDEr. Captions are tokenized by the official Java program where it is installed, else
by our own (the result says which). METEOR exists in Java only: where it cannot run, the result says so
under `METEOR_absent`.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation import caption_java, caption_metrics, ptb_tokenizer
from mllm_jax.evaluation.benchmarks.base import Benchmark
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_map,
    as_text,
    match_ids,
    read_annotations,
    read_json,
    score_result,
    take,
)

TOKENIZERS = ("auto", "java", "python", "none")
_ID = ("image_id", "question_id", "id")
_TEXT = ("caption", "text", "answer")


def read_references(path: Path) -> dict[str, list[str]]:
    """id -> reference captions, from `id -> [caption, ...]` or COCO's annotation file.

    Raises:
        PredictionError: neither form.
    """
    value = read_annotations(path)
    references: dict[str, list[str]] = {}
    if isinstance(value, dict) and isinstance(value.get("annotations"), list):
        for row in value["annotations"]:
            references.setdefault(str(take(row, _ID, str(path))), []).append(
                as_text(take(row, _TEXT, str(path)))
            )
    elif as_map(value, _ID) is not None:
        references = {str(key): [as_text(c) for c in captions] for key, captions in value.items()}
    else:
        for row in value if isinstance(value, list) else [value]:
            key, texts = (
                str(take(row, _ID, str(path))),
                take(row, ("references", "answer", "captions"), str(path)),
            )
            references[key] = [as_text(text) for text in (texts if isinstance(texts, list) else [texts])]
    if not references or not all(references.values()):
        raise PredictionError(f"{path}: expected id -> list of captions, or COCO's captions_*.json")
    return references


def _rows(path: Path, problems: Problems) -> list[dict[str, Any]]:
    value = read_json(path, problems)
    if as_map(value, _ID) is not None:
        return [{"id": k, "text": v[0] if isinstance(v, list) and v else v} for k, v in value.items()]
    rows = value if isinstance(value, list) else [value]
    return [
        {"id": str(take(row, _ID, str(path))), "text": take(row, _TEXT, str(path))}
        for row in rows
        if isinstance(row, dict)
    ]


def _tokenizer(name: str) -> tuple[str, Callable[[Sequence[str]], list[str]]]:
    if name not in TOKENIZERS:
        raise ValueError(f"no tokenizer {name!r}; there are {TOKENIZERS}")
    if name == "none":
        return "none (captions are tokenized already)", list
    if name == "java" or (name == "auto" and not caption_java.missing()):
        return "PTBTokenizer (Java)", caption_java.tokenize
    return "PTBTokenizer rules (mllm_jax, no Java)", ptb_tokenizer.tokenize


def score_captions(
    predictions: Mapping[str, str], references: Mapping[str, Sequence[str]], tokenizer: str = "auto"
) -> dict[str, Any]:
    """All metrics of captions by id; ids must be the same on both sides.

    Returns:
        `Bleu_1` .. `Bleu_4`, `ROUGE_L`, `CIDEr`, and `METEOR` or `METEOR_absent`; `tokenizer`.
    """
    name, tokenize = _tokenizer(tokenizer)
    keys = list(predictions)
    flat = [caption for key in keys for caption in references[key]]
    wanted = iter(tokenize(flat))
    refs = [[next(wanted) for _ in references[key]] for key in keys]
    said = tokenize([predictions[key] for key in keys])
    figures: dict[str, Any] = {}
    for n, value in enumerate(caption_metrics.bleu(said, refs), 1):
        figures[f"Bleu_{n}"] = value
    rouge = [caption_metrics.rouge_l(s, r) for s, r in zip(said, refs, strict=True)]
    figures["ROUGE_L"] = caption_metrics.mean(rouge)
    figures["CIDEr"] = caption_metrics.mean(caption_metrics.cider(said, refs))
    if reason := caption_java.missing():
        figures["METEOR_absent"] = reason
    else:
        figures["METEOR"] = caption_java.meteor(said, refs)[0]
    return figures | {"tokenizer": name}


def _score(name: str, predictions: Path, annotations: Path, tokenizer: str) -> dict[str, Any]:
    problems = Problems()
    references = read_references(annotations)
    found = match_ids(
        _rows(predictions, problems), references, lambda r: r["id"], lambda r: r["text"], problems
    )
    if not found:
        raise PredictionError(f"{predictions}: no caption for any image of {annotations}")
    # The official tools go through the images in the order of the references.
    said = {key: as_text(found[key]["text"]) for key in references if key in found}
    figures = score_captions(said, references, tokenizer)
    return score_result(
        name,
        n=len(said),
        unparsed=sum(not text.strip() for text in said.values()),
        score=figures["CIDEr"],
        unit="fraction",
        subtasks={},
        groups={},
        problems=problems,
        n_references=sum(len(references[key]) for key in said),
        **figures,
    )


def _benchmark(name: str) -> Benchmark:
    def score_files(predictions: Path, annotations: Path | None, tokenizer: str = "auto") -> dict[str, Any]:
        return _score(name, predictions, annotations, tokenizer)

    return Benchmark(
        name=name,
        unit="fraction",
        score_files=score_files,
        predictions="JSON array {image_id, caption}, LLaVA JSON lines {question_id, text}, or id -> caption",
        annotations="id -> reference captions, or COCO's captions_*.json",
        official="pycocoevalcap 1.2 (COCO caption tools)",
        options=("tokenizer",),
    )


BENCHMARK = _benchmark("captions")
BENCHMARK_REGION = {name: _benchmark(f"{name}_caption") for name in ("refcoco", "refcoco+", "refcocog")}
