"""From one sample to one row of a batch: the conversation as tokens, its images as pixels in slots."""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jaxtyping import Float32, UInt8
from PIL import Image

from mllm_jax.data.batch import Batch, Size
from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.conversations import SampleError, Span, parse_turns, render
from mllm_jax.data.feature_cache import FeatureCache, digests
from mllm_jax.data.images import image_size, open_rgb
from mllm_jax.data.layout import LayoutRule, Shown, VisualLayout, layouts
from mllm_jax.data.naflex import Processor
from mllm_jax.data.packing import RowLimits
from mllm_jax.data.samples import Clip, Sample
from mllm_jax.data.templates import Template
from mllm_jax.data.tiles import frame_slots, slot_images
from mllm_jax.data.tokens import EncodedSample, SampleTooLong, TooManyImages, encode_sample, layout_row


class Row(NamedTuple):
    """A row of a batch, and for people whose it is.

    Attributes:
      arrays: of a single row.
      id: the sample's, or several by commas; "" for an empty row.
      skipped: why samples were left out of the row, one message each.
    """

    arrays: Batch
    id: str
    skipped: tuple[str, ...] = ()


class Rows(NamedTuple):
    """Rows stacked to a batch.

    Attributes:
      arrays: what the model reads.
      ids: of the samples of each of the `B` rows; "" for an empty row.
      skipped: why samples were left out of this batch, one message each.
    """

    arrays: Batch
    ids: list[str]
    skipped: list[str]


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Brings an image or video of a sample to what the tower takes.

    Attributes:
      processor: brings an image to the size of a slot.
      compat: None or "llava", for decoding.
      max_image_pixels: images with more pixels are refused; None for the default limit.
    """

    processor: Processor
    compat: str | None = None
    max_image_pixels: int | None = None

    def __call__(self, sample: Sample, index: int, layout: VisualLayout) -> UInt8[np.ndarray, "n H W 3"]:
        """The slots of one image or video of a sample, decoded and brought to size.

        Raises:
          ImageError: for what is not a readable image within the size limit, naming sample and image.
        """
        image = sample.images[index]
        if isinstance(image, Clip):
            return frame_slots(self.processor, [self._decoded(sample, index, each) for each in image.frames])
        return slot_images(self.processor, self._decoded(sample, index, image), layout)

    def shown(self, sample: Sample) -> list[Shown]:
        """What the layouts of a sample's images and videos are made from."""
        return [
            len(image.frames) if isinstance(image, Clip) else functools.partial(self.size, sample, index)
            for index, image in enumerate(sample.images)
        ]

    def size(self, sample: Sample, index: int) -> Size:
        """Height and width of an image of a sample, from its header.

        Raises:
          ImageError: as above.
        """
        image = sample.images[index]
        if isinstance(image, bytes):
            return image_size(image, **self._decoding(sample, index))
        return (image.height, image.width) if isinstance(image, Image.Image) else image.shape[:2]

    def _decoded(self, sample: Sample, index: int, image: Any) -> Any:
        return open_rgb(image, **self._decoding(sample, index)) if isinstance(image, bytes) else image

    def _decoding(self, sample: Sample, index: int) -> dict[str, Any]:
        limit = {} if self.max_image_pixels is None else {"max_pixels": self.max_image_pixels}
        name = f"sample {sample.id!r}, {sample.image_name(index)}"
        return {"source": name, "compat": self.compat, **limit}


class TooManyLabels(SampleError):
    """A sample has more supervised tokens than the loss makes logits for."""

    fix = "raise data.label_tokens, or set data.overlong=skip"

    def __init__(self, sample: str, count: int, limit: int):
        super().__init__(
            sample, f"has {count} supervised tokens, more than the limit of {limit} (label_tokens)"
        )
        self.count = count
        self.limit = limit

    def __reduce__(self):
        return type(self), (self.sample, self.count, self.limit)


class RowEncoder:
    """Lays samples out as rows of static shape, one or several samples a row.

    Attributes:
      spec: shapes and dtypes of a row.
      limits: what a row has room for.
    """

    def __init__(
        self,
        read_image: ImageReader,
        visual_layout: LayoutRule,
        tokenizer: Any,
        template: str | Template,
        *,
        seq_len: int,
        image_slots: int,
        overlong: str = "error",
        label_tokens: int | None = None,
        samples_per_row: int = 1,
        loss_weighting: str = "token",
        features: FeatureCache | None = None,
    ):
        """Takes what every sample is laid out with.

        Args:
          read_image: decodes images and brings them to size; its `compat` holds for conversations too.
          visual_layout: how images become visual tokens.
          tokenizer: a Hugging Face tokenizer, or a `SpanTokenizer`.
          template: the conversation template or its name.
          seq_len: `T`, visual tokens included.
          image_slots: `I`.
          overlong: what to do with a sample of more than `T` tokens, or of more than `label_tokens` supervised ones:
            "error", or "skip" for an empty row.
          label_tokens: supervised tokens that a row may hold; None for any number.
          samples_per_row: most samples that a row may hold.
          loss_weighting: a sample's weight in the loss per supervised token, of which it has n: "token" 1, "sample"
            1 / n, "sqrt" 1 / sqrt(n). The loss is the weighted mean over all of a batch.
          features: where the images' features are; the images themselves are then not decoded.
        """
        if overlong not in ("error", "skip"):
            raise ValueError(f"overlong {overlong!r}: choose 'error' or 'skip'")
        self.read_image = read_image
        self.visual_layout = visual_layout
        self.tokenizer = tokenizer
        self.template = resolve_template(template, tokenizer)
        self.overlong = overlong
        self.loss_weighting = loss_weighting
        self.limits = RowLimits(seq_len, image_slots, label_tokens or seq_len, samples_per_row)
        self.features = features
        size = visual_layout.slot.size if features is None else None
        self.spec = Batch.spec(
            length=seq_len,
            slots=image_slots,
            image_size=size,
            features=None if features is None else features.spec,
            grids=visual_layout.slot.native and features is None,
            combination=visual_layout.combination,
        )

    def encode(self, sample: Sample) -> EncodedSample:
        """The sample's tokens and labels, without a limit on their number and without reading its images.

        Raises:
          SampleError: for a conversation that does not fit the template or the sample's images.
        """
        images, compat = len(sample.images), self.read_image.compat
        spans = render_sample(sample.id, sample.conversations, images, self.template, compat)
        found = layouts(self.visual_layout, self.read_image.shown(sample), sample=sample.id)
        return encode_sample(spans, self.tokenizer, found, sample=sample.id)

    def needs(self, sample: Sample) -> tuple[int, int, int, int]:
        """What a sample needs of a row, in the order of `packing.RESOURCES`.

        Raises:
          SampleError: as `encode`.
        """
        return row_needs(self.encode(sample))

    def __call__(self, samples: Sequence[Sample]) -> Row:
        """The row of some samples that fit one together; an empty row for none.

        Raises:
          SampleTooLong, TooManyLabels: under the policy "error".
          SampleError, ImageError: as above, and for more images than slots.
        """
        kept, encoded, skipped = [], [], []
        for sample in samples:
            one = self.encode(sample)
            try:
                check_fits(one, self.limits.tokens, self.limits.label_tokens)
            except (SampleTooLong, TooManyLabels) as error:
                if self.overlong == "error":
                    raise
                skipped.append(str(error))
                continue
            kept.append(sample)
            encoded.append(
                dataclasses.replace(one, loss_weights=LOSS_WEIGHTINGS[self.loss_weighting](one.loss_weights))
            )
        row, images = layout_row(encoded, self.spec)
        for which, index, slots in images:
            layout = encoded[which].layouts[index]
            if self.features is None:
                row.images[slots] = self.read_image(kept[which], index, layout)
            else:
                found = digests(kept[which].images[index], layout)
                for slot, digest in enumerate(found, slots.start):
                    for array, values in zip(row.features, self.features.read(digest), strict=True):
                        array[slot] = values
        return Row(row, ", ".join(sample.id for sample in kept), tuple(skipped))


def _by_sample(power: float) -> Callable[[np.ndarray], np.ndarray]:
    """Weights of a sample of n supervised tokens divided by n ** power."""

    def weigh(weights: Float32[np.ndarray, " T"]) -> Float32[np.ndarray, " T"]:
        return (weights / np.count_nonzero(weights) ** power).astype(np.float32)

    return weigh


# A sample without a supervised token is an error (`encode_sample`), so none divides by zero.
LOSS_WEIGHTINGS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "token": lambda weights: weights,
    "sample": _by_sample(1.0),
    "sqrt": _by_sample(0.5),
}


def row_needs(sample: EncodedSample) -> tuple[int, int, int, int]:
    """What a sample needs of a row, in the order of `packing.RESOURCES`."""
    return len(sample), sample.num_slots, int(np.count_nonzero(sample.loss_weights)), 1


def check_fits(sample: EncodedSample, seq_len: int, label_tokens: int | None) -> None:
    """Refuses a sample that a row of its own could not hold; see `RowEncoder` for the limits.

    Raises:
      SampleTooLong, TooManyLabels: naming the sample.
    """
    if len(sample) > seq_len:
        raise SampleTooLong(sample.sample, len(sample), seq_len)
    check_labels(sample, label_tokens)


def check_slots(sample: str, images: int, slots: int, limit: int | None) -> None:
    """Refuses a sample whose images fill more slots than `limit` (None: any number).

    Raises:
      TooManyImages: naming the sample.
    """
    if limit is not None and slots > limit:
        raise TooManyImages(sample, images, slots, limit)


def check_labels(sample: EncodedSample, limit: int | None) -> None:
    """Refuses a sample with more supervised tokens than `limit` (None: any number).

    Raises:
      TooManyLabels: naming the sample.
    """
    count = int((sample.loss_weights != 0).sum())
    if limit is not None and count > limit:
        raise TooManyLabels(sample.sample, count, limit)


def render_sample(
    sample_id: str,
    conversations: Sequence[Mapping[str, str]],
    num_images: int,
    template: str | Template,
    compat: str | None = None,
) -> list[Span]:
    """A training sample's conversation in a template's form.

    Raises:
      SampleError: for a conversation that does not fit the template or the number of images.
    """
    parsed = parse_turns(conversations, num_images, sample=sample_id, compat=compat)
    if parsed.dropped and compat is None:
        raise SampleError(sample_id, "the first turn is not from 'human'; compat='llava' would drop it")
    return render(template, parsed.turns, sample=sample_id)


def stack_rows(rows: Sequence[Row]) -> Rows:
    """Rows to a batch, stacked along `B`."""
    arrays = jax.tree.map(lambda *leaves: np.stack(leaves), *(row.arrays for row in rows))
    return Rows(arrays, [row.id for row in rows], [message for row in rows for message in row.skipped])
