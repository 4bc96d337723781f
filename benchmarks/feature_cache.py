"""How much faster a stage's steps are when the frozen tower's features come from the cache.

    python benchmarks/feature_cache.py --workdir=runs/feature_cache
    python benchmarks/feature_cache.py --workdir=runs/feature_cache --config=configs/quickstart.py:dci --steps=50

Trains the recipe's first stage twice, with pixels and with the cache (its features are computed beforehand and not
counted), and prints the median wall-clock and CPU time of a step of each and their ratio. A step's batch is read within
its time: files are decoded, or features are read. On a machine that does other work besides, only the CPU times say
something.
"""

import argparse
import importlib.util
import itertools
import pathlib
import statistics
import time

import jax
import page
from ml_collections import ConfigDict

from mllm_jax.config import check
from mllm_jax.inference import runs
from mllm_jax.interop import load_tokenizer
from mllm_jax.parallel.mesh import make_mesh, use_mesh
from mllm_jax.training.opening import open_stage
from mllm_jax.training.params import starting_params
from mllm_jax.training.sources import packing_plan, prepare_sources
from mllm_jax.training.step import to_device

CLOCKS = {"wall clock": time.perf_counter, "CPU": time.process_time}
COMPILING = 2  # steps at the beginning that are not counted


def recipe(spec: str) -> ConfigDict:
    """The configuration of `FILE` or `FILE:ARGUMENT`."""
    file, _, argument = spec.partition(":")
    module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location("recipe", file))
    found.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def timed(config: ConfigDict, name: str, workdir: pathlib.Path) -> dict[str, float]:
    """Trains stage `name` from the pretrained parts; median seconds of a step by each clock."""
    check(config)
    stage, tokenizer = config.stages[name], load_tokenizer(config.model.llm.path)
    model, mesh = runs.model_config(config), make_mesh(config.mesh.to_dict())
    sources = prepare_sources(config, name, model, tokenizer, workdir)
    packing = packing_plan(config, stage, model, tokenizer, sources, workdir)
    stamps = []
    with use_mesh(mesh):
        params = starting_params(config, model, name, None)
        plan, batches = open_stage(config, name, model, tokenizer, params, sources, packing, workdir, mesh)
        with batches:
            state, frozen = plan.create_state(params), plan.place_frozen(params)
            for batch in itertools.islice(batches, stage.steps):
                state, metrics = plan.step(state, frozen, to_device(batch.arrays, mesh))
                jax.block_until_ready(metrics)
                stamps.append([clock() for clock in CLOCKS.values()])
    seconds = [
        [b - a for a, b in zip(*pair, strict=True)] for pair in itertools.pairwise(stamps[COMPILING - 1 :])
    ]
    return dict(zip(CLOCKS, map(statistics.median, zip(*seconds, strict=True)), strict=True))


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--config", default=str(page.ROOT / "configs" / "quickstart.py"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samples", type=int, default=200, help="images of the mini world")
    args = parser.parse_args()
    if args.steps <= COMPILING:
        parser.error(f"--steps must be above {COMPILING}: those compile and are not counted")
    args.workdir.mkdir(parents=True, exist_ok=True)
    config = recipe(args.config)
    name = config.stage_order[0]
    stage = config.stages[name]
    stage.steps = args.steps
    for source in stage.sources.values():
        if source.kind == "mini_world":
            source.count = args.samples
    found = {}
    for cached in (False, True):
        stage.cache_features = cached
        found[cached] = timed(config, name, args.workdir)
    for kind, pixels in found[False].items():
        cache = found[True][kind]
        print(
            f"median step, {kind}: {pixels * 1e3:.0f} ms with pixels, {cache * 1e3:.0f} ms from the cache, "
            f"{pixels / cache:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
