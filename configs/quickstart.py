"""The whole pipeline on a 2-core CPU in minutes: mini world, mini tower, mini LLM, both stages, evaluation.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python train.py --config=configs/quickstart.py:average_pool --workdir=runs/average_pool

The argument is the connector's name, at the mini tower's scale (`mllm_jax/mini/connectors.py`); a compressing one gets
1/4 of the 144 patch tokens, 1/9 with `--config.model.connector.average_pool.tokens=16`. 84 px stand for 336, 56 for
224 (`--config.model.vision.image_size=56`) and 112 for 448 (with `--config.data.seq_len=512
--config.stages.pretrain.seq_len=928 --config.stages.finetune.seq_len=896` for its 256 patch tokens).
"""

from ml_collections import ConfigDict

from mllm_jax.config import benchmark_config, default_config, source_config, stage_config
from mllm_jax.connectors import CONNECTORS
from mllm_jax.mini.connectors import mini_options, visual_tokens


def get_config(connector: str = "mlp2x_gelu") -> ConfigDict:
    config = default_config()
    config.seed = 0
    config.mesh.cpu_devices = 2  # each trains on rows of its own, on a core of its own
    config.model.connector.name = connector
    for name, options in config.model.connector.items():
        if isinstance(options, ConfigDict):
            options.update(mini_options(name, tokens=36))
    config.model.vision.image_size = 84  # the quarter-scale counterpart of 336
    config.model.vision.remat = config.model.llm.remat = "none"  # memory is not short here
    visual = visual_tokens(connector, 36) if connector in CONNECTORS else 0  # a wrong name is told later
    config.data.seq_len = 256 + visual
    config.data.label_tokens = 192
    config.data.aspect = "square"
    config.data.threads = 1
    config.eval.template = "mini"

    pretrain = stage_config()
    pretrain.template = "plain"
    pretrain.sources = {"captions": _mini_world("pretrain", "caption", 1600)}
    # Samples share rows, so that a connector with fewer visual tokens trains on fewer rows a step. A row holds three
    # captions of 44 tokens on average and their images.
    pretrain.samples_per_row = pretrain.image_slots = 3
    pretrain.seq_len = _rounded(3 * (48 + visual))
    pretrain.batch_size = 16
    pretrain.optimizer = "muon"  # a tenth of AdamW's steps at this size
    pretrain.learning_rate = 2e-3
    pretrain.matrix_learning_rate = 0.02
    pretrain.log_every = 10
    pretrain.checkpoint_every = 50

    finetune = stage_config()
    finetune.trainable = ("connector/.*", "llm/.*")
    finetune.template = "mini"
    finetune.sources = {"instructions": _mini_world("finetune", "instruct", 4800)}
    # Conversations have 184 tokens on average, and 9 of 10 an image.
    finetune.samples_per_row = 8
    finetune.image_slots = 2 if visual > 72 else 3
    finetune.seq_len = _rounded(finetune.image_slots * (186 + visual))
    finetune.batch_size = 16
    finetune.optimizer = "muon"
    finetune.learning_rate = 5e-4
    finetune.matrix_learning_rate = 0.004
    finetune.log_every = 10
    finetune.checkpoint_every = 100

    config.stages = {"pretrain": pretrain, "finetune": finetune}
    config.stage_order = ("pretrain", "finetune")

    config.eval.benchmarks = {"mini": benchmark_config()}
    config.eval.benchmarks.mini.count = 40
    config.eval.batch_size = 64
    config.eval.max_new_tokens = 8
    return config


def _rounded(tokens: int) -> int:
    return -(-tokens // 32) * 32


def _mini_world(split: str, form: str, count: int) -> ConfigDict:
    source = source_config()
    source.kind, source.split, source.form, source.count = "mini_world", split, form, count
    return source
