"""MM-Vet (Yu et al. 2023): GPT-4 grades of open answers, aggregated per capability.

Scores stored grades (`mllm-jax judge mm_vet` makes them): 100 * mean grade over the questions that need
a capability, averaged over grading runs, as in the official `mm-vet_evaluator.py`.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from mllm_jax import files
from mllm_jax.evaluation.benchmarks.answers import Answer
from mllm_jax.evaluation.benchmarks.base import BenchmarkError, Question
from mllm_jax.evaluation.benchmarks.judged import Case, Judged, JudgeTask, required
from mllm_jax.evaluation.benchmarks.published import File, Published, Upload, value_of
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_map,
    as_text,
    match_ids,
    read_annotations,
    read_json,
    take,
)

_ZIP = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"


def _grades(value: Any) -> list[float] | None:
    """One question's grades per run, each in [0, 1]; None if some grade is no number."""
    runs = value.get("score") if isinstance(value, dict) else value
    runs = runs if isinstance(runs, list) else [runs]
    if not runs or any(
        isinstance(g, bool) or not isinstance(g, (int, float)) or not 0 <= g <= 1 for g in runs
    ):
        return None
    return [float(g) for g in runs]


def aggregate(grades: dict[str, Sequence[float]], capabilities: dict[str, list[str]]) -> dict[str, Any]:
    """Mean per capability, per combination of capabilities, per run and in total, as percentages."""
    runs = len(next(iter(grades.values())))
    sums: dict[str, list[float]] = {}
    counts: dict[str, int] = {}
    combos: dict[str, list[Sequence[float]]] = {}
    for key, values in grades.items():
        for name in ("total", *capabilities[key]):
            total = sums.setdefault(name, [0.0] * runs)
            counts[name] = counts.get(name, 0) + 1
            for run, grade in enumerate(values):
                total[run] += grade
        combos.setdefault("+".join(sorted(capabilities[key])), []).append(values)
    percent = {name: np.array(total) / counts[name] * 100 for name, total in sums.items()}
    return {
        "runs_total": percent["total"].tolist(),
        "std": float(percent["total"].std()),
        "mean": {name: float(values.mean()) for name, values in percent.items()},
        "per_combination": {combo: float(np.mean(rows) * 100) for combo, rows in combos.items()},
    }


def _judged(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Case]:
    gold = read_annotations(required(annotations, "mm-vet.json"))
    said = read_json(predictions, problems)
    if as_map(said, ("question_id",)) is not None:
        rows = [{"id": key, "text": text} for key, text in said.items()]
    else:  # LLaVA's answer file, before its conversion
        rows = [
            {"id": f"v1_{take(row, ('question_id',), str(predictions))}", "text": row.get("text")}
            for row in (said if isinstance(said, list) else [said])
        ]
    found = match_ids(rows, gold, lambda r: r["id"], lambda r: r["text"], problems)
    for key, row in found.items():
        truth = as_text(take(gold[key], ("answer",), f"{annotations}: {key}"))
        fields = {
            "question": as_text(take(gold[key], ("question",), f"{annotations}: {key}")),
            "answer": truth,
            "prediction": as_text(row["text"]),
        }
        yield key, fields, {}


def _parse_grade(reply: str) -> float | None:
    words = reply.split()
    try:
        grade = float(words[0]) if words else -1.0
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


_GRADE = """Grade how correct a prediction is, from 0.0 (wrong) to 1.0 (entirely correct) in steps of 0.1.
<AND> in the ground truth means that every part is required, <OR> that any one part is enough.
A partly correct prediction earns the share of the required parts that it has. Reply with the number only.

Question | Ground truth | Prediction | Grade
--- | --- | --- | ---
How many cups are on the table? | 3 | There are four cups. | 0.0
How many cups are on the table? | 3 | three | 1.0
Which fruits are in the bowl? | apple <AND> pear | I can see an apple. | 0.5
Which fruits are in the bowl? | apple <AND> pear | A pear next to an apple. | 1.0
What is the animal? | cat <OR> kitten | It is a small kitten. | 1.0
{question} | {answer} | {prediction} |"""


class MmVet(Published):
    """MM-Vet: the question alone. Graded by `mllm-jax judge mm_vet`."""

    name = "mm_vet"
    unit = "percent"
    rule = "MM-Vet mm-vet_evaluator.py"
    answers_format = (
        "stored grades: JSON id -> [grade per run], or the official grade file id -> {score: [...]}"
    )
    annotations_format = "JSON id -> capabilities, or mm-vet.json"
    judged = True
    stores_text = False
    judge = (JudgeTask("mm_vet", "gpt-4-0613", 0.0, 8, 3, "", _GRADE, _judged, _parse_grade),)
    upload = Upload("mm_vet.json", "MM-Vet's evaluator")
    files: ClassVar = {"questions": File(("mm-vet.json",), _ZIP), "images": File(("images",), _ZIP)}

    def items(self) -> Iterator[Question]:
        for row in self.rows():
            name = str(row["_id"])
            if not name.startswith("v1_"):
                raise BenchmarkError(f"{self.path}: id {name!r} does not begin with 'v1_'")
            image = value_of(row, "imagename", name)
            yield self.question(name.removeprefix("v1_"), str(value_of(row, "question", name)), (image,))

    @classmethod
    def store_judgements(
        cls, folder: Path, judged: Sequence[Judged], predictions: Path, annotations: Path | None
    ) -> tuple[Path, Path | None]:
        grades: dict[str, list[float]] = {}
        for request, reply in judged:
            grades.setdefault(request.question, []).append(request.task.parse(reply["content"]))
        files.write_json(folder / "grades.json", grades)
        return folder / "grades.json", annotations

    @classmethod
    def read_annotations(cls, path: Path) -> dict[str, Mapping[str, Any]]:
        """id -> capabilities; also from MM-Vet's own `mm-vet.json` (id -> {capability: [...]})."""
        value = read_annotations(path)
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
        raw = read_json(path, problems)
        if not isinstance(raw, dict):
            raise PredictionError(f"{path}: expected stored grades, a JSON object id -> [grade per run]")
        if raw and all(isinstance(value, str) for value in raw.values()):
            raise PredictionError(f"{path}: these are answers; `mllm-jax judge mm_vet` makes grades of them")
        return [{"id": key, "text": _grades(value)} for key, value in raw.items()]

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> list[Answer]:
        """Questions with a grade of every run."""
        answers = super().grade_files(predictions, annotations, problems)
        for answer in answers:
            if answer.row["text"] is None:
                problems.add("missing", f"{answer.id}: no grade in [0, 1]")
        answers = [answer for answer in answers if answer.row["text"] is not None]
        runs = max((len(answer.row["text"]) for answer in answers), default=0)
        for answer in answers:
            if len(answer.row["text"]) != runs:
                problems.add("missing", f"{answer.id}: fewer runs than the others")
        answers = [answer for answer in answers if len(answer.row["text"]) == runs]
        if not answers:
            raise PredictionError(f"{predictions}: no grade for any question of {annotations}")
        return answers

    @classmethod
    def grade(cls, answer: Answer) -> None:
        """The mean grade of the runs."""
        grades = answer.row["text"]
        answer.credit = sum(grades) / len(grades) if grades else 0

    @classmethod
    def figures(cls, answers: Sequence[Answer], problems: Problems) -> dict[str, Any]:
        grades = {answer.id: answer.row["text"] for answer in answers}
        result = aggregate(grades, {answer.id: answer.item["capabilities"] for answer in answers})
        mean = result["mean"]
        return {
            "score": mean["total"],
            "subtasks": {name: value for name, value in mean.items() if name != "total"},
            "runs": len(answers[0].row["text"]),
            **result,
        }

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        return {f"v1_{row['question_id']}": row["text"] for row in rows}
