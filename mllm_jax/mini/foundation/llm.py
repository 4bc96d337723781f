"""Pretraining of the mini LLM on notes and sentences."""

import functools
import pathlib
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mllm_jax.mini.foundation.fitting import Phase, fit
from mllm_jax.mini.foundation.text import conversations, packed_batches
from mllm_jax.models.decoder import Decoder, DecoderConfig

NOTE_NOISE = 0.15  # noise on a note's embedding, in units of the root mean square of the words' embeddings


def note_embeddings(apply: Callable[..., jax.Array], batch) -> jax.Array:
    """Embeddings [B, T, D] of bags of words: their sum over the square root of their number, and noise."""
    bags = batch["bags"]
    there = (bags > 0)[..., None]
    words = apply(bags.reshape(len(bags), -1), method="embed").reshape(*bags.shape, -1)
    scale = jnp.sqrt(jnp.maximum(there.sum(-2), 1))
    rms = jnp.sqrt((jnp.square(words) * there).sum() / jnp.maximum(there.sum() * words.shape[-1], 1))
    noise = jax.random.normal(jax.random.key(batch["noise_seed"]), (*bags.shape[:2], words.shape[-1]))
    return (words * there).sum(-2) / scale + NOTE_NOISE * jax.lax.stop_gradient(rms) * noise


def llm_loss(config: DecoderConfig, params, batch) -> tuple[jax.Array, dict[str, jax.Array]]:
    """Weighted next-token loss, and the accuracy on the first tokens of the answers (weight 1).

    Every answer ends with a token that is easy; the first tells whether the right thing was looked up.
    """
    decoder = Decoder(config)
    apply = functools.partial(decoder.apply, {"params": params})
    embeddings = apply(batch["tokens"], method="embed")
    embeddings = jnp.where((batch["visual_index"] >= 0)[..., None], note_embeddings(apply, batch), embeddings)
    hidden, _ = apply(embeddings, batch["positions"], batch["segment_ids"])
    logits = apply(hidden[:, :-1], method="logits")
    targets, weights = batch["tokens"][:, 1:], batch["loss_weights"][:, 1:]
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    loss = (losses * weights).sum() / weights.sum()
    answers = weights == 1
    first = answers & (batch["loss_weights"][:, :-1] != 1)
    right = (logits.argmax(-1) == targets) & first
    text = (weights > 0) & ~answers
    return loss, {
        "loss": loss,
        "answer_loss": (losses * answers).sum() / answers.sum(),
        "answer_accuracy": right.sum() / first.sum(),
        "text_loss": (losses * text).sum() / jnp.maximum(text.sum(), 1),
    }


def llm_geometry(config: ConfigDict, vocab: int) -> DecoderConfig:
    """The LLM: a small Llama."""
    return DecoderConfig(vocab=vocab, **config.geometry)


def init_llm(geometry: DecoderConfig, config: ConfigDict) -> Any:
    """Random parameters, with embeddings of standard deviation `config.embedding_std`."""
    zeros = jnp.zeros((1, 8), jnp.int32)

    def run(module, tokens):
        return module(module.embed(tokens), tokens, tokens)

    params = Decoder(geometry).init(jax.random.key(config.seed), zeros, method=run)["params"]
    # Where Adam's first steps outweigh the initial differences between words, all colors become one vector (cosines
    # of 0.9 were seen), and no question about them is learned.
    params["embedding"] *= config.embedding_std / jnp.std(params["embedding"])
    return params


def llm_phases(config: ConfigDict, tokenizer: PreTrainedTokenizerFast) -> list[Phase]:
    """The phases of `config.phases`, each with what `text.packed_batches` and what a `Phase` reads."""
    phases, first = [], config.first_text
    for phase in config.phases:
        batches = functools.partial(packed_batches, tokenizer, config.seed, phase, first)
        phases.append(Phase(phase["steps"], phase["rates"], batches, phase["until"]))
        first += phase["steps"] * conversations(phase)
    return phases


def train_llm(config: ConfigDict, tokenizer: PreTrainedTokenizerFast, workdir: pathlib.Path):
    """Returns (DecoderConfig, decoder parameters)."""
    geometry = llm_geometry(config, len(tokenizer))
    loss = functools.partial(llm_loss, geometry)
    phases = llm_phases(config, tokenizer)
    return geometry, fit("llm", loss, init_llm(geometry, config), phases, config.fit, workdir)
