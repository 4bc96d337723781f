"""Answers piece by piece: joined they are the whole answer, whatever its tokens are."""

import itertools
import random

import pytest
import tiny
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.tokens import SampleTooLong
from mllm_jax.inference.model import Model
from mllm_jax.inference.stream import TextStream, answer_text

TEXT = "  naïve ### 😀 #€ \n\n### end"


@pytest.fixture(scope="module")
def sentencepiece():
    """A tokenizer that spells what it has no token for in bytes, as Llama's does."""
    words = ["<unk>", "▁a", "b", "#", "▁", "é", *(f"<0x{byte:02X}>" for byte in range(256))]
    model = models.BPE({word: i for i, word in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True)
    tokenizer = Tokenizer(model)
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def streamed(tokenizer, tokens, stops):
    stream, pieces = TextStream(tokenizer, stops), []
    for token in tokens:
        pieces.append(stream.push(token))
        if stream.stopped:
            break
    return [*pieces, stream.finish()]


def test_joined_pieces_are_the_whole_text(tiny_tokenizer, sentencepiece):
    rng = random.Random(0)
    symbols = [tiny_tokenizer(text).input_ids for text in ("é", "€", "😀", "#", " ", "\n", "a", "###")]
    rows = [(tiny_tokenizer, tiny_tokenizer(TEXT).input_ids)]
    for _ in range(100):
        pieces = [rng.choice(symbols) for _ in range(8)]
        broken = [
            piece[: rng.choice((1, len(piece)))] for piece in pieces
        ]  # characters without their last bytes
        rows += [(tiny_tokenizer, list(itertools.chain(*row))) for row in (pieces, broken)]
        words = [rng.choice((1, 2, 3, 4, 5, 6 + 0xC3, 6 + 0xA9, 6 + 0xE2, 6 + 0x41)) for _ in range(10)]
        rows.append((sentencepiece, words))
    for tokenizer, tokens in rows:
        for stops in ((), ("###",), ("\n", "a#b", "#"), ("##€", "€")):
            assert "".join(streamed(tokenizer, tokens, stops)) == answer_text(tokenizer, tokens, stops)[0]


def test_pieces_come_as_soon_as_they_are_certain(tiny_tokenizer):
    pieces = streamed(tiny_tokenizer, tiny_tokenizer("a 😀b #c ###d").input_ids, ("###",))
    assert pieces == ["a", "", "", "", "", " 😀", "b", "", "", " #c", "", "", "", "", ""]
    assert answer_text(tiny_tokenizer, tiny_tokenizer("a ###d").input_ids, ("###",)) == ("a", True)


def test_a_model_streams_what_it_generates(tiny_model, tiny_params, tiny_tokenizer):
    model = Model(tiny_model, tiny_params, tiny_tokenizer, ImageProcessor.clip(tiny.IMAGE_SIZE), "vicuna_v1")
    drawn = {"temperature": 2.0, "seed": 3, "stop": ["e", "\n"]}
    settings = {**drawn, "history": [("how?", "so")], "max_new_tokens": 24}
    pieces = list(model.stream(tiny.png(0), "what?", **settings))
    assert "".join(pieces) == model.generate(tiny.png(0), "what?", **settings)
    assert len(pieces) > 1
    with pytest.raises(SampleTooLong, match="limit of 512"):
        list(model.stream(None, "what?", max_new_tokens=512))
