"""What makes a scene of the mini world easy or hard, and the crowded scenes that towers learn from."""

import dataclasses

import numpy as np
import pytest

from mllm_jax.mini.world import FULL, GRADED, global_targets, patch_targets, render_array, sample_scene
from mllm_jax.mini.world.difficulty import STANDARD
from mllm_jax.mini.world.render import SIDE, silhouette
from mllm_jax.mini.world.sampler import DENSE_MOST, dense_scene, digit_pool
from mllm_jax.mini.world.scene import scene_from_json
from mllm_jax.mini.world.targets import GLOBAL_CLASSES, PATCH_CLASSES

GRADES = {"style_strength": "style", "damage": "damage", "view": "scene", "clutter": "clutter"}


def test_what_scenes_are_drawn_with_unless_asked_otherwise():
    for index in range(30):
        scene = sample_scene(0, index, "foundation")
        assert scene == sample_scene(0, index, "foundation", FULL)
        assert (scene.style_strength, scene.damage, scene.view, scene.clutter) == (1, 1, 1, 0)
        assert not {*GRADES} & {*scene.to_json()}
        for split in ("pretrain", "finetune", "mini"):
            assert sample_scene(0, index, split) == sample_scene(0, index, split, STANDARD)


def test_graded_scenes_use_the_whole_ranges():
    scenes = [sample_scene(3, index, "mini", GRADED) for index in range(500)]
    for field, name in GRADES.items():
        low, high = getattr(GRADED, name)
        values = np.array([getattr(scene, field) for scene in scenes])
        assert low <= values.min() < low + 0.1 * (high - low) + 1e-3
        assert high - 0.1 * (high - low) - 1e-3 < values.max() <= high
        assert values.mean() == pytest.approx((low + high) / 2, abs=0.06 * (high - low))
    small = [max(t.w, t.h) for s in scenes for t in s.of_kind("digit") if t.size == "small"]
    assert min(small) < FULL.small_card[0]
    assert scene_from_json(scenes[0].to_json()) == scenes[0]


def test_an_extra_card_does_not_change_the_topic():
    mixed = {"numbers": 0, "words": 0}
    for index in range(600):
        scene = sample_scene(4, index, "mini", GRADED)
        digits, words = len(scene.of_kind("digit")), len(scene.of_kind("word"))
        if scene.topic == "numbers" and words:
            assert digits <= 2
            mixed["numbers"] += 1
        elif scene.topic == "words" and digits:
            assert digits == 1
            mixed["words"] += 1
        elif scene.topic not in ("numbers", "words"):
            assert not words
    assert min(mixed.values()) > 10


def _scenes(**wanted):
    found = [sample_scene(5, index, "finetune", FULL) for index in range(400)]
    return [s for s in found if all(getattr(s, key) == value for key, value in wanted.items())]


@pytest.mark.parametrize(
    ("field", "name", "plain"),
    [("style", n, "flat") for n in ("sketch", "mosaic", "painting")]
    + [("quality", n, "clear") for n in ("blurry", "noisy", "faded")],
)
def test_the_more_of_a_look_the_further_from_an_image_without_it(field, name, plain):
    strength = "style_strength" if field == "style" else "damage"
    scene = _scenes(background="forest", quality="clear" if field == "style" else name, style="flat")[0]
    base = render_array(dataclasses.replace(scene, **{field: plain})).astype(float)
    away = [
        np.abs(render_array(dataclasses.replace(scene, **{field: name, strength: share})) - base).mean()
        for share in (0.1, 0.3, 0.6, 1.0)
    ]
    assert 0 < away[0] < 0.35 * away[-1]
    assert away == sorted(away)


def test_haze_takes_contrast_from_the_background_and_none_from_things():
    scene = _scenes(background="city", style="flat", quality="clear", topic="numbers")[0]
    inside, around = np.zeros((2, SIDE, SIDE), bool)
    for thing in scene.things:
        (left, top), (right, bottom) = (
            f(np.array(silhouette(thing)) * SIDE, 0).astype(int) for f in (np.min, np.max)
        )
        around[max(top - 3, 0) : bottom + 4, max(left - 3, 0) : right + 4] = True
        if thing.kind == "digit":
            inside[top + 2 : bottom - 1, left + 2 : right - 1] = True
    clear, hazy = (render_array(dataclasses.replace(scene, view=view)).astype(float) for view in (1.0, 0.2))
    np.testing.assert_array_equal(clear[inside], hazy[inside])
    assert hazy[~around].std(0).mean() == pytest.approx(0.2 * clear[~around].std(0).mean(), rel=0.1)
    specks = render_array(dataclasses.replace(scene, clutter=10)).astype(float)
    np.testing.assert_array_equal(clear[inside], specks[inside])
    assert 0.001 < (clear != specks).any(-1).mean() < 0.05


def test_dense_scenes_are_full_of_things_with_a_target_each():
    scenes = [dense_scene(0, index, GRADED) for index in range(100)]
    assert 5 < np.mean([len(s.things) for s in scenes]) <= DENSE_MOST
    assert np.mean([len(s.of_kind("digit")) for s in scenes]) > 2
    assert np.mean([len(s.shapes) for s in scenes]) > 2
    assert scenes[7] == dense_scene(0, 7, GRADED) != dense_scene(1, 7, GRADED)
    assert {thing.kind for thing in dense_scene(0, 7, GRADED, cards=(0.0, 1.0)).things} == {"word"}
    for scene in scenes:
        for thing in scene.of_kind("digit"):
            assert thing.digit_index in digit_pool("foundation", thing.digit)
        for key, value in global_targets(scene).items():
            assert 0 <= value < len(GLOBAL_CLASSES[key])
        for key, values in patch_targets(scene, 12).items():
            assert 0 <= values.min() <= values.max() < len(PATCH_CLASSES[key])
        boxes = [np.array(silhouette(thing)) for thing in scene.things]
        for i, one in enumerate(boxes):
            assert 0 <= one.min() <= one.max() <= 1
            for other in boxes[i + 1 :]:
                assert ((one.min(0) > other.max(0)) | (other.min(0) > one.max(0))).any()
