"""The mini world's scenes, pictures and dense targets."""

import dataclasses
import json

import numpy as np
import pytest

from mllm_jax.mini.world import (
    FULL,
    GLOBAL_CLASSES,
    PATCH_CLASSES,
    SPLITS,
    contact_sheet,
    global_targets,
    patch_targets,
    render,
    render_array,
    sample_scene,
    scene_from_json,
)
from mllm_jax.mini.world.digits import digits
from mllm_jax.mini.world.render import silhouette
from mllm_jax.mini.world.sampler import digit_pool
from mllm_jax.mini.world.scene import COLORS, LIGHTING, QUALITY, RGB, SCENES, SHAPES, STYLES, TOPICS, WORDS
from mllm_jax.mini.world.targets import patch_owners


@pytest.fixture(scope="module")
def scenes():
    return [sample_scene(11, i, SPLITS[i % 4]) for i in range(900)]


def test_scenes_and_pictures_are_a_function_of_seed_index_and_split():
    a, b = sample_scene(3, 14, "pretrain"), sample_scene(3, 14, "pretrain")
    assert a == b
    assert np.array_equal(render_array(a), render_array(b))
    assert scene_from_json(json.loads(json.dumps(a.to_json()))) == a
    others = [sample_scene(3, 14, s) for s in SPLITS if s != "pretrain"]
    others += [sample_scene(4, 14, "pretrain"), sample_scene(3, 15, "pretrain")]
    assert len({s.texture for s in [a, *others]}) == 6


def test_splits_share_no_scene():
    textures = {split: {sample_scene(0, i, split).texture for i in range(150)} for split in SPLITS}
    assert len(set.union(*textures.values())) == 150 * len(SPLITS)


def test_unknown_split_is_named():
    with pytest.raises(ValueError, match="unknown split 'test'; one of foundation, pretrain"):
        sample_scene(0, 0, "test")


def test_benchmark_digits_are_its_own(scenes):
    for digit in range(10):
        mini, train = set(digit_pool("mini", digit)), set(digit_pool("finetune", digit))
        assert len(mini) > 30
        assert len(train) > 120
        assert not mini & train
    shown = {split: set() for split in SPLITS}
    for scene in scenes:
        shown[scene.split] |= {t.digit_index for t in scene.of_kind("digit")}
    assert len(shown["mini"]) > 40
    assert not shown["mini"] & (shown["foundation"] | shown["pretrain"] | shown["finetune"])


def test_every_class_occurs(scenes):
    assert {s.background for s in scenes} == set(SCENES)
    assert {s.lighting for s in scenes} == set(LIGHTING)
    assert {s.style for s in scenes} == set(STYLES)
    assert {s.quality for s in scenes} == set(QUALITY)
    assert {s.topic for s in scenes} == set(TOPICS)
    things = [t for s in scenes for t in s.things]
    assert {t.shape for t in things if t.kind == "shape"} == set(SHAPES)
    assert {t.color for t in things} == set(COLORS)
    assert {t.word for t in things if t.kind == "word"} == set(WORDS)
    assert {t.digit for t in things if t.kind == "digit"} == set(range(10))
    assert {t.value for t in things if t.kind == "bar"} == {1, 2, 3, 4, 5}
    simple = [s for s in scenes if len(s.things) == 1 and s.background == "plain"]
    assert 0.1 < len(simple) / len(scenes) < 0.25


def test_things_lie_inside_apart_and_clearly_in_one_cell(scenes):
    for scene in scenes:
        things = scene.of_kind("shape", "digit", "word")
        assert [t.cell for t in things] == sorted({t.cell for t in things})  # raster order, one per cell
        boxes = [np.array(silhouette(t)) for t in things]
        if scene.panel:
            x, y, w, h = scene.panel
            boxes.append(np.array([(x - w, y - h), (x + w, y + h)]))
        for points in boxes:
            assert points.min() >= 0
            assert points.max() <= 1
        for i, a in enumerate(boxes):
            for b in boxes[i + 1 :]:
                apart = (a.min(0) > b.max(0)) | (b.min(0) > a.max(0))
                assert apart.any(), scene
        for thing in things:
            for centre in (thing.x, thing.y):
                assert min(abs(centre - 1 / 3), abs(centre - 2 / 3)) > 0.029


def test_sizes_and_topics_mean_what_they_say(scenes):
    for scene in scenes:
        for t in scene.shapes:
            assert (max(t.w, t.h) < 0.1) == (t.size == "small")
        kinds = [t.kind for t in scene.things]
        cards = "numbers" if kinds.count("digit") == 2 else "words" if "word" in kinds else "shapes"
        topic = "chart" if "bar" in kinds else cards
        assert scene.topic == topic
        assert scene.things


def test_render_sizes_and_looks():
    scene = sample_scene(0, 1, "finetune")
    assert render(scene).size == (112, 112)
    assert render_array(scene, 56).shape == (56, 56, 3)
    assert render_array(scene, 84).dtype == np.uint8


LOOKS = {"style": STYLES, "quality": QUALITY, "lighting": LIGHTING}


@pytest.mark.parametrize(("field", "values"), LOOKS.items(), ids=LOOKS)
def test_looks_differ_even_at_56_pixels(field, values):
    base = next(
        s for s in (sample_scene(5, i, "finetune", FULL) for i in range(400))
        if s.background == "forest" and s.style == "flat" and s.quality == "clear" and s.lighting == "day"
    )  # fmt: skip
    pictures = [render_array(dataclasses.replace(base, **{field: v}), 56).astype(float) for v in values]
    for i, a in enumerate(pictures):
        for b in pictures[i + 1 :]:
            assert np.abs(a - b).mean() > 3


def plain_pictures(n):
    found = []
    for i in range(4000):
        s = sample_scene(2, i, "foundation")
        if (s.style, s.quality, s.background) == ("flat", "clear", "plain"):
            found.append(s)
        if len(found) == n:
            return found
    raise AssertionError("too few flat, clear, plain pictures")


@pytest.mark.parametrize("grid", [8, 12, 16])
def test_patch_targets_agree_with_the_drawn_colors(grid):
    checked = 0
    for scene in plain_pictures(40):
        size = 112 if 112 % grid == 0 else grid * 9
        picture = render_array(scene, size).astype(int).reshape(grid, size // grid, grid, size // grid, 3)
        middle = np.median(picture.transpose(0, 2, 1, 3, 4).reshape(grid * grid, -1, 3), axis=1)
        targets, owners = patch_targets(scene, grid), patch_owners(scene, grid)
        assert ((owners == 0) == (targets["shape"] == 0)).all()
        inner = _inner(owners.reshape(grid, grid))
        for patch in np.flatnonzero(inner):
            thing = scene.things[owners[patch] - 1] if owners[patch] else None
            if thing is None and scene.panel is None:
                assert np.abs(middle[patch] - scene.backdrop).max() <= 3
                assert targets["color"][patch] == 0
                checked += 1
            elif thing is not None and thing.kind == "shape":
                name = PATCH_CLASSES["color"][targets["color"][patch]]
                nearest = min(RGB, key=lambda c: np.abs(middle[patch] - RGB[c]).sum())
                assert nearest == name == thing.color
                assert PATCH_CLASSES["shape"][targets["shape"][patch]] == thing.shape
                checked += 1
    assert checked > 500


def _inner(owners):
    """Patches whose eight neighbours show the same (a thing's patch at the picture's edge is none)."""
    padded = np.pad(owners, 1)
    n = len(owners)
    same = [padded[i : i + n, j : j + n] == owners for i in range(3) for j in range(3)]
    return np.logical_and.reduce(same).reshape(-1)


def test_every_thing_has_a_patch_at_every_grid(scenes):
    for scene in scenes[:100]:
        for grid in (8, 12, 16):
            assert set(patch_owners(scene, grid)) >= set(range(1, len(scene.things) + 1))


def test_patch_targets_name_digits_words_and_bars(scenes):
    seen = set()
    for scene in scenes[:100]:
        targets = patch_targets(scene, 16)
        for thing in scene.things:
            at = int(thing.y * 16) * 16 + int(thing.x * 16)
            found = {k: PATCH_CLASSES[k][v[at]] for k, v in targets.items()}
            assert found["color"] == thing.color
            assert found["shape"] == (thing.shape or thing.kind)
            assert found["digit"] == (str(thing.digit) if thing.kind == "digit" else "none")
            assert found["word"] == (thing.word or "none")
            assert found["size"] == (thing.size or "none")
            seen.add(thing.kind)
        for name, values in targets.items():
            assert values.shape == (256,)
            assert values.dtype == np.int32
            assert values.max() < len(PATCH_CLASSES[name])
    assert seen == {"shape", "digit", "word", "bar"}


def test_global_targets(scenes):
    for scene in scenes[:100]:
        targets = global_targets(scene)
        named = {k: GLOBAL_CLASSES[k][v] for k, v in targets.items()}
        assert set(targets) == set(GLOBAL_CLASSES)
        assert (named["scene"], named["style"], named["quality"], named["topic"], named["lighting"]) == (
            scene.background, scene.style, scene.quality, scene.topic, scene.lighting,
        )  # fmt: skip
        assert sum(targets[f"count_{shape}"] for shape in SHAPES) == len(scene.shapes)
        assert targets["things"] + targets["bars"] == len(scene.things)
        (*more, only) = scene.of_kind("shape", "digit", "word") or (None, None)
        assert named["position"] == ("none" if more or only is None else only.position)


def test_contact_sheet_shows_all_pictures():
    sheet = np.asarray(contact_sheet(4, seed=0))
    assert sheet.shape[0] > 2 * 224  # two rows
    first = render(sample_scene(0, 0, "finetune")).resize((224, 224), 0)
    assert np.array_equal(sheet[:224, :224], np.asarray(first))


def test_digits_are_those_of_scikit_learn():
    from sklearn.datasets import load_digits

    bunch = load_digits()
    images, labels = digits()
    np.testing.assert_array_equal(images, bunch.images)
    np.testing.assert_array_equal(labels, bunch.target)
