"""From spans to token ids, labels and visual positions, and from samples to rows of static shape.

Every maximal run of text of one kind (learned or not) is tokenized by one call, in the context it stands in;
no prefix is ever re-tokenized to count. A prompt's tokens are thus always a prefix of the training sample's.

Special tokens are looked up by name where the template writes them. Text written by people is never parsed
for them: a user who types ``</s>`` gets the characters.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from mllm_jax.data.batch import SELECT, Batch, Combination
from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.conversations import SampleError, Span, Turn, render
from mllm_jax.data.layout import VisualLayout
from mllm_jax.data.span_tokenizer import span_tokenizer
from mllm_jax.data.templates import Template


class SampleTooLong(SampleError):
    """A sample has more tokens than a row; ``length`` and ``limit`` are in tokens."""

    fix = "raise the stage's seq_len (data.seq_len where it has none), or set data.overlong=skip"

    def __init__(self, sample: str, length: int, limit: int):
        super().__init__(
            sample, f"has {length} tokens (visual tokens included), more than the limit of {limit}"
        )
        self.length = length
        self.limit = limit

    def __reduce__(self):
        return type(self), (self.sample, self.length, self.limit)


class TooManyImages(SampleError):
    """A sample's images fill more slots (``slots``) than a row has (``limit``)."""

    fix = "raise the stage's image_slots (data.image_slots where it has none)"

    def __init__(self, sample: str, images: int, slots: int, limit: int):
        filling = "" if images == slots else f", which fill {slots} slots"
        super().__init__(sample, f"has {images} images{filling}, more than the row's {limit} image slots")
        self.images = images
        self.slots = slots
        self.limit = limit

    def __reduce__(self):
        return type(self), (self.sample, self.images, self.slots, self.limit)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSample:
    """A sample as the model reads it.

    Attributes:
        sample: its id.
        tokens: token ids; 0 at the visual tokens, which the model fills in.
        loss_weights: weight of predicting ``tokens[t]``; 0 at the first token, which nothing predicts.
        visual_index: which slot token stands here as a visual token, counted over all tokens of the sample's image
            slots, slot after slot; -1 for text, `SEPARATOR` for the learned separator.
        image_of: which image of the sample the visual token belongs to; -1 for text.
        layouts: of each image, in order.
        visual_taps, visual_weights: where visual tokens are combinations, as in `Batch`.
    """

    sample: str
    tokens: Int32[np.ndarray, " T"]
    loss_weights: Float32[np.ndarray, " T"]
    visual_index: Int32[np.ndarray, " T"]
    image_of: Int32[np.ndarray, " T"]
    layouts: tuple[VisualLayout, ...]
    visual_taps: Int32[np.ndarray, "T K"] | None = None
    visual_weights: Float32[np.ndarray, "T K"] | None = None

    def __len__(self) -> int:
        return len(self.tokens)

    @property
    def combination(self) -> Combination:
        """That of its visual tokens; a sample without images has none."""
        if self.visual_taps is None:
            return SELECT
        return Combination(self.visual_taps.shape[1], "max" if self.visual_weights is None else "sum")

    @property
    def num_slots(self) -> int:
        """Image slots that the sample's images fill."""
        return sum(len(layout.slots) for layout in self.layouts)


def stop_ids(template: str | Template, tokenizer: Any) -> list[int]:
    """Ids that end a generated answer: the tokenizer's EOS and the template's closing special token.

    Templates that close with text (``v0``: ``###``, ``plain``: a newline) have only the EOS here; cut the
    generated text at ``template.answer_close`` as well.
    """
    template = resolve_template(template, tokenizer)
    wrapped = span_tokenizer(tokenizer)
    eos = wrapped.tokenizer.eos_token_id
    ids = set() if eos is None else {int(eos)}
    close = template.answer_close.strip(" ")
    if close in template.specials:
        ids.add(wrapped.special(close))
    return sorted(ids)


def encode_sample(
    spans: Sequence[Span],
    tokenizer: Any,
    layouts: Sequence[VisualLayout],
    *,
    sample: str = "?",
    labels: bool = True,
) -> EncodedSample:
    """Tokenize a rendered conversation and expand its images.

    BOS is put first once if the tokenizer adds one, also where the template spells it. The loss covers the
    learned spans; BOS, system text, questions, role headers and visual tokens are masked.

    Args:
        spans: from ``render``.
        tokenizer: a Hugging Face tokenizer, or a ``SpanTokenizer`` around one.
        layouts: of each image, in order.
        sample: its id, for messages.
        labels: False leaves every weight 0 (prompts).

    Raises:
        SampleError: no supervised token, or image counts that do not fit the spans.
        ValueError: the tokenizer lacks one of the template's special tokens.
    """
    wrapped = span_tokenizer(tokenizer)
    markers = {span.text: wrapped.special(span.text) for span in spans if span.special}
    num_images = sum(span.image for span in spans)
    if len(layouts) != num_images:
        raise SampleError(sample, f"{num_images} placeholder(s) but {len(layouts)} image(s)")

    tokens: list[int] = []
    pieces: list[tuple[int, bool, int]] = []  # their lengths, whether learned, and the images they show

    def put(ids: Sequence[int], learn: bool, image: int = -1) -> None:
        tokens.extend(ids)
        pieces.append((len(ids), learn, image))

    if not (spans and spans[0].special and markers[spans[0].text] in wrapped.bos):
        put(wrapped.bos, False)
    context, image = "start", 0
    for span in _join_runs(spans):
        if span.image:
            put([0] * layouts[image].num_tokens, False, image)
            context, image = "start", image + 1
        elif span.special:
            put([markers[span.text]], span.learn)
            context = "special"
        else:
            try:
                put(wrapped.text(span.text, context, markers), span.learn)
            except ValueError as error:
                raise SampleError(sample, str(error)) from error
            context = "middle"

    lengths, learned, images = np.array(pieces, np.int32).reshape(-1, 3).T
    loss_weights = np.repeat(learned.astype(np.float32), lengths)
    loss_weights[:1] = 0.0
    if not labels:
        loss_weights[:] = 0.0
    elif not loss_weights.any():
        raise SampleError(sample, "has no supervised token: no answer for the loss to cover")
    image_of = np.repeat(images, lengths)
    return EncodedSample(
        sample=sample,
        tokens=np.asarray(tokens, np.int32),
        loss_weights=loss_weights,
        image_of=image_of,
        layouts=tuple(layouts),
        **_visual(image_of, layouts),
    )


def _visual(
    image_of: Int32[np.ndarray, " T"], layouts: Sequence[VisualLayout]
) -> dict[str, np.ndarray | None]:
    """The fields `visual_...` of a sample."""
    kept, first = [], 0  # of the image's slots' tokens
    for layout in layouts:
        kept.append(_counted_from(first, layout.kept))
        first += layout.slot_tokens
    index = np.full(len(image_of), -1, np.int32)
    if not kept:
        return {"visual_index": index}
    here = image_of >= 0  # images stand in their order
    taps = np.concatenate(kept)
    index[here] = taps if taps.ndim == 1 else taps[:, 0]
    fields: dict[str, np.ndarray | None] = {"visual_index": index}
    if taps.ndim > 1:
        fields["visual_taps"] = np.zeros((len(image_of), taps.shape[1]), np.int32)
        fields["visual_taps"][here] = taps
    if layouts[0].weights is not None:
        fields["visual_weights"] = np.zeros((len(image_of), taps.shape[1]), np.float32)
        fields["visual_weights"][here] = np.concatenate([layout.weights for layout in layouts])
    return fields


def _counted_from(first: int, index: Int32[np.ndarray, "*n"]) -> Int32[np.ndarray, "*n"]:
    """Indices of slot tokens, `first` of which stand before these; other codes as they are."""
    return np.where(index >= 0, first + index, index).astype(np.int32)


def encode_prompt(
    template: str | Template,
    turns: Sequence[Turn],
    tokenizer: Any,
    layouts: Sequence[VisualLayout],
    *,
    sample: str = "?",
) -> EncodedSample:
    """A prompt for generation: ``encode_sample`` of the turns and the open answer header, nothing supervised.

    Raises:
        SampleError: the last turn is not a human's.
    """
    spans = render(resolve_template(template, tokenizer), turns, add_generation_prompt=True, sample=sample)
    return encode_sample(spans, tokenizer, layouts, sample=sample, labels=False)


def _join_runs(spans: Sequence[Span]) -> Iterator[Span]:
    """Neighbouring texts of one kind become one span, so that one tokenizer call sees them whole."""
    for (learn, joined), group in itertools.groupby(
        spans, lambda span: (span.learn, not (span.image or span.special))
    ):
        if joined:
            yield Span("".join([span.text for span in group]), learn)
        else:
            yield from group


def slot_grids(sample: EncodedSample) -> Int32[np.ndarray, "n 2"]:
    """Rows and columns of patches of a sample's slots, where these hold images at their own aspect ratio."""
    return np.asarray([layout.grid for layout in sample.layouts for _ in layout.slots], np.int32).reshape(
        -1, 2
    )


def layout_row(samples: Sequence[EncodedSample], spec: Batch) -> tuple[Batch, list[tuple[int, int, slice]]]:
    """One row of a batch: one sample, or several packed one after the other.

    Args:
        samples: in the order in which they are laid out.
        spec: shapes of the row, `Batch.spec` without a number of rows.

    Returns:
        The row, with empty images or features in its slots; and for each image, in order, (the sample's index in
        ``samples``, the image's index in that sample, the row's slots that it fills).

    Raises:
        SampleTooLong: one sample alone is longer than the row.
        TooManyImages: the images of one sample alone fill more slots than there are.
        ValueError: the samples fit one by one but not together.
    """
    room = spec.tokens.shape[0]
    image_slots = 0 if spec.image_mask is None else spec.image_mask.shape[0]
    for sample in samples:
        if len(sample) > room:
            raise SampleTooLong(sample.sample, len(sample), room)
        if sample.num_slots > image_slots:
            raise TooManyImages(sample.sample, len(sample.layouts), sample.num_slots, image_slots)
    length = sum(len(sample) for sample in samples)
    slots_needed = sum(sample.num_slots for sample in samples)
    if length > room or slots_needed > image_slots:
        names = ", ".join(repr(sample.sample) for sample in samples)
        raise ValueError(
            f"samples {names} do not fit one row: {length} tokens of {room}, {slots_needed} image slots of "
            f"{image_slots}"
        )

    row = spec.empty()
    images: list[tuple[int, int, slice]] = []
    # Position of the sample, the image's first slot, and that slot's first token in the row.
    start = slot = first = 0
    for index, sample in enumerate(samples):
        here = slice(start, start + len(sample))
        row.tokens[here] = sample.tokens
        row.positions[here] = np.arange(len(sample))
        row.segment_ids[here] = index + 1
        row.loss_weights[here] = sample.loss_weights
        row.visual_index[here] = _counted_from(first, sample.visual_index)
        if sample.visual_taps is not None:
            row.visual_taps[here] = _counted_from(first, sample.visual_taps)
        if sample.visual_weights is not None:
            row.visual_weights[here] = sample.visual_weights
        if row.grids is not None:
            row.grids[slot : slot + sample.num_slots] = slot_grids(sample)
        for image, layout in enumerate(sample.layouts):
            images.append((index, image, slice(slot, slot + len(layout.slots))))
            slot += len(layout.slots)
            first += layout.slot_tokens
        start += len(sample)
    if slot:
        row.image_mask[:slot] = True
    return row, images
