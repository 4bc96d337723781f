"""What training a recipe needs on a machine that is not here, and how fast it could be at best.

    mllm-jax plan --config=configs/llava15.py --topology=v5p:4x4x4 --stage=finetune
    mllm-jax plan --config=configs/llava15.py --topology=v5e-64 --mesh=auto --config.data.label_tokens=1024
    mllm-jax plan --config=configs/llava15.py --topology=h100:8 --config.mesh.data=1 --config.mesh.fsdp=-1
    mllm-jax plan --config=configs/llava15.py --topology=v5e:2x2 --decode --batch=8 --context=2048

For a TPU slice the real step is compiled (package libtpu, no TPU; minutes for 7 billion parameters). Nothing is
downloaded: the geometry of the published models of docs/models.md ships with the package. --config.KEY=VALUE sets any
key, as for train.py. Exit code 0: every stage fits; 1: one does not; 2: wrong arguments.

  --topology=NAME   a TPU slice as v5p:4x4x4 or v5p-128, or a host's GPUs as h100:8
  --slices=N        so many of them, with a slow network between (default 1)
  --stage=NAME      one stage of the recipe; all of them by default
  --mesh=auto       the mesh and accumulation that the estimate finds best, instead of the recipe's
  --estimate        by formula, without compiling: seconds
  --quick           compile with less effort at speed: less than half the time, a little other memory
  --decode          answering instead of training, with --batch=N prompts of --context=N positions
  --json            print one JSON object
"""

import json
import sys
from typing import Any

from mllm_jax.console import complain, size_text

NAMES = {"slow_network": "network between slices"}


def main(arguments: list[str]) -> int:
    """Runs the verb."""
    if not arguments or {"-h", "--help", "--helpfull"} & set(arguments):
        print(__doc__.strip())
        return 0
    import jax
    from absl import flags

    from mllm_jax.cli import script

    jax.config.update("jax_platforms", "cpu")  # with libtpu installed JAX would look for a TPU here
    config = script.define_config()
    topology = flags.DEFINE_string("topology", None, "Machine.", required=True)
    slices = flags.DEFINE_integer("slices", 1, "How many of them.", lower_bound=1)
    stage = flags.DEFINE_string("stage", None, "Stage; all by default.")
    mesh = flags.DEFINE_enum("mesh", "recipe", ["recipe", "auto"], "Which mesh.")
    estimate = flags.DEFINE_bool("estimate", False, "By formula.")
    quick = flags.DEFINE_bool("quick", False, "Compile with less effort.")
    decode = flags.DEFINE_bool("decode", False, "Answering.")
    batch = flags.DEFINE_integer("batch", 1, "Prompts at once.", lower_bound=1)
    context = flags.DEFINE_integer("context", 2048, "Positions of each.", lower_bound=1)
    as_json = flags.DEFINE_bool("json", False, "JSON.")

    def run(_: list[str]) -> None:
        from mllm_jax.planning.topology import parse

        try:
            machine = parse(topology.value, slices.value)
        except ValueError as error:
            complain(f"mllm-jax plan: {error}")
            sys.exit(2)
        if decode.value:
            sys.exit(_decode(config.value, machine, batch.value, context.value, as_json.value))
        names = [stage.value] if stage.value else list(config.value.stage_order)
        if stage.value and stage.value not in config.value.stages:
            complain(
                f"mllm-jax plan: --stage={stage.value}: the recipe has the stages {', '.join(config.value.stage_order)}"
            )
            sys.exit(2)
        found = []
        for name in names:
            options = {
                "estimate_only": estimate.value,
                "auto_mesh": mesh.value == "auto",
                "quick": quick.value,
            }
            found.append(_described(config.value, name, machine, options))
            if not as_json.value:
                print("\n".join(stage_lines(found[-1])) + "\n")
        if as_json.value:
            print(json.dumps({"stages": found}, indent=1))
        sys.exit(0 if all(each["fits"] for each in found) else 1)

    sys.argv[1:] = arguments  # where ml_collections looks for values of keys
    script.run(run, ["mllm-jax plan", *arguments])
    return 0


def _described(config: Any, name: str, machine: Any, options: dict[str, bool]) -> dict[str, Any]:
    from mllm_jax.planning.describe import describe_stage

    try:
        return describe_stage(config, name, machine, **options)
    except ImportError as error:
        complain(f"mllm-jax plan: {error}")
        sys.exit(2)


def _decode(config: Any, machine: Any, batch: int, context: int, as_json: bool) -> int:
    import dataclasses

    from mllm_jax.interop.published import shipped_geometry
    from mllm_jax.planning.decoding import decoding

    with shipped_geometry():
        found = decoding(config, machine, batch, context)
    if as_json:
        print(
            json.dumps(
                {"machine": machine.name, "batch": batch, "context": context, **dataclasses.asdict(found)}
            )
        )
        return 0 if found.fits else 1
    print(
        f"answering {batch} prompts of {context} positions on {machine.count} x {machine.chip.name} (estimate): "
        f"{'fits' if found.fits else 'DOES NOT FIT'}\n"
        f"  memory of a chip   weights {size_text(found.weights)}, keys and values {size_text(found.cache)} of "
        f"{size_text(machine.chip.memory)}\n"
        f"  prefill            {1e3 * found.prefill_seconds:.3g} ms at best\n"
        f"  each token         {1e3 * found.token_seconds:.3g} ms at best ({found.bound}), "
        f"{found.tokens_per_second:,.0f} tokens/s of all prompts"
    )
    return 0 if found.fits else 1


def _machine(found: dict[str, Any]) -> str:
    return found["machine"] if found["slices"] == 1 else f"{found['slices']} x {found['machine']}"


def stage_lines(found: dict[str, Any]) -> list[str]:
    """The description of a stage, for a terminal."""
    used, parts = found["memory"], found["parameters"]
    how = "compiled" if found["compiled"] else "estimate"
    mesh = ", ".join(f"{axis} {size}" for axis, size in found["mesh"].items() if size > 1) or "one chip"
    sizes = ", ".join(f"{name} {count / 1e6:,.0f} M" for name, count in parts.items())
    lines = [
        f"stage {found['stage']} on {_machine(found)} ({found['chips']} chips): "
        f"{'fits' if found['fits'] else 'DOES NOT FIT'} ({how})",
        f"  model              {sizes}; connector {found['connector']}, attention {found['attention']}",
        f"  mesh               {mesh}; {found['rows']} rows of {found['seq_len']}, accumulation "
        f"{found['accumulation']}",
        f"  memory of a chip   {size_text(used['total'])} of {size_text(found['memory_capacity'])}",
    ]
    lines += [
        f"    {name:<16} {size_text(used[name])}"
        for name in ("parameters", "optimizer", "frozen", "batch", "temporaries", "program")
        if used[name] or name != "program"
    ]
    if found["compiled"]:
        lines.append(f"    (by formula      {size_text(found['memory_estimate']['total'])})")
    lines.append(
        f"  model FLOPs        {found['model_flops']:.4g} a step; carried out {found['executed_flops']:.4g}"
    )
    if found["collectives"] is not None:
        sent = ", ".join(
            f"{kind} {size_text(size)}" for kind, size in found["collectives"].items() if size >= 1e6
        )
        lines.append(f"  sent by a chip     {sent or 'nothing'}")
    else:
        lines.append(f"  sent by a chip     {size_text(found['network_bytes'])} (by formula)")
    times = ", ".join(
        f"{NAMES.get(name, name)} {seconds:.3g} s" for name, seconds in found["seconds"].items() if seconds
    )
    lines.append(
        f"  at best            {found['step_seconds']:.3g} s a step ({times}), bound by "
        f"{NAMES.get(found['bound'], found['bound'])}"
    )
    lines.append(f"  MFU                at most {found['mfu_bound']:.0%}")
    if found["changes"]:
        lines.append("  what would change that, by formula:")
        lines += [
            f"    {size_text(change['memory']):>9} {'fits' if change['fits'] else '    '}  {change['keys']}"
            for change in found["changes"]
        ]
    return lines
