"""Trains a multimodal LLM in the stages of a recipe, then evaluates it.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Any key of the recipe can be changed on the command line (`--config.model.connector.name=average_pool`). A run that was
stopped, however hard, goes on where its last checkpoint was when the same command is given again.
"""

from mllm_jax.cli import huge_pages

if __name__ == "__main__":
    huge_pages.start_again()  # before the seconds that the imports take

import contextlib
import functools
import signal
import time
from collections.abc import Iterator

import jax
from absl import flags, logging

from mllm_jax import console, workdir
from mllm_jax.cli import script
from mllm_jax.config import check, resolved, row_lengths
from mllm_jax.data.rows import Rows
from mllm_jax.evaluation import run
from mllm_jax.evaluation.own_benchmarks import eval_config
from mllm_jax.evaluation.preflight import check_benchmarks
from mllm_jax.inference import runs
from mllm_jax.inference.load import trained_model
from mllm_jax.interop import load_tokenizer
from mllm_jax.interop.saved_params import save_params
from mllm_jax.models import paths
from mllm_jax.models.attention_uses import check_backends
from mllm_jax.parallel import cpu_devices, endings, processes
from mllm_jax.parallel.chips import peak_flops
from mllm_jax.parallel.mesh import ANSWERING_RULES, make_mesh, use_mesh
from mllm_jax.parallel.row_parts import row_part
from mllm_jax.storage import as_path, size
from mllm_jax.training import announce, preflight
from mllm_jax.training.checkpoint import StageCheckpoints
from mllm_jax.training.metrics import RunLog
from mllm_jax.training.opening import open_stage
from mllm_jax.training.params import load_stage, starting_params
from mllm_jax.training.profile import StepProfiler
from mllm_jax.training.sources import is_drawn, packing_plan, prepare_sources, read_noted
from mllm_jax.training.step import to_device
from mllm_jax.training.tracking import check_tracking, tracked

CONFIG = script.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept: a folder or gs://.", required=True)
flags.adopt_module_key_flags(script)  # --help shows --config and --traceback
EVALUATE = flags.DEFINE_bool("evaluate", True, "Evaluate after the last stage.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several hosts: join the other processes first (docs/operating.md)."
)
say = functools.partial(console.say, console.make_console())


def begin_stage(plan, batches, params, directory):
    """What a stage goes on from, on the mesh: its checkpoints, its state, the frozen parameters and those not used."""
    checkpoints = StageCheckpoints(
        directory / "checkpoints" / plan.name, plan.stage.keep_last, plan.stage.keep_best
    )
    frozen = plan.place_frozen(params)
    if checkpoints.steps():
        state, position = checkpoints.restore(checkpoints.steps()[-1], plan.state)
        batches.set_state(position)
        say(f"stage {plan.name}: continuing after step {int(state.step)}")
    else:
        state = plan.create_state(params)
    samples = "" if batches.num_samples is None else f"{batches.num_samples:,} samples, "
    counts = f"{paths.count(state.params):,} parameters trained, {paths.count(frozen):,} frozen"
    say(f"stage {plan.name}: {counts}, {samples}{plan.steps:,} steps")
    return checkpoints, state, frozen, plan.unused(params)


def train_stage(plan, batches, begun, directory, check_held, track):
    """Trains one stage from what `begin_stage` gave and returns the whole model's parameters on the mesh."""
    profile = plan.config.profile
    stage, steps = plan.stage, plan.steps
    checkpoints, state, frozen, unused = begun
    start = int(state.step)
    flops, peak = count_flops(plan), peak_flops(plan.mesh.devices.flat)
    log = RunLog(directory, plan.name, steps, start, jax.process_index() == 0, flops, peak, track)
    reads_first = row_part(plan.mesh).first  # of the processes that read the same rows
    late = processes.Postponed()
    first_traced = start + profile.start if profile.start else 0
    profiler = StepProfiler(directory / "profile" / plan.name, first_traced, profile.steps, log.paused)
    with contextlib.ExitStack() as closing:
        for part in (checkpoints, batches, log):  # the last first, and all whatever one of them raises
            closing.callback(part.close)
        with endings.told(), stop_requests() as requests, profiler:
            for step in range(start + 1, steps + 1):
                # The first step waits for the loader and compiles.
                with log.paused() if step == start + 1 else contextlib.nullcontext():
                    batch = None
                    with late:  # other processes would wait in this step for one that cannot read
                        batch = next(batches)
                    batch = batch or Rows(plan.empty_rows(), [], [])
                    with profiler.step(step):
                        state, metrics = plan.step(state, frozen, to_device(batch.arrays, plan.mesh))
                profiler.stop_after(step, metrics)
                log.add(step, metrics, batch.ids, batch.skipped if reads_first else [])
                stop = processes.any_process(bool(requests), step % stage.log_every == 0)
                save = step % stage.checkpoint_every == 0 or step == steps or stop
                if save or step % stage.log_every == 0:
                    with late:
                        check_held()
                    late.meet(f"step {step}")
                    log.flush(plan.learning_rate(step - 1))  # refuses what is not finite: before saving
                if save:
                    with log.paused():  # it waits for the write before
                        with processes.together(f"log of step {step} kept"):
                            log.sync()
                        checkpoints.save(state, batches.get_state(), log.loss_since_checkpoint())
                if stop:  # also after the last step: the next stage would lose more
                    message = f"stopped by a signal after step {step}; the same command continues from there"
                    raise endings.agreed(SystemExit(message))
    return plan.whole(state, frozen, unused)


def count_flops(plan):
    """The model FLOPs of a step, for the log; None where a part cannot be counted, which stops nothing."""
    try:
        return plan.flops
    except ValueError as error:
        say(f"model FLOP/s are not logged: {error}", "yellow")
        return None


@contextlib.contextmanager
def stop_requests() -> Iterator[list[int]]:
    """A list that stays empty until SIGTERM asks to stop (a preempted machine)."""
    requests: list[int] = []
    before = signal.signal(signal.SIGTERM, lambda number, _: requests.append(number))
    try:
        yield requests
    finally:
        signal.signal(signal.SIGTERM, before)


def draw_losses(directory, check_held):
    """Draws the loss curves of the steps so far, if there are any; the first process does. A failure stops nothing."""
    log, drawn = directory / "metrics.jsonl", directory / "loss.png"
    try:
        check_held()
        if jax.process_index() == 0 and log.is_file() and size(log):
            from mllm_jax.evaluation.report import losses  # slow to import: matplotlib

            losses.plot_losses(log, drawn)
    except Exception as error:
        # A full disk, say. Where that has stopped the run, it must stay the error that is shown.
        say(f"{drawn} could not be drawn ({type(error).__name__}: {error})", "yellow")


def train(config, directory, evaluate=True):
    """All stages of a recipe, each from the one before, then the evaluation; returns the parameters."""
    begin = time.time()

    # ------------------------------------------------------------------- check everything before any compute
    with processes.together("everything checked"):
        check(config)
        check_tracking(config)
        mesh = make_mesh(config.mesh.to_dict())
        workdir.data_dir(config, directory)
        model = runs.model_config(config)
        tokenizer = load_tokenizer(config.model.llm.path)
        preflight.check_stages(config, model, tokenizer, mesh, read_noted(directory))
        if evaluate:
            check_benchmarks(config, tokenizer)
        check_backends(model, row_lengths(config))
    for line in (*announce.model_lines(config, model, mesh), *announce.attention_lines(config, model)):
        say(line)

    with (
        use_mesh(mesh),
        workdir.open_run(directory, resolved(config)) as check_held,
        tracked(config, directory) as track,
    ):
        # ------------------------------------------------------------------- stages; finished ones are skipped
        finished = runs.finished_stages(directory, config)
        remaining = config.stage_order
        params = None
        if finished:
            remaining = remaining[remaining.index(finished[-1]) + 1 :]
            params = load_stage(directory / "params" / finished[-1], config, model, mesh)
            say(f"stage {finished[-1]}: done before")
        sources, packing = {}, {}

        def prepare(*names):
            for name in names:
                sources[name] = prepare_sources(config, name, model, tokenizer, directory)
                stage = config.stages[name]
                packing[name] = packing_plan(config, stage, model, tokenizer, sources[name], directory)
            for line in announce.length_lines(config, {name: sources[name] for name in names}, packing):
                say(line)

        def keep_held():
            with processes.together("work directory still held"):
                check_held()

        # A user's data are read and checked before anything is trained; what is drawn here waits for its stage.
        prepare(*(name for name in remaining if name == remaining[0] or not is_drawn(config.stages[name])))
        for name in remaining:
            if name not in sources:
                prepare(name)
            params = starting_params(config, model, name, params)
            plan, batches = open_stage(
                config, name, model, tokenizer, params, sources[name], packing[name], directory, mesh
            )
            begun = begin_stage(plan, batches, params, directory)
            del params  # what earlier stages trained would stay on the devices beside the state
            try:
                params = train_stage(plan, batches, begun, directory, check_held, track)
                del begun
                keep_held()
                save_params(directory / "params" / name, params)
            finally:
                draw_losses(directory, check_held)

        # -------------------------------------------------------------------------------------- evaluation
        keep_held()
        if evaluate and config.eval.benchmarks:
            merged = runs.merged(params, config.stages[config.stage_order[-1]], config.model.frozen_dtype)
            answering = trained_model(config, model, merged, tokenizer)
            with use_mesh(mesh, ANSWERING_RULES):
                run.evaluate(answering, eval_config(config, directory), directory)
    say(f"finished in {time.time() - begin:.0f} s; everything is in {directory}")
    return params


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax tells every write
    cpu_devices.divide(CONFIG.value.mesh.cpu_devices)
    if DISTRIBUTED.value:
        processes.join()
    train(CONFIG.value, as_path(WORKDIR.value), EVALUATE.value)


if __name__ == "__main__":
    script.run(main)
