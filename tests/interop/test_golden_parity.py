"""Parity with transformers without torch: our outputs against the committed ones of tests/goldens/make_parity.py."""

import functools
import json
import pathlib

import jax
import numpy as np
import pytest
from parity_cases import IMAGE, LLAVA_TOKENS, LLAVAS, LLMS, TOWERS, pixels, random_tensor, tokens
from safetensors.numpy import save_file
from torch_oracle import assert_close, decoder_states, greedy, llava_batch, vision_states

from mllm_jax import interop
from mllm_jax.interop.checkpoints import load_model
from mllm_jax.models import mllm

GOLDENS = pathlib.Path(__file__).parents[1] / "goldens"


@functools.cache
def goldens():
    """Listing and arrays."""
    return json.loads((GOLDENS / "parity.json").read_text()), dict(np.load(GOLDENS / "parity.npz"))


def write_checkpoint(key, directory):
    """The checkpoint that transformers had, made from the listing."""
    listing = goldens()[0][key]
    (directory / "config.json").write_text(json.dumps(listing["config"]))
    tensors = {name: random_tensor(name, shape) for name, shape in listing["tensors"].items()}
    save_file(tensors, directory / "model.safetensors")


@pytest.mark.parametrize("name", LLMS)
def test_llm(name, tmp_path):
    write_checkpoint(f"llm/{name}", tmp_path)
    arrays = goldens()[1]
    config, params = interop.llm_config(tmp_path), interop.load_llm(tmp_path)
    prompt = tokens(7, batch=1)
    states, logits = decoder_states(config, params, prompt)
    assert_close(np.stack(states), arrays[f"llm/{name}/states"], "hidden states")
    assert_close(logits, arrays[f"llm/{name}/logits"], "logits")
    np.testing.assert_array_equal(greedy(config, params, prompt, 5), arrays[f"llm/{name}/greedy"])


@pytest.mark.parametrize("name", TOWERS)
def test_tower(name, tmp_path):
    write_checkpoint(f"tower/{name}", tmp_path)
    config, params = interop.vision_config(tmp_path), interop.load_vision(tmp_path)
    for height, width in ((12, 12), (20, 8)):
        states = vision_states(config, params, pixels(height, width, batch=1))
        assert_close(np.stack(states), goldens()[1][f"tower/{name}/{height}x{width}"], f"{height}x{width}")


@pytest.mark.parametrize("name", LLAVAS)
def test_llava(name, tmp_path):
    write_checkpoint(f"llava/{name}", tmp_path)
    config, params, _ = load_model(tmp_path)
    batch = llava_batch(LLAVA_TOKENS, pixels(12, 12), IMAGE)
    logits = jax.jit(lambda p, b: mllm.apply(config, p, b))(params, batch)
    assert_close(logits, goldens()[1][f"llava/{name}/logits"], "logits")
