"""MMBench and MMBench-CN (Liu et al. 2023): circular evaluation, read from the official TSV with its base64 images.

Rotations of a question share `index % 1_000_000`; a question is right only if all its rotations are. Follows
VLMEvalKit's `mcq_circular_eval` with exact matching (no GPT matcher). A file without any rotation is
scored as vanilla and says so.
"""

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation import predictions as reading
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, rates
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.published import LETTER, File, Option, Published, Upload, lettered
from mllm_jax.evaluation.grouping import grouped, load_groups
from mllm_jax.evaluation.option_match import infer_option
from mllm_jax.evaluation.predictions import BenchmarkError, PredictionError, Problems, Row, as_text
from mllm_jax.evaluation.table_files import TABLES, is_absent, read_table, read_whole_table, write_xlsx
from mllm_jax.storage import Path

ROTATION = 1_000_000
_SITE = "https://download.openmmlab.com/mmclassification/datasets/mmbench"
# What LLaVA's conversion leaves out of an upload.
_NOT_UPLOADED = ("hint", "category", "source", "image", "comment", "l2-category")
_CATEGORIES = ("category", "l2-category")
_SHORTEST_IMAGE = 64  # characters; shorter cells name the row that holds the image
_PREDICTION_COLUMN = 6  # where LLaVA's conversion puts it, counted from 0


def options_of(row: Row) -> dict[str, str]:
    """Letter -> option text; the options end at the first absent one.

    Example:
        >>> options_of({"A": "cat", "B": "dog", "C": None, "D": "nan"})
        {'A': 'cat', 'B': 'dog'}
    """
    options = {}
    for letter in "ABCDEFGH":
        if is_absent(row.get(letter)):
            break
        options[letter] = as_text(row[letter])
    return options


def read_index(value: Any, where: Any) -> int:
    """A question's index as a whole number.

    Raises:
      PredictionError: it is none.
    """
    try:
        number = float(value)
        if number == int(number):
            return int(number)
    except (TypeError, ValueError, OverflowError):
        pass
    raise PredictionError(f"{where}: index {value!r} is not a whole number")


class MmBench(Published):
    """MMBench, English."""

    name = "mmbench"
    rule = "VLMEvalKit mcq_circular_eval, exact matching"
    answers_format = "rows {index, prediction, A-D, answer}, LLaVA's answer file, or the submission XLSX"
    score_options = ("groups",)
    id_keys = ("index", "question_id")
    text_keys = ("prediction", "text")
    upload = Upload("{name}.xlsx", "https://mmbench.opencompass.org.cn/mmbench-submission")
    options: ClassVar = {
        "rounds": Option(
            "circular", "every row of the file, or (vanilla) each question once", ("circular", "vanilla")
        ),
    }
    files: ClassVar = {
        "questions": File(
            ("mmbench_dev_20230712.tsv", "mmbench_dev_en_20231003.tsv", "mmbench_test_en_20231003.tsv"),
            f"{_SITE}/mmbench_dev_20230712.tsv",
        )
    }
    instruction: ClassVar[str] = LETTER

    # --- asking ---------------------------------------------------------------------------------------------------

    def items(self) -> Iterator[Question]:
        rows = self.rows()
        images: dict[int, str] = {}
        for row in rows:
            for name in ("index", "question", "A"):
                row.first(name)
            if len(row["image"]) > _SHORTEST_IMAGE:
                images[read_index(row["index"], row.where)] = self.embedded.add_base64(row.pop("image"))
        for position, row in enumerate(rows):
            index = read_index(row["index"], row.where)
            if self.values.get("rounds") == "vanilla" and index >= ROTATION:
                continue
            image = images.get(index) or images.get(read_index(row.get("image", -1), row.where))
            if image is None:
                raise BenchmarkError(f"{self.path}: index {index} has no image; fetch the file again")
            choices = options_of(row)
            hint = "" if is_absent(row.get("hint")) else f"{row['hint']}\n"
            answer = None if is_absent(row.get("answer")) else row["answer"]
            known = {key: row[key] for key in _CATEGORIES if not is_absent(row.get(key))}
            columns = {key: cell for key, cell in row.items() if key not in _NOT_UPLOADED}
            yield self.question(
                index,
                f"{hint}{row['question']}\n{lettered(list(choices.values()))}\n{self.instruction}",
                [image],
                answer,
                list(choices),
                ability=known.get("category", ""),
                fields={"position": position, "columns": columns},
                truth={**choices, **known, "answer": answer},
            )

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        options = options_of(item)
        letter = infer_option(text, options)
        return (letter, "letter or option text") if letter in options else (None, "unparsed")

    def write_submission(self, rows: Sequence[Row], path: Path) -> None:
        """The TSV's columns without image, hint and categories, and `prediction` as the seventh column."""
        ordered = sorted(rows, key=lambda row: row["position"])
        header = list(ordered[0]["columns"])
        header.insert(_PREDICTION_COLUMN, "prediction")
        said = ({"index": row["question_id"], "prediction": row["text"]} for row in ordered)
        cells = [{**row["columns"], **own} for row, own in zip(ordered, said, strict=True)]
        try:
            write_xlsx(path, header, cells, numbers=("index",), texts=("prediction",))
        except ValueError as error:
            raise BenchmarkError(str(error)) from error

    # --- scoring --------------------------------------------------------------------------------------------------

    @classmethod
    def counted_as(cls, row: Row) -> Hashable:
        return int(row["question_id"]) % ROTATION

    @classmethod
    def identifier(cls, gold: Any, path: Path) -> Callable[[Row], int]:
        return lambda row: read_index(reading.take(row, cls.id_keys, str(path)), path)

    @classmethod
    def read_answers(cls, path: Path, problems: Problems) -> list[dict[str, Any]]:
        if path.suffix.lower() in TABLES:
            return [dict(row) for row in read_table(path, problems)]
        rows = reading.read_rows(path, problems)
        for row in rows:
            letters, texts = row.get("option_char"), row.get("options")
            if isinstance(letters, list) and isinstance(texts, list):  # LLaVA's answer file
                row.update(dict(zip(letters, texts, strict=False)))
        return rows

    @classmethod
    def read_annotations(cls, path: Path) -> dict[int, Row]:
        table = path.suffix.lower() in TABLES
        rows: Any = read_whole_table(path) if table else reading.read_annotation_rows(path)
        return reading.by_key(rows, cls.identifier(None, path), path)

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> Answers:
        rows = cls.read_answers(predictions, problems)
        index_of = cls.identifier(None, predictions)
        if annotations is None:
            gold, complete = {index_of(row): row for row in rows}, False
        else:
            gold = dict(cls.read_annotations(annotations))
            complete = any(index >= ROTATION for index in gold)  # the annotations list every rotation
            for row in rows:  # rotations of annotated questions that only the answers have
                index = index_of(row)
                if index not in gold and index % ROTATION in gold and not is_absent(row.get("answer")):
                    gold[index] = row
        answers = cls.match(rows, gold, predictions, annotations, problems)
        circular = any(index >= ROTATION for index in gold)
        answered = {answer.id for answer in answers}
        broken = {index % ROTATION for index in gold if index not in answered}
        if circular and not complete:
            broken |= _missing_rotations(gold, problems)
        for answer in answers:
            base = answer.id % ROTATION
            answer.notes |= {"circular": circular, "question": None if base in broken else base}
        return answers

    @classmethod
    def grade(cls, answer: Answer) -> None:
        letter, _ = cls.parse(answer.text, answer.item if options_of(answer.item) else answer.row)
        answer.parsed = letter is not None
        answer.credit = letter == as_text(answer.value("answer"))
        categories = {name: answer.item.get(name) for name in _CATEGORIES}
        answer.notes = {name: as_text(value) for name, value in categories.items() if not is_absent(value)}

    @classmethod
    def figures(cls, answers: Answers, groups: Path | None = None) -> dict[str, Any]:
        questions = answers.circular("question")
        counts, l2_counts = (questions.cells(name) for name in _CATEGORIES)
        table = load_groups(groups)
        # Tables of this form have categories of their own (CCBench); a grouping that was asked for must have them all.
        inside = {n: cell for n, cell in counts.items() if groups or n in table["mmbench"]}
        grouping = grouped("mmbench", inside, table)
        circular = any(answer.notes["circular"] for answer in answers)
        vanilla = Answers(answer for answer in answers if answer.id < ROTATION)
        return {
            "n": len(questions),
            "score": questions.mean(),
            "subtasks": rates(counts),
            "groups": grouping["micro"],
            "evaluation": "circular" if circular else "vanilla (no rotations in the files)",
            "correct": questions.earned,
            "counts": counts,
            "l2_category": rates(l2_counts),
            "l2_counts": l2_counts,
            "group_scores": grouping,
            "vanilla_accuracy": vanilla.mean(),
            "vanilla_correct": vanilla.earned,
            "rows": len(answers),
            "row_correct": answers.earned,
            "row_accuracy": answers.mean(),
        }


def _missing_rotations(gold: Mapping[int, Row], problems: Problems) -> set[int]:
    """Reports base questions whose rotations are not all there and returns them.

    A question has as many rotations as options, or one fewer if the last option ("none of the above"
    and the like) keeps its place in all of them, as in 53 questions of the dev set.
    """
    turns: dict[int, list[int]] = {}
    for index in gold:
        turns.setdefault(index % ROTATION, []).append(index // ROTATION)
    broken = set()
    for base, present in turns.items():
        options = [options_of(gold[base + turn * ROTATION]) for turn in present]
        wanted = set(range(len(options[0])))
        fixed = len(present) > 1 and len({list(o.values())[-1] if o else "" for o in options}) == 1
        if fixed and len(wanted) > 1:
            wanted.discard(len(wanted) - 1)
        for turn in sorted(wanted - set(present)):
            problems.add("missing", f"index {base + turn * ROTATION}")
            broken.add(base)
    return broken


class MmBenchCn(MmBench):
    """MMBench-CN: Chinese questions, options and instruction."""

    name = "mmbench_cn"
    folder_name = "mmbench"
    grouping = "mmbench"
    files: ClassVar = {
        "questions": File(
            ("mmbench_dev_cn_20231003.tsv", "mmbench_test_cn_20231003.tsv"),
            f"{_SITE}/mmbench_dev_cn_20231003.tsv",
        )
    }
    instruction = "请直接回答选项字母。"


class CcBench(MmBenchCn):
    """CCBench: Chinese culture, a table of MMBench's form with categories of its own and no rotations."""

    name = "ccbench"
    folder_name = ""
    grouping = ""
    upload = Upload("{name}.xlsx", "VLMEvalKit's evaluation of CCBench")
    options: ClassVar = {}
    files: ClassVar = {
        "questions": File(
            ("CCBench.tsv",), "https://opencompass.openxlab.space/utils/benchmarks/MMBench_V11/CCBench.tsv"
        )
    }
