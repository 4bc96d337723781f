"""The two stages of LLaVA-1.5, on which both papers build (recipes.md 1.1)."""

from ml_collections import ConfigDict

from mllm_jax.config import default_config, source_config, stage_config


def two_stage_config(
    vision: str, image_size: int, llm: str, template: str = "vicuna_v1", lora: bool = False
) -> ConfigDict:
    """The stages `pretrain` (connector alone) and `finetune`, each with one source, `main`, from the command line.

    Args:
      vision: the encoder's checkpoint; several as A+B.
      image_size: side of its images, in pixels.
      llm: the LLM's checkpoint.
      template: of stage 2 and of the evaluation.
      lora: stage 2 trains adapters instead of the whole LLM.

    Example:
      >>> config = two_stage_config("openai/clip-vit-large-patch14-336", 336, "lmsys/vicuna-7b-v1.5")
      >>> config.stage_order, config.stages.finetune.learning_rate
      (('pretrain', 'finetune'), 2e-05)
    """
    config = default_config()
    config.model.vision.path, config.model.vision.image_size = vision, image_size
    config.model.llm.path = llm
    config.model.dtype = config.model.frozen_dtype = "bfloat16"
    config.data.seq_len = 2048
    config.data.aspect = "pad"
    config.data.overlong = "skip"  # the original cuts them
    config.data.threads = 16
    # Parameters and optimizer state are shared by all devices: each would need more than 80 GB for a copy of its own.
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
    if lora:
        finetune.trainable = ("connector/.*",)
        finetune.lora.rank, finetune.lora.alpha, finetune.lora.dropout = 128, 256.0, 0.05
        finetune.learning_rate = 2e-4  # of the adapters
        finetune.learning_rates = (("connector/.*", 2e-5),)
    else:
        finetune.trainable = ("connector/.*", "llm/.*")
        finetune.learning_rate = 2e-5

    for stage in (pretrain, finetune):
        stage.sources = {"main": source_config()}
        stage.sources.main.duplicate_ids = "number"  # the published mixture repeats ids
    config.stages = {"pretrain": pretrain, "finetune": finetune}
    config.stage_order = ("pretrain", "finetune")
    return config
