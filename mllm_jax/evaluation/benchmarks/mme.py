"""MME (Fu et al. 2023): 14 yes/no sub-tasks, two questions per image, up to 200 points each.

Sub-task score = 100 * accuracy (over questions) + 100 * accuracy+ (over images with both questions right);
perception is the sum of the first ten, cognition of the last four. Follows `calculation.py` of the official
eval tool, and LLaVA's conversion of its answer files to that tool's text files.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any

from mllm_jax.evaluation.benchmarks.base import Benchmark
from mllm_jax.evaluation.benchmarks.yes_no import confusion
from mllm_jax.evaluation.grouping import group_scores, load_groups
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_text,
    match_ids,
    read_rows,
    read_text,
    score_result,
    take,
)

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION
SHORT_SUFFIX = "Answer the question using a single word or phrase."
YES_NO_SUFFIX = "Please answer yes or no."

# One question: (image, question, label); its key is (task, image, question).
Question = tuple[str, str, str]


def parse_yes_no(text: str) -> str:
    """`yes`, `no` or `other`, decided by the first four characters ("know ..." is a no, as upstream).

    Example:
        >>> [parse_yes_no(t) for t in ("Yes, it is", "know", "a cat", "  no")]
        ['yes', 'no', 'other', 'no']
    """
    answer = text.lower()
    if answer in ("yes", "no"):
        return answer
    start = answer[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def parse_yes_no_lmms(text: str) -> str:
    """lmms-eval's variant: white space and full stops are stripped first."""
    return parse_yes_no(text.lower().strip().replace(".", ""))


def score_task(pairs: Sequence[tuple[str, str]]) -> dict[str, float | int]:
    """One sub-task from (label, parsed answer) pairs in file order; two consecutive pairs are one image.

    Precision and recall leave answers out that are neither yes nor no, accuracy counts them as wrong.
    """
    labels, answers = [label for label, _ in pairs], [answer for _, answer in pairs]
    right = [label == answer for label, answer in pairs]
    images = [right[i : i + 2] for i in range(0, len(right), 2)]
    c = confusion(labels, answers)
    acc = sum(right) / len(right) if right else 0.0
    acc_plus = sum(all(image) for image in images) / len(images) if images else 0.0
    return {
        "score": acc * 100 + acc_plus * 100,
        "rows": len(pairs),
        **c,
        "precision": c["TP"] / (c["TP"] + c["FP"]) if c["TP"] + c["FP"] else 0.0,
        "recall": c["TP"] / (c["TP"] + c["FN"]) if c["TP"] + c["FN"] else 0.0,
        "other_num": answers.count("other"),
        "acc": acc,
        "acc_plus": acc_plus,
    }


def _squeeze(question: str) -> str:
    """A question without either instruction: one key for files with one or two blanks before it."""
    return question.replace(SHORT_SUFFIX, "").replace(YES_NO_SUFFIX, "").strip()


def _read_task(path: Path, columns: int, problems: Problems) -> list[list[str]]:
    rows = []
    for number, line in enumerate(read_text(path, problems).split("\n"), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) == columns or (columns == 3 and len(cells) == 4):
            rows.append(cells)
        else:
            problems.add("unreadable_line", f"{path.name} line {number}: {len(cells)} columns, not {columns}")
    return rows


def read_ground_truth(folder: Path) -> dict[str, list[Question]]:
    """Task -> questions, from `<task>.txt` files with image, question and answer separated by tabs.

    Raises:
        PredictionError: a file is missing or a line is damaged.
    """
    truth = {}
    for task in TASKS:
        path = folder / f"{task}.txt"
        if not path.is_file():
            raise PredictionError(f"{path}: missing; MME annotations are a folder with one file per sub-task")
        problems = Problems()
        truth[task] = [(c[0], c[1], c[2].strip().lower()) for c in _read_task(path, 3, problems)]
        bad = [row for row in truth[task] if row[2] not in ("yes", "no")]
        if problems.counts or bad or not truth[task] or len(truth[task]) % 2:
            raise PredictionError(
                f"{path}: damaged: {problems.as_dict() or bad[:1] or 'odd number of lines'}"
            )
    return truth


def _read_answers(predictions: Path, problems: Problems) -> list[Mapping[str, Any]]:
    """Rows {task, image, question, text} from an official folder of text files or a LLaVA answer file."""
    if predictions.is_dir():
        rows = []
        for task in TASKS:
            path = predictions / f"{task}.txt"
            if not path.is_file():
                continue  # its questions are reported as missing
            for image, question, _, text in _read_task(path, 4, problems):
                rows.append({"task": task, "image": image, "question": question, "text": text})
        return rows
    rows = []
    for row in read_rows(predictions, problems):
        where = str(take(row, ("question_id",), str(predictions)))
        path = PurePosixPath(where)
        question = as_text(take(row, ("prompt", "question"), str(predictions)))
        text = as_text(take(row, ("text", "answer"), str(predictions)))
        task = path.parts[0] if path.parts else ""
        rows.append({"task": task, "image": path.name, "question": question, "text": text})
    return rows


def score_mme(
    truth: Mapping[str, Sequence[Question]],
    rows: Sequence[Mapping[str, Any]],
    problems: Problems,
    groups: Path | None = None,
) -> dict[str, Any]:
    """Scores rows {task, image, question, text} against the ground truth; `groups` is a grouping file."""

    def key(task: str, image: str, question: str) -> tuple[str, str, str]:
        return task, PurePosixPath(image).stem, _squeeze(question)

    expected = [key(task, image, question) for task in truth for image, question, _ in truth[task]]
    if len(set(expected)) != len(expected):
        twice = next(k for k in expected if expected.count(k) > 1)
        raise PredictionError(f"MME ground truth: question {twice} occurs twice")
    found = match_ids(
        rows, expected, lambda r: key(r["task"], r["image"], r["question"]), lambda r: r["text"], problems
    )
    tasks, other, lmms = {}, 0, {}
    for task in truth:
        texts = [
            (label, found[key(task, image, question)]["text"])
            for image, question, label in truth[task]
            if key(task, image, question) in found
        ]
        tasks[task] = score_task([(label, parse_yes_no(text)) for label, text in texts])
        lmms[task] = score_task([(label, parse_yes_no_lmms(text)) for label, text in texts])["score"]
        other += tasks[task]["other_num"]
    table = load_groups(groups)
    scores = {task: cell["score"] for task, cell in tasks.items()}
    perception = sum(scores[task] for task in PERCEPTION if task in scores)
    cognition = sum(scores[task] for task in COGNITION if task in scores)
    return score_result(
        "mme",
        n=len(found),
        unparsed=other,
        score=perception,
        unit="points",
        subtasks=scores,
        groups=group_scores("mme", scores, "sum", table),
        problems=problems,
        perception=perception,
        cognition=cognition,
        total=perception + cognition,
        group_mean=group_scores("mme", scores, "macro", table),
        group_authors=group_scores("mme_authors", scores, "sum", table) if "mme_authors" in table else {},
        group_normalised=group_scores("mme", scores, "normalised", table),
        details=tasks,
        lmms_perception=sum(lmms[task] for task in PERCEPTION if task in lmms),
        lmms_cognition=sum(lmms[task] for task in COGNITION if task in lmms),
    )


def _score_files(predictions: Path, annotations: Path | None, groups: Path | None = None) -> dict[str, Any]:
    problems = Problems()
    folder = annotations if annotations is not None else predictions
    if annotations is None and not predictions.is_dir():
        raise ValueError(
            "mme: --annotations is needed with a LLaVA answer file: the folder of <task>.txt files"
        )
    truth = read_ground_truth(folder)
    return score_mme(truth, _read_answers(predictions, problems), problems, groups)


BENCHMARK = Benchmark(
    name="mme",
    unit="points",
    score_files=_score_files,
    predictions="LLaVA JSON lines {question_id, prompt, text}, or a folder of <task>.txt with four columns",
    annotations="",
    official="MME eval tool, calculation.py",
    options=("groups",),
)
