"""The project's own benchmark: every question under all rotations of its options, and without options.

Stored are one row per question and rotation,
`{question_id, rotation, ability, group, options, answer, text}`. A question is right only if every rotation
is answered right (Liu et al. 2023, "MMBench", sec. 4.1). Open rows have no options (empty or absent) and are
right if the normalised answer is the normalised expected one.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.answers import Answer, earned, rates, ratio
from mllm_jax.evaluation.benchmarks.base import MAIN, OPEN, Benchmark, BenchmarkError, Question
from mllm_jax.evaluation.benchmarks.question_files import field, image_names, read_list
from mllm_jax.evaluation.option_match import LETTERS, match_option, plain
from mllm_jax.evaluation.predictions import PredictionError, Problems, as_text, take
from mllm_jax.evaluation.vqa_normalize import m4c_normalize
from mllm_jax.mini.world.questions import CHOICE_SUFFIX, OPEN_SUFFIX, rotations
from mllm_jax.mini.world.questions import LETTERS as OFFERED

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


def _rotation(row: Mapping[str, Any]) -> int:
    value = row.get("rotation") or 0
    try:
        return int(value)
    except (TypeError, ValueError, OverflowError):
        raise PredictionError(f"mini question {row.get('question_id')!r}: rotation {value!r}") from None


class Mini(Benchmark):
    """Questions {question_id, image, ability, group, question, options, answer}."""

    name = "mini"
    rule = "this project; circular evaluation as in MMBench"
    answers_format = "JSON lines {question_id, rotation, ability, group, options, answer, text}"

    # --- asking ---------------------------------------------------------------------------------------------------

    def read(self) -> list[Question]:
        questions = []
        for index, row in enumerate(read_list(self.path)):
            for name in ("question_id", "ability", "group", "question", "answer"):
                field(row, name, str, self.path, index)
            options = field(row, "options", list, self.path, index)
            if row["answer"] not in options or not 2 <= len(set(options)) == len(options) <= len(OFFERED):
                raise BenchmarkError(
                    f"{self.path}: entry {row['question_id']!r}: 'options' must be 2 to {len(OFFERED)} different "
                    f"texts with the answer {row['answer']!r} among them, found {options!r}"
                )
            images = image_names(row, self.path, index)
            for turn, rotated in enumerate(rotations(options)):
                kept = row | {"rotation": turn, "options": list(rotated)}
                prompt = choice_prompt(row["question"], rotated)
                questions.append(Question(kept, prompt, images, tuple(rotated)))
            kept = row | {"rotation": 0, "options": []}
            questions.append(Question(kept, f"{row['question']}\n{OPEN_SUFFIX}", images, part=OPEN))
        return sorted(questions, key=lambda q: q.images)  # the same image's prompts together; stable

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        if question.part == OPEN:
            return (m4c_normalize(text), "open") if text.strip() else (None, "unparsed")
        index, how = match_option(text, question.options)
        return None if index is None else question.options[index], how

    def counted_questions(self) -> Iterable[Question]:
        return (q for q in self.questions if q.part == MAIN and q.row["rotation"] == 0)

    # --- scoring --------------------------------------------------------------------------------------------------

    @classmethod
    def counted_as(cls, row: Mapping[str, Any]) -> Hashable:
        return row["question_id"]

    @classmethod
    def identifier(
        cls, gold: Mapping[Any, Any] | None, path: Path
    ) -> Callable[[Mapping[str, Any]], Hashable]:
        def identify(row: Mapping[str, Any]) -> Hashable:
            number = take(row, ("question_id",), str(path))
            return number if isinstance(number, (str, int)) else str(number), _rotation(row)

        return identify

    @classmethod
    def stored(cls, row: Mapping[str, Any], where: str) -> Any:
        return row.get("text")

    @classmethod
    def read_annotations(cls, path: Path) -> dict[Any, Mapping[str, Any]]:
        """Answers and options may come from another file than the texts."""
        key = cls.identifier(None, path)
        return {key(row): row for row in cls.read_answers(path, Problems())}

    @classmethod
    def grade(cls, answer: Answer) -> None:
        """Notes how the text was read: `option_text`, `letter`, `contained_text`, `open` or `unparsed`."""
        answer.where = f"mini question {answer.id[0]!r}"
        for name in ("ability", "group", "answer"):
            answer.value(name)
        options = [as_text(option) for option in answer.item.get("options") or ()]
        if options:
            index, how = match_option(answer.text, options)
            answer.credit = index is not None and index == _answer_index(answer, options)
        elif not answer.text.strip():
            answer.credit, how = False, "unparsed"
        else:
            answer.credit, how = same_answer(answer.text, as_text(answer.item["answer"])), "open"
        answer.parsed, answer.notes = how != "unparsed", {"how": how, "options": len(options)}

    @classmethod
    def figures(cls, answers: Sequence[Answer], problems: Problems) -> dict[str, Any]:
        questions: dict[Any, list[Answer]] = defaultdict(list)
        for answer in sorted(answers, key=lambda a: a.id[1]):
            questions[answer.id[0]].append(answer)
        questions = {a.id[0]: questions[a.id[0]] for a in answers}
        whole = _whole(questions, problems)
        cells: dict[tuple[str, str], list[int]] = defaultdict(lambda: [0, 0])
        for key in whole:
            item = questions[key][0].item
            cell = cells[item["group"], item["ability"]]
            cell[0] += all(answer.credit for answer in questions[key])
            cell[1] += 1
        counts = {ability: cell for (_, ability), cell in cells.items()}
        groups, micro = {}, {}
        for name in dict.fromkeys((*GROUPS, *(group for group, _ in cells))):
            members = [cell for (group, _), cell in cells.items() if group == name]
            if members:
                groups[name] = sum(r / n for r, n in members) / len(members)
                micro[name] = sum(r for r, _ in members) / sum(n for _, n in members)
        how = Counter(answer.notes["how"] for answer in answers)
        return {
            "n": len(whole),
            "unparsed": how["unparsed"],
            "score": ratio(sum(right for right, _ in cells.values()), len(whole)),
            "subtasks": rates(counts),
            "groups": groups,
            "micro_groups": micro,
            "vanilla": ratio(earned(turns[0] for turns in questions.values()), len(questions)),
            "row_accuracy": ratio(earned(answers), len(answers)),
            "rows": len(answers),
            "counts": counts,
            "parsed": dict(how),
        }


def _whole(questions: Mapping[Any, Sequence[Answer]], problems: Problems) -> list[Any]:
    """Questions with all rotations 0..k-1, k being the most that any question with as many options has."""
    most: dict[int, int] = defaultdict(int)
    for turns in questions.values():
        size = turns[0].notes["options"]
        most[size] = max(most[size], *(answer.id[1] + 1 for answer in turns))
    whole = []
    for key, turns in questions.items():
        absent = sorted(set(range(most[turns[0].notes["options"]])) - {answer.id[1] for answer in turns})
        for rotation in absent:
            problems.add("missing", f"question {key!r} rotation {rotation}")
        if not absent:
            whole.append(key)
    return whole
