"""Reading and strict checking of LLaVA-format data: a JSON list (or JSON lines) beside an image folder.

One sample, as the LLaVA authors publish their data (LLaVA README; paper "Visual Instruction Tuning" sec. 3)::

    {"id": "000000033471",
     "image": "coco/train2017/000000033471.jpg",          # or a list of paths; or absent: text only
     "conversations": [{"from": "human", "value": "<image>\\nWhat colour is the bus?"},
                       {"from": "gpt", "value": "White and red."}]}

A video is a path (or a list) under `video`, of a file or of a folder of frames, and a `<video>` in the human turns.

Rules, each with its own error: every sample has a unique id, human and gpt turns alternate and start with
human (a system turn may come before), no answer is empty, the human turns hold exactly one `<image>` per image, image
paths stay inside the image folder, and every text can be written as UTF-8. Other forms of turns are in `sample_keys`.
Keys that name a medium which is not read (`audio`, `images`, ...) are errors, further keys (such as `model`) are
ignored. `read_records` stops at the first problem; `iter_problems` yields all of them, for `mllm-jax validate`.
"""

import dataclasses
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

from mllm_jax.data.conversations import IMAGE, SampleError, parse_turns
from mllm_jax.data.reading import DataError, is_safe_name, read_json_rows
from mllm_jax.data.sample_keys import media_problems, place_videos, turns_of

ROLES = ("human", "gpt")
UNSKIPPABLE = ("duplicate-id", "unreadable-file")  # kinds of problems that do not lie in one sample alone

DuplicateIds = Literal["error", "number"]
Json = Any


@dataclasses.dataclass(frozen=True)
class Problem:
    """One thing wrong with a data set.

    Attributes:
      kind: a short name to group by, for example `duplicate-id`.
      sample: the sample's id, or `#12` (position in the file, from 0) when it has no usable id; "" if the
        file as a whole is wrong.
      message: what is wrong and what to do about it.
    """

    kind: str
    sample: str
    message: str

    def describe(self, path: str | Path) -> str:
        """The problem as one line that starts with the file and the sample."""
        where = f"{path}: sample {self.sample!r}: " if self.sample else f"{path}: "
        return where + self.message


@dataclasses.dataclass(frozen=True)
class Scanned:
    """What was found out about one entry of a data file.

    Attributes:
      sample: its id, or `#12` as in `Problem`.
      images: those of its paths of images and videos that are sound; files that exist if an image folder was given.
      videos: those of them that are videos.
      record: the sample, if nothing is wrong with it.
      problems: what is wrong with it; empty exactly if there is a record.
    """

    sample: str
    images: tuple[str, ...]
    videos: frozenset[str]
    record: "Record | None"
    problems: tuple[Problem, ...]

    @property
    def skippable(self) -> bool:
        """Whether leaving the sample out would leave a sound data set."""
        return not any(problem.kind in UNSKIPPABLE for problem in self.problems)


@dataclasses.dataclass(frozen=True)
class Record:
    """A checked sample whose images and videos are still paths, relative to the image folder.

    Attributes:
      id: unique in its file.
      images: paths of images and videos, in the order of their `<image>` in the conversation.
      conversations: turns in LLaVA's form; `<image>` stands for a video, too.
      videos: which of `images` are videos.
    """

    id: str
    images: tuple[str, ...]
    conversations: tuple[dict[str, str], ...]
    videos: tuple[int, ...] = ()


def load_entries(path: str | Path) -> list[Json]:
    """Reads the entries of a `.json` list or a `.jsonl` file without checking them.

    Raises:
      DataError: for a missing file, text that is not UTF-8, invalid JSON or a JSON value that is not a list.
    """
    entries = read_json_rows(path)
    if not isinstance(entries, list):
        raise DataError(f"{path}: expected a JSON list of samples, found {_type_name(entries)}")
    return entries


def read_records(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    duplicate_ids: DuplicateIds = "error",
    compat: str | None = None,
) -> list[Record]:
    """Reads and checks a data file.

    Args:
      path: `.json` or `.jsonl` file.
      image_root: when given, every image file must exist below it.
      duplicate_ids: "error", or "number" to keep samples that share an id apart as `id`, `id#2`, `id#3`
        (LLaVA's own instruction mixture repeats ids, once per kind of conversation about an image).
      compat: "llava" accepts what LLaVA accepts (see `conversations.parse_turns`): a first turn that is not
        from human, several `<image>` in a turn for one image, an `<image>` without an image as text.

    Raises:
      DataError: on the first problem, naming file and sample.
    """
    records = []
    for entry in scan(path, image_root, duplicate_ids=duplicate_ids, compat=compat):
        if entry.record is None:
            raise DataError(entry.problems[0].describe(path))
        records.append(entry.record)
    return records


def iter_problems(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    duplicate_ids: DuplicateIds = "error",
    compat: str | None = None,
) -> Iterator[Problem]:
    """Yields every problem of a data file, reading on after each one. Arguments as in `read_records`."""
    for entry in scan(path, image_root, duplicate_ids=duplicate_ids, compat=compat):
        yield from entry.problems


def scan(
    path: str | Path,
    image_root: str | Path | None = None,
    *,
    duplicate_ids: DuplicateIds = "error",
    compat: str | None = None,
) -> Iterator[Scanned]:
    """Yields what there is to say about each sample, in file order. Arguments as in `read_records`.

    A file that cannot be read at all yields one nameless entry with the reason.
    """
    root = None if image_root is None else Path(image_root)
    try:
        entries = load_entries(path)
        if root is not None and not root.is_dir():
            raise DataError(f"{path}: the image folder {root} does not exist")
        if not entries:
            raise DataError(f"{path}: holds no samples")
    except DataError as error:
        problem = Problem("unreadable-file", "", str(error).removeprefix(f"{path}: "))
        yield Scanned("", (), frozenset(), None, (problem,))
        return
    seen: dict[str, int] = {}
    for index, entry in enumerate(entries):
        name = _name(entry, index)
        shown = {kind: _paths(entry, kind) or () for kind in ("image", "video")}
        bad = {
            path: list(_path_problems(kind, path, name, root))
            for kind, paths in shown.items()
            for path in paths
        }
        turns, images, videos, problems = _read_entry(entry, name, compat)
        problems += [problem for found in bad.values() for problem in found]
        sample_id = _usable_id(entry)
        if sample_id is not None:
            sample_id, duplicate = _settle_id(sample_id, index, seen, duplicate_ids)
            problems += duplicate
        record = None
        if not problems:
            kept = tuple({"from": turn["from"], "value": turn["value"]} for turn in turns)
            record = Record(sample_id, images, kept, videos)
        readable = tuple(path for path in (*shown["image"], *shown["video"]) if not bad[path])
        yield Scanned(sample_id or name, readable, frozenset(shown["video"]), record, tuple(problems))


def entry_problems(entry: Json, name: str) -> list[Problem]:
    """What is wrong with one entry, apart from its files and from other entries with its id.

    Args:
      name: what the problems call it.
    """
    return _read_entry(entry, name, None)[3]


def _settle_id(
    sample_id: str, index: int, seen: dict[str, int], duplicate_ids: DuplicateIds
) -> tuple[str, list[Problem]]:
    """The sample's final id, and the problem if another sample has it; notes it in `seen`."""
    times = seen[sample_id] = seen.get(sample_id, 0) + 1
    if times == 1:
        return sample_id, []
    if duplicate_ids == "error":
        message = (
            f"the id occurs more than once (again at entry #{index}); make ids unique, or set the "
            "source's duplicate_ids=number (validate: --duplicate-ids number) to have repeats numbered id#2, id#3"
        )
        return sample_id, [Problem("duplicate-id", sample_id, message)]
    sample_id = f"{sample_id}#{times}"
    if sample_id in seen:
        return sample_id, [Problem("duplicate-id", sample_id, "numbering repeats made this id twice")]
    seen[sample_id] = 1
    return sample_id, []


def _name(entry: Json, index: int) -> str:
    sample_id = _usable_id(entry)
    return f"#{index}" if sample_id is None else sample_id


def _read_entry(
    entry: Json, name: str, compat: str | None
) -> tuple[Json, tuple[str, ...], tuple[int, ...], list[Problem]]:
    """The turns of one entry, its paths in the turns' order, which of them are videos, and its problems.

    Problems of image files and those with other entries are not among them.
    """
    if not isinstance(entry, dict):
        return None, (), (), [Problem("wrong-type", name, f"expected an object, found {_type_name(entry)}")]
    turns, fault = turns_of(entry)
    images, videos = _paths(entry, "image"), _paths(entry, "video")
    paths, places, misplaced = images or (), (), ""
    if videos and images is not None and not fault and not list(_shape_problems(turns, name)):
        turns, paths, places, misplaced = place_videos(turns, images, videos, compat)
    count = None if None in (images, videos) or misplaced else len(paths)
    problems = list(_entry_problems(entry, turns, name, compat, fault, count))
    if misplaced:
        problems.append(Problem("image-count", name, misplaced))
    said = (
        [turn.get(key) for turn in turns if isinstance(turn, dict) for key in ("from", "value")]
        if isinstance(turns, list)
        else []
    )
    if any(_is_broken(text) for text in [name, *said] if isinstance(text, str)):
        problems.append(
            Problem("text", name, "holds half a character (a lone surrogate such as \\ud83d); mend it")
        )
    return turns, tuple(paths), places, problems


def _is_broken(text: str) -> bool:
    """Whether a text cannot be written as UTF-8: JSON may hold halves of surrogate pairs."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return True
    return False


def _entry_problems(
    entry: dict[str, Json], turns: Json, name: str, compat: str | None, fault: str, count: int | None
) -> Iterator[Problem]:
    if "id" not in entry:
        yield Problem("missing-key", name, "has no 'id'")
    elif _usable_id(entry) is None:
        yield Problem("wrong-type", name, f"'id' must be a non-empty string or integer: {entry['id']!r}")
    for problem in media_problems(entry, videos=True):
        yield Problem("unread-medium", name, problem)
    for kind in ("image", "video"):
        if _paths(entry, kind) is None:
            message = (
                f"{kind!r} must be a path or a list of paths (or be left out for a text-only sample), found "
            )
            yield Problem("wrong-type", name, message + repr(entry[kind])[:80])
    if fault:
        yield Problem("missing-key" if fault.startswith("has no") else "turns", name, fault)
        return
    problems = list(_shape_problems(turns, name))
    if not problems and compat is None:
        problems = list(_turn_problems(turns, name, count))
    if not problems and count is not None:
        try:
            parse_turns(turns, count, sample=name, compat=compat)
        except SampleError as error:
            problems.append(Problem("conversation", name, error.problem))
    yield from problems


def _path_problems(kind: str, path: str, name: str, root: Path | None) -> Iterator[Problem]:
    if _is_broken(path):
        yield Problem(f"{kind}-path", name, f"path {path!r} holds half a character (a lone surrogate)")
    elif not is_safe_name(path):
        yield Problem(f"{kind}-path", name, f"path {path!r} must be relative and stay in the image folder")
    elif root is not None and not _is_there(root / path, kind):
        yield Problem(f"missing-{kind}", name, f"{kind} file {root / path} does not exist")


def _is_there(path: Path, kind: str) -> bool:
    try:
        return path.is_file() or (kind == "video" and path.is_dir())  # a folder of frames
    except OSError:  # a name too long for the file system
        return False


def _shape_problems(turns: Json, name: str) -> Iterator[Problem]:
    if not isinstance(turns, list) or not turns:
        yield Problem(
            "wrong-type", name, f"'conversations' must be a non-empty list, not {_type_name(turns)}"
        )
        return
    for number, turn in enumerate(turns):
        if not isinstance(turn, dict) or not {"from", "value"} <= turn.keys():
            yield Problem("missing-key", name, f"turn {number} must be an object with 'from' and 'value'")
        elif not isinstance(turn["from"], str) or not isinstance(turn["value"], str):
            yield Problem("wrong-type", name, f"turn {number}: 'from' and 'value' must be strings")


def _turn_problems(turns: list[dict[str, str]], name: str, images: int | None) -> Iterator[Problem]:
    first = int(turns[0]["from"] == "system")
    for number, turn in enumerate(turns[first:], first):
        expected = ROLES[(number - first) % 2]
        if turn["from"] != expected:
            message = f"turn {number} is from {turn['from']!r} where {expected!r} must speak: "
            yield Problem("roles", name, message + "human and gpt alternate, human first (or a system turn)")
            break
    else:
        if (len(turns) - first) % 2:
            yield Problem("roles", name, "the last human turn has no answer from gpt")
    for number, turn in enumerate(turns):
        if not turn["value"].strip():
            kind = {"gpt": "answer", "system": "system turn"}.get(turn["from"], "question")
            yield Problem(f"empty-{kind.replace(' ', '-')}", name, f"turn {number}: the {kind} is empty")
        if turn["from"] == "gpt" and IMAGE in turn["value"]:
            yield Problem("image-count", name, f"turn {number}: {IMAGE} in an answer")
    tags = sum(turn["value"].count(IMAGE) for turn in turns if turn["from"] == "human")
    if images is not None and tags != images:
        message = f"{tags} {IMAGE} in the human turns but {images} image{'s' * (images != 1)}"
        yield Problem("image-count", name, message)


def _usable_id(entry: Json) -> str | None:
    value = entry.get("id") if isinstance(entry, dict) else None
    if isinstance(value, bool) or not isinstance(value, (str, int)) or value == "":
        return None
    return str(value)


def _paths(entry: Json, kind: str) -> Sequence[str] | None:
    """The paths of a sample's images or videos; empty where it has none; None when the value is not paths."""
    value = entry.get(kind) if isinstance(entry, dict) else None
    if kind == "video" and value == "":  # as the other keys of media (`media_problems`)
        value = None
    paths = [] if value is None else [value] if isinstance(value, str) else value
    if not isinstance(paths, list) or not all(isinstance(path, str) and path for path in paths):
        return None
    return paths


def _type_name(value: Json) -> str:
    names = {dict: "an object", list: "an empty list", str: "a string", bool: "a boolean", type(None): "null"}
    return names.get(type(value), "a number")
