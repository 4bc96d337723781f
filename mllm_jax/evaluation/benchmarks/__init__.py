"""The table of benchmarks: exact name -> benchmark. A new benchmark is one file and one row here."""

from mllm_jax.evaluation.benchmarks import mini, vqa
from mllm_jax.evaluation.benchmarks.base import Benchmark

BENCHMARKS: dict[str, Benchmark] = {
    "mini": mini.BENCHMARK,
    "vqa": vqa.BENCHMARK,
}


def get_benchmark(name: str) -> Benchmark:
    """The benchmark of that exact name.

    Raises:
        ValueError: there is none; lists the names.
    """
    if name not in BENCHMARKS:
        raise ValueError(f"no benchmark {name!r}; there are {', '.join(sorted(BENCHMARKS))}")
    return BENCHMARKS[name]


__all__ = ["BENCHMARKS", "Benchmark", "get_benchmark"]
