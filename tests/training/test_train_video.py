"""Videos through both stages of a recipe: prepared, packed beside images, their features kept by frame, then asked."""

import json
import pathlib

import pytest
import tiny

import mllm_jax
from mllm_jax.config import ConfigError
from mllm_jax.data.samples import Clip
from mllm_jax.data.tfds_llava import LlavaSource
from mllm_jax.data.video_layout import Video
from mllm_jax.inference import runs


@pytest.fixture
def config(tiny_checkpoints, tmp_path):
    """A recipe on data of its own: every third image is a video of 2 to 9 frames."""
    config = tiny.recipe(tiny_checkpoints, tiny.write_data(tmp_path / "data"))
    config.model.video.frames, config.model.video.pool, config.model.video.newline = (
        3,
        "average2d",
        "one_token",
    )
    config.data.image_slots, config.data.seq_len = 6, 128
    for stage in config.stages.values():
        stage.steps, stage.samples_per_row = 2, 2
        (source,) = stage.sources.values()
        entries = json.loads(pathlib.Path(source.json).read_text())
        for number, entry in enumerate(entries):
            if number % 3 == 0 and "image" in entry:
                entry["video"] = f"{number}.mkv"
                entry.pop("image")
                frames = tiny.moving_square(2 + number, size=(28, 40), seed=number)
                tiny.write_video(pathlib.Path(source.images) / entry["video"], frames)
                entry["conversations"] = [
                    {"from": "human", "value": "<video>"},
                    {"from": "gpt", "value": "so"},
                ]
        pathlib.Path(source.json).write_text(json.dumps(entries))
    config.stages.pretrain.cache_features = True
    config.stages.finetune.trainable = ("connector/.*", "separators/newline", "llm/.*")
    return config


@pytest.mark.slow
def test_both_stages_and_asking(config, train, tmp_path):
    run = tmp_path / "run"
    train.train(config, run, evaluate=False)
    (version,) = (run / "data" / "source_captions").glob("1.*")
    source = LlavaSource(version)
    clips = [image for i in range(len(source)) for image in source[i].images if isinstance(image, Clip)]
    assert [len(clip.frames) for clip in clips] == [2, 3, 3]
    model = mllm_jax.load(run)
    assert model.config.video == Video(3, pool="average2d", newline="one_token")
    frames = tiny.moving_square(9, size=(28, 40))
    states = model.hidden_states(video=frames, prompt="what?")
    assert (states.image_of == 0).sum() == 3 + 1
    together = model.generate(video=[frames, frames[:2], None], prompt=["what?"] * 3, max_new_tokens=3)
    alone = [
        model.generate(video=video, prompt="what?", max_new_tokens=3) for video in (frames, frames[:2], None)
    ]
    assert together == alone


def refused(config, message):
    with pytest.raises(ConfigError, match=message):
        runs.model_config(config)


def test_impossible_combinations_are_refused_by_name(config):
    assert runs.model_config(config).visual_layout.most_slots == 3
    config.data.image_slots = 2
    refused(config, r"'data.image_slots' is 2, but a video fills up to 3 slots; .*model.video.frames")
    config.data.image_slots = 3
    config.model.video.update({"pool": "max2d", "time": "mean"})
    refused(config, r"'model\.video'.*video.time='mean' is of frames whose tokens are not maxima")
    config.model.video.time = "concat"
    config.model.tiles.update({"merge": "spatial_unpad", "max_tiles": 1, "pinpoints": ((1, 1), (2, 1))})
    refused(config, r"video.pool takes the max of tokens and model.tiles the sum")
    config.model.tiles.merge = "none"
    config.model.connector.name = "q_former"
    config.model.connector.q_former.update({"tokens": 4, "hidden": 8, "depth": 1, "heads": 2, "mlp": 8})
    refused(config, "lie on none")
    config.model.video.update({"pool": "max1d", "newline": "frame"})
    assert runs.model_config(config).visual_layout.separated
    config.model.video.frames = 0
    assert runs.model_config(config).video is None
