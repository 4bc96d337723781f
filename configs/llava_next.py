"""LLaVA-NeXT (LLaVA-1.6) 7B: images cut into tiles (AnyRes), all parts trained, the encoder at a rate of its own.

    python train.py --config=configs/llava_next.py --workdir=runs/llava_next \
        --config.model.connector.path=runs/llava15_connector \
        --config.stages.finetune.sources.main.json=llava_next_790k.json \
        --config.stages.finetune.sources.main.images=finetune/images

It starts from the connector of LLaVA-1.5's first stage, whose images are whole: `configs/llava15.py`, exported, or
LLaVA's `mm_projector.bin`. Learning rates and canvases are the published ones; rows hold the 4,096 tokens of Vicuna.

The argument `mini` (`--config=configs/llava_next.py:mini`) is both stages at the mini tower's scale: tiles of 56 px
of mini-world images with many aspect ratios, and then the mini benchmark on such images, in minutes on two CPU cores.
Any connector whose tokens lie on a grid:
`--config.model.connector.name=dci`; others with `--config.model.tiles.merge=flat`.
"""

from ml_collections import ConfigDict

from mllm_jax.config import ConfigError, benchmark_config, default_config, source_config, stage_config

EVERYTHING = ("vision/.*", "connector/.*", "separators/.*", "llm/.*")


def get_config(size: str = "7b") -> ConfigDict:
    if size not in ("7b", "mini"):
        raise ConfigError(f"configs/llava_next.py:{size}: choose 7b or mini")
    config = default_config()
    config.model.tiles.merge = "spatial_unpad"
    config.model.tiles.rounding = "round"  # as transformers' LLaVA-NeXT, so that it can be exported
    return _mini(config) if size == "mini" else _published(config)


def _published(config: ConfigDict) -> ConfigDict:
    config.model.vision.path = "openai/clip-vit-large-patch14-336"
    config.model.vision.image_size = 336
    config.model.llm.path = "lmsys/vicuna-7b-v1.5"
    config.model.dtype = config.model.frozen_dtype = "bfloat16"
    config.data.seq_len = 4096
    config.data.image_slots = 5  # the whole image and four tiles
    config.data.overlong = "skip"
    config.data.threads = 16
    config.mesh.data, config.mesh.fsdp = 1, -1  # a copy of the state for each device would take 84 GB

    finetune = stage_config()
    finetune.trainable = EVERYTHING
    finetune.template = "vicuna_v1"
    finetune.batch_size = 128
    finetune.learning_rate = 1e-5
    finetune.learning_rates = (("vision/.*", 2e-6),)
    finetune.sources = {"main": source_config()}
    finetune.sources.main.duplicate_ids = "number"
    config.stages = {"finetune": finetune}
    config.stage_order = ("finetune",)
    return config


def _mini(config: ConfigDict) -> ConfigDict:
    config.seed = 0
    config.model.vision.image_size = 56
    config.model.vision.remat = config.model.llm.remat = "none"
    config.data.seq_len = 1088  # two images of up to 336 visual tokens with their conversations
    config.data.image_slots = 10
    config.data.label_tokens = 384
    config.data.threads = 1
    config.eval.template = "mini"

    pretrain = stage_config()
    pretrain.trainable = ("connector/.*", "separators/.*")
    pretrain.template = "plain"
    pretrain.sources = {"captions": _framed("pretrain", "caption", 480)}
    pretrain.learning_rate = 2e-3
    pretrain.matrix_learning_rate = 0.02

    finetune = stage_config()
    finetune.trainable = EVERYTHING
    finetune.template = "mini"
    finetune.sources = {"instructions": _framed("finetune", "instruct", 1600)}
    finetune.learning_rate = 5e-4
    finetune.matrix_learning_rate = 0.004
    finetune.learning_rates = (("vision/.*", 5e-5),)

    for stage in (pretrain, finetune):
        stage.batch_size = 16
        stage.samples_per_row = 4
        stage.optimizer = "muon"
        stage.log_every = 10
        stage.checkpoint_every = 100
    config.stages = {"pretrain": pretrain, "finetune": finetune}
    config.stage_order = ("pretrain", "finetune")

    config.eval.benchmarks = {"mini": benchmark_config()}
    config.eval.benchmarks.mini.count = 40
    config.eval.benchmarks.mini.framed = True  # of many aspect ratios, as in training
    config.eval.batch_size = 32
    config.eval.max_new_tokens = 8
    return config


def _framed(split: str, form: str, count: int) -> ConfigDict:
    source = source_config()
    source.kind, source.split, source.form, source.count, source.framed = (
        "mini_world", split, form, count, True,
    )  # fmt: skip
    return source
