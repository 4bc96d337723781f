"""Notes and the rows they are packed in, checked against the scene they describe."""

import itertools

import numpy as np
import pytest

from mllm_jax.interop import load_tokenizer
from mllm_jax.mini.foundation import notes, text
from mllm_jax.mini.world import sample_scene
from mllm_jax.mini.world.targets import patch_owners

PHASE = {
    "steps": 2, "batch": 3, "length": 256, "context_weight": 0.25, "notes": 0.5, "short": True, "grids": (4, 6),
    "questions": 3, "things": 3, "describe": 0.3, "describe_weight": 0.5, "crowded": 0.5, "keep": 0.85,
    "abilities": (), "bare": 0.5, "drill": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("mini")


def _words(tokenizer, bag):
    return set(tokenizer.decode(bag[bag > 0]).split())


def test_a_cell_holds_words_of_what_is_there(tokenizer, monkeypatch):
    monkeypatch.setattr(notes, "KEEP_BACKGROUND", 1.0)
    seen = set()
    for index in range(60):
        scene = sample_scene(0, index, "foundation")
        bags = notes.cells(scene, 6, np.random.default_rng(0), tokenizer, keep=1.0)
        for owner, bag in zip(patch_owners(scene, 6), bags, strict=True):
            found = _words(tokenizer, bag)
            if owner == 0:
                assert {scene.background, scene.style, scene.quality, scene.topic} <= found
                continue
            thing = scene.things[owner - 1]
            seen.add(thing.kind)
            assert thing.color in found
            if thing.kind != "bar":
                assert set(thing.position.split()) <= found
            if thing.kind == "shape":
                assert {thing.shape, thing.size} <= found
            elif thing.kind == "digit":
                assert str(thing.digit) in found
            elif thing.kind == "word":
                assert thing.word in found
            else:
                assert str(thing.value) in found
    assert seen == {"shape", "digit", "word", "bar"}


def test_words_are_left_out_at_the_stated_rates(tokenizer):
    kept = {True: [], False: []}
    for index in range(40):
        scene = sample_scene(1, index, "foundation")
        rng = np.random.default_rng(index)
        owners = patch_owners(scene, 12)
        bags = notes.cells(scene, 12, rng, tokenizer)
        words = [notes.background_words(scene), *(notes.thing_words(scene, t) for t in scene.things)]
        full = np.array([sum(len(notes.word_ids(tokenizer, w)) for w in words[o]) for o in owners])
        found = (bags > 0).sum(1)
        for number, thing in enumerate(scene.things, start=1):
            center = int(thing.y * 12) * 12 + int(thing.x * 12)
            if owners[center] == number:
                assert found[center] == full[center]
                owners[center] = -1
        for background in (True, False):
            which = owners == 0 if background else owners > 0
            kept[background].append((found[which].sum(), full[which].sum()))
    for background, rate in ((True, notes.KEEP_BACKGROUND), (False, notes.KEEP_THING)):
        part, whole = np.sum(kept[background], axis=0)
        assert part / whole == pytest.approx(rate, abs=0.02)


def test_no_bag_overflows(tokenizer):
    most = 0
    for index in range(300):
        scene = sample_scene(2, index, "foundation")
        for words in [notes.background_words(scene), *(notes.thing_words(scene, t) for t in scene.things)]:
            most = max(most, sum(len(notes.word_ids(tokenizer, word)) for word in words))
    assert 6 < most <= notes.WORDS_PER_CELL


def test_packed_rows_put_every_bag_at_its_visual_position(tokenizer):
    batch = next(text.packed_batches(tokenizer, 0, PHASE))
    visual = batch["visual_index"] >= 0
    assert visual.any()
    assert not visual.all()
    assert not batch["bags"][~visual].any()
    assert (batch["tokens"][visual] == 0).all()
    assert (batch["loss_weights"][visual] == 0).all()
    assert set(np.unique(batch["loss_weights"])) == {np.float32(v) for v in (0, 0.25, 0.5, 1)}
    # the same conversations again, by themselves
    samples = [text.pretraining_sample(tokenizer, 0, index, PHASE) for index in range(40)]
    expected = np.concatenate([s.bags for s in samples])
    packed = np.concatenate([row[v] for row, v in zip(batch["bags"], visual, strict=True)])
    np.testing.assert_array_equal(packed, expected[: len(packed)])


def test_a_resumed_run_goes_on_with_the_same_batches_and_repeats_none(tokenizer):
    batches = list(itertools.islice(text.packed_batches(tokenizer, 0, PHASE, 7), 3))
    assert {b["tokens"].shape for b in batches} == {(3, 256)}
    resumed = next(text.packed_batches(tokenizer, 0, PHASE, 7, start=2))
    for key, value in batches[2].items():
        np.testing.assert_array_equal(resumed[key], value)
    assert not np.array_equal(batches[0]["tokens"], batches[1]["tokens"])
    assert batches[0]["noise_seed"] < 7 + text.conversations(PHASE)


@pytest.mark.parametrize("crowded", [False, True])
def test_noted_scenes_keep_few_things_that_questions_can_tell_apart(crowded):
    scenes = [notes.noted_scene(0, index, 3, crowded) for index in range(80)]
    for scene in scenes:
        assert len(scene.things) - len(scene.bars) <= 3
        assert len(scene.of_kind("word")) <= 1
        assert len(scene.bars) in (0, 3)
        assert len(set(map(id, scene.things))) == len(scene.things)
    assert any(len(scene.things) == 3 for scene in scenes)


def test_questions_are_of_the_abilities_asked_for_and_differ(tokenizer):
    for index in range(20):
        scene = notes.noted_scene(0, index, 9, crowded=True)
        asked = notes.pick(scene, np.random.default_rng(index), 8, ("localization", "reading"))
        assert {q.ability for q in asked} <= {"localization", "reading"}
        assert len({q.text for q in asked}) == len(asked) <= 8


def test_as_many_questions_as_fit_and_one_that_never_fits_is_named(tokenizer):
    whole = [notes.note_sample(tokenizer, 0, i, PHASE | {"describe": 0.0, "length": 1000}) for i in range(30)]
    short = [notes.note_sample(tokenizer, 0, i, PHASE | {"describe": 0.0, "length": 100}) for i in range(30)]
    assert max(map(len, short)) <= 100 < max(map(len, whole))
    for one, other in zip(short, whole, strict=True):
        np.testing.assert_array_equal(one.encoded.tokens, other.encoded.tokens[: len(one)])
    with pytest.raises(ValueError, match=r"(note|text) \d+"):
        next(text.packed_batches(tokenizer, 0, PHASE | {"length": 24}))
