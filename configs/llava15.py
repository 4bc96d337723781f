"""LLaVA-1.5 7B: CLIP-L/14 at 336, two-layer MLP, Vicuna-7B; both stages, with LLaVA's published settings.

    python train.py --config=configs/llava15.py --workdir=runs/llava15 \
        --config.stages.pretrain.sources.main.json=blip_laion_cc_sbu_558k.json \
        --config.stages.pretrain.sources.main.images=pretrain/images \
        --config.stages.finetune.sources.main.json=llava_v1_5_mix665k.json \
        --config.stages.finetune.sources.main.images=finetune/images

The argument `lora` (`--config=configs/llava15.py:lora`) fine-tunes connector and LoRA adapters on a frozen LLM instead
of the whole LLM. Any connector: `--config.model.connector.name=dci`.
"""

from ml_collections import ConfigDict

from mllm_jax.config import ConfigError, default_config, source_config, stage_config


def get_config(tuning: str = "full") -> ConfigDict:
    if tuning not in ("full", "lora"):
        raise ConfigError(f"configs/llava15.py:{tuning}: choose full or lora")
    config = default_config()
    config.model.vision.path = "openai/clip-vit-large-patch14-336"
    config.model.vision.image_size = 336
    config.model.llm.path = "lmsys/vicuna-7b-v1.5"
    config.model.dtype = config.model.frozen_dtype = "bfloat16"
    config.data.seq_len = 2048
    config.data.aspect = "pad"
    config.data.overlong = "skip"  # the original cuts them
    config.data.threads = 16
    # Parameters and optimizer state are shared by all devices: each would need more than 80 GB for a copy of its own.
    config.mesh.data, config.mesh.fsdp = 1, -1

    pretrain = stage_config()
    pretrain.template = "plain"
    pretrain.aspect = "square"
    pretrain.batch_size = 256
    pretrain.learning_rate = 1e-3

    finetune = stage_config()
    finetune.template = "vicuna_v1"
    finetune.batch_size = 128
    if tuning == "full":
        finetune.trainable = ("connector/.*", "llm/.*")
        finetune.learning_rate = 2e-5
    else:
        finetune.trainable = ("connector/.*",)
        finetune.lora.rank, finetune.lora.alpha, finetune.lora.dropout = 128, 256.0, 0.05
        finetune.learning_rate = 2e-4  # of the adapters
        finetune.learning_rates = (("connector/.*", 2e-5),)

    for stage in (pretrain, finetune):
        stage.sources = {"main": source_config()}
        stage.sources.main.duplicate_ids = "number"  # the published mixture repeats ids
    config.stages = {"pretrain": pretrain, "finetune": finetune}
    config.stage_order = ("pretrain", "finetune")
    return config
