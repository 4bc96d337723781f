"""How much faster a stage's updates are when the frozen tower's features come from the cache.

    python benchmarks/feature_cache.py --workdir=/tmp/feature_cache
    python benchmarks/feature_cache.py --workdir=/tmp/feature_cache --config=configs/quickstart.py:dci --steps=50

Trains the recipe's first stage twice, with pixels and with the cache (its features are computed beforehand and not
counted), and prints the median time of an update of each and their ratio.
"""

import argparse
import importlib.util
import json
import pathlib
import statistics
import sys

ROOT = pathlib.Path(__file__).parents[1]
sys.path.insert(0, str(ROOT))

import train  # noqa: E402


def recipe(spec: str):
    """The configuration of `FILE` or `FILE:ARGUMENT`."""
    file, _, argument = spec.partition(":")
    module = importlib.util.module_from_spec(found := importlib.util.spec_from_file_location("recipe", file))
    found.loader.exec_module(module)
    return module.get_config(argument) if argument else module.get_config()


def seconds(directory: pathlib.Path) -> float:
    """Median time of an update; the first, which compiles, is left out."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return statistics.median(json.loads(line)["step_seconds"] for line in lines[1:])


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--workdir", type=pathlib.Path, required=True)
    parser.add_argument("--config", default=str(ROOT / "configs" / "quickstart.py"))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--samples", type=int, default=200, help="pictures of the mini world")
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
        train.train(config, directory, evaluate=False)
        found[cached] = seconds(directory)
    print(
        f"median update: {found[False] * 1e3:.0f} ms with pixels, {found[True] * 1e3:.0f} ms from the cache, "
        f"{found[False] / found[True]:.2f} times as fast"
    )


if __name__ == "__main__":
    main()
