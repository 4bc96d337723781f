"""Every connector of the quickstart has the published structure, at a size in proportion to the mini tower and LLM."""

import importlib.util
import pathlib
import re

import jax
import jax.numpy as jnp
import pytest

from mllm_jax import connectors, interop
from mllm_jax.inference import runs
from mllm_jax.mini.connectors import OPTIONS, SPEC, WIDTH, mini_options
from mllm_jax.models import paths


def parameters(name, options):
    connector = connectors.create(name, SPEC, WIDTH, options)
    state = jax.ShapeDtypeStruct((1, 144, SPEC.width), jnp.float32)

    def init(states):
        return connector.init(jax.random.key(0), connectors.collect(connector.request(), states, SPEC.grid))

    return paths.flatten(jax.eval_shape(init, [state] * (SPEC.depth + 1))["params"])


def modules(parameters):
    """The kinds of parameters, the number of repeated blocks left out."""
    return {re.sub(r"_\d+/", "/", path) for path in parameters}


@pytest.mark.parametrize("name", connectors.CONNECTORS)
def test_half_a_million_parameters_at_most(name):
    found = parameters(name, mini_options(name, tokens=36))
    assert sum(leaf.size for leaf in found.values()) <= 500_000


@pytest.mark.parametrize("name", OPTIONS)
def test_the_structure_is_the_published_one(name):
    published = parameters(name, {})
    mini = parameters(name, mini_options(name, tokens=36))
    # A projection that adapts two widths is only there where they differ.
    optional = {"input/kernel", "input/bias", "output/kernel", "output/bias"}
    optional |= {
        path for path in modules(published) if path.startswith(("stage1/shortcut", "stage2/shortcut"))
    }
    assert modules(published) - modules(mini) <= optional
    assert modules(mini) <= modules(published)


def test_the_spec_is_the_shipped_tower_and_llm():
    vision, llm = interop.vision_config("mini"), interop.llm_config("mini")
    assert (vision.width, vision.depth, vision.grid(84), llm.width) == (128, 6, (12, 12), WIDTH)


def test_the_number_of_tokens_is_set_where_a_connector_has_it():
    assert mini_options("average_pool", tokens=36) == {"tokens": 36}
    assert mini_options("mlp2x_gelu", tokens=36) == {}


@pytest.mark.parametrize("name", connectors.CONNECTORS)
def test_rows_of_the_quickstart_have_the_same_room_for_text_with_every_connector(name):
    """What samples need on average, for each image of a row, and the longest sample alone."""
    path = pathlib.Path(__file__).parents[2] / "configs" / "quickstart.py"
    spec = importlib.util.spec_from_file_location("quickstart", path)
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    config = recipe.get_config(name)
    visual = runs.model_config(config).visual_layout.slot.num_tokens
    pretrain, finetune = config.stages.pretrain, config.stages.finetune
    assert config.data.seq_len - visual >= 256
    for stage, mean, longest in ((pretrain, 48, 128), (finetune, 186, 256)):
        assert 0 <= stage.seq_len - stage.image_slots * (visual + mean) < 32
        assert stage.seq_len - visual >= longest
    if name == "mlp2x_gelu":  # whose figures are published
        assert (config.data.seq_len, pretrain.seq_len, finetune.seq_len) == (400, 576, 672)
