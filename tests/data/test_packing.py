"""Packing plans: every sample once an epoch, within all limits together, a pure function of sizes, seed and epoch."""

import importlib.util
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax.data import packing
from mllm_jax.data.packing import PackingPlan, RowLimits, by_text, pack


def llava_like(count, **options):
    """Sizes as `benchmarks/packing.py` draws them."""
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "packing.py"
    spec = importlib.util.spec_from_file_location("packing_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.llava_like(count, **options)


def draws(epoch):
    """60 of the numbers below 60, some of them several times."""
    return np.random.default_rng(epoch).integers(0, 60, 60)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_each_sample_is_in_one_row_and_rows_keep_all_limits(data):
    limits = RowLimits(*(data.draw(st.integers(1, most)) for most in (40, 5, 30, 6)))
    count = data.draw(st.integers(1, 60))
    sizes = np.array(
        [
            [
                data.draw(st.integers(1 if i in (0, 3) else 0, int(most)))
                for i, most in enumerate(limits.array)
            ]
            for _ in range(count)
        ]
    )
    sizes[:, 3] = 1
    kinds, packing.KINDS = packing.KINDS, data.draw(st.sampled_from([1, 8, 4096]))
    try:
        rows = pack(sizes, limits, np.random.default_rng(0))
    finally:
        packing.KINDS = kinds
    assert sorted(sample for row in rows for sample in row) == list(range(count))
    for row in rows:
        assert (sizes[row].sum(axis=0) <= limits.array).all()


@pytest.mark.parametrize(
    "limits", [RowLimits(200, 4, 200, 9), RowLimits(200, 4, 40, 9)], ids=["tokens", "labels"]
)
@pytest.mark.parametrize("kinds", [4, 4096])
def test_no_row_of_any_epoch_has_more_supervised_tokens_than_is_said(limits, kinds, monkeypatch):
    monkeypatch.setattr(packing, "KINDS", kinds)
    rng = np.random.default_rng(0)
    sizes = np.stack(
        [rng.integers(20, 90, 80), rng.integers(0, 2, 80), rng.integers(0, 12, 80), np.ones(80, int)], 1
    )
    plan = PackingPlan(sizes, limits, seed=3, epochs=5)
    found = [sizes[plan[row], 2].sum() for row in range(len(plan))]
    assert max(found) <= plan.most_label_tokens() <= limits.label_tokens
    assert plan.most_label_tokens() < 60  # of 200 where only tokens are limited
    drawn = PackingPlan(sizes[:60], limits, seed=3, epochs=2, draws=draws)
    assert drawn.most_label_tokens() == limits.label_tokens


@pytest.mark.parametrize(("visual", "length", "share"), [(576, 4096, 0.975), (144, 2048, 0.99)])
def test_useful_share_of_llava_like_lengths(visual, length, share):
    sizes = llava_like(4000, visual=visual)
    limits = RowLimits(length, length // visual + 1, length, 64)
    rows = pack(sizes, limits, np.random.default_rng(0))
    assert sizes[:, 0].sum() / (len(rows) * length) > share
    assert sizes[:, 0].mean() / 2048 < 0.5  # what one sample a row of LLaVA's length would use


def test_a_sample_beyond_the_limits_has_a_row_of_its_own():
    rows = pack(
        np.array([[3, 0, 1, 1], [50, 0, 1, 1], [3, 0, 1, 1]]),
        RowLimits(10, 1, 9, 4),
        np.random.default_rng(0),
    )
    assert sorted(rows) == [[0, 2], [1]]


def test_rows_are_a_function_of_sizes_seed_and_epoch():
    sizes, limits = llava_like(300), RowLimits(4096, 8, 4096, 64)
    plan = PackingPlan(sizes, limits, 0, 3)
    rows = [plan[g] for g in range(len(plan))]
    assert len(rows) % 3 == 0
    size = len(rows) // 3
    per_epoch = [rows[i * size : (i + 1) * size] for i in range(3)]  # epochs follow each other
    for some in per_epoch:
        assert sorted(sample for row in some for sample in row) == list(range(300))
        for row in some:
            assert (sizes[row].sum(axis=0) <= limits.array).all()
    assert len({tuple(sample for row in some for sample in row) for some in per_epoch}) == 3
    assert len({tuple(sorted(map(tuple, some))) for some in per_epoch}) == 3  # others share a row
    # at random access, backwards, in a copy that was sent to another process
    again = pickle.loads(pickle.dumps(PackingPlan(sizes, limits, 0, 3)))
    assert [again[g] for g in reversed(range(len(rows)))] == rows[::-1]
    other = PackingPlan(sizes, limits, 1, 3)
    assert [other[g] for g in range(5)] != rows[:5]


def test_drawn_samples_are_packed_epoch_by_epoch():
    sizes, limits = llava_like(60), RowLimits(4096, 8, 4096, 64)
    plan = PackingPlan(sizes, limits, 0, 2, draws)
    rows = [plan[g] for g in range(len(plan))]
    drawn = [sorted(draws(epoch).tolist()) for epoch in range(2)]
    assert drawn[0] != drawn[1]
    packed = sorted(sample for row in rows for sample in row)
    assert packed == sorted(drawn[0] + drawn[1])
    ends = np.cumsum([len(row) for row in rows])
    first = int(np.flatnonzero(ends == 60)[0]) + 1  # epochs follow each other
    assert sorted(sample for row in rows[:first] for sample in row) == drawn[0]
    again = PackingPlan(sizes, limits, 0, 2, draws)
    assert [again[g] for g in reversed(range(len(rows)))] == rows[::-1]


def test_an_epoch_is_planned_once_and_when_it_is_reached(monkeypatch):
    """The rows' make-up is found once for all; their number is known before an epoch is dealt out."""
    dealt, made = [], []
    epoch, lay_out = packing._Epoch, packing.lay_out
    monkeypatch.setattr(packing, "_Epoch", lambda *of: (dealt.append(1), epoch(*of))[1])
    monkeypatch.setattr(packing, "lay_out", lambda *of: (made.append(1), lay_out(*of))[1])
    plan = PackingPlan(llava_like(100), RowLimits(4096, 8, 4096, 64), 0, 3)
    size = len(plan) // 3
    assert (len(made), len(dealt)) == (1, 0)
    for reached in range(3):
        for row in range(reached * size, (reached + 1) * size):
            plan[row]
        assert (len(made), len(dealt)) == (1, reached + 1)


def test_the_work_grows_with_the_kinds_of_sizes_not_with_the_samples():
    """665,000 samples are planned in seconds, because a row is found once and repeated."""
    limits = RowLimits(4096, 8, 4096, 64)
    few = llava_like(2000)
    for sizes in (few, np.tile(few, (50, 1))):
        needs, kinds = packing._kinds(sizes, limits.array)
        found = list(packing._fill_rows(needs, np.bincount(kinds), limits.array))
        assert len(found) < 2 * len(needs) < 2000


def test_many_sizes_are_rounded_up_until_they_are_few(monkeypatch):
    monkeypatch.setattr(packing, "KINDS", 100)
    sizes = llava_like(2000)
    needs, kinds = packing._kinds(sizes, RowLimits(4096, 8, 1024, 64).array)
    assert len(needs) <= 100
    assert (needs[kinds] >= np.minimum(sizes, [4096, 8, 1024, 64])).all()


def test_a_plan_without_end_and_one_with():
    sizes, limits = llava_like(50), RowLimits(4096, 8, 4096, 64)
    endless, ended = PackingPlan(sizes, limits, 0, None), PackingPlan(sizes, limits, 0, 2)
    assert [endless[g] for g in range(len(ended))] == [ended[g] for g in range(len(ended))]
    assert endless[10**6]
    for row in (len(ended), -1):
        with pytest.raises(IndexError, match="of a plan of"):
            ended[row]


def test_rows_by_text_are_the_same_for_any_number_of_visual_tokens():
    rng = np.random.default_rng(0)
    text, images = rng.integers(5, 380, 300), rng.integers(0, 3, 300)
    plans = []
    for visual in (16, 36, 256):
        sizes = np.stack([text + images * visual, images, text // 9, np.ones(300, int)], axis=1)
        limits = RowLimits(384 + 2 * visual, 2, 192, 8)
        plan = PackingPlan(*by_text(sizes, limits, visual), seed=3, epochs=2)
        plans.append([plan[i] for i in range(len(plan))])
        assert all((sizes[row].sum(axis=0) <= limits.array).all() for row in plans[-1])
    assert plans[0] == plans[1] == plans[2]
    assert sum(len(row) > 1 for row in plans[0]) > 100


def test_slots_that_leave_no_room_for_text_are_an_error():
    with pytest.raises(
        ValueError, match=r"2 image slots of 100 visual tokens leave no room .* rows of 200 tokens"
    ):
        by_text(np.array([[110, 1, 5, 1]]), RowLimits(200, 2, 50, 8), 100)
