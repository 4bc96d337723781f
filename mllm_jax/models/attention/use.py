"""What is known of an attention before it runs: what a backend may refuse."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from mllm_jax.models.attention.mask import AttentionMask


@dataclasses.dataclass(frozen=True)
class Use:
    """One kind of attention that a model computes.

    Attributes:
      heads, kv_heads, head_width: H, K and h.
      length: T = S; None = not known yet.
      dtype: of queries, keys and values.
      masked: by segments; False = everything attends to everything (a vision tower).
      causal, window, softcap: as in `AttentionMask` and `attend`.
    """

    heads: int
    kv_heads: int
    head_width: int
    dtype: str
    length: int | None = None
    masked: bool = True
    causal: bool = True
    window: int | None = None
    softcap: float | None = None

    @classmethod
    def of(
        cls,
        q: Float[Array, "B T H h"],
        k: Float[Array, "B S K h"],
        mask: AttentionMask | None,
        softcap: float | None,
    ) -> "Use":
        """The use that these arguments of `attend` are."""
        rules = {"masked": False, "causal": False}
        if mask is not None:
            rules = {"causal": mask.causal, "window": mask.window}
        return cls(
            heads=q.shape[2],
            kv_heads=k.shape[2],
            head_width=q.shape[3],
            dtype=jnp.dtype(q.dtype).name,
            length=q.shape[1],
            softcap=softcap,
            **rules,
        )

    def __str__(self) -> str:
        what = "everything to everything" if not self.masked else "causal" if self.causal else "bidirectional"
        window = f", window {self.window}" if self.window else ""
        softcap = f", soft cap {self.softcap:g}" if self.softcap else ""
        return (
            f"{what}{window}{softcap}, {self.heads}/{self.kv_heads} heads of {self.head_width}, {self.dtype}"
        )


def current_platform() -> str:
    """The current mesh's (whose devices need not be here), else this machine's: "cpu", "gpu" or "tpu"."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = jax.default_backend() if device is None else device.platform
    return "gpu" if platform in ("cuda", "rocm") else platform
