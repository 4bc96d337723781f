"""The same two stages at quarter scale: mini world, mini tower and mini LLM, in minutes on two CPU cores.

84 px stand for 336, 56 for 224 and 112 for 448; connectors have widths in proportion (`mllm_jax.mini.connectors`).
"""

from typing import Any

from ml_collections import ConfigDict

from mllm_jax.config import benchmark_config, default_config, source_config, stage_config
from mllm_jax.connectors import CONNECTORS
from mllm_jax.mini.connectors import mini_options, visual_tokens

# Samples of a study's cell; the quickstart's half as many leave places and charts to chance and the seed.
STUDIED = {"pretrain": 4800, "finetune": 3600}
# What a row of a study has room for: tokens beside the images, and images. The longest caption takes about 95 tokens
# (45 on average), the longest conversation about 360 (184 on average).
ROWS = {"pretrain": (144, 3), "finetune": (384, 2)}


def mini_config(connector: str = "mlp2x_gelu", tokens: int = 36) -> ConfigDict:
    """The recipe of `configs/quickstart.py`.

    Args:
      connector: a name from `connectors.CONNECTORS`.
      tokens: visual tokens per image, for the connectors that have the option.
    """
    config = default_config()
    config.seed = 0
    config.mesh.cpu_devices = 2  # each trains on rows of its own, on a core of its own
    config.model.connector.name = connector
    for name, options in config.model.connector.items():
        if isinstance(options, ConfigDict):
            options.update(mini_options(name, tokens))
    config.model.vision.image_size = 84  # the quarter-scale counterpart of 336
    config.model.vision.remat = config.model.llm.remat = "none"  # memory is not short here
    visual = visual_tokens(connector, tokens) if connector in CONNECTORS else 0  # a wrong name is told later
    config.data.seq_len = 256 + visual
    config.data.label_tokens = 192
    config.data.aspect = "square"
    config.data.threads = 1
    config.eval.template = "mini"

    pretrain = stage_config()
    pretrain.template = "plain"
    pretrain.sources = {"captions": _mini_world("pretrain", "caption", 2700)}
    # Samples share rows, which are shorter for a connector with fewer visual tokens. A row holds three captions of 44
    # tokens on average and their images.
    pretrain.samples_per_row = pretrain.image_slots = 3
    pretrain.seq_len = _rounded(3 * (48 + visual))
    pretrain.batch_size = 6  # two rows; many small steps teach more in a minute than few large ones
    pretrain.optimizer = "muon"  # a tenth of AdamW's steps at this size
    pretrain.learning_rate = 2e-3
    pretrain.matrix_learning_rate = 0.02
    pretrain.log_every = 50
    pretrain.checkpoint_every = 400

    finetune = stage_config()
    finetune.trainable = ("connector/.*", "llm/.*")
    finetune.template = "mini"
    finetune.sources = {"instructions": _mini_world("finetune", "instruct", 2000)}
    # Conversations have 184 tokens on average, and 9 of 10 an image.
    finetune.samples_per_row, finetune.image_slots = 4, 2
    finetune.seq_len = _rounded(2 * (186 + visual))
    finetune.batch_size = 4
    finetune.optimizer = "muon"
    finetune.learning_rate = 5e-4
    finetune.matrix_learning_rate = 0.004
    finetune.log_every = 25
    finetune.checkpoint_every = 200

    config.stages = {"pretrain": pretrain, "finetune": finetune}
    config.stage_order = ("pretrain", "finetune")

    config.eval.benchmarks = {"mini": benchmark_config()}
    config.eval.benchmarks.mini.count = 40
    config.eval.batch_size = 64
    config.eval.max_new_tokens = 8
    return config


def study_config(
    connector: str, image_size: int = 84, tokens: int = 36, options: dict[str, Any] | None = None
) -> ConfigDict:
    """`mini_config` on the terms of a study: all cells see the same samples in the same steps.

    Samples share rows by their text alone, so that they are the same rows for every connector; one with fewer visual
    tokens has shorter ones. Images and questions are those of one seed, whatever the run's own; the tower's features
    are computed once. A run is one device, so that two of them share two cores.

    Args:
      connector, tokens: as for `mini_config`.
      image_size: 56, 84 or 112.
      options: of the connector, beside those of its size.
    """
    config = mini_config(connector, tokens)
    if options:  # a connector without options has no place for them
        config.model.connector[connector].update(options)
    config.model.vision.image_size = image_size
    config.data.seed = 0
    config.mesh.cpu_devices = 1
    config.stages.pretrain.batch_size = 3  # a row
    visual = visual_tokens(connector, tokens, image_size, options)
    config.data.seq_len = max(text for text, _ in ROWS.values()) + visual
    for name, stage in config.stages.items():
        text, slots = ROWS[name]
        stage.seq_len, stage.image_slots, stage.pack_by = text + slots * visual, slots, "text"
        stage.cache_features = True
        for source in stage.sources.values():
            source.count = STUDIED[name]
    config.eval.benchmarks.mini.count = 100
    return config


def _rounded(tokens: int) -> int:
    return -(-tokens // 32) * 32


def _mini_world(split: str, form: str, count: int) -> ConfigDict:
    source = source_config()
    source.kind, source.split, source.form, source.count = "mini_world", split, form, count
    return source
