"""Captions of pictures, to look at: from a folder of images, or from a JSON list with or without references."""

from pathlib import Path
from typing import Any

from mllm_jax.data.images import FORMATS
from mllm_jax.evaluation.runners.base import BenchmarkError, Question, Runner, field, image_names, read_list

PROMPT = "Describe the image briefly."
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif")


class CaptionRunner(Runner):
    """A folder of pictures, or rows {image} with optional question_id, question and captions (references)."""

    kind = "caption"
    baselines = False

    def read(self) -> list[Question]:
        if self.path.is_dir():
            self.images = self.path
            names = sorted(p.name for p in self.path.iterdir() if p.suffix.lower() in _SUFFIXES)
            if not names:
                raise BenchmarkError(f"{self.path}: no picture in this folder ({', '.join(FORMATS)})")
            return [
                Question({"question_id": name, "image": name, "captions": []}, PROMPT, (name,))
                for name in names
            ]
        questions = []
        for index, row in enumerate(read_list(self.path)):
            images = image_names(row, self.path, index)
            if not images:
                raise BenchmarkError(f"{self.path}: entry #{index} has no 'image' to describe")
            prompt = field(row, "question", str, self.path, index) if "question" in row else PROMPT
            captions = field(row, "captions", list, self.path, index) if "captions" in row else []
            kept = {
                "question_id": str(row.get("question_id", row.get("id", images[0]))),
                "image": row["image"],
            }
            questions.append(Question(kept | {"captions": captions}, prompt, images))
        return questions

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        return (text, "caption") if text.strip() else (None, "unparsed")

    def is_right(self, row: dict[str, Any]) -> None:
        return None

    def score(self, part: str, predictions: Path) -> None:
        return None
