"""A stage made ready to train: its program and its batches, which decide each other's shapes."""

from typing import Any

from jax.sharding import Mesh
from ml_collections import ConfigDict

from mllm_jax.data.packing import PackingPlan
from mllm_jax.data.pipeline import TrainIterator
from mllm_jax.data.samples import Source
from mllm_jax.models.mllm import ModelConfig, Params
from mllm_jax.parallel.mesh import num_row_shards
from mllm_jax.parallel.row_parts import row_part
from mllm_jax.storage import Path
from mllm_jax.training.features import feature_cache
from mllm_jax.training.sources import stage_iterator
from mllm_jax.training.stage import StagePlan


def open_stage(
    config: ConfigDict,
    name: str,
    model: ModelConfig,
    tokenizer: Any,
    params: Params,
    sources: dict[str, Source],
    packing: PackingPlan | None,
    workdir: Path,
    mesh: Mesh,
) -> tuple[StagePlan, TrainIterator]:
    """The plan of stage `name` and the batches of this process, which the caller closes.

    With `cache_features` the features that are not there yet are computed now.

    Args:
      params: of the whole model before the stage; the vision encoder's are read.
      sources, packing: from `sources.prepare_sources` and `sources.packing_plan`.

    Raises:
      ImageError, DataError: naming sample and file; too little room for the features.
    """
    stage = config.stages[name]
    cache = feature_cache(config, stage, model, params, sources, workdir)
    multiple = num_row_shards(mesh) * stage.accumulation
    batches = stage_iterator(
        config, stage, model, tokenizer, sources, packing, cache, multiple, row_part(mesh)
    )
    steps = stage.steps or batches.num_batches
    return StagePlan(config, name, mesh, steps, batches.rows, batches.label_tokens), batches
