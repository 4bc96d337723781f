"""MM-Vet (Yu et al. 2023): GPT-4 grades of open answers, aggregated per capability.

Scores stored grades (`mllm-jax judge mm_vet` makes them): 100 * mean grade over the questions that need
a capability, averaged over grading runs, as in the official `mm-vet_evaluator.py`.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import numpy as np

from mllm_jax import files
from mllm_jax.evaluation import predictions as reading
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.base import Question, Unanswered
from mllm_jax.evaluation.benchmarks.judged import Case, Files, Judged, JudgeTask, needed, texts
from mllm_jax.evaluation.benchmarks.published import File, Published, Upload
from mllm_jax.evaluation.predictions import BenchmarkError, PredictionError, Problems, Row, take
from mllm_jax.storage import Path

_ZIP = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"


def _grades(value: Any) -> list[float] | None:
    """One question's grades per run, each in [0, 1]; None if some grade is no number."""
    runs = value.get("score") if isinstance(value, dict) else value
    runs = runs if isinstance(runs, list) else [runs]
    numbers = [g for g in runs if isinstance(g, (int, float)) and not isinstance(g, bool) and 0 <= g <= 1]
    return list(map(float, numbers)) if runs and len(numbers) == len(runs) else None


def aggregate(graded: Sequence[tuple[list[float], list[str]]]) -> dict[str, Any]:
    """Mean per capability, per combination of capabilities, per run and in total, as percentages.

    Args:
      graded: of each question the grades, one per run, and the capabilities that it needs.
    """
    parts: dict[str, list[list[float]]] = {}
    combinations: dict[str, list[list[float]]] = {}
    for grades, names in graded:
        for name in ("total", *names):
            parts.setdefault(name, []).append(grades)
        combinations.setdefault("+".join(sorted(names)), []).append(grades)
    # Added one question after the other: the last digit depends on it.
    percent = {name: np.cumsum(rows, axis=0)[-1] / len(rows) * 100 for name, rows in parts.items()}
    return {
        "runs_total": percent["total"].tolist(),
        "std": float(percent["total"].std()),
        "mean": {name: float(values.mean()) for name, values in percent.items()},
        "per_combination": {names: float(np.mean(rows) * 100) for names, rows in combinations.items()},
    }


def _judged(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Case]:
    gold = reading.read_annotations(needed(annotations, "mm-vet.json"))
    said = reading.read_json(predictions, problems)
    if reading.as_map(said, ("question_id",)) is not None:
        rows = [{"id": key, "text": text} for key, text in said.items()]
    else:  # LLaVA's answer file, before its conversion
        rows = [
            {"id": f"v1_{take(row, ('question_id',), str(predictions))}", "text": row.get("text")}
            for row in (said if isinstance(said, list) else [said])
        ]
    found = reading.match_ids(rows, gold, lambda r: r["id"], lambda r: r["text"], problems)
    for key, row in found.items():
        fields = texts(gold[key], f"{annotations}: {key}", question="question", answer="answer")
        yield key, fields | texts(row, str(predictions), prediction="text"), {}


def _parse_grade(reply: str) -> float | None:
    words = reply.split()
    try:
        grade = float(words[0]) if words else -1.0
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


class MmVet(Published):
    """MM-Vet: the question alone. Graded by `mllm-jax judge mm_vet`."""

    name = "mm_vet"
    unit = "percent"
    rule = "MM-Vet mm-vet_evaluator.py"
    answers_format = "stored grades: JSON id -> [grade per run], or the official id -> {score: [...]}"
    annotations_format = "JSON id -> capabilities, or mm-vet.json"
    judged = True
    stores_text = False
    judge = (JudgeTask("mm_vet", "gpt-4-0613", 0.0, 8, 3, "", "mm_vet", _judged, _parse_grade),)
    upload = Upload("mm_vet.json", "MM-Vet's evaluator")
    files: ClassVar = {"questions": File(("mm-vet.json",), _ZIP), "images": File(("images",), _ZIP)}

    def items(self) -> Iterator[Question]:
        for row in self.rows():
            name = str(row["_id"])
            if not name.startswith("v1_"):
                raise BenchmarkError(f"{self.path}: id {name!r} does not begin with 'v1_'")
            yield self.question(name.removeprefix("v1_"), str(row["question"]), [row["imagename"]])

    @classmethod
    def store_judgements(cls, folder: Path, judged: Sequence[Judged], said: Files) -> Files:
        grades: dict[str, list[float]] = {}
        for request, reply in judged:
            grades.setdefault(request.question, []).append(request.task.parse(reply["content"]))
        files.write_json(folder / "grades.json", grades)
        return folder / "grades.json", said[1]

    @classmethod
    def read_annotations(cls, path: Path) -> dict[str, Row]:
        """id -> capabilities; also from MM-Vet's own `mm-vet.json` (id -> {capability: [...]})."""
        value = reading.read_annotations(path)
        if not isinstance(value, dict) or not value:
            raise PredictionError(f"{path}: expected a JSON object id -> capabilities")
        keys = ("capability", "capabilities")
        found = {
            key: take(item, keys, f"{path}: {key}") if isinstance(item, dict) else item
            for key, item in value.items()
        }
        return {key: {"capabilities": list(names)} for key, names in found.items()}

    @classmethod
    def read_answers(cls, path: Path, problems: Problems) -> list[dict[str, Any]]:
        raw = reading.read_json(path, problems)
        if not isinstance(raw, dict):
            raise PredictionError(f"{path}: expected stored grades, a JSON object id -> [grade per run]")
        if raw and all(isinstance(value, str) for value in raw.values()):
            raise PredictionError(f"{path}: these are answers; `mllm-jax judge mm_vet` makes grades of them")
        return [{"id": key, "text": _grades(value)} for key, value in raw.items()]

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> Answers:
        """Questions with a grade of every run."""
        answers = super().grade_files(predictions, annotations, problems)
        runs = max((len(answer.row["text"]) for answer in answers), default=0)
        kept = Answers(answer for answer in answers if len(answer.row["text"]) == runs)
        for answer in answers:
            if len(answer.row["text"]) != runs:
                problems.add("missing", f"{answer.id}: fewer runs than the others")
        if not kept:
            raise PredictionError(f"{predictions}: no grade for any question of {annotations}")
        return kept

    @classmethod
    def grade(cls, answer: Answer) -> None:
        """The mean grade of the runs."""
        grades = answer.row["text"]
        if grades is None:
            raise Unanswered("no grade in [0, 1]")
        answer.credit = sum(grades) / len(grades)

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        result = aggregate([(answer.row["text"], answer.item["capabilities"]) for answer in answers])
        means = dict(result["mean"])
        return {"score": means.pop("total"), "subtasks": means, "runs": len(answers[0].row["text"]), **result}

    def submission(self, rows: Sequence[Row]) -> Any:
        return {f"v1_{row['question_id']}": row["text"] for row in rows}
