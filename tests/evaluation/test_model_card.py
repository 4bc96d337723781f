"""The README.md beside an export."""

import json

import pytest

from mllm_jax.cli.export import FORMATS
from mllm_jax.config import resolved
from mllm_jax.evaluation import model_card

SUMMARY = {
    "model": {
        "connector": "average_pool", "connector_options": {}, "visual_tokens": 4, "image_size": 28, "vision": "v",
        "llm": "l", "parameters": {},
    },
    "benchmarks": {
        "shapes": {
            "kind": "vqa",
            "groups": {},
            "rows": [{"level": "total", "name": "all", "group": "", "n": 8, "values": {"model": 0.625}}],
            "scores": {"n": 8},
        }
    },
}  # fmt: skip


@pytest.fixture
def run(tmp_path, tiny_config):
    """A work directory as a run leaves it, weights aside."""
    directory = tmp_path / "my_run"
    (directory / "eval").mkdir(parents=True)
    (directory / "config.json").write_text(json.dumps(resolved(tiny_config)))
    noted = {
        f"{stage}/{source}": f"digest-of-{stage}"
        for stage in tiny_config.stage_order
        for source in tiny_config.stages[stage].sources
    }
    (directory / "sources.json").write_text(json.dumps(noted))
    (directory / "eval" / "summary.json").write_text(json.dumps(SUMMARY))
    return directory


def test_every_format_says_how_it_is_loaded():
    assert set(model_card.LOADING) == set(FORMATS)


def test_of_a_run(run, tmp_path, tiny_config):
    first, last = tiny_config.stage_order
    target = tmp_path / "out"
    target.mkdir()
    model_card.write(target, str(run), "safetensors", last)
    card = (target / "README.md").read_text()
    for words in (
        'mllm_jax.load("out")',
        "the run my",
        "average",
        f"digest-of-{first}",
        "62.5",
        "### shapes",
    ):
        assert words in card
    recipe = card.partition("## Recipe")[2].partition("```json")[2].partition("```")[0]
    assert json.loads(recipe) == json.loads(json.dumps(resolved(tiny_config)))
    model_card.write(target, str(run), "safetensors", first)  # what somebody has written there stays
    assert (target / "README.md").read_text() == card


def test_of_an_earlier_stage_no_scores_and_no_later_data_are_told(run, tmp_path, tiny_config):
    first, last = tiny_config.stage_order
    model_card.write(tmp_path, str(run), "llm", first)
    card = (tmp_path / "README.md").read_text()
    assert "evaluation is of its last stage" in card
    assert f"digest-of-{first}" in card
    assert f"digest-of-{last}" not in card
    assert "62.5" not in card
