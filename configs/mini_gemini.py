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

from mllm_jax.config import ConfigError
from mllm_jax.recipes.llava import two_stage_config

ENCODERS = "openai/clip-vit-large-patch14-336+laion/CLIP-convnext_large_d_320.laion2B-s29B-b131K-ft-soup"


def get_config(size: str = "768") -> ConfigDict:
    if size not in ("768", "hd"):
        raise ConfigError(f"configs/mini_gemini.py:{size}: choose 768 or hd")
    config = two_stage_config(ENCODERS, 768, "lmsys/vicuna-7b-v1.5")
    config.model.vision.combine = "mining"
    config.model.vision.image_sizes = (336, 768)
    if size == "hd":
        config.model.vision.image_size = 1536
        config.model.vision.image_sizes = (336, 1536)
        config.model.vision.split = 2
        config.model.vision.overview = True
        config.model.connector.allow_mismatch = True  # its first stage was at 768
        config.data.seq_len = 4096
        config.stages = {"finetune": config.stages.finetune}
        config.stage_order = ("finetune",)
    return config
