"""Pretrains the mini tokenizer, vision tower and LLM and writes them as Hugging Face directories."""

import functools
import pathlib

from ml_collections import ConfigDict
from transformers import PreTrainedTokenizerFast

from mllm_jax.mini.foundation import pictures, tower
from mllm_jax.mini.foundation.fitting import Phase, fit
from mllm_jax.mini.foundation.tokenizer import train_tokenizer
from mllm_jax.mini.world import GRADED
from mllm_jax.models.vit import VisionConfig


def vision_geometry(config: ConfigDict) -> VisionConfig:
    """The tower: SigLIP's layout (no class token, biased patches, tanh GELU, no pre-norm)."""
    return VisionConfig(
        **config.geometry,
        activation="gelu_tanh",
        eps=1e-6,
        class_token=False,
        pre_norm=False,
        patch_bias=True,
        mean=(0.5, 0.5, 0.5),
        std=(0.5, 0.5, 0.5),
    )


def train_tower(config: ConfigDict, workdir: pathlib.Path):
    """Returns (VisionConfig, tower parameters)."""
    vision = vision_geometry(config)
    params = fit(
        "tower",
        functools.partial(tower.tower_loss, vision),
        tower.init_tower(vision, config.seed),
        [_tower_phase(config, number, workdir) for number in range(len(config.phases))],
        config.fit,
        workdir,
    )
    return vision, params


def _tower_phase(config: ConfigDict, number: int, workdir: pathlib.Path) -> Phase:
    """A phase of the tower, for which its images are rendered."""
    phase, pools, first = config.phases[number], [], config.first_picture
    for size, count in zip(config.sizes, config.pictures, strict=True):
        pools.append(
            pictures.render_pool(
                workdir / f"pictures_{number}_{size}",
                first=first,
                count=count,
                size=size,
                patch=config.geometry.patch,
                dense=config.dense,
                cards=phase["cards"],
                difficulty=GRADED,
                seed=config.seed,
            )
        )
        first += count
    batches = functools.partial(
        pictures.pool_batches, pools, list(config.shares), config.batch, config.seed, phase["emphasis"]
    )
    return Phase(phase["rates"][-1][0], phase["rates"], batches)


def prepare_tokenizer(config: ConfigDict, workdir: pathlib.Path) -> PreTrainedTokenizerFast:
    """The tokenizer of a foundation run, trained at the first call."""
    directory = workdir / "tokenizer"
    if not (directory / "tokenizer.json").exists():
        train_tokenizer(config.vocab, config.samples, config.seed, directory)
    return PreTrainedTokenizerFast.from_pretrained(directory)
