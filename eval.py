"""Answers a trained run's benchmarks, scores them and writes the report.

    python eval.py --workdir=runs/quickstart
    python eval.py --workdir=runs/quickstart --stage=pretrain --out=runs/quickstart/after_pretrain
    python eval.py --workdir=runs/mine --benchmark=vqa --path=test.json --images=images

Everything about the model is read from the work directory. What was answered before is kept, so a stopped evaluation
goes on where it was.
"""

import json
import pathlib

from absl import flags, logging
from ml_collections import ConfigDict

from mllm_jax.cli import script
from mllm_jax.config import ConfigError, benchmark_config, default_config
from mllm_jax.evaluation import run
from mllm_jax.interop import load_tokenizer
from mllm_jax.parallel.mesh import make_mesh, use_mesh
from mllm_jax.training import build

WORKDIR = flags.DEFINE_string("workdir", None, "Work directory of a run of train.py.", required=True)
STAGE = flags.DEFINE_string("stage", None, "Evaluate the model after this stage (default: the last one).")
OUT = flags.DEFINE_string("out", None, "Where `eval/` is written (default: the work directory).")
BENCHMARK = flags.DEFINE_string("benchmark", None, "Kind of a benchmark to answer instead of the run's own.")
PATH = flags.DEFINE_string("path", None, "Its questions (with --benchmark).")
IMAGES = flags.DEFINE_string("images", "", "Folder of its pictures (with --benchmark).")
BLIND = flags.DEFINE_bool("blind", True, "Also answer with the picture replaced by its mean.")
LIKELIHOOD = flags.DEFINE_bool("likelihood", False, "Also score multiple choice by the options' likelihood.")
BATCH_SIZE = flags.DEFINE_integer("batch_size", None, "Prompts at once (default: the run's).")


def run_config(workdir: pathlib.Path) -> ConfigDict:
    """The configuration that a work directory was trained with.

    Raises:
      ConfigError: not a work directory.
    """
    path = workdir / "config.json"
    if not path.exists():
        raise ConfigError(
            f"{workdir} holds no run: {path.name} is missing; give the --workdir of a run of train.py"
        )
    saved = json.loads(path.read_text())
    config = default_config()
    with config.unlocked():  # stages, sources and benchmarks have names of their own
        config.update(ConfigDict(saved))
    config.stage_order = tuple(saved["stage_order"])
    return config


def main(_):
    logging.set_verbosity(logging.WARNING)
    workdir = pathlib.Path(WORKDIR.value)

    # ------------------------------------------------------------------------------- what to evaluate, on what
    config = run_config(workdir)
    stage = STAGE.value or config.stage_order[-1]
    if stage not in config.stage_order:
        raise ConfigError(f"--stage={stage}: this run has {', '.join(config.stage_order)}")
    if BENCHMARK.value:
        benchmark = benchmark_config()
        benchmark.kind, benchmark.path, benchmark.images = BENCHMARK.value, PATH.value or "", IMAGES.value
        config.eval.benchmarks = ConfigDict({BENCHMARK.value: benchmark})
    config.eval.blind, config.eval.likelihood = BLIND.value, LIKELIHOOD.value
    config.eval.batch_size = BATCH_SIZE.value or config.eval.batch_size

    # ---------------------------------------------------------------------------------------------- the model
    mesh = make_mesh(config.mesh.to_dict())
    model = build.model_config(config)
    tokenizer = load_tokenizer(config.model.llm.path)
    with use_mesh(mesh):
        params = build.load_stage(workdir / "params" / stage, config, model, mesh)
        bundle = build.bundle(config, model, params, tokenizer)

        # ------------------------------------------------------------------------- answers, scores and report
        run.evaluate(bundle, build.eval_config(config, workdir), pathlib.Path(OUT.value or workdir))


if __name__ == "__main__":
    script.run(main)
