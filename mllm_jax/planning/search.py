"""The mesh and the accumulation with which a stage is fastest on a machine, by the estimate."""

import copy
import itertools
from collections.abc import Iterator
from typing import Any

from ml_collections import ConfigDict

from mllm_jax.config import ConfigError
from mllm_jax.inference import runs
from mllm_jax.models.heads import split
from mllm_jax.planning.estimate import Memory, Roofline, attention_backend, memory, roofline, rows_of
from mllm_jax.planning.topology import Machine
from mllm_jax.training.stage import StagePlan

OVERLAP_LOST = 0.1  # of what could be hidden behind the slowest resource
SAME = 1.03  # times of which one is this much longer than the other are taken as equal
SHARING = 16  # most chips that share a row: more are slower than what else there is
MARGIN = 0.92  # of the memory may be used by an estimate: what is left is for what it does not know


def stage_plan(config: ConfigDict, stage: str, mesh: Any) -> StagePlan:
    """The plan of a stage, with rows of packed samples as `rows_of` takes them."""
    plan = StagePlan(config, stage, mesh)
    return StagePlan(config, stage, mesh, rows=rows_of(plan))


def candidates(config: ConfigDict, stage: str, machine: Machine) -> Iterator[tuple[dict[str, int], int]]:
    """Every (mesh, accumulation) that batch, heads and rows allow, with at most `SHARING` chips to a row."""
    settings, count = config.stages[stage], machine.count
    llm, packed = runs.model_config(config).llm, settings.samples_per_row > 1
    lengths = [each.seq_len or config.data.seq_len for each in config.stages.values()]
    for sharing in _divisors(machine.chips):
        if sharing > SHARING or (sharing > 1 and split(llm.heads, llm.kv_heads, sharing)[0] == 1):
            continue
        for fsdp, tensor in itertools.product(_divisors(count // sharing), _divisors(sharing)):
            data, sequence = count // sharing // fsdp, sharing // tensor
            if (data * fsdp) % machine.slices or any(length % sequence for length in lengths):
                continue
            for parts in _divisors(settings.batch_size):
                if parts <= 16 and (packed or settings.batch_size % (data * fsdp * parts) == 0):
                    yield {"data": data, "fsdp": fsdp, "sequence": sequence, "tensor": tensor}, parts


def search(config: ConfigDict, stage: str, machine: Machine) -> tuple[ConfigDict, Memory, Roofline]:
    """The recipe with the mesh and accumulation that fit and take the least time; where none fits, with those that need
    the least memory.

    Of nearly equally fast ones the simplest is taken: the fewest chips to a row, then the smallest tensor axis, then
    the least accumulation, then what leaves most memory.

    Raises:
      ConfigError: no mesh of the machine suits batch and heads.
    """
    fast, small = [], None
    for sizes, parts in candidates(config, stage, machine):
        changed = with_mesh(config, stage, sizes, parts)
        plan = stage_plan(changed, stage, machine.abstract_mesh(sizes))
        attention = attention_backend(plan, machine)
        needed = memory(plan, attention)
        bound = roofline(plan, machine, attention)
        found = changed, needed, bound
        if small is None or needed.total < small[1].total:
            small = found
        if needed.total <= MARGIN * machine.chip.memory:
            hidden = bound.compute + bound.memory + bound.network + bound.slow_network
            cost = bound.seconds + OVERLAP_LOST * hidden
            sharing = sizes["sequence"] * sizes["tensor"]
            fast.append((cost, (sharing, sizes["tensor"], parts, needed.total), found))
    if small is None:
        raise ConfigError(
            f"config key 'stages.{stage}.batch_size' ({config.stages[stage].batch_size}) cannot be shared by "
            f"{machine.count} chips, whatever the mesh"
        )
    if not fast:
        return small
    least = min(cost for cost, _, _ in fast)
    return min((each for each in fast if each[0] <= SAME * least), key=lambda each: each[1])[2]


def with_mesh(config: ConfigDict, stage: str, sizes: dict[str, int], parts: int) -> ConfigDict:
    """The recipe with this mesh and accumulation."""
    changed = copy.deepcopy(config)
    changed.mesh.update(sizes)
    changed.stages[stage].accumulation = parts
    return changed


def changes(config: ConfigDict, stage: str, machine: Machine) -> Iterator[tuple[str, ConfigDict]]:
    """What could be changed where a stage does not fit: (the keys to give, the changed recipe)."""
    settings = config.stages[stage]

    def changed(**keys: Any) -> tuple[str, ConfigDict]:
        new = copy.deepcopy(config)
        for key, value in keys.items():
            *parents, last = key.replace("__", ".").split(".")
            place = new
            for parent in parents:
                place = place[parent]
            place[last] = value
        given = (f"--config.{key.replace('__', '.')}={value}" for key, value in keys.items())
        return " ".join(given), new

    here = f"stages__{stage}__"
    if config.model.llm.remat != "full":
        yield changed(model__llm__remat="full")
    if config.model.frozen_dtype == "float32":
        yield changed(model__frozen_dtype="bfloat16")
    if config.model.dtype == "float32":
        yield changed(model__dtype="bfloat16", model__frozen_dtype="bfloat16")
    found = search(config, stage, machine)[0]
    mesh, parts = found.mesh, found.stages[stage].accumulation
    keys = {f"mesh__{axis}": mesh[axis] for axis in ("data", "fsdp", "tensor")}
    if config.mesh.sequence != mesh.sequence:
        keys["mesh__sequence"] = mesh.sequence
    if parts != settings.accumulation:
        keys[f"{here}accumulation"] = parts
    yield changed(**keys)
    if config.data.label_tokens is None and settings.samples_per_row == 1:
        yield changed(data__label_tokens=1024)
    if settings.quantize_base == "none" and settings.lora.rank:
        yield changed(**{f"{here}quantize_base": "int8"})
    for part in itertools.takewhile(lambda part: settings.batch_size % part == 0, (2, 4, 8)):
        yield changed(**{f"{here}batch_size": settings.batch_size // part})


def _divisors(number: int) -> list[int]:
    return [each for each in range(1, number + 1) if number % each == 0]
