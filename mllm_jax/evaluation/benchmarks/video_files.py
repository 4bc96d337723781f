"""The files of a benchmark's videos: found as the official scripts do, with what is missing counted."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from mllm_jax.data.reading import safe_path
from mllm_jax.evaluation.benchmarks.base import VIDEOS, Question
from mllm_jax.storage import Path

SUFFIXES = ("", ".mp4", ".avi", ".mov", ".mkv")  # tried in this order; some names have theirs
_NAMED = 3  # missing videos that are named


class VideoFiles:
    """The folder of a benchmark's videos.

    Args:
      folder: where they are.
      prefix: what a file's name may have before the name in the questions.

    Attributes:
      elsewhere: name -> where it may also be below the folder.
      missing: videos that are not there -> how many questions are about each.
    """

    def __init__(self, folder: Path, prefix: str):
        self.folder, self.prefix = folder, prefix
        self.elsewhere: dict[str, str] = {}
        self.missing: dict[str, int] = {}
        self._found: dict[str, str | None] = {}
        self._wanted = self._questions = 0

    def find(self, name: str) -> str | None:
        """Name of a video's file (or folder of frames) below the folder.

        Raises:
          DataError: a name that leaves the folder.
        """
        if name not in self._found:
            prefixed = f"{self.prefix}{name}"
            stems = dict.fromkeys((self.elsewhere.get(name, prefixed), prefixed, name))
            names = (f"{stem}{suffix}" for stem in stems for suffix in SUFFIXES)
            there = (each for each in names if safe_path(self.folder, each).exists())
            self._found[name] = next(there, None)
        return self._found[name]

    def resolve(self, questions: Sequence[Question]) -> list[Question]:
        """The questions with their videos under the names of their files, without those whose video is missing."""
        there, names = [], set()
        for question in questions:
            if question.medium == VIDEOS:
                (name,) = question.images
                names.add(name)
                if (found := self.find(name)) is None:
                    self.missing[name] = self.missing.get(name, 0) + 1
                    continue
                question = dataclasses.replace(question, images=(found,))
            there.append(question)
        self._wanted, self._questions = len(names), len(questions)
        return there

    @property
    def told(self) -> str:
        """How many videos are missing, in words; "" if none is."""
        if not self.missing:
            return ""
        few = ", ".join(list(self.missing)[:_NAMED]) + ", ..." * (len(self.missing) > _NAMED)
        tried = " or ".join(f"{self.prefix}NAME{suffix}" for suffix in SUFFIXES)
        return (
            f"{len(self.missing):,} of {self._wanted:,} videos are not in {self.folder} ({few}; tried as {tried}), so "
            f"that {sum(self.missing.values()):,} of {self._questions:,} questions are not asked"
        )

    def as_scores(self) -> dict[str, Any]:
        """What `scores.json` says of it; nothing if no video is missing."""
        if not self.missing:
            return {}
        told = {"videos": len(self.missing), "questions": sum(self.missing.values())}
        return {"missing_videos": {**told, "first": list(self.missing)[:_NAMED]}}
