"""What answering needs: weights and the cache of keys and values, and the bounds of prefill and of each token."""

import dataclasses
import math

import jax.numpy as jnp
from ml_collections import ConfigDict

from mllm_jax.inference import runs
from mllm_jax.models import mllm, paths
from mllm_jax.models.heads import split
from mllm_jax.planning.estimate import chip_bytes
from mllm_jax.planning.topology import Machine
from mllm_jax.training.flops import mean_attention_pairs, step_flops
from mllm_jax.training.params import abstract


@dataclasses.dataclass(frozen=True)
class Decoding:
    """Answering `batch` prompts at once with `context` positions each (prompt and answer).

    Attributes:
      weights, cache: bytes of a chip.
      fits: whether they leave a tenth of its memory for all else.
      prefill_seconds: for all prompts, filled to the context; the slower of computing and reading.
      token_seconds: for one more token of all prompts; the slower of computing, reading weights and cache, and
        gathering weights that `fsdp` and `sequence` split.
      tokens_per_second: of all prompts together.
      bound: what limits a token: "compute", "memory" or "network".

    Examples:
      >>> Decoding(1e9, 2e8, True, 0.01, 0.001, 8000.0, "memory").bound
      'memory'
    """

    weights: float
    cache: float
    fits: bool
    prefill_seconds: float
    token_seconds: float
    tokens_per_second: float
    bound: str


def decoding(config: ConfigDict, machine: Machine, batch: int, context: int) -> Decoding:
    """The estimate on a recipe's mesh, in `model.dtype`.

    Args:
      batch: prompts at once.
      context: positions of each, prompt and answer.

    Raises:
      ConfigError: the recipe's mesh does not fit the machine.

    Examples:
      >>> from mllm_jax.planning.topology import parse
      >>> from mllm_jax.recipes.mini import mini_config
      >>> decoding(mini_config(), parse("v5e:1x1"), batch=8, context=256).fits
      True
    """
    model, chip = runs.model_config(config), machine.chip
    mesh = machine.abstract_mesh(config.mesh.to_dict())
    shapes = mllm.abstract_params(model)
    weights = chip_bytes(abstract(shapes, mesh, model.dtype, model))
    llm, width = model.llm, jnp.dtype(model.dtype).itemsize
    # Chips that share parameters; each answers rows of its own.
    sharing = mesh.shape["fsdp"] * mesh.shape["sequence"]
    shards = math.gcd(batch, mesh.shape["data"] * sharing)
    of_keys = split(llm.heads, llm.kv_heads, mesh.shape["tensor"])[1]
    rows = batch / shards
    cache = 2 * width * llm.depth * llm.kv_heads * llm.head_width * context * rows / of_keys

    flops = step_flops(model, {}, shapes).forward
    spread = shards * mesh.shape["tensor"]  # chips that share the work; others repeat it
    pairs = mean_attention_pairs(llm.block_windows, context)
    prefill = batch * (context * flops["tokens"] + pairs * flops["attention_pairs"] + flops["images"])
    token = batch * (flops["tokens"] + context * flops["attention_pairs"] + flops["label_tokens"])
    llm_bytes = width * paths.count(shapes["llm"]) / mesh.shape["tensor"]
    times = {
        "compute": token / spread / chip.flops,
        "memory": (llm_bytes + cache) / chip.memory_bandwidth,
        "network": llm_bytes * (1 - 1 / sharing) / chip.network,
    }
    bound = max(times, key=lambda name: times[name])
    seconds = times[bound]
    return Decoding(
        weights=weights,
        cache=cache,
        fits=weights + cache < 0.9 * chip.memory,
        prefill_seconds=max(prefill / spread / chip.flops, llm_bytes / chip.memory_bandwidth),
        token_seconds=seconds,
        tokens_per_second=batch / seconds,
        bound=bound,
    )
