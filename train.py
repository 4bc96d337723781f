"""Trains a multimodal LLM in the stages of a recipe, then evaluates it.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Any key of the recipe can be changed on the command line (`--config.model.connector.name=average_pool`). A run that was
stopped, however hard, goes on where its last checkpoint was when the same command is given again.
"""

import contextlib
import functools
import pathlib
import signal
import time
from collections.abc import Iterator

import jax
from absl import flags, logging

from mllm_jax import console, workdir
from mllm_jax.cli import script
from mllm_jax.config import check, resolved
from mllm_jax.evaluation import run
from mllm_jax.evaluation.own_benchmarks import eval_config
from mllm_jax.evaluation.preflight import check_benchmarks
from mllm_jax.evaluation.report import losses
from mllm_jax.inference import runs
from mllm_jax.inference.load import trained_model
from mllm_jax.interop import load_tokenizer
from mllm_jax.interop.saved_params import save_params
from mllm_jax.models import paths
from mllm_jax.parallel import processes
from mllm_jax.parallel.mesh import make_mesh, num_row_shards, use_mesh
from mllm_jax.training import announce, preflight
from mllm_jax.training.checkpoint import StageCheckpoints
from mllm_jax.training.features import feature_cache
from mllm_jax.training.metrics import RunLog
from mllm_jax.training.params import load_stage, starting_params
from mllm_jax.training.sources import prepare_sources, read_noted, stage_iterator
from mllm_jax.training.stage import StagePlan
from mllm_jax.training.step import to_device

CONFIG = script.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.", required=True)
flags.adopt_module_key_flags(script)  # --help shows --config and --traceback
EVALUATE = flags.DEFINE_bool("evaluate", True, "Evaluate after the last stage.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several hosts: join the other processes first (docs/operating.md)."
)
say = functools.partial(console.say, console.make_console())


def train_stage(plan, batches, params, directory):
    """Trains one stage from host parameters and returns the whole model's parameters on the mesh."""
    name, stage, steps = plan.name, plan.stage, plan.steps

    # -------------------------------------------------------------------------------- restore or create the state
    checkpoints = StageCheckpoints(directory / "checkpoints" / name, stage.keep_last, stage.keep_best)
    frozen = plan.place_frozen(params)
    if checkpoints.steps():
        state, position = checkpoints.restore(checkpoints.steps()[-1], plan.state)
        batches.set_state(position)
        say(f"stage {name}: continuing after update {int(state.step)}")
    else:
        state = plan.create_state(params)
    start = int(state.step)
    samples = "" if batches.num_samples is None else f"{batches.num_samples:,} samples, "
    counts = f"{paths.count(state.params):,} parameters trained, {paths.count(frozen):,} frozen"
    say(f"stage {name}: {counts}, {samples}{steps:,} steps")

    # -------------------------------------------------------------------------------------------- the loop
    log = RunLog(directory, name, steps, start, write=jax.process_index() == 0)
    try:
        with stop_requests() as requests:
            for step in range(start + 1, steps + 1):
                batch = next(batches)
                state, metrics = plan.step(state, frozen, to_device(batch.arrays, plan.mesh))
                log.add(step, metrics, batch.ids, batch.skipped)
                stop = processes.any_process(bool(requests), step % stage.log_every == 0)
                save = step % stage.checkpoint_every == 0 or step == steps or stop
                if (
                    save or step % stage.log_every == 0
                ):  # refuses what is not finite, so it comes before saving
                    log.flush(plan.learning_rate(step - 1))
                if save:
                    checkpoints.save(state, batches.get_state(), log.loss_since_checkpoint())
                if stop:  # also after the last step: the next stage would lose more
                    raise SystemExit(
                        f"stopped by a signal after step {step}; the same command continues from there"
                    )
                if step == start + 1:
                    log.pause_clock()  # the first step compiles
    finally:
        log.close()
        batches.close()
        checkpoints.close()
    return plan.whole(state, frozen, params)


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that stays empty until SIGTERM asks to stop (a preempted machine)."""
    requests: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: requests.append(number))
    try:
        yield requests
    finally:
        signal.signal(signal.SIGTERM, before)


def draw_losses(directory):
    """Draws the loss curves of the steps so far, if there are any; the first process does."""
    log = directory / "metrics.jsonl"
    if jax.process_index() == 0 and log.is_file() and log.stat().st_size:
        losses.plot_losses(log, directory / "loss.png")


def train(config, directory, evaluate=True):
    """All stages of a recipe, each from the one before, then the evaluation; returns the parameters."""
    begin = time.time()

    # ------------------------------------------------------------------- check everything before any compute
    check(config)
    mesh = make_mesh(config.mesh.to_dict())
    model = runs.model_config(config)
    tokenizer = load_tokenizer(config.model.llm.path)
    preflight.check_stages(config, model, tokenizer, mesh, read_noted(directory))
    if evaluate:
        check_benchmarks(config, tokenizer)
    for line in announce.model_lines(config, model, mesh):
        say(line)

    with use_mesh(mesh), workdir.open_run(directory, resolved(config)):
        # ------------------------------------------------------------------- stages; finished ones are skipped
        finished = runs.finished_stages(directory, config)
        remaining = config.stage_order
        params = None
        if finished:
            remaining = remaining[remaining.index(finished[-1]) + 1 :]
            params = load_stage(directory / "params" / finished[-1], config, model, mesh)
            say(f"stage {finished[-1]}: done before")
        sources = {name: prepare_sources(config, name, model, tokenizer, directory) for name in remaining}
        for line in announce.length_lines(config, model, tokenizer, sources, directory):
            say(line)
        for name in remaining:
            stage = config.stages[name]
            params = starting_params(config, model, name, params)
            cache = feature_cache(config, stage, model, params, sources[name], directory)
            multiple = num_row_shards(mesh) * stage.accumulation
            batches = stage_iterator(
                config, stage, model, tokenizer, sources[name], directory, cache, multiple
            )
            plan = StagePlan(config, name, mesh, stage.steps or batches.num_batches, batches.rows)
            try:
                params = train_stage(plan, batches, params, directory)
            except BaseException:
                # What stopped it, a full disk say, may stop this, too, and must stay the error that is shown.
                with contextlib.suppress(Exception):
                    draw_losses(directory)
                raise
            save_params(directory / "params" / name, params)
            draw_losses(directory)

        # -------------------------------------------------------------------------------------- evaluation
        if evaluate and config.eval.benchmarks:
            merged = runs.merged(params, config.stages[config.stage_order[-1]], config.model.frozen_dtype)
            answering = trained_model(config, model, merged, tokenizer)
            run.evaluate(answering, eval_config(config, directory), directory)
    say(f"finished in {time.time() - begin:.0f} s; everything is in {directory}")
    return params


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax tells every write
    if DISTRIBUTED.value:
        processes.join()
    train(CONFIG.value, pathlib.Path(WORKDIR.value), EVALUATE.value)


if __name__ == "__main__":
    script.run(main)
