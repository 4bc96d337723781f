"""Packing plans: every sample once an epoch, within all limits together, a pure function of sizes, seed and epoch."""

import importlib.util
import pathlib
import pickle

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mllm_jax.data import packing
from mllm_jax.data.packing import PackingPlan, RowLimits, pack


def llava_like(count, **options):
    """Sizes as `benchmarks/packing.py` draws them."""
    path = pathlib.Path(__file__).parents[2] / "benchmarks" / "packing.py"
    spec = importlib.util.spec_from_file_location("packing_benchmark", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.llava_like(count, **options)


class Order:
    """A seeded order of each epoch."""

    def __init__(self, count, seed=0):
        self.count, self.seed = count, seed

    def __call__(self, place):
        epoch, i = divmod(place, self.count)
        return int(np.random.default_rng([self.seed, epoch]).permutation(self.count)[i])


def plan_of(sizes, limits, seed=0, epochs=1):
    return PackingPlan(len(sizes), Order(len(sizes), seed), sizes, limits, seed, epochs)


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
    packing_window, packing.WINDOW = packing.WINDOW, data.draw(st.sampled_from([4, 16, 1024]))
    try:
        rows = pack(sizes, limits, np.random.default_rng(0))
    finally:
        packing.WINDOW = packing_window
    assert sorted(sample for row in rows for sample in row) == list(range(count))
    for row in rows:
        assert (sizes[row].sum(axis=0) <= limits.array).all()


@pytest.mark.parametrize(("visual", "length"), [(576, 4096), (144, 2048)])
def test_useful_share_of_llava_like_lengths(visual, length):
    sizes = llava_like(4000, visual=visual)
    limits = RowLimits(length, length // visual + 1, length, 64)
    rows = pack(sizes, limits, np.random.default_rng(0))
    assert sizes[:, 0].sum() / (len(rows) * length) > 0.97
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
    plan = plan_of(sizes, limits, epochs=3)
    rows = [plan[g] for g in range(len(plan))]
    per_epoch = [[row for row in rows if row[0] // 300 == epoch] for epoch in range(3)]
    assert [row for epoch in per_epoch for row in epoch] == rows  # epochs follow each other
    for epoch, some in enumerate(per_epoch):
        assert sorted(place for row in some for place in row) == list(range(300 * epoch, 300 * (epoch + 1)))
    assert len({tuple(place % 300 for row in some for place in row) for some in per_epoch}) == 3
    # at random access, backwards, in a copy that was sent to another process
    again = pickle.loads(pickle.dumps(plan_of(sizes, limits, epochs=3)))
    assert [again[g] for g in reversed(range(len(rows)))] == rows[::-1]
    other = plan_of(sizes, limits, seed=1)
    assert [other[g] for g in range(5)] != rows[:5]


def test_a_plan_without_end_and_one_with():
    sizes, limits = llava_like(50), RowLimits(4096, 8, 4096, 64)
    endless = plan_of(sizes, limits, epochs=None)
    ended = plan_of(sizes, limits, epochs=2)
    assert [endless[g] for g in range(len(ended))] == [ended[g] for g in range(len(ended))]
    assert endless[len(ended)][0] >= 100
    for row in (len(ended), -1):
        with pytest.raises(IndexError, match="of a plan of"):
            ended[row]
