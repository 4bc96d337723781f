"""docs/python.md and the README's lines of Python run as printed, with a tiny model in the places that they name."""

import dataclasses
import json
import pathlib
import re

import api_docs
import jax
import pytest
import tiny
from PIL import Image

from mllm_jax.data.anyres import Tiles
from mllm_jax.interop import native, saved_params
from mllm_jax.models import mllm
from mllm_jax.models.vit import VisionConfig

pytestmark = pytest.mark.slow

ROOT = pathlib.Path(__file__).parents[2]


def blocks(path):
    return re.findall(r"```python\n(.*?)```", path.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def places(tmp_path, monkeypatch, tiny_model, tiny_params, tiny_tokenizer, tiny_checkpoints):
    """models/..., runs/quickstart and images in the current folder."""
    native.save_native(
        tmp_path / "models" / "llava", tiny_model, jax.tree.map(lambda leaf: 2 * leaf, tiny_params)
    )
    tiny_tokenizer.save_pretrained(tmp_path / "models" / "llava")
    native_aspect = VisionConfig(12, 2, 2, 10, 4, 12, class_token=False, interpolation="bilinear_antialias")
    for name, changes in {
        "llava_next": {"tiles": Tiles()},
        "naflex": {
            "vision": native_aspect, "max_patches": 20, "connector": "mlp2x_gelu", "connector_options": (),
        },
    }.items():  # fmt: skip
        model, directory = dataclasses.replace(tiny_model, **changes), tmp_path / "models" / name
        native.save_native(directory, model, tiny.random_params(mllm.abstract_params(model)))
        tiny_tokenizer.save_pretrained(directory)
    run = tmp_path / "runs" / "quickstart"
    config = tiny.recipe(
        tiny_checkpoints, dict.fromkeys(("captions", "instructions"), ("data.json", "images"))
    )
    for stage in ("pretrain", "finetune"):
        saved_params.save_params(run / "params" / stage, tiny_params)
    (run / "config.json").write_text(json.dumps(config.to_dict()))
    for seed, name in enumerate(("cat.jpg", "dog.jpg")):
        (tmp_path / "image.png").write_bytes(tiny.png(seed, (40, 30)))
        Image.open(tmp_path / "image.png").save(tmp_path / name)
    tiny.write_video(tmp_path / "clip.mp4", tiny.moving_square(12, size=(30, 40)))
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("name", ["docs/python.md", "README.md"])
def test_code_runs_as_printed(places, name, capsys):
    found = blocks(ROOT / name)
    assert len(found) >= (1 if name == "README.md" else 10)
    namespace = {}
    for number, block in enumerate(found):
        exec(compile(block, f"{name}, block {number}", "exec"), namespace)
    assert capsys.readouterr().out.strip()


def test_examples_of_the_reference(places):
    for name in api_docs.symbols():
        if name.startswith(api_docs.WITH_A_MODEL):
            assert api_docs.run_examples(name)


def test_shapes_named_in_the_guide(places):
    """The comments behind the fields of `hidden_states` say the dimensions that the arrays have."""
    import mllm_jax

    model = mllm_jax.load("models/llava", template="vicuna_v1")
    states = model.hidden_states("cat.jpg", "What is this?")
    config = model.config
    sizes = {
        "T": len(states.tokens), "I": 1, "K": config.make_connector().request().deepest + 1, "C": config.vision.width,
        "N": states.grid[0] * states.grid[1], "M": config.visual_layout.slot.num_tokens, "D": config.llm.width,
        "L + 1": config.llm.depth + 1, "V": config.llm.vocab,
    }  # fmt: skip
    named = re.findall(r"^states\.(\w+) +# \[([^\]]+)\]", (ROOT / "docs/python.md").read_text(), re.M)
    assert len(named) == 7
    for field, dimensions in named:
        assert getattr(states, field).shape == tuple(sizes[letter] for letter in dimensions.split(", ")), (
            field
        )
