"""Losses and gradients on 1, 2, 4 and 8 fake devices, as one JSON object: see test_devices.py.

Run with XLA_FLAGS=--xla_force_host_platform_device_count=8.
"""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import numpy as np
import tiny

from mllm_jax.models import attention, lora, mllm, paths, quantize
from mllm_jax.parallel.mesh import make_mesh, row_sharding, use_mesh
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.training.loss import weighted_loss
from mllm_jax.training.params import place
from mllm_jax.training.step import loss_and_grads, to_device

LENGTH, LABELS = 24, 14
KINDS = [
    tiny.Row(images=1, text=18, labels=14),
    tiny.Row(images=0, text=24, labels=1),  # text only
    tiny.Row(images=2, text=16, labels=6),  # several images
    tiny.Row(images=0, text=3, labels=0),  # nothing supervised
    tiny.Row(images=1, text=2, labels=1),
    tiny.Row(images=0, text=0, labels=0),  # an empty row
    tiny.Row(images=0, text=9, labels=9),
]
ROWS = [KINDS[i % len(KINDS)] for i in range(16)]
TRAINABLE = ("connector/.*", "llm/.*")
AXES = ("data", "fsdp", "tensor", "sequence")
# Sizes of AXES, accumulation and attention; the first is what all others are compared with.
CASES = [
    ((1, 1, 1, 1), 1, "xla"),
    ((1, 1, 1, 1), 4, "xla"),
    ((2, 1, 1, 1), 1, "xla"),
    ((1, 1, 2, 1), 4, "xla"),
    ((4, 1, 1, 1), 4, "xla"),
    ((1, 2, 2, 1), 1, "blockwise"),
    ((8, 1, 1, 1), 1, "xla"),
    ((2, 2, 2, 1), 4, "xla"),
    ((2, 2, 2, 1), 1, "splash"),
    ((1, 2, 2, 2), 4, "splash"),
]
# Packed rows, H and K heads: split over the mesh by rows and heads, by queries alone, and not at all.
ATTENTION = {"8/4": (8, 4), "8/1": (8, 1), "3/3": (3, 3)}
# Adapters with dropout on an int8 LLM: what is dropped must not depend on the devices.
LORA = lora.LoRA(rank=4, alpha=8, dropout=0.5, targets=r"(llm|vision)/blocks/(q|out|down)/kernel")
LORA_MESHES = ((1, 1, 1, 1), (2, 2, 2, 1), (1, 2, 2, 2))


def grads_on(model, trained, frozen, batch, shape, accumulation, split):
    """Host loss, weight sum and flat gradients; asserts that `split`, a trained [L, 32, 32], is really split."""
    mesh = make_mesh(dict(zip(AXES, shape, strict=True)), jax.devices()[: int(np.prod(shape))])
    with use_mesh(mesh):
        shardings = [param_shardings(part, mesh, model) for part in (trained, frozen)]
        step = jax.jit(
            lambda p, f, b: loss_and_grads(model, p, f, b, LABELS, accumulation, jax.random.key(0)),
            in_shardings=(*shardings, row_sharding(mesh)),
            out_shardings=(None, shardings[0], None),
        )
        parts = [place(part, mesh, "float32", model) for part in (trained, frozen)]
        loss, grads, total = step(*parts, to_device(batch, mesh))
    grads = paths.flatten(grads)
    found, layers, rows, columns = grads[split].sharding.shard_shape(grads[split].shape), *grads[split].shape
    tensor = 1 if split.endswith("lora_a") else shape[2]
    assert found == (layers, rows // (shape[1] * shape[3]), columns // tensor)
    return float(loss), float(total), {path: np.asarray(leaf) for path, leaf in grads.items()}


def lora_differences(model, params, batch):
    """How loss and gradients of adapters with dropout differ between the meshes, and the largest gradient."""
    rng = np.random.default_rng(1)
    frozen, adapters = lora.split(jax.device_get(lora.add(params, LORA, jax.random.key(0))))
    adapters = jax.tree.map(lambda leaf: 0.2 * rng.standard_normal(leaf.shape).astype(np.float32), adapters)
    frozen = quantize.quantize(frozen, r"llm/blocks/.*/kernel")
    model = dataclasses.replace(model, lora=LORA)
    (one, _, grads), *others = (
        grads_on(model, adapters, frozen, batch, mesh, 4, "llm/blocks/q/lora_a") for mesh in LORA_MESHES
    )
    plain = dataclasses.replace(model, lora=dataclasses.replace(LORA, dropout=0.0))
    run = jax.jit(lambda a, f, b: loss_and_grads(plain, a, f, b, LABELS, 1, jax.random.key(0))[0])
    without = float(run(adapters, frozen, batch))
    return {
        "loss_difference": max(abs(one - other) for other, _, _ in others),
        "gradient_difference": max(
            float(np.abs(grads[path] - each[path]).max()) for _, _, each in others for path in grads
        ),
        "largest": max(float(np.abs(grad).max()) for grad in grads.values()),
        "effect_of_dropout": abs(one - without),
    }


def gated_differences(batch):
    """How loss and gradients of a model with a trained DINOv2-giant differ between one device and split ones."""
    plain = tiny.model_config()
    gated = {"gated": True, "layer_scale": True, "pre_norm": False, "patch_bias": True}
    model = dataclasses.replace(plain, vision=dataclasses.replace(plain.vision, **gated))
    params = tiny.random_params(mllm.abstract_params(model))
    trained, frozen = paths.split(params, (*TRAINABLE, "vision/.*"))
    found = [
        grads_on(model, trained, frozen, batch, mesh, 1, "llm/blocks/q/kernel")
        for mesh in ((1, 1, 1, 1), (1, 1, 2, 1), (2, 2, 2, 1), (1, 2, 2, 2))
    ]
    (loss, _, grads), *others = found
    return {
        "loss_difference": max(abs(loss - other) for other, _, _ in others),
        "gradient_difference": max(
            float(np.abs(grads[path] - each[path]).max()) for _, _, each in others for path in grads
        ),
        "largest": float(np.abs(grads["vision/blocks/fc1/kernel"]).max()),
    }


def attention_differences():
    """How outputs and gradients of packed rows on two meshes differ from the oracle's on one device."""
    rng, found = np.random.default_rng(2), {}
    segments = (
        np.repeat([[1, 1, 2, 2, 2, 3, 0], [1, 2, 3, 4, 5, 6, 7]], 6, axis=1)
        .repeat(4, axis=0)
        .astype(np.int32)
    )

    def run(backend, *arrays):
        def both(q, k, v, cotangent, segments):
            mask = attention.AttentionMask(segments, segments, window=5)
            out, pull = jax.vjp(lambda *a: attention.attend(*a, mask, backend), q, k, v)
            return (out * (segments != 0)[..., None, None], *pull(cotangent))

        return jax.device_get(jax.jit(both)(*arrays, segments))

    meshes = {sizes: make_mesh(dict(zip(AXES, sizes, strict=True))) for sizes in ((2, 2, 2, 1), (2, 1, 2, 2))}
    for name, (heads, kv_heads) in ATTENTION.items():
        q, k, v, cotangent = (
            rng.standard_normal((*segments.shape, count, 8)).astype(np.float32)
            for count in (heads, kv_heads, kv_heads, heads)
        )
        cotangent *= (segments != 0)[..., None, None]
        expected = run("xla", q, k, v, cotangent)
        for (sizes, mesh), backend in itertools.product(meshes.items(), ("blockwise", "splash")):
            with use_mesh(mesh):
                arrays = [jax.device_put(x, row_sharding(mesh)) for x in (q, k, v, cotangent)]
                there = run(backend, *arrays)
            differences = [float(np.abs(a - b).max()) for a, b in zip(there, expected, strict=True)]
            found[f"{backend} {name} {sizes}"] = max(differences)
    return found


def sharding_constraints(model, params, batch, current):
    """Constraints in the lowered forward pass of the loss on a (2, 2, 2) mesh, made current by `current`."""
    mesh = make_mesh({"data": 2, "fsdp": 2, "tensor": 2})
    with current(mesh):
        lowered = jax.jit(
            lambda p, b: weighted_loss(model, p, b, LABELS)[0],
            in_shardings=(param_shardings(params, mesh, model), row_sharding(mesh)),
        ).lower(params, batch)
    return lowered.as_text().count("sharding_constraint")


def main():
    assert len(jax.devices()) == 8
    attention.BACKENDS["splash"] = tiny.interpreted_splash()
    model = tiny.model_config()
    params = tiny.random_params(mllm.abstract_params(model))
    batch = tiny.make_batch(model, ROWS, LENGTH)
    trained, frozen = paths.split(params, TRAINABLE)
    results = []
    reference = None
    for shape, accumulation, backend in CASES:
        loss, total, grads = grads_on(
            dataclasses.replace(model, attention=backend),
            *(trained, frozen, batch, shape, accumulation, "llm/blocks/q/kernel"),
        )
        reference = reference or (loss, grads)
        differences = {path: float(np.abs(grads[path] - reference[1][path]).max()) for path in grads}
        worst = max(differences, key=differences.get)
        results.append(
            {
                "mesh": shape,
                "accumulation": accumulation,
                "attention": backend,
                "loss": loss,
                "total": total,
                "loss_difference": abs(loss - reference[0]),
                "gradient_difference": differences[worst],
                "worst": worst,
                "largest": max(float(np.abs(grad).max()) for grad in grads.values()),
                "silent": [path for path, grad in grads.items() if not grad.any()],
            }
        )
    print(
        json.dumps(
            {
                "results": results,
                "attention": attention_differences(),
                "lora": lora_differences(model, params, jax.tree.map(jax.numpy.asarray, batch)),
                "gated": gated_differences(batch),
                "constraints": sharding_constraints(model, params, batch, use_mesh),
                "constraints_without_rules": sharding_constraints(
                    model, params, batch, lambda mesh: contextlib.ExitStack()
                ),
            }
        )
    )


main()
