"""MMMU validation (Yue et al. 2024): 900 college questions, 30 subjects in 6 domains, accuracy over all
questions; read from the hub's Parquet files.

Unreadable multiple-choice answers get the official random choice (seed 42, one draw per answer in the
order of the annotations); the draws are counted and the accuracy without them is printed beside the
headline.
"""

import ast
import random
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from mllm_jax.evaluation.benchmarks import published
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, rates, ratio
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.mmmu_parse import find_choice, open_is_right, parse_open, read_options
from mllm_jax.evaluation.benchmarks.published import LETTER, File, Option, Published, Upload, hub, lettered
from mllm_jax.evaluation.benchmarks.question_files import FileRow
from mllm_jax.evaluation.option_match import LETTERS
from mllm_jax.evaluation.predictions import BenchmarkError, PredictionError, Problems, Row, as_text
from mllm_jax.inference.beam_sampling import BeamSampling
from mllm_jax.storage import Path

CHOICE = "multiple-choice"
DOMAINS = {
    "Art and Design": "Art Art_Theory Design Music",
    "Business": "Accounting Economics Finance Manage Marketing",
    "Science": "Biology Chemistry Geography Math Physics",
    "Health and Medicine": "Basic_Medical_Science Clinical_Medicine Diagnostics_and_Laboratory_Medicine Pharmacy "
    "Public_Health",
    "Humanities and Social Science": "History Literature Sociology Psychology",
    "Tech and Engineering": "Agriculture Architecture_and_Engineering Computer_Science Electronics "
    "Energy_and_Power Materials Mechanical_Engineering",
}
_SEED = 42  # of the official draws
_ID = re.compile(r"(?:validation|test|dev)_(.+)_\d+")
_LETTER = re.compile(r"[A-Z]")
_FINAL = "final answer"  # of a JSON object id -> final answer; other answers are raw responses


class Mmmu(Published):
    """MMMU validation as Dense Connector asks it; only the first image of a question is shown.

    Upstream samples (temperature 1, five beams, seed 42), so that its numbers vary. The default here is greedy, as for
    every other benchmark; `decoding=sampled` decodes like upstream, with draws of our own (`beam_sampling.py`).
    """

    name = "mmmu"
    rule = "MMMU main_eval_only.py and main_parse_and_eval.py"
    answers_format = (
        "JSON id -> final answer, or raw responses in rows {id, response, all_choices, index2ans}"
    )
    annotations_format = "answer_dict_val.json: id -> {question_type, ground_truth}"
    id_keys = ("id", "question_id")
    text_keys = (_FINAL, "response", "text", "answer_text", "prediction", "answer")
    keyed = True
    in_annotation_order = True
    max_new_tokens = published.SHORT_TOKENS
    upload = Upload("output.json", "MMMU's main_parse_and_eval.py")
    options: ClassVar = {
        "decoding": Option("greedy", "greedy, or upstream's five sampled beams", ("greedy", "sampled"), True),
        "seed": Option("42", "of sampled answers, a whole number", decoding=True),
    }
    files: ClassVar = {"questions": File(("*/validation-*.parquet",), hub("MMMU/MMMU"))}

    @property
    def sampling(self) -> BeamSampling | None:
        """Five beams at temperature 1 over the 50 best tokens of each, if asked for."""
        return BeamSampling(seed=int(self.values["seed"])) if self.values["decoding"] == "sampled" else None

    @classmethod
    def read_options(cls, given: Row) -> dict[str, bool | str]:
        values = super().read_options(given)
        if not re.fullmatch(r"[0-9]+", str(values["seed"])):
            raise BenchmarkError(f"{cls.name}: option 'seed': {values['seed']!r} is no whole number")
        if values["decoding"] == "greedy" and given.get("seed", "42") != cls.options["seed"].default:
            raise BenchmarkError(f"{cls.name}: a seed says nothing of greedy answers; add decoding=sampled")
        return values

    def items(self) -> Iterator[Question]:
        for path in self.paths("questions"):
            for row in self.read_table(path):
                yield self._item(row, path)

    def _item(self, row: FileRow, path: Path) -> Question:
        number, kind = str(row["id"]), row.get("question_type", CHOICE)
        choices = read_options(row.get("options"), row.where) if kind == CHOICE else []
        answer = _gold(row["answer"], kind)
        asked = f"{lettered(choices, '({}) {}')}\n\n{LETTER}" if choices else published.SHORT
        return self.question(
            number,
            f"{row['question']}\n{asked}",
            [row["image_1"]],
            answer,
            LETTERS[: len(choices)],
            ability=path.parent.name,
            fields={"id": number, "options": choices},
            truth={"id": number, "question_type": kind, "ground_truth": answer, "options": choices},
        )

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        if not item["options"]:
            return super().parse(text, item)
        letter = find_choice(text, dict(zip(LETTERS, item["options"], strict=False)))
        return letter, "unparsed" if letter is None else "letter or option text"

    @classmethod
    def grade_files(cls, predictions: Path, annotations: Path | None, problems: Problems) -> Answers:
        """In order: each unreadable answer takes the next draw, Python's `random` as in the official code."""
        answers, draws = super().grade_files(predictions, annotations, problems), random.Random(_SEED)
        for answer in answers:
            if options := answer.notes["drawn from"]:
                answer.notes["reading"] = letter = draws.choice(options)
                answer.parsed, answer.credit = False, letter == _right(answer)
        return answers

    @classmethod
    def grade(cls, answer: Answer) -> None:
        name = _ID.fullmatch(str(answer.id))
        if name is None:
            raise PredictionError(f"{answer.where}: the id is not <split>_<subject>_<number>")
        gold, text = _right(answer), answer.text
        answer.part, answer.parsed, drawn_from = name[1], True, []
        if answer.item.get("question_type", CHOICE) != CHOICE:
            reading = answer.credit = open_is_right(parse_open(text), gold)
        elif _FINAL in answer.row:
            reading, answer.parsed = text, _LETTER.fullmatch(text) is not None
            answer.credit = text in ([gold] if isinstance(gold, str) else gold)
        else:
            options = _options(answer)
            reading = find_choice(text, options)
            answer.credit = reading == gold
            drawn_from = list(options) if reading is None else []
        answer.notes = {"reading": reading, "drawn from": drawn_from}

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        cells = answers.cells()
        domains = {
            domain: [sum(cells[s][i] for s in subjects.split() if s in cells) for i in (0, 1)]
            for domain, subjects in DOMAINS.items()
        }
        drawn = [answer.id for answer in answers if answer.notes["drawn from"]]
        without = Answers(answer for answer in answers if not answer.notes["drawn from"]).earned
        return {
            "correct": answers.earned,
            "domains": rates(domains),
            "domain_counts": domains,
            "random_fallbacks": len(drawn),
            "fallback_ids": drawn,
            "correct_not_counting_fallback": without,
            "score_not_counting_fallback": ratio(without, len(answers)),
        }

    def submission(self, rows: Sequence[Row]) -> Any:
        """What `main_parse_and_eval.py` reads."""
        return [
            {
                "id": row["id"],
                "question_type": row["truth"]["question_type"],
                "answer": row["gold"],
                "all_choices": list(LETTERS[: len(row["options"])]),
                "index2ans": dict(zip(LETTERS, row["options"], strict=False)),
                "response": row["text"],
            }
            for row in rows
        ]


def _right(answer: Answer) -> str | list[str]:
    return answer.value("ground_truth", "answer")


def _options(answer: Answer) -> dict[str, str]:
    """Letter -> option text, from the prediction row or the annotation."""
    for source in (answer.row, answer.item):
        if source.get("index2ans"):
            return {letter: as_text(text) for letter, text in source["index2ans"].items()}
        if source.get("options"):
            return dict(zip(LETTERS, map(as_text, source["options"]), strict=False))
    raise PredictionError(f"{answer.where}: raw responses need `options` or `index2ans`, here or there")


def _gold(value: Any, kind: str) -> str | list[str]:
    """Open questions may have several right answers, stored as the text of a list."""
    text = str(value)
    if kind != CHOICE and text.startswith("["):
        try:
            return [str(answer) for answer in ast.literal_eval(text)]
        except (ValueError, SyntaxError):
            return text  # an interval or a vector is one answer
    return text
