"""MME (Fu et al. 2023): 14 yes/no sub-tasks, two questions per image, up to 200 points each.

Sub-task score = 100 * accuracy (over questions) + 100 * accuracy+ (over images with both questions right);
perception is the sum of the first ten, cognition of the last four. Follows `calculation.py` of the official
eval tool, and LLaVA's conversion of its answer files to that tool's text files.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any, ClassVar

from mllm_jax import files
from mllm_jax.data.reading import read_text as read_question_text
from mllm_jax.evaluation import predictions as reading
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import SHORT, SHORT_TOKENS, File, Published, Upload
from mllm_jax.evaluation.benchmarks.yes_no import ANSWERS, confusion
from mllm_jax.evaluation.grouping import group_scores, load_groups
from mllm_jax.evaluation.predictions import BenchmarkError, PredictionError, Problems, Row, as_text, take
from mllm_jax.storage import Path, make_folder

PERCEPTION = tuple("existence count position color posters celebrity scene landmark artwork OCR".split())
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
    acc, acc_plus = ratio(sum(right), len(right)), ratio(sum(map(all, images)), len(images))
    return {
        "score": acc * 100 + acc_plus * 100,
        "rows": len(pairs),
        **confusion(labels, answers),
        "other_num": answers.count("other"),
        "acc": acc,
        "acc_plus": acc_plus,
    }


def _key(task: str, image: str, question: str) -> tuple[str, str, str]:
    """A question without either instruction: one key for files with one or two blanks before it."""
    return task, PurePosixPath(image).stem, question.replace(SHORT, "").replace(YES_NO_SUFFIX, "").strip()


def _read_task(path: Path, columns: int, problems: Problems) -> list[list[str]]:
    rows = []
    for number, line in enumerate(reading.read_text(path, problems).split("\n"), 1):
        if not line.strip():
            continue
        cells = line.rstrip("\r").split("\t")
        if len(cells) == columns or (columns == 3 and len(cells) == 4):
            rows.append(cells)
        else:
            problems.add("unreadable_line", f"{path.name} line {number}: {len(cells)} columns, not {columns}")
    return rows


def write_task_files(folder: Path, rows: Sequence[Row]) -> None:
    """One text file per sub-task: image, question, right answer and, of rows that have one, the model's."""
    make_folder(folder)
    lines: dict[str, list[str]] = {task: [] for task in TASKS}
    for row in rows:
        cells = [row["truth"][name] for name in ("image", "question", "answer")]
        # A tab or line break in an answer would be another column or row of this format.
        cells += [" ".join(row["text"].split())] if "text" in row else []
        lines[row["truth"]["task"]].append("\t".join(cells) + "\n")
    for task, texts in lines.items():
        files.write_text(folder / f"{task}.txt", "".join(texts))


class Mme(Published):
    """MME: two questions about each image in 14 sub-tasks, from the official folders."""

    name = "mme"
    unit = "points"
    rule = "MME eval tool, calculation.py"
    answers_format = "LLaVA JSON lines {question_id, prompt, text}, or a folder of four-column <task>.txt"
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
            inside = folder / "questions_answers_YN"
            texts = sorted((inside if inside.is_dir() else folder).glob("*.txt"))
            if not texts:
                where = self.files["folder"].where
                raise BenchmarkError(f"mme: {folder} holds no questions; download it from {where}")
            for path in texts:
                yield from self._about_one_image(task, path, root)

    def _about_one_image(self, task: str, path: Path, root: Path) -> Iterator[Question]:
        places = (root / task / "images", root / task)
        beside = [file for place in places for file in sorted(place.glob(f"{path.stem}.*"))]
        found = [file for file in beside if file.suffix.lower() in _IMAGES]
        if not found:
            raise BenchmarkError(f"mme: {path} asks about an image that is not in {places[0]} or {places[1]}")
        self.files_read.append(path)
        lines = [line for line in read_question_text(path).split("\n") if line.strip()]
        if len(lines) != 2 or any(len(line.split("\t")) != 2 for line in lines):
            raise BenchmarkError(f"mme: {path}: expected two lines of question, tab and answer")
        image = found[0].relative_to(root).as_posix()  # LLaVA's id
        for turn, line in enumerate(lines):
            question, answer = (cell.strip() for cell in line.split("\t"))
            yield self.question(
                image,
                f"{question.replace(YES_NO_SUFFIX, '').strip()}\n{SHORT}",
                [image],
                answer.capitalize(),
                ANSWERS,
                ability=task,
                truth={"task": task, "image": found[0].name, "question": question, "answer": answer},
                rotation=turn,
            )

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        said = parse_yes_no(text)
        return (None, said) if said == "other" else (said, "first four characters")

    def write_annotations(self, questions: Sequence[Question], path: Path) -> None:
        """A folder of the official eval tool's text files, without its fourth column."""
        write_task_files(path, [question.row for question in questions])

    def write_submission(self, rows: Sequence[Row], path: Path) -> None:
        write_task_files(path, rows)

    # --- scoring --------------------------------------------------------------------------------------------------

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> Answers:
        if annotations is None and not predictions.is_dir():
            raise ValueError("mme: LLaVA's answers need --annotations, the folder of <task>.txt files")
        return super().grade_files(predictions, annotations or predictions, problems)

    @classmethod
    def read_annotations(cls, path: Path) -> dict[Any, Row]:
        """From a folder of `<task>.txt` files with image, question and answer separated by tabs."""
        gold = {}
        for task in TASKS:
            file = path / f"{task}.txt"
            if not file.is_file():
                raise PredictionError(f"{file}: missing; MME annotations are a folder, a file per sub-task")
            problems = Problems()
            rows = [(c[0], c[1], c[2].strip().lower()) for c in _read_task(file, 3, problems)]
            bad = [row for row in rows if row[2] not in ("yes", "no")]
            labels = {_key(task, image, question): label for image, question, label in rows}
            if problems.counts or bad or not rows or len(rows) % 2 or len(labels) < len(rows):
                why = problems.as_dict() or bad[:1] or "an odd number of lines, or a question twice"
                raise PredictionError(f"{file}: damaged: {why}")
            gold |= {key: {"task": task, "label": label} for key, label in labels.items()}
        return gold

    @classmethod
    def read_answers(cls, path: Path, problems: Problems) -> list[dict[str, Any]]:
        """From an official folder of text files, where absent tasks are reported as missing, or LLaVA's file."""
        if not path.is_dir():
            return reading.read_rows(path, problems)
        return [
            {"question_id": f"{task}/{image}", "prompt": question, "text": text}
            for task in TASKS
            if (path / f"{task}.txt").is_file()
            for image, question, _, text in _read_task(path / f"{task}.txt", 4, problems)
        ]

    @classmethod
    def identifier(cls, gold: Any, path: Path) -> Callable[[Row], Any]:
        def identify(row: Row) -> tuple[str, str, str]:
            place = PurePosixPath(str(take(row, ("question_id",), str(path))))
            task = place.parts[0] if place.parts else ""
            return _key(task, place.name, as_text(take(row, ("prompt", "question"), str(path))))

        return identify

    @classmethod
    def grade(cls, answer: Answer) -> None:
        said = parse_yes_no(answer.text)
        answer.parsed, answer.credit = said != "other", said == answer.item["label"]
        answer.part = answer.item["task"]
        answer.notes = {"said": said, "lmms": parse_yes_no_lmms(answer.text)}

    @classmethod
    def figures(cls, answers: Answers, groups: Path | None = None) -> dict[str, Any]:
        parts = answers.parts()

        def tasks_by(note: str) -> dict[str, dict[str, float | int]]:
            return {
                task: score_task([(a.item["label"], a.notes[note]) for a in parts.get(task, ())])
                for task in TASKS
            }

        details, table = tasks_by("said"), load_groups(groups)
        scores, lmms = ({t: d["score"] for t, d in some.items()} for some in (details, tasks_by("lmms")))
        perception, cognition = _summed(scores)
        lmms_perception, lmms_cognition = _summed(lmms)
        authors = group_scores("mme_authors", scores, "sum", table) if "mme_authors" in table else {}
        return {
            "score": perception,
            "subtasks": scores,
            "groups": group_scores("mme", scores, "sum", table),
            "perception": perception,
            "cognition": cognition,
            "total": perception + cognition,
            "group_mean": group_scores("mme", scores, "macro", table),
            "group_authors": authors,
            "group_normalised": group_scores("mme", scores, "normalised", table),
            "details": details,
            "lmms_perception": lmms_perception,
            "lmms_cognition": lmms_cognition,
        }


def _summed(scores: Mapping[str, float]) -> tuple[float, float]:
    """Perception and cognition."""
    return sum(scores[task] for task in PERCEPTION), sum(scores[task] for task in COGNITION)
