"""Mini-Gemini 7B: CLIP-L/14 at 336 mines ConvNeXt-L at 768, two-layer MLP, Vicuna-7B; both stages, as published.

    python train.py --config=configs/mini_gemini.py --workdir=runs/mini_gemini \
        --config.stages.pretrain.sources.main.json=mgm_pretrain.json \
        --config.stages.pretrain.sources.main.images=MGM-Pretrain \
        --config.stages.finetune.sources.main.json=mgm_instruction.json \
        --config.stages.finetune.sources.main.images=MGM-Finetune

The argument `hd` (`--config=configs/mini_gemini.py:hd`) is the second stage of Mini-Gemini-HD: the image at 1536, of
which CLIP sees four parts and the whole, 2,880 visual tokens. It starts from the connector of the first stage at 768:
export that run after `pretrain` and give `--config.model.connector.path=EXPORT`.

With Dense Connector: `--config.model.connector.name=dci`, and `--config.model.vision.combine=mining_all` or
`mining_channels` for other ways to join the two. How the authors joined them is not public (docs/models.md).
"""

from ml_collections import ConfigDict

from mllm_jax.config import ConfigError, default_config, source_config, stage_config


def get_config(size: str = "768") -> ConfigDict:
    if size not in ("768", "hd"):
        raise ConfigError(f"configs/mini_gemini.py:{size}: choose 768 or hd")
    config = default_config()
    config.model.vision.path = (
        "openai/clip-vit-large-patch14-336+laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"
    )
    config.model.vision.combine = "mining"
    config.model.vision.image_size = 768
    config.model.vision.image_sizes = (336, 768)
    config.model.llm.path = "lmsys/vicuna-7b-v1.5"
    config.model.dtype = config.model.frozen_dtype = "bfloat16"
    config.data.seq_len = 2048
    config.data.aspect = "pad"
    config.data.overlong = "skip"  # the original cuts them
    config.data.threads = 16
    config.mesh.data, config.mesh.fsdp = 1, -1  # as in llava15: shared by all devices

    pretrain = stage_config()
    pretrain.template = "plain"
    pretrain.aspect = "square"
    pretrain.batch_size = 256
    pretrain.learning_rate = 1e-3

    finetune = stage_config()
    finetune.template = "vicuna_v1"
    finetune.batch_size = 128
    finetune.trainable = ("connector/.*", "llm/.*")
    finetune.learning_rate = 2e-5

    stages = {"pretrain": pretrain, "finetune": finetune}
    if size == "hd":
        config.model.vision.image_size = 1536
        config.model.vision.image_sizes = (336, 1536)
        config.model.vision.split = 2
        config.model.vision.overview = True
        config.model.connector.allow_mismatch = True  # its first stage was at 768
        config.data.seq_len = 4096
        del stages["pretrain"]
    for stage in stages.values():
        stage.sources = {"main": source_config()}
        stage.sources.main.duplicate_ids = "number"  # LLaVA's mixture in it repeats ids
    config.stages = stages
    config.stage_order = tuple(stages)
    return config
