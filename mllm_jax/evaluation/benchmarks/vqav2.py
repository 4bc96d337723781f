"""VQA v2 (Goyal et al. 2017), and OK-VQA (Marino et al. 2019), whose files have the same format.

Follows the official `vqaEval.py`. Its oddity is kept, the published numbers have it: neither side is
normalised where the ten human answers are all identical. `score_always_normalised` shows what that is
worth.
"""

from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation import vqa_normalize
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import LONG_TOKENS, SHORT, File, Option, Upload
from mllm_jax.evaluation.benchmarks.question_files import FileRow, read_rows
from mllm_jax.evaluation.benchmarks.short_answer import UNANSWERABLE, ShortAnswer, ten_answers
from mllm_jax.evaluation.predictions import BenchmarkError, Row, as_text, take
from mllm_jax.evaluation.vqa_normalize import m4c_normalize, soft_accuracy

COCO = "https://cocodataset.org/#download"
VQA = "https://visualqa.org/download.html"
OK_VQA = "https://okvqa.allenai.org/download.html"
SPLITS = ("val2014", "test-dev2015", "test2015")
QUESTIONS = ("v2_OpenEnded_mscoco_{split}_questions.json", "llava_vqav2_mscoco_{split}.jsonl")
_DECIMALS = 10  # of the official printout


def normalize(text: str) -> str:
    """The server's normalisation: punctuation, then number words, articles and contractions."""
    return vqa_normalize.vqa_digits_articles(vqa_normalize.vqa_punctuation(text))


def _flat(text: str) -> str:
    return text.replace("\n", " ").replace("\t", " ").strip()


def score_question(text: str, answers: Sequence[str]) -> float:
    """Official soft accuracy of one answer, a fraction.

    Example:
        >>> score_question("The dog.", ["dog"] * 9 + ["puppy"]), score_question("The dog.", ["dog"] * 10)
        (1.0, 0.0)
    """
    text, human = _flat(text), [_flat(answer) for answer in answers]
    if len(set(human)) > 1:
        text, human = normalize(text), [normalize(answer) for answer in human]
    return soft_accuracy(text, human)


def _percent(mean: float) -> float:
    return round(100 * mean, _DECIMALS)


def coco_file(image_id: int | str, split: str) -> str:
    """The file name of a COCO image.

    Example:
        >>> coco_file(42, "val2014"), coco_file(42, "val2017")
        ('COCO_val2014_000000000042.jpg', '000000000042.jpg')
    """
    prefix = "" if split == "val2017" else f"COCO_{split}_"
    return f"{prefix}{int(image_id):012d}.jpg"


class VqaV2(ShortAnswer):
    """VQA v2: scored on val2014; answers to test-dev2015 and test2015 are uploaded."""

    name = "vqav2"
    unit = "percent"
    rule = "GT-Vision-Lab VQA vqaEval.py"
    answers_format = "JSON array {question_id, answer} (the upload), or LLaVA JSON lines {question_id, text}"
    annotations_format = "the official annotations JSON (ten answers per question)"
    id_keys = ("question_id",)
    text_keys = ("answer", "text")
    rows_key = "annotations"
    in_annotation_order = True
    upload = Upload("{name}.json", "https://eval.ai/web/challenges/challenge-page/830")
    options: ClassVar = {"split": Option("val2014", "which questions", SPLITS)}
    files: ClassVar = {
        "questions": File(QUESTIONS, VQA),
        "annotations": File(("v2_mscoco_{split}_annotations.json",), VQA, needed=False),
        # An upload covers all of test2015, also where only test-dev2015 was asked.
        "upload_ids": File(tuple(name.format(split="test2015") for name in QUESTIONS), VQA, needed=False),
        "images": File(("{split}", "test2015"), COCO),
    }

    def items(self) -> Iterator[Question]:
        split = str(self.values["split"])
        images = split if split == "val2014" else "test2015"
        truths = {str(row["question_id"]): row for row in self.rows("annotations", "annotations")}
        for row in self.rows("questions", "questions"):
            truth = truths.get(str(row["question_id"]))
            if truths and truth is None:
                raise BenchmarkError(f"{row.where} has no annotation in {self.paths('annotations')[0]}")
            image = row.get("image") or coco_file(row["image_id"], images)
            yield self.question(row["question_id"], self.prompt(row), (image,), **ten_answers(truth))

    @classmethod
    def grade(cls, answer: Answer) -> None:
        human = [as_text(take(a, ("answer",), answer.where)) for a in answer.value("answers")]
        answer.credit = score_question(answer.text, human)
        always = soft_accuracy(normalize(_flat(answer.text)), [normalize(_flat(h)) for h in human])
        answer.notes = {"normalised": always}
        answer.notes |= {f: as_text(answer.item.get(f, "all")) for f in ("answer_type", "question_type")}

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        kinds, types = (answers.rates(field) for field in ("answer_type", "question_type"))
        return {
            "score": _percent(answers.mean()),
            "subtasks": {kind: _percent(mean) for kind, mean in kinds.items()},
            "per_question_type": {kind: _percent(mean) for kind, mean in types.items()},
            "score_always_normalised": _percent(answers.mean("normalised")),
        }

    def submission(self, rows: Sequence[Row]) -> Any:
        """Every question of test2015 (of the asked split where it is val), the empty answer where none was made."""
        said = {str(row["question_id"]): m4c_normalize(row["text"]) for row in rows}
        ids: list[Any] = [row["question_id"] for row in rows]
        if self.values["split"] != "val2014":
            everything = self.paths("upload_ids")
            if not everything:
                file = self.files["upload_ids"]
                raise BenchmarkError(
                    f"{self.folder / file.names[0]} is missing: an upload needs every id of test2015; download it "
                    f"from {file.where}, then run the same command"
                )
            ids = [row["question_id"] for row in read_rows(everything[0], self.embedded, "questions")]
            if unknown := said.keys() - {str(i) for i in ids}:
                raise BenchmarkError(f"{everything[0]} does not hold question {sorted(unknown)[0]}")
        return [{"question_id": number, "answer": said.get(str(number), "")} for number in ids]


class OkVqa(VqaV2):
    """OK-VQA validation, in VQA's file format."""

    name = "ok_vqa"
    rule = "VQA vqaEval.py on OK-VQA's annotations"
    max_new_tokens = LONG_TOKENS  # lmms-eval's default
    upload = Upload("answers.json", "VQA's evaluation tools")
    options: ClassVar = {
        "split": Option("val2014", "which questions", ("val2014",)),
        # LLaVA has no OK-VQA script; lmms-eval's prompt is the default, other work asks like VQAv2.
        "prompt": Option("lmms", "with lmms-eval's sentence on unanswerable questions", ("lmms", "short")),
    }
    files: ClassVar = {
        "questions": File(("OpenEnded_mscoco_{split}_questions.json",), OK_VQA),
        "annotations": File(("mscoco_{split}_annotations.json",), OK_VQA, needed=False),
        "images": File(("{split}",), COCO),
    }

    def prompt(self, row: FileRow) -> str:
        lmms = f"{row['question']}\n{UNANSWERABLE}\n{SHORT}"
        return lmms if self.values["prompt"] == "lmms" else super().prompt(row)
