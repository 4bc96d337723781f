"""A tiny model that all tests of the server ask."""

import jax
import pytest

import mllm_jax
from mllm_jax.interop import native


@pytest.fixture(scope="session")
def model(tmp_path_factory, tiny_model, tiny_params, tiny_tokenizer):
    """With weights that make answers vary, and a template that has a place for a system text."""
    root = tmp_path_factory.mktemp("served") / "model"
    native.save_native(root, tiny_model, jax.tree.map(lambda leaf: 2 * leaf, tiny_params))
    tiny_tokenizer.save_pretrained(root)
    return mllm_jax.load(root, template="v1", dtype="float32", aspect="square")
