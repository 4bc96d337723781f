"""Images with question, right answer and the model's answer: a few right and a few wrong ones."""

import base64
import io
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import UInt8
from PIL import Image

from mllm_jax.data.images import decode_image
from mllm_jax.data.video import read_frames
from mllm_jax.evaluation.answer import PREDICTIONS, answers_file
from mllm_jax.evaluation.benchmarks.base import MAIN, VIDEOS, Benchmark, Question
from mllm_jax.evaluation.store import AnswerFile, key_of
from mllm_jax.inference.model import Model
from mllm_jax.storage import Path

HALF = 0.5  # an answer worth at least this is shown as right: soft scores have values in between
SHOWN_FRAMES = 4  # of a video
SHOWN_SIDE = 224  # pixels of an example's longer side at most
_SMALL = 160  # images up to this side stay PNG: drawings suffer from JPEG


def pick_examples(benchmark: Benchmark, directory: Path, count: int) -> list[dict[str, Any]]:
    """Answered rows to show: abilities in turn, wrong and right ones alternating where there are both.

    What an answer is worth is what the score counts (`Benchmark.credits`); of a question that is right only if all its
    rotations are, the first one that is worth least is shown. Of several questions that would do, one about an image
    not yet shown is taken.
    """
    path = answers_file(directory, PREDICTIONS, MAIN)
    credits = benchmark.credits(path)
    questions: dict[Any, list[dict[str, Any]]] = defaultdict(list)
    for row in AnswerFile(path, writable=False).rows.values():
        questions[benchmark.counted_as(row)].append(row)
    pools: dict[str, dict[bool | None, list[dict[str, Any]]]] = {}
    for group in questions.values():
        shown = min(group, key=lambda row: credits.get(key_of(row), 0.0))
        credit = credits.get(key_of(shown))
        verdict = None if credit is None else credit >= HALF
        pool = pools.setdefault(str(shown.get("ability", "")), {})
        pool.setdefault(verdict, []).append(shown | {"right": verdict, "credit": credit})
    images = {question.key: question.images for question in benchmark.questions if question.part == MAIN}
    seen: set[tuple[str, ...]] = set()
    chosen: list[dict[str, Any]] = []
    for turn in range(count):
        for place, pool in enumerate(pools.values()):
            wanted = (place + turn) % 2 == 0
            kinds = [kind for kind in (wanted, not wanted, None) if pool.get(kind)]
            if kinds and len(chosen) < count:
                rows_left = pool[kinds[0]]
                new = (i for i, row in enumerate(rows_left) if images[key_of(row)] not in seen)
                chosen.append(rows_left.pop(next(new, 0)))
                seen.add(images[key_of(chosen[-1])])
    order = {ability: place for place, ability in enumerate(pools)}
    return sorted(chosen, key=lambda row: order[str(row.get("ability", ""))])


def make_examples(model: Model, benchmark: Benchmark, directory: Path, count: int) -> list[dict[str, Any]]:
    """Examples with small copies of their images or of a few frames, as JSON-able dicts.

    Returns:
      Dicts of `pictures` (data URIs), `question`, `answers` (accepted ones), `text` (the model's), `right` (True,
      False, or None where nothing is right or wrong by itself), `credit` (what the score counts for it, 0 to 1, or
      None) and `ability`.
    """
    questions = {question.key: question for question in benchmark.questions if question.part == MAIN}
    found = []
    for row in pick_examples(benchmark, directory, count):
        question = questions[key_of(row)]
        pictures = [_thumbnail(pixels) for pixels in _pictures(model, benchmark, question)]
        answers = row["captions"] if "captions" in row else row.get("gold", row.get("answer"))
        answers = answers if isinstance(answers, list) else [answers] if answers is not None else []
        found.append(
            {
                "pictures": pictures,
                "question": str(row.get("question", row["prompt"])),
                "answers": list(dict.fromkeys(answers)),
                "text": row["text"],
                "right": row["right"],
                "credit": row["credit"],
                "ability": str(row.get("ability", "")),
            }
        )
    return found


def _pictures(model: Model, benchmark: Benchmark, question: Question) -> Iterator[UInt8[np.ndarray, "h w 3"]]:
    """The images of a question, or a few frames of its video."""
    limits = {"compat": model.compat, "max_pixels": model.max_image_pixels}
    for name in question.images:
        if question.medium == VIDEOS:
            yield from read_frames(
                benchmark.video_file(name), SHOWN_FRAMES, segment=question.segment, **limits
            )
        else:
            yield decode_image(benchmark.read_image(name), source=name, **limits)


def _thumbnail(pixels: UInt8[np.ndarray, "h w 3"]) -> str:
    image = Image.fromarray(pixels)
    image.thumbnail((SHOWN_SIDE, SHOWN_SIDE))
    buffer = io.BytesIO()
    if max(pixels.shape[:2]) <= _SMALL:
        image.save(buffer, "PNG", optimize=True)
        kind = "png"
    else:
        image.save(buffer, "JPEG", quality=85)
        kind = "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(buffer.getvalue()).decode()}"
