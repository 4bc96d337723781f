"""Rows of other people's data sets: which of their columns mean what.

A row is a dict of plain values, whatever file it comes from. The layouts are those of

* LLaVA-OneVision-Data, LLaVA-NeXT-Data, ShareGPT and chat APIs: `conversations` (or `messages`) and `image`;
* the Cauldron and FineVision: `images` and `texts` of {"user", "assistant", "source"};
* visual question answering: `image`, `question`, `answer` or `answers`, perhaps `choices`;
* captions: `image` and `caption` (of WebDataset tars the member `txt`).
"""

import dataclasses
import functools
from collections.abc import Collection, Mapping
from typing import Any

from mllm_jax.data.reading import DataError
from mllm_jax.data.sample_keys import MEDIA

Json = Any
Row = Mapping[str, Json]

# field -> columns that it is read from: of each row the first that holds something
FIELDS: dict[str, tuple[str, ...]] = {
    "id": ("id", "question_id", "questionId", "sample_id", "uid", "__key__"),
    "image": ("image", "images", "image_path", "image_paths", "img", "picture", "pictures"),
    "video": ("video", "videos", "video_path"),
    "turns": ("conversations", "messages", "conversation"),
    "system": ("system", "system_prompt"),
    "pairs": ("texts",),
    "question": ("question", "query"),
    "answer": ("multiple_choice_answer", "answer", "answers", "response"),
    "choices": ("choices", "options"),
    "caption": ("caption", "captions", "txt", "text"),
}
# The columns that a layout cannot do without; the first layout that has them is recognized.
NEEDS: dict[str, tuple[str, ...]] = {
    "conversations": ("turns",),
    "cauldron": ("pairs",),
    "vqa": ("question", "answer"),
    "caption": ("image", "caption"),
}
_OF_ALL = ("id", "image", "video", "system")  # fields of every layout, beside what it needs


@dataclasses.dataclass(frozen=True)
class Layout:
    """What a data set's columns mean.

    Attributes:
      name: a key of `NEEDS`.
      fields: field -> columns, as `FIELDS`.
    """

    name: str
    fields: Mapping[str, tuple[str, ...]]

    def read(self, row: Row, field: str) -> Json:
        """The value of a field; None where the row has none."""
        column = self.column(row, field)
        return None if column is None else row[column]

    def column(self, row: Row, field: str) -> str | None:
        """The column that a field of a row is read from: the first that holds something."""
        return next((key for key in self.fields[field] if row.get(key) not in (None, "", [])), None)

    @functools.cached_property
    def used(self) -> tuple[str, ...]:
        """The fields that this layout reads."""
        return tuple(dict.fromkeys((*_OF_ALL, *NEEDS[self.name], *(("choices",) * (self.name == "vqa")))))

    @functools.cached_property
    def columns(self) -> frozenset[str]:
        """The columns that may be read."""
        return frozenset(column for field in self.used for column in self.fields[field])

    def unread(self, row: Row) -> list[str]:
        """Columns of a row that hold something and are not read; those of media leave the row out instead."""
        known = {self.column(row, field) for field in self.used} | (set(MEDIA) - self.columns)
        known.add("__key__")  # the name of a tar's sample, which is no column
        return [key for key, value in row.items() if key not in known and value not in (None, "", [])]


def recognize(
    columns: Collection[str],
    name: str | None = None,
    mapping: Mapping[str, str] | None = None,
    where: str = "",
) -> Layout:
    """The layout of a data set with these columns.

    Args:
      name: the layout, if it is known.
      mapping: field -> column, for columns of other names.
      where: the file, for messages.

    Raises:
      DataError: no layout has such columns, or a column is not there.
    """
    fields = FIELDS | {field: (column,) for field, column in (mapping or {}).items()}
    for field, column in (mapping or {}).items():
        if field not in FIELDS:
            raise DataError(f"--columns {field}={column}: the fields are {', '.join(FIELDS)}")
        if column not in columns:
            raise DataError(
                f"{where}: has no column {column!r} for --columns {field}={column}; it has {_listed(columns)}"
            )

    def fits(layout: str) -> bool:
        return all(any(column in columns for column in fields[field]) for field in NEEDS[layout])

    found = [layout for layout in NEEDS if fits(layout)] if name is None else [name] * fits(name)
    if not found:
        needed = "; ".join(
            f"{layout}: {' and '.join(NEEDS[layout])}" for layout in ([name] if name else NEEDS)
        )
        raise DataError(
            f"{where}: the columns {_listed(columns)} are none of a known layout ({needed}); say which column is "
            "which, for example --columns question=prompt answer=reply"
        )
    return Layout(found[0], fields)


def _listed(columns: Collection[str]) -> str:
    return ", ".join(map(repr, sorted(map(str, columns)))) or "(none)"
