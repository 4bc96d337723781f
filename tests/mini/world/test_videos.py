"""Videos of the mini world: what they show is what their questions ask about."""

import numpy as np
import pytest

from mllm_jax.data.video import frame_numbers, read_frames
from mllm_jax.mini.world.videos import (
    ABILITIES,
    COUNTS,
    FRAMES,
    STEPS,
    make_clip,
    write_benchmark,
    write_video,
)


def shown(clip):
    """The shapes that come one after the other, by what each frame shows."""
    return list(dict.fromkeys(scene.things[0].shape for scene in clip.scenes))


@pytest.mark.parametrize("ability", ABILITIES)
def test_a_clip_is_the_same_for_the_same_numbers(ability):
    clips = [make_clip(3, ability, index) for index in range(12)]
    assert clips == [make_clip(3, ability, index) for index in range(12)]
    assert clips[0] != make_clip(4, ability, 0)
    for clip in clips:
        assert len(clip.scenes) == FRAMES
        assert clip.answer in clip.options
        assert len(set(clip.options)) == len(clip.options) == 4


def test_the_mover_goes_where_the_answer_says_and_nothing_else_moves():
    for index in range(24):
        clip = make_clip(0, "direction", index)
        first, last = clip.scenes[0].things, clip.scenes[-1].things
        moved = [(b.x - a.x, b.y - a.y) for a, b in zip(first, last, strict=True) if (a.x, a.y) != (b.x, b.y)]
        ((across, down),) = moved
        assert (np.sign(across), np.sign(down)) == STEPS[clip.answer]
        mover = first[-1]
        assert f" {mover.color} {mover.shape} " in clip.question
        middle = [scene.things[-1] for scene in clip.scenes[FRAMES // 2 - 1 : FRAMES // 2 + 1]]
        place = np.mean([(thing.x, thing.y) for thing in middle], axis=0)
        assert (np.abs(place - 0.5) < 0.09).all()  # as for every other direction
    assert {make_clip(0, "direction", index).answer for index in range(4)} == set(STEPS)


def test_shapes_come_in_the_order_and_number_of_the_answer_and_a_few_frames_show_them_all():
    for index in range(12):
        clip = make_clip(0, "order", index)
        assert shown(clip)[0 if "first" in clip.question else -1] == clip.answer
        assert set(shown(clip)) == set(clip.options)
        clip = make_clip(0, "count", index)
        assert len(shown(clip)) == int(clip.answer) == index % len(COUNTS) + 1
        picked = {id(clip.scenes[number]) for number in frame_numbers(FRAMES, 8)}
        assert len(picked) == int(clip.answer)
        assert all(len(scene.things) == 1 for scene in clip.scenes)


def test_a_file_holds_the_frames(tmp_path):
    pytest.importorskip("av")
    clip = make_clip(0, "count", 3)
    with (tmp_path / "clip.mp4").open("wb") as file:
        write_video(file, clip)
    frames = read_frames(tmp_path / "clip.mp4", FRAMES)
    drawn = list(clip.frames())
    assert len(frames) == FRAMES
    wanted = [drawn[number] for number in frame_numbers(FRAMES, FRAMES)]
    errors = [np.abs(a.astype(int) - b).mean() for a, b in zip(frames, wanted, strict=True)]
    assert max(errors) < 6


def test_the_benchmark_is_written_once_and_whole(tmp_path):
    pytest.importorskip("av")
    path = write_benchmark(tmp_path, 2, seed=1)
    names = sorted(file.name for file in (tmp_path / "videos").iterdir())
    assert names == sorted(f"{ability}_{index:05d}.mp4" for ability in ABILITIES for index in range(2))
    before = path.stat().st_mtime_ns
    assert write_benchmark(tmp_path, 2, seed=1) == path
    assert path.stat().st_mtime_ns == before
    with pytest.raises(ValueError, match="other parameters"):
        write_benchmark(tmp_path, 2, seed=2)
