"""What a model is shown with a benchmark's questions: their images and videos, or less than that.

Under `SINGLE_FRAME` a video is its middle frame, shown as an image; under `BLIND` all pixels are the mean.
"""

import functools
from collections.abc import Callable, Hashable, Mapping
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mllm_jax.data.batch import Size
from mllm_jax.data.layout import Shown, VisualLayout, layouts
from mllm_jax.data.tiles import slot_images
from mllm_jax.data.video import OpenVideo, Segment, open_video, pick
from mllm_jax.evaluation.benchmarks.base import VIDEOS, Benchmark, Question
from mllm_jax.evaluation.predictions import BenchmarkError
from mllm_jax.inference.model import Model

PREDICTIONS, SINGLE_FRAME, BLIND = "predictions", "single_frame", "blind"
_KEPT_OPEN = 64  # videos whose frames are counted once: questions about one stand together


def watching(model: Model, benchmark: Benchmark, settings: Mapping[str, Any]) -> Model:
    """The model, which reads videos if the benchmark has some.

    Args:
      settings: see `Model.with_video`.

    Raises:
      BenchmarkError: settings that cannot be with this model.
    """
    if all(question.medium != VIDEOS for question in benchmark.questions):
        return model
    try:
        return model.with_video(**settings)
    except ValueError as error:
        raise BenchmarkError(f"{benchmark.name}: {error}") from error


class Media:
    """The images and videos of a benchmark for a model.

    Args:
      model: reads videos (`watching`) if the benchmark has some.
      condition: `PREDICTIONS`, `SINGLE_FRAME` or `BLIND`.
    """

    def __init__(self, model: Model, benchmark: Benchmark, condition: str = PREDICTIONS):
        self.model, self.benchmark, self.condition = model, benchmark, condition
        self._video = functools.lru_cache(_KEPT_OPEN)(self._open)

    def keys(self, question: Question) -> tuple[Hashable, ...]:
        """What `load` is given for each image of a question, or for its video."""
        if self.condition == BLIND:  # all are the same one
            return ("",) * len(question.images)
        if question.medium == VIDEOS:
            return tuple((name, question.segment) for name in question.images)
        return question.images

    def layouts(self, question: Question) -> list[VisualLayout]:
        """How each becomes visual tokens.

        Raises:
          DataError, ImageError: a file that cannot be used.
        """
        shown = [self._shown(question, key) for key in self.keys(question)]
        return layouts(self.model.config.visual_layout, shown, sample=str(question.row["question_id"]))

    def _shown(self, question: Question, key: Any) -> Shown:
        """An image by what reads its size, a video by its number of frames."""
        whole = question.medium == VIDEOS and self.condition != SINGLE_FRAME
        if self.condition == BLIND:
            return self.model.config.video.frames if whole else self._blind_size
        return self._video(*key).total if whole else self._size_reader(key)

    def _blind_size(self) -> Size:
        return self.model.blind_image().shape[:2]

    def _size_reader(self, key: Any) -> Callable[[], Size]:
        def read() -> Size:
            if isinstance(key, tuple):
                return self._middle(key).shape[:2]
            return self.model.image_size(self.benchmark.read_image(key), self._source(key))

        return read

    def load(self, key: Any, layout: VisualLayout) -> UInt8[np.ndarray, "n H W 3"]:
        """The slots of an image or video; safe to call from several threads.

        Raises:
          DataError, ImageError: it cannot be used.
        """
        if self.condition == BLIND:
            image = self.model.blind_image()
            return np.broadcast_to(image, (len(layout.slots), *image.shape))
        if not isinstance(key, tuple):
            return self.model.image(self.benchmark.read_image(key), self._source(key), layout)
        if self.condition == SINGLE_FRAME:
            return slot_images(self.model.processor, self._middle(key), layout)
        return self.model.frames(self._video(*key))

    def _open(self, name: str, segment: Segment | None) -> OpenVideo:
        return open_video(self.benchmark.video_file(name), segment, name=self._source(name))

    def _middle(self, key: tuple[str, Segment | None]) -> UInt8[np.ndarray, "h w 3"]:
        limits = {"compat": self.model.compat, "max_pixels": self.model.max_image_pixels}
        return pick(self._video(*key), 1, "segments", **limits)[0]

    def _source(self, name: str) -> str:
        return f"question {self.benchmark.question_about(name)!r}, {name}"
