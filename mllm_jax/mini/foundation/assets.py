"""Writes a foundation run's newest parameters as Hugging Face directories, half precision."""

import dataclasses
import pathlib
import shutil
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict
from PIL import Image

from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.interop import save_llm, save_vision
from mllm_jax.mini.foundation.llm import llm_geometry
from mllm_jax.mini.foundation.train import prepare_tokenizer, vision_geometry
from mllm_jax.mini.world import render_array, sample_scene
from mllm_jax.models.paths import path_of
from mllm_jax.models.vit import VisionConfig, VisionTransformer


def newest_params(directory: pathlib.Path):
    """(step, parameters) of the newest checkpoint of a part.

    Raises:
      FileNotFoundError: the part has not been trained.
    """
    with ocp.CheckpointManager((directory / "checkpoints").absolute()) as manager:
        step = manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"no checkpoint in {directory}; run `mllm-jax foundation` first")
        state = manager.restore(step, args=ocp.args.StandardRestore())
    return step, jax.tree.map(np.asarray, state["params"])


def scale_residual_stream(vision: VisionConfig, tower: Any, factor: float) -> tuple[VisionConfig, Any]:
    """The same tower with every hidden state multiplied by `factor`.

    All that reads the residual stream is a LayerNorm, which takes the factor out again if its epsilon (of a variance)
    is scaled too, so it is enough to scale what writes to it. Muon leaves a stream of RMS 30; a connector that starts
    with the usual initial weights would give the LLM visual tokens a hundred times as long as its words.
    """
    writes = ("patch_embed/", "pos_embed", "blocks/out/", "blocks/fc2/")
    scaled = jax.tree_util.tree_map_with_path(
        lambda path, leaf: leaf * factor if path_of(path).startswith(writes) else leaf, tower
    )
    return dataclasses.replace(vision, eps=vision.eps * factor**2), scaled


def residual_rms(vision: VisionConfig, tower: Any, pictures: np.ndarray) -> float:
    """Root mean square of the penultimate hidden state, which connectors read, on uint8[N, S, S, 3] images."""
    layer = vision.depth - 1
    module = VisionTransformer(
        vision, FeatureRequest((layer, vision.depth))
    )  # all blocks, as `tower` has them
    params = jax.tree.map(jnp.asarray, tower)
    states = module.apply({"params": params}, jnp.asarray(pictures)).hidden[layer]
    return float(jnp.sqrt(jnp.mean(jnp.square(states))))


def export(config: ConfigDict, workdir: pathlib.Path, out: pathlib.Path) -> dict[str, int]:
    """Writes `out/mini_vit` and `out/mini_llm` (float16) and returns the steps they come from.

    The tower's residual stream is scaled so that its penultimate hidden state has an RMS of 1.
    """
    tokenizer = prepare_tokenizer(config.tokenizer, workdir)
    tower_step, tower = newest_params(workdir / "tower")
    llm_step, llm = newest_params(workdir / "llm")
    for name in ("mini_vit", "mini_llm"):
        shutil.rmtree(out / name, ignore_errors=True)
    vision = vision_geometry(config.tower)
    pictures = [render_array(sample_scene(config.tower.seed, index, "foundation")) for index in range(64)]
    pictures = [np.asarray(Image.fromarray(p).resize((vision.image_size,) * 2)) for p in pictures]
    rms = residual_rms(vision, tower["tower"], np.stack(pictures))
    vision, scaled = scale_residual_stream(vision, tower["tower"], 1 / rms)
    save_vision(out / "mini_vit", vision, jax.tree.map(np.asarray, scaled), np.float16)
    save_llm(out / "mini_llm", llm_geometry(config.llm, len(tokenizer)), llm, tokenizer, np.float16)
    return {"tower": tower_step, "llm": llm_step}
