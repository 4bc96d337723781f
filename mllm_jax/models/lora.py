"""LoRA (arXiv 2106.09685) as leaves beside the kernels they adapt: y = x W + scale * dropout(x) A B.

`add` puts `lora_a` [in, r] and `lora_b` [r, out] (stacked like the kernel) next to every kernel whose path
matches; `Dense` uses them when they are there. So adapters are ordinary parameters: the trainable pattern
`.*/lora_[ab]` trains them, sharding rules and checkpoints name them, and nothing of the size of W is made in
a training step. `merge` folds them into the kernels for deployment.
"""

import dataclasses
import math
import re
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array

from mllm_jax.config import LLM_LINEAR
from mllm_jax.models.paths import flatten, unflatten

Tree = dict[str, Any]

ADAPTERS = r".*/lora_[ab]"  # paths of adapters


@dataclasses.dataclass(frozen=True)
class LoRA:
    """Adapters of one model.

    Attributes:
      rank: r.  alpha: the update is scaled by alpha / r.
      dropout: on the adapter's input, in training (when a "dropout" rng is given).
      targets: regex over kernel paths, `llm/...` or `vision/...`.
      rank_stabilized: scale by alpha / sqrt(r) instead (PEFT's use_rslora).
    """

    rank: int = 128
    alpha: int | float = 256.0
    dropout: int | float = 0.05
    targets: str = LLM_LINEAR
    rank_stabilized: bool = False

    @property
    def scale(self) -> int | float:
        """Factor on A B."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilized else self.rank)


def target_paths(params: Tree, config: LoRA) -> list[str]:
    """Paths of the kernels that are adapted.

    Raises:
      ValueError: the pattern matches no kernel.
    """
    kernels = [path for path in flatten(params) if path.endswith("/kernel")]
    found = [path for path in kernels if re.fullmatch(config.targets, path)]
    if not found:
        # The connector is trained whole, so it is not offered.
        offered = [path for path in kernels if not path.startswith("connector/")]
        raise ValueError(f"lora.targets={config.targets!r} matches no kernel; kernels: {', '.join(offered)}")
    return found


def add(params: Tree, config: LoRA, rng: Array, dtype: Any = jnp.float32) -> Tree:
    """The same parameters with fresh adapters: A uniform as torch's Linear (Kaiming, a = sqrt 5), B zero.

    Raises:
      ValueError: the pattern matches no kernel, or the parameters hold adapters already.
    """
    flat = dict(flatten(params))
    paths = target_paths(params, config)
    for path, key in zip(paths, jax.random.split(rng, len(paths)), strict=True):
        *stack, inside, outside = flat[path].shape
        stem = path.removesuffix("kernel")
        if f"{stem}lora_a" in flat:
            raise ValueError(f"{path!r} is adapted already; merge first")
        bound = 1 / math.sqrt(inside)
        flat[f"{stem}lora_a"] = jax.random.uniform(key, (*stack, inside, config.rank), dtype, -bound, bound)
        flat[f"{stem}lora_b"] = jnp.zeros((*stack, config.rank, outside), dtype)
    return unflatten(flat)


def split(params: Tree) -> tuple[Tree, Tree]:
    """(base parameters, adapters)."""
    flat = flatten(params)
    adapters = {path: leaf for path, leaf in flat.items() if re.fullmatch(ADAPTERS, path)}
    return unflatten({p: leaf for p, leaf in flat.items() if p not in adapters}), unflatten(adapters)


def merge(params: Tree, config: LoRA) -> Tree:
    """W + scale * A B in place of every adapted kernel, computed in float32, in the kernel's dtype and sharding.

    Raises:
      ValueError: an adapted kernel is quantised.
    """
    base, adapters = (flatten(tree) for tree in split(params))
    for path in [path for path in adapters if path.endswith("lora_a")]:
        stem = path.removesuffix("lora_a")
        kernel = base[f"{stem}kernel"]
        if kernel.dtype == jnp.int8:
            raise ValueError(f"{stem}kernel is int8; merge into the original weights, not the quantised ones")
        where = kernel.sharding if isinstance(kernel, jax.Array) else None
        update = jax.jit(_merged, static_argnums=3, out_shardings=where)
        base[f"{stem}kernel"] = update(
            kernel, adapters[f"{stem}lora_a"], adapters[f"{stem}lora_b"], config.scale
        )
    return unflatten(base)


def _merged(kernel: Array, a: Array, b: Array, scale: int | float) -> Array:
    a, b = a.astype(jnp.float32), b.astype(jnp.float32)
    update = jnp.matmul(a, b, precision="highest") * scale
    return (kernel.astype(jnp.float32) + update).astype(kernel.dtype)
