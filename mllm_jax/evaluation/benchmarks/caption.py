"""Captions of images or videos, to look at: of a folder of images, or of a JSON list with or without references."""

from mllm_jax.data.images import FORMATS
from mllm_jax.evaluation.benchmarks.base import VIDEOS, Benchmark, Question
from mllm_jax.evaluation.benchmarks.question_files import read_list
from mllm_jax.evaluation.predictions import BenchmarkError, Row

PROMPT = "Describe the {} briefly."
_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".ppm", ".jp2", ".avif")


class Caption(Benchmark):
    """A folder of images, or rows {image or video} with optional question_id, question and captions (references)."""

    name = "caption"
    not_scored = "these captions are there to look at; `captions` scores captions of COCO's images"
    has_baselines = False

    def read(self) -> list[Question]:
        if self.path.is_dir():
            self.images = self.path
            names = sorted(p.name for p in self.path.iterdir() if p.suffix.lower() in _SUFFIXES)
            if not names:
                raise BenchmarkError(f"{self.path}: no image in this folder ({', '.join(FORMATS)})")
            rows = [{"question_id": name, "image": name, "captions": []} for name in names]
            return [Question(row, PROMPT.format("image"), (row["image"],)) for row in rows]
        questions = []
        for row in read_list(self.path):
            shown = row.shown()
            if not shown["images"]:
                raise BenchmarkError(f"{row.where} has no 'image' or 'video' to describe")
            medium = "video" if shown["medium"] == VIDEOS else "image"
            prompt = row.typed("question", str) if "question" in row else PROMPT.format(medium)
            captions = row.typed("captions", list) if "captions" in row else []
            number = str(row.get("question_id", row.get("id", shown["images"][0])))
            kept = {"question_id": number, medium: row[medium], "captions": captions}
            questions.append(Question(kept, prompt, **shown))
        return questions

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        return (text, "caption") if text.strip() else (None, "unparsed")
