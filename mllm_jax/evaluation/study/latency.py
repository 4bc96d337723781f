"""How long an answer and a training step take with each cell's model, measured on this machine.

{"format": 1, "kind": "latency", "recipe": ..., "device": ...,
 "cells": {VARIANT: {"prefill_seconds", "token_seconds", "step_seconds/STAGE"}}}

The times that a run logs depend on what else its machine did; these are measured one cell after another.
"""

import itertools
import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from PIL import Image

from mllm_jax.inference.model import Model
from mllm_jax.inference.session import Session
from mllm_jax.parallel.mesh import make_mesh, num_row_shards, use_mesh
from mllm_jax.parallel.row_parts import row_part
from mllm_jax.storage import Path
from mllm_jax.training.features import feature_cache
from mllm_jax.training.sources import packing_plan, prepare_sources, stage_iterator
from mllm_jax.training.stage import StagePlan
from mllm_jax.training.step import to_device
from mllm_jax.workdir import saved_config

REPEATS = 15
STEPS = 24  # of each stage; the first compiles
STEP = "step_seconds/"  # and the stage's name
QUESTION = "what is there in the image, and where is it? answer with a single word or a short phrase."
MEASURES = {  # what is measured -> how it is called
    "prefill_seconds": "seconds from an image to its first token",
    "token_seconds": "seconds for each further token",
}


def latency(model: Model) -> dict[str, float]:
    """Medians of one question about one image, compilation left out.

    Returns:
      `prefill_seconds`: from the decoded image to the first token, the vision encoder included; `token_seconds`: each
      further token.
    """
    image = Image.new("RGB", (model.config.image_size,) * 2, (128, 128, 128))
    session = Session(model.config, model.params, stop_ids=model.stops[0])

    def prefill() -> Any:
        state = session.prefill(model.prompt_batch(image, QUESTION), max_new_tokens=2 * REPEATS)
        return jax.block_until_ready(state)

    state = prefill()  # compiles
    prefill_seconds = _median(prefill)

    def step() -> None:
        nonlocal state
        state = jax.block_until_ready(session.step(state))

    step()
    return {"prefill_seconds": prefill_seconds, "token_seconds": _median(step)}


def step_times(directory: Path, model: Model) -> dict[str, float]:
    """Medians of a training step of each stage, on the run's data, whose preparation and loading are left out.

    Args:
      directory: of the run.
      model: its model.

    Returns:
      "step_seconds/STAGE" -> seconds.
    """
    config, found = saved_config(directory), {}
    mesh = make_mesh(config.mesh.to_dict())
    for name in config.stage_order:
        stage = config.stages[name]
        sources = prepare_sources(config, name, model.config, model.tokenizer, directory)
        packing = packing_plan(config, stage, model.config, model.tokenizer, sources, directory)
        cache = feature_cache(config, stage, model.config, model.params, sources, directory)
        multiple = num_row_shards(mesh) * stage.accumulation
        with (
            use_mesh(mesh),
            stage_iterator(
                config,
                stage,
                model.config,
                model.tokenizer,
                sources,
                packing,
                cache,
                multiple,
                row_part(mesh),
            ) as batches,
        ):
            plan = StagePlan(config, name, mesh, STEPS, batches.rows, batches.label_tokens)
            state, frozen = plan.create_state(model.params), plan.place_frozen(model.params)
            times = []
            for batch in itertools.islice(batches, STEPS):
                arrays = jax.block_until_ready(to_device(batch.arrays, mesh))
                begin = time.perf_counter()
                state, _ = jax.block_until_ready(plan.step(state, frozen, arrays))
                times.append(time.perf_counter() - begin)
        found[STEP + name] = statistics.median(times[1:])
    return found


def _median(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
