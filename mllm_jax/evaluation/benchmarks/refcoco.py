"""RefCOCO, RefCOCO+ and RefCOCOg (Yu et al. 2016; Mao et al. 2016): a box for an expression, a caption for a region.

lmms-eval's metrics: mean IoU, ACC@t for five thresholds, Center_ACC, on the original image. Models
that see a padded square give coordinates on that square; `padded_square` maps them back first.
"""

import io
import json
import math
import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

from PIL import Image, ImageDraw

from mllm_jax.data.images import decode_image
from mllm_jax.evaluation.benchmarks.answers import Answer, Answers, ratio
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.captions import CaptionScores
from mllm_jax.evaluation.benchmarks.published import File, Option, Published, hub
from mllm_jax.evaluation.predictions import PredictionError, Row, as_text
from mllm_jax.storage import Path

THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
BOX_PROMPT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of "
    "the region this sentence describes: "
)
REGION_PROMPT = "Provide a short description for this region."
_SPLIT = Option("val", "which questions", ("val", "test", "testA", "testB"))
_OUTLINE = "#outline="  # behind an image's name: what is drawn on it
_NUMBER = r"(-?\d+(?:\.\d+)?)"
_BOX = re.compile(r"\[\s*" + r",\s*".join([_NUMBER] * 4) + r"\s*\]", re.ASCII)
_NO_BOX = [0.0, 0.0, 0.0, 0.0]  # what lmms-eval takes for an answer without a box

Box = Sequence[float | int]  # x1, y1, x2, y2 as fractions of width and height


def parse_box(text: str) -> Box | None:
    """The first `[a, b, c, d]` of plain decimals, or None (lmms-eval then takes [0, 0, 0, 0]).

    Example:
        >>> parse_box("It is at [0.1, 0.2, 0.5, 1.0].")
        [0.1, 0.2, 0.5, 1.0]
    """
    found = _BOX.search(text)
    box = [float(value) for value in found.groups()] if found else None
    return box if box is not None and all(map(math.isfinite, box)) else None


def iou(a: Box, b: Box) -> float:
    """Intersection over union; 0 where the union has no area."""
    width = min(a[2], b[2]) - max(a[0], b[0])
    height = min(a[3], b[3]) - max(a[1], b[1])
    both = max(0.0, width) * max(0.0, height)
    union = (a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - both
    return both / union if both and union else 0.0


def center_inside(outer: Box, box: Box) -> bool:
    """Whether the centre of `box` lies in `outer`, borders included."""
    x, y = (box[0] + box[2]) / 2, (box[1] + box[3]) / 2
    return outer[0] <= x <= outer[2] and outer[1] <= y <= outer[3]


def from_square(box: Box, width: float | int, height: float | int) -> Box:
    """A box on the padded square as a box on the original image.

    Example:
        >>> from_square([0.0, 0.25, 1.0, 0.75], 200, 100)
        [0.0, 0.0, 1.0, 1.0]
    """
    side = max(width, height)
    x, y = (side - width) / 2, (side - height) / 2
    x1, y1, x2, y2 = (value * side for value in box)
    return [(x1 - x) / width, (y1 - y) / height, (x2 - x) / width, (y2 - y) / height]


def _figures(answers: Answers, note: str = "pair") -> dict[str, float]:
    pairs = [answer.notes[note] for answer in answers]
    overlaps = [iou(gold, said) for gold, said in pairs]
    figures = {"IoU": ratio(sum(overlaps), len(pairs))}
    for t in THRESHOLDS:
        figures[f"ACC@{t}"] = ratio(sum(o >= t for o in overlaps), len(pairs))
    figures["Center_ACC"] = ratio(sum(center_inside(gold, said) for gold, said in pairs), len(pairs))
    return figures


def _hub(name: str) -> dict[str, File]:
    return {"questions": File(("data/{split}-*.parquet", "{split}-*.parquet"), hub(f"lmms-lab/{name}"))}


class RefCoco(Published):
    """Comprehension: a box for each expression, on the original image (lmms-eval's task)."""

    name = "refcoco"
    rule = "lmms-eval refcoco bbox_rec"
    answers_format = "JSON lines {question_id, text} with [x1, y1, x2, y2] as fractions in the text"
    annotations_format = "rows {question_id, bbox: [x, y, w, h] in pixels, width, height}, optionally split"
    text_keys = ("text", "answer", "prediction")
    comparable = False  # there is no frequent box
    options: ClassVar = {"split": _SPLIT}
    files: ClassVar = _hub("RefCOCO")

    def items(self) -> Iterator[Question]:
        split = str(self.values["split"])
        for index, row in enumerate(self.rows()):
            box = [float(value) for value in row["bbox"]]
            for turn, expression in enumerate(row["answer"]):
                yield self.question(
                    f"{split}_{index}_{turn}",
                    f"{BOX_PROMPT}{expression}",
                    [row["image"]],
                    json.dumps(box),
                    fields={"annotation_id": row.get("question_id")},
                    truth={"bbox": box, "split": split},
                )

    def annotation(self, question: Question) -> dict[str, Any]:
        """The box with the size of its image, which the rule needs."""
        (image,) = question.images
        if image not in self._sizes:
            pixels = decode_image(self.read_image(image), source=image, compat="llava")
            self._sizes[image] = pixels.shape[1::-1]
        width, height = self._sizes[image]
        return super().annotation(question) | {"width": width, "height": height}

    def _finish(self, questions: Sequence[Question]) -> None:
        self._sizes: dict[str, tuple[int, int]] = {}
        super()._finish(questions)

    @classmethod
    def parse(cls, text: str, item: Row) -> tuple[str | None, str]:
        box = parse_box(text)
        return (None, "unparsed") if box is None else (json.dumps(box), "first four numbers in brackets")

    @classmethod
    def grade(cls, answer: Answer) -> None:
        """Right is an overlap of one half, the headline's threshold."""
        x, y, w, h = (float(v) for v in answer.value("bbox"))
        width, height = float(answer.value("width")), float(answer.value("height"))
        if width <= 0 or height <= 0:
            raise PredictionError(f"{answer.where}: width and height must be positive")
        gold = [x / width, y / height, (x + w) / width, (y + h) / height]
        said = parse_box(answer.text)
        square = from_square(said, width, height) if said else _NO_BOX
        answer.parsed = said is not None
        answer.credit = iou(gold, said or _NO_BOX) >= 0.5
        answer.part = as_text(answer.item.get("split", "all"))
        answer.notes = {"pair": (gold, said or _NO_BOX), "square": (gold, square)}

    @classmethod
    def figures(cls, answers: Answers) -> dict[str, Any]:
        return _figures(answers) | {"padded_square": _figures(answers, "square")}


class RefCocoPlus(RefCoco):
    """RefCOCO+: expressions without words of place."""

    name = "refcoco+"
    files: ClassVar = _hub("RefCOCOplus")


class RefCocoG(RefCoco):
    """RefCOCOg: longer expressions."""

    name = "refcocog"
    files: ClassVar = _hub("RefCOCOg")


class RegionCaption(CaptionScores, Published):
    """A description of the region that is outlined on the image (lmms-eval's bbox and seg tasks)."""

    name = "refcoco_caption"
    folder_name = "refcoco"
    options: ClassVar = {
        "split": _SPLIT,
        "outline": Option("box", "red rectangle, or the region's polygon", ("box", "polygon")),
    }
    files: ClassVar = _hub("RefCOCO")

    def items(self) -> Iterator[Question]:
        shape = "bbox" if self.values["outline"] == "box" else "segmentation"
        for index, row in enumerate(self.rows()):
            points = [float(value) for value in row[shape]]
            captions = [str(text) for text in row["answer"]]
            yield self.question(
                f"{self.values['split']}_{index}",
                REGION_PROMPT,
                [f"{row['image']}{_OUTLINE}{shape}:{json.dumps(points)}"],
                captions,
                fields={"annotation_id": row.get("question_id")},
                truth={"references": captions},
            )

    def own_image(self, name: str) -> bytes:
        """The image with the outline drawn on it, as PNG."""
        name, _, outline = name.partition(_OUTLINE)
        data = super().own_image(name)
        if not outline:
            return data
        shape, _, points = outline.partition(":")
        return outlined(data, shape, json.loads(points))

    def image_file(self, name: str) -> Path | None:
        return super().image_file(name.partition(_OUTLINE)[0])


class RegionCaptionPlus(RegionCaption):
    """Region captions of RefCOCO+."""

    name = "refcoco+_caption"
    folder_name = "refcoco+"
    files: ClassVar = _hub("RefCOCOplus")


class RegionCaptionG(RegionCaption):
    """Region captions of RefCOCOg."""

    name = "refcocog_caption"
    folder_name = "refcocog"
    files: ClassVar = _hub("RefCOCOg")


def outlined(data: bytes, shape: str, points: Sequence[float]) -> bytes:
    """An image with a red rectangle ("bbox": x, y, width, height) or a polygon ("segmentation"), as PNG."""
    image = Image.fromarray(decode_image(data, source="image", compat="llava"))  # boxes are in stored pixels
    draw = ImageDraw.Draw(image)
    if shape == "bbox":
        x, y, width, height = points
        draw.rectangle([x, y, x + width, y + height], outline="red")
    else:
        draw.polygon(list(points))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
