"""Dense Connector: which hidden states, in which order (reference 3.1, 3.6 and 3.9)."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mllm_jax import connectors
from mllm_jax.connectors import dci, sci, sti

CLIP = connectors.VisionSpec(width=1, depth=24, select_layer=23, grid=(24, 24))
SIGLIP = connectors.VisionSpec(width=1, depth=27, select_layer=26, grid=(27, 27))


def joined(monkeypatch, name, spec, states, options=None):
    """What goes into the MLP, with the MLP taken away."""
    module = {"sti": sti, "sci": sci, "dci": dci}[name]
    monkeypatch.setattr(module, "project", lambda connector, x, *_: x)
    connector = connectors.create(name, spec, 1, options)
    features = connectors.collect(connector.request(), states, spec.grid)
    return np.asarray(nn.apply(lambda m: m(features), connector)({}))


def constant_states(spec):
    patches = spec.grid[0] * spec.grid[1]
    return [jnp.full((1, patches, 1), float(k)) for k in range(spec.depth + 1)]


@pytest.mark.parametrize(
    ("name", "spec", "options", "expected"),
    [
        ("sci", CLIP, None, (23, 7, 15)),
        ("dci", CLIP, None, (23, 5.5, 17.5)),
        ("sci", SIGLIP, None, (26, 7, 15)),
        ("dci", SIGLIP, None, (26, 6, 19)),
        ("dci", CLIP, {"groups": 3}, (23, 3.5, 11.5, 19.5)),
        ("dci", CLIP, {"edges": (0, 12, 24)}, (23, 5.5, 17.5)),
        ("sci", CLIP, {"layers": (3, 7, 15)}, (23, 3, 7, 15)),
    ],
)
def test_channel_blocks(monkeypatch, name, spec, options, expected):
    out = joined(monkeypatch, name, spec, constant_states(spec), options)
    np.testing.assert_allclose(out[0], np.tile(expected, (out.shape[1], 1)), rtol=1e-6)


@pytest.mark.parametrize(
    ("spec", "windows", "last"), [(CLIP, 72, 571.5), (SIGLIP, 91, 723.5)], ids=["clip", "siglip"]
)
def test_sti_windows(monkeypatch, spec, windows, last):
    patches = spec.grid[0] * spec.grid[1]
    states = constant_states(spec)
    states[7] = jnp.arange(patches, dtype=jnp.float32).reshape(1, patches, 1)
    out = joined(monkeypatch, "sti", spec, states)[0, :, 0]
    pooled = out[patches : patches + windows]
    assert (out[:patches] == spec.select_layer).all()
    assert len(pooled) == windows
    assert (pooled[0], pooled[-1]) == (3.5, last)
    assert (out[patches + windows :] == 15).all()
    assert len(out) == patches + 2 * windows


def test_token_counts_of_the_papers():
    counts = {
        ("sti", CLIP): 720,
        ("sti", SIGLIP): 911,
        ("sci", CLIP): 576,
        ("dci", SIGLIP): 729,
    }
    for (name, spec), expected in counts.items():
        assert connectors.create(name, spec, 8).num_tokens(spec.grid) == expected
    four = connectors.create("sti", CLIP, 8, {"layers": (7, 15, 19)})
    assert four.num_tokens(CLIP.grid) == 792
    assert four.num_tokens((16, 16)) == 256 + 3 * 32


def test_blocks_past_the_deepest_state_are_not_asked_for():
    assert connectors.create("dci", SIGLIP, 8).request().deepest == 26
    assert connectors.create("dci", CLIP, 8, {"learnable": True}).request() == connectors.FeatureRequest(
        hidden=(23,), normalized_means=(tuple(range(12)), tuple(range(12, 24)))
    )
    assert connectors.create("dci", CLIP, 8, {"edges": (0, 12, 25)}).request().deepest == 24


@pytest.mark.parametrize(
    ("depth", "select", "layers", "groups"),
    [
        (12, 11, (3, 7), ((0, 5), (6, 11))),  # SigLIP base, CLIP-B
        (40, 39, (12, 25), ((0, 19), (20, 39))),  # DINOv2-g
        (26, 26, (7, 15), ((0, 12), (13, 25))),  # SigLIP-so400m with its last block already deleted
        (24, 24, (7, 15), ((0, 11), (12, 23))),
        (3, 2, (0, 1), ((0, 0), (1, 1))),
        (2, 1, (0,), ((0, 0), (1, 1))),
    ],
)
def test_rule_for_other_depths(depth, select, layers, groups):
    spec = connectors.VisionSpec(8, depth, select, (4, 4))
    assert connectors.create("sci", spec, 8).request().hidden == (select, *layers)
    assert connectors.create("sti", spec, 8).request().hidden == (select, *layers)
    found = connectors.create("dci", spec, 8).request().means
    assert tuple((g[0], g[-1]) for g in found) == groups


@pytest.mark.parametrize(
    ("name", "spec", "options", "message"),
    [
        ("sci", CLIP, {"layers": (7, 25)}, r"must be distinct indices of hs\[0..24\]"),
        ("sci", CLIP, {"layers": (7, 23)}, "must be distinct"),
        ("sti", CLIP, {"layers": (-2,)}, "must be distinct indices"),
        ("sti", CLIP, {"window": 577}, "sti.window=577 is not within the 576 patches"),
        ("dci", CLIP, {"edges": (0, 12, 12)}, r"dci.edges=\(0, 12, 12\) must increase within 0..25"),
        ("dci", CLIP, {"edges": (0, 12, 26)}, "must increase within 0..25"),
        ("dci", CLIP, {"edges": (0, 8, 16, 24)}, "makes 3 groups, dci.groups=2"),
        ("dci", connectors.VisionSpec(8, 2, 1, (4, 4)), {"groups": 3}, "3 groups cannot be made of"),
        ("sci", connectors.VisionSpec(8, 2, 0, (4, 4)), {}, "no preset for select_layer=0"),
    ],
)
def test_impossible_layer_sets_say_so(name, spec, options, message):
    with pytest.raises(ValueError, match=message):
        connectors.create(name, spec, 8, options)


def test_sti_may_pool_the_selected_layer_itself():
    connector = connectors.create("sti", CLIP, 8, {"layers": (7, 15, 23)})
    assert connector.request().hidden == (23, 7, 15)
    assert connector.num_tokens((24, 24)) == 792


def test_normalized_mean_is_a_layer_norm_without_affine():
    x = 3 + 2 * jax.random.normal(jax.random.key(0), (2, 5, 64))
    y = connectors.normalize(x)
    np.testing.assert_allclose(np.mean(y, -1), 0, atol=1e-6)
    np.testing.assert_allclose(np.var(y, -1), 1, atol=1e-4)
