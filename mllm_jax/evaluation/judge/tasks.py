"""What each judged benchmark asks a GPT model, and how its replies are read.

The prompts are worded by this project from the published descriptions of the tasks; scores depend on
the wording and on the judge's version, so both are recorded. `--prompt FILE` replaces a prompt by the
official text: the fields in braces of `user` below are filled in.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from mllm_jax.evaluation.benchmarks.llava_bench import FAILED, parse_review
from mllm_jax.evaluation.benchmarks.mathvista import quick_extraction, rows_of
from mllm_jax.evaluation.benchmarks.video_qa import ASPECTS, parse_judgement, read_score
from mllm_jax.evaluation.predictions import (
    PredictionError,
    Problems,
    as_map,
    as_text,
    by_id,
    match_ids,
    read_annotation_rows,
    read_annotations,
    read_json,
    read_rows,
    take,
)

Fields = dict[str, str]
Item = tuple[str, Fields, dict[str, Any]]  # id, prompt fields, what the stored judgement keeps


@dataclasses.dataclass(frozen=True)
class JudgeTask:
    """One kind of judgement.

    Attributes:
        name: the benchmark; for the Video-ChatGPT scores with the aspect, `video_chatgpt.correctness`.
        model: the judge of the published numbers, as the request's default.
        temperature: of the published protocol; None leaves the endpoint's default.
        max_tokens: most tokens of a reply.
        reply_tokens: a typical reply's length, for the cost estimate.
        system: the system message.
        user: the user message with fields in braces.
        items: (predictions, annotations, problems) -> the questions to judge.
        parse: a reply -> the judgement, or None if it cannot be read.
    """

    name: str
    model: str
    temperature: float | None
    max_tokens: int
    reply_tokens: int
    system: str
    user: str
    items: Callable[[Path, Path | None, Problems], Iterator[Item]]
    parse: Callable[[str], Any]

    def messages(self, fields: Mapping[str, str], user: str | None = None) -> list[dict[str, str]]:
        """The chat messages of one question; `user` replaces the task's own user message."""
        text = self.user if user is None else user
        # One pass, so that braces inside an answer are never taken for a field.
        parts, out = text.split("{"), []
        for i, part in enumerate(parts):
            name, brace, rest = part.partition("}")
            if i and brace and name in fields:
                out.append(fields[name] + rest)
            else:
                out.append(part if i == 0 else "{" + part)
        system = [{"role": "system", "content": self.system}] if self.system else []
        return [*system, {"role": "user", "content": "".join(out)}]


def _need(annotations: Path | None, what: str) -> Path:
    if annotations is None:
        raise ValueError(f"--annotations is needed: {what}")
    return annotations


# --- MM-Vet -------------------------------------------------------------------------------------------------


def _mm_vet_items(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Item]:
    gold = read_annotations(_need(annotations, "mm-vet.json"))
    said = read_json(predictions, problems)
    if as_map(said, ("question_id",)) is not None:
        rows = [{"id": key, "text": text} for key, text in said.items()]
    else:  # LLaVA's answer file, before its conversion
        rows = [
            {"id": f"v1_{take(row, ('question_id',), str(predictions))}", "text": row.get("text")}
            for row in (said if isinstance(said, list) else [said])
        ]
    found = match_ids(rows, gold, lambda r: r["id"], lambda r: r["text"], problems)
    for key, row in found.items():
        truth = as_text(take(gold[key], ("answer",), f"{annotations}: {key}"))
        fields = {
            "question": as_text(take(gold[key], ("question",), f"{annotations}: {key}")),
            "answer": truth,
            "prediction": as_text(row["text"]),
        }
        yield key, fields, {}


def _parse_grade(reply: str) -> float | None:
    words = reply.split()
    try:
        grade = float(words[0]) if words else -1.0
    except ValueError:
        return None
    return grade if 0 <= grade <= 1 else None


_MM_VET = """Grade how correct a prediction is, from 0.0 (wrong) to 1.0 (entirely correct) in steps of 0.1.
<AND> in the ground truth means that every part is required, <OR> that any one part is enough.
A partly correct prediction earns the share of the required parts that it has. Reply with the number only.

Question | Ground truth | Prediction | Grade
--- | --- | --- | ---
How many cups are on the table? | 3 | There are four cups. | 0.0
How many cups are on the table? | 3 | three | 1.0
Which fruits are in the bowl? | apple <AND> pear | I can see an apple. | 0.5
Which fruits are in the bowl? | apple <AND> pear | A pear next to an apple. | 1.0
What is the animal? | cat <OR> kitten | It is a small kitten. | 1.0
{question} | {answer} | {prediction} |"""

# --- LLaVA-Bench --------------------------------------------------------------------------------------------


def _llava_bench_items(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Item]:
    folder = _need(annotations, "the folder with questions.jsonl, context.jsonl and answers_gpt4.jsonl")
    files = [folder / name for name in ("questions.jsonl", "context.jsonl", "answers_gpt4.jsonl")]
    questions, contexts, references = (read_annotation_rows(path) for path in files)
    asked = by_id(questions, ("question_id",), files[0])
    caption_of = {
        take(row, ("image",), str(files[1])): take(row, ("caption",), str(files[1])) for row in contexts
    }
    reference = by_id(references, ("question_id",), files[2])
    found = match_ids(
        read_rows(predictions, problems),
        asked,
        lambda r: str(take(r, ("question_id",), str(predictions))),
        lambda r: take(r, ("text",), str(predictions)),
        problems,
    )
    for key, row in found.items():
        question = asked[key]
        image = take(question, ("image",), f"{files[0]}: {key}")
        if key not in reference or image not in caption_of:
            raise PredictionError(f"{folder}: question {key} has no reference answer or no context")
        context = caption_of[image]
        fields = {
            "context": "\n".join(context) if isinstance(context, list) else as_text(context),
            "question": as_text(take(question, ("text",), f"{files[0]}: {key}")),
            "reference": as_text(take(reference[key], ("text",), f"{files[2]}: {key}")),
            "prediction": as_text(row["text"]),
        }
        category = as_text(take(question, ("category",), f"{files[0]}: {key}"))
        yield key, fields, {"category": category if "llava_bench" in category else f"llava_bench_{category}"}


_LLAVA_BENCH = """[Context]
{context}

[Question]
{question}

[Assistant 1]
{reference}

[End of Assistant 1]

[Assistant 2]
{prediction}

[End of Assistant 2]

[System]
Two assistants answered a question about a picture that you know only through the context above. Rate the
helpfulness, relevance, accuracy and level of detail of each answer from 1 to 10; higher is better. Write the
two scores, for Assistant 1 and Assistant 2 in this order and separated by one space, on the first line and
nothing else on it. Then explain the scores without favour to either and without regard to their order."""


def _parse_llava(reply: str) -> str | None:
    return None if parse_review(reply) == FAILED else reply


# --- MathVista ----------------------------------------------------------------------------------------------


def _mathvista_items(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Item]:
    rows = rows_of(read_json(predictions, problems))
    gold = None
    if annotations is not None:
        gold = by_id(rows_of(read_annotations(annotations)), ("pid", "question_id"), annotations)
    found = match_ids(
        rows,
        gold,
        lambda r: str(take(r, ("pid", "question_id"), str(predictions))),
        lambda r: r.get("response", r.get("text")),
        problems,
    )
    for key, row in found.items():
        item = {**row, **(gold[key] if gold is not None else {})}
        response = as_text(take(row, ("response", "text"), f"{predictions}: {key}")).strip()
        if quick_extraction(response, item) is None:
            query = as_text(item.get("query") or take(item, ("question",), f"{predictions}: {key}"))
            yield key, {"query": query, "response": response}, {}


_MATHVISTA = """Extract the final answer from a model's response. Reply with the answer alone: a letter for
multiple choice, otherwise a number or a Python list in the form that the hint asks for. Reply with nothing if
there is none.

Hint: an integer is required.
Question: How many blue boxes are there?
Response: Counting row by row I find 3 and 4, so 7 boxes in total.
Extracted answer: 7

Hint: a number with one decimal place is required.
Question: What is the mean of the bars?
Response: The mean is (1.0 + 1.8) / 2, that is 1.4 units.
Extracted answer: 1.4

Hint: the letter of an option is required.
Question: Which line is longest? Choices: (A) red (B) green
Response: The green line reaches furthest, hence (B).
Extracted answer: B

Hint: a Python list is required.
Question: Between which years did sales fall most?
Response: They fell most from 2005 to 2009.
Extracted answer: [2005, 2009]

{query}
Response: {response}
Extracted answer:"""

# --- Video --------------------------------------------------------------------------------------------------


def _video_items(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Item]:
    ids = None
    if annotations is not None:
        ids = list(by_id(read_annotation_rows(annotations), ("question_id", "id"), annotations))
    found = match_ids(
        read_rows(predictions, problems),
        ids,
        lambda r: str(take(r, ("id", "question_id"), str(predictions))),
        lambda r: take(r, ("pred", "text"), str(predictions)),
        problems,
    )
    for key, row in found.items():
        fields = {
            "question": as_text(take(row, ("question",), f"{predictions}: {key}")),
            "answer": as_text(take(row, ("answer",), f"{predictions}: {key}")),
            "prediction": as_text(take(row, ("pred", "text"), f"{predictions}: {key}")),
        }
        yield key, fields, {}


def _parse_video(reply: str) -> dict[str, Any] | None:
    judgement = parse_judgement(reply)
    return judgement if read_score(judgement) is not None else None


_VIDEO_SYSTEM = (
    "You judge answers to questions about videos. Compare the predicted answer with the correct one: they "
    "match if they mean the same; synonyms and paraphrases are fine."
)
_VIDEO = """Question: {question}
Correct answer: {answer}
Predicted answer: {prediction}

Does the prediction match? Reply only with a Python dict: the key 'pred' with 'yes' or 'no', and the key
'score' with an integer from 0 to 5, 5 for the best match, for example {'pred': 'no', 'score': 1}."""

_ASPECT_FILES = {
    "correctness": "generic_qa",
    "detail": "generic_qa",
    "context": "generic_qa",
    "temporal": "temporal_qa",
    "consistency": "consistency_qa",
}
_ASPECT_RULES = {
    "correctness": "how factually accurate the prediction is against the correct answer, without misreadings",
    "detail": "how complete and how specific the prediction is, compared with the correct answer",
    "context": "how well the prediction fits the overall context and the main themes of the video",
    "temporal": "whether the prediction gets the order of events in the video right",
    "consistency": "whether the two predictions agree with each other and with the correct answer",
}
_ASPECT_REPLY = """
Reply only with a Python dict: the key 'score' with an integer from 0 to 5, 5 for the best, for example
{'score': 3}."""
_ASPECT = f"""Question: {{question}}
Correct answer: {{answer}}
Predicted answer: {{prediction}}
{_ASPECT_REPLY}"""
_ASPECT_TWO = f"""Question 1: {{question}}
Question 2: {{question2}}
Correct answer: {{answer}}
Predicted answer to question 1: {{prediction}}
Predicted answer to question 2: {{prediction2}}
{_ASPECT_REPLY}"""


def _aspect_items(aspect: str) -> Callable[[Path, Path | None, Problems], Iterator[Item]]:
    def items(predictions: Path, annotations: Path | None, problems: Problems) -> Iterator[Item]:
        stem = _ASPECT_FILES[aspect]
        places = [predictions / f"{stem}{suffix}" for suffix in (".jsonl", ".json")]
        path = next((place for place in places if place.is_file()), None)
        if path is None:
            raise PredictionError(f"{predictions}: no {stem}.jsonl (or .json) with the model's answers")
        for number, row in enumerate(read_rows(path, problems)):
            where = f"{path}: row {number}"
            fields = {"answer": as_text(take(row, ("A",), where))}
            names = {"question": "Q", "prediction": "pred"}
            if aspect == "consistency":
                names = {"question": "Q1", "question2": "Q2", "prediction": "pred1", "prediction2": "pred2"}
            fields |= {field: as_text(take(row, (key,), where)) for field, key in names.items()}
            yield f"{take(row, ('video_name',), where)}_{number}", fields, {}

    return items


def _aspect_task(aspect: str) -> JudgeTask:
    return JudgeTask(
        name=f"video_chatgpt.{aspect}",
        model="gpt-3.5-turbo",
        temperature=None,
        max_tokens=64,
        reply_tokens=12,
        system=f"You judge answers to questions about videos. Judge {_ASPECT_RULES[aspect]}.",
        user=_ASPECT_TWO if aspect == "consistency" else _ASPECT,
        items=_aspect_items(aspect),
        parse=_parse_video,
    )


def _video_task(name: str) -> JudgeTask:
    return JudgeTask(
        name, "gpt-3.5-turbo-0125", None, 64, 16, _VIDEO_SYSTEM, _VIDEO, _video_items, _parse_video
    )


TASKS: dict[str, list[JudgeTask]] = {
    "mm_vet": [
        JudgeTask("mm_vet", "gpt-4-0613", 0.0, 8, 3, "", _MM_VET, _mm_vet_items, _parse_grade),
    ],
    "llava_bench": [
        JudgeTask(
            "llava_bench",
            "gpt-4-0314",
            0.2,
            1024,
            200,
            "You check the quality of answers carefully and impartially.",
            _LLAVA_BENCH,
            _llava_bench_items,
            _parse_llava,
        ),
    ],
    "mathvista": [
        JudgeTask("mathvista", "gpt-4-0613", 0.0, 256, 8, "", _MATHVISTA, _mathvista_items, str.strip),
    ],
    "msvd_qa": [_video_task("msvd_qa")],
    "msrvtt_qa": [_video_task("msrvtt_qa")],
    "activitynet_qa": [_video_task("activitynet_qa")],
    "video_chatgpt": [_aspect_task(aspect) for aspect in ASPECTS.values()],
}
