"""From a configuration to a model, its data and its starting parameters."""

import dataclasses
import pathlib
import re
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mllm_jax import interop
from mllm_jax.config import ConfigError, blaming
from mllm_jax.data import tfds_llava
from mllm_jax.data.mini_world import dataset as mini_dataset
from mllm_jax.data.pipeline import TrainIterator, make_train_iterator
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.samples import Source
from mllm_jax.evaluation.bundle import Model
from mllm_jax.interop.checkpoints import load_connector
from mllm_jax.models import attention, mllm, paths
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.training import checkpoint


def model_config(config: ConfigDict) -> ModelConfig:
    """The model's computation from a checked configuration and the two checkpoints' `config.json`.

    Raises:
      ConfigError: a combination that cannot work (resolution, layer, connector options, context length).
    """
    chosen = config.model.connector.name
    options = config.model.connector.get(chosen, ConfigDict()).to_dict()
    with blaming("model.vision.path"):
        vision = interop.vision_config(config.model.vision.path)
    with blaming("model.llm.path"):
        llm = interop.llm_config(config.model.llm.path)
    with blaming("model.vision.select_layer"):
        vision.resolve_layer(config.model.vision.select_layer)
    if config.model.attention not in attention.IMPLEMENTATIONS:
        raise ConfigError(
            f"config key 'model.attention' is {config.model.attention!r}; valid: {', '.join(attention.IMPLEMENTATIONS)}"
        )
    model = ModelConfig(
        vision=vision,
        llm=llm,
        image_size=config.model.vision.image_size,
        select_layer=config.model.vision.select_layer,
        connector=chosen,
        connector_options=tuple(sorted(options.items())),
        dtype=config.model.dtype,
        param_dtype=config.model.param_dtype,
        remat=config.model.llm.remat,
        vision_remat=config.model.vision.remat,
        attention=config.model.attention,
    )
    if model.image_size < model.vision.patch:
        raise ConfigError(
            f"config key 'model.vision.image_size' is {model.image_size}, less than one patch of {model.vision.patch}"
        )
    with blaming("model.connector"):
        visual = model.tokens_per_image
    lengths = {
        f"stages.{name}.seq_len": stage.seq_len for name, stage in config.stages.items() if stage.seq_len
    }
    for key, length in {"data.seq_len": config.data.seq_len, **lengths}.items():
        if length > model.llm.max_positions:
            raise ConfigError(
                f"config key {key!r} is {length}, more than the LLM's {model.llm.max_positions} positions"
            )
        if length <= visual:
            raise ConfigError(
                f"config key {key!r} is {length}, but one image already takes {visual} tokens; raise it or choose a "
                "compressing connector"
            )
    return model


def image_processor(config: ConfigDict) -> ImageProcessor:
    """The tower's preprocessing at the configured resolution."""
    fields = interop.load_processor_config(config.model.vision.path)
    native = ImageProcessor.from_hf_config(fields, aspect=config.data.aspect)
    size = config.model.vision.image_size
    shortest = round(native.shortest_side * size / native.size) if native.shortest_side else 0
    return dataclasses.replace(native, size=size, shortest_side=shortest)


def pretrained_params(config: ConfigDict, model: ModelConfig) -> Any:
    """Checkpointed tower (as deep as the connector needs) and LLM, and connector, fresh or checkpointed; host arrays.

    Raises:
      ValueError: a tensor or parameter that does not fit; it is named.
    """
    if config.model.connector.path:
        connector = load_connector(config.model.connector.path, model)
    else:
        connector = jax.jit(lambda key: mllm.init(model, key)["connector"])(jax.random.key(config.seed))
    return {
        "vision": interop.load_vision(
            config.model.vision.path, depth=model.make_connector().request().deepest
        ),
        "connector": jax.device_get(connector),
        "llm": interop.load_llm(config.model.llm.path),
    }


def starting_params(config: ConfigDict, model: ModelConfig, name: str, before: Any) -> Any:
    """What stage `name` starts from: parameters that earlier stages trained, and the pretrained ones for all else.

    A parameter that was only frozen before is read again from its checkpoint, so that it is not rounded to
    `model.frozen_dtype` when it is trained at last.

    Args:
      before: the whole model after the stage before; None in the first stage.
    """
    params = pretrained_params(config, model)
    earlier = config.stage_order[: tuple(config.stage_order).index(name)]
    patterns = [pattern for stage in earlier for pattern in config.stages[stage].trainable]
    if not patterns:
        return params
    learned, _ = paths.split(before, patterns)
    return paths.unflatten(paths.flatten(params) | paths.flatten(learned))


def place(params: Any, mesh: Mesh, dtype: str) -> Any:
    """Parameters on the mesh, one array at a time, floating point as `dtype`."""

    def put(leaf: Any, sharding: Any) -> jax.Array:
        if not isinstance(leaf, jax.Array):  # straight from the host to every device's own part
            leaf = np.asarray(leaf)
        return jax.device_put(leaf.astype(_dtype(leaf, dtype)), sharding)

    return jax.tree.map(put, params, param_shardings(params, mesh))


def _dtype(leaf: Any, dtype: str) -> Any:
    return jnp.dtype(dtype) if jnp.issubdtype(leaf.dtype, jnp.floating) else leaf.dtype  # int8 stays as it is


def abstract(params: Any, mesh: Mesh, dtype: str) -> Any:
    """Shapes, dtype and shardings for restoring a tree like `params`."""
    return jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, _dtype(x, dtype), sharding=s),
        params,
        param_shardings(params, mesh),
    )


def _data_dir(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.data.dir) if config.data.dir else workdir / "data"


def prepare_sources(config: ConfigDict, stage: ConfigDict, workdir: pathlib.Path) -> dict[str, Source]:
    """The data sets of a stage, written under `data.dir` (or the work directory) unless they are there already.

    The first process writes, then the others read, or write on a disk of their own.

    Raises:
      DataError, SampleError: naming file and sample.
    """
    data_dir = _data_dir(config, workdir)
    prepared = {}
    for first in (True, False):
        if (jax.process_index() == 0) == first:
            for name, source in sorted(stage.sources.items()):
                prepared[name] = _prepare(config, name, source, data_dir)
        if jax.process_count() > 1:
            multihost_utils.sync_global_devices(f"data prepared: {first}")
    return prepared


def _prepare(config: ConfigDict, name: str, source: ConfigDict, data_dir: pathlib.Path) -> Source:
    json_path, images = pathlib.Path(source.json), source.images or None
    if source.kind == "mini_world":
        split, form, count, seed = source.split, source.form, source.count, config.seed
        root = data_dir / f"mini_world_{split}_{form}_{count}_{seed}"
        json_path = mini_dataset.write_split(root, split, count, form, seed)
        images = root / "images"
    dataset = "source_" + re.sub(r"[^a-z0-9_]", "_", name.lower())
    return tfds_llava.prepare(json_path, images, data_dir, name=dataset, compat=config.data.compat or None)


def stage_iterator(
    config: ConfigDict, stage: ConfigDict, model: ModelConfig, tokenizer: Any, prepared: dict[str, Source]
) -> TrainIterator:
    """The batches of a stage from its prepared data sets.

    Raises (when iterated):
      SampleError, ImageError: naming file and sample.
    """
    weights = [stage.sources[name].weight for name in prepared]
    return make_train_iterator(
        list(prepared.values()),
        processor=image_processor(config),
        tokenizer=tokenizer,
        template=stage.template,
        num_tokens_per_image=model.tokens_per_image,
        seq_len=stage.seq_len or config.data.seq_len,
        image_slots=config.data.image_slots,
        batch_size=stage.batch_size,
        seed=config.seed,
        epochs=None if stage.steps else stage.epochs,
        # Equal weights read every sample once an epoch; others draw in proportion.
        weights=None if len(set(weights)) == 1 else weights,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads,
        overlong=config.data.overlong,
        compat=config.data.compat or None,
        max_image_pixels=config.data.max_image_pixels,
    )


def check_label_count(batch: dict[str, Any], limit: int) -> None:
    """Refuses a row with more supervised tokens than the loss makes logits for.

    Raises:
      ConfigError: naming the sample.
    """
    counts = (batch["loss_weights"] != 0).sum(axis=1)
    row = int(counts.argmax())
    if counts[row] > limit:
        raise ConfigError(
            f"sample {batch['ids'][row]!r} has {counts[row]} supervised tokens, more than config.data.label_tokens="
            f"{limit}; raise it"
        )


def load_stage(directory: pathlib.Path, config: ConfigDict, model: ModelConfig, mesh: Mesh) -> Any:
    """A finished stage's parameters (`WORKDIR/params/STAGE`) on the mesh, frozen ones in `model.frozen_dtype`.

    Raises:
      FileNotFoundError, CheckpointError: nothing there, or it belongs to another model.
    """
    trained, frozen = paths.split(mllm.abstract_params(model), config.stages[directory.name].trainable)
    like = paths.merge(
        abstract(trained, mesh, config.model.param_dtype), abstract(frozen, mesh, config.model.frozen_dtype)
    )
    return checkpoint.load_params(directory, like)


def bundle(config: ConfigDict, model: ModelConfig, params: Any, tokenizer: Any) -> Model:
    """A model that evaluation can ask."""
    return Model(model, params, tokenizer, image_processor(config), config.eval.template)


def eval_config(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """`config.eval` with the mini benchmark written under the data folder where a path is not given."""
    values = config.eval.copy_and_resolve_references()
    data_dir = _data_dir(config, workdir)
    for benchmark in values.benchmarks.values():
        if benchmark.kind == "mini" and not benchmark.path:
            root = data_dir / f"mini_benchmark_{benchmark.count}_{config.seed}"
            benchmark.path = str(mini_dataset.write_benchmark(root, benchmark.count, config.seed))
            benchmark.images = str(root / "images")
    return values
