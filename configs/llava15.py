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

from mllm_jax.config import ConfigError
from mllm_jax.recipes.llava import two_stage_config


def get_config(tuning: str = "full") -> ConfigDict:
    if tuning not in ("full", "lora"):
        raise ConfigError(f"configs/llava15.py:{tuning}: choose full or lora")
    return two_stage_config(
        "openai/clip-vit-large-patch14-336", 336, "lmsys/vicuna-7b-v1.5", lora=tuning == "lora"
    )
