"""Pretrains the mini tokenizer, vision tower and LLM and writes them as Hugging Face directories."""

import functools
import json
import pathlib
import queue
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import optax.contrib
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mllm_jax.files import no_links
from mllm_jax.mini.foundation import pictures, tower
from mllm_jax.mini.foundation.text import phased_batches
from mllm_jax.mini.foundation.tokenizer import train_tokenizer
from mllm_jax.mini.world import GRADED
from mllm_jax.models.decoder import Decoder, DecoderConfig
from mllm_jax.models.vit import VisionConfig
from mllm_jax.training.optimizer import muon_dimensions


def schedule(peak: float, points: Sequence[tuple[int, int | float]]) -> optax.Schedule:
    """Rate by step: straight lines through `points` of (step, share of `peak`)."""
    steps, shares = np.array(points, np.float32).T
    return lambda count: peak * jnp.interp(jnp.asarray(count, jnp.float32), steps, shares)


def _optimizer(config: ConfigDict, params: Any) -> optax.GradientTransformation:
    """AdamW, or Muon for the matrices inside the blocks and Adam for embeddings, heads, norms and biases."""

    def rate(peak: float) -> optax.Schedule:
        return schedule(peak, config.schedule)

    if config.optimizer == "adamw":
        decays = jax.tree.map(lambda x: x.ndim > 1, params)
        return optax.adamw(
            rate(config.learning_rate), b2=config.b2, weight_decay=config.weight_decay, mask=decays
        )
    return optax.contrib.muon(
        rate(config.matrix_learning_rate),
        weight_decay=config.weight_decay,
        adam_learning_rate=rate(config.learning_rate),
        adam_b2=config.b2,
        muon_weight_dimension_numbers=muon_dimensions,
    )


def _ahead(batches: Iterator[Any], depth: int = 4) -> Iterator[Any]:
    """Runs an endless iterator in a thread; an error in it is raised here."""
    waiting: queue.Queue = queue.Queue(depth)

    def work():
        try:
            for batch in batches:
                waiting.put(batch)
        except Exception as error:
            waiting.put(error)

    threading.Thread(target=work, daemon=True).start()
    while True:
        item = waiting.get()
        if isinstance(item, Exception):
            raise item
        yield item


def fit(
    name: str,
    loss_fn: Callable[[Any, Any], tuple[jax.Array, dict[str, jax.Array]]],
    params: Any,
    batches_from: Callable[[int], Iterator[Any]],
    config: ConfigDict,
    workdir: pathlib.Path,
) -> Any:
    """Minimises `loss_fn(params, batch) -> (loss, metrics)`; resumes from the newest checkpoint in `workdir`.

    Metrics go to `metrics.jsonl` and to the terminal.
    """

    steps = config.schedule[-1][0]
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), _optimizer(config, params))
    state = {"params": params, "opt": optimizer.init(params)}

    @functools.partial(jax.jit, donate_argnums=0)
    def update(state, batch):
        (_, metrics), grads = jax.value_and_grad(loss_fn, has_aux=True)(state["params"], batch)
        updates, opt = optimizer.update(grads, state["opt"], state["params"])
        return {"params": optax.apply_updates(state["params"], updates), "opt": opt}, metrics

    options = ocp.CheckpointManagerOptions(max_to_keep=2, enable_async_checkpointing=False)
    workdir.mkdir(parents=True, exist_ok=True)
    with (
        ocp.CheckpointManager((workdir / "checkpoints").absolute(), options=options) as manager,
        open(workdir / "metrics.jsonl", "a", opener=no_links) as log,
    ):
        start = manager.latest_step() or 0
        if start:
            state = manager.restore(start, args=ocp.args.StandardRestore(state))
        begin, since = time.time(), start
        window: list[dict[str, jax.Array]] = []
        batches = _ahead(batches_from(start))
        for step in range(start + 1, steps + 1):
            state, metrics = update(state, next(batches))
            window.append(metrics)
            if step % config.log_every == 0 or step == steps:
                mean = {key: float(np.mean([m[key] for m in window])) for key in metrics}
                window.clear()
                if not np.isfinite(mean["loss"]):
                    raise FloatingPointError(f"{name}: loss is not finite before step {step}")
                speed = (step - since) / (time.time() - begin)
                log.write(json.dumps({"step": step, **mean, "steps_per_second": speed}) + "\n")
                log.flush()
                shown = " ".join(f"{key}={value:.3f}" for key, value in mean.items() if "count_" not in key)
                print(f"{name} {step}/{steps} {speed:.2f} steps/s {shown}", flush=True)
            if step % config.save_every == 0 or step == steps:
                manager.save(step, args=ocp.args.StandardSave(state))
    return state["params"]


def vision_geometry(config: ConfigDict) -> VisionConfig:
    """The tower: SigLIP's layout (no class token, biased patches, tanh GELU, no pre-norm)."""
    return VisionConfig(
        **config.geometry,
        activation="gelu_tanh",
        eps=1e-6,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def train_tower(config: ConfigDict, workdir: pathlib.Path):
    """Returns (VisionConfig, tower parameters)."""
    vision = vision_geometry(config)
    pools, first = [], config.first_picture
    for size, count in zip(config.sizes, config.pictures, strict=True):
        pools.append(
            pictures.render_pool(
                workdir / f"pictures_{size}",
                first=first,
                count=count,
                size=size,
                patch=vision.patch,
                dense=config.dense,
                difficulty=GRADED,
                seed=config.seed,
            )
        )
        first += count
    params = fit(
        "tower",
        functools.partial(tower.tower_loss, vision),
        tower.init_tower(vision, config.seed),
        lambda start: pictures.pool_batches(
            pools, list(config.shares), config.batch, config.seed, start, dict(config.emphasis)
        ),
        config.fit,
        workdir,
    )
    return vision, params


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
    """Weighted next-token loss, and the accuracy on the answers (weight 1)."""
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
    right = (logits.argmax(-1) == targets) & answers
    text = (weights > 0) & ~answers
    return loss, {
        "loss": loss,
        "answer_loss": (losses * answers).sum() / answers.sum(),
        "answer_accuracy": right.sum() / answers.sum(),
        "text_loss": (losses * text).sum() / jnp.maximum(text.sum(), 1),
    }


def llm_geometry(config: ConfigDict, vocab: int) -> DecoderConfig:
    """The LLM: a small Llama with a tied head."""
    return DecoderConfig(vocab=vocab, tied=True, **config.geometry)


def train_llm(config: ConfigDict, tokenizer: PreTrainedTokenizerFast, workdir: pathlib.Path):
    """Returns (DecoderConfig, decoder parameters)."""
    geometry = llm_geometry(config, len(tokenizer))
    zeros = jnp.zeros((1, 8), jnp.int32)

    def run(module, tokens):
        return module(module.embed(tokens), tokens, tokens)

    params = Decoder(geometry).init(jax.random.key(config.seed), zeros, method=run)["params"]
    # Where Adam's first steps outweigh the initial differences between words, all colors become one vector (cosines
    # of 0.9 were seen), and no question about them is learned.
    params["embedding"] *= config.embedding_std / jnp.std(params["embedding"])
    params = fit(
        "llm",
        functools.partial(llm_loss, geometry),
        params,
        lambda start: phased_batches(tokenizer, config.seed, config.phases, config.first_text, start),
        config.fit,
        workdir,
    )
    return geometry, params


def prepare_tokenizer(config: ConfigDict, workdir: pathlib.Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a foundation run, trained at the first call."""
    directory = workdir / "tokenizer"
    if not (directory / "tokenizer.json").exists():
        train_tokenizer(config.vocab, config.samples, config.seed, directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)
