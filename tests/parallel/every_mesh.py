"""Losses and gradients on meshes of 8 fake devices, as JSON lines: see test_every_mesh.py.

Arguments: meshes, each as its sizes of `mesh.AXES` joined by x; 1x1x1x1 is what the others are compared with.
"""

import dataclasses
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import tiny

from mllm_jax.models import mllm, paths
from mllm_jax.parallel.mesh import AXES, batch_shardings, make_mesh, use_mesh
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.training.params import place
from mllm_jax.training.step import loss_and_grads, to_device

ROWS, LENGTH, LABELS = 8, 32, 20
HALVES = [tiny.Row(1, 12, 9), tiny.Row(0, 16, 3), tiny.Row(1, 5, 5), tiny.Row(0, 0, 0), tiny.Row(1, 9, 1)]
WHOLES = [tiny.Row(2, 20, 20), tiny.Row(0, 32, 11), tiny.Row(1, 3, 0), tiny.Row(1, 28, 17), tiny.Row(0, 0, 0)]


def model_config():
    plain = tiny.model_config()
    llm = dataclasses.replace(plain.llm, heads=8, kv_heads=2, width=64)
    return dataclasses.replace(plain, llm=llm, remat="full", vision_remat="full")


def cycled(kinds, count):
    return [kinds[i % len(kinds)] for i in range(count)]


def packed(model):
    """Rows of two samples each, which meet in the middle."""
    half = tiny.make_batch(model, cycled(HALVES, 2 * ROWS), LENGTH // 2, slots=1)
    first, second = (half.map(lambda leaf, _, start=start: leaf[start::2]) for start in (0, 1))
    tokens = model.visual_layout.slot.num_tokens
    second = second.replace(
        segment_ids=second.segment_ids * 2,
        visual_index=np.where(second.visual_index < 0, -1, second.visual_index + tokens),
    )
    return jax.tree.map(lambda *leaves: np.concatenate(leaves, axis=1), first, second)


def run(model, params, batches, sizes, attention):
    """Host losses and flat gradients of every batch."""
    model = dataclasses.replace(model, attention=attention)
    mesh = make_mesh(dict(zip(AXES, sizes, strict=True)), jax.devices()[: int(np.prod(sizes))])
    shardings = param_shardings(params, mesh, model)
    found = []
    with use_mesh(mesh):
        step = jax.jit(
            lambda p, b: loss_and_grads(model, p, {}, b, LABELS, 1, jax.random.key(0))[:2],
            in_shardings=(shardings, batch_shardings(batches[0], mesh)),
            out_shardings=(None, shardings),
        )
        placed = place(params, mesh, "float32", model)
        for batch in batches:
            loss, grads = step(placed, to_device(batch, mesh))
            grads = paths.flatten(jax.device_get(grads))
            found.append((float(loss), grads))
    return found


def differences(found, wanted):
    """The largest differences of losses and of gradients."""
    losses = [abs(one[0] - other[0]) for one, other in zip(found, wanted, strict=True)]
    grads = [
        float(np.abs(one[1][path] - other[1][path]).max())
        for one, other in zip(found, wanted, strict=True)
        for path in one[1]
    ]
    return {"loss_difference": max(losses), "gradient_difference": max(grads)}


def main():
    model = model_config()
    params = tiny.random_params(mllm.abstract_params(model))
    batches = [tiny.make_batch(model, cycled(WHOLES, ROWS), LENGTH), packed(model)]
    # 8 devices that share 4 rows of one slot have more devices than images.
    few = [tiny.make_batch(model, cycled(HALVES, 4), LENGTH, slots=1)]
    wanted = {len(each): run(model, params, each, (1, 1, 1, 1), "xla") for each in (batches, few)}
    largest = max(float(np.abs(grad).max()) for grad in wanted[2][0][1].values())
    silent = [path for path, grad in wanted[2][0][1].items() if not grad.any()]
    for name in sys.argv[1:]:
        sizes = [int(size) for size in name.split("x")]
        attention = "blockwise" if sizes[0] == 1 else "xla"
        found, expected = run(model, params, batches, sizes, attention), wanted[2]
        if sizes[2] == 8:
            found, expected = found + run(model, params, few, sizes, attention), expected + wanted[1]
        result = {"mesh": name, "batches": len(found), "loss": [loss for loss, _ in expected]}
        result |= differences(found, expected) | {"largest": largest, "silent": silent}
        print(json.dumps(result), flush=True)


main()
