"""Trains a multimodal LLM in the stages of a recipe, then evaluates it.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Any key of the recipe can be changed on the command line (`--config.model.connector.name=average_pool`). A run that was
stopped, however hard, goes on where its last checkpoint was when the same command is given again.
"""

import contextlib
import dataclasses
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
from mllm_jax.evaluation.report import plots
from mllm_jax.inference import runs
from mllm_jax.inference.load import trained_model
from mllm_jax.interop import load_tokenizer
from mllm_jax.interop.saved_params import save_params
from mllm_jax.models import paths
from mllm_jax.parallel import processes
from mllm_jax.parallel.mesh import make_mesh, use_mesh
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.training import adapters, build, checkpoint, preflight
from mllm_jax.training.metrics import RunLog
from mllm_jax.training.optimizer import make_optimizer
from mllm_jax.training.step import init_state, make_train_step, state_shardings, to_device

CONFIG = script.define_config()
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.", required=True)
flags.adopt_module_key_flags(script)  # --help shows --config and --traceback
EVALUATE = flags.DEFINE_bool("evaluate", True, "Evaluate after the last stage.")
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several hosts: join the other processes first (docs/operating.md)."
)
say = functools.partial(console.say, console.make_console())


def train_stage(config, name, model, batches, mesh, directory, params):
    """Trains one stage from host parameters and returns the whole model's parameters on the mesh."""
    stage = config.stages[name]
    model = dataclasses.replace(model, lora=runs.lora_settings(stage))
    steps = stage.steps or batches.num_batches
    label_tokens = config.data.label_tokens or stage.seq_len or config.data.seq_len

    # ------------------------------------------------------------------------------- state: trained and frozen
    trained, frozen = paths.split(params, adapters.trainable(stage))
    aside = {"vision": frozen.pop("vision")} if stage.cache_features else {}  # not run, so not on the devices
    optimizer, rate = make_optimizer(stage, trained, steps)
    frozen = build.place(adapters.quantized(stage, frozen), mesh, config.model.frozen_dtype)
    shapes = jax.eval_shape(
        lambda p: init_state(p, optimizer), build.abstract(trained, mesh, config.model.param_dtype)
    )
    shardings = state_shardings(shapes, mesh)
    checkpoints = checkpoint.StageCheckpoints(
        directory / "checkpoints" / name, stage.keep_last, stage.keep_best
    )
    if checkpoints.steps():
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), shapes, shardings
        )
        state, position = checkpoints.restore(checkpoints.steps()[-1], like)
        batches.set_state(position)
        say(f"stage {name}: continuing after update {int(state.step)}")
    else:
        create = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)
        state = create(build.place(trained, mesh, config.model.param_dtype))
    start = int(state.step)
    samples = "" if batches.num_samples is None else f"{batches.num_samples:,} samples, "
    counts = f"{paths.count(trained):,} parameters trained, {paths.count(frozen):,} frozen"
    say(f"stage {name}: {counts}, {samples}{steps:,} updates")

    # -------------------------------------------------------------------------------------------- the loop
    step_fn = make_train_step(
        model,
        optimizer,
        mesh,
        shardings,
        param_shardings(frozen, mesh),
        build.batch_spec(config, stage, model),
        label_tokens=label_tokens,
        accumulation=stage.accumulation,
        seed=config.seed,
    )
    log = RunLog(directory, name, steps, start, write=jax.process_index() == 0)
    try:
        with stop_requests() as requests:
            for step in range(start + 1, steps + 1):
                batch = next(batches)
                state, metrics = step_fn(state, frozen, to_device(batch.arrays, mesh))
                log.add(step, metrics, batch.ids, batch.skipped)
                stop = processes.agreed(bool(requests), step % stage.log_every == 0)
                save = step % stage.checkpoint_every == 0 or step == steps or stop
                if save or step % stage.log_every == 0:
                    log.flush(float(rate(step - 1)))  # refuses what is not finite, so it comes before saving
                if save:
                    checkpoints.save(state, batches.get_state(), log.loss_since_checkpoint())
                if stop and step < steps:
                    raise SystemExit(
                        f"stopped by a signal after update {step}; the same command continues from there"
                    )
                if step == start + 1:
                    log.pause_clock()  # the first update compiles
    finally:
        log.close()
        batches.close()
        checkpoints.close()
    return paths.merge(state.params, frozen, build.place(aside, mesh, config.model.frozen_dtype))


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
    """Draws the loss curves of the updates so far, if there are any; the first process does."""
    log = directory / "metrics.jsonl"
    if jax.process_index() == 0 and log.is_file() and log.stat().st_size:
        plots.plot_losses(log, directory / "loss.png")


def train(config, directory, evaluate=True):
    """All stages of a recipe, each from the one before, then the evaluation; returns the parameters."""
    begin = time.time()

    # ------------------------------------------------------------------- check everything before any compute
    check(config)
    mesh = make_mesh(config.mesh.to_dict())
    model = runs.model_config(config)
    tokenizer = load_tokenizer(config.model.llm.path)
    preflight.check_stages(config, model, tokenizer, mesh, evaluate)
    side, patch = config.model.vision.image_size, model.vision.patch
    unseen = f" ({side % patch} of {side} pixels a side unseen by patches of {patch})" if side % patch else ""
    say(
        f"connector [bold]{config.model.connector.name}[/bold], {model.visual_layout.slot.num_tokens} visual tokens "
        f"per image{unseen}, mesh {dict(mesh.shape)} of {jax.devices()[0].device_kind}"
    )

    with use_mesh(mesh), workdir.open_run(directory, resolved(config)):
        # ------------------------------------------------------------------- stages; finished ones are skipped
        finished = [name for name in config.stage_order if (directory / "params" / name).exists()]
        left = config.stage_order
        params = None
        if finished:
            left = left[left.index(finished[-1]) + 1 :]
            params = build.load_stage(directory / "params" / finished[-1], config, model, mesh)
            say(f"stage {finished[-1]}: done before")
        sources = {name: build.prepare_sources(config, name, model, tokenizer, directory) for name in left}
        for name in left:
            params = build.starting_params(config, model, name, params)
            stage, prepared = config.stages[name], sources[name]
            cache = build.feature_cache(config, stage, model, params, prepared, directory)
            batches = build.stage_iterator(config, stage, model, tokenizer, prepared, cache)
            try:
                params = train_stage(config, name, model, batches, mesh, directory, params)
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
            run.evaluate(answering, build.eval_config(config, directory), directory)
    say(f"finished in {time.time() - begin:.0f} s; everything is in {directory}")
    return params


def main(_):
    logging.set_verbosity(logging.WARNING)  # Orbax tells every write
    if DISTRIBUTED.value:
        processes.join()
    train(CONFIG.value, pathlib.Path(WORKDIR.value), EVALUATE.value)


if __name__ == "__main__":
    script.run(main)
