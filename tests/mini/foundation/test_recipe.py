"""A shrunken recipe, from nothing to shipped directories."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import interop
from mllm_jax.cli.main import main
from mllm_jax.connectors.base import FeatureRequest
from mllm_jax.mini.foundation import assets, llm
from mllm_jax.models.vit import VisionTransformer

RECIPE = pathlib.Path(__file__).parents[3] / "configs" / "mini_foundation.py"
SHRINK = """
import importlib.util
spec = importlib.util.spec_from_file_location("full", {recipe!r})
full = importlib.util.module_from_spec(spec)
spec.loader.exec_module(full)

def get_config():
    c = full.get_config()
    c.tokenizer.samples = 300
    c.tower.pictures, c.tower.sizes, c.tower.shares, c.tower.batch = (24, 12), (28, 42), (2, 1), 4
    c.tower.geometry.update(dict(width=16, depth=2, heads=2, mlp_width=32, patch=7, image_size=28))
    c.llm.geometry.update(dict(width=16, depth=2, heads=2, kv_heads=1, head_width=8, mlp_width=32))
    ends = (c.llm.phases[0], c.llm.phases[-1])
    c.llm.phases = tuple(dict(phase, steps=2, batch=2, length=320, rates=((0, 1), (2, 0))) for phase in ends)
    c.tower.phases = tuple(dict(phase, rates=((0, 1), (2, 0))) for phase in c.tower.phases)
    for fit in (c.tower.fit, c.llm.fit):
        fit.optimizer = "adamw"  # Muon compiles for minutes where cores are shared
        fit.log_every = fit.save_every = 2
    return c
"""


@pytest.mark.slow
def test_the_recipe_makes_loadable_directories(tmp_path):
    recipe = tmp_path / "recipe.py"
    recipe.write_text(SHRINK.format(recipe=str(RECIPE)))
    work = tmp_path / "work"
    assert main(["foundation", "--config", str(recipe), "--workdir", str(work)]) == 0
    lines = [json.loads(line) for line in (work / "tower" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines] == [2, 4]
    assert all(np.isfinite(line["loss"]) for line in lines)
    # finished parts are not trained again
    assert main(["foundation", "--config", str(recipe), "--workdir", str(work)]) == 0
    assert len((work / "tower" / "metrics.jsonl").read_text().splitlines()) == 2
    vision = interop.vision_config(work / "assets" / "mini_vit")
    llm = interop.llm_config(work / "assets" / "mini_llm")
    assert (vision.depth, vision.width, llm.depth, llm.width) == (2, 16, 2, 16)
    assert jax.tree.leaves(interop.load_llm(work / "assets" / "mini_llm"))
    assert interop.load_tokenizer(work / "assets" / "mini_llm")(" red").input_ids


def test_note_embeddings_are_sums_over_the_root_of_the_number(monkeypatch):
    monkeypatch.setattr(llm, "NOTE_NOISE", 0.0)
    table = np.random.default_rng(0).normal(size=(20, 8)).astype(np.float32)

    def apply(ids, method):
        assert method == "embed"
        return jnp.asarray(table)[ids]

    bags = np.array([[[3, 5, 0, 0], [0, 0, 0, 0], [7, 0, 9, 11]]], np.int32)
    out = llm.note_embeddings(apply, {"bags": bags, "noise_seed": np.int32(0)})
    expected = np.stack([(table[3] + table[5]) / 2**0.5, 0 * table[0], table[[7, 9, 11]].sum(0) / 3**0.5])
    np.testing.assert_allclose(out[0], expected, atol=1e-6)


def test_noise_has_the_stated_size():
    table = np.random.default_rng(0).normal(size=(50, 64)).astype(np.float32) * 0.1
    bags = np.random.default_rng(1).integers(1, 50, (4, 100, 3)).astype(np.int32)
    batch = {"bags": bags, "noise_seed": np.int32(3)}
    noisy = llm.note_embeddings(lambda ids, method: jnp.asarray(table)[ids], batch)
    clean = table[bags].sum(2) / 3**0.5
    rms = np.sqrt(np.mean(table[bags] ** 2))
    assert np.std(np.asarray(noisy) - clean) == pytest.approx(llm.NOTE_NOISE * rms, rel=0.03)


def test_a_scaled_residual_stream_scales_hidden_states_and_nothing_else():
    vision = interop.vision_config(interop.resolve_path("mini", "mini_vit"))
    tower = jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), interop.load_vision("mini"))
    pictures = jnp.asarray(np.random.default_rng(0).integers(0, 256, (2, 84, 84, 3), np.uint8))
    request = FeatureRequest(tuple(range(vision.depth + 1)))
    before = VisionTransformer(vision, request).apply({"params": tower}, pictures).hidden
    other, scaled = assets.scale_residual_stream(vision, tower, 0.3)
    after = VisionTransformer(other, request).apply({"params": scaled}, pictures).hidden
    for layer, states in before.items():
        np.testing.assert_allclose(np.asarray(after[layer]) / 0.3, states, rtol=1e-4, atol=1e-4)
    assert assets.residual_rms(vision, tower, np.asarray(pictures)) == pytest.approx(
        float(np.sqrt(np.mean(np.square(before[vision.depth - 1])))), rel=1e-4
    )
