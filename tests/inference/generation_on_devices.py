"""Answers on 1 to 4 fake devices in several mesh shapes, as one JSON object: see test_generation_devices.py.

Run with XLA_FLAGS=--xla_force_host_platform_device_count=4.
"""

import dataclasses
import json
import math

import jax
import test_generation as shared

from mllm_jax.models import mllm
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.vit import VisionConfig
from mllm_jax.parallel.mesh import ANSWERING_RULES, AXES, make_mesh, use_mesh
from mllm_jax.parallel.sharding import param_shardings

CASES = (
    ("float32", None),
    ("float32", (1, 2, 1, 2)),
    ("float32", (1, 1, 2, 2)),
    ("bfloat16", None),
    ("bfloat16", (4, 1, 1, 1)),
)


def answer(config, params, requests):
    """Tokens for `requests` and, in float32, for one alone and a likelihood."""
    found = shared.run(config, params, requests, batch_size=6, buckets=(16,))
    likelihood = None
    if config.dtype == "float32":
        alone = [shared.Request("one", shared.prompt([1], 1, [5, 6]), (2,))]
        found += shared.run(config, params, alone, batch_size=6, buckets=(16,))
        option = [[shared.Request("l", shared.prompt([1], 1, [4], [7, 8]), (1,))]]
        settings = {"load_image": shared.load, "batch_size": 6, "buckets": (16,)}
        likelihood = next(shared.option_log_likelihoods(config, params, option, **settings))[0]
    return {"tokens": [list(one.tokens) for one in found], "likelihood": likelihood}


def main():
    config = mllm.ModelConfig(
        vision=VisionConfig(16, 2, 2, 32, 4, 8, class_token=False),
        llm=DecoderConfig(shared.VOCAB, 16, 2, 2, 2, 8, 24, max_positions=64),
        image_size=8,
        remat="none",
        vision_remat="none",
    )
    params = shared.make_params(config)
    requests = shared.make_requests(13)
    results = []
    for dtype, shape in CASES:
        here = dataclasses.replace(config, dtype=dtype)
        if shape is None:
            found = answer(here, params, requests)
        else:
            mesh = make_mesh(dict(zip(AXES, shape, strict=True)), jax.devices()[: math.prod(shape)])
            with use_mesh(mesh, ANSWERING_RULES):
                placed = jax.tree.map(jax.device_put, params, param_shardings(params, mesh, config))
                found = answer(here, placed, requests)
        results.append({"dtype": dtype, "mesh": shape} | found)
    print(json.dumps({"devices": jax.device_count(), "results": results}))


if __name__ == "__main__":
    main()
