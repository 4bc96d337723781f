"""One decoder for all LLM families; they differ by `DecoderConfig` and by a weight-name table.

The plain case is Llama: RMSNorm, rotary positions, grouped-query attention, gated MLP.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from mllm_jax.models.attention import AttentionMask, attend, mean_weights
from mllm_jax.models.heads import repeated
from mllm_jax.models.layers import ACTIVATIONS, Dense, RMSNorm, layer_norm, remat
from mllm_jax.models.lora import LoRA
from mllm_jax.models.rope import frequencies, rotary

NORMS = ("rms", "rms_offset", "layer")
KEPT = {"hidden": "intermediates", "attention": "attention"}  # what blocks keep, in which collections


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Geometry of an LLM.

    Attributes:
      vocab: V.  width: D.  depth: L.  heads: H.  kv_heads: K.  head_width: h.  mlp_width: F.
      tied: the output head is the transposed embedding table.
      max_positions: context length that the model was trained for; longer rows are an error.
      rope_scaling: items of a checkpoint's rope parameters with "rope_type" (rope.py); () = none.
      rotary_fraction: share of a head's channels that rotate (Phi-2: 0.4).
      norm: "rms" (Llama), "rms_offset" (scale stored minus one; Gemma), "layer" (LayerNorm; Phi-2).
      qkv_bias (Qwen2), out_bias (of attention), mlp_bias, head_bias (Phi-2: all four).
      qk_norm: RMSNorm over each head of queries and keys before they rotate (Qwen3).
      gated: act(gate x) * (up x), else act(fc1 x).
      parallel: attention and MLP read the same normed input and are added together (Phi-2).
      post_norms: a further norm on what each half of a block adds (Gemma 2).
      windows: keys that a query sees in block l: windows[l % len(windows)], 0 = all; () = all everywhere.
      attention_scale: factor on q k; None = h^-1/2.
      attention_softcap, logit_softcap: c in c tanh(x / c) of attention and output logits.
      scale_embeddings: token embeddings times sqrt(D) (Gemma); visual tokens are not scaled.
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
    rope_scaling: tuple[tuple[str, Any], ...] = ()
    rotary_fraction: float = 1.0
    norm: str = "rms"
    qkv_bias: bool = False
    out_bias: bool = False
    mlp_bias: bool = False
    head_bias: bool = False
    qk_norm: bool = False
    gated: bool = True
    parallel: bool = False
    post_norms: bool = False
    windows: tuple[int, ...] = ()
    attention_scale: float | None = None
    attention_softcap: float | None = None
    logit_softcap: float | None = None
    scale_embeddings: bool = False

    def __post_init__(self):
        if self.norm not in NORMS:
            raise ValueError(f"norm={self.norm!r}; valid: {', '.join(NORMS)}")

    @property
    def block_windows(self) -> tuple[int, ...]:
        """The window of every block, 0 = none."""
        windows = self.windows or (0,)
        return tuple(windows[layer % len(windows)] for layer in range(self.depth))

    @property
    def window_period(self) -> tuple[int, ...]:
        """The shortest run of windows that the blocks repeat."""
        found = self.block_windows
        sizes = (size for size in range(1, self.depth + 1) if self.depth % size == 0)
        return next(found[:size] for size in sizes if found == found[:size] * (self.depth // size))


@flax.struct.dataclass
class Cache:
    """Keys and values of earlier columns; passed in and returned, never hidden state.

    Attributes:
      k, v: of every layer; heads stand before columns, so that attention's matrix products take them as they are. One
        array of all layers, or one for each (`apart_cache`).
      segments: int32[B, S]; 0 = empty or padding.
      column: int32 scalar, the next column to write, the same for every row; or int32[B], one of each row, to which a
        token a row is written at a time.
    """

    k: Float[Array, "L B K S h"] | tuple[Float[Array, "1 B K S h"], ...]
    v: Float[Array, "L B K S h"] | tuple[Float[Array, "1 B K S h"], ...]
    segments: Int[Array, "B S"]
    column: Int[Array, ""] | Int[Array, " B"]

    @property
    def apart(self) -> bool:
        """Whether each layer has arrays of its own."""
        return isinstance(self.k, tuple)


def init_cache(config: DecoderConfig, batch: int, length: int, dtype: Any) -> Cache:
    """An empty cache of `length` columns."""
    shape = (config.depth, batch, config.kv_heads, length, config.head_width)
    return Cache(
        jnp.zeros(shape, dtype), jnp.zeros(shape, dtype), jnp.zeros((batch, length), jnp.int32), jnp.int32(0)
    )


def apart_cache(cache: Cache) -> Cache:
    """The same with the layers one by one, with which a `Decoder` runs its blocks without a scan, with `apart_params`.

    On CPUs the scan copies each block's kernels, and its part of the cache, out of their stacks in every call, which
    takes longer than a step's matrix products.
    """
    if cache.apart:
        return cache
    k, v = (tuple(leaf[i : i + 1] for i in range(len(leaf))) for leaf in (cache.k, cache.v))
    return cache.replace(k=k, v=v)


def apart_params(params: dict[str, Any]) -> dict[str, Any]:
    """A decoder's parameters with those of each block by themselves, for a cache that is apart: `blocks` is a tuple.

    The blocks' parameters are copied.
    """
    depth = len(jax.tree.leaves(params["blocks"])[0])
    blocks = tuple(jax.tree.map(lambda leaf, i=i: leaf[i], params["blocks"]) for i in range(depth))
    return {**params, "blocks": blocks}


def head(
    config: DecoderConfig, params: Mapping[str, Any]
) -> tuple[Float[Array, "D V"], Float[Array, " V"] | None]:
    """The output head of a decoder's parameters: its matrix, and its bias if it has one."""
    return params["embedding"].T if config.tied else params["head"], params.get("head_bias")


def head_logits(
    config: DecoderConfig,
    hidden: Float[Array, "... D"],
    kernel: Float[Array, "... D V"],
    bias: Float[Array, "..."] | None,
) -> Float[Array, "... V"]:
    """Next-token logits in float32, of hidden states in the kernel's dtype; the bias is broadcast."""
    logits = jnp.matmul(hidden, kernel, preferred_element_type=jnp.float32)
    if bias is not None:
        logits = logits + bias.astype(jnp.float32)
    if config.logit_softcap is not None:
        logits = config.logit_softcap * jnp.tanh(logits / config.logit_softcap)
    return logits


def _norm(config: DecoderConfig, dtype: Any, param_dtype: Any, name: str | None = None) -> nn.Module:
    if config.norm == "layer":
        return layer_norm(config.eps, dtype, param_dtype, name)
    return RMSNorm(config.eps, dtype, param_dtype, config.norm == "rms_offset", name=name)


def _written(
    cached: Float[Array, "_ B K S h"], new: Float[Array, "B T K h"], layer: Any, column: Int[Array, "*b"]
) -> Float[Array, "_ B K S h"]:
    """A layer's keys or values with those of T more columns; where every row has its own column, T is 1."""
    if column.ndim:
        return cached.at[layer, jnp.arange(len(column)), :, column].set(new[:, 0])
    return jax.lax.dynamic_update_slice(cached, new.transpose(0, 2, 1, 3)[None], (layer, 0, 0, column, 0))


class Block(nn.Module):
    """Pre-norm attention and MLP, each with a residual.

    Attributes:
      window: keys that a query sees, 0 = all.
      keep: what is returned as well: "hidden", the block's output; "attention", its weights as the mean over heads.
    """

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    attention: str
    lora: LoRA | None
    window: int
    keep: tuple[str, ...]

    @nn.compact
    def __call__(self, carry, layer, positions, mask, column):
        cfg = self.config
        x, cached = carry
        y = self._norm("norm1", x)
        mask = mask.replace(window=self.window or None)
        attended, weights, cached = self._attend(y, cached, layer, positions, mask, column)
        if cfg.parallel:
            x = x + attended + self._mlp(y)
        else:
            x = x + (self._norm("post_norm1", attended) if cfg.post_norms else attended)
            y = self._mlp(self._norm("norm2", x))
            x = x + (self._norm("post_norm2", y) if cfg.post_norms else y)
        x = nn.with_logical_constraint(x, ("batch", "length", "embed"))
        found = {"hidden": x, "attention": weights}
        return (x, cached), {name: found[name] for name in self.keep}

    def _norm(self, name, x):
        return _norm(self.config, self.dtype, self.param_dtype, name)(x)

    def _dense(self, name, features, x, use_bias):
        return Dense(
            features,
            use_bias=use_bias,
            kernel_init=nn.initializers.normal(0.02),
            dtype=self.dtype,
            param_dtype=self.param_dtype,
            lora=self.lora,
            name=name,
        )(x)

    def _attend(self, x, cached, layer, positions, mask, column):
        cfg = self.config
        batch, length, _ = x.shape

        def heads(name, count):
            return self._dense(name, count * cfg.head_width, x, cfg.qkv_bias).reshape(
                batch, length, count, cfg.head_width
            )

        q, k, v = heads("q", cfg.heads), heads("k", cfg.kv_heads), heads("v", cfg.kv_heads)
        if cfg.qk_norm:
            q, k = self._norm("q_norm", q), self._norm("k_norm", k)
        angles = frequencies(
            cfg.rope_theta, int(cfg.head_width * cfg.rotary_fraction), dict(cfg.rope_scaling)
        )
        q, k = rotary(q, positions, *angles), rotary(k, positions, *angles)
        if cached is not None:
            cached = tuple(
                _written(old, new.astype(old.dtype), layer, column)
                for old, new in zip(cached, (k, v), strict=True)
            )
            k, v = (jax.lax.dynamic_index_in_dim(old, layer, keepdims=False) for old in cached)
            k, v = (x.transpose(0, 2, 1, 3) for x in (k, v))
        k, v = repeated(k, cfg.heads), repeated(v, cfg.heads)
        backend = self.attention if cached is None else "xla"
        y = attend(q, k, v, mask, backend, cfg.attention_scale, cfg.attention_softcap)
        weights = None
        if "attention" in self.keep:
            weights = mean_weights(q, k, mask, cfg.attention_scale, cfg.attention_softcap)
        return self._dense("o", cfg.width, y.reshape(batch, length, -1), cfg.out_bias), weights, cached

    def _mlp(self, x):
        cfg = self.config
        activation = ACTIVATIONS[cfg.activation]
        if not cfg.gated:
            y = activation(self._dense("fc1", cfg.mlp_width, x, cfg.mlp_bias))
            return self._dense("fc2", cfg.width, y, cfg.mlp_bias)
        y = activation(self._dense("gate", cfg.mlp_width, x, cfg.mlp_bias))
        y = y * self._dense("up", cfg.mlp_width, x, cfg.mlp_bias)
        return self._dense("down", cfg.width, y, cfg.mlp_bias)


class _Period(nn.Module):
    """Blocks with these windows in a row; other fields as `Block`'s."""

    config: DecoderConfig
    dtype: Any
    param_dtype: Any
    attention: str
    lora: LoRA | None
    windows: tuple[int, ...]
    keep: tuple[str, ...]
    remat: str

    @nn.compact
    def __call__(self, carry, period, *shared):
        fields = (self.config, self.dtype, self.param_dtype, self.attention, self.lora)
        kept = []
        for index, window in enumerate(self.windows):
            block = remat(Block, self.remat)(*fields, window, self.keep, name=f"{index}")
            carry, own = block(carry, len(self.windows) * period + index, *shared)
            kept.append(own)
        return carry, jax.tree.map(lambda *own: jnp.stack(own), *kept)


def _scanned(block: type[nn.Module], length: int, unroll: bool = False) -> Callable[..., nn.Module]:
    return nn.scan(
        block,
        variable_axes={"params": 0},
        split_rngs={"params": True, "dropout": True},
        in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
        length=length,
        unroll=length if unroll else 1,
    )


def _scanned_periods(size: int, length: int) -> Callable[..., nn.Module]:
    """A scan over periods of `size` blocks whose parameters are one stack of all blocks, [L, ...].

    Seen as [L / size, size, ...], which moves nothing, the stack is cut by the scan, then by place in the period.
    """

    def fold(params):
        return jax.tree.map(lambda x: x.reshape(length, size, *x.shape[1:]), params)

    def cut(variables):
        return {
            name: {f"{index}": jax.tree.map(lambda x, i=index: x[i], tree) for index in range(size)}
            for name, tree in variables.items()
        }

    period = nn.map_variables(_Period, "params", cut)
    return nn.map_variables(_scanned(period, length), "params", fold)


class Decoder(nn.Module):
    """Embeddings in, final-normed hidden states out; the head is apart so that a loss can chunk it.

    Attributes:
      remat: of blocks; see `layers.remat`.
      unroll: write equal blocks out one after the other in place of a loop over them (`mllm.MLLM`).
    """

    config: DecoderConfig
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    remat: str = "none"
    attention: str = "xla"
    lora: LoRA | None = None
    unroll: bool = False

    def setup(self):
        cfg = self.config
        self.embedding = self.param(
            "embedding", nn.initializers.normal(0.02), (cfg.vocab, cfg.width), self.param_dtype
        )
        kept = (name for name, collection in KEPT.items() if self.is_mutable_collection(collection))
        keep = () if self.is_initializing() else tuple(kept)
        fields = (cfg, self.dtype, self.param_dtype, self.attention, self.lora)
        # Parameters are made as one stack of blocks, whatever the windows are.
        self.period = cfg.window_period[: 1 if self.is_initializing() else None]
        size = len(self.period)
        if size == 1:
            self.blocks = _scanned(remat(Block, self.remat), cfg.depth, self.unroll)(
                *fields, *self.period, keep
            )
        else:
            scanned = _scanned_periods(size, cfg.depth // size)
            self.blocks = scanned(*fields, self.period, keep, self.remat)
        self.final_norm = _norm(cfg, self.dtype, self.param_dtype)
        if not cfg.tied:
            self.head = self.param(
                "head", nn.initializers.normal(0.02), (cfg.width, cfg.vocab), self.param_dtype
            )
        if cfg.head_bias:
            self.head_bias = self.param("head_bias", nn.initializers.zeros, (cfg.vocab,), self.param_dtype)

    def embed(self, tokens: Int[Array, "B T"]) -> Float[Array, "B T D"]:
        """Token embeddings."""
        embeddings = jnp.take(self.embedding, tokens, axis=0).astype(self.dtype)
        if self.config.scale_embeddings:
            embeddings = embeddings * jnp.asarray(self.config.width**0.5, self.dtype)
        return embeddings

    def logits(self, hidden: Float[Array, "*b D"]) -> Float[Array, "*b V"]:
        """Next-token logits in float32."""
        kernel, bias = head(self.config, self.variables["params"])
        return head_logits(self.config, hidden, kernel.astype(self.dtype), bias)

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
          cache: columns before these, with room for T more, which are written at `cache.column` (T = 1 where that is
            one of each row; a row without room is not written). If it is apart, so are the parameters (`apart_cache`).

        Returns:
          Hidden states after the final norm, and the updated cache (None without one). With a mutable collection
          "intermediates" it gets `hidden`, the outputs of all blocks [L, B, T, D]; with "attention" `attention`, the
          mean over heads of their weights [L, B, T, S].
        """
        cfg = self.config
        column = None
        mask = AttentionMask(segment_ids, segment_ids)
        if cache is not None:
            column = cache.column
            if column.ndim:
                segments = cache.segments.at[jnp.arange(len(column)), column].set(segment_ids[:, 0])
            else:
                segments = jax.lax.dynamic_update_slice(cache.segments, segment_ids, (0, column))
            mask = AttentionMask(segment_ids, segments, column[..., None] + jnp.arange(embeddings.shape[1]))
        x = nn.with_logical_constraint(embeddings.astype(self.dtype), ("batch", "length", "embed"))
        carry = (x, None if cache is None else (cache.k, cache.v))
        if cache is not None and cache.apart:
            (hidden, cached), kept = self._one_by_one(carry, positions, mask, column), {}
        else:
            steps = jnp.arange(cfg.depth // len(self.period))
            (hidden, cached), kept = self.blocks(carry, steps, positions, mask, column)
        for name, values in kept.items():
            self.sow(KEPT[name], name, values.reshape(cfg.depth, *values.shape[-3:]))
        if cached is not None:
            cached = Cache(*cached, mask.kv_segments, column + embeddings.shape[1])
        return self.final_norm(hidden), cached

    def _one_by_one(self, carry: tuple[Array, Any], *shared: Any) -> tuple[Array, Any]:
        """Hidden states and the keys and values of all blocks, whose parameters are apart."""
        fields = (self.config, self.dtype, self.param_dtype, self.attention, self.lora)
        hidden, cached = carry
        blocks, found = self.variables["params"]["blocks"], []
        for params, window, own in zip(
            blocks, self.config.block_windows, zip(*cached, strict=True), strict=True
        ):
            block = Block(*fields, window, keep=(), parent=None)
            (hidden, own), _ = block.apply({"params": params}, (hidden, own), 0, *shared)
            found.append(own)
        return hidden, tuple(zip(*found, strict=True))
