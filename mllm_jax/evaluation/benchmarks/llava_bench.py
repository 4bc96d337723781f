"""LLaVA-Bench in the wild (Liu et al. 2023): GPT-4 scores the reference and the model; 100 *
mean(model)/mean(reference).

Scores stored reviews. As in the official `summarize_gpt_review.py`, means are rounded to three decimals
first and a review without two numbers counts with (-1, -1); the figures without either are printed
beside.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from mllm_jax import files
from mllm_jax.evaluation import predictions as reading
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.judged import Case, Files, Judged, JudgeTask, needed, read_answers, texts
from mllm_jax.evaluation.benchmarks.published import File, Published, Upload, hub
from mllm_jax.evaluation.predictions import PredictionError, Problems, Row, as_text, take
from mllm_jax.storage import Path

_HUB = hub("liuhaotian/llava-bench-in-the-wild")
_ID = ("question_id",)
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


def _pairs(answers: Answers) -> list[Pair]:
    return [answer.notes["pair"] for answer in answers]


def _unrounded(pairs: Sequence[Pair]) -> float:
    return ratio(sum(m for _, m in pairs), sum(r for r, _ in pairs)) * 100


def _judged(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Case]:
    folder = needed(annotations, "the folder with questions.jsonl, context.jsonl and answers_gpt4.jsonl")
    places = [folder / name for name in ("questions.jsonl", "answers_gpt4.jsonl", "context.jsonl")]
    asked, reference = (reading.by_id(reading.read_annotation_rows(path), _ID, path) for path in places[:2])
    contexts = {as_text(row.get("image")): row for row in reading.read_annotation_rows(places[2])}
    for key, row in read_answers(predictions, asked, _ID, ("text",), problems).items():
        place = f"{places[0]}: {key}"
        image, category = (as_text(take(asked[key], (name,), place)) for name in ("image", "category"))
        if key not in reference or image not in contexts:
            raise PredictionError(f"{folder}: question {key} has no reference answer or no context")
        context = take(contexts[image], ("caption",), f"{places[2]}: {image}")
        fields = {"context": "\n".join(context) if isinstance(context, list) else as_text(context)}
        fields |= texts(asked[key], place, question="text")
        fields |= texts(reference[key], f"{places[1]}: {key}", reference="text")
        fields |= texts(row, str(predictions), prediction="text")
        yield key, fields, {"category": category if "llava_bench" in category else f"llava_bench_{category}"}


def _parse_reply(reply: str) -> str | None:
    return None if parse_review(reply) == FAILED else reply


class LlavaBench(Published):
    """LLaVA-Bench in the wild: the question alone. Reviewed by `mllm-jax judge llava_bench`."""

    name = "llava_bench"
    unit = "percent"
    rule = "LLaVA summarize_gpt_review.py"
    answers_format = "stored reviews, JSON lines {question_id, category, content}; a folder: several runs"
    id_keys = _ID
    judged = True
    judge = (
        JudgeTask(
            "llava_bench",
            "gpt-4-0314",
            temperature=0.2,
            max_tokens=1024,
            reply_tokens=200,
            system="You check the quality of answers carefully and impartially.",
            prompt="llava_bench",
            items=_judged,
            parse=_parse_reply,
        ),
    )
    upload = Upload("answers.jsonl", "LLaVA's eval_gpt_review_bench.py")
    files: ClassVar = {"questions": File(("questions.jsonl",), _HUB), "images": File(("images",), _HUB)}

    def items(self) -> Iterator[Question]:
        for row in self.rows():
            fields = {"category": row.get("category", "")}
            yield self.question(row["question_id"], str(row["text"]), [row["image"]], fields=fields)

    @classmethod
    def store_judgements(cls, folder: Path, judged: Sequence[Judged], said: Files) -> Files:
        """A file of reviews for each run."""
        for run in sorted({request.run for request, _ in judged}):
            rows = [one.judgement("question_id", reply) for one, reply in judged if one.run == run]
            files.write_json_lines(folder / f"review_run{run}.jsonl", rows)
        return folder, None

    @classmethod
    def stored(cls, row: Row, where: str) -> Any:
        return row.get("content")

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> Answers:
        """The reviews of all runs, one file each."""
        paths = sorted(predictions.glob("*.jsonl")) if predictions.is_dir() else [predictions]
        if not paths:
            raise PredictionError(f"{predictions}: no .jsonl review files in this folder")
        gold = None if annotations is None else cls.read_annotations(annotations)
        runs = {
            path.stem: cls.match(reading.read_rows(path, problems), gold, path, None, problems)
            for path in paths
        }
        everything = Answers(answer for run in runs.values() for answer in run)
        for name, run in runs.items():
            reviewed = {answer.id for answer in run}
            for key in dict.fromkeys(answer.id for answer in everything):
                if key not in reviewed:
                    problems.add("missing", f"{name}: question {key}")
            for answer in run:
                answer.notes["run"] = name
                if answer.notes["differs"]:
                    problems.add("stored_scores_differ_from_the_review", answer.id)
        return everything

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
        answer.parsed, answer.part = pair != FAILED, as_text(take(row, ("category",), answer.where))
        answer.notes = {"pair": pair, "differs": differs}

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        runs: dict[str, dict[str, dict[str, Any]]] = {}
        pooled: dict[str, list[float]] = {}
        for name, run in answers.parts("run").items():
            pairs = _pairs(run)
            good = [pair for pair in pairs if pair != FAILED]
            runs[name] = {part: summarize(_pairs(some)) for part, some in {"all": run, **run.parts()}.items()}
            runs[name]["all"]["relative_without_rounding"] = _unrounded(pairs)
            runs[name]["all"]["relative_without_unparsed"] = _unrounded(good) if good else 0.0
            for part, summary in runs[name].items():
                pooled.setdefault(part, []).append(summary["relative"])
        means = {part: sum(values) / len(values) for part, values in pooled.items()}
        return {
            "n": len({answer.id for answer in answers}),
            "score": means.pop("all"),
            "subtasks": means,
            "runs": runs,
        }

    def submission(self, rows: Sequence[Row]) -> Any:
        """LLaVA's answer file."""
        return [{**{k: row[k] for k in ("question_id", "prompt", "text")}, "metadata": {}} for row in rows]
