"""From configuration to parameters: what a stage starts from, in which dtype, and what a finished one leaves."""

import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from ml_collections import ConfigDict

from mllm_jax import files
from mllm_jax.config import benchmark_config, check, default_config
from mllm_jax.data.conversations import SampleError
from mllm_jax.data.tokens import TooManyImages
from mllm_jax.evaluation.own_benchmarks import eval_config
from mllm_jax.inference import runs
from mllm_jax.interop import saved_params
from mllm_jax.mini.world import dataset as mini_dataset
from mllm_jax.models import paths
from mllm_jax.parallel.mesh import make_mesh
from mllm_jax.training.params import load_stage, place, pretrained_params, starting_params
from mllm_jax.training.sources import prepare_sources, stage_iterator


@pytest.fixture(scope="module")
def mesh():
    return make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])


def assert_equal_trees(found, expected):
    found, expected = paths.flatten(found), paths.flatten(expected)
    assert set(found) == set(expected)
    for path, leaf in found.items():
        np.testing.assert_array_equal(np.asarray(leaf), np.asarray(expected[path]), err_msg=path)


def test_first_stage_starts_from_the_checkpoints_and_a_seeded_connector(tiny_config, tiny_params):
    model = runs.model_config(tiny_config)
    params = starting_params(tiny_config, model, "pretrain", None)
    assert_equal_trees(params["vision"], tiny_params["vision"])
    assert_equal_trees(params["llm"], tiny_params["llm"])
    again = starting_params(tiny_config, model, "pretrain", None)
    assert_equal_trees(params, again)
    tiny_config.seed = 8
    other = starting_params(tiny_config, model, "pretrain", None)["connector"]
    kernel = "layer_0/kernel"
    assert not np.array_equal(paths.flatten(other)[kernel], paths.flatten(params["connector"])[kernel])


def test_tower_is_read_only_as_deep_as_the_connector_needs(tiny_config):
    tiny_config.model.vision.select_layer = -2
    params = pretrained_params(tiny_config, runs.model_config(tiny_config))
    assert params["vision"]["blocks"]["q"]["kernel"].shape[0] == 1


def test_second_stage_takes_what_was_trained_and_unrounded_pretrained_weights(tiny_config, tiny_params, mesh):
    """Stage 1 froze the LLM in bfloat16; stage 2 trains it, from the checkpoint's float32 values."""
    tiny_config.model.frozen_dtype = "bfloat16"
    model = runs.model_config(tiny_config)
    start = starting_params(tiny_config, model, "pretrain", None)
    trained, frozen = paths.split(start, tiny_config.stages.pretrain.trainable)
    trained = jax.tree.map(lambda x: x + 1, place(trained, mesh, "float32", model))
    after = paths.merge(trained, place(frozen, mesh, "bfloat16", model))
    second = starting_params(tiny_config, model, "finetune", after)
    assert_equal_trees(second["connector"], trained["connector"])
    assert_equal_trees(second["llm"], tiny_params["llm"])
    assert_equal_trees(second["vision"], tiny_params["vision"])


def test_placing_changes_floating_point_only(tiny_model, mesh):
    params = {"llm": {"embedding": np.ones((4, 2), np.float16), "head": np.ones((2, 4), np.int8)}}
    placed = place(params, mesh, "bfloat16", tiny_model)["llm"]
    assert {name: leaf.dtype.name for name, leaf in placed.items()} == {
        "embedding": "bfloat16",
        "head": "int8",
    }
    assert params["llm"]["embedding"].dtype == np.float16


def test_a_finished_stage_is_read_back_in_the_dtypes_it_ran_in(tiny_config, mesh, tmp_path):
    tiny_config.model.frozen_dtype = "bfloat16"
    model = runs.model_config(tiny_config)
    start = starting_params(tiny_config, model, "pretrain", None)
    trained, frozen = paths.split(start, tiny_config.stages.pretrain.trainable)
    params = paths.merge(place(trained, mesh, "float32", model), place(frozen, mesh, "bfloat16", model))
    saved_params.save_params(tmp_path / "pretrain", params)
    read = load_stage(tmp_path / "pretrain", tiny_config, model, mesh)
    assert_equal_trees(read, params)
    dtypes = {path: leaf.dtype for path, leaf in paths.flatten(read).items()}
    assert dtypes["connector/layer_0/kernel"] == jnp.float32
    assert dtypes["llm/embedding"] == jnp.bfloat16
    tiny_config.model.connector.name = "linear"
    with pytest.raises(
        saved_params.CheckpointError, match=r"connector/layer_1/bias \(32,\) is in the checkpoint but not"
    ):
        load_stage(tmp_path / "pretrain", tiny_config, runs.model_config(tiny_config), mesh)


def test_sources_are_mixed_by_weight_and_epochs_or_steps_end_a_stage(tiny_config, tiny_tokenizer, tmp_path):
    stage = tiny_config.stages.finetune
    stage.sources.captions = tiny_config.stages.pretrain.sources.captions
    stage.sources.captions.weight = 3.0
    check(tiny_config)
    model = runs.model_config(tiny_config)
    prepared = prepare_sources(tiny_config, "finetune", model, tiny_tokenizer, tmp_path)
    assert {name: len(source) for name, source in prepared.items()} == {"captions": 8, "instructions": 10}
    with stage_iterator(tiny_config, stage, model, tiny_tokenizer, prepared) as batches:
        assert batches.num_batches is None  # `steps` is given
        ids = [row for _ in range(8) for row in next(batches).ids]
    assert sum(row.startswith("caption") for row in ids) == 24
    stage.steps = None
    stage.epochs = 2
    stage.sources.captions.weight = 1.0
    with stage_iterator(tiny_config, stage, model, tiny_tokenizer, prepared) as batches:
        assert batches.num_batches == 9
        assert batches.num_samples == 36


def test_samples_that_no_row_can_hold_are_found_before_training(tiny_config, tiny_tokenizer, tmp_path):
    stage = tiny_config.stages.finetune
    model = runs.model_config(tiny_config)
    tiny_config.data.image_slots = 1
    with pytest.raises(TooManyImages, match="'sample2': has 2 images, more than"):
        prepare_sources(tiny_config, "finetune", model, tiny_tokenizer, tmp_path)
    tiny_config.data.image_slots = 2
    assert (
        len(prepare_sources(tiny_config, "finetune", model, tiny_tokenizer, tmp_path)["instructions"]) == 10
    )
    stage.template = "plain"
    with pytest.raises(SampleError, match="'sample0': a caption template needs an image"):
        prepare_sources(tiny_config, "finetune", model, tiny_tokenizer, tmp_path)
    (tmp_path / "checkpoints" / "finetune").mkdir(parents=True)  # begun: what it reads has been checked
    assert len(prepare_sources(tiny_config, "finetune", model, tiny_tokenizer, tmp_path)) == 1


@pytest.mark.parametrize(
    ("size", "tokens", "expected"),
    [(56, 64, 64), (84, 144, 144), (112, 256, 256), (84, 36, 36), (84, 16, 16), (112, 64, 64)],
)
def test_the_mini_towers_tokens_are_a_quarter_of_clips_and_compress_alike(size, tokens, expected):
    """56, 84, 112 px stand for CLIP-L/14 at 224, 336, 448; connectors with 1/4 and 1/9 of the patch tokens."""
    config = default_config()
    config.model.vision.image_size = size
    config.model.connector.name = "average_pool"
    config.model.connector.average_pool.tokens = tokens
    assert runs.model_config(config).visual_layout.slot.num_tokens == expected
    config.model.connector.name = "mlp2x_gelu"
    clip = (4 * size // 14) ** 2
    assert runs.model_config(config).visual_layout.slot.num_tokens == clip // 4


def test_the_processor_follows_the_configured_resolution(tiny_config):
    tiny_config.model.vision.image_size = 56
    processor = runs.image_processor(tiny_config)
    assert (processor.size, processor.shortest_side) == (56, 56)
    assert (processor.aspect, runs.image_processor(tiny_config, "square").aspect) == ("pad", "square")


def test_the_first_process_writes_the_mini_benchmark_and_the_second_finds_it(
    tiny_config, tmp_path, monkeypatch, as_processes
):
    benchmark = benchmark_config()
    benchmark.kind, benchmark.count = "mini", 1
    tiny_config.eval.benchmarks = ConfigDict({"mini": benchmark})
    events, write, parts = [], mini_dataset.write_benchmark, files.write_text

    def watched(*arguments):
        events.append((jax.process_index(), "begins"))
        time.sleep(0.2)  # long enough for one that does not wait
        path = write(*arguments)
        events.append((jax.process_index(), "ends"))
        return path

    def watched_part(path, data):
        events.append((jax.process_index(), path.name))
        parts(path, data)

    monkeypatch.setattr(mini_dataset, "write_benchmark", watched)
    monkeypatch.setattr(files, "write_text", watched_part)
    found = as_processes(lambda _: eval_config(tiny_config, tmp_path))
    writes = ["begins", ".mini.begun", "mini.json", "mini.manifest.json", "ends"]
    assert events == [*((0, event) for event in writes), (1, "begins"), (1, "ends")]
    assert {values.benchmarks.mini.path for values in found} == {
        str(tmp_path / "data" / "mini_benchmark_1_7" / "mini.json")
    }
