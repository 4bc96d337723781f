"""Sharding rules: every parameter of every model matches exactly one, and large matrices are really split."""

import dataclasses

import jax
import pytest
import tiny
from jax.sharding import AbstractMesh, PartitionSpec

from mllm_jax.config import stage_config
from mllm_jax.models import lora, mllm, quantize
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.encoders import EncodersConfig
from mllm_jax.models.paths import flatten, split
from mllm_jax.models.vit import VisionConfig
from mllm_jax.parallel import sharding
from mllm_jax.parallel.sharding import param_shardings, spec_of
from mllm_jax.training.optimizer import make_optimizer
from mllm_jax.training.step import init_state, state_shardings

LLAMA = DecoderConfig(
    vocab=64, width=16, depth=2, heads=4, kv_heads=2, head_width=4, mlp_width=32, max_positions=64
)
DECODERS = {
    "llama": LLAMA,
    "tied": dataclasses.replace(LLAMA, tied=True),
    "qwen2": dataclasses.replace(LLAMA, qkv_bias=True),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True),
    "all biases": dataclasses.replace(LLAMA, qkv_bias=True, out_bias=True, mlp_bias=True, head_bias=True),
    "phi2": dataclasses.replace(
        LLAMA,
        norm="layer",
        parallel=True,
        gated=False,
        qkv_bias=True,
        out_bias=True,
        mlp_bias=True,
        head_bias=True,
    ),
    "gemma2": dataclasses.replace(LLAMA, norm="rms_offset", post_norms=True, tied=True, windows=(4, 0)),
}
CLIP = VisionConfig(width=16, depth=2, heads=2, mlp_width=32, patch=7, image_size=28)
TOWERS = {
    "clip": CLIP,
    "siglip": dataclasses.replace(CLIP, class_token=False, pre_norm=False, patch_bias=True),
    "dinov2": dataclasses.replace(CLIP, pre_norm=False, patch_bias=True, layer_scale=True, registers=2),
    "dinov2-giant": dataclasses.replace(CLIP, pre_norm=False, patch_bias=True, layer_scale=True, gated=True),
}
MODELS = {name: {"llm": decoder} for name, decoder in DECODERS.items()}
MODELS |= {name: {"vision": tower} for name, tower in TOWERS.items()}


BASE = dataclasses.replace(tiny.model_config(), llm=LLAMA, vision=CLIP)


def abstract(change):
    return mllm.abstract_params(dataclasses.replace(BASE, **change))


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_matches_exactly_one_rule(name):
    for path, leaf in flatten(abstract(MODELS[name])).items():
        assert len(spec_of(path)) <= len(leaf.shape), path


@pytest.mark.parametrize("name", ["llama", "phi2"])
def test_adapters_and_int8_scales_have_rules_too(name):
    both = lora.LoRA(rank=4, targets=r"(llm|vision)/blocks/\w+/kernel")

    def changed(params):
        params = lora.add(params, both, jax.random.key(0))
        return quantize.quantize(params, r"(llm|vision)/blocks/\w+/kernel")

    shapes = flatten(jax.eval_shape(changed, abstract(MODELS[name])))
    kinds = {path.rsplit("/", 1)[-1] for path in shapes}
    assert {"lora_a", "lora_b", "kernel_scale"} <= kinds
    for path, leaf in shapes.items():
        assert len(spec_of(path)) <= len(leaf.shape), path
    # What belongs to a matrix lies along with it: A with its rows, B and the scale with its columns.
    for path in (path for path in shapes if path.endswith("/kernel") and "blocks" in path):
        stem = path.removesuffix("kernel")
        _, rows, columns = spec_of(path)
        assert tuple(spec_of(stem + "lora_a"))[1:2] == (rows,)
        assert tuple(spec_of(stem + "lora_b"))[2:3] == (columns,)
        assert all("fsdp" in spec_of(stem + kind) for kind in ("lora_a", "lora_b"))


@pytest.mark.parametrize("name", ["llama", "clip"])
def test_matrices_are_split_over_both_model_axes(name):
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    shapes = abstract(MODELS[name])
    found = flatten(param_shardings(shapes, mesh, dataclasses.replace(BASE, **MODELS[name])))
    split = {path for path, leaf in found.items() if {"fsdp", "tensor"} <= set(leaf.spec)}
    kernels = {path for path in found if path.endswith("kernel") and "/blocks/" in path}
    assert kernels
    assert kernels | {"llm/embedding", "llm/head"} <= split
    for path, leaf in flatten(shapes).items():
        found[path].shard_shape(leaf.shape)  # raises where an axis does not divide


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_optimizer_arrays_lie_like_their_parameters(optimizer):
    mesh = AbstractMesh((2, 2, 2), ("data", "fsdp", "tensor"))
    stage = stage_config()
    stage.optimizer = optimizer
    trained, _ = split(abstract(MODELS["llama"]), ("connector/.*", "llm/.*"))
    made, _ = make_optimizer(stage, trained, 10)
    state = jax.eval_shape(lambda p: init_state(p, made), trained)
    params = flatten(param_shardings(trained, mesh, BASE))
    found = dict.fromkeys(params, 0)
    laid_out = jax.tree_util.tree_leaves_with_path(state_shardings(state, mesh, BASE).opt_state)
    for (key_path, where), leaf in zip(laid_out, jax.tree.leaves(state.opt_state), strict=True):
        name = jax.tree_util.keystr(key_path, simple=True, separator="/")
        owner = max((path for path in params if name.endswith(path)), key=len, default=None)
        if owner is None:  # counters and coefficients
            assert where.spec == PartitionSpec()
            assert leaf.size <= 3
        else:
            assert where == params[owner], name
            found[owner] += 1
    kernels = {
        path
        for path in params
        if path.endswith("kernel") and ("/blocks/" in path or path.startswith("connector/"))
    }
    for path, count in found.items():  # Muon keeps one moment of a matrix, Adam two of everything
        assert count == (1 if optimizer == "muon" and path in kernels else 2), path


def test_an_axis_that_does_not_divide_is_left_whole():
    mesh = AbstractMesh((1, 1, 4), ("data", "fsdp", "tensor"))
    shapes = {"llm": {"embedding": jax.ShapeDtypeStruct((63, 16), "float32")}}
    spec = param_shardings(shapes, mesh, BASE)["llm"]["embedding"].spec
    assert spec == PartitionSpec(None, "fsdp")


@pytest.mark.parametrize(
    ("heads", "tensor", "queries", "keys"),
    [
        ((32, 32), 8, True, True),
        ((28, 4), 4, True, True),
        ((28, 4), 8, False, False),
        ((8, 2), 4, True, False),
    ],
)
def test_attention_is_split_by_heads(heads, tensor, queries, keys):
    """Biases, adapters and int8 scales with their kernels; the MLP is split whatever the heads are."""
    llm = dataclasses.replace(LLAMA, heads=heads[0], kv_heads=heads[1], head_width=16, qkv_bias=True)
    model = dataclasses.replace(BASE, llm=llm, vision=dataclasses.replace(CLIP, width=448, heads=heads[0]))
    both = lora.LoRA(rank=8, targets=r"(llm|vision)/blocks/\w+/kernel")

    def changed(params):
        params = lora.add({part: params[part] for part in ("llm", "vision")}, both, jax.random.key(0))
        return quantize.quantize(params, r"(llm|vision)/blocks/\w+/kernel")

    mesh = AbstractMesh((1, 1, tensor), ("data", "fsdp", "tensor"))
    shapes = jax.eval_shape(changed, mllm.abstract_params(model))
    for path, found in flatten(param_shardings(shapes, mesh, model)).items():
        if "/blocks/" not in path or "norm" in path:
            continue
        part, _, matrix, leaf = path.split("/")
        follows = ("kernel", "bias", "kernel_scale", "lora_b")
        follows = ("kernel", "lora_a") if matrix in ("o", "out", "down", "fc2") else follows
        wanted = {"q": queries, "o": queries, "out": queries, "k": keys, "v": keys}.get(matrix, True)
        if part == "vision" and matrix in ("k", "v"):
            wanted = queries
        assert ("tensor" in set(found.spec)) == (wanted and leaf in follows), path


def test_encoders_halves_are_not_put_on_different_devices():
    """DINOv2-giant's fc1, alone and in fused towers: whole over `tensor`, where every other MLP is split."""
    giant = TOWERS["dinov2-giant"]
    both = lora.LoRA(rank=4, targets=r"vision/.*blocks/\w+/kernel")
    mesh = AbstractMesh((1, 2, 2), ("data", "fsdp", "tensor"))
    for vision in (giant, EncodersConfig((CLIP, giant))):
        model = dataclasses.replace(BASE, vision=vision, select_layer=-1)
        shapes = jax.eval_shape(
            lambda params: lora.add({"vision": params["vision"]}, both, jax.random.key(0)),
            mllm.abstract_params(model),
        )
        found = flatten(param_shardings(shapes, mesh, model))
        towers = {path: path.startswith("vision/tower_0/") for path in found if "/fc1/" in path}
        assert {path.rsplit("/", 1)[-1] for path in towers} == {"kernel", "bias", "lora_a", "lora_b"}
        for path, plain in towers.items():
            split = plain and not path.endswith("lora_a")
            assert ("tensor" in set(found[path].spec)) == split, path
            if path.endswith("kernel"):
                assert "fsdp" in set(found[path].spec)
        assert all("tensor" in set(found[path].spec) for path in found if path.endswith("fc2/kernel"))


def test_a_path_without_exactly_one_rule_is_an_error(monkeypatch):
    with pytest.raises(ValueError, match=r"'llm/blocks/q/kernels' matches 0 sharding rules"):
        spec_of("llm/blocks/q/kernels")
    monkeypatch.setattr(sharding, "RULES", (*sharding.RULES, (r"llm/emb.*", PartitionSpec())))
    with pytest.raises(ValueError, match=r"'llm/embedding' matches 2 sharding rules"):
        spec_of("llm/embedding")
