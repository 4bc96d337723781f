"""Models that are asked about videos: every form of one, what the LLM reads of it, and prefixes that are shared."""

import dataclasses

import jax
import numpy as np
import pytest
import tiny
from PIL import Image

import mllm_jax
from mllm_jax.data.anyres import Tiles
from mllm_jax.data.conversations import SampleError
from mllm_jax.data.images import ImageError
from mllm_jax.data.video import frame_numbers
from mllm_jax.data.video_layout import Video
from mllm_jax.interop import checkpoints, native
from mllm_jax.models import mllm

SHORT = {"max_new_tokens": 5}
FRAMES = tiny.moving_square(20, size=(30, 40))


def saved(root, config, tokenizer):
    params = jax.tree.map(lambda leaf: 2 * leaf, tiny.random_params(mllm.abstract_params(config)))
    native.save_native(root, config, params)
    tokenizer.save_pretrained(root)
    return mllm_jax.load(root, template="mistral_instruct", dtype="float32", aspect="pad")


@pytest.fixture(scope="module")
def model(tmp_path_factory, tiny_model, tiny_tokenizer):
    return saved(tmp_path_factory.mktemp("model") / "m", tiny_model, tiny_tokenizer)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return tiny.write_video(
        tmp_path_factory.mktemp("clips") / "clip.mkv", FRAMES, codec="ffv1", format="bgr0"
    )


@pytest.mark.slow
def test_every_form_of_a_video(model, clip, tmp_path):
    for number, frame in enumerate(FRAMES):
        Image.fromarray(frame).save(tmp_path / f"{number}.png")
    forms = [clip, str(clip), tmp_path, FRAMES, [Image.fromarray(frame) for frame in FRAMES]]
    answers = model.generate(video=forms, prompt=["what?"] * len(forms), **SHORT)
    assert len(set(answers)) == 1
    assert answers[0] == model.generate(video=clip, prompt="what?", **SHORT)
    assert answers[0] != model.generate(video=FRAMES[::-1], prompt="what?", **SHORT)
    scores = model.likelihood(video=clip, prompt="what?", answers=["a", "b"])
    assert scores.shape == (2,)
    with pytest.raises(ImageError, match="missing"):
        model.generate(video="missing.mp4", prompt="what?")


def test_frames_are_images_one_after_the_other(model):
    """FreeVA: what the LLM reads of a video is what it reads of its frames."""
    picked = FRAMES[frame_numbers(20, 4)]
    freeva = model.with_video(frames=4, pool="none")
    video = freeva.hidden_states(video=FRAMES, prompt="what?")
    images = model.hidden_states(list(picked), "what?")
    read = images.llm[0][images.image_of >= 0]
    np.testing.assert_allclose(video.llm[0][video.image_of == 0], read, atol=1e-5)
    logits = freeva.logits(video=FRAMES, prompt="what?")
    np.testing.assert_allclose(logits, images.logits, atol=1e-4)
    pooled = model.with_video(frames=4).hidden_states(video=FRAMES, prompt="what?")  # Dense Connector
    expected = read.reshape(4, 2, 2, -1).max(axis=2).reshape(8, -1)
    np.testing.assert_allclose(pooled.llm[0][pooled.image_of == 0], expected, atol=1e-5)
    mean = model.with_video(frames=4, pool="none", time="mean").hidden_states(video=FRAMES, prompt="what?")
    expected = read.reshape(4, 4, -1).mean(axis=0)
    np.testing.assert_allclose(mean.llm[0][mean.image_of == 0], expected, atol=1e-5)


@pytest.mark.slow
def test_images_of_any_size_beside_videos(tmp_path, tiny_model, tiny_tokenizer):
    tiles = Tiles(((1, 2), (2, 1), (2, 2)))
    model = saved(tmp_path / "m", dataclasses.replace(tiny_model, tiles=tiles), tiny_tokenizer)
    wide, tall = Image.new("RGB", (90, 31), "red"), Image.new("RGB", (20, 70), "blue")
    alone = model.generate([wide, tall], "what?", **SHORT)
    both = model.with_video(frames=3, newline="frame")
    assert both.generate([wide, tall], "what?", **SHORT) == alone
    answers = both.generate([[wide, tall], None], ["what?", "<video> what?"], video=[None, FRAMES], **SHORT)
    assert answers == [alone, both.generate(video=FRAMES, prompt="what?", **SHORT)]
    states = both.hidden_states(wide, "<video> or <image>?", video=FRAMES)
    (video,) = np.nonzero(states.image_of == 0)
    assert len(video) == 3 * (2 + 1)
    assert video.max() < np.nonzero(states.image_of == 1)[0].min()


def test_a_video_is_read_once_for_all_its_questions(model, clip, monkeypatch):
    read = []
    frames = type(model).frames
    monkeypatch.setattr(
        type(model), "frames", lambda self, video: read.append(video.name) or frames(self, video)
    )
    questions = ["what?", "why?", "where to?"]
    together = model.generate(video=clip, prompt=questions, **SHORT)
    assert read == [str(clip)]
    batch = model.prompt_batch(video=clip, prompt=questions)
    assert batch.prefix_of.tolist() == [0, 0, 0]
    assert together == [model.generate(video=clip, prompt=question, **SHORT) for question in questions]


def test_places_of_videos(model):
    for prompt, said in (
        ("<video> <video>?", r"2 <video> place\(s\) for 0 image\(s\) and 1 video\(s\)"),
        ("<image>, <video>?", r"1 <image> and 1 <video> place\(s\)"),
    ):
        with pytest.raises(SampleError, match=said):
            model.generate(video=FRAMES, prompt=prompt)
    same = model.generate(video=FRAMES, prompt="Is <video> it?", **SHORT)
    assert same == model.generate(video=FRAMES, prompt="Is <image> it?", **SHORT)
    assert model.generate(None, "What does <video> mean?", **SHORT)  # a word
    with pytest.raises(TypeError, match="no prompt"):
        model.generate(video=FRAMES)


def test_how_a_model_reads_videos_is_kept(model, tmp_path, tiny_model, tiny_tokenizer):
    config = dataclasses.replace(tiny_model, video=Video(3, "linspace", "average2d"))
    again = saved(tmp_path / "m", config, tiny_tokenizer)
    assert again.config.video == config.video
    assert again.with_video(frames=5).config.video == dataclasses.replace(config.video, frames=5)
    assert again.fingerprint != model.fingerprint
    with pytest.raises(ValueError, match="newline='grid' needs a learned newline"):
        again.with_video(newline="grid")
    assert set(again.with_video(frames=5).params) == set(model.params)
    learned = dataclasses.replace(config, connector="mlp2x_gelu", connector_options=())
    learned = dataclasses.replace(learned, video=Video(3, newline="frame"))
    with pytest.raises(ValueError, match=r"no newline of videos \(video\.newline\)"):
        checkpoints.save_llava_hf(tmp_path / "hf", learned, {})
