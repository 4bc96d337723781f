"""docs/scaling.md: published recipes on TPU slices and GPU hosts, planned without them.

python benchmarks/scaling.py              # what is there, cell by cell
python benchmarks/scaling.py --write      # plan what is missing, keep it in scaling.json, write the page

Each cell is `mllm-jax plan --mesh=auto --quick` of a recipe's stage on a machine: the search chooses mesh and
accumulation by the formula, and a TPU's step is compiled with them. A cell takes minutes and is kept when it is done,
so the command can be stopped and goes on where it was.
"""

import argparse
import importlib.util
import json
import os
import pathlib
import resource
import subprocess
import sys

ROOT = pathlib.Path(__file__).parents[1]
STORE, PAGE = ROOT / "benchmarks" / "scaling.json", ROOT / "docs" / "scaling.md"
SLICES = ("v5e-16", "v5e-64", "v5e-256", "v5p-8", "v5p-64", "v5p-128", "v5p-256", "v6e-8", "v6e-64")
HOSTS = ("a100:8", "h100:8", "4 x h100:8")
# title, recipe, its argument, stage, keys
ROWS = (
    ("LLaVA-1.5 7B, stage 1", "llava15", "", "pretrain", {}),
    ("LLaVA-1.5 7B, stage 2", "llava15", "", "finetune", {}),
    ("LLaVA-1.5 13B, stage 1", "llava15", "", "pretrain", {"model.llm.path": "lmsys/vicuna-13b-v1.5"}),
    ("LLaVA-1.5 13B, stage 2", "llava15", "", "finetune", {"model.llm.path": "lmsys/vicuna-13b-v1.5"}),
    ("Dense Connector, Llama 3 8B, stage 2", "dense_connector", "llama3-8b", "finetune", {}),
    ("Dense Connector, Yi 34B, LoRA", "dense_connector", "yi-34b", "finetune", {}),
    ("Dense Connector, Llama 3 70B, LoRA", "dense_connector", "llama3-70b", "finetune", {}),
)
NEAR = 1.15  # of the memory: what needs more by the formula is not compiled
FIRST = (
    "v5p-64",
    "v5e-64",
    "v5p-128",
    "v6e-64",
)  # compiled before the rest of the table, stage 2 before stage 1


def recipe(row: tuple):
    """The resolved recipe of a row."""
    _, name, argument, _, keys = row
    spec = importlib.util.spec_from_file_location(f"recipe_{name}", ROOT / "configs" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    config = module.get_config(*([argument] if argument else []))
    for key, value in keys.items():
        *parents, last = key.split(".")
        place = config
        for parent in parents:
            place = place[parent]
        place[last] = value
    return config


def describe(row: tuple, name: str, estimate_only: bool) -> dict:
    """One cell, planned in this process."""
    from mllm_jax.planning.describe import describe_stage
    from mllm_jax.planning.topology import parse

    count, _, kind = name.rpartition(" x ")
    machine = parse(kind, int(count or 1))
    found = describe_stage(
        recipe(row), row[3], machine, auto_mesh=True, quick=True, estimate_only=estimate_only
    )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {**found, "host_memory": peak}


def cells() -> list[tuple[tuple, str]]:
    """Every (row, machine), the most asked for first."""
    every = [(row, name) for row in ROWS for name in SLICES + HOSTS]
    return sorted(every, key=lambda cell: (cell[1] not in FIRST, cell[0][3] == "pretrain"))


def key(row: tuple, name: str) -> str:
    return f"{row[0]} | {name}"


def plan_missing(store: dict) -> None:
    """Fills in the estimates of all cells, then compiles one after the other, each in a process of its own."""
    for compile_it in (False, True):
        for row, name in cells():
            have = store.get(key(row, name))
            if have and (have["compiled"] or not compile_it):
                continue
            if compile_it and (name in HOSTS or have["memory"]["total"] > NEAR * have["memory_capacity"]):
                continue  # there is no compiler here, or no mesh comes near to holding it
            if compile_it:
                command = [sys.executable, __file__, "--cell", row[0], name]
                environment = {**os.environ, "PYTHONPATH": str(ROOT)}
                done = subprocess.run(command, capture_output=True, text=True, env=environment)
                if done.returncode:
                    print(f"{key(row, name)}: {done.stderr.strip().splitlines()[-1:]}", flush=True)
                    continue
                store[key(row, name)] = json.loads(done.stdout.splitlines()[-1])
            else:
                store[key(row, name)] = describe(row, name, estimate_only=True)
            STORE.write_text(json.dumps(store, indent=1, sort_keys=True) + "\n", encoding="utf-8")
            PAGE.write_text(page(store), encoding="utf-8")
            print(f"{key(row, name)}: {short(store[key(row, name)])}", flush=True)


def short(cell: dict) -> str:
    """A cell of the table."""
    if not cell["fits"]:
        near = not cell["compiled"] and cell["memory"]["total"] <= cell["memory_capacity"]
        return (
            f"{'~near' if near else 'no'} ({gib(cell['memory']['total'])} of {gib(cell['memory_capacity'])})"
        )
    about = "" if cell["compiled"] else "~"
    return f"{about}{cell['step_seconds']:.2f} s, {cell['mfu_bound']:.0%}, {gib(cell['memory']['total'])}"


def gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def mesh_text(cell: dict) -> str:
    axes = " ".join(f"{axis} {size}" for axis, size in cell["mesh"].items() if size > 1) or "one chip"
    return axes + (f", accumulation {cell['accumulation']}" if cell["accumulation"] > 1 else "")


def page(store: dict) -> str:
    """docs/scaling.md."""
    lines = [INTRODUCTION, "", agreement(store), "\n## Summary"]
    for names in (SLICES, HOSTS):
        lines += ["\n| | " + " | ".join(names) + " |", "|---" * (1 + len(names)) + "|"]
        for row in ROWS:
            found = [store.get(key(row, name)) for name in names]
            lines.append(f"| {row[0]} | " + " | ".join(short(cell) if cell else "" for cell in found) + " |")
    lines.append(
        "\n## Recommended meshes, and memory of a chip\n\nArguments: trained parameters / optimizer state / frozen "
        "parameters. Bound: the resource that limits the step.\n"
    )
    lines += [
        "| | machine | mesh | arguments | temporaries | bound | sent by a chip | compiling: processor time, memory |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for row in ROWS:
        for name in SLICES + HOSTS:
            cell = store.get(key(row, name))
            if not cell:
                continue
            used = cell["memory"]
            given = " / ".join(f"{used[part] / 2**30:.2f}" for part in ("parameters", "optimizer", "frozen"))
            how = (
                f"{cell['compile_seconds']:.0f} s, {cell['host_memory'] / 1e9:.1f} GB"
                if cell["compiled"]
                else "formula"
            )
            lines.append(
                f"| {row[0]} | {name} | {mesh_text(cell)} | {given} GiB | {gib(used['temporaries'])} | "
                f"{cell['bound']} | {cell['network_bytes'] / 1e9:.1f} GB | {how} |"
            )
    return "\n".join(lines) + "\n"


def agreement(store: dict) -> str:
    """How near the formula is to the compiler."""
    cells = [cell for cell in store.values() if cell["compiled"] and cell["fits"]]
    if not cells:
        return ""

    def span(ratios: list[float]) -> str:
        return f"{min(ratios):.2f} to {max(ratios):.2f} times"

    memory = span([cell["memory_estimate"]["total"] / cell["memory"]["total"] for cell in cells])
    sent = span([cell["network_bytes_estimate"] / cell["network_bytes"] for cell in cells])
    most = max(cell["compile_seconds"] for cell in cells), max(cell["host_memory"] for cell in cells) / 1e9
    return (
        f"In the {len(cells)} compiled cells the formula gives {memory} the compiler's memory and {sent} its "
        f"traffic.\nCompiling took at most {most[0]:.0f} s of processor time and {most[1]:.1f} GB."
    )


INTRODUCTION = """# Scaling

Made by `python benchmarks/scaling.py --write` on a machine without accelerators. Nothing here was measured on one:
**every figure is a plan**. The step of each recipe was compiled for the slice by XLA's TPU compiler where the last
column says so; that gives memory and traffic. All else (marked `~` and `formula`) is `mllm-jax plan --estimate`, GPU
hosts always. Times are bounds: no step is faster than its slowest resource (the chip's peak, its memory, its network),
so a real step is slower, and the MFU is the most that can be reached.

A cell says the bound of a step's time, of MFU, and the memory of a chip, or `no` with the least memory of any mesh
(`~near` where only compiling would tell). Names are Cloud TPU's: v5p-64 has 32 chips, v5e-64 has 64; `4 x h100:8` are
four hosts of eight GPUs. Batches are the papers': 256 in stage 1, 128 in stage 2, rows of 2,048 positions, one sample a
row, taken as full. Mesh and accumulation are those that the formula finds fastest among all that fit (`--mesh=auto`).
The compiler ran with less effort (`--quick`), which hides less communication behind computation and needs less memory
for it; [operating.md](operating.md#plan-before-you-pay) says how much."""


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--write", action="store_true", help="plan what is missing and write the page")
    parser.add_argument("--cell", nargs=2, metavar=("ROW", "SLICE"), help="print one cell as JSON")
    args = parser.parse_args()
    import jax

    jax.config.update("jax_platforms", "cpu")
    if args.cell:
        row = next(row for row in ROWS if row[0] == args.cell[0])
        print(json.dumps(describe(row, args.cell[1], estimate_only=False)))
        return
    store = json.loads(STORE.read_text(encoding="utf-8")) if STORE.exists() else {}
    if args.write:
        plan_missing(store)
    for row, name in cells():
        if cell := store.get(key(row, name)):
            print(f"{key(row, name)}: {short(cell)}")


if __name__ == "__main__":
    main()
