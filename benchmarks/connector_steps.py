"""Time that the quickstart's stage 2 takes for a sample with each connector, in turn with the default's.

    GLIBC_TUNABLES=glibc.malloc.hugetlb=1 python benchmarks/connector_steps.py --workdir=runs/steps --write

Batches are the recipe's own, made before the clock starts; the mini world is drawn into the work directory the first
time.
"""

import argparse
import importlib.util
import pathlib
import statistics
import time

import jax
import numpy as np
import page
from ml_collections import ConfigDict

from mllm_jax import connectors
from mllm_jax.inference import runs
from mllm_jax.interop import load_tokenizer
from mllm_jax.models import mllm, paths
from mllm_jax.parallel import cpu_devices
from mllm_jax.parallel.mesh import make_mesh, use_mesh
from mllm_jax.training.opening import open_stage
from mllm_jax.training.sources import packing_plan, prepare_sources
from mllm_jax.training.step import to_device

DEFAULT, STAGE = "mlp2x_gelu", "finetune"


def recipe(connector: str) -> ConfigDict:
    """The quickstart with a connector."""
    spec = importlib.util.spec_from_file_location("quickstart", page.ROOT / "configs" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(connector)


class Training:
    """The stage with a connector, from random weights, and its first batches."""

    def __init__(self, connector: str, workdir: pathlib.Path, steps: int):
        config = recipe(connector)
        stage, tokenizer = config.stages[STAGE], load_tokenizer(config.model.llm.path)
        model = runs.model_config(config)
        self.visual = model.visual_layout.slot.num_tokens
        self.mesh = make_mesh(config.mesh.to_dict())
        sources = prepare_sources(config, STAGE, model, tokenizer, workdir)
        packing = packing_plan(config, stage, model, tokenizer, sources, workdir)
        with use_mesh(self.mesh):
            params = jax.jit(lambda key: mllm.init(model, key))(jax.random.key(0))
            self.plan, batches = open_stage(
                config, STAGE, model, tokenizer, params, sources, packing, workdir, self.mesh
            )
            self.parameters = paths.count(params["connector"])
            self.state, self.frozen = self.plan.create_state(params), self.plan.place_frozen(params)
            with batches:
                rows = [next(batches).arrays for _ in range(steps)]
        self.samples = [int(each.segment_ids.max(axis=1).sum()) for each in rows]
        self.batches = [to_device(each, self.mesh) for each in rows]
        self.seconds(0)  # compiles

    def seconds(self, step: int) -> float:
        """Of one step, for each of its samples."""
        begin = time.perf_counter()
        with use_mesh(self.mesh):
            self.state, metrics = self.plan.step(self.state, self.frozen, self.batches[step])
            jax.block_until_ready(metrics)
        return (time.perf_counter() - begin) / self.samples[step]

    @property
    def shape(self) -> str:
        """Rows and their length."""
        return " x ".join(map(str, self.plan.batch.tokens.shape))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--steps", type=int, default=5)
    parser.add_argument(
        "--connectors", nargs="+", default=[name for name in connectors.CONNECTORS if name != DEFAULT]
    )
    parser.add_argument("--write", action="store_true", help="into docs/performance.md")
    args = parser.parse_args()
    cpu_devices.divide(recipe(DEFAULT).mesh.cpu_devices)
    args.workdir.mkdir(parents=True, exist_ok=True)
    base = Training(DEFAULT, args.workdir, args.steps)
    lines = [
        "| connector | parameters | visual tokens | rows of a step | ms a sample | default, in turn | times as fast |",
        "|---|---:|---:|---:|---:|---:|---:|",
    ]
    print("\n".join(lines), flush=True)
    for name in args.connectors:
        other = Training(name, args.workdir, args.steps)
        pairs = np.array([(other.seconds(step), base.seconds(step)) for step in range(args.steps)])[1:]
        mine, default = (page.spread(list(1e3 * column), 1) for column in pairs.T)
        ratio = statistics.median(pairs[:, 1] / pairs[:, 0])
        lines.append(
            f"| {name} | {other.parameters:,} | {other.visual} | {other.shape} | {mine} | {default} | {ratio:.2f} |"
        )
        print(lines[-1], flush=True)
    lines.insert(2, f"| {DEFAULT} | {base.parameters:,} | {base.visual} | {base.shape} | | | 1 |")
    if args.write:
        about = __doc__.split("\n\n")[0] + f" Median (least–greatest); {page.machine('jax')}."
        page.write_section("connector_steps", "## Cost of a connector", about, "\n".join(lines))


if __name__ == "__main__":
    main()
