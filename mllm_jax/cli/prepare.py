"""Write all data of a recipe before training, on a machine without accelerators and in parallel processes.

    mllm-jax prepare --config=configs/llava15.py --config.data.dir=/data/llava15 \\
        --config.stages.pretrain.sources.main.json=... (as for train.py)
    python train.py (the same) --config.data.prepared --workdir=gs://bucket/run

Samples are read, checked and written as ArrayRecord, the mini world is drawn, samples are measured for packing, and
with --benchmarks=mmbench,pope --data_dir=DIR these are written below DATA/benchmarks for `eval.py --prepared`. A run
that was stopped, however hard, is continued by the same command and ends with the same files.
`--config.data.prepared` then trains from these files alone. Vision features (`cache_features`) need the tower and are
computed when training begins.
"""

import functools
import os
import pathlib
import sys
import time

from absl import flags, logging
from ml_collections import ConfigDict

from mllm_jax import console
from mllm_jax.cli import script
from mllm_jax.config import ConfigError, check, config_key_error
from mllm_jax.data.chat_template import check_template, resolve_template
from mllm_jax.evaluation.own_benchmarks import eval_config
from mllm_jax.evaluation.preflight import check_benchmarks
from mllm_jax.evaluation.run import open_benchmark
from mllm_jax.evaluation.selection import select_benchmarks
from mllm_jax.inference import runs
from mllm_jax.interop import load_tokenizer
from mllm_jax.storage import as_path, local_path
from mllm_jax.training import preflight
from mllm_jax.training.sources import prepare_stage
from mllm_jax.workdir import data_dir


def prepare(
    config: ConfigDict, directory: pathlib.Path, workers: int, benchmarks: ConfigDict | None = None
) -> None:
    """Prepares everything that a recipe reads.

    Args:
      directory: where prepared data are kept.
      workers: processes.
      benchmarks: published ones to prepare as well, as `select_benchmarks` gives them.

    Raises:
      ConfigError, DataError, ImageError, SampleError, BenchmarkError: naming what cannot be used.
    """
    say, begin = functools.partial(console.say, console.make_console()), time.time()
    check(config)
    model, tokenizer = runs.model_config(config), load_tokenizer(config.model.llm.path)
    for name, stage in config.stages.items():
        with config_key_error(f"stages.{name}.template"):
            check_template(resolve_template(stage.template, tokenizer), tokenizer)
        for source, values in stage.sources.items():
            preflight.check_source(values, f"stages.{name}.sources.{source}")
    check_benchmarks(config, tokenizer)
    directory.mkdir(parents=True, exist_ok=True)
    for name in config.stage_order:
        found = prepare_stage(config, name, model, tokenizer, directory, workers)
        told = ", ".join(f"{source} {len(data):,}" for source, data in found.items())
        say(f"stage {name}: samples of {told}")
        if config.stages[name].cache_features:
            say(f"stage {name}: vision features are computed when training begins (cache_features)")
    config.data.dir = str(directory)
    eval_config(config, directory)  # draws the mini benchmark
    for name, values in (benchmarks or {}).items():
        say(f"benchmark {name}: {len(open_benchmark(values).questions):,} questions")
    say(
        f"prepared in {time.time() - begin:.0f} s; train with --config.data.dir={directory} --config.data.prepared"
    )


def main(arguments: list[str]) -> int:
    """Runs the verb; its exit code is 0, or 1 with a message."""
    if not arguments or {"-h", "--help", "--helpfull"} & set(arguments):
        print(__doc__.strip())
        print("\n  --workdir=DIR   put them where a run in DIR looks, DIR/data, if data.dir is not set")
        print("  --workers=N     processes (default: one per core)")
        return 0
    config = script.define_config()
    workdir = flags.DEFINE_string(
        "workdir", None, "Put data where a run in it looks, if data.dir is not set."
    )
    names = flags.DEFINE_list("benchmarks", None, "Published benchmarks, as for eval.py.")
    files = flags.DEFINE_string("data_dir", "", "Holds a folder per published benchmark.")
    workers = flags.DEFINE_integer("workers", os.cpu_count(), "Processes.", lower_bound=1)

    def run(_: list[str]) -> None:
        logging.set_verbosity(logging.WARNING)  # tensorflow-datasets tells what it writes
        if not (config.value.data.dir or workdir.value):
            raise ConfigError("config key 'data.dir' is not set: give a folder for the data, or --workdir")
        with config_key_error("data.dir"):
            local_path(config.value.data.dir)
        folder = data_dir(config.value, as_path(workdir.value or "."))
        chosen = None
        if names.value:
            chosen = select_benchmarks(names.value, files.value, str(folder / "benchmarks"))
        prepare(config.value, folder, workers.value, chosen)

    sys.argv[1:] = arguments  # where ml_collections looks for values of keys
    script.run(run, ["mllm-jax prepare", *arguments])
    return 0
