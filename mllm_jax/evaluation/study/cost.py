"""What the cells of a recipe cost at full scale, from the planner: nothing is trained, nothing downloaded.

{"format": 1, "kind": "cost", "recipe": ..., "machine": ..., "cells": {VARIANT: {...}}}
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
from ml_collections import ConfigDict

from mllm_jax.config import ConfigError
from mllm_jax.evaluation.report.sections import Section, Table
from mllm_jax.evaluation.study.summary import FORMAT
from mllm_jax.inference import runs
from mllm_jax.interop.published import shipped_geometry
from mllm_jax.models import mllm
from mllm_jax.planning.decoding import decoding
from mllm_jax.planning.describe import describe_stage
from mllm_jax.planning.estimate import MEAN_TEXT_TOKENS
from mllm_jax.planning.topology import Machine
from mllm_jax.training.flops import batch_counts, step_flops

# From memory: samples of LLaVA-1.5's two stages, and tokens of a sample beside its image.
SAMPLES = {"pretrain": 558_128, "finetune": 665_298}
TEXT = {"pretrain": 32, "finetune": MEAN_TEXT_TOKENS}
QUESTION = 64  # tokens of a prompt beside its image
ROUND = 8  # rows are made of so many tokens


def study_cost(recipe: str, cells: Mapping[str, ConfigDict], machine: Machine) -> dict[str, Any]:
    """The cost of every cell, JSON-able.

    Args:
      cells: variant -> its checked configuration.
      machine: where it would train.
    """
    with shipped_geometry():
        found = {name: cell_cost(config, machine) for name, config in cells.items()}
    return {"format": FORMAT, "kind": "cost", "recipe": recipe, "machine": machine.name, "cells": found}


def cell_cost(config: ConfigDict, machine: Machine) -> dict[str, Any]:
    """Training, prefill and memory of one cell.

    In training each sample has a row that is just long enough for its visual tokens and `TEXT`; answering takes one
    prompt of the visual tokens and `QUESTION` on one chip.

    Raises:
      ConfigError: a stage of another name than LLaVA's two.
    """
    model = runs.model_config(config)
    visual, prompt = model.visual_layout.most_tokens, model.visual_layout.most_tokens + QUESTION
    stages = {}
    for name in config.stage_order:
        if name not in SAMPLES:
            raise ConfigError(f"stage {name!r}: the samples of {' and '.join(SAMPLES)} are known, not its")
        stage = config.copy_and_resolve_references()
        stage.stages[name].samples_per_row, stage.stages[name].image_slots = 1, None
        stage.stages[name].seq_len = -(-(visual + TEXT[name]) // ROUND) * ROUND
        plan = describe_stage(stage, name, machine, estimate_only=True)
        steps = math.ceil(SAMPLES[name] / plan["batch_size"])
        stages[name] = {
            "steps": steps,
            "step_flops": plan["model_flops"],
            "flops": steps * plan["model_flops"],
            "step_seconds": plan["step_seconds"],
            "bound": plan["bound"],
            "fits": plan["fits"],
        }
    shapes, llm = mllm.abstract_params(model), model.llm
    counts = batch_counts(model, 1, prompt, 1, model.visual_layout.most_slots)
    chip = dataclasses.replace(machine, chips=1, slices=1)
    answering = decoding(config, chip, 1, prompt)
    return {
        "connector": model.connector,
        "visual_tokens": visual,
        "image_size": model.image_size,
        "llm": config.model.llm.path,
        "stages": stages,
        "prefill_flops": step_flops(model, {}, shapes).forward_flops(counts),
        "prefill_seconds": answering.prefill_seconds,
        "token_seconds": answering.token_seconds,
        "cache_bytes": 2
        * jnp.dtype(model.dtype).itemsize
        * llm.depth
        * llm.kv_heads
        * llm.head_width
        * prompt,
    }


def cost_section(cost: Mapping[str, Any]) -> Section:
    """The table of a study's costs."""
    names = list(dict.fromkeys(name for cell in cost["cells"].values() for name in cell["stages"]))
    head = ["cell", "visual tokens"]
    head += [f"{what}, {name}" for name in names for what in ("training, EFLOP", "step at best, s")]
    head += ["prefill, TFLOP", "prefill at best, ms", "a token at best, ms", "keys and values, MB"]
    rows = []
    for name, cell in cost["cells"].items():
        stages = [cell["stages"][stage] for stage in names]
        rows.append(
            (
                name, f"{cell['visual_tokens']:,}",
                *(text for s in stages for text in (
                    f"{s['flops'] / 1e18:,.1f}", f"{s['step_seconds']:.2f}" + ("" if s["fits"] else " (too large)")
                )),
                f"{cell['prefill_flops'] / 1e12:.2f}", f"{1e3 * cell['prefill_seconds']:.1f}",
                f"{1e3 * cell['token_seconds']:.1f}", f"{cell['cache_bytes'] / 1e6:,.0f}",
            )
        )  # fmt: skip
    about = (
        f"By the planner, on {cost['machine']} with the recipe's mesh; nothing was run. Training: the model FLOPs of "
        f"one epoch over {SAMPLES['pretrain']:,} captions and {SAMPLES['finetune']:,} conversations, of which one "
        f"takes {TEXT['pretrain']} and {TEXT['finetune']} tokens beside its image. Answering: one prompt of the visual "
        f"tokens and {QUESTION} more, on one of these chips. “At best” is the roofline's bound."
    )
    return Section(f"Full-scale cost of {cost['recipe']}", (about, Table(tuple(head), tuple(rows))))
