"""The whole pipeline on a 2-core CPU in minutes: mini world, mini tower, mini LLM, both stages, evaluation.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart
    python train.py --config=configs/quickstart.py:average_pool --workdir=runs/average_pool

The argument is the connector's name, at the mini tower's scale (`mllm_jax/mini/connectors.py`); a compressing one gets
1/4 of the 144 patch tokens, 1/9 with `--config.model.connector.average_pool.tokens=16`. 84 px stand for 336, 56 for
224 (`--config.model.vision.image_size=56`) and 112 for 448 (with `--config.data.seq_len=512
--config.stages.pretrain.seq_len=928 --config.stages.finetune.seq_len=896` for its 256 patch tokens).
"""

from ml_collections import ConfigDict

from mllm_jax.recipes.mini import mini_config


def get_config(connector: str = "mlp2x_gelu") -> ConfigDict:
    return mini_config(connector)
