"""Sums over graded answers."""

import json

import pytest

from mllm_jax.evaluation.benchmarks.answers import Answer, Answers


@pytest.mark.parametrize(
    ("credits", "cell"),
    [([True], "[1, 1]"), ([False], "[0, 1]"), ([True, True], "[2, 2]"), ([0.3, 1], "[1.3, 2]")],
)
def test_cells_are_numbers_in_json(credits, cell):
    answers = Answers(Answer(i, {}, {}, "", "", credit=one, part="a") for i, one in enumerate(credits))
    assert json.dumps(answers.cells()) == f'{{"a": {cell}}}'
