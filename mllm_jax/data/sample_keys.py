"""The forms in which people write a sample's conversation and media, brought to LLaVA's.

Beside `conversations` of `{"from", "value"}` turns: `messages` (or `conversations`) of `{"role", "content"}` turns as
chat APIs take them, and a system text under a key of its own. A medium that is named and not read is a fault: the
sample must not become one without it.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mllm_jax.data.conversations import IMAGE, VIDEO

Json = Any
Turns = list[dict[str, str]]

TURNS = ("conversations", "messages")
SYSTEM = ("system", "system_prompt")
# Where other programs' data name what is shown; only `image` is read here, and `video` in training data.
MEDIA = (
    "images",
    "image_path",
    "image_paths",
    "img",
    "picture",
    "pictures",
    "video",
    "videos",
    "video_path",
    "audio",
    "audios",
    "audio_path",
    "sound",
    "speech",
    "media",
)
_TAGS = {"image": IMAGE, "video": VIDEO}
_ROLES = {"user": "human", "assistant": "gpt", "system": "system"}


def benchmark_for(rows: Any) -> str | None:
    """Which of the benchmarks for a user's own data rows are questions of; None if they are training data.

    Example:
        >>> benchmark_for([{"question_id": "1", "question": "What?", "answer": "bus"}])
        'vqa'
    """
    first = rows[0] if isinstance(rows, list) and rows else None
    if not isinstance(first, dict) or any(key in first for key in TURNS):
        return None
    if "question" in first and "answer" in first:
        return "mini" if "options" in first else "vqa"
    return "caption" if "captions" in first else None


def media_problems(entry: Mapping[str, Json], videos: bool = False) -> Iterator[str]:
    """What is wrong with keys that name media.

    Args:
      videos: whether `video` is read.
    """
    for key in MEDIA:
        if entry.get(key) not in (None, "", []) and not (videos and key == "video"):
            known = "image paths belong under 'image', with one <image> for each in the human turns"
            if videos:
                known += ", and videos under 'video', with one <video> for each"
            yield f"the key {key!r} names a medium that is not read: {known}; leave the sample out, or take the key out"


def turns_of(entry: Mapping[str, Json]) -> tuple[Json, str]:
    """The turns of a sample in LLaVA's form, and what is wrong with the form that they were given in ("" = nothing).

    Turns that are neither LLaVA's nor a chat API's are returned as they are.
    """
    given = [key for key in TURNS if key in entry]
    if not given:
        return None, f"has no 'conversations' (keys: {', '.join(map(str, entry))})"
    if len(given) > 1:
        return None, "has 'conversations' and 'messages'; only one of them can be the sample's turns"
    turns: Json = entry[given[0]]
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and "role" in turn for turn in turns):
        converted: Turns = []
        shown = dict.fromkeys(_TAGS, 0)
        for number, message in enumerate(turns):
            problem, turn = _from_message(message, shown)
            if problem:
                return None, f"turn {number}: {problem}"
            converted.append(turn)
        turns = converted
    texts = {key: entry[key] for key in SYSTEM if entry.get(key) not in (None, "")}
    if texts and isinstance(turns, list):
        key, text = next(iter(texts.items()))
        if len(texts) > 1 or any(isinstance(turn, dict) and turn.get("from") == "system" for turn in turns):
            return None, f"has more than one system text ({key!r} is one of them)"
        if not isinstance(text, str):
            return None, f"{key!r} must be a string"
        turns = [{"from": "system", "value": text}, *turns]
    return turns, ""


def _from_message(message: Mapping[str, Json], shown: dict[str, int]) -> tuple[str, dict[str, str]]:
    """What is wrong with a `{"role", "content"}` message, and the turn that it is.

    Args:
      shown: how many images and videos the messages before it show; those of this one are added.
    """
    role, content = message["role"], message.get("content")
    if not isinstance(role, str) or role not in _ROLES:
        return f"'role' {role!r} is none of {', '.join(map(repr, _ROLES))}", {}
    if isinstance(content, list):
        pieces = []
        for part in content:
            kind = part.get("type") if isinstance(part, dict) else None
            if kind == "text" and isinstance(part.get("text"), str):
                pieces.append(part["text"])
            elif kind in _TAGS and set(part) <= {"type", "text", "index"}:
                if part.get("index") not in (None, shown[kind]):
                    return (
                        f"shows the {kind} of index {part['index']} where {shown[kind]} is due; bring them in order",
                        {},
                    )
                shown[kind] += 1
                pieces.append(_TAGS[kind])
            elif kind in _TAGS:
                return f"the path of this {kind} belongs under the sample's {kind!r}, in their order", {}
            else:
                return f"a part of the content is no text, image or video: {str(part)[:80]}", {}
        content = "".join(pieces)
    if not isinstance(content, str):
        return "'content' must be a string or a list of texts and images", {}
    return "", {"from": _ROLES[role], "value": content}


def place_videos(
    turns: Turns, images: Sequence[str], videos: Sequence[str], compat: str | None
) -> tuple[Turns, tuple[str, ...], tuple[int, ...], str]:
    """Turns with videos in the form that images have: an `<image>` for each of them.

    Where a sample shows videos alone, `<image>` and `<video>` in its human turns both stand for the next video;
    otherwise each stands for the next of its kind.

    Args:
      turns: in LLaVA's form.
      images, videos: their paths.
      compat: "llava" puts tags where LLaVA does, if there are videos alone (`conversations.parse_turns`).

    Returns:
      The turns; the paths of images and videos in the order in which they stand there; which of these are videos; and
      what is wrong ("" = nothing).
    """
    said = [turn["value"] for turn in turns if turn["from"] == "human"]
    tags = [tag for text in said for tag in re.findall(f"{IMAGE}|{VIDEO}", text)]
    written = [{**turn, "value": turn["value"].replace(VIDEO, IMAGE)} for turn in turns]
    if not images:
        fault = f"{len(tags)} {VIDEO} in the human turns but {len(videos)} under 'video'"
        good = len(tags) == len(videos) or compat == "llava"
        return written, tuple(videos), tuple(range(len(videos))), "" if good else fault
    left = {IMAGE: list(images), VIDEO: list(videos)}
    for tag, paths in left.items():
        if tags.count(tag) != len(paths):
            fault = f"{tags.count(tag)} {tag} in the human turns but {len(paths)} under {tag[1:-1]!r}"
            return written, (*images, *videos), (), fault
    order = tuple(left[tag].pop(0) for tag in tags)
    return written, order, tuple(place for place, tag in enumerate(tags) if tag == VIDEO), ""
