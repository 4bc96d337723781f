"""Collectives that two blocks of an LLM or a tower compile to under model parallelism, as one JSON object.

Run with XLA_FLAGS=--xla_force_host_platform_device_count=8: see test_collectives.py.
"""

import dataclasses
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).parents[1]))

import jax
import jax.numpy as jnp
import tiny
from jax.sharding import PartitionSpec as P

from mllm_jax.models import mllm
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.vit import VisionConfig
from mllm_jax.parallel.mesh import make_mesh, replicated, row_sharding, use_mesh
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.training import loss

KINDS = ("all-to-all", "collective-permute", "all-gather", "all-reduce", "reduce-scatter")
HEADS = {"32/32": (32, 32), "28/4": (28, 4), "8/2": (8, 2)}
TENSOR = (2, 4, 8)
SEQUENCE = (2, 4)


def decode(model, embeddings, positions, segments):
    return model.llm(embeddings, positions, segments)[0]


def encode(model, images):
    return model.vision(images).hidden[2]


def count(model, part, method, arguments, devices, axis="tensor", backward=True):
    """Forward and backward of one part of the model on devices of an axis; `tensor` splits its parameters."""
    mesh = make_mesh({axis: devices}, jax.devices()[:devices])
    params = {part: mllm.abstract_params(model)[part]}

    def summed(params, *arguments):
        return mllm.apply(model, params, *arguments, method=method).astype(jnp.float32).sum()

    shardings = param_shardings(params, mesh, model)
    if axis != "tensor":
        shardings = jax.tree.map(lambda _: replicated(mesh), shardings)
    with use_mesh(mesh):
        step = jax.jit(
            jax.value_and_grad(summed) if backward else summed,
            in_shardings=(shardings, *(row_sharding(mesh) for _ in arguments)),
            out_shardings=(None, shardings) if backward else None,
        )
        text = step.lower(params, *arguments).compile().as_text()
    return {kind: len(re.findall(rf" {kind}(?:-start)?\(", text)) for kind in KINDS}


def head_sums():
    """Shapes of what the devices add up of the gradient of a head [16, 8]."""
    with use_mesh(make_mesh({"data": 2, "fsdp": 2, "tensor": 2})):
        add = jax.jit(lambda x: loss._added_up(x, P("fsdp", "tensor")))
        text = add.lower(jax.ShapeDtypeStruct((4, 1, 16, 8), jnp.float32)).compile().as_text()
    return {kind: re.findall(rf" = (\w+\[[\d,]+\]).* {kind}(?:-start)?\(", text) for kind in KINDS}


def main():
    base = dataclasses.replace(tiny.model_config(), connector="mlp2x_gelu", connector_options=())
    ints = jax.ShapeDtypeStruct((2, 16), jnp.int32)
    found = {}
    for name, (heads, kv_heads) in HEADS.items():
        llm = DecoderConfig(64, 64, 2, heads, kv_heads, head_width=16, mlp_width=128, qkv_bias=True)
        vision = VisionConfig(16 * heads, 2, heads, mlp_width=128, patch=7, image_size=28)
        model = dataclasses.replace(base, llm=llm, vision=vision)
        embeddings = jax.ShapeDtypeStruct((2, 16, 64), jnp.float32)
        images = jax.ShapeDtypeStruct((2, 28, 28, 3), jnp.uint8)
        for tensor in TENSOR:
            found[f"llm {name} tensor={tensor}"] = count(
                model, "llm", decode, (embeddings, ints, ints), tensor
            )
            if (
                heads > 8
            ):  # the tower by itself; within the model it gets its slots from `slots.for_each_slot`
                found[f"vision {heads} tensor={tensor}"] = count(model, "vision", encode, (images,), tensor)
        for devices in SEQUENCE:
            found[f"llm {name} sequence={devices}"] = count(
                model, "llm", decode, (embeddings, ints, ints), devices, "sequence"
            )
    gated = VisionConfig(64, 2, 8, 128, 7, 28, pre_norm=False, patch_bias=True, layer_scale=True, gated=True)
    model = dataclasses.replace(base, vision=gated)
    for tensor in TENSOR:
        found[f"gated forward tensor={tensor}"] = count(
            model, "vision", encode, (images,), tensor, backward=False
        )
        found[f"gated tensor={tensor}"] = count(model, "vision", encode, (images,), tensor)
    found["head"] = head_sums()
    print(json.dumps(found))


main()
