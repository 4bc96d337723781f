"""What a conversion did to the samples that it read: what was left out, what was changed, and by which rule.

Each kind has one rule, which the report spells out. Kinds that `llava_json` finds have the names that it gives them, so
that `mllm-jax validate` and a conversion speak of the same problems.
"""

import collections
import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

FIRST = 10  # samples of a kind that are named

DROPPED = {
    "unreadable-line": "a line of a .jsonl file that is not JSON is left out",
    "missing-key": "an entry without the columns of the layout is left out",
    "wrong-type": "an entry whose columns hold something else than the layout has is left out",
    "turns": "turns of another form or role (tools, functions), or with two system texts, are left out",
    "roles": "human and gpt must alternate, human first; other orders are left out",
    "conversation": "turns that are no conversation are left out",
    "empty-question": "a conversation with an empty question is left out",
    "empty-answer": "a conversation with an empty answer is left out",
    "empty-system-turn": "a conversation with an empty system turn is left out",
    "no-choice": "a question with choices whose answer is none of them is left out",
    "image-count": "as many <image> as images, all in questions; other numbers are left out",
    "missing-image": "a sample that names an image which is not there is left out",
    "unusable-image": "a sample with an image that cannot be decoded, or is too large, is left out",
    "image-path": "a sample whose image would lie outside the image folder is left out",
    "remote-image": "nothing is downloaded; a sample with an image by URL is left out",
    "missing-video": "a sample that names a video which is not there, or is no file, is left out",
    "video-path": "a sample whose video would lie outside the image folder is left out",
    "unread-medium": "a sample with sound, or with another medium that is not read, is left out",
    "text": "text with half a character (a lone surrogate) is left out",
}
CHANGED = {
    "marks-added": "images without any <image> stand in front of the first question",
    "first-answer-cut": "an answer before the first question is cut",
    "last-question-cut": "a question without an answer at the end is cut",
    "empty-pair-cut": "a question-answer pair of which one is empty is cut, where pairs stand for themselves",
    "empty-caption-cut": "of several captions, those that are empty are cut",
    "system-cut": "the system text is cut (--system drop)",
    "html-unescaped": "HTML escapes become the characters that they stand for (--html unescape)",
    "html-kept": "HTML escapes stay as they are (--html keep); the model learns to write them",
    "id-numbered": "ids that come again become id#2, id#3",
    "id-made": "samples without an id are called by their file and number",
}


class Dropped(Exception):
    """A sample that is left out.

    Attributes:
      kind: a key of `DROPPED`.
      message: what is wrong with it.
    """

    def __init__(self, kind: str, message: str):
        super().__init__(kind, message)  # so that it travels between processes
        self.kind, self.message = kind, message


Entry = dict[str, Any] | Dropped  # of a file: a row, or why there is none
Leave = Callable[[str, str, int], None]  # called as `Report.leave` for what is not read


@dataclasses.dataclass
class Tally:
    """How often something happened, to which samples first, and what was said about the first."""

    count: int = 0
    first: list[str] = dataclasses.field(default_factory=list)
    example: str = ""

    def add(self, other: "Tally") -> None:
        """Adds what happened later."""
        self.example = self.example if self.count else other.example
        self.count += other.count
        self.first = [*self.first, *other.first][:FIRST]


def _tallies() -> dict[str, Tally]:
    return collections.defaultdict(Tally)


@dataclasses.dataclass
class Report:
    """What became of the entries of one part of the data, or of all.

    Attributes:
      read: entries.
      written: samples; an entry with several captions makes several.
      images: images that the samples show.
      dropped, changed: kind -> samples.
      unread: names of columns, keys (of turns: `conversations[].weight`) or members that hold something and were not
        read.
    """

    read: int = 0
    written: int = 0
    images: int = 0
    dropped: dict[str, Tally] = dataclasses.field(default_factory=_tallies)
    changed: dict[str, Tally] = dataclasses.field(default_factory=_tallies)
    unread: dict[str, Tally] = dataclasses.field(default_factory=_tallies)

    def drop(self, kind: str, sample: str, message: str) -> None:
        """Notes a sample that is left out."""
        self.dropped[kind].add(Tally(1, [sample], message))

    def change(self, kind: str, sample: str) -> None:
        """Notes a sample that is changed."""
        self.changed[kind].add(Tally(1, [sample]))

    def leave(self, name: str, where: str, count: int = 1) -> None:
        """Notes a column, key or member that is not read."""
        self.unread[name].add(Tally(count, [where]))

    def add(self, other: "Report") -> None:
        """Adds the report of a later part."""
        self.read += other.read
        self.written += other.written
        self.images += other.images
        for mine, theirs in (
            (self.dropped, other.dropped),
            (self.changed, other.changed),
            (self.unread, other.unread),
        ):
            for kind, tally in theirs.items():
                mine[kind].add(tally)

    def to_json(self) -> dict[str, Any]:
        """Everything as JSON values, the most frequent kind first, each with its rule."""

        def kinds(found: Mapping[str, Tally], rules: Mapping[str, str]) -> dict[str, Any]:
            ordered = sorted(found.items(), key=lambda item: -item[1].count)
            return {kind: {"rule": rules[kind], **dataclasses.asdict(tally)} for kind, tally in ordered}

        return {
            "read": self.read,
            "written": self.written,
            "images": self.images,
            "dropped": kinds(self.dropped, DROPPED),
            "changed": kinds(self.changed, CHANGED),
            "unread": {name: {"count": one.count, "first": one.first} for name, one in self.unread.items()},
        }

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "Report":
        """The report that `to_json` wrote."""
        report = cls(values["read"], values["written"], values["images"])
        for name in ("dropped", "changed", "unread"):
            for kind, one in values[name].items():
                getattr(report, name)[kind] = Tally(one["count"], one["first"], one.get("example", ""))
        return report
