"""The real step of a stage, compiled for TPUs that are not here: its memory and what it sends."""

import dataclasses
import re
import time

import jax

from mllm_jax.planning.collectives import collective_bytes
from mllm_jax.planning.estimate import Memory, arguments
from mllm_jax.training.stage import StagePlan

UNITS = {"": 1, "K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}
# XLA's effort at making the program fast, below its default: compiles in less than half the time. JAX 0.12 has levels.
QUICK = ("jax_exec_time_optimization_effort", -1.0)
if not hasattr(jax.config, QUICK[0]):
    QUICK = ("jax_optimization_level", "O1")


@dataclasses.dataclass(frozen=True)
class CompiledStep:
    """What the compiler says of a step.

    Attributes:
      memory: of one chip. Where the compiler ran out of memory, it is what the program asked for.
      fits: whether the compiler could place it.
      collectives: bytes that a chip sends, by kind; {} where it does not fit.
      seconds: of processor time that compiling took, whatever else runs on the machine.
      argument_bytes: of a chip, by the compiler; None where it does not fit.
    """

    memory: Memory
    fits: bool
    collectives: dict[str, float]
    seconds: float
    argument_bytes: int | None = None


def compile_step(plan: StagePlan, quick: bool = False) -> CompiledStep:
    """Compiles a stage's step for its mesh, of devices that need not be here.

    Args:
      quick: with less effort at speed. The program then overlaps less communication with computation and needs some
        other amount of temporaries.
    """
    given = arguments(plan)
    begin = time.process_time()
    lowered = plan.lower()
    name, effort = QUICK
    before = getattr(jax.config, name)
    try:
        jax.config.update(name, effort if quick else before)
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" not in str(error):
            raise
        temporaries = _temporaries(str(error), sum(given.values()))
        return CompiledStep(Memory(**given, temporaries=temporaries), False, {}, time.process_time() - begin)
    finally:
        jax.config.update(name, before)
    found = compiled.memory_analysis()
    memory = Memory(
        **given,
        temporaries=float(found.temp_size_in_bytes + found.output_size_in_bytes - found.alias_size_in_bytes),
        program=float(found.generated_code_size_in_bytes),
    )
    sent = collective_bytes(compiled.as_text(), plan.mesh.size)
    seconds = time.process_time() - begin
    return CompiledStep(memory, True, sent, seconds, found.argument_size_in_bytes)


def _temporaries(message: str, arguments: float) -> float:
    """Bytes that a program needed beside its arguments, from XLA's message; infinite where it does not say."""
    if found := re.search(r"HLO temporaries \(([\d.]+)([KMGT]?)\)", message):
        return float(found[1]) * UNITS[found[2]]
    if found := re.search(r"Used ([\d.]+)([KMGT]?) of [\d.]+[KMGT]? hbm", message):
        return max(0.0, float(found[1]) * UNITS[found[2]] - arguments)
    return float("inf")
