"""From spans to token ids, labels and visual positions, and from samples to the fixed-size rows of a batch.

Every maximal run of text of one kind (learned or not) is tokenized by one call, in the context it stands in;
no prefix is ever re-tokenized to count. A prompt's tokens are thus always a prefix of the training sample's.

Special tokens are looked up by name where the template writes them. Text written by people is never parsed
for them: a user who types ``</s>`` gets the characters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float32, Int32

from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.conversations import SampleError, Span, Turn, render
from mllm_jax.data.span_tokenizer import span_tokenizer
from mllm_jax.data.templates import Template


class SampleTooLong(SampleError):
    """A sample has more tokens than a row; ``length`` and ``limit`` are in tokens."""

    way_out = "raise the stage's seq_len (data.seq_len where it has none), or set data.overlong=skip"

    def __init__(self, sample: str, length: int, limit: int):
        super().__init__(
            sample, f"has {length} tokens (visual tokens included), more than the limit of {limit}"
        )
        self.length = length
        self.limit = limit

    def __reduce__(self):
        return type(self), (self.sample, self.length, self.limit)


@dataclasses.dataclass(frozen=True, eq=False)
class EncodedSample:
    """A sample as the model reads it.

    Attributes:
        sample: its id.
        tokens: token ids; 0 at the visual tokens, which the model fills in.
        loss_weights: weight of predicting ``tokens[t]``; 0 at the first token, which nothing predicts.
        visual_index: running number of the visual token within the sample, all images in order; -1 for text.
        image_of: which image of the sample the visual token belongs to; -1 for text.
        image_tokens: number of visual tokens of each image, in order.
    """

    sample: str
    tokens: Int32[np.ndarray, " T"]
    loss_weights: Float32[np.ndarray, " T"]
    visual_index: Int32[np.ndarray, " T"]
    image_of: Int32[np.ndarray, " T"]
    image_tokens: tuple[int, ...]

    def __len__(self) -> int:
        return len(self.tokens)


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


VisualTokens = Sequence[int] | Callable[[int], int]


def encode_sample(
    spans: Sequence[Span],
    tokenizer: Any,
    num_visual_tokens: VisualTokens,
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
        num_visual_tokens: how many tokens each image becomes: one number per image, or a function of the
            image's index within the sample.
        sample: its id, for messages.
        labels: False leaves every weight 0 (prompts).

    Raises:
        SampleError: no supervised token, or image counts that do not fit the spans.
        ValueError: the tokenizer lacks one of the template's special tokens.
    """
    wrapped = span_tokenizer(tokenizer)
    markers = {span.text: wrapped.special(span.text) for span in spans if span.special}
    num_images = sum(span.image for span in spans)
    if not callable(num_visual_tokens) and len(num_visual_tokens) != num_images:
        raise SampleError(
            sample, f"{num_images} placeholder(s) but token counts for {len(num_visual_tokens)} image(s)"
        )
    count = num_visual_tokens if callable(num_visual_tokens) else num_visual_tokens.__getitem__
    image_tokens = tuple(int(count(index)) for index in range(num_images))
    if any(number < 1 for number in image_tokens):
        raise SampleError(sample, f"every image needs at least one visual token, got {image_tokens}")

    tokens: list[int] = []
    weights: list[float] = []
    images: list[int] = []

    def put(ids: Sequence[int], learn: bool, image: int = -1) -> None:
        tokens.extend(ids)
        weights.extend([float(learn)] * len(ids))
        images.extend([image] * len(ids))

    if not (spans and spans[0].special and markers[spans[0].text] in wrapped.bos):
        put(wrapped.bos, False)
    context, image = "start", 0
    for span in _join_runs(spans):
        if span.image:
            put([0] * image_tokens[image], False, image)
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

    loss_weights = np.asarray(weights, np.float32)
    loss_weights[:1] = 0.0
    if not labels:
        loss_weights[:] = 0.0
    elif not loss_weights.any():
        raise SampleError(sample, "has no supervised token: no answer for the loss to cover")
    image_of = np.asarray(images, np.int32)
    visual = image_of >= 0
    return EncodedSample(
        sample=sample,
        tokens=np.asarray(tokens, np.int32),
        loss_weights=loss_weights,
        visual_index=np.where(visual, np.cumsum(visual) - 1, -1).astype(np.int32),
        image_of=image_of,
        image_tokens=image_tokens,
    )


def encode_prompt(
    template: str | Template,
    turns: Sequence[Turn],
    tokenizer: Any,
    num_visual_tokens: VisualTokens,
    *,
    sample: str = "?",
) -> EncodedSample:
    """A prompt for generation: ``encode_sample`` of the turns and the open answer header, nothing supervised.

    Raises:
        SampleError: the last turn is not a human's.
    """
    spans = render(resolve_template(template, tokenizer), turns, add_generation_prompt=True, sample=sample)
    return encode_sample(spans, tokenizer, num_visual_tokens, sample=sample, labels=False)


def _join_runs(spans: Sequence[Span]) -> list[Span]:
    """Neighbouring texts of one kind become one span, so that one tokenizer call sees them whole."""
    runs: list[Span] = []
    for span in spans:
        last = runs[-1] if runs else None
        is_text = not (span.image or span.special)
        if last is not None and is_text and not (last.image or last.special) and last.learn == span.learn:
            runs[-1] = dataclasses.replace(last, text=last.text + span.text)
        else:
            runs.append(span)
    return runs


def layout_row(
    samples: Sequence[EncodedSample], T: int, image_slots: int, tokens_per_image: int
) -> dict[str, Any]:
    """One row of a batch: one sample, or several packed one after the other.

    Args:
        samples: in the order in which they are laid out.
        T: length of the row in tokens.
        image_slots: images the row has room for.
        tokens_per_image: visual tokens a slot holds.

    Returns:
        ``tokens`` int32 [T], 0 at padding and at visual tokens;
        ``positions`` int32 [T], restarting at each sample, 0 at padding;
        ``segment_ids`` int32 [T], 1, 2, ... per sample, 0 at padding;
        ``loss_weights`` float32 [T], weight of predicting ``tokens[t]``;
        ``visual_index`` int32 [T], -1 for text, else ``slot * tokens_per_image + m``, an index into the row's
        visual tokens flattened over slots;
        ``slots``: list of (sample's index in ``samples``, image's index in that sample), one per slot in use.

    Raises:
        SampleTooLong: one sample alone is longer than the row.
        SampleError: one sample alone has more images than slots, or an image more tokens than a slot.
        ValueError: the samples fit one by one but not together.
    """
    for sample in samples:
        if len(sample) > T:
            raise SampleTooLong(sample.sample, len(sample), T)
        if len(sample.image_tokens) > image_slots:
            problem = f"has {len(sample.image_tokens)} images, more than the row's {image_slots} image slots"
            raise SampleError(sample.sample, problem)
        if max(sample.image_tokens, default=0) > tokens_per_image:
            problem = (
                f"an image becomes {max(sample.image_tokens)} tokens, more than a slot's {tokens_per_image}"
            )
            raise SampleError(sample.sample, problem)
    length = sum(len(sample) for sample in samples)
    images = sum(len(sample.image_tokens) for sample in samples)
    if length > T or images > image_slots:
        names = ", ".join(repr(sample.sample) for sample in samples)
        raise ValueError(
            f"samples {names} do not fit one row: {length} tokens of {T}, {images} images of {image_slots}"
        )

    row: dict[str, Any] = {
        "tokens": np.zeros(T, np.int32),
        "positions": np.zeros(T, np.int32),
        "segment_ids": np.zeros(T, np.int32),
        "loss_weights": np.zeros(T, np.float32),
        "visual_index": np.full(T, -1, np.int32),
        "slots": [],
    }
    start = 0
    for index, sample in enumerate(samples):
        here = slice(start, start + len(sample))
        row["tokens"][here] = sample.tokens
        row["positions"][here] = np.arange(len(sample))
        row["segment_ids"][here] = index + 1
        row["loss_weights"][here] = sample.loss_weights
        firsts = np.cumsum([0, *sample.image_tokens])[
            :-1
        ]  # running number of each image's first visual token
        visual = sample.visual_index >= 0
        image = sample.image_of[visual]
        within = sample.visual_index[visual] - firsts[image]
        row["visual_index"][here][visual] = (len(row["slots"]) + image) * tokens_per_image + within
        row["slots"] += [(index, i) for i in range(len(sample.image_tokens))]
        start += len(sample)
    return row
