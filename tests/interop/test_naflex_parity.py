"""SigLIP 2 NaFlex against transformers (torch): images of several grids in one padded batch, from tower to answers."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

import mllm_jax
from mllm_jax import connectors, interop
from mllm_jax.connectors.base import FeatureRequest, VisionSpec
from mllm_jax.data.naflex import NaFlexProcessor, native_grid
from mllm_jax.data.rows import ImageReader, RowEncoder, stack_rows
from mllm_jax.data.samples import Sample
from mllm_jax.inference import prefill
from mllm_jax.interop import native
from mllm_jax.limits import LimitError
from mllm_jax.models import mllm
from mllm_jax.models.vit import VisionConfig, VisionTransformer

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")

from parity_cases import TOWER_SIZE  # noqa: E402
from torch_oracle import assert_close, randomize, save  # noqa: E402

PATCH, LIMIT = 4, 20
SIZES = ((40, 50), (9, 9), (10, 160), (64, 8))
TOWER = VisionConfig(
    width=16, depth=2, heads=2, mlp_width=24, patch=PATCH, image_size=16, activation="gelu_tanh", eps=1e-6,
    class_token=False, pre_norm=False, patch_bias=True, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5),
    interpolation="bilinear_antialias",
)  # fmt: skip


def pictures():
    rng = np.random.default_rng(0)
    return [rng.integers(0, 256, (*size, 3), np.uint8) for size in SIZES]


@pytest.mark.parametrize("attention", ["xla", "blockwise"])
def test_a_padded_batch_equals_torch(attention, tmp_path):
    module = pytest.importorskip("transformers.models.siglip2.image_processing_pil_siglip2")
    config = transformers.Siglip2VisionConfig(**{**TOWER_SIZE, "num_patches": 9})
    config._attn_implementation = "eager"
    theirs = randomize(transformers.Siglip2VisionModel(config))
    save(theirs, tmp_path)
    processed = module.Siglip2ImageProcessorPil(patch_size=PATCH, max_num_patches=LIMIT)(
        pictures(), return_tensors="pt", input_data_format="channels_last"
    )
    with torch.no_grad():
        expected = theirs(**processed, output_hidden_states=True).hidden_states

    config, params = interop.vision_config(tmp_path), interop.load_vision(tmp_path)
    assert config.native
    processor = NaFlexProcessor(PATCH, LIMIT)
    images = jnp.asarray(np.stack([processor(image) for image in pictures()]))
    grids = np.asarray([native_grid(size, PATCH, LIMIT) for size in SIZES])
    assert len({tuple(grid) for grid in grids.tolist()}) == len(SIZES)
    request = FeatureRequest(hidden=tuple(range(config.depth + 1)))
    encoder = VisionTransformer(config, request, attention=attention)
    found = jax.jit(lambda p: encoder.apply({"params": p}, images, jnp.asarray(grids)))(params)
    for image, (rows, columns) in enumerate(grids.tolist()):
        real = slice(rows * columns)
        for k in request.hidden:
            assert_close(found.hidden[k][image, real], expected[k][image, real], f"{SIZES[image]} hs[{k}]")


@pytest.fixture(scope="module")
def model():
    """A tiny multimodal model with a NaFlex tower; (configuration, parameters)."""
    whole = tiny.model_config()
    config = dataclasses.replace(
        whole, vision=TOWER, image_size=16, max_patches=LIMIT, connector="mlp2x_gelu", connector_options=()
    )
    return config, tiny.random_params(mllm.abstract_params(config))


def test_answers_do_not_depend_on_what_else_is_in_the_batch(model, tmp_path, monkeypatch):
    config, params = model
    native.save_native(tmp_path / "model", config, params)
    tiny.make_tokenizer().save_pretrained(tmp_path / "model")
    assert interop.load_processor_config(tmp_path / "model")["max_num_patches"] == LIMIT
    loaded = mllm_jax.load(tmp_path / "model", template="vicuna_v1")
    assert loaded.config == dataclasses.replace(config, attention="xla")
    fields = json.loads((tmp_path / "model" / "model.json").read_text())
    with pytest.raises(LimitError, match=r"model.json: max_patches.*MLLM_JAX_MAX_WIDTH"):
        native.model_from_json({**fields, "max_patches": 10**9})
    prompts, answers = ["What is this?"] * len(SIZES), [["A cat.", "A dog."]] * len(SIZES)
    together = loaded.likelihood(pictures(), prompts, answers)
    for image, prompt, own, found in zip(pictures(), prompts, answers, together, strict=True):
        np.testing.assert_allclose(found, loaded.likelihood(image, prompt, own), atol=1e-4)
    blank = np.full((8, 64, 3), 127, np.uint8)
    assert not np.allclose(loaded.likelihood(blank, prompts[0], answers[0]), together[0], atol=1e-3)
    with monkeypatch.context() as patch:
        patch.setattr(prefill, "CPU_BYTES", 1)  # prompts are read in pieces
        in_pieces = loaded.likelihood(pictures(), prompts, answers)
    np.testing.assert_allclose(in_pieces, together, atol=1e-4)
    states = loaded.hidden_states(pictures()[0], "What?")
    assert (states.image_of == 0).sum() == np.prod(native_grid(SIZES[0], PATCH, LIMIT))


def test_samples_in_one_row_equal_those_alone(model):
    config, params = model
    turns = ({"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "It."})
    samples = [Sample(str(i), (image,), turns) for i, image in enumerate(pictures()[:3])]
    reader = ImageReader(NaFlexProcessor.of(config))
    encode = RowEncoder(
        reader, config.visual_layout, tiny.make_tokenizer(), "vicuna_v1", seq_len=768, image_slots=4, samples_per_row=3
    )  # fmt: skip
    packed, alone = (
        stack_rows([encode(samples)]).arrays,
        stack_rows([encode([one]) for one in samples]).arrays,
    )
    assert packed.grids[0].tolist() == [list(native_grid(size, PATCH, LIMIT)) for size in SIZES[:3]] + [
        [0, 0]
    ]
    run = jax.jit(lambda p, b: mllm.apply(config, p, b))
    together, apart = run(params, packed), run(params, alone)
    start = 0
    for index in range(3):
        length = int((alone.segment_ids[index] != 0).sum())
        np.testing.assert_allclose(together[0, start : start + length], apart[index, :length], atol=2e-4)
        start += length


def test_what_cannot_follow_is_refused_by_name(model):
    config, _ = model
    with pytest.raises(ValueError, match=r"vision.max_patches=20.*need a NaFlex encoder"):
        dataclasses.replace(config, vision=tiny.model_config().vision)
    spec = VisionSpec(16, 24, 23, (1, LIMIT), regular=False)
    for name in connectors.CONNECTORS:
        if name in ("linear", "mlp1x_gelu", "mlp2x_gelu", "mlp3x_gelu", "sci", "dci"):
            assert connectors.create(name, spec, 12).num_tokens(spec.grid) == LIMIT
        else:
            with pytest.raises(ValueError, match=rf"connector '{name}'.*choose linear, mlp1x_gelu"):
                connectors.create(name, spec, 12)
    for name, options in (("mlp2x_gelu", {"reduced_grid": (1, 10)}), ("sci", {"learnable": True})):
        with pytest.raises(ValueError, match="needs patches on one grid"):
            connectors.create(name, spec, 12, options)
