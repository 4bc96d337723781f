"""Rendered training images of the tower with their targets, kept on disk as plain arrays."""

import dataclasses
import functools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from mllm_jax import files
from mllm_jax.mini.world import (
    GLOBAL_CLASSES,
    PATCH_CLASSES,
    Difficulty,
    global_targets,
    patch_targets,
    render_array,
    sample_scene,
)
from mllm_jax.mini.world.sampler import dense_scene

# What a phase may weigh: the kinds of patch labels, and the image labels that the mean of the patches has to tell.
POOLED = ("position",)
WEIGHED = (*PATCH_CLASSES, *POOLED)


def _example(
    index: int,
    seed: int,
    size: int,
    patch: int,
    dense: float,
    cards: tuple[float, float],
    difficulty: Difficulty,
) -> tuple[np.ndarray, dict, dict]:
    crowded = (index * 0.6180339887) % 1 < dense  # evenly spread over the numbers
    scene = (
        dense_scene(seed, index, difficulty, cards)
        if crowded
        else sample_scene(seed, index, "foundation", difficulty)
    )
    return render_array(scene, size), patch_targets(scene, size // patch), global_targets(scene)


def render_pool(
    directory: pathlib.Path,
    *,
    first: int,
    count: int,
    size: int,
    patch: int,
    dense: float,
    cards: tuple[float, float],
    difficulty: Difficulty,
    seed: int,
) -> dict[str, Any]:
    """Renders images `first` .. `first + count` at `size` px, or opens them if they were rendered before.

    Args:
      dense: share of crowded scenes.
      cards: of crowded scenes, see `dense_scene`.
      difficulty: of all scenes.

    Returns:
      images uint8[N, size, size, 3] (memory-mapped), patch {key: uint8[N, P]}, image {key: uint8[N]}.

    Raises:
      ValueError: the directory holds images made with other parameters.
    """
    grid = (size // patch) ** 2
    want = {"first": first, "count": count, "size": size, "patch": patch, "dense": dense, "seed": seed}
    want["cards"] = list(cards)
    want["difficulty"] = json.loads(json.dumps(dataclasses.asdict(difficulty)))
    want["labels"] = [*PATCH_CLASSES, *GLOBAL_CLASSES]
    manifest = directory / "manifest.json"
    names = {"images": ((count, size, size, 3), np.uint8)}
    names |= {f"patch_{key}": ((count, grid), np.uint8) for key in PATCH_CLASSES}
    names |= {f"image_{key}": ((count,), np.uint8) for key in GLOBAL_CLASSES}
    if manifest.exists():
        have = json.loads(manifest.read_text())
        if have != want:
            raise ValueError(
                f"{directory} holds pictures made with {have}, not {want}; choose another folder"
            )
    else:
        directory.mkdir(parents=True, exist_ok=True)
        arrays = {
            name: np.lib.format.open_memmap(directory / f"{name}.npy", "w+", dtype, shape)
            for name, (shape, dtype) in names.items()
        }
        make = functools.partial(
            _example, seed=seed, size=size, patch=patch, dense=dense, cards=cards, difficulty=difficulty
        )
        with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 16)) as pool:
            examples = pool.imap(make, range(first, first + count), chunksize=64)
            for row, (picture, patches, whole) in enumerate(examples):
                arrays["images"][row] = picture
                for key, value in patches.items():
                    arrays[f"patch_{key}"][row] = value
                for key, value in whole.items():
                    arrays[f"image_{key}"][row] = value
        for array in arrays.values():
            array.flush()
        files.write_text(manifest, json.dumps(want))
    opened = {name: np.load(directory / f"{name}.npy", mmap_mode="r") for name in names}
    return {
        "images": opened["images"],
        "patch": {key: opened[f"patch_{key}"] for key in PATCH_CLASSES},
        "image": {key: opened[f"image_{key}"] for key in GLOBAL_CLASSES},
    }


def rows(pool: dict[str, Any], index: np.ndarray) -> dict[str, Any]:
    """The images `index` of a pool as a batch (integer targets as int32)."""
    index = np.sort(index)
    return {
        "images": pool["images"][index],
        "patch": {key: value[index].astype(np.int32) for key, value in pool["patch"].items()},
        "image": {key: value[index].astype(np.int32) for key, value in pool["image"].items()},
    }


def emphasis(points: Mapping[str, Sequence[tuple[int, int | float]]], step: int) -> dict[str, np.float32]:
    """The weight of each of `WEIGHED` at a step.

    Args:
      points: per kind (step, weight) pairs, straight lines between; kinds that are not listed weigh 1.
    """
    listed = {key: np.interp(step, *np.transpose(pairs)) for key, pairs in points.items()}
    return {key: np.float32(listed.get(key, 1)) for key in WEIGHED}


def pool_batches(
    pools: list[dict[str, Any]],
    shares: list[int],
    batch: int,
    seed: int,
    weights: Mapping[str, Sequence[tuple[int, int | float]]],
    start: int,
) -> Iterator[dict]:
    """Batches from several pools (one resolution each), in a fixed cycle by `shares`, shuffled anew every epoch.

    Args:
      weights: see `emphasis`.
    """
    cycle = [pool for pool, share in enumerate(shares) for _ in range(share)]
    step = start
    while True:
        which = cycle[step % len(cycle)]
        count = len(pools[which]["images"])
        per_epoch = count // batch
        turn = (step // len(cycle)) * shares[which] + sum(p == which for p in cycle[: step % len(cycle)])
        epoch, place = divmod(turn, per_epoch)
        order = np.random.default_rng([seed, which, epoch]).permutation(count)
        images = rows(pools[which], order[place * batch : (place + 1) * batch])
        yield images | {"emphasis": emphasis(weights, step)}
        step += 1
