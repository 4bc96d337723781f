"""VizWiz VQA (Gurari et al. 2018): soft accuracy, both sides fully normalised (lmms-eval)."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import SHORT, File, Option, Upload
from mllm_jax.evaluation.benchmarks.question_files import FileRow
from mllm_jax.evaluation.benchmarks.short_answer import UNANSWERABLE, ShortAnswer, ten_answers
from mllm_jax.evaluation.predictions import Row, as_text, by_id, read_annotation_rows, take
from mllm_jax.evaluation.vqa_normalize import m4c_normalize, soft_accuracy
from mllm_jax.storage import Path

_SITE = "https://vizwiz.org/tasks-and-datasets/vqa/"


class VizWiz(ShortAnswer):
    """VizWiz: scored on val; answers to test are uploaded."""

    name = "vizwiz"
    unit = "percent"
    rule = "lmms-eval vizwiz_vqa"
    answers_format = "JSON array {image, answer} (the upload), or LLaVA JSON lines {question_id, text}"
    annotations_format = "val.json: rows {image, answers, answer_type}, for LLaVA's files also question_id"
    text_keys = ("answer", "text")
    upload = Upload("{name}.json", "https://eval.ai/web/challenges/challenge-page/1911")
    options: ClassVar = {
        "split": Option("val", "which questions", ("val", "test")),
        "capitalize": Option(False, "lmms-eval's form: only the question's first letter upper case"),
    }
    files: ClassVar = {
        "questions": File(("{split}.json", "Annotations/{split}.json", "llava_{split}.jsonl"), _SITE),
        "images": File(("{split}",), _SITE),
    }
    suffix = f"\n{UNANSWERABLE}\n{SHORT}"

    def prompt(self, row: FileRow) -> str:
        if self.values["capitalize"] and "question" in row:
            row["question"] = row["question"].capitalize()
        return super().prompt(row)

    def items(self) -> Iterator[Question]:
        for row in self.rows():
            image = row["image"]
            answers = ten_answers(row if row.get("answers") else None)
            if answers:
                answers["truth"] |= {"image": image}
            number = row.get("question_id", image)
            yield self.question(number, self.prompt(row), (image,), fields={"image": image}, **answers)

    @classmethod
    def read_annotations(cls, path: Path) -> dict[str, Row]:
        return by_id(read_annotation_rows(path), ("image", "question_id"), path)

    @classmethod
    def identifier(cls, gold: Any, path: Path) -> Callable[[Row], str]:
        image_of = {str(i["question_id"]): key for key, i in (gold or {}).items() if "question_id" in i}

        def identify(row: Row) -> str:
            key = str(take(row, ("image", "question_id"), str(path)))
            return image_of.get(key, key)

        return identify

    @classmethod
    def grade(cls, answer: Answer) -> None:
        answers = (a["answer"] if isinstance(a, dict) else a for a in answer.value("answers"))
        said = m4c_normalize(answer.text)
        answer.credit = soft_accuracy(said, [m4c_normalize(as_text(one)) for one in answers])
        answer.part = as_text(answer.item.get("answer_type", "all"))
        answer.notes["unanswerable"] = said == "unanswerable"

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        return {"said_unanswerable": answers.total("unanswerable")}

    def submission(self, rows: Sequence[Row]) -> Any:
        return [{"image": row["image"], "answer": m4c_normalize(row["text"])} for row in rows]
