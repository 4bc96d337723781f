"""Published benchmarks as a command line names them."""

import re
from collections.abc import Sequence
from pathlib import Path

from ml_collections import ConfigDict

from mllm_jax.evaluation.benchmarks import BenchmarkError, Published, get_asked


def select_benchmarks(names: Sequence[str], data_dir: str | Path, prepared: str | Path = "") -> ConfigDict:
    """`NAME` or `NAME:OPTION=VALUE:OPTION=VALUE` as entries of `config.eval.benchmarks`.

    The files of NAME are expected in `DATA_DIR/NAME` (or the folder of a benchmark that it shares them with), under the
    names that docs/benchmarks.md lists. An entry is called
    NAME, followed by the values of its options, so that differently asked benchmarks are kept apart.

    Args:
      names: from the command line.
      data_dir: holds a folder per benchmark.
      prepared: a folder where they are prepared as tensorflow-datasets data first; "" reads the files themselves.

    Example:
        >>> list(select_benchmarks(["pope", "scienceqa:part=img"], "data"))
        ['pope', 'scienceqa-img']

    Raises:
      BenchmarkError: an unknown name (the nearest is named) or option, or one that is given twice.
    """
    chosen = ConfigDict()
    for text in names:
        kind, *pairs = text.strip().split(":")
        benchmark = get_asked(kind)
        if not issubclass(benchmark, Published):
            raise BenchmarkError(f"{kind!r} is asked with --benchmark={kind} --path=..., not --benchmarks")
        options = {}
        for pair in pairs:
            name, equals, value = pair.partition("=")
            if not equals:
                raise BenchmarkError(f"{text!r}: options are given as NAME:OPTION=VALUE, {pair!r} is none")
            options[name] = value
        benchmark.read_options(options)
        values = (f"{n}={v}" if v in ("true", "false") else v for n, v in options.items())
        key = "-".join([kind, *(re.sub(r"[^A-Za-z0-9_=+-]+", "_", value) for value in values)])
        if key in chosen:
            raise BenchmarkError(f"--benchmarks names {text!r} twice")
        chosen[key] = ConfigDict(
            {
                "kind": kind,
                "path": str(Path(data_dir) / (benchmark.folder_name or kind)),
                "images": "",
                "options": options,
                "prepared": str(prepared),
                "max_new_tokens": 0,
            }
        )
    return chosen
