"""The training loss: weighted next-token cross-entropy, with logits only where a token is supervised.

Devices that share parameters each need the whole head (its part of the vocabulary, under `tensor`). It is gathered once
a step, not for every chunk of logits, and each device adds up its own gradient over the chunks, so that one sum over
the devices is left. The other way, a head that stays split over the vocabulary, needs all positions of the batch on
every device: 128 rows of 2,048 are twice as many as Llama 3 has tokens and eight times Vicuna's, each as wide as a
column of the head. What gathering costs is memory: the head in the computation's dtype and, where it is trained, its
gradient in float32, at a time when no activations of a block are there.

Loss and gradients are made in one pass, so logits are made once, although none are kept.
"""

import functools
from collections.abc import Mapping
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.custom_derivatives import custom_vjp_primal_tree_values
from jax.sharding import PartitionSpec as P
from jaxtyping import Array, Float, Shaped

from mllm_jax.data.batch import Batch
from mllm_jax.models import mllm
from mllm_jax.models.decoder import DecoderConfig, head, head_logits
from mllm_jax.models.heads import devices_over
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.parallel.sharding import param_shardings

Specs = tuple[P, P | None]
Head = tuple[Array, Array | None]  # matrix and bias
CHUNK = 128  # most positions of a row whose logits exist at a time


def weighted_loss(
    config: ModelConfig,
    params: Any,
    batch: Batch,
    label_tokens: int,
    rng: Array | None = None,
    unroll: bool = False,
) -> tuple[Float[Array, ""], Float[Array, ""]]:
    """Sum of loss * weight, and sum of weights, both float32: what accumulates over micro-batches and devices.

    Args:
      label_tokens: most supervised tokens that a row may hold. The supervised positions of each row (of each piece,
        where devices share the positions of a row) are brought together, so that logits [B, label_tokens, V] are made
        in chunks and nothing else; the pipeline makes sure that no row has more.
      rng: for dropout; None = deterministic.
      unroll: see `mllm.MLLM`.
    """
    rngs = None if rng is None else {"dropout": rng}
    hidden, _ = mllm.apply(
        config, params, batch, method="hidden_states", deterministic=rng is None, rngs=rngs, unroll=unroll
    )
    pieces = devices_over("length")  # of a row; each device finds the supervised positions of its own

    def cut(x: Shaped[Array, "B T ..."]) -> Shaped[Array, "B P T/P ..."]:
        return x.reshape(x.shape[0], pieces, -1, *x.shape[2:])

    # Position t predicts token t + 1, and nothing predicts the first token.
    weights, targets = (
        cut(jnp.pad(x[:, 1:], ((0, 0), (0, 1))))
        for x in (batch.loss_weights.astype(jnp.float32), batch.tokens)
    )
    hidden = cut(hidden)
    if pieces > 1:
        hidden = nn.with_logical_constraint(hidden, ("batch", "length", None, "embed"))
    order = jnp.argsort(weights == 0, axis=2, stable=True)[:, :, :label_tokens]
    weights, targets = (jnp.take_along_axis(x, order, axis=2) for x in (weights, targets))
    hidden = jnp.take_along_axis(hidden, order[..., None], axis=2)

    chunks = -(-targets.shape[2] // CHUNK)
    size = -(-targets.shape[2] // chunks)  # as even as can be: no last chunk that is mostly padding
    devices = devices_over("batch")
    groups = devices if targets.shape[0] % devices == 0 else 1  # of rows, one on each device

    def chunked(x: Shaped[Array, "B P L ..."]) -> Shaped[Array, "n G P m ..."]:
        x = jnp.pad(x, [(0, 0)] * 2 + [(0, chunks * size - x.shape[2])] + [(0, 0)] * (x.ndim - 3))
        x = x.reshape(groups, -1, pieces, chunks, size, *x.shape[3:])
        x = jnp.moveaxis(x, (3, 0, 2, 1), (0, 1, 2, 3))
        return _on_devices(x.reshape(chunks, groups, pieces, -1, *x.shape[5:]), 1)

    kernel, bias = (
        None if leaf is None else jnp.atleast_2d(leaf).astype(jnp.float32)
        for leaf in head(config.llm, params["llm"])
    )
    parts = map(chunked, (hidden, targets, weights))
    return _summed(config.llm, _head_specs(config, params["llm"]), (kernel, bias), *parts), weights.sum()


def _head_specs(config: ModelConfig, params: Mapping[str, Any]) -> Specs | None:
    """How the head's matrix and bias [1, V] are sharded; None without a mesh."""
    mesh = jax.sharding.get_abstract_mesh()
    if mesh.empty:
        return None
    llm = param_shardings({"llm": dict(params)}, mesh, config)["llm"]
    kernel = P(*reversed(llm["embedding"].spec)) if config.llm.tied else llm["head"].spec
    return kernel, P(None, *llm["head_bias"].spec) if "head_bias" in llm else None


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _summed(
    config: DecoderConfig, specs: Specs | None, head: Head, hidden: Array, targets: Array, weights: Array
) -> Array:
    """Sum of loss * weight.

    Args:
      specs: of the head's gradient.
      head: float32, of which a device gets a copy in the dtype of the hidden states.
      hidden: [n, G, P, m, D]: n chunks, of which device (g, p) has [:, g, p].
      targets, weights: [n, G, P, m].
    """
    own = _copies(head, hidden)

    def add(total: Array, chunk: tuple[Array, ...]) -> tuple[Array, None]:
        return total + _chunk_loss(config, own, *chunk), None

    return jax.lax.scan(add, jnp.float32(0), (hidden, targets, weights))[0]


def _with_gradients(
    config: DecoderConfig, specs: Specs | None, head: Any, hidden: Any, targets: Any, weights: Any
) -> tuple[Array, tuple[Head | None, Array | None]]:
    """The sum, and its gradients by head and hidden states, each where something trained needs it."""
    wanted = [any(leaf.perturbed for leaf in jax.tree.leaves(each)) for each in (head, hidden)]
    argnums = tuple(index for index in (0, 1) if wanted[index])
    head, hidden, targets, weights = custom_vjp_primal_tree_values((head, hidden, targets, weights))
    own = _copies(head, hidden)
    zeros = jax.tree.map(lambda leaf: _of_head(jnp.zeros(leaf.shape, jnp.float32)), own)

    def add(carry: tuple[Array, Head | None], chunk: tuple[Array, ...]) -> tuple[Any, Array | None]:
        total, sums = carry
        given, *rest = chunk
        value, found = jax.value_and_grad(lambda own, given: _chunk_loss(config, own, given, *rest), argnums)(
            own, given
        )
        grads = dict(zip(argnums, found, strict=True))
        if 0 in grads:
            sums = jax.tree.map(lambda a, b: a + b.astype(jnp.float32), sums, grads[0])
        return (total + value, sums), grads.get(1)

    start = (jnp.float32(0), zeros if wanted[0] else None)
    (total, sums), by_hidden = jax.lax.scan(add, start, (hidden, targets, weights))
    by_head = None
    if sums is not None:
        each = zip(sums, specs or (None, None), strict=True)
        by_head = tuple(None if leaf is None else _added_up(leaf, spec) for leaf, spec in each)
        # Before the blocks' backward pass, which needs the memory of what was added up.
        by_head, by_hidden = jax.lax.optimization_barrier((by_head, by_hidden))
    return total, (by_head, by_hidden)


def _scaled(
    _: DecoderConfig, __: Specs | None, found: tuple[Head | None, Array | None], scale: Array
) -> tuple[Head | None, Array | None, None, None]:
    head, hidden = jax.tree.map(lambda each: (scale * each).astype(each.dtype), found)
    return head, hidden, None, None


_summed.defvjp(_with_gradients, _scaled, symbolic_zeros=True)


def _copies(head: Head, hidden: Array) -> Head:
    """The head as each device uses it: matrix [G, P, D, V], in the hidden states' dtype, and bias [G, P, 1, V]."""
    kernel, bias = head

    def copies(leaf: Float[Array, "R V"]) -> Float[Array, "G P R V"]:
        return _of_head(jnp.broadcast_to(leaf, (*hidden.shape[1:3], *leaf.shape)))

    return copies(kernel.astype(hidden.dtype)), None if bias is None else copies(bias)


def _added_up(x: Float[Array, "G P R V"], spec: P | None) -> Float[Array, "R V"]:
    """The sum over the devices, each of which gets its part (the compiler would make it whole on all of them first)."""
    rules = dict(nn.get_logical_axis_rules())
    if spec is None or x.shape[0] != devices_over("batch") or "batch" not in rules:
        return x.sum((0, 1))
    parts = spec[0] if isinstance(spec[0], tuple) else (spec[0],) if spec[0] else ()
    rows, pieces = rules["batch"], rules["length"]
    whole = tuple(axis for axis in (*rows, pieces) if axis not in parts)

    def add(own: Array) -> Array:
        # Cut first, so that less is added up over `data`, which may have a slow network between its devices.
        part = jax.lax.psum_scatter(own[0, 0], parts, tiled=True) if parts else own[0, 0]
        return jax.lax.psum(part, whole)

    return jax.shard_map(add, in_specs=P(rows, pieces, None, spec[1]), out_specs=spec, check_vma=False)(x)


def _of_head(x: Float[Array, "G P R V"]) -> Float[Array, "G P R V"]:
    return _on_devices(x, 0, None if x.shape[3] % devices_over("vocab") else "vocab")


def _on_devices(x: Array, axis: int, last: str | None = None) -> Array:
    """`x` with [G, P] from `axis` on, where G and P are on the devices that they are made for."""
    groups = "batch" if x.shape[axis] > 1 else None
    between = (None,) * (x.ndim - axis - 3)
    return nn.with_logical_constraint(x, (*(None,) * axis, groups, "length", *between, last))


def _chunk_loss(config: DecoderConfig, head: Head, hidden: Array, targets: Array, weights: Array) -> Array:
    logits = head_logits(config, hidden, *head)
    label = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    losses = jax.nn.logsumexp(logits, axis=-1) - label
    # A position without weight must not matter, whatever its logits are.
    return jnp.where(weights != 0, losses * weights, 0.0).sum()
