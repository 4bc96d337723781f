"""MMBench, English and Chinese, read from the official TSV with its base64 pictures."""

from collections.abc import Iterator, Mapping
from typing import ClassVar

from mllm_jax.evaluation.benchmarks.mmbench import ROTATION, options_of
from mllm_jax.evaluation.option_match import infer_option
from mllm_jax.evaluation.runners.base import BenchmarkError, Question
from mllm_jax.evaluation.runners.published import LETTER, File, Item, Option, Published, lettered, value_of
from mllm_jax.evaluation.table_files import is_absent

SITE = "https://download.openmmlab.com/mmclassification/datasets/mmbench"
# What LLaVA's conversion leaves out of an upload.
NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
_SHORTEST_PICTURE = 64  # characters; shorter cells name the row that holds the picture


class MmBench(Published):
    """MMBench: rotations of a question share `index % 1_000_000`."""

    kind = "mmbench"
    options: ClassVar = {
        "rounds": Option(
            "circular", "every row of the file, or (vanilla) each question once", ("circular", "vanilla")
        ),
    }
    files: ClassVar = {
        "questions": File(
            ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "mmbench_test_en_20231003.tsv"),
            f"{SITE}/mmbench_dev_20230712.tsv",
        )
    }
    instruction: ClassVar[str] = LETTER

    def items(self) -> Iterator[Item]:
        rows = self.rows()
        pictures: dict[str, str] = {}
        for row in rows:
            for name in ("index", "question", "image", "A"):
                value_of(row, name, str(self.path))
            if len(row["image"]) > _SHORTEST_PICTURE:
                pictures[row["index"]] = self.pictures.add_base64(row.pop("image"))
        for position, row in enumerate(rows):
            index = int(row["index"])
            if self.values["rounds"] == "vanilla" and index >= ROTATION:
                continue
            image = pictures.get(row["index"]) or pictures.get(row.get("image", ""))
            if image is None:
                raise BenchmarkError(f"{self.path}: index {index} has no picture; fetch the file again")
            yield self._item(row, index, image, position)

    def _item(self, row: Mapping[str, str], index: int, image: str, position: int) -> Item:
        choices = options_of(row)
        hint = "" if is_absent(row.get("hint")) else f"{row['hint']}\n"
        answer = None if is_absent(row.get("answer")) else row["answer"]
        known = {key: row[key] for key in ("category", "l2-category") if not is_absent(row.get(key))}
        return Item(
            index,
            f"{hint}{row['question']}\n{lettered(list(choices.values()))}\n{self.instruction}",
            (image,),
            answer,
            tuple(choices),
            ability=known.get("category", ""),
            kept={
                "position": position,
                "columns": {key: cell for key, cell in row.items() if key not in NOT_UPLOADED},
            },
            truth={**choices, **known, "answer": answer},
        )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        truth = question.row["truth"]
        letter = infer_option(text, {letter: truth[letter] for letter in question.options})
        return (letter, "letter or option text") if letter in question.options else (None, "unparsed")


class MmBenchCn(MmBench):
    """MMBench-CN: Chinese questions, options and instruction."""

    kind = "mmbench_cn"
    home = "mmbench"
    grouping = "mmbench"
    files: ClassVar = {
        "questions": File(
            ("mmbench_dev_cn_20231003.tsv", "mmbench_test_cn_20231003.tsv"),
            f"{SITE}/mmbench_dev_cn_20231003.tsv",
        )
    }
    instruction = "请直接回答选项字母。"
