"""One dispatcher for attention: callers say what may attend to what, a backend computes it.

A backend is one file here and one row in `BACKENDS`; it obeys every rule of the mask, or `refusal` says why it cannot.
"""

from collections.abc import Callable
from typing import NamedTuple

from jaxtyping import Array, Float

from mllm_jax.models.attention import blockwise, cudnn, splash, tokamax, xla
from mllm_jax.models.attention.mask import AttentionMask
from mllm_jax.models.attention.rows import with_whole_rows
from mllm_jax.models.attention.use import Use, current_platform

__all__ = [
    "AUTO",
    "BACKENDS",
    "AttentionMask",
    "Backend",
    "Use",
    "attend",
    "choose",
    "current_platform",
    "mean_weights",
]

EVERY = ("cpu", "gpu", "tpu")


class Backend(NamedTuple):
    """A way to compute attention.

    Attributes:
      attend: `(q, k, v, mask, scale, softcap) -> out` for rows without a cache, where T = S.
      platforms: where it runs.
      refusal: why it cannot compute a `Use` here, or None.
      packages: whose versions matter.
      plain: written in JAX alone, without a kernel for a platform.
    """

    attend: Callable[..., Array]
    platforms: tuple[str, ...]
    refusal: Callable[[Use], str | None]
    packages: tuple[str, ...] = ("jax", "jaxlib")
    plain: bool = False


BACKENDS = {
    "xla": Backend(xla.attend, EVERY, xla.refusal, plain=True),
    "blockwise": Backend(blockwise.attend, EVERY, blockwise.refusal, plain=True),
    "splash": Backend(splash.attend, ("tpu",), splash.refusal, splash.PACKAGES),
    "cudnn": Backend(cudnn.attend, ("gpu",), cudnn.refusal, cudnn.PACKAGES),
    "tokamax": Backend(tokamax.attend, ("gpu",), tokamax.refusal, tokamax.PACKAGES),
}
AUTO = {"cpu": "blockwise", "gpu": "cudnn", "tpu": "splash"}  # what "auto" is where nothing speaks against it


def choose(name: str, use: Use, platform: str) -> tuple[str, str]:
    """The backend for a use of attention, and why.

    Args:
      name: a key of `BACKENDS`, or "auto": the platform's own in `AUTO`, or "xla" where that refuses.
      platform: "cpu", "gpu" or "tpu".

    Raises:
      ValueError: unknown backend, or it cannot compute this here; says why and what can.
    """
    if name == "auto":
        wanted = AUTO.get(platform, "xla")
        reason = BACKENDS[wanted].refusal(use) or (blockwise.slower(use) if wanted == "blockwise" else None)
        return ("xla", f"auto: {reason}") if reason else (wanted, f"auto on {platform}")
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is unknown; valid: {', '.join(['auto', *BACKENDS])}")
    backend = BACKENDS[name]
    if platform not in backend.platforms:
        reason = f"it runs on {' and '.join(backend.platforms)}, and this is {platform}"
    else:
        reason = backend.refusal(use)
    if reason:
        raise ValueError(f"attention backend {name!r} cannot compute {use}: {reason}; 'auto' takes what can")
    return name, "as configured"


def attend(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    v: Float[Array, "B S K h"],
    mask: AttentionMask | None = None,
    implementation: str = "xla",
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H h"]:
    """Scaled dot-product attention with grouped heads (H a multiple of K); softmax in float32.

    Args:
      mask: None = everything attends to everything.
      implementation: "auto" or a key of `BACKENDS`; "xla" is the oracle of all others, and the only one for queries
        against a cache or other keys than their own row's.
      scale: of q k; None = h^-1/2.
      softcap: c in c tanh(logits / c), before the mask (Gemma 2).

    Raises:
      ValueError: see `choose`; or a backend other than "xla" is to compute queries against a cache.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    cached = q.shape[1] != k.shape[1] if mask is None else mask.q_columns is not None
    if cached and implementation not in ("xla", "auto"):
        raise ValueError(
            f"attention backend {implementation!r} computes whole rows, without a cache; give 'xla'"
        )
    if cached:
        return xla.attend(q, k, v, mask, scale, softcap)
    name, _ = choose(implementation, Use.of(q, k, mask, softcap), current_platform())
    return with_whole_rows(lambda q, k, v: BACKENDS[name].attend(q, k, v, mask, scale, softcap), q, k, v)


def mean_weights(
    q: Float[Array, "B T H h"],
    k: Float[Array, "B S K h"],
    mask: AttentionMask | None = None,
    scale: float | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T S"]:
    """How much each query attends to each key, in float32: the mean over heads of the oracle's weights.

    Args: as `attend`.
    """
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return xla.attention_weights(q, k, mask, scale, softcap).mean(axis=(1, 2))
