"""From one sample to one row of a batch: the conversation as tokens, its images as pixels in slots."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Int32, UInt8

from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.conversations import SampleError, Span, parse_turns, render
from mllm_jax.data.feature_cache import FeatureCache, digest
from mllm_jax.data.images import decode_image
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.samples import Sample
from mllm_jax.data.templates import Template
from mllm_jax.data.tokens import EncodedSample, SampleTooLong, encode_sample, layout_row

ARRAYS = ("tokens", "positions", "segment_ids", "loss_weights", "visual_index", "images", "image_mask")
FEATURES = "features"  # in place of "images" where rows hold features


@dataclasses.dataclass(frozen=True)
class ImageReader:
    """Brings an image of a sample to what the tower takes.

    Attributes:
      processor: brings a picture to side `S`.
      compat: None or "llava", for decoding.
      max_image_pixels: images with more pixels are refused; None for the default limit.
    """

    processor: ImageProcessor
    compat: str | None = None
    max_image_pixels: int | None = None

    def __call__(self, sample: Sample, index: int) -> UInt8[np.ndarray, "S S 3"]:
        """One image of a sample, decoded and brought to size.

        Raises:
          ImageError: for what is not a readable image within the size limit, naming sample and image.
        """
        image = sample.images[index]
        if isinstance(image, bytes):
            name = f"sample {sample.id!r}, {sample.image_name(index)}"
            limit = {} if self.max_image_pixels is None else {"max_pixels": self.max_image_pixels}
            image = decode_image(image, source=name, compat=self.compat, **limit)
        return self.processor(image)


class TooManyLabels(SampleError):
    """A sample has more supervised tokens than the loss makes logits for."""

    way_out = "raise data.label_tokens, or set data.overlong=skip"

    def __init__(self, sample: str, count: int, limit: int):
        super().__init__(
            sample, f"has {count} supervised tokens, more than the limit of {limit} (label_tokens)"
        )
        self.count = count
        self.limit = limit

    def __reduce__(self):
        return type(self), (self.sample, self.count, self.limit)


class RowEncoder:
    """Lays samples out as rows of static shape.

    A row holds, for `T` positions and `I` image slots of side `S`:

    * `tokens`, `positions`, `segment_ids` int32 [T], `loss_weights` float32 [T], `visual_index` int32 [T], as
      `tokens.layout_row` makes them;
    * `images` uint8 [I, S, S, 3], pixels before normalisation, zeros in empty slots; `image_mask` bool [I]; with a
      feature cache, `features` [I, F, N, C] instead of `images`;
    * `id` and `skipped`, strings for people. A padding row has neither; a skipped sample's row is as empty,
      with why it was skipped in `skipped`.
    """

    def __init__(
        self,
        *,
        processor: ImageProcessor,
        tokenizer: Any,
        template: str | Template,
        num_tokens_per_image: int,
        seq_len: int,
        image_slots: int,
        overlong: str = "error",
        label_tokens: int | None = None,
        compat: str | None = None,
        max_image_pixels: int | None = None,
        features: FeatureCache | None = None,
    ):
        """Takes what every sample is laid out with.

        Args:
          processor: brings an image to side `S`.
          tokenizer: a Hugging Face tokenizer, or a `SpanTokenizer`.
          template: the conversation template or its name.
          num_tokens_per_image: visual tokens of one image slot (`connector.num_tokens(grid)`).
          seq_len: `T`, visual tokens included.
          image_slots: `I`.
          overlong: what to do with a sample of more than `T` tokens, or of more than `label_tokens` supervised ones:
            "error", or "skip" for an empty row.
          label_tokens: supervised tokens that a row may hold; None for any number.
          compat: None or "llava", for conversations and for image decoding.
          max_image_pixels: images with more pixels are refused; None for the default limit.
          features: where the images' features are; the images themselves are then not decoded.
        """
        if overlong not in ("error", "skip"):
            raise ValueError(f"overlong {overlong!r}: choose 'error' or 'skip'")
        self.processor = processor
        self.tokenizer = tokenizer
        self.template = resolve_template(template, tokenizer)
        self.num_tokens_per_image = num_tokens_per_image
        self.seq_len = seq_len
        self.image_slots = image_slots
        self.overlong = overlong
        self.label_tokens = label_tokens
        self.compat = compat
        self.features = features
        self.read_image = ImageReader(processor, compat, max_image_pixels)

    def encode(self, sample: Sample) -> EncodedSample:
        """The sample's tokens and labels, without a limit on their number and without reading its images.

        Raises:
          SampleError: for a conversation that does not fit the template or the sample's images.
        """
        spans = render_sample(sample.id, sample.conversations, len(sample.images), self.template, self.compat)
        counts = [self.num_tokens_per_image] * len(sample.images)
        return encode_sample(spans, self.tokenizer, counts, sample=sample.id)

    def __call__(self, sample: Sample) -> dict[str, Any]:
        """The row of one sample.

        Raises:
          SampleTooLong, TooManyLabels: under the policy "error".
          SampleError, ImageError: as above, and for more images than slots.
        """
        encoded = self.encode(sample)
        try:
            row = self._lay_out([encoded])
            check_labels(encoded, self.label_tokens)
        except (SampleTooLong, TooManyLabels) as error:
            if self.overlong == "error":
                raise
            return self.padding() | {"skipped": str(error)}
        for slot, (_, index) in enumerate(row.pop("slots")):
            if self.features is None:
                row["images"][slot] = self.read_image(sample, index)
            else:
                row[FEATURES][slot] = self.features.read(digest(sample.images[index]))
            row["image_mask"][slot] = True
        return row | {"id": sample.id, "skipped": ""}

    def padding(self, _: int = 0) -> dict[str, Any]:
        """An empty row: segment 0 everywhere, no weight, no image."""
        row = self._lay_out([])
        del row["slots"]
        return row | {"id": "", "skipped": ""}

    def _lay_out(self, encoded: Sequence[EncodedSample]) -> dict[str, Any]:
        row = layout_row(encoded, self.seq_len, self.image_slots, self.num_tokens_per_image)
        side, slots = self.processor.size, self.image_slots
        if self.features is None:
            row["images"] = np.zeros((slots, side, side, 3), np.uint8)
        else:
            row[FEATURES] = np.zeros((slots, *self.features.shape), self.features.dtype)
        row["image_mask"] = np.zeros(self.image_slots, np.bool_)
        return row


def check_fits(sample: EncodedSample, seq_len: int, label_tokens: int | None) -> None:
    """Refuses a sample that a row of its own could not hold; see `RowEncoder` for the limits.

    Raises:
      SampleTooLong, TooManyLabels: naming the sample.
    """
    if len(sample) > seq_len:
        raise SampleTooLong(sample.sample, len(sample), seq_len)
    check_labels(sample, label_tokens)


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


def stack_rows(rows: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Rows to a batch: arrays stacked along `B`, `ids` a list, `skipped` a list of the reasons there are."""
    keys = [key for key in (*ARRAYS, FEATURES) if key in rows[0]]
    batch: dict[str, Any] = {key: np.stack([row[key] for row in rows]) for key in keys}
    batch["ids"] = [row["id"] for row in rows]
    batch["skipped"] = [row["skipped"] for row in rows if row["skipped"]]
    return batch


def padding_share(segment_ids: Int32[np.ndarray, "B T"]) -> float:
    """The share of positions that hold no token, from 0 to 1."""
    return float(np.mean(segment_ids == 0))
