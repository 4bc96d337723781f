"""A stage on a machine as plain values: what `mllm-jax plan` prints and docs/scaling.md is made of."""

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from mllm_jax.inference import runs
from mllm_jax.interop.published import shipped_geometry
from mllm_jax.planning import search
from mllm_jax.planning.compiled import compile_step
from mllm_jax.planning.estimate import (
    Memory,
    attention_backend,
    executed_flops,
    memory,
    network_bytes,
    parameters,
    roofline,
    useful_counts,
)
from mllm_jax.planning.topology import Machine, mesh_shape
from mllm_jax.training.preflight import check_batch_size, check_mesh

HELPS = 0.97  # of the memory: a change that leaves more is not worth telling


def describe_stage(
    config: ConfigDict,
    stage: str,
    machine: Machine,
    *,
    estimate_only: bool = False,
    auto_mesh: bool = False,
    quick: bool = False,
) -> dict[str, Any]:
    """What one stage of a checked recipe needs and at best reaches on a machine; JSON-able.

    Args:
      estimate_only: by formula; always so on GPUs.
      auto_mesh: take the mesh and accumulation of `search.search` instead of the recipe's.
      quick: see `compiled.compile_step`.

    Raises:
      ConfigError: training would refuse the mesh.
      ImportError: a TPU's step is to be compiled, and libtpu is missing.

    Examples:
      >>> from mllm_jax.planning.topology import parse
      >>> from mllm_jax.recipes.mini import mini_config
      >>> found = describe_stage(mini_config("linear"), "finetune", parse("v5e:1x1"), estimate_only=True)
      >>> found["fits"], found["mesh"]["data"], found["parameters"]["connector"]
      (True, 1, 16512)
    """
    with shipped_geometry():
        if auto_mesh:
            config = search.search(config, stage, machine)[0]
        sizes = config.mesh.to_dict()
        mesh = machine.abstract_mesh(sizes)
        check_mesh(config, runs.model_config(config), mesh)
        check_batch_size(config, stage, mesh)
        plan = search.stage_plan(config, stage, mesh)
        attention = attention_backend(plan, machine)
        guessed = memory(plan, attention)
        told = sent = network_bytes(plan, machine)
        compiled = None
        # What exceeds the memory before the first temporary needs no compiler.
        hopeless = guessed.total - guessed.temporaries > machine.chip.memory
        if machine.shape and not estimate_only and not hopeless:
            real = search.stage_plan(config, stage, machine.mesh(sizes))
            compiled = compile_step(real, quick)
            if compiled.fits:
                total = sum(compiled.collectives.values())
                # Which of them leave the slice the program does not say; the formula does.
                slow = sent[1] if machine.slices > 1 else 0.0
                sent = (max(total - slow, 0.0), slow)
        used = compiled.memory if compiled else guessed
        fits = compiled.fits if compiled else used.total <= search.MARGIN * machine.chip.memory
        bound = roofline(plan, machine, attention, sent)
        tried = (
            []
            if fits
            else [_tried(*change, stage, machine) for change in search.changes(config, stage, machine)]
        )
        advice = [change for change in tried if change["memory"] < HELPS * guessed.total]
        return {
            "machine": machine.name,
            "chips": machine.count,
            "slices": machine.slices,
            "stage": stage,
            "connector": config.model.connector.name,
            "parameters": parameters(plan),
            "mesh": mesh_shape(sizes, machine.count),
            "accumulation": config.stages[stage].accumulation,
            "batch_size": config.stages[stage].batch_size,
            "rows": plan.batch.tokens.shape[0],
            "seq_len": plan.seq_len,
            "attention": attention,
            "fits": fits,
            "compiled": compiled is not None,
            "compile_seconds": round(compiled.seconds, 1) if compiled else None,
            "memory_capacity": machine.chip.memory,
            "memory": _memory(used),
            "memory_estimate": _memory(guessed),
            "model_flops": bound.model_flops,
            "counted": useful_counts(plan),
            "executed_flops": executed_flops(plan, attention),
            "collectives": compiled.collectives if compiled else None,
            "network_bytes": sent[0],
            "network_bytes_estimate": told[0],
            "slow_network_bytes": sent[1],
            "seconds": {
                name: getattr(bound, name) for name in ("compute", "memory", "network", "slow_network")
            },
            "step_seconds": bound.seconds,
            "bound": bound.bound,
            "mfu_bound": bound.mfu,
            "changes": advice,
        }


def _memory(memory: Memory) -> dict[str, float]:
    return {**dataclasses.asdict(memory), "total": memory.total}


def _tried(keys: str, config: ConfigDict, stage: str, machine: Machine) -> dict[str, Any]:
    """A change, with the memory that the formula gives it."""
    plan = search.stage_plan(config, stage, machine.abstract_mesh(config.mesh.to_dict()))
    needed = memory(plan, attention_backend(plan, machine)).total
    return {"keys": keys, "memory": needed, "fits": needed <= search.MARGIN * machine.chip.memory}
