"""How long an answer takes with each cell's model, measured on this machine.

{"format": 1, "kind": "latency", "recipe": ..., "device": ..., "cells": {VARIANT: {"prefill_seconds", "token_seconds"}}}
"""

import statistics
import time
from collections.abc import Callable
from typing import Any

import jax
from PIL import Image

from mllm_jax.inference.model import Model
from mllm_jax.inference.session import Session

REPEATS = 15
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


def _median(function: Callable[[], Any]) -> float:
    times = []
    for _ in range(REPEATS):
        begin = time.perf_counter()
        function()
        times.append(time.perf_counter() - begin)
    return statistics.median(times)
