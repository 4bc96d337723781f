"""`pack_by=text`: rows that do not depend on the connector, from the prepared data of a stage."""

import pytest

from mllm_jax.inference import runs
from mllm_jax.training.sources import packing_plan, prepare_sources, stage_iterator


def batches(config, tokenizer, directory):
    """(ids of the rows of each batch, tokens of a row) of the stage finetune."""
    stage, model = config.stages.finetune, runs.model_config(config)
    prepared = prepare_sources(config, "finetune", model, tokenizer, directory)
    plan = packing_plan(config, stage, model, tokenizer, prepared, directory)
    with stage_iterator(config, stage, model, tokenizer, prepared, plan) as found:
        seen = [(batch.ids, batch.arrays.tokens.shape[1]) for batch in found]
    return [ids for ids, _ in seen], {length for _, length in seen}


@pytest.fixture
def packed(tiny_config):
    stage = tiny_config.stages.finetune
    stage.steps, stage.epochs, stage.batch_size = None, 1, 6
    stage.samples_per_row, stage.image_slots, stage.pack_by = 4, 6, "text"
    return tiny_config


def test_rows_are_the_same_with_fewer_visual_tokens(packed, tiny_tokenizer, tmp_path):
    found = {}
    for connector in ("linear", "average_pool"):
        packed.model.connector.name = connector
        packed.model.connector.average_pool.tokens = 4
        visual = runs.model_config(packed).visual_layout.most_tokens
        packed.stages.finetune.seq_len = 160 + 6 * visual
        found[connector] = *batches(packed, tiny_tokenizer, tmp_path), visual
    (rows, long, many), (others, short, few) = found.values()
    assert rows == others
    assert (long, short) == ({160 + 6 * many}, {160 + 6 * few})
    assert many > few
    assert any("," in ids for batch in rows for ids in batch)  # there are rows of several samples
