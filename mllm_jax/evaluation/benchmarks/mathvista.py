"""MathVista testmini (Lu et al. 2024): 1000 questions; a normalised extraction must equal the answer's text.

Follows the official `calculate_score.py` from the extraction on. Extractions are stored answers: a GPT
model makes them officially (`mllm-jax judge mathvista`); without them the rules that need no judge are
applied to the response and what is left is counted as unparsed.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, earned, rates, ratio
from mllm_jax.evaluation.benchmarks.base import BenchmarkError, Question
from mllm_jax.evaluation.benchmarks.judged import Case, Judged, JudgeTask, write_lines
from mllm_jax.evaluation.benchmarks.published import File, Published, Upload, lettered, value_of
from mllm_jax.evaluation.edit_distance import most_similar
from mllm_jax.evaluation.option_match import LETTERS
from mllm_jax.evaluation.predictions import PredictionError, Problems, as_text, match_ids, take

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


def normalize(extraction: Any, item: Mapping[str, Any], integers_by_float: bool = True) -> str | None:
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


def quick_extraction(response: str, item: Mapping[str, Any]) -> str | None:
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


def math_query(row: Mapping[str, Any], where: str) -> str:
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
        raise BenchmarkError(f"MathVista {where}: no hint for {row.get('question_type')!r} / {kind!r}")
    unit = f" (Unit: {row['unit']})" if row.get("unit") else ""
    choices = f"\nChoices:\n{lettered(row['choices'], '({}) {}')}" if row.get("choices") else ""
    return f"{HINTS[kind]}\nQuestion: {value_of(row, 'question', where)}{unit}{choices}"


def _judged(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Case]:
    """The responses that no rule can extract an answer from."""
    gold = None if annotations is None else MathVista.read_annotations(annotations)
    found = match_ids(
        MathVista.read_answers(predictions, problems),
        gold,
        MathVista.identifier(gold, predictions),
        lambda r: r.get("response", r.get("text")),
        problems,
    )
    for key, row in found.items():
        item, where = row if gold is None else MathVista.item(row, gold[key]), f"{predictions}: {key}"
        response = as_text(take(row, ("response", "text"), where)).strip()
        if quick_extraction(response, item) is None:
            query = as_text(item.get("query") or take(item, ("question",), where))
            yield str(key), {"query": query, "response": response}, {}


_EXTRACT = """Extract the final answer from a model's response. Reply with the answer alone: a letter for
multiple choice, otherwise a number or a Python list in the form that the hint asks for. Reply with nothing if
there is none.

Hint: an integer is required.
Question: How many blue boxes are there?
Response: Counting row by row I find 3 and 4, so 7 boxes in total.
Extracted answer: 7

Hint: a number with one decimal place is required.
Question: What is the mean of the bars?
Response: The mean is (1.0 + 1.8) / 2, that is 1.4 units.
Extracted answer: 1.4

Hint: the letter of an option is required.
Question: Which line is longest? Choices: (A) red (B) green
Response: The green line reaches furthest, hence (B).
Extracted answer: B

Hint: a Python list is required.
Question: Between which years did sales fall most?
Response: They fell most from 2005 to 2009.
Extracted answer: [2005, 2009]

{query}
Response: {response}
Extracted answer:"""


class MathVista(Published):
    """MathVista testmini; what no rule can extract from an answer is left to `mllm-jax judge mathvista`."""

    name = "mathvista"
    rule = "MathVista calculate_score.py"
    answers_format = "JSON lines {pid, question_type, answer_type, precision, choices, answer, extraction}"
    id_keys = ("pid", "question_id")
    keyed = True
    judge = (JudgeTask("mathvista", "gpt-4-0613", 0.0, 256, 8, "", _EXTRACT, _judged, str.strip),)
    upload = Upload("output.json", "MathVista's extract_answer.py")
    files: ClassVar = {
        "questions": File(
            ("testmini.json", "data/testmini-*.parquet"), "https://huggingface.co/datasets/AI4Math/MathVista"
        ),
        "images": File((".",), "https://huggingface.co/datasets/AI4Math/MathVista (images.zip)"),
    }
    _KEPT = ("question_type", "answer_type", "precision", "choices", "unit", "answer", "metadata", "question")

    def items(self) -> Iterator[Question]:
        for row in self.rows():
            number = str(row.get("pid") or value_of(row, "_id", self.path))
            row = {**row, "choices": list(row["choices"]) if row.get("choices") else None}
            query = math_query(row, number)
            yield self.question(
                number,
                query,
                (row.get("decoded_image") or value_of(row, "image", number),),
                str(value_of(row, "answer", number)),
                tuple(row["choices"] or ()),
                ability=str((row.get("metadata") or {}).get("task", "")),
                fields={"pid": number, "query": query},
                truth={"pid": number, **{key: row.get(key) for key in self._KEPT}, "query": query},
            )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        found = quick_extraction(text, question.row["truth"])
        return (found, "rule") if found else (None, "unparsed")

    @classmethod
    def store_judgements(
        cls, folder: Path, judged: Sequence[Judged], predictions: Path, annotations: Path | None
    ) -> tuple[Path, Path | None]:
        """The answers, with the judge's extraction where no rule makes one."""
        extracted = {request.question: {"extraction": reply["content"].strip()} for request, reply in judged}
        answers = cls.read_answers(predictions, Problems())
        rows = [row | extracted.get(str(take(row, cls.id_keys, str(predictions))), {}) for row in answers]
        return write_lines(folder / "extracted.jsonl", rows), annotations

    @classmethod
    def stored(cls, row: Mapping[str, Any], where: str) -> Any:
        extraction = row.get("extraction")
        if extraction is not None:
            return str(extraction) if isinstance(extraction, list) else extraction
        return row.get("response", row.get("text"))

    @classmethod
    def item(cls, row: Mapping[str, Any], annotation: Mapping[str, Any]) -> Mapping[str, Any]:
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
    def figures(cls, answers: Sequence[Answer], problems: Problems) -> dict[str, Any]:
        tables: dict[str, dict[str, list[int]]] = {}
        for name in ITEM_KEYS + METADATA_KEYS:
            cells = tables[name] = {}
            for answer in answers:
                item = answer.item
                value = item.get(name) if name in ITEM_KEYS else (item.get("metadata") or {}).get(name)
                for one in value if isinstance(value, list) else [value]:
                    if one is not None:
                        cell = cells.setdefault(as_text(one), [0, 0])
                        cell[0] += answer.credit
                        cell[1] += 1
        breakdown = {
            name: {k: {"accuracy": ratio(r, n), "correct": r, "total": n} for k, (r, n) in sorted(t.items())}
            for name, t in tables.items()
        }
        return {
            "subtasks": rates(tables["task"]),
            "correct": earned(answers),
            "without_extraction": sum(answer.notes["without"] for answer in answers),
            "correct_with_integers_read_as_in_the_2023_table": sum(a.notes["in 2023"] for a in answers),
            "breakdown": breakdown,
        }

    def submission(self, rows: Sequence[Mapping[str, Any]]) -> Any:
        """The official output file: problem id -> the problem with `query` and `response`."""
        return {row["pid"]: {**row["truth"], "query": row["query"], "response": row["text"]} for row in rows}
