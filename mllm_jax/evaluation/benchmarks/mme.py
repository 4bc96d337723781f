"""MME (Fu et al. 2023): 14 yes/no sub-tasks, two questions per image, up to 200 points each.

Sub-task score = 100 * accuracy (over questions) + 100 * accuracy+ (over images with both questions right);
perception is the sum of the first ten, cognition of the last four. Follows `calculation.py` of the official
eval tool, and LLaVA's conversion of its answer files to that tool's text files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path, PurePosixPath
from typing import Any, ClassVar

from mllm_jax import files
from mllm_jax.data import reading
from mllm_jax.evaluation.benchmarks.answers import Answer
from mllm_jax.evaluation.benchmarks.base import BenchmarkError, Question
from mllm_jax.evaluation.benchmarks.published import SHORT, SHORT_TOKENS, File, Published, Upload
from mllm_jax.evaluation.benchmarks.yes_no import ANSWERS, confusion
from mllm_jax.evaluation.grouping import group_scores, load_groups
from mllm_jax.evaluation.predictions import PredictionError, Problems, as_text, read_rows, read_text, take

PERCEPTION = (
    "existence",
    "count",
    "position",
    "color",
    "posters",
    "celebrity",
    "scene",
    "landmark",
    "artwork",
    "OCR",
)
COGNITION = ("commonsense_reasoning", "numerical_calculation", "text_translation", "code_reasoning")
TASKS = PERCEPTION + COGNITION
YES_NO_SUFFIX = "Please answer yes or no."
_IMAGES = (".jpg", ".jpeg", ".png")


def parse_yes_no(text: str) -> str:
    """`yes`, `no` or `other`, decided by the first four characters ("know ..." is a no, as upstream).

    Example:
        >>> [parse_yes_no(t) for t in ("Yes, it is", "know", "a cat", "  no")]
        ['yes', 'no', 'other', 'no']
    """
    answer = text.lower()
    if answer in ("yes", "no"):
        return answer
    start = answer[:4]
    return "yes" if "yes" in start else "no" if "no" in start else "other"


def parse_yes_no_lmms(text: str) -> str:
    """lmms-eval's variant: white space and full stops are stripped first."""
    return parse_yes_no(text.lower().strip().replace(".", ""))


def score_task(pairs: Sequence[tuple[str, str]]) -> dict[str, float | int]:
    """One sub-task from (label, parsed answer) pairs in file order; two consecutive pairs are one image.

    Precision and recall leave answers out that are neither yes nor no, accuracy counts them as wrong.
    """
    labels, answers = [label for label, _ in pairs], [answer for _, answer in pairs]
    right = [label == answer for label, answer in pairs]
    images = [right[i : i + 2] for i in range(0, len(right), 2)]
    c = confusion(labels, answers)
    acc = sum(right) / len(right) if right else 0.0
    acc_plus = sum(all(image) for image in images) / len(images) if images else 0.0
    return {
        "score": acc * 100 + acc_plus * 100,
        "rows": len(pairs),
        **c,
        "precision": c["TP"] / (c["TP"] + c["FP"]) if c["TP"] + c["FP"] else 0.0,
        "recall": c["TP"] / (c["TP"] + c["FN"]) if c["TP"] + c["FN"] else 0.0,
        "other_num": answers.count("other"),
        "acc": acc,
        "acc_plus": acc_plus,
    }


def _key(task: str, image: str, question: str) -> tuple[str, str, str]:
    """A question without either instruction: one key for files with one or two blanks before it."""
    return task, PurePosixPath(image).stem, question.replace(SHORT, "").replace(YES_NO_SUFFIX, "").strip()


def _read_task(path: Path, columns: int, problems: Problems) -> list[list[str]]:
    rows = []
    for number, line in enumerate(read_text(path, problems).split("\n"), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) == columns or (columns == 3 and len(cells) == 4):
            rows.append(cells)
        else:
            problems.add("unreadable_line", f"{path.name} line {number}: {len(cells)} columns, not {columns}")
    return rows


def write_task_files(folder: Path, rows: Sequence[tuple[Mapping[str, Any], str | None]]) -> None:
    """One text file per sub-task: image, question, right answer and, where given, the model's.

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


class Mme(Published):
    """MME: two questions about each image in 14 sub-tasks, from the official folders."""

    name = "mme"
    unit = "points"
    rule = "MME eval tool, calculation.py"
    answers_format = (
        "LLaVA JSON lines {question_id, prompt, text}, or a folder of <task>.txt with four columns"
    )
    score_options = ("groups",)
    in_annotation_order = True
    max_new_tokens = SHORT_TOKENS
    annotations_name = "annotations"  # a folder
    upload = Upload("mme", "MME's eval_tool (calculation.py)")
    files: ClassVar = {
        "folder": File(
            ("MME_Benchmark_release_version", "MME_Benchmark"),
            "https://github.com/BradyFU/Awesome-Multimodal-Large-Language-Models/tree/Evaluation",
        )
    }

    # --- asking ---------------------------------------------------------------------------------------------------

    def items(self) -> Iterator[Question]:
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
                yield from self._about_one_image(task, path, root)

    def _about_one_image(self, task: str, path: Path, root: Path) -> Iterator[Question]:
        places = (root / task / "images", root / task)
        found = [
            image
            for place in places
            for image in sorted(place.glob(f"{path.stem}.*"))
            if image.suffix.lower() in _IMAGES
        ]
        if not found:
            raise BenchmarkError(f"mme: {path} asks about an image that is not in {places[0]} or {places[1]}")
        self.files_read.append(path)
        lines = [line for line in reading.read_text(path).split("\n") if line.strip()]
        if len(lines) != 2 or any(len(line.split("\t")) != 2 for line in lines):
            raise BenchmarkError(f"mme: {path}: expected two lines of question, tab and answer")
        image = found[0].relative_to(root).as_posix()  # LLaVA's id
        for turn, line in enumerate(lines):
            question, answer = (cell.strip() for cell in line.split("\t"))
            yield self.question(
                image,
                f"{question.replace(YES_NO_SUFFIX, '').strip()}\n{SHORT}",
                (image,),
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

    def write_submission(self, rows: Sequence[Mapping[str, Any]], path: Path) -> None:
        write_task_files(path, [(row, row["text"]) for row in rows])

    # --- scoring --------------------------------------------------------------------------------------------------

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> list[Answer]:
        if annotations is None and not predictions.is_dir():
            raise ValueError(
                "mme: --annotations is needed with a LLaVA answer file: the folder of <task>.txt files"
            )
        return super().grade_files(predictions, annotations or predictions, problems)

    @classmethod
    def read_annotations(cls, path: Path) -> dict[Any, Mapping[str, Any]]:
        """From a folder of `<task>.txt` files with image, question and answer separated by tabs."""
        gold = {}
        for task in TASKS:
            file = path / f"{task}.txt"
            if not file.is_file():
                raise PredictionError(
                    f"{file}: missing; MME annotations are a folder with one file per sub-task"
                )
            problems = Problems()
            rows = [(c[0], c[1], c[2].strip().lower()) for c in _read_task(file, 3, problems)]
            bad = [row for row in rows if row[2] not in ("yes", "no")]
            if problems.counts or bad or not rows or len(rows) % 2:
                raise PredictionError(
                    f"{file}: damaged: {problems.as_dict() or bad[:1] or 'odd number of lines'}"
                )
            for image, question, label in rows:
                key = _key(task, image, question)
                if key in gold:
                    raise PredictionError(f"{file}: question {key} occurs twice")
                gold[key] = {"task": task, "label": label}
        return gold

    @classmethod
    def read_answers(cls, path: Path, problems: Problems) -> list[dict[str, Any]]:
        """From an official folder of text files, where absent tasks are reported as missing, or LLaVA's file."""
        if not path.is_dir():
            return read_rows(path, problems)
        return [
            {"question_id": f"{task}/{image}", "prompt": question, "text": text}
            for task in TASKS
            if (path / f"{task}.txt").is_file()
            for image, question, _, text in _read_task(path / f"{task}.txt", 4, problems)
        ]

    @classmethod
    def identifier(cls, gold: Mapping[Any, Any] | None, path: Path) -> Callable[[Mapping[str, Any]], Any]:
        def identify(row: Mapping[str, Any]) -> tuple[str, str, str]:
            place = PurePosixPath(str(take(row, ("question_id",), str(path))))
            task = place.parts[0] if place.parts else ""
            return _key(task, place.name, as_text(take(row, ("prompt", "question"), str(path))))

        return identify

    @classmethod
    def grade(cls, answer: Answer) -> None:
        said = parse_yes_no(answer.text)
        answer.parsed, answer.credit = said != "other", said == answer.item["label"]
        answer.notes = {"said": said, "lmms": parse_yes_no_lmms(answer.text)}

    @classmethod
    def figures(
        cls, answers: Sequence[Answer], problems: Problems, groups: Path | None = None
    ) -> dict[str, Any]:
        def tasks_by(note: str) -> dict[str, dict[str, float | int]]:
            return {
                task: score_task(
                    [(a.item["label"], a.notes[note]) for a in answers if a.item["task"] == task]
                )
                for task in TASKS
            }

        details, lmms = tasks_by("said"), tasks_by("lmms")
        scores = {task: cell["score"] for task, cell in details.items()}
        perception, cognition = (sum(scores[task] for task in tasks) for tasks in (PERCEPTION, COGNITION))
        table = load_groups(groups)
        return {
            "score": perception,
            "subtasks": scores,
            "groups": group_scores("mme", scores, "sum", table),
            "perception": perception,
            "cognition": cognition,
            "total": perception + cognition,
            "group_mean": group_scores("mme", scores, "macro", table),
            "group_authors": group_scores("mme_authors", scores, "sum", table)
            if "mme_authors" in table
            else {},
            "group_normalised": group_scores("mme", scores, "normalised", table),
            "details": details,
            "lmms_perception": sum(lmms[task]["score"] for task in PERCEPTION),
            "lmms_cognition": sum(lmms[task]["score"] for task in COGNITION),
        }
