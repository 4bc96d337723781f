"""Rows of other people's data sets become LLaVA conversations, whose images are not stored yet."""

import collections
import dataclasses
import html
import re
from collections.abc import Callable, Iterator, Mapping

from mllm_jax.data.conversations import IMAGE, VIDEO
from mllm_jax.data.foreign.layouts import NEEDS, Json, Layout, Row
from mllm_jax.data.foreign.report import Dropped
from mllm_jax.data.sample_keys import media_problems

Turns = list[dict[str, str]]

_ROLE, _SAID = ("from", "role"), ("value", "content", "text")  # keys of turns
_ROLES = {
    **dict.fromkeys(("human", "user", "prompter"), "human"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "model", "bot", "bing", "bard"), "gpt"),
    "system": "system",
}
_MARKS = re.compile(f"{IMAGE}|{VIDEO}")
_ESCAPE = re.compile(r"&(?:[a-zA-Z]{2,31}|#\d{1,7}|#[xX][0-9a-fA-F]{1,6});")


@dataclasses.dataclass(frozen=True)
class Style:
    """How conversations are written.

    Attributes:
      closing: a last line for questions of question and answer columns; "" for none.
      caption_prompt: the question to which a caption is the answer.
      system: "keep" the system text, or "drop" it.
      html: "keep" escapes such as `&amp;`, or "unescape" them.
    """

    closing: str = ""
    caption_prompt: str = "Describe the image briefly."
    system: str = "keep"
    html: str = "keep"


@dataclasses.dataclass(frozen=True)
class Draft:
    """A sample before its images are stored.

    Attributes:
      suffix: of its id, where an entry makes several samples.
      turns: in LLaVA's form.
      images, videos: what is known of each: bytes, {"bytes", "path"}, a path or a data URI.
      changed: kinds of `report.CHANGED`.
      unread: what turns hold that is not read, as `conversations[].weight`.
    """

    suffix: str
    turns: Turns
    images: tuple[Json, ...]
    videos: tuple[Json, ...]
    changed: tuple[str, ...]
    unread: tuple[str, ...] = ()


def drafts(layout: Layout, row: Row, style: Style) -> Iterator[Draft]:
    """The samples of a row; their text-only checks come later (`llava_json.entry_problems`).

    Raises:
      Dropped: the row is none of this layout, or shows what is not read.
    """
    for field in NEEDS[layout.name]:
        if layout.read(row, field) is None:
            raise Dropped("missing-key", f"has no {' or '.join(map(repr, layout.fields[field]))}")
    for problem in media_problems({key: row[key] for key in row if key not in layout.columns}):
        raise Dropped("unread-medium", problem)
    images, videos = _media(layout.read(row, "image")), _media(layout.read(row, "video"))
    system = layout.read(row, "system")
    for draft in _READERS[layout.name](layout, row, images, videos, style):
        yield _finished(_with_system(draft, system), style)


def _media(value: Json) -> tuple[Json, ...]:
    """The images or videos of a column: one, or a list."""
    if value is None:
        return ()
    return tuple(value) if isinstance(value, (list, tuple)) else (value,)


def _records(value: Json) -> list[Mapping[str, Json]]:
    """A list of objects, also where it is stored as an object of lists (`datasets.Sequence` of a dict).

    Raises:
      Dropped: it is something else.
    """
    if isinstance(value, Mapping) and value and all(isinstance(each, list) for each in value.values()):
        lengths = {len(each) for each in value.values()}
        if len(lengths) == 1:
            value = [dict(zip(value, each, strict=True)) for each in zip(*value.values(), strict=True)]
    if not isinstance(value, list) or not value or not all(isinstance(each, Mapping) for each in value):
        raise Dropped("wrong-type", f"expected a list of objects, found {value!r:.80}")
    return value


def _other(column: str, records: list[Mapping[str, Json]], *known: str) -> tuple[str, ...]:
    """What records of a column hold under other keys than the known ones."""
    keys = (
        key for each in records for key in each if key not in known and each[key] not in (None, "", [], {})
    )
    return tuple(f"{column}[].{key}" for key in dict.fromkeys(keys))


def _first(turn: Mapping[str, Json], *keys: str) -> Json:
    return next((turn[key] for key in keys if turn.get(key) is not None), None)


# ------------------------------------------------------------------------------------------------ conversations
def _conversation(
    layout: Layout, row: Row, images: tuple[Json, ...], videos: tuple[Json, ...], style: Style
) -> Iterator[Draft]:
    turns: Turns = []
    # In the order of their marks; None: the next of a column; a number: that one of it.
    shown: dict[str, list[Json]] = {IMAGE: [], VIDEO: []}
    records = _records(layout.read(row, "turns"))
    for number, turn in enumerate(records):
        role = _first(turn, *_ROLE)
        if not isinstance(role, str) or role.lower() not in _ROLES:
            raise Dropped("turns", f"turn {number} is from {role!r}, who is neither human nor gpt nor system")
        text = _text(_first(turn, *_SAID), shown, number)
        turns.append({"from": _ROLES[role.lower()], "value": text})
    placed = {mark: _filled(shown[mark], own) for mark, own in ((IMAGE, images), (VIDEO, videos))}
    unread = _other(str(layout.column(row, "turns")), records, *_ROLE, *_SAID)
    yield Draft("", turns, placed[IMAGE], placed[VIDEO], (), unread)


def _text(content: Json, shown: dict[str, list[Json]], number: int) -> str:
    """The text of a turn, with a mark where a part of it is an image; notes the images of the marks in `shown`."""
    if isinstance(content, str):
        for mark in _MARKS.findall(content):
            shown[mark].append(None)
        return content
    pieces = []
    for part in _records(content):
        kind = part.get("type")
        if kind in ("text", "input_text", "output_text"):
            pieces.append(_text(_string(part.get("text"), f"the text of turn {number}"), shown, number))
            continue
        mark = next((mark for mark in shown if str(kind).find(mark[1:-1]) >= 0), None)
        if mark is None:
            raise Dropped(
                "unread-medium", f"a part of turn {number} is {kind!r}, neither text nor image nor video"
            )
        payload = _first(part, str(kind), mark[1:-1], f"{mark[1:-1]}_url", "url", "path", "bytes")
        payload = payload.get("url", payload) if isinstance(payload, Mapping) else payload
        shown[mark].append(part.get("index") if payload is None else payload)
        pieces.append(mark)
    return "".join(pieces)


def _filled(shown: list[Json], own: tuple[Json, ...]) -> tuple[Json, ...]:
    """Images in the order of their marks; marks that show nothing themselves take the one of their number, or the next.

    What is left over on either side shows up as a wrong number of marks.

    Raises:
      Dropped: there is none of that number.
    """
    named = {each for each in shown if type(each) is int}
    if missing := named - set(range(len(own))):
        raise Dropped(
            "image-count", f"shows the image of index {min(missing)}, and the column holds {len(own)}"
        )
    rest = iter([each for place, each in enumerate(own) if place not in named])
    taken = []
    for each in shown:
        taken.append(next(rest, None) if each is None else own[each] if type(each) is int else each)
    return (*(each for each in taken if each is not None), *rest)


def _string(value: Json, what: str) -> str:
    if not isinstance(value, str):
        raise Dropped("wrong-type", f"{what} is no text: {value!r:.80}")
    return value


# ------------------------------------------------------------------------------------------------ pairs
def _cauldron(
    layout: Layout, row: Row, images: tuple[Json, ...], videos: tuple[Json, ...], style: Style
) -> Iterator[Draft]:
    turns: Turns = []
    changed = []
    pairs = _records(layout.read(row, "pairs"))
    for number, pair in enumerate(pairs):
        question, answer = pair.get("user"), pair.get("assistant")
        if not all(isinstance(text, str | None) for text in (question, answer)):
            raise Dropped("wrong-type", f"pair {number} is no text: {pair!r:.80}")
        if not (question or "").strip() or not (answer or "").strip():
            changed.append("empty-pair-cut")
            continue
        turns += [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    if not turns:
        raise Dropped("empty-answer", "no pair has both a question and an answer")
    unread = _other(str(layout.column(row, "pairs")), pairs, "user", "assistant")
    yield Draft("", _in_front(turns, images, videos), images, videos, tuple(changed[:1]), unread)


def _vqa(
    layout: Layout, row: Row, images: tuple[Json, ...], videos: tuple[Json, ...], style: Style
) -> Iterator[Draft]:
    question = _string(layout.read(row, "question"), "the question").strip()
    answer, choices = layout.read(row, "answer"), layout.read(row, "choices")
    if choices is not None:
        question, answer = _with_choices(question, answer, choices)
    else:
        answer = _most_frequent(answer)
    question += f"\n{style.closing}" if style.closing else ""
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    yield Draft("", _in_front(turns, images, videos), images, videos, ())


def _most_frequent(answer: Json) -> str:
    """One answer of those that several people gave: the most frequent, of equals the first."""
    if isinstance(answer, Mapping):
        answer = _records(answer)
    answers = answer if isinstance(answer, list) else [answer]
    texts = [each.get("answer") if isinstance(each, Mapping) else each for each in answers]
    texts = [
        str(text) if isinstance(text, (int, float)) and not isinstance(text, bool) else text for text in texts
    ]
    said = [_string(text, "the answer").strip() for text in texts if text is not None]
    if not any(said):
        raise Dropped("empty-answer", "the answer is empty")
    return collections.Counter(text for text in said if text).most_common(1)[0][0]


def _with_choices(question: str, answer: Json, choices: Json) -> tuple[str, str]:
    """A question with lettered choices, and the letter of the right one; the wording is LLaVA's."""
    if (
        not isinstance(choices, list)
        or not all(isinstance(choice, str) for choice in choices)
        or len(choices) > 26
    ):
        raise Dropped("wrong-type", f"the choices are no list of texts: {choices!r:.80}")
    letters = [chr(ord("A") + number) for number in range(len(choices))]
    if isinstance(answer, int) and not isinstance(answer, bool) and 0 <= answer < len(choices):
        letter = letters[answer]
    elif isinstance(answer, str) and answer.strip() in choices:
        letter = letters[choices.index(answer.strip())]
    elif isinstance(answer, str) and answer.strip().upper() in letters:
        letter = answer.strip().upper()
    else:
        raise Dropped("no-choice", f"the answer {answer!r:.80} is none of {choices!r:.200}")
    lines = [question, *(f"{one}. {choice}" for one, choice in zip(letters, choices, strict=True))]
    return "\n".join([*lines, "Answer with the option's letter from the given choices directly."]), letter


def _caption(
    layout: Layout, row: Row, images: tuple[Json, ...], videos: tuple[Json, ...], style: Style
) -> Iterator[Draft]:
    value = layout.read(row, "caption")
    captions = value if isinstance(value, list) else [value]
    texts = [_string(each or "", "a caption").strip() for each in captions]
    if not any(texts):
        raise Dropped("empty-answer", "the caption is empty")
    changed = ("empty-caption-cut",) * (not all(texts))
    for number, text in enumerate(texts):
        if text:
            turns = [{"from": "human", "value": style.caption_prompt}, {"from": "gpt", "value": text}]
            suffix = f"-{number}" if len(texts) > 1 else ""
            yield Draft(suffix, _in_front(turns, images, videos), images, videos, changed)
            changed = ()


_READERS: dict[str, Callable[..., Iterator[Draft]]] = {
    "conversations": _conversation,
    "cauldron": _cauldron,
    "vqa": _vqa,
    "caption": _caption,
}


def _in_front(turns: Turns, images: tuple[Json, ...], videos: tuple[Json, ...]) -> Turns:
    """Turns with images in front of the first question, unless a question says where they stand."""
    if any(_MARKS.search(turn["value"]) for turn in turns if turn["from"] == "human"):
        return turns
    first = next((place for place, turn in enumerate(turns) if turn["from"] == "human"), None)
    marks = f"{IMAGE}\n" * len(images) + f"{VIDEO}\n" * len(videos)
    if first is None or not marks:
        return turns
    return [
        {**turn, "value": marks + turn["value"]} if place == first else turn
        for place, turn in enumerate(turns)
    ]


# ------------------------------------------------------------------------------------------------ all layouts
def _with_system(draft: Draft, system: Json) -> Draft:
    """A draft with the system text that stands beside its turns."""
    if system is None:
        return draft
    if draft.turns[0]["from"] == "system":
        raise Dropped("turns", "has a system turn and a system text beside the turns")
    turn = {"from": "system", "value": _string(system, "the system text")}
    return dataclasses.replace(draft, turns=[turn, *draft.turns])


def _finished(draft: Draft, style: Style) -> Draft:
    """A draft with the rules applied that hold for all layouts."""
    turns, changed = list(draft.turns), list(draft.changed)
    if style.system == "drop" and turns[0]["from"] == "system":
        turns = turns[1:]
        changed.append("system-cut")
    lead = turns[:1] if turns and turns[0]["from"] == "system" else []
    turns = turns[len(lead) :]
    if len(turns) > 1 and turns[0]["from"] == "gpt":
        turns = turns[1:]
        changed.append("first-answer-cut")
    if len(turns) > 1 and turns[-1]["from"] == "human":
        turns = turns[:-1]
        changed.append("last-question-cut")
    turns = lead + turns
    if any(_ESCAPE.search(turn["value"]) for turn in turns):
        plain = [{**turn, "value": _ESCAPE.sub(_character, turn["value"])} for turn in turns]
        if plain != turns:
            changed.append("html-unescaped" if style.html == "unescape" else "html-kept")
            turns = plain if style.html == "unescape" else turns
    marked = _in_front(turns, draft.images, draft.videos)
    if marked is not turns:
        turns = marked
        changed.append("marks-added")
    return dataclasses.replace(draft, turns=turns, changed=tuple(changed))


def _character(escape: re.Match[str]) -> str:
    """What one HTML escape stands for; `html.unescape` of a whole text would also take `&copy=` for one."""
    return html.unescape(escape[0])
