"""The benchmarks of a recipe, with those of the mini world made where they are not given."""

from ml_collections import ConfigDict

from mllm_jax.config import data_seed
from mllm_jax.mini.world import dataset, videos
from mllm_jax.parallel import processes
from mllm_jax.storage import Path
from mllm_jax.turns import taking_turns
from mllm_jax.workdir import data_dir

DRAWN = {"mini": dataset, "mini_video": videos}  # kind -> the module that writes it
COUNT = 40  # questions per ability of one that is asked by its name alone


def eval_config(config: ConfigDict, workdir: Path) -> ConfigDict:
    """`config.eval` with the mini world's benchmarks written under the data folder where a path is not given.

    The first process writes, then the others read, or write on a disk of their own.
    """
    values = config.eval.copy_and_resolve_references()

    def write() -> None:
        for benchmark in values.benchmarks.values():
            if benchmark.kind in DRAWN and not benchmark.path:
                seed = data_seed(config) if benchmark.seed is None else benchmark.seed
                count = benchmark.count or COUNT
                options = {"framed": True} if benchmark.framed else {}
                name = "_".join([benchmark.kind, "benchmark", str(count), str(seed), *options])
                root = data_dir(config, workdir) / name
                with taking_turns(root, f"drawing the {benchmark.kind} benchmark"):
                    drawn = DRAWN[benchmark.kind].write_benchmark(root, count, seed, **options)
                    benchmark.path = str(drawn)

    processes.first_then_others(write, "mini benchmark written")
    return values
