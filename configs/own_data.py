"""Both stages on a user's own data with the mini tower and mini LLM; paths come from the command line (see README).

    --config.stages.pretrain.sources.main.json=captions.json   stage 1: one question and its caption per sample
    --config.stages.finetune.sources.main.json=train.json      stage 2: conversations
    --config.eval.benchmarks.main.path=test.json               questions with short answers

The argument `finetune` leaves stage 1 out, `pretrain` leaves stage 2 out: `--config=configs/own_data.py:finetune`.
For a real tower and LLM set `model.vision.path`, `model.llm.path`, `model.vision.image_size` and the templates.
"""

from ml_collections import ConfigDict

from mllm_jax.config import ConfigError, benchmark_config, default_config, source_config, stage_config


def get_config(stages: str = "both") -> ConfigDict:
    if stages not in ("both", "pretrain", "finetune"):
        raise ConfigError(f"configs/own_data.py:{stages}: choose both, pretrain or finetune")
    config = default_config()
    config.seed = 0
    config.model.vision.image_size = 84
    config.model.vision.remat = config.model.llm.remat = "none"
    config.data.seq_len = 512
    config.data.aspect = "pad"
    config.data.threads = 1
    config.eval.template = "mini"

    pretrain = stage_config()
    pretrain.template = "plain"
    pretrain.batch_size = 16
    pretrain.optimizer = "muon"
    pretrain.learning_rate = 2e-3
    pretrain.matrix_learning_rate = 0.02

    finetune = stage_config()
    finetune.trainable = ("connector/.*", "llm/.*")
    finetune.template = "mini"
    finetune.batch_size = 16
    finetune.optimizer = "muon"
    finetune.learning_rate = 1e-3
    finetune.matrix_learning_rate = 0.005
    finetune.epochs = 3

    order = {"both": ("pretrain", "finetune"), "pretrain": ("pretrain",), "finetune": ("finetune",)}[stages]
    available = {"pretrain": pretrain, "finetune": finetune}
    for stage in available.values():
        stage.sources = {"main": source_config()}
        stage.log_every = 10
        stage.checkpoint_every = 100
    config.stages = {name: available[name] for name in order}
    config.stage_order = order

    config.eval.benchmarks = {"main": benchmark_config()}
    config.eval.benchmarks.main.kind = "caption" if stages == "pretrain" else "vqa"
    config.eval.batch_size = 64
    return config
