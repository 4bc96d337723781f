"""From a configuration to a model, its data and its starting parameters."""

import functools
import pathlib
import re
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mllm_jax import interop
from mllm_jax.data import tfds_llava
from mllm_jax.data.batch import Batch
from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.feature_cache import FeatureCache
from mllm_jax.data.llava_json import Record
from mllm_jax.data.pipeline import TrainIterator, make_train_iterator
from mllm_jax.data.rows import ImageReader, RowEncoder, check_fits, check_slots, render_sample
from mllm_jax.data.samples import Source, image_file_size
from mllm_jax.data.templates import CHAT
from mllm_jax.data.tokens import encode_sample
from mllm_jax.inference.runs import image_processor
from mllm_jax.interop.checkpoints import load_connector
from mllm_jax.interop.saved_params import load_params
from mllm_jax.mini.world import dataset as mini_dataset
from mllm_jax.models import mllm, paths, quantize
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.parallel import processes
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.training import adapters, features


def image_reader(config: ConfigDict, stage: ConfigDict) -> ImageReader:
    """How a stage decodes and preprocesses its images."""
    processor = image_processor(config, stage.aspect)
    return ImageReader(processor, config.data.compat or None, config.data.max_image_pixels)


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
    `model.frozen_dtype` when it is trained at last. Adapters: see `adapters.go_on`.

    Args:
      before: the whole model after the stage before; None in the first stage.
    """
    params = pretrained_params(config, model)
    index = tuple(config.stage_order).index(name)
    if index:
        earlier = [config.stages[each] for each in config.stage_order[:index]]
        params = adapters.go_on(params, before, earlier, config.stages[name])
    rng = jax.random.fold_in(jax.random.key(config.seed), 1 + index)
    return adapters.add(params, config.stages[name], rng, config.model.param_dtype)


def place(params: Any, mesh: Mesh, dtype: str) -> Any:
    """Parameters on the mesh, one array at a time, floating point as `dtype` (int8 and its scales as they are)."""

    def put(path: tuple, leaf: Any, sharding: Any) -> jax.Array:
        if not isinstance(leaf, jax.Array):  # straight from the host to every device's own part
            leaf = np.asarray(leaf)
        return jax.device_put(leaf.astype(_dtype(path, leaf, dtype)), sharding)

    return jax.tree_util.tree_map_with_path(put, params, param_shardings(params, mesh))


def _dtype(path: tuple, leaf: Any, dtype: str) -> Any:
    keep = not jnp.issubdtype(leaf.dtype, jnp.floating) or paths.path_of(path).endswith(quantize.SCALE)
    return leaf.dtype if keep else jnp.dtype(dtype)


def abstract(params: Any, mesh: Mesh, dtype: str) -> Any:
    """Shapes, dtype and shardings for restoring a tree like `params`."""
    return jax.tree_util.tree_map_with_path(
        lambda path, x, s: jax.ShapeDtypeStruct(x.shape, _dtype(path, x, dtype), sharding=s),
        params,
        param_shardings(params, mesh),
    )


def _data_dir(config: ConfigDict, workdir: pathlib.Path) -> pathlib.Path:
    return pathlib.Path(config.data.dir) if config.data.dir else workdir / "data"


def prepare_sources(
    config: ConfigDict, name: str, model: ModelConfig, tokenizer: Any, workdir: pathlib.Path
) -> dict[str, Source]:
    """The data sets of stage `name`, written under `data.dir` (or the work directory) unless they are there already.

    The first process writes, then the others read, or write on a disk of their own.

    Raises:
      DataError, ImageError, SampleError: naming file and sample. A sample that the template cannot take or whose
        images do not fit a row is one; with `data.overlong=error` also one with too many tokens, which only the
        first process looks for. A stage that has begun is not checked again: it goes on with the same data only.
    """
    data_dir, stage = _data_dir(config, workdir), config.stages[name]
    tokenizer = None if jax.process_index() else tokenizer
    check = None
    if not (workdir / "checkpoints" / name).exists():
        check = functools.partial(_record_check, config, stage, model, tokenizer)

    def prepare() -> dict[str, Source]:
        return {
            source: _prepare(config, source, values, data_dir, check)
            for source, values in sorted(stage.sources.items())
        }

    return processes.first_then_others(prepare, "data prepared")


def _record_check(
    config: ConfigDict, stage: ConfigDict, model: ModelConfig, tokenizer: Any, root: pathlib.Path
) -> Callable[[Record], None]:
    """Raises what makes a record unusable in a stage; lengths are looked at with a tokenizer only.

    Args:
      root: folder that the records' images are relative to.
    """
    lengths = tokenizer is not None and config.data.overlong == "error"
    template = stage.template
    if lengths:
        template = resolve_template(template, tokenizer)

    def check(record: Record) -> None:
        images, limit = len(record.images), config.data.image_slots
        check_slots(record.id, images, images, limit)  # every image fills at least one
        if template == CHAT:  # which any conversation fits, and which only the tokenizer knows
            return
        spans = render_sample(record.id, record.conversations, images, template, config.data.compat or None)
        if lengths:
            sizes = [
                functools.partial(image_file_size, root, image, record.id, config.data.compat or None)
                for image in record.images
            ]
            layouts = [model.visual_layout(read_size) for read_size in sizes]
            encoded = encode_sample(spans, tokenizer, layouts, sample=record.id)
            check_slots(record.id, images, encoded.num_slots, limit)
            check_fits(encoded, stage.seq_len or config.data.seq_len, config.data.label_tokens)

    return check


def _prepare(
    config: ConfigDict,
    name: str,
    source: ConfigDict,
    data_dir: pathlib.Path,
    check: Callable[[pathlib.Path], Callable[[Record], None]] | None,
) -> Source:
    json_path, images = pathlib.Path(source.json), source.images or None
    if source.kind == "mini_world":
        split, form, count, seed = source.split, source.form, source.count, config.seed
        root = data_dir / f"mini_world_{split}_{form}_{count}_{seed}"
        json_path = mini_dataset.write_split(root, split, count, form, seed)
        images = root / "images"
    dataset = "source_" + re.sub(r"[^a-z0-9_]", "_", name.lower())
    return tfds_llava.prepare(
        json_path,
        images,
        data_dir,
        name=dataset,
        duplicate_ids=source.duplicate_ids,
        compat=config.data.compat or None,
        check=check and check(pathlib.Path(images or "")),
        max_image_pixels=config.data.max_image_pixels if source.kind == "llava" else None,  # ours are sound
    )


def feature_cache(
    config: ConfigDict,
    stage: ConfigDict,
    model: ModelConfig,
    params: Any,
    prepared: dict[str, Source],
    workdir: pathlib.Path,
) -> FeatureCache | None:
    """The features of all pictures of a stage, computed now if they are not there; None without `cache_features`.

    Raises:
      ImageError, DataError: naming sample and file; too little room on the disk.
    """
    if not stage.cache_features:
        return None
    dtype = config.model.frozen_dtype
    tower = jax.tree.map(lambda leaf: _on_host(leaf).astype(jnp.dtype(dtype)), params["vision"])
    reader = image_reader(config, stage)
    root = _data_dir(config, workdir) / "features"
    cache = features.open_cache(root, model, tower, reader, dtype)
    features.fill(cache, prepared, model, tower, reader, threads=config.data.threads)
    return cache


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # trained on several hosts
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def batch_spec(config: ConfigDict, stage: ConfigDict, model: ModelConfig) -> Batch:
    """Shapes and dtypes of a stage's batches, over all processes."""
    kept = features.features_spec(model) if stage.cache_features else None
    return Batch.spec(
        stage.batch_size,
        length=stage.seq_len or config.data.seq_len,
        slots=config.data.image_slots,
        image_size=None if kept else model.visual_layout.slot.size,
        features=kept,
    )


def stage_iterator(
    config: ConfigDict,
    stage: ConfigDict,
    model: ModelConfig,
    tokenizer: Any,
    prepared: dict[str, Source],
    cache: FeatureCache | None = None,
) -> TrainIterator:
    """The batches of a stage from its prepared data sets, with features from `cache` in place of pictures.

    Raises (when iterated):
      SampleError, ImageError: naming file and sample.
    """
    weights = [stage.sources[name].weight for name in prepared]
    encoder = RowEncoder(
        image_reader(config, stage),
        model.visual_layout,
        tokenizer,
        stage.template,
        seq_len=stage.seq_len or config.data.seq_len,
        image_slots=config.data.image_slots,
        overlong=config.data.overlong,
        label_tokens=config.data.label_tokens,
        features=cache,
    )
    return make_train_iterator(
        list(prepared.values()),
        encoder,
        batch_size=stage.batch_size,
        seed=config.seed,
        epochs=None if stage.steps else stage.epochs,
        # Equal weights read every sample once an epoch; others draw in proportion.
        weights=None if len(set(weights)) == 1 else weights,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        num_threads=config.data.threads,
    )


def load_stage(directory: pathlib.Path, config: ConfigDict, model: ModelConfig, mesh: Mesh) -> Any:
    """What a finished stage has left in `WORKDIR/params/STAGE`, on the mesh; adapters and int8 as they are.

    Raises:
      FileNotFoundError, CheckpointError: nothing there, or it belongs to another model.
    """
    trained, frozen = adapters.abstract_split(mllm.abstract_params(model), config.stages[directory.name])
    like = paths.merge(
        abstract(trained, mesh, config.model.param_dtype), abstract(frozen, mesh, config.model.frozen_dtype)
    )
    return load_params(directory, like)


def eval_config(config: ConfigDict, workdir: pathlib.Path) -> ConfigDict:
    """`config.eval` with the mini benchmark written under the data folder where a path is not given.

    The first process writes, then the others read, or write on a disk of their own.
    """
    values = config.eval.copy_and_resolve_references()
    data_dir = _data_dir(config, workdir)

    def write() -> None:
        for benchmark in values.benchmarks.values():
            if benchmark.kind == "mini" and not benchmark.path:
                root = data_dir / f"mini_benchmark_{benchmark.count}_{config.seed}"
                benchmark.path = str(mini_dataset.write_benchmark(root, benchmark.count, config.seed))
                benchmark.images = str(root / "images")

    processes.first_then_others(write, "mini benchmark written")
    return values
