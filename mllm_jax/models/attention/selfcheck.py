"""Before a run: does a backend compute here what the oracle computes, forward and backward?"""

import dataclasses
import functools
import importlib.metadata
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from mllm_jax.models.attention import BACKENDS, AttentionMask, Backend, Use, xla

LENGTH = 192  # no multiple of a kernel's block, so padding is met as well; 193 where the model's rows are odd
_SEGMENTS = (70, 50, 60)  # of the first row; the rest is padding
# Largest difference, relative to the largest value. Products of float32 are rounded to fewer bits on accelerators.
TOLERANCES = {"float32": 1e-4, "bfloat16": 3e-2, "float16": 1e-2}
ACCELERATOR_FLOAT32 = 2e-2


class BackendError(RuntimeError):
    """A backend does not compute what it should on this machine."""


def self_check(chosen: Iterable[tuple[str, Use]]) -> None:
    """Compares backends with the oracle on one small batch each: packed rows, real head widths, every window.

    Args:
      chosen: backends and what they are to compute. Those in plain JAX are not checked: the compiler that makes them
        makes the oracle, too, and tests compare them.

    Raises:
      BackendError: beyond the dtype's tolerance, or the backend failed; names backend, versions and difference.
    """
    for name, use in sorted(
        {(name, _small(use)) for name, use in chosen if not BACKENDS[name].plain}, key=str
    ):
        try:
            found = _difference(BACKENDS[name], use)
        except Exception as error:  # whatever a kernel or its compiler raises
            raise BackendError(_message(name, use, f"{type(error).__name__}: {error}")) from error
        accelerator = jax.default_backend() != "cpu" and use.dtype == "float32"
        tolerance = ACCELERATOR_FLOAT32 if accelerator else TOLERANCES[use.dtype]
        if not found <= tolerance:  # a NaN is no agreement
            raise BackendError(
                _message(name, use, f"the largest difference is {found:.2g} (at most {tolerance:g})")
            )


def _small(use: Use) -> Use:
    """The same kind of attention with few heads, a window that a short row feels and a length as odd or even."""
    kv_heads = min(use.kv_heads, 2)
    window = use.window and min(use.window, 40)
    heads = use.heads // use.kv_heads * kv_heads
    length = LENGTH + (use.length or 0) % 2
    return dataclasses.replace(use, heads=heads, kv_heads=kv_heads, window=window, length=length)


@functools.cache
def _difference(backend: Backend, use: Use) -> float:
    rng = np.random.default_rng(0)

    def draw(heads: int) -> Float[Array, "2 T n h"]:
        return jnp.asarray(rng.standard_normal((2, use.length, heads, use.head_width)), use.dtype)

    q, k, v, cotangent = draw(use.heads), draw(use.kv_heads), draw(use.kv_heads), draw(use.heads)
    mask = None
    if use.masked:
        segments = np.ones((2, use.length), np.int32)
        segments[0] = np.repeat([1, 2, 3, 0], [*_SEGMENTS, use.length - sum(_SEGMENTS)])
        segments = jnp.asarray(segments)
        mask = AttentionMask(segments, segments, causal=use.causal, window=use.window)
        cotangent = cotangent * (segments != 0)[..., None, None]

    def run(attend, dtype):
        def both(q, k, v):
            out, pull = jax.vjp(lambda *a: attend(*a, mask, use.head_width**-0.5, use.softcap), q, k, v)
            return (out * (cotangent != 0), *pull(cotangent.astype(dtype)))

        return jax.jit(both)(*(x.astype(dtype) for x in (q, k, v)))

    with jax.default_matmul_precision("highest"):
        expected = run(xla.attend, jnp.float32)
    found = run(backend.attend, use.dtype)
    # Not in JAX: XLA's maximum may leave NaN out on CPUs.
    pairs = [[np.asarray(x, np.float32) for x in pair] for pair in zip(expected, found, strict=True)]
    return float(np.max([np.abs(a - b).max() / np.abs(a).max() for a, b in pairs]))


def _message(name: str, use: Use, what: str) -> str:
    versions = []
    for package in BACKENDS[name].packages:
        try:
            versions.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    device = jax.devices()[0].device_kind
    return (
        f"attention backend {name!r} ({', '.join(versions)}) disagrees with 'xla' on this {device} for {use}: {what}; "
        "give --config.model.attention=xla"
    )
