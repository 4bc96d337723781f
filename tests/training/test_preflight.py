"""What is refused before anything is computed: meshes that the model or its rows do not fit."""

import jax
import pytest
import tiny
from jax.sharding import AbstractMesh

from mllm_jax.config import ConfigError
from mllm_jax.inference import runs
from mllm_jax.parallel.mesh import AXES, make_mesh
from mllm_jax.training import preflight


@pytest.mark.parametrize(
    ("sizes", "changes", "message"),
    [
        ({"sequence": 2, "tensor": 2}, {}, None),
        (
            {"sequence": 4, "tensor": 2},
            {},
            r"'mesh\.sequence' \(4\) x 'mesh\.tensor' \(2\) must divide the 4",
        ),
        (
            {"sequence": 4},
            {"data.seq_len": 82},
            r"'data\.seq_len' \(82\) must be a multiple .* \(4\); take 84",
        ),
        ({"sequence": 2}, {"stages.finetune.seq_len": 81}, r"'stages\.finetune\.seq_len' \(81\) .* take 82"),
    ],
)
def test_rows_that_cannot_be_cut_are_refused(sizes, changes, message, tiny_config):
    tiny_config.update_from_flattened_dict(changes)
    mesh = AbstractMesh(tuple(sizes.get(axis, 1) for axis in AXES), AXES)
    model = runs.model_config(tiny_config)
    if message is None:
        preflight.check_mesh(tiny_config, model, mesh)
        return
    with pytest.raises(ConfigError, match=message):
        preflight.check_mesh(tiny_config, model, mesh)


def test_the_mesh_is_checked_before_a_run(tiny_config, tiny_tokenizer, monkeypatch):
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])

    def refuse(*_):
        raise ConfigError("this mesh")

    monkeypatch.setattr(preflight, "check_mesh", refuse)
    with pytest.raises(ConfigError, match="this mesh"):
        preflight.check_stages(tiny_config, tiny.model_config(), tiny_tokenizer, mesh)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"samples_per_row": 1}, r"raise 'stages\.finetune\.samples_per_row'"),
        (
            {"seq_len": 24},
            r"6 image slots of \d+ visual tokens .* raise 'stages\.finetune\.seq_len' or lower",
        ),
        ({}, r"set it to 'tokens'"),
    ],
)
def test_rows_that_cannot_be_filled_by_text_are_refused(changes, message, tiny_config, tiny_tokenizer):
    mesh = make_mesh(dict.fromkeys(AXES, 1), jax.devices()[:1])
    stage = tiny_config.stages.finetune
    stage.samples_per_row, stage.image_slots, stage.pack_by = 4, 6, "text"
    preflight.check_stages(tiny_config, runs.model_config(tiny_config), tiny_tokenizer, mesh)
    stage.update(changes)
    if not changes:
        tiny_config.model.tiles.merge = "spatial_unpad"
        tiny_config.data.image_slots = 6
    with pytest.raises(ConfigError, match=rf"'stages\.finetune\.pack_by' is 'text'.* {message}"):
        preflight.check_stages(tiny_config, runs.model_config(tiny_config), tiny_tokenizer, mesh)
