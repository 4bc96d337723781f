"""The project's own benchmark: every question under all rotations of its options, and without options.

Stored are one row per question and rotation,
`{question_id, rotation, ability, group, options, answer, text}`. A question is right only if every rotation
is answered right (Liu et al. 2023, "MMBench", sec. 4.1). Open rows have no options (empty or absent) and are
right if the normalised answer is the normalised expected one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from typing import Any

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, rates
from mllm_jax.evaluation.benchmarks.base import MAIN, OPEN, Benchmark, Question
from mllm_jax.evaluation.benchmarks.question_files import read_list
from mllm_jax.evaluation.option_match import LETTERS, match_option, plain
from mllm_jax.evaluation.predictions import BenchmarkError, PredictionError, Problems, Row, as_text, take
from mllm_jax.evaluation.vqa_normalize import m4c_normalize
from mllm_jax.mini.world.questions import CHOICE_SUFFIX, OPEN_SUFFIX, rotations
from mllm_jax.mini.world.questions import LETTERS as OFFERED
from mllm_jax.storage import Path

GROUPS = ("coarse", "fine", "reasoning")


def same_answer(text: str, answer: str) -> bool:
    """Exact match after normalisation; where that leaves nothing (the letter "A") the plain texts decide."""
    left, right = m4c_normalize(text), m4c_normalize(answer)
    return left == right if left and right else plain(text) == plain(answer)


def choice_prompt(question: str, options: Sequence[str]) -> str:
    """Question, lettered options and the request to answer with one of them, in words."""
    lines = "\n".join(f"{letter}. {option}" for letter, option in zip(OFFERED, options, strict=False))
    return f"{question}\n{lines}\n{CHOICE_SUFFIX}"


def _answer_index(answer: Answer, options: Sequence[str]) -> int:
    """The right option, which is given by its text or, failing that, its letter."""
    gold = as_text(answer.item["answer"]).strip()
    if gold in options:
        return options.index(gold)
    if len(gold) == 1 and gold.upper() in LETTERS[: len(options)]:
        return LETTERS.index(gold.upper())
    raise PredictionError(
        f"mini question {answer.id[0]!r}: answer {gold!r} is neither an option's text nor a letter of {options}"
    )


def _rotation(row: Row) -> int:
    value = row.get("rotation") or 0
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise PredictionError(f"mini question {row.get('question_id')!r}: rotation {value!r}") from None


class Mini(Benchmark):
    """Questions {question_id, image or video, ability, group, question, options, answer}."""

    name = "mini"
    rule = "this project; circular evaluation as in MMBench"
    answers_format = "JSON lines {question_id, rotation, ability, group, options, answer, text}"

    # --- asking ---------------------------------------------------------------------------------------------------

    def read(self) -> list[Question]:
        questions = []
        for row in read_list(self.path):
            for name in ("question_id", "ability", "group", "question", "answer"):
                row.typed(name, str)
            options = row.typed("options", list)
            if row["answer"] not in options or not 2 <= len(set(options)) == len(options) <= len(OFFERED):
                raise BenchmarkError(
                    f"{row.where}: 'options' must be 2 to {len(OFFERED)} different texts with the answer "
                    f"{row['answer']!r} among them, found {options!r}"
                )
            shown = row.shown()
            for turn, rotated in enumerate(rotations(options)):
                kept = row | {"rotation": turn, "options": list(rotated)}
                prompt = choice_prompt(row["question"], rotated)
                questions.append(Question(kept, prompt, options=tuple(rotated), **shown))
            kept = row | {"rotation": 0, "options": []}
            questions.append(Question(kept, f"{row['question']}\n{OPEN_SUFFIX}", part=OPEN, **shown))
        return sorted(questions, key=lambda q: q.images)  # the same image's prompts together; stable

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        """How: `option_text`, `letter`, `contained_text`, `open` or `unparsed`."""
        options = [as_text(option) for option in item.get("options") or ()]
        if not options:
            return (m4c_normalize(text), "open") if text.strip() else (None, "unparsed")
        index, how = match_option(text, options)
        return None if index is None else options[index], how

    def counted_questions(self) -> Iterable[Question]:
        return (q for q in self.questions if q.part == MAIN and q.row["rotation"] == 0)

    # --- scoring --------------------------------------------------------------------------------------------------

    @classmethod
    def counted_as(cls, row: Row) -> Hashable:
        return row["question_id"]

    @classmethod
    def identifier(cls, gold: Any, path: Path) -> Callable[[Row], Hashable]:
        def identify(row: Row) -> Hashable:
            number = take(row, ("question_id",), str(path))
            return number if isinstance(number, (str, int)) else str(number), _rotation(row)

        return identify

    @classmethod
    def stored(cls, row: Row, where: str) -> Any:
        return row.get("text")

    @classmethod
    def read_annotations(cls, path: Path) -> dict[Any, Row]:
        """Answers and options may come from another file than the texts."""
        key = cls.identifier(None, path)
        return {key(row): row for row in cls.read_answers(path, Problems())}

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> Answers:
        """Turns that are missing make a file incomplete: their questions are left out of the score."""
        answers = super().grade_files(predictions, annotations, problems)
        questions = answers.parts("question")
        for key in _incomplete(questions, problems):
            for answer in questions[key]:
                answer.notes["whole"] = None
        return answers

    @classmethod
    def grade(cls, answer: Answer) -> None:
        answer.where = f"mini question {answer.id[0]!r}"
        for name in ("ability", "group", "answer"):
            answer.value(name)
        options = [as_text(option) for option in answer.item.get("options") or ()]
        said, how = cls.parse(answer.text, answer.item)
        answer.parsed = said is not None
        if options:
            index, _ = match_option(answer.text, options)
            answer.credit = index is not None and index == _answer_index(answer, options)
        else:
            answer.credit = answer.parsed and same_answer(answer.text, as_text(answer.item["answer"]))
        answer.notes = {"how": how, "options": len(options), "question": answer.id[0], "whole": answer.id[0]}
        answer.notes["cell"] = answer.item["group"], answer.item["ability"]

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        questions = answers.circular("whole")
        cells = questions.cells("cell")
        groups, micro = {}, {}
        for name in dict.fromkeys((*GROUPS, *(group for group, _ in cells))):
            members = [cell for (group, _), cell in cells.items() if group == name]
            if members:
                groups[name] = sum(r / n for r, n in members) / len(members)
                micro[name] = sum(r for r, _ in members) / sum(n for _, n in members)
        counts = {ability: cell for (_, ability), cell in cells.items()}
        first = Answers(min(turns, key=lambda a: a.id[1]) for turns in answers.parts("question").values())
        return {
            "n": len(questions),
            "score": questions.mean(),
            "subtasks": rates(counts),
            "groups": groups,
            "micro_groups": micro,
            "vanilla": first.mean(),
            "row_accuracy": answers.mean(),
            "rows": len(answers),
            "counts": counts,
            "parsed": dict(Counter(answer.notes["how"] for answer in answers)),
        }


def _incomplete(questions: Mapping[Any, Answers], problems: Problems) -> list[Any]:
    """Questions without all rotations 0..k-1, k being the most that any question with as many options has."""
    first = {key: min(turns, key=lambda answer: answer.id[1]) for key, turns in questions.items()}
    options = {key: answer.notes["options"] for key, answer in first.items()}
    most: dict[int, int] = defaultdict(int)
    for key, turns in questions.items():
        most[options[key]] = max(most[options[key]], *(answer.id[1] + 1 for answer in turns))
    incomplete = []
    for key, turns in questions.items():
        absent = sorted(set(range(most[options[key]])) - {answer.id[1] for answer in turns})
        for rotation in absent:
            problems.add("missing", f"question {key!r} rotation {rotation}")
        if absent:
            incomplete.append(key)
    return incomplete
