"""Questions with free answers: MM-Vet, LLaVA-Bench (both judged by a GPT model) and MathVista."""

from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.mathvista import normalize, quick_extraction
from mllm_jax.evaluation.runners.base import BenchmarkError, Question
from mllm_jax.evaluation.runners.published import File, Item, Published, lettered, value_of

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


class MmVet(Published):
    """MM-Vet: the question alone. Graded by `mllm-jax judge mm_vet`."""

    kind = "mm_vet"
    judged = True
    _ZIP = "https://github.com/yuweihao/MM-Vet/releases/download/v1/mm-vet.zip"
    files: ClassVar = {"questions": File(("mm-vet.json",), _ZIP), "images": File(("images",), _ZIP)}

    def items(self) -> Iterator[Item]:
        for row in self.rows():
            name = str(row["_id"])
            if not name.startswith("v1_"):
                raise BenchmarkError(f"{self.path}: id {name!r} does not begin with 'v1_'")
            image = value_of(row, "imagename", name)
            yield Item(name.removeprefix("v1_"), str(value_of(row, "question", name)), (image,))


class LlavaBench(Published):
    """LLaVA-Bench in the wild: the question alone. Reviewed by `mllm-jax judge llava_bench`."""

    kind = "llava_bench"
    judged = True
    _HUB = "https://huggingface.co/datasets/liuhaotian/llava-bench-in-the-wild"
    files: ClassVar = {"questions": File(("questions.jsonl",), _HUB), "images": File(("images",), _HUB)}

    def items(self) -> Iterator[Item]:
        for row in self.rows():
            number = value_of(row, "question_id", str(self.path))
            kept = {"category": row.get("category", "")}
            image = value_of(row, "image", f"question {number}")
            yield Item(number, str(value_of(row, "text", f"question {number}")), (image,), kept=kept)


class MathVista(Published):
    """MathVista testmini; what no rule can extract from an answer is left to `mllm-jax judge mathvista`."""

    kind = "mathvista"
    files: ClassVar = {
        "questions": File(
            ("testmini.json", "data/testmini-*.parquet"), "https://huggingface.co/datasets/AI4Math/MathVista"
        ),
        "images": File((".",), "https://huggingface.co/datasets/AI4Math/MathVista (images.zip)"),
    }
    _KEPT = ("question_type", "answer_type", "precision", "choices", "unit", "answer", "metadata", "question")

    def items(self) -> Iterator[Item]:
        for row in self.rows():
            number = str(row.get("pid") or value_of(row, "_id", str(self.path)))
            row = {**row, "choices": list(row["choices"]) if row.get("choices") else None}
            query = math_query(row, number)
            answer = str(value_of(row, "answer", number))
            truth = {"pid": number, **{key: row.get(key) for key in self._KEPT}, "query": query}
            yield Item(
                number,
                query,
                (row.get("decoded_image") or value_of(row, "image", number),),
                answer,
                tuple(row["choices"] or ()),
                ability=str((row.get("metadata") or {}).get("task", "")),
                kept={"pid": number, "query": query},
                truth=truth,
            )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        found = quick_extraction(text, question.row["truth"])
        return (found, "rule") if found else (None, "unparsed")

    def is_right(self, row: dict[str, Any]) -> bool:
        return row["parsed"] is not None and normalize(row["parsed"], row["truth"]) == row["gold"]


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
