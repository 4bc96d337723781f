"""The batch struct: its shapes, its empty rows and its shardings, with the fields that are there."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from mllm_jax.data.batch import Batch
from mllm_jax.parallel.mesh import ROWS, batch_shardings, make_mesh

FEATURES = [jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((2, 9, 5), (1, 36, 4))]
TEXT = {"tokens", "positions", "segment_ids", "visual_index"}
SPECS = {
    "images": (
        Batch.spec(4, length=7, slots=3, image_size=(28, 42)),
        TEXT | {"loss_weights", "image_mask", "images"},
    ),
    "features": (
        Batch.spec(4, length=7, slots=3, features=FEATURES),
        TEXT | {"loss_weights", "image_mask", "features"},
    ),
    "prompts": (Batch.spec(4, length=7, labels=False), TEXT),
}


@pytest.mark.parametrize("kind", SPECS)
def test_fields_shapes_and_empty_rows(kind):
    spec, names = SPECS[kind]
    shapes = {}
    spec.map(lambda leaf, field: shapes.setdefault(field["axes"], leaf.shape))
    assert {field for field in Batch.__dataclass_fields__ if getattr(spec, field) is not None} == names
    assert all(leaf.shape[0] == 4 for leaf in jax.tree.leaves(spec))
    empty = spec.empty()
    assert jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), empty) == spec
    assert (empty.visual_index == -1).all()
    assert not any(leaf.any() for leaf in jax.tree.leaves(empty.replace(visual_index=None)))


def test_shapes_of_slots():
    images, features = SPECS["images"][0], SPECS["features"][0]
    assert (images.images.shape, images.images.dtype) == ((4, 3, 28, 42, 3), np.uint8)
    assert [x.shape for x in features.features] == [(4, 3, 2, 9, 5), (4, 3, 1, 36, 4)]
    assert {x.dtype for x in features.features} == {FEATURES[0].dtype}
    assert images.image_mask.shape == (4, 3)
    assert Batch.spec(length=7, slots=3).image_mask.shape == (3,)  # a single row


@pytest.mark.parametrize("kind", SPECS)
def test_every_field_has_a_sharding_that_jit_takes(kind):
    spec, _ = SPECS[kind]
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    shardings = batch_shardings(spec, mesh)
    assert {sharding.spec[0] for sharding in jax.tree.leaves(shardings)} == {ROWS}
    assert shardings.tokens.spec == P(ROWS, None)
    count = jax.jit(lambda batch: batch.tokens.sum(), in_shardings=(shardings,))
    assert count.lower(spec).compile()(jax.device_put(spec.empty(), shardings)) == 0
