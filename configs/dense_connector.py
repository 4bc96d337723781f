"""Dense Connector (arXiv 2405.13800): all blocks of the vision encoder seen by the LLM, through a two-layer MLP.

    python train.py --config=configs/dense_connector.py:llama3-8b --workdir=runs/dense_8b \
        --config.stages.pretrain.sources.main.json=blip_laion_cc_sbu_558k.json \
        --config.stages.pretrain.sources.main.images=pretrain/images \
        --config.stages.finetune.sources.main.json=llava_v1_5_mix665k.json \
        --config.stages.finetune.sources.main.images=finetune/images

The argument is the LLM: phi-2, vicuna-7b, vicuna-13b, llama3-8b (the default), yi-34b or llama3-70b. As in the paper,
the two largest are fine-tuned by LoRA and the others whole. The connector is `dci`; its siblings are
`--config.model.connector.name=sti` and `sci`, the efficient variant `--config.model.connector.dci.reduction=2`.
Vicuna sees through CLIP-L/14 at 336 and the others through SigLIP so400m/14 at 384 (which encoder the paper pairs
with which LLM is from memory); `--config.model.vision.path=... --config.model.vision.image_size=...` sets another
one.

With `-anyres` behind it (`--config=configs/dense_connector.py:yi-34b-anyres`) images are cut into tiles, and the LLM is
fine-tuned whole, as the paper's Yi-34B. Its training code is not public: canvases and rates are those of LLaVA-1.6 and
of the other models here.
"""

from ml_collections import ConfigDict

from mllm_jax.config import ConfigError, default_config, source_config, stage_config

CLIP = ("openai/clip-vit-large-patch14-336", 336)
SIGLIP = ("google/siglip-so400m-patch14-384", 384)
# LLM: its checkpoint, the encoder, the template of stage 2, whether it is fine-tuned by LoRA
LLMS = {
    "phi-2": ("microsoft/phi-2", SIGLIP, "phi", False),
    "vicuna-7b": ("lmsys/vicuna-7b-v1.5", CLIP, "vicuna_v1", False),
    "vicuna-13b": ("lmsys/vicuna-13b-v1.5", CLIP, "vicuna_v1", False),
    "llama3-8b": ("meta-llama/Meta-Llama-3-8B-Instruct", SIGLIP, "llama_3", False),
    "yi-34b": ("NousResearch/Nous-Hermes-2-Yi-34B", SIGLIP, "chatml_direct", True),
    "llama3-70b": ("meta-llama/Meta-Llama-3-70B-Instruct", SIGLIP, "llama_3", True),
}


def get_config(llm: str = "llama3-8b") -> ConfigDict:
    llm, anyres = llm.removesuffix("-anyres"), llm.endswith("-anyres")
    if llm not in LLMS:
        raise ConfigError(f"configs/dense_connector.py:{llm}: choose {', '.join(LLMS)}")
    if anyres and llm == "phi-2":
        raise ConfigError(
            "configs/dense_connector.py:phi-2-anyres: an image in tiles takes up to 3,699 tokens, and Phi-2 has 2,048 "
            "positions; choose another LLM"
        )
    config = default_config()
    config.model.llm.path, (config.model.vision.path, config.model.vision.image_size), template, lora = LLMS[
        llm
    ]
    config.model.connector.name = "dci"
    config.model.dtype = config.model.frozen_dtype = "bfloat16"
    config.data.seq_len = 2048
    config.data.aspect = "pad"
    config.data.overlong = "skip"  # the original cuts them
    config.data.threads = 16
    config.mesh.data, config.mesh.fsdp = 1, -1
    config.eval.template = template

    pretrain = stage_config()
    pretrain.template = "plain"
    pretrain.aspect = "square"
    pretrain.batch_size = 256
    pretrain.learning_rate = 1e-3

    finetune = stage_config()
    finetune.template = template
    finetune.batch_size = 128
    if lora and not anyres:
        finetune.trainable = ("connector/.*",)
        finetune.lora.rank, finetune.lora.alpha, finetune.lora.dropout = 128, 256.0, 0.05
        finetune.learning_rate = 2e-4  # of the adapters
        finetune.learning_rates = (("connector/.*", 2e-5),)
    else:
        finetune.trainable = ("connector/.*", "llm/.*")
        finetune.learning_rate = 2e-5

    if anyres:
        config.model.tiles.merge = "spatial_unpad"
        config.data.image_slots = 5  # the whole image and four tiles
        config.data.seq_len = 4096
        pretrain.trainable += ("separators/.*",)
        finetune.trainable += ("separators/.*",)

    for stage in (pretrain, finetune):
        stage.sources = {"main": source_config()}
        stage.sources.main.duplicate_ids = "number"  # the published mixture repeats ids
    config.stages = {"pretrain": pretrain, "finetune": finetune}
    config.stage_order = ("pretrain", "finetune")
    return config
