"""The encoder's running sums are what the connectors mean: the same tokens as from all hidden states."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from connector_testing import parameters

from mllm_jax import connectors
from mllm_jax.models.vit import VisionConfig, VisionTransformer

TOWER = VisionConfig(width=16, depth=6, heads=2, mlp_width=24, patch=4, image_size=16)


@pytest.mark.parametrize(
    ("name", "options"),
    [("sti", {}), ("sci", {}), ("dci", {}), ("dci", {"learnable": True}), ("token_packer", {"hidden": 8})],
)
def test_tokens_from_the_encoder(name, options):
    spec = connectors.VisionSpec(TOWER.width, TOWER.depth, 5, TOWER.grid(16))
    connector = connectors.create(name, spec, 12, options)
    everything = VisionTransformer(TOWER, connectors.FeatureRequest(hidden=tuple(range(7))))
    images = jnp.asarray(np.random.RandomState(0).randn(2, 16, 16, 3), jnp.float32)
    tower = everything.init(jax.random.key(0), images)
    states = everything.apply(tower, images).hidden

    # The tower is only as deep as asked for; its blocks are the first of the whole tower's.
    asked = VisionTransformer(TOWER, connector.request())
    shallow = {"params": dict(tower["params"])}
    shallow["params"]["blocks"] = jax.tree.map(lambda x: x[:5], tower["params"]["blocks"])
    features = asked.apply(shallow, images)
    reference = connectors.collect(connector.request(), [states[k] for k in range(7)], spec.grid)

    params = {"params": parameters(connector, spec.grid)}
    np.testing.assert_allclose(
        connector.apply(params, features), connector.apply(params, reference), rtol=0, atol=1e-5
    )
