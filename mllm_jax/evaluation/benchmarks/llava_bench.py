"""LLaVA-Bench in the wild (Liu et al. 2023): GPT-4 scores the reference and the model; 100 *
mean(model)/mean(reference).

Scores stored reviews. As in the official `summarize_gpt_review.py`, means are rounded to three decimals
first and a review without two numbers counts with (-1, -1); the figures without either are printed
beside.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mllm_jax.evaluation.benchmarks.answers import Answer, ratio
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.judged import Case, Judged, JudgeTask, required, write_lines
from mllm_jax.evaluation.benchmarks.published import File, Published, Upload, value_of
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_text,
    by_id,
    match_ids,
    read_annotation_rows,
    read_rows,
    take,
)

_HUB = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
FAILED = (-1.0, -1.0)
Pair = tuple[float, float]


def parse_review(content: str) -> Pair:
    """The two scores on a review's first line, or (-1, -1).

    Example:
        >>> parse_review("8, 6.5\\nAssistant 1 ..."), parse_review("Scores: 8 7")
        ((8.0, 6.5), (-1.0, -1.0))
    """
    words = content.split("\n")[0].replace(",", " ").split()
    try:
        first, second = (float(word) for word in words)
    except ValueError:
        return FAILED
    return (first, second) if np.isfinite(first) and np.isfinite(second) else FAILED


def summarize(pairs: Sequence[Pair]) -> dict[str, Any]:
    """Relative score with the official rounding, both means times ten, and the official printout."""
    reference, model = (round(x, 3) for x in np.asarray(pairs).mean(0).tolist())
    relative = ratio(model, reference) * 100
    return {
        "n": len(pairs),
        "relative": relative,
        "gpt4_x10": reference * 10,
        "model_x10": model * 10,
        "official_printout": [round(relative, 1), round(reference * 10, 1), round(model * 10, 1)],
    }


def _unrounded(pairs: Sequence[Pair]) -> float:
    return ratio(sum(m for _, m in pairs), sum(r for r, _ in pairs)) * 100


def _judged(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Case]:
    folder = required(annotations, "the folder with questions.jsonl, context.jsonl and answers_gpt4.jsonl")
    files = [folder / name for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")]
    questions, contexts, references = (read_annotation_rows(path) for path in files)
    asked = by_id(questions, ("question_id",), files[0])
    caption_of = {
        take(row, ("image",), str(files[1])): take(row, ("caption",), str(files[1])) for row in contexts
    }
    reference = by_id(references, ("question_id",), files[2])
    found = match_ids(
        read_rows(predictions, problems),
        asked,
        lambda r: str(take(r, ("question_id",), str(predictions))),
        lambda r: take(r, ("text",), str(predictions)),
        problems,
    )
    for key, row in found.items():
        question = asked[key]
        image = take(question, ("image",), f"{files[0]}: {key}")
        if key not in reference or image not in caption_of:
            raise PredictionError(f"{folder}: question {key} has no reference answer or no context")
        context = caption_of[image]
        fields = {
            "context": "\n".join(context) if isinstance(context, list) else as_text(context),
            "question": as_text(take(question, ("text",), f"{files[0]}: {key}")),
            "reference": as_text(take(reference[key], ("text",), f"{files[2]}: {key}")),
            "prediction": as_text(row["text"]),
        }
        category = as_text(take(question, ("category",), f"{files[0]}: {key}"))
        yield key, fields, {"category": category if "llava_bench" in category else f"llava_bench_{category}"}


_REVIEW = """[Context]
{context}

[Question]
{question}

[Assistant 1]
{reference}

[End of Assistant 1]

[Assistant 2]
{prediction}

[End of Assistant 2]

[System]
Two assistants answered a question about a picture that you know only through the context above. Rate the
helpfulness, relevance, accuracy and level of detail of each answer from 1 to 10; higher is better. Write the
two scores, for Assistant 1 and Assistant 2 in this order and separated by one space, on the first line and
nothing else on it. Then explain the scores without favour to either and without regard to their order."""


def _parse_reply(reply: str) -> str | None:
    return None if parse_review(reply) == FAILED else reply


class LlavaBench(Published):
    """LLaVA-Bench in the wild: the question alone. Reviewed by `mllm-jax judge llava_bench`."""

    name = "llava_bench"
    unit = "percent"
    rule = "LLaVA summarize_gpt_review.py"
    answers_format = (
        "stored reviews, JSON lines {question_id, category, content}; a folder holds several runs"
    )
    id_keys = ("question_id",)
    judged = True
    judge = (
        JudgeTask(
            "llava_bench",
            "gpt-4-0314",
            0.2,
            1024,
            200,
            "You check the quality of answers carefully and impartially.",
            _REVIEW,
            _judged,
            _parse_reply,
        ),
    )
    upload = Upload("answers.jsonl", "LLaVA's eval_gpt_review_bench.py")
    files: ClassVar = {"questions": File(("questions.jsonl",), _HUB), "images": File(("images",), _HUB)}

    def items(self) -> Iterator[Question]:
        for row in self.rows():
            number = value_of(row, "question_id", self.path)
            fields = {"category": row.get("category", "")}
            image = value_of(row, "image", f"question {number}")
            text = str(value_of(row, "text", f"question {number}"))
            yield self.question(number, text, (image,), fields=fields)

    @classmethod
    def store_judgements(
        cls, folder: Path, judged: Sequence[Judged], predictions: Path, annotations: Path | None
    ) -> tuple[Path, None]:
        """A file of reviews for each run."""
        for run in sorted({request.run for request, _ in judged}):
            rows = [
                request.judgement("question_id", reply) for request, reply in judged if request.run == run
            ]
            write_lines(folder / f"review_run{run}.jsonl", rows)
        return folder, None

    @classmethod
    def stored(cls, row: Mapping[str, Any], where: str) -> Any:
        return row.get("content")

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> list[Answer]:
        """The reviews of all runs, one file each."""
        paths = sorted(predictions.glob("*.jsonl")) if predictions.is_dir() else [predictions]
        if not paths:
            raise PredictionError(f"{predictions}: no .jsonl review files in this folder")
        gold = None
        if annotations is not None:
            gold = by_id(read_annotation_rows(annotations), cls.id_keys, annotations)
        runs = {path.stem: cls.match(read_rows(path, problems), gold, path, path, problems) for path in paths}
        everything = dict.fromkeys(answer.id for run in runs.values() for answer in run)
        for name, run in runs.items():
            reviewed = {answer.id for answer in run}
            for key in everything:
                if key not in reviewed:
                    problems.add("missing", f"{name}: question {key}")
            for answer in run:
                answer.notes["run"] = name
                if answer.notes["differs"]:
                    problems.add("stored_scores_differ_from_the_review", answer.id)
        return [answer for run in runs.values() for answer in run]

    @classmethod
    def grade(cls, answer: Answer) -> None:
        """Credits nothing: the scores are relative to the reference's."""
        row = answer.row
        stored = row.get("tuple", row.get("score"))
        reviewed = row.get("content") is not None
        pair, differs = parse_review(answer.text) if reviewed else FAILED, False
        if isinstance(stored, list) and len(stored) == 2:
            stored = (float(stored[0]), float(stored[1]))
            differs = reviewed and stored != pair
            pair = stored  # the official script reads the stored pair
        answer.parsed = pair != FAILED
        category = as_text(take(row, ("category",), answer.where))
        answer.notes |= {"pair": pair, "differs": differs, "category": category}

    @classmethod
    def figures(cls, answers: Sequence[Answer], problems: Problems) -> dict[str, Any]:
        runs: dict[str, dict[str, list[Pair]]] = {}
        for answer in answers:
            parts = runs.setdefault(answer.notes["run"], {"all": []})
            parts["all"].append(answer.notes["pair"])
            parts.setdefault(answer.notes["category"], []).append(answer.notes["pair"])
        details: dict[str, dict[str, Any]] = {}
        pooled: dict[str, list[float]] = {}
        for name, parts in runs.items():
            details[name] = {part: summarize(pairs) for part, pairs in parts.items()}
            good = [pair for pair in parts["all"] if pair != FAILED]
            details[name]["all"]["relative_without_rounding"] = _unrounded(parts["all"])
            details[name]["all"]["relative_without_unparsed"] = _unrounded(good) if good else 0.0
            for part, summary in details[name].items():
                pooled.setdefault(part, []).append(summary["relative"])
        means = {part: sum(values) / len(values) for part, values in pooled.items()}
        return {
            "n": len({answer.id for answer in answers}),
            "score": means["all"],
            "subtasks": {part: value for part, value in means.items() if part != "all"},
            "runs": details,
        }

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """LLaVA's answer file."""
        return [{**{k: row[k] for k in ("question_id", "prompt", "text")}, "metadata": {}} for row in rows]
