"""The feature cache of a stage: its key, and the images' features computed once before the stage begins."""

import contextlib
import dataclasses
import hashlib
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import multihost_utils
from ml_collections import ConfigDict
from rich.console import Console
from rich.progress import Progress

from mllm_jax import files
from mllm_jax.console import make_console, progress_bar, say, size_text
from mllm_jax.data.feature_cache import FeatureCache, FeatureCacheError, digests
from mllm_jax.data.images import decoder_versions
from mllm_jax.data.layout import LayoutRule, VisualLayout, layouts
from mllm_jax.data.rows import ImageReader
from mllm_jax.data.samples import Sample, Source
from mllm_jax.data.threads import map_in_order
from mllm_jax.models import mllm, paths
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.parallel import processes
from mllm_jax.parallel.mesh import AXES, make_mesh, replicated, row_sharding, use_mesh
from mllm_jax.storage import Path
from mllm_jax.training.sources import image_reader
from mllm_jax.turns import taking_turns
from mllm_jax.workdir import data_dir

SHARD_BYTES = 1 << 28  # so much is lost at most when a run is killed
PER_DEVICE = 16  # images that a device encodes at once

Place = tuple[str, int, int]  # source, sample and number of an image
Wanted = tuple[Place, dict[int, bytes]]  # an image, and the digest of each of its slots that the cache lacks


def feature_cache(
    config: ConfigDict,
    stage: ConfigDict,
    model: ModelConfig,
    params: Any,
    prepared: dict[str, Source],
    workdir: Path,
) -> FeatureCache | None:
    """The features of all images of a stage, computed now if they are not there; None without `cache_features`.

    Raises:
      ImageError, DataError: naming sample and file; too little room on the disk.
    """
    if not stage.cache_features:
        return None
    dtype = config.model.frozen_dtype
    tower = jax.tree.map(lambda leaf: _on_host(leaf).astype(jnp.dtype(dtype)), params["vision"])
    reader = image_reader(config, stage)
    root = data_dir(config, workdir) / "features"
    with processes.together("feature cache opened"):
        cache = open_cache(root, model, tower, reader, dtype)
    fill(cache, prepared, model, tower, reader, threads=config.data.threads)
    return cache


def _on_host(leaf: Any) -> np.ndarray:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:  # trained on several hosts
        return np.asarray(multihost_utils.process_allgather(leaf, tiled=True))
    return np.asarray(leaf)


def open_cache(
    root: pathlib.Path, model: ModelConfig, tower: Any, reader: ImageReader, weights_dtype: str
) -> FeatureCache:
    """The cache of a model's frozen tower.

    Args:
      root: folder of all feature caches.
      tower: its parameters, host arrays.
      reader: how images are decoded and preprocessed.
      weights_dtype: that of the tower's weights when it runs.
    """
    request = model.make_connector().request()
    key = {
        "weights": fingerprint(tower, weights_dtype),
        "vision": dataclasses.asdict(model.vision),
        "request": dataclasses.asdict(request),
        "image_size": model.image_size,
        "processor": dataclasses.asdict(reader.processor),
        "compat": reader.compat,
        "decoders": decoder_versions(),
    }
    return FeatureCache(root, key, model.features_spec)


def fingerprint(params: Any, dtype: str) -> str:
    """A digest of every weight as `dtype`."""
    found = hashlib.sha256()
    for path, leaf in sorted(paths.flatten(params).items()):
        values = np.asarray(leaf).astype(jnp.dtype(dtype))
        found.update(f"{path} {values.shape} {values.dtype}\n".encode())
        found.update(values.tobytes())
    return found.hexdigest()


def fill(
    cache: FeatureCache,
    sources: Mapping[str, Source],
    model: ModelConfig,
    tower: Any,
    reader: ImageReader,
    *,
    threads: int = 4,
    shard_bytes: int = SHARD_BYTES,
    console: Console | None = None,
) -> int:
    """Computes what the cache lacks of the sources' images; returns how many slots those fill.

    Every process takes a share, on its own devices; where they do not share a disk, each then computes the rest for its
    own. What is written stays if this is interrupted. Another run that wants to fill the same cache waits meanwhile.

    Args:
      tower: parameters, host arrays in the dtype in which the tower runs.
      threads: threads that read and decode.

    Raises:
      ImageError, DataError: an image that cannot be used; sample and file are named.
      FeatureCacheError: the disk has less room than the features will take.
      OtherProcessError: another process has raised one of these.
    """
    with contextlib.ExitStack() as held:
        with processes.together("turn with the feature cache"):
            if jax.process_index() == 0:
                held.enter_context(taking_turns(cache.directory, "computing features"))
        return _fill(
            cache, sources, model, tower, reader, max(threads, 1), shard_bytes, console or make_console()
        )


def _fill(
    cache: FeatureCache,
    sources: Mapping[str, Source],
    model: ModelConfig,
    tower: Any,
    reader: ImageReader,
    threads: int,
    shard_bytes: int,
    console: Console,
) -> int:
    with processes.together("feature cache searched"):
        files.remove_stale(cache.directory)
        cache.refresh()
        wanted = _missing(cache, sources, model.visual_layout, reader, threads, console)
        count = sum(len(slots) for _, slots in wanted)
        if count:
            _check_room(cache, count, console)  # all of them will lie on this process's disk
    # This process's share, and then what another process has written to a disk of its own.
    for index, step in ((jax.process_index(), jax.process_count()), (0, 1)):
        with processes.together("feature cache computed"):
            share = wanted[index::step]
            mine = [one for one in share if any(found not in cache for found in one[1].values())]
            if mine:
                _compute(cache, mine, sources, model, tower, reader, threads, shard_bytes, console)
        with processes.together("feature cache read"):
            cache.refresh()
    return count


def _progress(console: Console) -> Progress:
    return progress_bar(console, show=jax.process_index() == 0)


def _layouts(sample: Sample, rule: LayoutRule, reader: ImageReader) -> list[VisualLayout]:
    return layouts(rule, reader.shown(sample), sample=sample.id)


def _missing(
    cache: FeatureCache,
    sources: Mapping[str, Source],
    rule: LayoutRule,
    reader: ImageReader,
    threads: int,
    console: Console,
) -> list[Wanted]:
    """The images of which the cache lacks slots, each where it stands first."""
    found: list[Wanted] = []
    seen: set[bytes] = set()
    with _progress(console) as progress:
        for name, source in sorted(sources.items()):
            task = progress.add_task(f"feature cache: looking through {name}", total=len(source))

            def slots_of(index: int, source: Source = source) -> list[list[bytes]]:
                sample = source[index]
                return [
                    digests(image, layout)
                    for image, layout in zip(sample.images, _layouts(sample, rule, reader), strict=True)
                ]

            for index, images in map_in_order(slots_of, range(len(source)), threads):
                for image, slots in enumerate(images):
                    lacking = {n: d for n, d in enumerate(slots) if d not in cache and d not in seen}
                    if lacking:
                        found.append(((name, index, image), lacking))
                        seen.update(lacking.values())
                progress.advance(task)
    return found


def _check_room(cache: FeatureCache, count: int, console: Console) -> None:
    need, free = count * cache.record, shutil.disk_usage(cache.directory).free
    size = " + ".join(" x ".join(map(str, each.shape)) for each in cache.spec)
    if jax.process_index() == 0:
        say(
            console,
            f"feature cache: {count:,} images of {size} {cache.dtype} take {size_text(need)} in {cache.directory} "
            f"({size_text(free)} free)",
        )
    if need > free:
        raise FeatureCacheError(
            f"{cache.directory}: {count:,} images' features take {size_text(need)}, and the disk has "
            f"{size_text(free)} free; make room, choose another data.dir or set cache_features=False"
        )


def _compute(
    cache: FeatureCache,
    wanted: list[Wanted],
    sources: Mapping[str, Source],
    model: ModelConfig,
    tower: Any,
    reader: ImageReader,
    threads: int,
    shard_bytes: int,
    console: Console,
) -> None:
    mesh = make_mesh(dict.fromkeys(AXES, 1) | {"data": -1}, jax.local_devices())
    size = PER_DEVICE * mesh.size
    per_shard = max(1, shard_bytes // cache.record)

    def load(one: Wanted) -> list[tuple[bytes, Any, Any]]:
        (name, index, image), slots = one
        sample = sources[name][index]
        layout = _layouts(sample, model.visual_layout, reader)[image]
        pixels = reader(sample, image, layout)
        return [(found, pixels[slot], layout.grid) for slot, found in slots.items() if found not in cache]

    def encode(params: Any, *slots: Any) -> Any:
        return mllm.apply(model, {"vision": params}, *slots, method="features")

    native = model.visual_layout.slot.native

    with use_mesh(mesh), _progress(console) as progress:
        task = progress.add_task("feature cache: encoding", total=sum(len(slots) for _, slots in wanted))
        run = jax.jit(encode, in_shardings=(replicated(mesh), *[row_sharding(mesh)] * (2 if native else 1)))
        params = jax.device_put(tower, replicated(mesh))
        done: list[bytes] = []
        parts: list[tuple[np.ndarray, ...]] = []
        loaded = (item for _, items in map_in_order(load, wanted, threads) for item in items)
        for batch in _batches(loaded, size):
            images = np.zeros((size, *model.slot_size, 3), np.uint8)
            images[: len(batch)] = [image for _, image, _ in batch]
            slots = [images]
            if native:
                slots.append(np.zeros((size, 2), np.int32))
                slots[1][: len(batch)] = [grid for _, _, grid in batch]
            done += [found for found, _, _ in batch]
            parts.append(tuple(np.asarray(each)[: len(batch)] for each in run(params, *slots)))
            if len(done) >= per_shard:
                cache.write(done, [*map(np.concatenate, zip(*parts, strict=True))])
                done, parts = [], []
            progress.advance(task, len(batch))
        if done:
            cache.write(done, [*map(np.concatenate, zip(*parts, strict=True))])


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    batch = []
    for item in items:
        batch.append(item)
        if len(batch) == size:
            yield batch
            batch = []
    if batch:
        yield batch
