"""MathVista testmini (Lu et al. 2024): 1000 questions; a normalised extraction must equal the answer's text.

Follows the official `calculate_score.py` from the extraction on. Extractions are stored answers: a GPT
model makes them officially (`mllm-jax judge mathvista`); without them the rules that need no judge are
applied to the response and what is left is counted as unparsed.
"""

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax import files
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.judged import Case, Files, Judged, JudgeTask
from mllm_jax.evaluation.benchmarks.published import File, Published, Upload, hub, lettered
from mllm_jax.evaluation.benchmarks.question_files import FileRow
from mllm_jax.evaluation.edit_distance import most_similar
from mllm_jax.evaluation.option_match import LETTERS
from mllm_jax.evaluation.predictions import BenchmarkError, PredictionError, Problems, Row, as_text, take
from mllm_jax.storage import Path

ITEM_KEYS = ("question_type", "answer_type")
METADATA_KEYS = ("language", "source", "category", "task", "context", "grade", "skills")
_LETTER = re.compile(r"\(([a-zA-Z])\)")
_HINT = "Hint: Please answer the question"
HINTS = {
    "multi_choice": f"{_HINT} and provide the correct option letter, e.g., A, B, C, D, at the end.",
    "integer": f"{_HINT} requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.",
    "float 1": f"{_HINT} requiring a floating-point number with one decimal place and provide the final value, e.g., "
    "1.2, 1.3, 1.4, at the end.",
    "float 2": f"{_HINT} requiring a floating-point number with two decimal places and provide the final value, e.g., "
    "1.23, 1.34, 1.45, at the end.",
    "list": f"{_HINT} requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], "
    "[1.2, 1.3, 1.4], at the end.",
}


def normalize(extraction: Any, item: Row, integers_by_float: bool = True) -> str | None:
    """An extraction in the form of the item's answer type, or None if it cannot be read.

    Multiple choice: a letter in parentheses or alone is that option's text; other text the most similar
    option.

    Args:
        extraction: the extracted answer.
        item: needs `question_type`, `answer_type`, `choices`, `precision`.
        integers_by_float: "3.0" is the integer 3 (today's official rule; the published 2023 table read
            only "3").

    Example:
        >>> item = {"question_type": "multi_choice", "choices": ["cat", "dog"], "answer_type": "text"}
        >>> normalize("(b) a dog", item), normalize("dogs", item)
        ('dog', 'dog')
    """
    if item["question_type"] == "multi_choice":
        text = as_text(extraction).strip()
        if named := _LETTER.findall(text):
            text = named[0].upper()
        choices = item["choices"]
        if len(text) == 1 and text in LETTERS[: len(choices)]:
            return choices[LETTERS.index(text)]
        return choices[most_similar(text, choices)]
    kind = item["answer_type"]
    try:
        if kind == "integer":
            return str(int(float(extraction)) if integers_by_float else int(extraction))
        if kind == "float":
            return str(round(float(extraction), int(item["precision"])))
    except (ValueError, TypeError, OverflowError):
        return None
    return str(extraction) if kind == "list" else as_text(extraction)


def quick_extraction(response: str, item: Row) -> str | None:
    """Where no judge is needed: empty, an option's text, a number of the wanted type; else None."""
    if response == "":
        return ""
    if item["question_type"] == "multi_choice" and response in item["choices"]:
        return response
    try:
        if item["answer_type"] == "integer":
            return str(int(response))
        if item["answer_type"] == "float":
            return str(float(response))
    except (ValueError, OverflowError):
        return None
    return None


def math_query(row: FileRow) -> str:
    """MathVista's prompt: a hint on the form of the answer, the question with its unit, the choices.

    Raises:
      BenchmarkError: a kind of answer for which there is no hint.
    """
    kind = row.get("question_type")
    if kind != "multi_choice":
        kind = row.get("answer_type")
        if kind == "float":
            kind = f"float {int(float(row.get('precision') or 0))}"
    if kind not in HINTS:
        raise BenchmarkError(f"{row.where}: no hint for {row.get('question_type')!r} / {kind!r}")
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    choices = f"\nChoices:\n{lettered(row['choices'], '({}) {}')}" if row.get("choices") else ""
    return f"{HINTS[kind]}\nQuestion: {row['question']}{unit}{choices}"


def _judged(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Case]:
    """The responses that no rule can extract an answer from."""
    gold = None if annotations is None else MathVista.read_annotations(annotations)
    found = MathVista.find(MathVista.read_answers(predictions, problems), gold, predictions, problems)
    for key, row in found.items():
        item, where = row if gold is None else MathVista.item(row, gold[key]), f"{predictions}: {key}"
        response = as_text(take(row, ("response", "text"), where)).strip()
        if quick_extraction(response, item) is None:
            query = as_text(item.get("query") or take(item, ("question",), where))
            yield str(key), {"query": query, "response": response}, {}


class MathVista(Published):
    """MathVista testmini; what no rule can extract from an answer is left to `mllm-jax judge mathvista`."""

    name = "mathvista"
    rule = "MathVista calculate_score.py"
    answers_format = "JSON lines {pid, question_type, answer_type, precision, choices, answer, extraction}"
    id_keys = ("pid", "question_id")
    keyed = True
    judge = (JudgeTask(name, "gpt-4-0613", 0.0, 256, 8, "", "mathvista", _judged, str.strip),)
    upload = Upload("output.json", "MathVista's extract_answer.py")
    files: ClassVar = {
        "questions": File(("testmini.json", "data/testmini-*.parquet"), hub("AI4Math/MathVista")),
        "images": File((".",), hub("AI4Math/MathVista (images.zip)")),
    }
    _KEPT = ("question_type", "answer_type", "precision", "choices", "unit", "answer", "metadata", "question")

    def items(self) -> Iterator[Question]:
        for row in self.rows():
            number, query = str(row.get("pid") or row["_id"]), math_query(row)
            row["choices"] = list(row.get("choices") or ()) or None
            yield self.question(
                number,
                query,
                [row.get("decoded_image") or row["image"]],
                str(row["answer"]),
                row.get("choices") or (),
                ability=str((row.get("metadata") or {}).get("task", "")),
                fields={"pid": number, "query": query},
                truth={"pid": number, **{key: row.get(key) for key in self._KEPT}, "query": query},
            )

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        found = quick_extraction(text, item)
        return (found, "rule") if found else (None, "unparsed")

    @classmethod
    def store_judgements(cls, folder: Path, judged: Sequence[Judged], said: Files) -> Files:
        """The answers, with the judge's extraction where no rule makes one."""
        extracted = {request.question: {"extraction": reply["content"].strip()} for request, reply in judged}
        number_of = cls.identifier(None, said[0])
        answers = cls.read_answers(said[0], Problems())
        rows = [row | extracted.get(number_of(row), {}) for row in answers]
        files.write_json_lines(folder / "extracted.jsonl", rows)
        return folder / "extracted.jsonl", said[1]

    @classmethod
    def stored(cls, row: Row, where: str) -> Any:
        extraction = row.get("extraction")
        if extraction is not None:
            return str(extraction) if isinstance(extraction, list) else extraction
        return row.get("response", row.get("text"))

    @classmethod
    def item(cls, row: Row, annotation: Row) -> Row:
        return {**row, **annotation}

    @classmethod
    def grade(cls, answer: Answer) -> None:
        item = answer.item
        for name in (*ITEM_KEYS, "answer"):
            answer.value(name)
        if item["question_type"] == "multi_choice" and not item.get("choices"):
            raise PredictionError(f"{answer.where}: a multiple-choice item needs its choices")
        extraction = answer.row.get("extraction")
        stored = extraction is not None
        if not stored:
            take(answer.row, ("response", "text"), answer.where)
            extraction = quick_extraction(answer.text.strip(), item)
        gold = as_text(item["answer"])
        said = None if extraction is None else normalize(extraction, item)
        before = None if extraction is None else normalize(extraction, item, integers_by_float=False)
        answer.parsed, answer.credit = said is not None, said is not None and said == gold
        answer.notes = {
            "reading": said,
            "without": not stored and extraction is None,
            "in 2023": before is not None and before == gold,
        }

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        tables: dict[str, dict[str, Answers]] = {name: {} for name in ITEM_KEYS + METADATA_KEYS}
        for answer in answers:
            known = {**(answer.item.get("metadata") or {}), **{name: answer.item[name] for name in ITEM_KEYS}}
            for name, parts in tables.items():
                value = known.get(name)
                for one in value if isinstance(value, list) else [value]:
                    if one is not None:
                        parts.setdefault(as_text(one), Answers()).append(answer)
        breakdown = {
            name: {
                key: {"accuracy": part.mean(), "correct": part.earned, "total": len(part)}
                for key, part in sorted(parts.items())
            }
            for name, parts in tables.items()
        }
        return {
            "subtasks": {name: part.mean() for name, part in tables["task"].items()},
            "correct": answers.earned,
            "without_extraction": answers.total("without"),
            "correct_with_integers_read_as_in_the_2023_table": answers.total("in 2023"),
            "breakdown": breakdown,
        }

    def submission(self, rows: Sequence[Row]) -> Any:
        """The official output file: problem id -> the problem with `query` and `response`."""
        return {row["pid"]: {**row["truth"], "query": row["query"], "response": row["text"]} for row in rows}
