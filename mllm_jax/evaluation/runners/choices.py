"""Multiple choice with letters: SEED-Bench, ScienceQA, Q-Bench, BLINK."""

import re
from collections.abc import Iterator, Mapping
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks.scienceqa import parse_letter
from mllm_jax.evaluation.benchmarks.seed_bench import DIMENSIONS
from mllm_jax.evaluation.option_match import LETTERS, match_option
from mllm_jax.evaluation.runners.base import BenchmarkError, Question
from mllm_jax.evaluation.runners.published import (
    LETTER,
    LONG_TOKENS,
    SHORT_TOKENS,
    File,
    Item,
    Option,
    Published,
    lettered,
    value_of,
)

Q_BENCH = "https://huggingface.co/datasets/nanyangtu/LLVisionQA-QBench"
SCIENCEQA = (
    "the folder data/scienceqa of https://github.com/lupantech/ScienceQA (pictures by its tools/download.sh)"
)


class SeedBench(Published):
    """SEED-Bench-1, the nine dimensions about single images; the video questions are left out."""

    kind = "seed_bench"
    max_new_tokens = SHORT_TOKENS
    files: ClassVar = {
        "questions": File(
            ("SEED-Bench.json", "llava-seed-bench.jsonl"),
            "https://huggingface.co/datasets/AILab-CVC/SEED-Bench",
        ),
        "images": File(("SEED-Bench-image",), "https://huggingface.co/datasets/AILab-CVC/SEED-Bench"),
    }

    def items(self) -> Iterator[Item]:
        for row in self.rows("questions", "questions"):
            number = str(value_of(row, "question_id", str(self.path)))
            if row.get("data_type", "video" if number.startswith("v") else "image") != "image":
                continue
            if "text" in row:  # LLaVA's file has no answers
                yield Item(number, row["text"], (row["image"].split("/")[-1],), options=tuple("ABCD"))
                continue
            choices = [value_of(row, f"choice_{letter}", f"question {number}") for letter in "abcd"]
            kept = {key: row[key] for key in ("question_type_id", "data_type") if key in row}
            answer = value_of(row, "answer", f"question {number}")
            yield Item(
                number,
                f"{row['question']}\n{lettered(choices)}\n{LETTER}",
                (str(value_of(row, "data_id", f"question {number}")),),
                answer,
                tuple("ABCD"),
                ability=DIMENSIONS[int(row["question_type_id"])] if "question_type_id" in row else "",
                kept=kept,
                truth=kept | {"answer": answer},
            )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        return (text, "letter") if text in question.options else (None, "unparsed")


class ScienceQa(Published):
    """ScienceQA test: all questions, or those with a picture (IMG)."""

    kind = "scienceqa"
    options: ClassVar = {"part": Option("all", "all questions, or those with a picture", ("all", "img"))}
    files: ClassVar = {
        "questions": File(("problems.json",), SCIENCEQA),
        "splits": File(("pid_splits.json",), SCIENCEQA),
        "images": File(("images/test", "test", "images"), SCIENCEQA),
    }

    def items(self) -> Iterator[Item]:
        problems = {row["_id"]: row for row in self.rows()}
        for number in self.split("test"):
            if number not in problems:
                raise BenchmarkError(f"scienceqa: {self.path}: problem {number} of the test split is missing")
            row = problems[number]
            if self.values["part"] == "img" and not row.get("image"):
                continue
            choices = list(map(str, row["choices"]))
            answer = LETTERS[int(value_of(row, "answer", f"problem {number}"))]
            hint = str(row.get("hint") or "").strip()
            subject = str(row.get("subject") or "")
            truth = {"answer": answer, "n_choices": len(choices), "has_image": bool(row.get("image"))}
            yield Item(
                number,
                f"{f'Context: {hint}{chr(10)}' if hint else ''}{row['question']}\n{lettered(choices)}\n{LETTER}",
                (f"{number}/{row['image']}",) if row.get("image") else (),
                answer,
                tuple(LETTERS[: len(choices)]),
                ability=subject,
                truth=truth | {"subject": subject},
            )

    def split(self, name: str) -> list[str]:
        """Ids of a split, in the official order."""
        from mllm_jax.evaluation.runners.tables import read_json

        (path,) = self.paths("splits")
        self.files_read.append(path)
        splits = read_json(path)
        if not isinstance(splits, dict) or not isinstance(splits.get(name), list):
            raise BenchmarkError(f"{path}: holds no list of the ids of {name!r}")
        return list(map(str, splits[name]))

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        letter = parse_letter(text)
        return letter, "unparsed" if letter is None else "letter"


class QBench(Published):
    """Q-Bench A1, English; the test answers are not public."""

    kind = "q_bench"
    options: ClassVar = {"split": Option("dev", "which questions", ("dev", "test"))}
    files: ClassVar = {
        "questions": File(("llvisionqa_{split}.json",), Q_BENCH),
        "images": File(("images_llvisionqa", "images_llviqionqa"), Q_BENCH),
    }
    instruction: ClassVar[str] = "\nChoose between one of the options as follows:\n"

    def items(self) -> Iterator[Item]:
        for index, row in enumerate(self.rows()):
            where = f"{self.path}: entry #{index}"
            candidates = [str(c) for c in value_of(row, "candidates", where)]
            gold = row.get("correct_ans")
            letter = None if gold is None else LETTERS[_place(str(gold), candidates, where)]
            kept = {key: value for key, value in row.items() if key not in ("response", "correct_ans")}
            yield Item(
                index,
                f"{value_of(row, 'question', where)}{self.instruction}{lettered(candidates)}\n",
                (value_of(row, "img_path", where),),
                letter,
                tuple(LETTERS[: len(candidates)]),
                kept=kept,
                truth=kept | ({} if gold is None else {"correct_ans": gold}),
            )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        choice, how = match_option(text, [str(c).strip() for c in question.row["candidates"]])
        return None if choice is None else LETTERS[choice], how


class QBenchZh(QBench):
    """Q-Bench A1, Chinese."""

    kind = "q_bench_zh"
    home = "q_bench"
    options: ClassVar = QBench.options | {
        # Upstream's string reads "\在下列..." instead of a line break and the sentence.
        "backslash": Option(True, "upstream's prompt with its stray backslash; false: a line break"),
    }
    files: ClassVar = QBench.files | {
        "questions": File(("质衡-问答-{split_zh}.json", "llvisionqa_zh_{split}.json"), Q_BENCH)
    }

    @classmethod
    def read_options(cls, given: Mapping[str, bool | str]) -> dict[str, bool | str]:
        values = super().read_options(given)
        return values | {"split_zh": {"dev": "验证集", "test": "测试集"}[str(values["split"])]}

    @property
    def instruction(self) -> str:
        return f"{chr(92) if self.values['backslash'] else chr(10)}在下列选项中选择一个:\n"


class Blink(Published):
    """BLINK validation: up to four pictures, options as "(A)"."""

    kind = "blink"
    max_new_tokens = LONG_TOKENS
    options: ClassVar = {
        # The data set's own `prompt` lists the options. Upstream lets a GPT model read the letter from free answers;
        # the usual instruction makes that needless.
        "instruction": Option(True, "append the usual request for a letter to the data set's prompt"),
    }
    files: ClassVar = {
        "questions": File(("*/val-*.parquet",), "https://huggingface.co/datasets/BLINK-Benchmark/BLINK")
    }

    def items(self) -> Iterator[Item]:
        for row in self.rows():
            number = str(value_of(row, "idx", str(self.folder)))
            letters = tuple(f"({letter})" for letter in LETTERS[: len(value_of(row, "choices", number))])
            gold = value_of(row, "answer", number)
            images = tuple(row[f"image_{i}"] for i in range(1, 5) if row.get(f"image_{i}") is not None)
            suffix = f"\n{LETTER}" if self.values["instruction"] else ""
            prompt = f"{str(value_of(row, 'prompt', number)).rstrip()}{suffix}"
            task = number.split("_", 1)[1].rsplit("_", 1)[0]
            yield Item(
                number,
                prompt,
                images,
                gold,
                letters,
                ability=task,
                kept={"id": number},
                truth={"id": number, "answer": gold},
            )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        """The one letter that the answer is, starts with, or has in parentheses."""
        first = re.match(r"\(?([A-D])\)?(?![A-Za-z'’])", text.strip())
        named = {first[1]} if first else set(re.findall(r"\(([A-D])\)", text))
        found = [letter for letter in question.options if letter[1] in named]
        return (found[0], "letter") if len(found) == 1 else (None, "unparsed")

    def final(self, question: Question, text: str, parsed: str | None) -> dict[str, Any]:
        return {"prediction": parsed or text}


def _place(answer: str, candidates: list[str], where: str) -> int:
    plain = [candidate.strip() for candidate in candidates]
    if answer.strip() in plain:
        return plain.index(answer.strip())
    if len(answer.strip()) == 1 and answer.strip() in LETTERS[: len(candidates)]:
        return LETTERS.index(answer.strip())
    raise BenchmarkError(f"{where}: the right answer {answer!r} is none of {candidates}")
