"""Questions with a short answer: VQAv2, OK-VQA, VizWiz, TextVQA, GQA, ChartQA.

Question, instruction, one picture; most are scored against the answers of ten people. LLaVA's question files (whole
prompts under `text`) are read as well as the official ones.
"""

from collections import defaultdict, deque
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mllm_jax.evaluation.runners.base import BenchmarkError
from mllm_jax.evaluation.runners.published import (
    LONG_TOKENS,
    SHORT,
    SHORT_TOKENS,
    File,
    Item,
    Option,
    Published,
    coco_file,
    value_of,
)

UNANSWERABLE = "When the provided information is insufficient, respond with 'Unanswerable'."
COCO = "https://cocodataset.org/#download"
VQA = "https://visualqa.org/download.html"
OK_VQA = "https://okvqa.allenai.org/download.html"
VIZWIZ = "https://vizwiz.org/tasks-and-datasets/vqa/"
GQA = "https://cs.stanford.edu/people/dorarad/gqa/download.html"


class ShortAnswer(Published):
    """A question and the request for a word or phrase.

    Attributes:
      suffix: behind the question.
    """

    max_new_tokens = SHORT_TOKENS
    suffix: ClassVar[str] = f"\n{SHORT}"

    def prompt(self, row: Mapping[str, Any]) -> str:
        """The whole prompt of a row; LLaVA's files hold it under `text`."""
        if "text" in row:
            return str(row["text"])
        return f"{value_of(row, ('question', 'query'), str(self.path))}{self.suffix}"


class VqaV2(ShortAnswer):
    """VQA v2: scored on val2014; answers to test-dev2015 and test2015 are uploaded."""

    kind = "vqav2"
    options: ClassVar = {
        "split": Option("val2014", "which questions", ("val2014", "test-dev2015", "test2015")),
    }
    files: ClassVar = {
        "questions": File(
            ("v2_OpenEnded_mscoco_{split}_questions.json", "llava_vqav2_mscoco_{split}.jsonl"), VQA
        ),
        "annotations": File(("v2_mscoco_{split}_annotations.json",), VQA, needed=False),
        # An upload covers all of test2015, also where only test-dev2015 was asked.
        "upload_ids": File(
            ("v2_OpenEnded_mscoco_test2015_questions.json", "llava_vqav2_mscoco_test2015.jsonl"),
            VQA,
            needed=False,
        ),
        "images": File(("{split}", "test2015"), COCO),
    }

    def items(self) -> Iterator[Item]:
        split = str(self.values["split"])
        pictures = split if split == "val2014" else "test2015"
        truths = {str(row["question_id"]): row for row in self.rows("annotations", "annotations")}
        for row in self.rows("questions", "questions"):
            number = value_of(row, "question_id", str(self.path))
            truth = truths.get(str(number))
            if truths and truth is None:
                raise BenchmarkError(f"{self.kind}: {self.folder}: question {number} has no annotation")
            image = row.get("image") or coco_file(value_of(row, "image_id", str(self.path)), pictures)
            yield Item(number, self.prompt(row), (image,), **_ten_answers(truth))


class OkVqa(VqaV2):
    """OK-VQA validation, in VQA's file format."""

    kind = "ok_vqa"
    max_new_tokens = LONG_TOKENS  # lmms-eval's default
    options: ClassVar = {
        "split": Option("val2014", "which questions", ("val2014",)),
        # LLaVA has no OK-VQA script; lmms-eval's prompt is the default, other work questions like VQAv2.
        "prompt": Option("lmms", "with lmms-eval's sentence on unanswerable questions", ("lmms", "short")),
    }
    files: ClassVar = {
        "questions": File(("OpenEnded_mscoco_{split}_questions.json",), OK_VQA),
        "annotations": File(("mscoco_{split}_annotations.json",), OK_VQA, needed=False),
        "images": File(("{split}",), COCO),
    }

    def prompt(self, row: Mapping[str, Any]) -> str:
        question = value_of(row, "question", str(self.path))
        return (
            f"{question}\n{UNANSWERABLE}\n{SHORT}" if self.values["prompt"] == "lmms" else super().prompt(row)
        )


class VizWiz(ShortAnswer):
    """VizWiz: scored on val; answers to test are uploaded."""

    kind = "vizwiz"
    options: ClassVar = {
        "split": Option("val", "which questions", ("val", "test")),
        "capitalize": Option(
            False, "lmms-eval's form: first letter of the question upper case, the rest lower"
        ),
    }
    files: ClassVar = {
        "questions": File(("{split}.json", "Annotations/{split}.json", "llava_{split}.jsonl"), VIZWIZ),
        "images": File(("{split}",), VIZWIZ),
    }
    suffix = f"\n{UNANSWERABLE}\n{SHORT}"

    def prompt(self, row: Mapping[str, Any]) -> str:
        if self.values["capitalize"] and "question" in row:
            row = {**row, "question": row["question"].capitalize()}
        return super().prompt(row)

    def items(self) -> Iterator[Item]:
        for row in self.rows():
            image = value_of(row, "image", str(self.path))
            answers = _ten_answers(row if row.get("answers") else None)
            if answers:
                answers["truth"] |= {"image": image}
            kept = {"image": image}
            yield Item(row.get("question_id", image), self.prompt(row), (image,), kept=kept, **answers)


class TextVqa(ShortAnswer):
    """TextVQA validation as LLaVA questions it: with the OCR tokens of its question file, or without them."""

    kind = "textvqa"
    options: ClassVar = {
        "ocr": Option(True, "whether the prompt lists OCR tokens, as in LLaVA's question file")
    }
    files: ClassVar = {
        "questions": File(
            ("llava_textvqa_val_v051_ocr.jsonl",),
            "eval.zip of LLaVA's docs/Evaluation.md (or give ocr=false)",
        ),
        "annotations": File(
            ("TextVQA_0.5.1_val.json",), "https://dl.fbaipublicfiles.com/textvqa/data/TextVQA_0.5.1_val.json"
        ),
        "images": File(
            ("train_images",), "https://dl.fbaipublicfiles.com/textvqa/images/train_val_images.zip"
        ),
    }

    def items(self) -> Iterator[Item]:
        truths: dict[tuple[str, str], deque[dict[str, Any]]] = defaultdict(deque)
        annotations = self.rows("annotations", "data")
        for row in annotations:
            truths[row["image_id"], row["question"].lower()].append(row)
        if not self.values["ocr"]:
            for row in annotations:
                yield self._item(
                    row, f"{row['question'].capitalize()}{self.suffix}", f"{row['image_id']}.jpg"
                )
            return
        for row in self.rows():
            # LLaVA writes the picture's id as question_id, so that questions are found by their words.
            text, image = (
                str(value_of(row, "text", str(self.path))),
                str(value_of(row, "image", str(self.path))),
            )
            found = truths[str(row["question_id"]), text.split("\n")[0].lower()]
            if not found:
                raise BenchmarkError(
                    f"textvqa: {self.path}: question {text.split(chr(10))[0]!r} about {row['question_id']} is not in "
                    "the annotations"
                )
            yield self._item(found.popleft(), text, image)

    def _item(self, row: Mapping[str, Any], prompt: str, image: str) -> Item:
        truth = {key: row[key] for key in ("image_id", "question")} | {"answers": row.get("answers")}
        gold = list(row["answers"]) if row.get("answers") else None
        kept = {"image_id": row["image_id"]}
        return Item(row["question_id"], prompt, (image,), gold, kept=kept, truth=truth)


class Gqa(ShortAnswer):
    """GQA test-dev, balanced questions."""

    kind = "gqa"
    files: ClassVar = {
        "questions": File(
            ("testdev_balanced_questions.json", "questions1.2/testdev_balanced_questions.json"), GQA
        ),
        "images": File(("images",), GQA),
    }

    def items(self) -> Iterator[Item]:
        for row in self.rows():
            if row.get("isBalanced", True):
                types = row.get("types") or {}
                truth = {"answer": row.get("answer"), "types": types}
                image = f"{value_of(row, 'imageId', str(self.path))}.jpg"
                ability = types.get("structural", "")
                yield Item(
                    row["_id"], self.prompt(row), (image,), row.get("answer"), ability=ability, truth=truth
                )


class ChartQa(ShortAnswer):
    """ChartQA test, human-written and machine-made questions apart."""

    kind = "chartqa"
    max_new_tokens = 16  # lmms-eval
    files: ClassVar = {
        "questions": File(
            ("test/test_*.json", "data/test-*.parquet"),
            "https://huggingface.co/datasets/ahmed-masry/ChartQA (the original files) or "
            "https://huggingface.co/datasets/lmms-lab/ChartQA (Parquet)",
        ),
        "images": File(("test/png",), "https://huggingface.co/datasets/ahmed-masry/ChartQA"),
    }

    def items(self) -> Iterator[Item]:
        counts: dict[str, int] = defaultdict(int)
        for path in self.paths("questions"):
            for row in self.read_table(path):
                # test_human.json and test_augmented.json, or human_test and augmented_test in a column.
                split = str(row.get("type") or path.stem).replace("test", "").strip("_")
                counts[split] += 1
                gold = str(value_of(row, ("label", "answer"), str(path)))
                image = value_of(row, ("imgname", "image"), str(path))
                yield Item(
                    f"{split}_{counts[split]}",
                    self.prompt(row),
                    (image,),
                    gold,
                    ability=split,
                    truth={"target": gold, "split": split},
                )


def _ten_answers(row: Mapping[str, Any] | None) -> dict[str, Any]:
    """What an annotation in VQA's format says; {} where the answers are not public."""
    if row is None:
        return {}
    said = [answer["answer"] if isinstance(answer, dict) else str(answer) for answer in row["answers"]]
    truth = {"answers": [{"answer": answer} for answer in said]}
    truth |= {key: row[key] for key in ("answer_type", "question_type") if key in row}
    return {"gold": said, "truth": truth, "ability": str(row.get("answer_type", ""))}
