"""Questions answered with yes or no: POPE and MME."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import ClassVar

from mllm_jax import files
from mllm_jax.data.reading import read_text
from mllm_jax.evaluation.benchmarks.mme import TASKS, YES_NO_SUFFIX, parse_yes_no
from mllm_jax.evaluation.benchmarks.pope import parse_llava, says_neither
from mllm_jax.evaluation.runners.base import BenchmarkError, Question
from mllm_jax.evaluation.runners.published import SHORT, SHORT_TOKENS, File, Item, Published, value_of

ANSWERS = ("Yes", "No")
# In the order and with the first ids (less one) of LLaVA's question file.
SPLITS = {"adversarial": 0, "random": 10_000_000, "popular": 20_000_000}
# This version has the 2910 random questions that published LLaVA numbers are about; newer ones have 3000.
POPE = "https://github.com/AoiDragon/POPE/tree/e3e39262c85a6a83f26cf5094022a782cb0df58d/output/coco"


class Pope(Published):
    """POPE on COCO: three splits; ids are those of LLaVA's question file."""

    kind = "pope"
    max_new_tokens = SHORT_TOKENS
    files: ClassVar = {
        split: File((f"coco/coco_pope_{split}.json", f"coco_pope_{split}.json"), POPE) for split in SPLITS
    } | {"images": File(("val2014",), "https://cocodataset.org/#download")}

    def items(self) -> Iterator[Item]:
        for split, start in SPLITS.items():
            (path,) = self.paths(split)
            for number, row in enumerate(self.read_table(path), start + 1):
                label = str(value_of(row, "label", str(path))).lower()
                yield Item(
                    number,
                    f"{value_of(row, 'text', str(path))}\n{SHORT}",
                    (value_of(row, "image", str(path)),),
                    label.capitalize(),
                    ANSWERS,
                    ability=split,
                    kept={"category": split},
                    truth={"label": label, "category": split},
                )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        return parse_llava(text), "neither counts as yes" if says_neither(text) else "yes or no"


class Mme(Published):
    """MME: two questions about each picture in 14 sub-tasks, from the official folders."""

    kind = "mme"
    max_new_tokens = SHORT_TOKENS
    annotations_name = "annotations"  # a folder
    files: ClassVar = {
        "folder": File(
            ("MME_Benchmark_release_version", "MME_Benchmark"),
            "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
        )
    }

    def items(self) -> Iterator[Item]:
        root = self.folder if (self.folder / TASKS[0]).is_dir() else self.paths("folder")[0]
        self.images = root
        for task in TASKS:
            folder = root / task
            questions = folder / "questions_answers_YN"
            texts = sorted((questions if questions.is_dir() else folder).glob("*.txt"))
            if not texts:
                raise BenchmarkError(
                    f"mme: {folder} holds no questions; download it from {self.files['folder'].where}"
                )
            for path in texts:
                yield from self._about_one_picture(task, path, root)

    def _about_one_picture(self, task: str, path: Path, root: Path) -> Iterator[Item]:
        places = (root / task / "images", root / task)
        found = [
            image
            for place in places
            for image in sorted(place.glob(f"{path.stem}.*"))
            if image.suffix.lower() in (".jpg", ".jpeg", ".png")
        ]
        if not found:
            raise BenchmarkError(
                f"mme: {path} questions about a picture that is not in {places[0]} or {places[1]}"
            )
        self.files_read.append(path)
        lines = [line for line in read_text(path).split("\n") if line.strip()]
        if len(lines) != 2 or any(len(line.split("\t")) != 2 for line in lines):
            raise BenchmarkError(f"mme: {path}: expected two lines of question, tab and answer")
        for turn, line in enumerate(lines):
            question, answer = (cell.strip() for cell in line.split("\t"))
            yield Item(
                found[0].relative_to(root).as_posix(),  # LLaVA's id
                f"{question.replace(YES_NO_SUFFIX, '').strip()}\n{SHORT}",
                (found[0].relative_to(root).as_posix(),),
                answer.capitalize(),
                ANSWERS,
                ability=task,
                truth={"task": task, "image": found[0].name, "question": question, "answer": answer},
                rotation=turn,
            )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        said = parse_yes_no(text)
        return (None, said) if said == "other" else (said, "first four characters")

    def write_annotations(self, questions: Sequence[Question], path: Path) -> None:
        """A folder of the official eval tool's text files, without its fourth column."""
        write_task_files(path, [(question.row, None) for question in questions])


def write_task_files(folder: Path, rows: Sequence[tuple[dict, str | None]]) -> None:
    """One text file per sub-task: picture, question, right answer and, where given, the model's.

    Args:
      rows: (stored row, answer or None).
    """
    folder.mkdir(parents=True, exist_ok=True)
    for task in TASKS:
        lines = []
        for row, text in rows:
            truth = row["truth"]
            if truth["task"] == task:
                cells = [truth["image"], truth["question"], truth["answer"]]
                # A tab or line break in an answer would be another column or row of this format.
                lines.append("\t".join(cells + ([] if text is None else [" ".join(text.split())])))
        files.write_text(folder / f"{task}.txt", "".join(f"{line}\n" for line in lines))
