"""The mini world: procedural images, captions and questions at quarter scale (no download)."""

from mllm_jax.mini.world.captions import long_caption, short_caption
from mllm_jax.mini.world.dataset import DatasetMismatchError, write_benchmark, write_split
from mllm_jax.mini.world.difficulty import FULL, GRADED, Difficulty
from mllm_jax.mini.world.questions import (
    ABILITIES,
    GROUPS,
    Ability,
    Question,
    make_questions,
    prompt_choice,
    prompt_open,
    rotations,
)
from mllm_jax.mini.world.render import render, render_array
from mllm_jax.mini.world.sampler import sample_scene
from mllm_jax.mini.world.scene import SPLITS, Scene, Thing, scene_from_json
from mllm_jax.mini.world.sheet import contact_sheet
from mllm_jax.mini.world.targets import GLOBAL_CLASSES, PATCH_CLASSES, global_targets, patch_targets
from mllm_jax.mini.world.text import text_sample
from mllm_jax.mini.world.vocabulary import vocabulary

__all__ = [
    "ABILITIES",
    "FULL",
    "GLOBAL_CLASSES",
    "GRADED",
    "GROUPS",
    "PATCH_CLASSES",
    "SPLITS",
    "Ability",
    "DatasetMismatchError",
    "Difficulty",
    "Question",
    "Scene",
    "Thing",
    "contact_sheet",
    "global_targets",
    "long_caption",
    "make_questions",
    "patch_targets",
    "prompt_choice",
    "prompt_open",
    "render",
    "render_array",
    "rotations",
    "sample_scene",
    "scene_from_json",
    "short_caption",
    "text_sample",
    "vocabulary",
    "write_benchmark",
    "write_split",
]
