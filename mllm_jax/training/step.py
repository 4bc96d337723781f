"""One training step as a pure function, jitted with explicit shardings and a donated state."""

import functools
import math
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax.sharding import AbstractMesh, Mesh, NamedSharding
from jaxtyping import Array

from mllm_jax.data.batch import Batch
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.paths import flatten, merge
from mllm_jax.parallel.mesh import batch_shardings, replicated
from mllm_jax.parallel.row_parts import row_part
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.training.loss import weighted_loss

# Elements of a block's output, and blocks, from which and up to which a step is faster on CPUs with the blocks written
# out (docs/performance.md): smaller models compile for longer than they gain.
UNROLLED_FROM, UNROLLED_DEPTH = 1 << 18, 12


@flax.struct.dataclass
class TrainState:
    """What changes during a stage and is checkpointed; a tree of arrays, of their shapes or of their shardings.

    Attributes:
      step: int32, finished steps.
      params: trained parameters only, in float32 (`model.param_dtype`).
      opt_state: optimizer state of exactly these.
    """

    step: Any
    params: Any
    opt_state: Any


def init_state(params: Any, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    return TrainState(jnp.int32(0), params, optimizer.init(params))


def state_shardings(state: TrainState, mesh: Mesh | AbstractMesh, config: ModelConfig) -> TrainState:
    """Shardings of a state (arrays or shapes): what belongs to a parameter is sharded like it, all else replicated.

    An optimizer's arrays are known by the parameter's path at the end of their own, so that optimizers that hold only
    some of the parameters (Muon) are covered too.
    """
    shardings = param_shardings(state.params, mesh, config)
    by_path = {
        path: (leaf.shape, sharding)
        for (path, leaf), sharding in zip(
            flatten(state.params).items(), flatten(shardings).values(), strict=True
        )
    }

    def of(key_path: tuple, leaf: Any) -> NamedSharding:
        names: list[str] = []
        for key in reversed(key_path):
            if not isinstance(key, jax.tree_util.DictKey):
                break
            names.insert(0, str(key.key))
        shape, sharding = by_path.get("/".join(names), (None, None))
        return sharding if shape == leaf.shape else replicated(mesh)

    return TrainState(replicated(mesh), shardings, jax.tree_util.tree_map_with_path(of, state.opt_state))


def with_shardings(shapes: Any, shardings: Any) -> Any:
    """A tree of shapes (or arrays) as `jax.ShapeDtypeStruct`s with these shardings."""
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        shapes,
        shardings,
    )


def to_device(batch: Batch, mesh: Mesh) -> Batch:
    """This process's rows (NumPy) as global arrays, sharded as the step takes them.

    Processes with the same `row_part` must bring the same rows.
    """
    count = row_part(mesh).count

    def place(sharding: Any, leaf: np.ndarray) -> jax.Array:
        shape = (leaf.shape[0] * count, *leaf.shape[1:])
        return jax.make_array_from_process_local_data(sharding, leaf, shape)

    return jax.tree.map(place, batch_shardings(batch, mesh), batch)


def loss_and_grads(
    config: ModelConfig,
    params: Any,
    frozen: Any,
    batch: Batch,
    label_tokens: int,
    accumulation: int,
    rng: Array,
    unroll: bool = False,
) -> tuple[Array, Any, Array]:
    """Mean loss over the supervised tokens of the whole batch, its gradient, and the sum of weights.

    The mean is over all tokens of all devices and micro-batches, so neither their number nor the way rows are dealt
    out changes it. Losses and gradients are added up in float32; the gradient has the parameters' dtypes, as optimizer
    states keep that of the gradient.

    Args:
      unroll: see `mllm.MLLM`.
    """
    total = batch.loss_weights.astype(jnp.float32)[:, 1:].sum()
    scale = 1.0 / jnp.maximum(total, 1e-8)

    def micro(params, rows, rng):
        value, _ = weighted_loss(config, merge(params, frozen), rows, label_tokens, rng, unroll)
        return value * scale

    grad = jax.value_and_grad(micro)
    if accumulation == 1:
        loss, grads = grad(params, batch, rng)
        return loss, grads, total

    # Micro-batch a takes rows a, a + A, a + 2A, ...: every device keeps its own rows.
    parts = jax.tree.map(lambda x: x.reshape(-1, accumulation, *x.shape[1:]).swapaxes(0, 1), batch)

    def body(carry, part):
        rows, rng = part
        loss, grads = grad(params, rows, rng)
        return jax.tree.map(
            jnp.add, carry, (loss, jax.tree.map(lambda g: g.astype(jnp.float32), grads))
        ), None

    zeros = (jnp.float32(0), jax.tree.map(lambda p: jnp.zeros(p.shape, jnp.float32), params))
    (loss, grads), _ = jax.lax.scan(body, zeros, (parts, jax.random.split(rng, accumulation)))
    return loss, jax.tree.map(lambda g, p: g.astype(p.dtype), grads, params), total


@jax.jit
def _finite_leaves(tree: Any) -> Any:
    return jax.tree.map(lambda leaf: jnp.isfinite(leaf).all(), tree)


def first_not_finite(state: TrainState) -> str | None:
    """The name of an array of parameters or optimizer that holds NaN or infinity; None if all are finite.

    Loss and gradient norm say nothing of a parameter that overflowed and is not used by later samples, so every state
    is looked at before it is saved. All processes must come here together.
    """
    finite = jax.device_get(_finite_leaves({"params": state.params, "opt_state": state.opt_state}))
    for path, leaf in jax.tree_util.tree_leaves_with_path(finite):
        if not leaf:
            return jax.tree_util.keystr(path, simple=True, separator="/")
    return None


def _attention_pairs(config: ModelConfig, batch: Batch) -> Array:
    """Pairs of a query and a key that attend in a batch, the mean over the LLM's blocks: a segment's positions tell."""
    keys = jnp.where(batch.segment_ids != 0, batch.positions + 1, 0).astype(jnp.float32)
    windows = config.llm.block_windows
    seen = {window: jnp.minimum(keys, window or jnp.inf).sum() for window in set(windows)}
    return sum(seen[window] for window in windows) / len(windows)


def _unrolls(config: ModelConfig, mesh: Mesh | AbstractMesh, batch: Batch) -> bool:
    """Whether to write the LLM's blocks out: on CPUs, where what they keep is large and they are few."""
    kept = math.prod(batch.tokens.shape) * config.llm.width
    return _on_cpu(mesh) and kept >= UNROLLED_FROM and config.llm.depth <= UNROLLED_DEPTH


def _on_cpu(mesh: Mesh | AbstractMesh) -> bool:
    return isinstance(mesh, Mesh) and mesh.devices.flat[0].platform == "cpu"


def _compiler_options(mesh: Mesh | AbstractMesh) -> dict[str, Any] | None:
    """XLA's, for the devices of a mesh: vectors as wide as the CPU has them, where its default is half of AVX-512's."""
    return {"xla_cpu_prefer_vector_width": 512} if _on_cpu(mesh) else None


def make_train_step(
    config: ModelConfig,
    optimizer: optax.GradientTransformation,
    state: TrainState,
    frozen: Any,
    batch: Batch,
    *,
    label_tokens: int,
    accumulation: int,
    seed: int,
):
    """Builds `step(state, frozen, batch) -> (state, metrics)`, jitted for these shapes and shardings.

    Metrics are float32 scalars: loss, loss_weight (the sum of weights), label_tokens (how many are supervised), tokens
    (not padding), positions (rows * T), attention_pairs (of queries and keys, mean over the LLM's blocks), images,
    grad_norm (before clipping), `grad_norm/<module>` and finite: whether loss and
    gradient norm are.

    Nothing in the step chooses between the old and the new state: that would keep both in memory (with AdamW a fifth
    more temporaries, with Muon up to 43 %). The loop looks at `finite` before anything is saved and stops there
    (`metrics.RunLog.flush`), and a checkpoint refuses a state that is not finite (`first_not_finite`).

    Args:
      state, frozen, batch: arrays, or shapes with shardings.
    """
    shardings = jax.tree.map(lambda leaf: leaf.sharding, (state, frozen, batch))
    mesh = state.step.sharding.mesh
    unroll = _unrolls(config, mesh, batch)

    @functools.partial(
        jax.jit,
        donate_argnums=0,
        compiler_options=_compiler_options(mesh),
        in_shardings=shardings,
        out_shardings=(shardings[0], replicated(mesh)),
    )
    def step(state: TrainState, frozen: Any, batch: Batch):
        rng = jax.random.fold_in(jax.random.key(seed), state.step)
        loss, grads, total = loss_and_grads(
            config, state.params, frozen, batch, label_tokens, accumulation, rng, unroll
        )
        norms = {name: optax.tree.norm(part) for name, part in grads.items()}
        norm = optax.tree.norm(list(norms.values()))
        finite = jnp.isfinite(loss) & jnp.isfinite(norm)
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        new = TrainState(state.step + 1, optax.apply_updates(state.params, updates), opt_state)
        metrics = {
            "loss": loss,
            "loss_weight": total,
            "label_tokens": jnp.count_nonzero(batch.loss_weights[:, 1:]),
            "tokens": (batch.segment_ids != 0).sum(),
            "positions": batch.segment_ids.size,
            "attention_pairs": _attention_pairs(config, batch),
            "images": 0 if batch.image_mask is None else batch.image_mask.sum(),
            "grad_norm": norm,
            "finite": finite,
            **{f"grad_norm/{name}": value for name, value in norms.items()},
        }
        return new, {key: jnp.asarray(value, jnp.float32) for key, value in metrics.items()}

    return step
