"""What questions with a short answer have in common: question, instruction, one image.

LLaVA's question files (whole prompts under `text`) are read as well as the official ones.
"""

from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.published import SHORT, SHORT_TOKENS, Published
from mllm_jax.evaluation.benchmarks.question_files import FileRow
from mllm_jax.evaluation.predictions import Row

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."


class ShortAnswer(Published):
    """A question and the request for a word or phrase.

    Attributes:
      suffix: behind the question.
    """

    max_new_tokens = SHORT_TOKENS
    suffix: ClassVar[str] = f"\n{SHORT}"

    def prompt(self, row: FileRow) -> str:
        """The whole prompt of a row; LLaVA's files hold it under `text`."""
        if "text" in row:
            return str(row["text"])
        return f"{row.first('question', 'query')}{self.suffix}"


def ten_answers(row: Row | None) -> dict[str, Any]:
    """What an annotation in VQA's format says of a question; {} where the answers are not public."""
    if row is None:
        return {}
    said = [answer["answer"] if isinstance(answer, dict) else str(answer) for answer in row["answers"]]
    truth = {"answers": [{"answer": answer} for answer in said]}
    truth |= {key: row[key] for key in ("answer_type", "question_type") if key in row}
    return {"gold": said, "truth": truth, "ability": str(row.get("answer_type", ""))}
