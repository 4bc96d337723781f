"""One decoder for the Llama family: RMSNorm, rotary positions, grouped-query attention, gated MLP."""

import dataclasses
from typing import Any

import flax.linen as nn
import flax.struct
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllm_jax.models.attention import AttentionMask, attend
from mllm_jax.models.layers import ACTIVATIONS, Dense, RMSNorm, remat, rotary


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Geometry of an LLM.

    Attributes:
      vocab: V.  width: D.  depth: L.  heads: H.  kv_heads: K.  head_width: h.  mlp_width: F.
      tied: the output head is the transposed embedding table.
      max_positions: context length that the model was trained for; longer rows are an error.
    """

    vocab: int
    width: int
    depth: int
    heads: int
    kv_heads: int
    head_width: int
    mlp_width: int
    activation: str = "silu"
    rope_theta: float = 1e4
    eps: float = 1e-5
    tied: bool = False
    max_positions: int = 4096


@flax.struct.dataclass
class Cache:
    """Keys and values of earlier columns; passed in and returned, never hidden state.

    Attributes:
      k, v: [L, B, S, K, h].
      segments: int32[B, S]; 0 = empty or padding.
      column: int32 scalar, the next column to write (the same for every row).
    """

    k: Float[Array, "L B S K h"]
    v: Float[Array, "L B S K h"]
    segments: Int[Array, "B S"]
    column: Int[Array, ""]


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: Any) -> Cache:
    """An empty cache of `length` columns."""
    shape = (config.depth, batch, length, config.kv_heads, config.head_width)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, length), jnp.int32), jnp.int32(0)
    )


class Block(nn.Module):
    """Pre-norm attention and gated MLP, each with a residual."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    attention: str

    @nn.compact
    def __call__(self, x, cached, positions, mask, column):
        cfg = self.config
        batch, length, _ = x.shape

        def dense(features, name):
            return Dense(
                features,
                use_bias=False,
                kernel_init=nn.initializers.normal(0.02),
                dtype=self.dtype,
                param_dtype=self.param_dtype,
                name=name,
            )

        def norm(name):
            return RMSNorm(cfg.eps, self.dtype, self.param_dtype, name=name)

        y = norm("norm1")(x)
        q = dense(cfg.heads * cfg.head_width, "q")(y).reshape(batch, length, cfg.heads, cfg.head_width)
        k = dense(cfg.kv_heads * cfg.head_width, "k")(y).reshape(batch, length, cfg.kv_heads, cfg.head_width)
        v = dense(cfg.kv_heads * cfg.head_width, "v")(y).reshape(batch, length, cfg.kv_heads, cfg.head_width)
        q, k = rotary(q, positions, cfg.rope_theta), rotary(k, positions, cfg.rope_theta)
        if cached is not None:
            k = jnp.asarray(cached[0]).at[:, column + jnp.arange(length)].set(k.astype(cached[0].dtype))
            v = jnp.asarray(cached[1]).at[:, column + jnp.arange(length)].set(v.astype(cached[1].dtype))
            cached = (k, v)
        y = attend(q, k, v, mask, self.attention).reshape(batch, length, -1)
        x = x + dense(cfg.width, "o")(y)
        y = norm("norm2")(x)
        y = ACTIVATIONS[cfg.activation](dense(cfg.mlp_width, "gate")(y)) * dense(cfg.mlp_width, "up")(y)
        x = x + dense(cfg.width, "down")(y)
        return nn.with_logical_constraint(x, ("batch", "length", "embed")), cached


class Decoder(nn.Module):
    """Embeddings in, final-normed hidden states out; the head is a separate method so that a loss can chunk it."""

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"

    def setup(self):
        cfg = self.config
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (cfg.vocab, cfg.width), self.param_dtype
        )
        self.blocks = nn.scan(
            remat(Block, self.remat),
            variable_axes={"params": 0},
            split_rngs={"params": True},
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            length=cfg.depth,
        )(cfg, self.dtype, self.param_dtype, self.attention)
        self.final_norm = RMSNorm(cfg.eps, self.dtype, self.param_dtype)
        if not cfg.tied:
            self.head = self.param(
                "head", nn.initializers.normal(0.02), (cfg.width, cfg.vocab), self.param_dtype
            )

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings."""
        return jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Next-token logits in float32."""
        head = self.embedding.T if self.config.tied else self.head
        return jnp.matmul(hidden, head.astype(self.dtype), preferred_element_type=jnp.float32)

    def __call__(
        self,
        embeddings: Float[Array, "B T D"],
        positions: Int[Array, "B T"],
        segment_ids: Int[Array, "B T"],
        cache: Cache | None = None,
    ) -> tuple[Float[Array, "B T D"], Cache | None]:
        """Runs the blocks.

        Args:
          embeddings: text and visual embeddings, already merged.
          positions: rotary positions, restarting in every segment.
          segment_ids: 0 = padding; rows attend within a segment, causally.
          cache: columns before these; the T new columns are written at `cache.column`.

        Returns:
          Hidden states after the final norm, and the updated cache (None without one).
        """
        length = embeddings.shape[1]
        if cache is None:
            columns = jnp.arange(length)
            mask = AttentionMask(segment_ids, segment_ids, columns, columns)
            hidden, _ = self.blocks(embeddings.astype(self.dtype), None, positions, mask, None)
            return self.final_norm(hidden), None
        columns = cache.column + jnp.arange(length)
        segments = cache.segments.at[:, columns].set(segment_ids)
        mask = AttentionMask(segment_ids, segments, columns, jnp.arange(segments.shape[1]))
        hidden, (k, v) = self.blocks(
            embeddings.astype(self.dtype), (cache.k, cache.v), positions, mask, cache.column
        )
        return self.final_norm(hidden), Cache(k, v, segments, cache.column + length)
