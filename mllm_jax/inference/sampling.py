"""Choosing the next token: the likeliest, or drawn at a temperature from the most probable ones.

A request's draws are made from its own seed and id and from how many tokens its answer has, and from nothing else: the
same for any batch size, bucket, order of rows and number of devices.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt, UInt32


def request_key(seed: int, request: str) -> UInt32[np.ndarray, "2"]:
    """The random key of one request."""
    digest = hashlib.sha256(f"{seed} {request}".encode()).digest()
    return np.frombuffer(digest[:8], "<u4").astype(np.uint32)


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How the tokens of an answer are drawn.

    Attributes:
      temperature: divides the logits; 0 = always the likeliest token.
      top_p: only the most probable tokens are drawn, as few as have at least this probability together, at the
        temperature (nucleus sampling, arXiv 1904.09751); 1 = all.
      seed: another one gives other answers.

    Raises:
      ValueError: a negative temperature, or `top_p` outside (0, 1].
    """

    temperature: float | int = 1.0
    top_p: float | int = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < float("inf"):
            raise ValueError(f"temperature={self.temperature} must be a number of at least 0")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must be above 0 and at most 1")


@flax.struct.dataclass
class Draws:
    """What the rows of a batch draw with; see `Sampling`.

    Attributes:
      keys: of each row's request.
    """

    keys: UInt[Array, "B 2"]
    temperature: Float[Array, " B"]
    top_p: Float[Array, " B"]


def make_draws(samplings: Sequence[Sampling | None], requests: Sequence[str], rows: int) -> Draws | None:
    """The draws of a batch of `rows` rows, the first of which belong to requests; None if none is drawn.

    Args:
      samplings: per request; None = greedy.
      requests: their ids.
    """
    if not any(sampling is not None and sampling.temperature > 0 for sampling in samplings):
        return None
    return every_draw(samplings, requests, rows)


def every_draw(samplings: Sequence[Sampling | None], requests: Sequence[str], rows: int) -> Draws:
    """As `make_draws`, also where no row draws."""
    keys = np.zeros((rows, 2), np.uint32)
    temperature, top_p = np.zeros(rows, np.float32), np.ones(rows, np.float32)
    for row, (sampling, request) in enumerate(zip(samplings, requests, strict=True)):
        if sampling is not None:
            keys[row] = request_key(sampling.seed, request)
            temperature[row], top_p[row] = sampling.temperature, sampling.top_p
    return Draws(jnp.asarray(keys), jnp.asarray(temperature), jnp.asarray(top_p))


def choose(logits: Float[Array, "B V"], draws: Draws | None, counts: Int[Array, " B"]) -> Int[Array, " B"]:
    """The next token of every row.

    Args:
      draws: None = the likeliest token in all rows.
      counts: tokens that the answers have so far, which number the draws.
    """
    likeliest = jnp.argmax(logits, axis=-1).astype(jnp.int32)
    if draws is None:
        return likeliest
    scaled = logits / jnp.maximum(draws.temperature, 1e-6)[:, None]
    kept = jnp.where(scaled >= _lowest_kept(scaled, draws.top_p)[:, None], scaled, -jnp.inf)

    def noise(key: Array, count: Array) -> Array:
        key = jax.random.fold_in(jax.random.wrap_key_data(key, impl="threefry2x32"), count)
        return jax.random.gumbel(key, logits.shape[-1:], jnp.float32)

    drawn = jnp.argmax(kept + jax.vmap(noise)(draws.keys, counts), axis=-1).astype(jnp.int32)
    return jnp.where(draws.temperature > 0, drawn, likeliest)


def _lowest_kept(logits: Float[Array, "B V"], top_p: Float[Array, " B"]) -> Float[Array, " B"]:
    """The lowest logit among the fewest tokens that have a probability of `top_p` together."""
    ordered = jnp.sort(logits, axis=-1, descending=True)
    probabilities = jax.nn.softmax(ordered, axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # All tokens where top_p is 1, whatever the rounding of the sum; the likeliest is kept always, as 0 < top_p.
    kept = (before < top_p[:, None]) | (top_p[:, None] >= 1)
    return jnp.min(jnp.where(kept, ordered, jnp.inf), axis=-1)
