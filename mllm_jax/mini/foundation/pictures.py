"""Rendered training images of the tower with their targets, kept on disk as plain arrays."""

import functools
import json
import multiprocessing
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image

from mllm_jax import files
from mllm_jax.mini.world import (
    GLOBAL_CLASSES,
    PATCH_CLASSES,
    global_targets,
    long_caption,
    patch_targets,
    render_array,
    sample_scene,
)


def _example(index: int, seed: int, size: int, patch: int) -> tuple[np.ndarray, dict, dict, str]:
    scene = sample_scene(seed, index, "foundation")
    picture = Image.fromarray(render_array(scene))
    if picture.width != size:
        picture = picture.resize((size, size), Image.Resampling.BICUBIC)
    return (
        np.asarray(picture),
        patch_targets(scene, size // patch),
        global_targets(scene),
        long_caption(scene),
    )


def render_pool(
    directory: pathlib.Path,
    tokenizer: Any,
    *,
    first: int,
    count: int,
    size: int,
    patch: int,
    length: int,
    seed: int,
) -> dict[str, Any]:
    """Renders images `first` .. `first + count` at `size` px, or opens them if they were rendered before.

    Returns:
      images uint8[N, size, size, 3] (memory-mapped), patch {key: uint8[N, P]}, image {key: uint8[N]},
      caption uint16[N, length] (BOS, words, EOS, then 0).

    Raises:
      ValueError: the directory holds images made with other parameters, or a caption is longer than `length`.
    """
    grid = (size // patch) ** 2
    want = {"first": first, "count": count, "size": size, "patch": patch, "length": length, "seed": seed}
    want["labels"] = [*PATCH_CLASSES, *GLOBAL_CLASSES]
    manifest = directory / "manifest.json"
    names = {"caption": ((count, length), np.uint16), "images": ((count, size, size, 3), np.uint8)}
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
        make = functools.partial(_example, seed=seed, size=size, patch=patch)
        with multiprocessing.get_context("spawn").Pool(min(os.cpu_count() or 1, 16)) as pool:
            examples = pool.imap(make, range(first, first + count), chunksize=64)
            for row, (picture, patches, whole, caption) in enumerate(examples):
                ids = [tokenizer.bos_token_id, *tokenizer(caption).input_ids, tokenizer.eos_token_id]
                if len(ids) > length:
                    raise ValueError(
                        f"caption of picture {first + row} has {len(ids)} tokens, more than {length}"
                    )
                arrays["images"][row] = picture
                arrays["caption"][row, : len(ids)] = ids
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
        "caption": opened["caption"],
        "patch": {key: opened[f"patch_{key}"] for key in PATCH_CLASSES},
        "image": {key: opened[f"image_{key}"] for key in GLOBAL_CLASSES},
    }


def rows(pool: dict[str, Any], index: np.ndarray) -> dict[str, Any]:
    """The images `index` of a pool as a batch (integer targets as int32)."""
    index = np.sort(index)
    return {
        "images": pool["images"][index],
        "caption": pool["caption"][index].astype(np.int32),
        "patch": {key: value[index].astype(np.int32) for key, value in pool["patch"].items()},
        "image": {key: value[index].astype(np.int32) for key, value in pool["image"].items()},
    }


def pool_batches(
    pools: list[dict[str, Any]], shares: list[int], batch: int, seed: int, start: int
) -> Iterator[dict]:
    """Batches from several pools (one resolution each), in a fixed cycle by `shares`, shuffled anew every epoch."""
    cycle = [pool for pool, share in enumerate(shares) for _ in range(share)]
    step = start
    while True:
        which = cycle[step % len(cycle)]
        count = len(pools[which]["caption"])
        per_epoch = count // batch
        turn = (step // len(cycle)) * shares[which] + sum(p == which for p in cycle[: step % len(cycle)])
        epoch, place = divmod(turn, per_epoch)
        order = np.random.default_rng([seed, which, epoch]).permutation(count)
        yield rows(pools[which], order[place * batch : (place + 1) * batch])
        step += 1
