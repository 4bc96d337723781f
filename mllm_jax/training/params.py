"""The parameters that a stage starts from, and how they are placed on the mesh."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AbstractMesh, Mesh
from ml_collections import ConfigDict

from mllm_jax import interop
from mllm_jax.interop.checkpoints import load_connector
from mllm_jax.interop.saved_params import load_params
from mllm_jax.models import mllm, paths, quantize
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.parallel import processes
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.storage import Path
from mllm_jax.training import adapters


def pretrained_params(config: ConfigDict, model: ModelConfig) -> Any:
    """Checkpointed tower (as deep as the connector needs) and LLM, and connector, fresh or checkpointed; host arrays.

    Learned separators, where the model has any, are fresh.

    Raises:
      ValueError: a tensor or parameter that does not fit; it is named.
    """
    names = set(mllm.abstract_params(model)) - {"vision", "llm"}
    given = {}
    if config.model.connector.path:
        given["connector"] = load_connector(
            config.model.connector.path,
            model,
            allow_mismatch=config.model.connector.get("allow_mismatch", False),
        )

    def fresh(key: jax.Array) -> Any:
        params = mllm.init(model, key)
        return {name: params[name] for name in sorted(names - given.keys())}

    return {
        **given,
        **jax.device_get(jax.jit(fresh)(jax.random.key(config.seed))),
        "vision": interop.load_vision(
            config.model.vision.path, depth=model.make_connector().request().deepest, whole=model.vision
        ),
        "llm": interop.load_llm(config.model.llm.path),
    }


def starting_params(config: ConfigDict, model: ModelConfig, name: str, before: Any) -> Any:
    """What stage `name` starts from: parameters that earlier stages trained, and the pretrained ones for all else.

    A parameter that was only frozen before is read again from its checkpoint, so that it is not rounded to
    `model.frozen_dtype` when it is trained at last. Adapters: see `adapters.carry_over`.

    Args:
      before: the whole model after the stage before; None in the first stage.
    """
    with processes.together("pretrained parameters read"):
        params = pretrained_params(config, model)
    index = tuple(config.stage_order).index(name)
    if index:
        earlier = [config.stages[each] for each in config.stage_order[:index]]
        params = adapters.carry_over(params, before, earlier, config.stages[name])
    rng = jax.random.fold_in(jax.random.key(config.seed), 1 + index)
    return adapters.add(params, config.stages[name], rng, config.model.param_dtype)


def load_stage(directory: Path, config: ConfigDict, model: ModelConfig, mesh: Mesh) -> Any:
    """What a finished stage has left in `WORKDIR/params/STAGE`, on the mesh; adapters and int8 as they are.

    Raises:
      FileNotFoundError, CheckpointError: nothing there, or it belongs to another model.
    """
    trained, frozen = adapters.abstract_split(mllm.abstract_params(model), config.stages[directory.name])
    like = paths.merge(
        abstract(trained, mesh, config.model.param_dtype, model),
        abstract(frozen, mesh, config.model.frozen_dtype, model),
    )
    return load_params(directory, like)


def place(params: Any, mesh: Mesh, dtype: str, model: ModelConfig) -> Any:
    """Parameters on the mesh, one array at a time, floating point as `dtype` (int8 and its scales as they are)."""

    def put(path: tuple, leaf: Any, sharding: Any) -> jax.Array:
        if not isinstance(leaf, jax.Array):  # straight from the host to every device's own part
            leaf = np.asarray(leaf)
        return jax.device_put(leaf.astype(_dtype(path, leaf, dtype)), sharding)

    return jax.tree_util.tree_map_with_path(put, params, param_shardings(params, mesh, model))


def abstract(params: Any, mesh: Mesh | AbstractMesh, dtype: str, model: ModelConfig) -> Any:
    """Shapes, dtypes and shardings of `place(params, mesh, dtype, model)`; `params` may be shapes themselves."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x, s: jax.ShapeDtypeStruct(x.shape, _dtype(path, x, dtype), sharding=s),
        params,
        param_shardings(params, mesh, model),
    )


def _dtype(path: tuple, leaf: Any, dtype: str) -> Any:
    keep = not jnp.issubdtype(leaf.dtype, jnp.floating) or paths.path_of(path).endswith(quantize.SCALE)
    return leaf.dtype if keep else jnp.dtype(dtype)
