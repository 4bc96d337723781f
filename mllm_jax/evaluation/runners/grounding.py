"""Boxes and captions: RefCOCO, RefCOCO+ and RefCOCOg both ways, and captions of whole COCO pictures."""

import io
import json
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, ClassVar

from PIL import Image, ImageDraw

from mllm_jax.evaluation.benchmarks.refcoco import parse_box
from mllm_jax.evaluation.runners.base import BenchmarkError, Question
from mllm_jax.evaluation.runners.published import File, Item, Option, Published, value_of
from mllm_jax.evaluation.runners.tables import read_json

BOX_PROMPT = (
    "Bounding box coordinates are specified in the format (top-left x, top-left y, bottom-right x, bottom-right y). "
    "All values are floating point numbers bounded between 0 and 1. Please provide the bounding box coordinate of "
    "the region this sentence describes: "
)
REGION_PROMPT = "Provide a short description for this region."
CAPTION_PROMPT = "Provide a one-sentence caption for the provided image."
_SPLIT = Option("val", "which questions", ("val", "test", "testA", "testB"))
_DRAWN = "#outline="  # behind a picture's name: what is drawn on it


def _hub(name: str) -> dict[str, File]:
    where = f"https://huggingface.co/datasets/lmms-lab/{name}"
    return {"questions": File(("data/{split}-*.parquet", "{split}-*.parquet"), where)}


class RefCoco(Published):
    """Comprehension: a box for each expression, on the original picture (lmms-eval's task)."""

    kind = "refcoco"
    comparable = False  # there is no frequent box
    options: ClassVar = {"split": _SPLIT}
    files: ClassVar = _hub("RefCOCO")

    def items(self) -> Iterator[Item]:
        split = str(self.values["split"])
        for index, row in enumerate(self.rows()):
            box = [float(value) for value in value_of(row, "bbox", f"row {index}")]
            image = value_of(row, "image", f"row {index}")
            for turn, expression in enumerate(value_of(row, "answer", f"row {index}")):
                yield Item(
                    f"{split}_{index}_{turn}",
                    f"{BOX_PROMPT}{expression}",
                    (image,),
                    json.dumps(box),
                    kept={"annotation_id": row.get("question_id")},
                    truth={"bbox": box, "split": split},
                )

    def annotations(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        """Boxes with the size of their pictures, which the rule needs."""
        rows = super().annotations(questions)
        sizes: dict[str, tuple[int, int]] = {}
        for row, question in zip(rows, questions, strict=True):
            (image,) = question.images
            if image not in sizes:
                sizes[image] = Image.open(io.BytesIO(self.read_image(image))).size
            row["width"], row["height"] = sizes[image]
        return rows

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        box = parse_box(text)
        return (
            (None, "unparsed") if box is None else (json.dumps(list(box)), "first four numbers in brackets")
        )

    def is_right(self, row: dict[str, Any]) -> None:
        return None  # a matter of degree


class RefCocoPlus(RefCoco):
    """RefCOCO+: expressions without words of place."""

    kind = "refcoco+"
    files: ClassVar = _hub("RefCOCOplus")


class RefCocoG(RefCoco):
    """RefCOCOg: longer expressions."""

    kind = "refcocog"
    files: ClassVar = _hub("RefCOCOg")


class RegionCaption(RefCoco):
    """A description of the region that is outlined on the picture (lmms-eval's bbox and seg tasks)."""

    kind = "refcoco_caption"
    home = "refcoco"
    options: ClassVar = {
        "split": _SPLIT,
        "outline": Option("box", "red rectangle, or the region's polygon", ("box", "polygon")),
    }

    def items(self) -> Iterator[Item]:
        shape = "bbox" if self.values["outline"] == "box" else "segmentation"
        for index, row in enumerate(self.rows()):
            points = [float(value) for value in value_of(row, shape, f"row {index}")]
            captions = [str(text) for text in value_of(row, "answer", f"row {index}")]
            image = f"{value_of(row, 'image', f'row {index}')}{_DRAWN}{shape}:{json.dumps(points)}"
            yield Item(
                f"{self.values['split']}_{index}",
                REGION_PROMPT,
                (image,),
                captions,
                kept={"annotation_id": row.get("question_id")},
                truth={"references": captions},
            )

    def picture(self, name: str) -> bytes:
        """The picture with the outline drawn on it, as PNG."""
        name, _, drawn = name.partition(_DRAWN)
        data = super().picture(name)
        if not drawn:
            return data
        shape, _, points = drawn.partition(":")
        return outlined(data, shape, json.loads(points))

    def picture_file(self, name: str) -> Path | None:
        return super().picture_file(name.partition(_DRAWN)[0])

    def annotations(self, questions: Sequence[Question]) -> list[dict[str, Any]]:
        return Published.annotations(self, questions)

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        return (text, "caption") if text.strip() else (None, "unparsed")


class RegionCaptionPlus(RegionCaption):
    """Region captions of RefCOCO+."""

    kind = "refcoco+_caption"
    home = "refcoco+"
    files: ClassVar = _hub("RefCOCOplus")


class RegionCaptionG(RegionCaption):
    """Region captions of RefCOCOg."""

    kind = "refcocog_caption"
    home = "refcocog"
    files: ClassVar = _hub("RefCOCOg")


class Captions(Published):
    """Captions of COCO pictures."""

    kind = "captions"
    comparable = False
    max_new_tokens = 64
    options: ClassVar = {
        "split": Option("val2017", "which pictures", ("val2017", "val2014")),
        # lmms-eval's words; papers differ here, and scores with them.
        "prompt": Option(CAPTION_PROMPT, "the request for a caption"),
    }
    files: ClassVar = {
        "questions": File(
            ("captions_{split}.json", "annotations/captions_{split}.json"),
            "https://cocodataset.org/#download",
        ),
        "images": File(("{split}",), "https://cocodataset.org/#download"),
    }

    def items(self) -> Iterator[Item]:
        (path,) = self.paths("questions")
        self.files_read.append(path)
        value = read_json(path)
        if not isinstance(value, dict) or not {"images", "annotations"} <= value.keys():
            raise BenchmarkError(f"{path}: expected COCO's object with 'images' and 'annotations'")
        references: dict[int, list[str]] = defaultdict(list)
        for row in value["annotations"]:
            references[row["image_id"]].append(row["caption"])
        for image in value["images"]:
            captions = references[image["id"]]
            yield Item(
                image["id"],
                str(self.values["prompt"]),
                (image["file_name"],),
                captions or None,
                kept={"image_id": image["id"]},
                truth={"image_id": image["id"], "references": captions},
            )

    def parse(self, question: Question, text: str) -> tuple[str | None, str]:
        return (text, "caption") if text.strip() else (None, "unparsed")

    def is_right(self, row: dict[str, Any]) -> None:
        return None


def outlined(data: bytes, shape: str, points: Sequence[float]) -> bytes:
    """A picture with a red rectangle ("bbox": x, y, width, height) or a polygon ("segmentation"), as PNG."""
    image = Image.open(io.BytesIO(data)).convert("RGB")
    draw = ImageDraw.Draw(image)
    if shape == "bbox":
        x, y, width, height = points
        draw.rectangle([x, y, x + width, y + height], outline="red")
    else:
        draw.polygon(list(points))
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()
