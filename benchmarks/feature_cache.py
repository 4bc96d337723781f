"""How much faster a stage's steps are when the frozen tower's features come from the cache.

    python benchmarks/feature_cache.py --workdir=runs/feature_cache
    python benchmarks/feature_cache.py --workdir=runs/feature_cache --config=configs/quickstart.py:dci --steps=50

Trains the recipe's first stage twice, with pixels and with the cache (its features are computed beforehand and not
counted), and prints the median wall-clock and CPU time of a step of each and their ratio. On a machine that does
other work besides, only the CPU times say something.
"""

import argparse
import importlib.util
import itertools
import pathlib
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402


def recipe(spec: str):
    """The configuration of `FILE` or `FILE:ARGUMENT`."""
    file, _, argument = spec.partition(":")
    module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location("recipe", file))
    found.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def timed(config, directory: pathlib.Path) -> dict[str, float]:
    """Trains; median wall-clock and CPU seconds of a step, the first two (compilation) left out."""
    stamps: list[tuple[float, float]] = []
    make = train.make_train_step

    def watched(*args, **kwargs):
        step = make(*args, **kwargs)

        def run(*values):
            stamps.append((time.perf_counter(), time.process_time()))
            return step(*values)

        return run

    train.make_train_step = watched
    try:
        train.train(config, directory, evaluate=False)
    finally:
        train.make_train_step = make
    pairs = list(itertools.pairwise(stamps[2:]))
    kinds = {"wall clock": 0, "CPU": 1}
    return {kind: statistics.median(b[i] - a[i] for a, b in pairs) for kind, i in kinds.items()}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.py"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samples", type=int, default=200, help="images of the mini world")
    args = parser.parse_args()
    config = recipe(args.config)
    name = config.stage_order[0]
    stage = config.stages[name]
    for other in config.stage_order[1:]:
        del config.stages[other]
    config.stage_order = (name,)
    stage.steps, stage.log_every, stage.checkpoint_every = args.steps, 1, args.steps
    for source in stage.sources.values():
        source.count = args.samples if source.kind == "mini_world" else 0
    config.data.dir = str(args.workdir / "data")
    found = {}
    for cached in (False, True):
        stage.cache_features = cached
        directory = args.workdir / ("cached" if cached else "pixels")
        found[cached] = timed(config, directory)
    for kind, pixels in found[False].items():
        cache = found[True][kind]
        print(
            f"median step, {kind}: {pixels * 1e3:.0f} ms with pixels, {cache * 1e3:.0f} ms from the cache, "
            f"{pixels / cache:.2f} times as fast"
        )


if __name__ == "__main__":
    main()
