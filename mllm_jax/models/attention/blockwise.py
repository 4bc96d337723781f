"""Attention in blocks of keys with a running softmax: logits of a whole row never exist, on any platform.

Each row and block of queries visits only the blocks of keys that it attends to: from the first key of its earliest
segment or window to its last. The backward pass computes the logits again (FlashAttention, Dao et al. 2022).
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllm_jax.models.attention.devices import per_device
from mllm_jax.models.attention.mask import AttentionMask
from mllm_jax.models.attention.use import Use

BLOCK = 64
WHOLE_BLOCK = 128  # where everything attends to everything, so that no block can be skipped
SHORT = 256  # positions from which on it was at least as fast as "xla" on a CPU (benchmarks/attention.py)
# Finite stand-ins for minus infinity. Where a query meets only masked keys, its maximum stays at _NONE and the weight
# exp(_MASKED - _NONE) is 0.
_MASKED, _NONE = -2e30, -1e30


def refusal(use: Use) -> str | None:
    """Nothing is beyond it."""


def slower(use: Use) -> str | None:
    """Why "xla" is as fast for this on a CPU, if it is."""
    return f"rows of {use.length} are short" if use.length and use.length < SHORT else None


def attend(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: AttentionMask | None,
    scale: float,
    softcap: float | None,
    block: int | None = None,
) -> Float[Array, "B T H h"]:
    """`mllm_jax.models.attention.attend` with every argument given and T = S.

    Args:
      block: most queries, and most keys, at once; None = as measured to be fast on CPUs.
    """
    block = block or (WHOLE_BLOCK if mask is None else BLOCK)
    batch, length = q.shape[:2]
    if mask is None:
        first, last = jnp.zeros((batch, length), jnp.int32), jnp.full((batch, length), length - 1)
    else:
        first, last = mask.key_ranges()
    blocks = -(-length // block)
    size = -(-length // (8 * blocks)) * 8  # as even as can be: no last block that is mostly padding
    padding = [(0, 0), (0, blocks * size - length)]
    first, last = jnp.pad(first, padding, constant_values=1), jnp.pad(last, padding)  # padding has no keys
    q, k, v = (jnp.pad(x, [*padding, (0, 0), (0, 0)]) for x in (q, k, v))

    def kernel(q, k, v, first, last):
        rows, length, heads, width = q.shape
        groups = k.shape[2]
        # [rows, blocks, K, G * size, h]: the query heads of a group are further queries to its keys.
        q = q.reshape(rows, blocks, size, groups, heads // groups, width).transpose(0, 1, 3, 4, 2, 5)
        k, v = (x.reshape(rows, blocks, size, groups, width).swapaxes(2, 3) for x in (k, v))
        first, last = (
            jnp.tile(x.reshape(rows, blocks, size), (1, 1, heads // groups)) for x in (first, last)
        )
        out = _attend(q.reshape(rows, blocks, groups, -1, width), k, v, first, last, scale, softcap)
        out = out.reshape(rows, blocks, groups, heads // groups, size, width)
        return out.transpose(0, 1, 4, 2, 3, 5).reshape(rows, length, heads, width)

    return per_device(kernel, q, k, v, first, last)[:, :length]


def _visited(first: Int[Array, " Q"], last: Int[Array, " Q"], size: int) -> tuple[Array, Array]:
    """First and past-the-last block of keys that a block of queries attends to; equal where it is all padding."""
    any_keys = last >= first
    start = jnp.where(any_keys, first, jnp.iinfo(first.dtype).max).min() // size
    stop = jnp.where(any_keys, last, -1).max() // size + 1
    return jnp.minimum(start, stop), stop


def _logits(q: Array, k: Array, index: Array, first: Array, last: Array, scale: float, softcap: float | None):
    """float32[K, Q, size] of one block of keys, masked; and the derivative of the soft cap, if there is one."""
    logits = jnp.einsum("kqh,ksh->kqs", q, k, preferred_element_type=jnp.float32) * scale
    slope = None
    if softcap is not None:
        logits = jnp.tanh(logits / softcap)
        slope = 1 - jnp.square(logits)
        logits = softcap * logits
    columns = index * k.shape[1] + jnp.arange(k.shape[1])
    allowed = (first[:, None] <= columns) & (columns <= last[:, None])
    return jnp.where(allowed, logits, _MASKED), slope


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(q, k, v, first, last, scale, softcap):
    return _forward(q, k, v, first, last, scale, softcap)[0]


def _forward(
    q: Float[Array, "B n K Q h"],
    k: Float[Array, "B n K s h"],
    v: Float[Array, "B n K s h"],
    first: Int[Array, "B n Q"],
    last: Int[Array, "B n Q"],
    scale: float,
    softcap: float | None,
) -> tuple[Float[Array, "B n K Q h"], Float[Array, "B n K Q"]]:
    """The output and the log of every query's sum of exponentials."""

    def row(arrays):
        q, k, v, first, last = arrays

        def queries(arrays):
            q, first, last = arrays
            start, stop = _visited(first, last, k.shape[2])

            def keys(index, carry):
                top, total, out = carry
                logits, _ = _logits(q, k[index], index, first, last, scale, softcap)
                new_top = jnp.maximum(top, logits.max(-1))
                weights = jnp.exp(logits - new_top[..., None])
                shrink = jnp.exp(top - new_top)
                values = jnp.einsum(
                    "kqs,ksh->kqh", weights.astype(v.dtype), v[index], preferred_element_type=jnp.float32
                )
                return new_top, total * shrink + weights.sum(-1), out * shrink[..., None] + values

            zero = jnp.zeros(q.shape[:2], jnp.float32)
            carry = (zero + _NONE, zero, jnp.zeros(q.shape, jnp.float32))
            top, total, out = jax.lax.fori_loop(start, stop, keys, carry)
            total = jnp.where(total == 0, 1, total)  # padding
            return (out / total[..., None]).astype(q.dtype), top + jnp.log(total)

        return jax.lax.map(queries, (q, first, last))

    return jax.lax.map(row, (q, k, v, first, last))


def _forward_and_keep(q, k, v, first, last, scale, softcap):
    out, log_total = _forward(q, k, v, first, last, scale, softcap)
    return out, (q, k, v, first, last, out, log_total)


def _backward(scale, softcap, kept, d_out):
    def row(arrays):
        q, k, v, first, last, out, log_total, d_out = arrays
        d_k, d_v = jnp.zeros(k.shape, jnp.float32), jnp.zeros(v.shape, jnp.float32)

        def queries(carry, arrays):
            q, first, last, out, log_total, d_out = arrays
            start, stop = _visited(first, last, k.shape[2])
            # The softmax's own share of the gradient, the same for all keys of a query.
            mean = jnp.einsum("kqh,kqh->kq", out, d_out, preferred_element_type=jnp.float32)

            def keys(index, carry):
                d_q, d_k, d_v = carry
                key, value = k[index], v[index]
                logits, slope = _logits(q, key, index, first, last, scale, softcap)
                weights = jnp.exp(logits - log_total[..., None])
                d_weights = jnp.einsum("kqh,ksh->kqs", d_out, value, preferred_element_type=jnp.float32)
                d_logits = weights * (d_weights - mean[..., None]) * scale
                if slope is not None:
                    d_logits = d_logits * slope
                d_logits, weights = d_logits.astype(key.dtype), weights.astype(value.dtype)
                add = functools.partial(jnp.einsum, preferred_element_type=jnp.float32)
                d_q = d_q + add("kqs,ksh->kqh", d_logits, key)
                d_k = d_k.at[index].add(add("kqs,kqh->ksh", d_logits, q))
                return d_q, d_k, d_v.at[index].add(add("kqs,kqh->ksh", weights, d_out))

            carry = (jnp.zeros(q.shape, jnp.float32), *carry)
            d_q, d_k, d_v = jax.lax.fori_loop(start, stop, keys, carry)
            return (d_k, d_v), d_q.astype(q.dtype)

        (d_k, d_v), d_q = jax.lax.scan(queries, (d_k, d_v), (q, first, last, out, log_total, d_out))
        return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)

    return (*jax.lax.map(row, (*kept, d_out)), None, None)


_attend.defvjp(_forward_and_keep, _backward)
