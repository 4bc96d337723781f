"""Time of a stage-2 step of the quickstart with each connector, in turn, beside the default's.

    python benchmarks/connector_steps.py --steps=5

Batches are of the recipe's shapes and hold no data: time does not depend on what stands in them.
"""

import argparse
import importlib.util
import pathlib
import statistics
import time

import jax
import numpy as np

from mllm_jax import connectors
from mllm_jax.data.batch import Batch
from mllm_jax.inference import runs
from mllm_jax.models import mllm, paths
from mllm_jax.parallel.mesh import make_mesh, use_mesh
from mllm_jax.training.stage import StagePlan
from mllm_jax.training.step import to_device

ROOT = pathlib.Path(__file__).parents[1]
DEFAULT = "mlp2x_gelu"


def recipe(connector: str):
    """The quickstart with a connector."""
    spec = importlib.util.spec_from_file_location("quickstart", ROOT / "configs" / "quickstart.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.get_config(connector)


def step_seconds(connector: str, steps: int) -> tuple[float, int, int]:
    """(median seconds of a step after two that warm up, connector parameters, visual tokens)."""
    config = recipe(connector)
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    model = runs.model_config(config)
    with use_mesh(mesh):
        plan = StagePlan(config, "finetune", mesh, 300)
        params = jax.jit(lambda key: mllm.init(model, key))(jax.random.key(0))
        state, frozen = plan.create_state(params), plan.place_frozen(params)
        shapes = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), plan.batch)
        rows: Batch = shapes.empty()
        rows.segment_ids[:] = 1
        rows.loss_weights[:, -8:] = 1
        batch = to_device(jax.tree.map(np.asarray, rows), mesh)
        times = []
        for _ in range(2 + steps):
            begin = time.perf_counter()
            state, metrics = plan.step(state, frozen, batch)
            jax.block_until_ready(metrics)
            times.append(time.perf_counter() - begin)
    count = paths.count(params["connector"])
    return statistics.median(times[2:]), count, model.visual_layout.slot.num_tokens


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--steps", type=int, default=5)
    args = parser.parse_args()
    print("| connector | parameters | visual tokens | seconds a step | against the default |")
    print("|---|---:|---:|---:|---:|")
    base = step_seconds(DEFAULT, args.steps)[0]
    for name in connectors.CONNECTORS:
        seconds, count, tokens = step_seconds(name, args.steps)
        print(f"| {name} | {count:,} | {tokens} | {seconds:.2f} | {seconds / base:.2f} |", flush=True)


if __name__ == "__main__":
    main()
