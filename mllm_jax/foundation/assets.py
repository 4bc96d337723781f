"""Writes a foundation run's newest parameters as Hugging Face directories, half precision."""

import pathlib
import shutil

import jax
import numpy as np
import orbax.checkpoint as ocp
from ml_collections import ConfigDict

from mllm_jax.foundation.train import llm_geometry, prepare_tokenizer, vision_geometry
from mllm_jax.interop import save_llm, save_vision


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


def export(config: ConfigDict, workdir: pathlib.Path, out: pathlib.Path) -> dict[str, int]:
    """Writes `out/mini_vit` and `out/mini_llm` (float16) and returns the steps they come from."""
    tokenizer = prepare_tokenizer(config.tokenizer, workdir)
    tower_step, tower = newest_params(workdir / "tower")
    llm_step, llm = newest_params(workdir / "llm")
    for name in ("mini_vit", "mini_llm"):
        shutil.rmtree(out / name, ignore_errors=True)
    save_vision(out / "mini_vit", vision_geometry(config.tower), tower["tower"], np.float16)
    save_llm(out / "mini_llm", llm_geometry(config.llm, len(tokenizer)), llm, tokenizer, np.float16)
    return {"tower": tower_step, "llm": llm_step}
