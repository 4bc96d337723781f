"""The benchmarks of a recipe, with the mini benchmark made where it is not given."""

from ml_collections import ConfigDict

from mllm_jax.config import data_seed
from mllm_jax.mini.world import dataset as mini_dataset
from mllm_jax.parallel import processes
from mllm_jax.storage import Path
from mllm_jax.turns import taking_turns
from mllm_jax.workdir import data_dir


def eval_config(config: ConfigDict, workdir: Path) -> ConfigDict:
    """`config.eval` with the mini benchmark written under the data folder where a path is not given.

    The first process writes, then the others read, or write on a disk of their own.
    """
    values = config.eval.copy_and_resolve_references()

    def write() -> None:
        for benchmark in values.benchmarks.values():
            if benchmark.kind == "mini" and not benchmark.path:
                seed = data_seed(config) if benchmark.seed is None else benchmark.seed
                root = data_dir(config, workdir) / f"mini_benchmark_{benchmark.count}_{seed}"
                with taking_turns(root, "drawing the mini benchmark"):
                    benchmark.path = str(mini_dataset.write_benchmark(root, benchmark.count, seed))
                benchmark.images = str(root / "images")

    processes.first_then_others(write, "mini benchmark written")
    return values
