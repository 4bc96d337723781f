"""The mini world: procedural pictures, captions and questions at quarter scale (no download)."""

from mllm_jax.data.mini_world.captions import long_caption, short_caption
from mllm_jax.data.mini_world.questions import (
    ABILITIES,
    GROUPS,
    Question,
    make_questions,
    prompt_choice,
    prompt_open,
    rotations,
)
from mllm_jax.data.mini_world.render import render, render_array
from mllm_jax.data.mini_world.scene import Scene, Thing, sample_scene, scene_from_json
from mllm_jax.data.mini_world.targets import GLOBAL_CLASSES, PATCH_CLASSES, global_targets, patch_targets
from mllm_jax.data.mini_world.text import text_sample

__all__ = [
    "ABILITIES",
    "GLOBAL_CLASSES",
    "GROUPS",
    "PATCH_CLASSES",
    "Question",
    "Scene",
    "Thing",
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
]
