"""One dispatcher for attention: callers say what may attend to what, an implementation computes it.

An implementation is one file here and one row in `IMPLEMENTATIONS`; it obeys every rule of the mask or raises.
"""

from jaxtyping import Array, Float

from mllm_jax.models.attention import xla
from mllm_jax.models.attention.mask import AttentionMask

__all__ = ["IMPLEMENTATIONS", "AttentionMask", "attend"]

IMPLEMENTATIONS = {"xla": xla.attend}


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
      implementation: a key of `IMPLEMENTATIONS`; "xla" is the oracle of all others.
      scale: of q k; None = h^-1/2.
      softcap: c in c tanh(logits / c), before the mask (Gemma 2).

    Raises:
      ValueError: unknown implementation.
    """
    if implementation not in IMPLEMENTATIONS:
        raise ValueError(f"model.attention={implementation!r}; valid: {', '.join(IMPLEMENTATIONS)}")
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    return IMPLEMENTATIONS[implementation](q, k, v, mask, scale, softcap)
