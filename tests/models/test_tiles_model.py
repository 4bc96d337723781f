"""Images in tiles inside the model: what stands at each position, packed rows, and the learned newline."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny

from mllm_jax import connectors
from mllm_jax.data.anyres import Tiles
from mllm_jax.data.batch import SEPARATOR
from mllm_jax.data.measure import sizes
from mllm_jax.data.packing import pack
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.rows import ImageReader, RowEncoder, stack_rows
from mllm_jax.data.samples import Sample
from mllm_jax.inference.batching import Chunk, Request
from mllm_jax.models import mllm, paths
from mllm_jax.parallel.sharding import spec_of
from mllm_jax.training.step import loss_and_grads

PINPOINTS = ((1, 2), (2, 1), (2, 2), (3, 1))
RECIPES = {
    "unpad": Tiles(PINPOINTS),
    "shrink": Tiles(PINPOINTS, max_tiles=1, several="whole"),
    "pool": Tiles(PINPOINTS, merge="spatial_maxpool2x2"),
    "flat": Tiles(PINPOINTS, merge="flat"),
}
LENGTH, SLOTS, PER_ROW = 256, 14, 5


@pytest.fixture(
    params=[
        name if name in ("unpad", "pool") else pytest.param(name, marks=pytest.mark.slow) for name in RECIPES
    ]
)
def model(request, tiny_model):
    return dataclasses.replace(tiny_model, tiles=RECIPES[request.param])


def params_of(model):
    shapes = mllm.abstract_params(model)
    return jax.tree.map(jnp.asarray, tiny.random_params(shapes))


def samples():
    """Images of several sizes, two in one sample, none in some."""
    shapes = [(28, 28), (30, 80), (70, 20), (), (56, 56), (20, 200), ((40, 30), (25, 60)), (), (33, 61)]
    found = []
    for i, shape in enumerate(shapes):
        several = shape if shape and isinstance(shape[0], tuple) else [shape] if shape else []
        images = tuple(tiny.png(10 * i + k, size) for k, size in enumerate(several))
        turns = (
            {"from": "human", "value": "<image>" * len(images) + "what" * (1 + i % 3)},
            {"from": "gpt", "value": "so " * (1 + i % 5)},
        )
        found.append(Sample(f"s{i}", images, turns))
    return found


def encoder(model, tokenizer):
    reader = ImageReader(ImageProcessor.clip(tiny.IMAGE_SIZE, aspect="pad"))
    return RowEncoder(
        reader, model.visual_layout, tokenizer, "mistral_instruct", seq_len=LENGTH, image_slots=SLOTS,
        samples_per_row=PER_ROW,
    )  # fmt: skip


def test_tiles_of_several_sizes_packed_in_one_row_compute_what_they_do_alone(model, tiny_tokenizer, tmp_path):
    data, encode = samples(), encoder(model, tiny_tokenizer)
    rows = pack(sizes(data, encode, tmp_path, threads=2), encode.limits, np.random.default_rng(0))
    assert len(rows) < len(data) / 2
    empty = [[]] * (len(data) - len(rows))  # so that one program computes both
    packed = stack_rows([encode([data[i] for i in row]) for row in [*rows, *empty]]).arrays
    unpacked = stack_rows([encode([one]) for one in data]).arrays
    params = params_of(model)
    logits = jax.jit(lambda batch: mllm.apply(model, params, batch))
    together, alone = np.asarray(logits(packed)), np.asarray(logits(unpacked))
    for row, members in enumerate(rows):
        for segment, sample in enumerate(members, 1):
            here = packed.segment_ids[row] == segment
            there = unpacked.segment_ids[sample] == 1
            np.testing.assert_allclose(together[row, here], alone[sample, there], rtol=0, atol=1e-5)

    @jax.jit
    def run(batch):
        return loss_and_grads(model, params, {}, batch, LENGTH, 1, jax.random.key(0))

    (loss, grads, _), (expected, expected_grads, _) = run(packed), run(unpacked)
    np.testing.assert_allclose(loss, expected, rtol=0, atol=1e-5)
    for path, leaf in paths.flatten(grads).items():
        np.testing.assert_allclose(leaf, paths.flatten(expected_grads)[path], rtol=0, atol=1e-5, err_msg=path)
        assert np.abs(leaf).max() > 0, path


def test_answers_are_made_with_no_more_slots_than_an_image_can_fill(model, tiny_tokenizer):
    request = Request("a", encoder(model, tiny_tokenizer).encode(samples()[4]), ("x",))
    chunk = Chunk([request] * 2, [request], np.zeros(2, np.int32))
    assert (model.visual_layout.most_slots, chunk.image_slots(5), chunk.image_slots(1)) == (5, 5, 8)


def test_embeddings_are_the_slots_tokens_combined_as_the_layout_says(model, tiny_tokenizer):
    encode = encoder(model, tiny_tokenizer)
    sample = samples()[6]
    row = jax.tree.map(jnp.asarray, stack_rows([encode([samples()[1], sample])]).arrays)
    params = params_of(model)

    def run(module, batch):
        visual = module.visual_tokens(batch)
        return visual, module.embed(batch, visual)

    visual, found = (np.asarray(x[0]) for x in mllm.apply(model, params, row, method=run))
    first = 0
    for segment, one in enumerate((samples()[1], sample), 1):
        encoded = encode.encode(one)
        here = found[row.segment_ids[0] == segment]
        for image, layout in enumerate(encoded.layouts):
            tokens = visual[first : first + layout.slot_tokens]
            kept = layout.kept.reshape(layout.num_tokens, -1)
            taps = tokens[np.maximum(kept, 0)]
            if model.visual_layout.combination.kind == "max":
                expected = taps.max(axis=1)
            else:
                weights = np.ones(kept.shape) if layout.weights is None else layout.weights
                expected = (taps * weights[..., None]).sum(axis=1)
            lines = kept[:, 0] == SEPARATOR
            if lines.any():
                expected[lines] = params["separators"]["newline"]
            np.testing.assert_allclose(here[encoded.image_of == image], expected, rtol=1e-5, atol=1e-6)
            first += layout.slot_tokens
        text = encoded.image_of < 0
        np.testing.assert_array_equal(here[text], params["llm"]["embedding"][encoded.tokens[text]])


def test_the_newline_is_a_parameter_of_unpadded_tiles_only(model):
    params = mllm.abstract_params(model)
    assert ("separators" in params) == model.tiles.unpads
    if model.tiles.unpads:
        assert params["separators"]["newline"].shape == (model.llm.width,)
        assert not spec_of("separators/newline")
        wide = dataclasses.replace(model, llm=dataclasses.replace(model.llm, width=2048))
        fresh = jax.jit(lambda key: mllm.init(wide, key)["separators"]["newline"])(jax.random.key(0))
        assert abs(np.std(fresh) * 2048**0.5 - 1) < 0.1


@pytest.mark.parametrize("name", connectors.CONNECTORS)
def test_connectors_with_a_grid_make_its_tokens_and_the_others_say_so(name):
    options = {
        "average_pool": {"tokens": 4}, "c_abstractor": {"tokens": 4}, "d_abstractor": {"tokens": 4},
        "ldpv2": {"tokens": 4},
    }.get(name, {})  # fmt: skip
    spec = connectors.VisionSpec(width=16, depth=24, select_layer=23, grid=(4, 4))
    connector = connectors.create(name, spec, 64, options)
    grid = connector.token_grid((4, 4))
    without = {"q_former", "resampler", "perceiver", "d_abstractor", "sti"}
    assert (grid is None) == (name in without)
    if grid is not None:
        assert connector.num_tokens((4, 4)) == grid[0] * grid[1]
