"""How long an answer and a training step take with each cell's model, measured on this machine.

{"format": 1, "kind": "latency", "recipe": ..., "device": ...,
 "cells": {VARIANT: {"prefill_seconds", "token_seconds", "step_seconds/STAGE"}}}

The times that a run logs depend on what else its machine did; these are measured one cell after another.
"""

import itertools
import statistics
import time
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from PIL import Image

from mllm_jax.evaluation.study.times import STEP
from mllm_jax.inference.model import Model
from mllm_jax.inference.session import Session
from mllm_jax.parallel.mesh import make_mesh, use_mesh
from mllm_jax.storage import Path
from mllm_jax.training import adapters
from mllm_jax.training.opening import open_stage
from mllm_jax.training.sources import packing_plan, prepare_sources
from mllm_jax.training.step import to_device
from mllm_jax.workdir import saved_config

REPEATS = 15  # at least
SECONDS = 3.0  # at least: a short disturbance does not move a median over that time
TOKENS = 8  # after each prefill
BATCHES = 24  # of each stage, in turn
QUESTION = "what is there in the image, and where is it? answer with a single word or a short phrase."


def device_name() -> str:
    """What is measured on, as "2 x cpu"."""
    return f"{jax.device_count()} x {jax.devices()[0].device_kind}"


def latency(model: Model) -> dict[str, float]:
    """Medians of one question about one image, compilation left out.

    Returns:
      `prefill_seconds`: from the decoded image to the first token, the vision encoder included; `token_seconds`: each
      further token.
    """
    image = Image.new("RGB", (model.config.image_size,) * 2, (128, 128, 128))
    session = Session(model.config, model.params, stop_ids=model.stops[0])
    prefills, tokens = [], []
    for _ in _repeats():
        begin = time.perf_counter()
        state = session.prefill(model.prompt_batch(image, QUESTION), max_new_tokens=1 + TOKENS)
        jax.block_until_ready(state)
        prefills.append(time.perf_counter() - begin)
        for _ in range(TOKENS):
            begin = time.perf_counter()
            state = jax.block_until_ready(session.step(state))
            tokens.append(time.perf_counter() - begin)
    return {
        "prefill_seconds": statistics.median(prefills[1:]),
        "token_seconds": statistics.median(tokens[TOKENS:]),
    }


def step_times(directory: Path, model: Model) -> dict[str, float]:
    """Medians of a training step of each stage, on batches of the run's data that are loaded before.

    Data and features that the run's data folder no longer has are made again.

    Args:
      directory: of the run.
      model: its model.

    Returns:
      "step_seconds/STAGE" -> seconds.

    Raises:
      ConfigError, DataError, ImageError: the run's mesh does not fit this machine, or its data are gone.
    """
    config, found = saved_config(directory), {}
    mesh, tokenizer = make_mesh(config.mesh.to_dict()), model.tokenizer
    for name in config.stage_order:
        stage = config.stages[name]
        params = adapters.add(model.params, stage, jax.random.key(0), config.model.param_dtype)
        sources = prepare_sources(config, name, model.config, tokenizer, directory)
        packing = packing_plan(config, stage, model.config, tokenizer, sources, directory)
        with use_mesh(mesh):
            plan, batches = open_stage(
                config, name, model.config, tokenizer, params, sources, packing, directory, mesh
            )
            with batches:
                loaded = [to_device(batch.arrays, mesh) for batch in itertools.islice(batches, BATCHES)]
            state, frozen, times = plan.create_state(params), plan.place_frozen(params), []
            for arrays in _repeats(loaded):
                begin = time.perf_counter()
                state, _ = jax.block_until_ready(plan.step(state, frozen, arrays))
                times.append(time.perf_counter() - begin)
        found[STEP + name] = statistics.median(times[1:])
    return found


def _repeats(values: Sequence[Any] = (None,)) -> Iterator[Any]:
    """The values in turn, over and over: once for what has to be compiled, then often and long enough to time it."""
    turns = itertools.cycle(values)
    yield next(turns)
    begin = time.perf_counter()
    for done in itertools.count():
        if done >= REPEATS and time.perf_counter() - begin >= SECONDS:
            return
        yield next(turns)
