"""Trains a multimodal LLM in the stages of a recipe, then evaluates it.

    python train.py --config=configs/quickstart.py --workdir=runs/quickstart

Any key of the recipe can be changed on the command line (`--config.model.connector.name=average_pool`). A run that was
stopped, however hard, goes on where its last checkpoint was when the same command is given again.
"""

import functools
import pathlib
import signal
import time

import jax
from absl import app, flags, logging
from ml_collections import config_flags
from rich.console import Console

from mllm_jax.config import ConfigError, check, resolved
from mllm_jax.evaluation import plots, run
from mllm_jax.interop import load_tokenizer
from mllm_jax.models import paths
from mllm_jax.parallel.mesh import make_mesh, num_row_shards, use_mesh
from mllm_jax.parallel.sharding import param_shardings
from mllm_jax.training import build, checkpoint, workdir
from mllm_jax.training.metrics import RunLog
from mllm_jax.training.optimizer import make_optimizer
from mllm_jax.training.step import init_state, make_train_step, state_shardings, to_device

FLAGS = flags.FLAGS
CONFIG = config_flags.DEFINE_config_file("config", None, "The recipe.", lock_config=True)
WORKDIR = flags.DEFINE_string("workdir", None, "Where the run is kept.", required=True)
EVALUATE = flags.DEFINE_bool("evaluate", True, "Evaluate after the last stage.")
say = functools.partial(Console().print, highlight=False)
DISTRIBUTED = flags.DEFINE_bool(
    "distributed", False, "Several hosts: call jax.distributed.initialize() first."
)


def train_stage(config, name, model, tokenizer, mesh, directory, params):
    """Trains one stage from host parameters and returns the whole model's parameters on the mesh."""
    stage = config.stages[name]
    if stage.batch_size % (num_row_shards(mesh) * stage.accumulation):
        raise ConfigError(
            f"config key 'stages.{name}.batch_size' ({stage.batch_size}) must be a multiple of devices "
            f"({num_row_shards(mesh)}) x accumulation ({stage.accumulation})"
        )

    # ------------------------------------------------------------------------------------------------ data
    batches = build.stage_iterator(config, stage, model, tokenizer, directory)
    steps = stage.steps or batches.num_batches
    label_tokens = config.data.label_tokens or stage.seq_len or config.data.seq_len

    # ------------------------------------------------------------------------------- state: trained and frozen
    trained, frozen = paths.split(params, stage.trainable)
    optimizer, rate = make_optimizer(stage, trained, steps)
    frozen = build.place(frozen, mesh, config.model.frozen_dtype)
    shapes = build.abstract(trained, mesh, config.model.param_dtype)
    shardings = state_shardings(jax.eval_shape(lambda p: init_state(p, optimizer), shapes), mesh)
    checkpoints = checkpoint.StageCheckpoints(
        directory / "checkpoints" / name, stage.keep_last, stage.keep_best
    )
    create = jax.jit(lambda p: init_state(p, optimizer), out_shardings=shardings)
    state = create(build.place(trained, mesh, config.model.param_dtype))
    start = 0
    if checkpoints.steps():
        like = jax.tree.map(lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings)
        state, position = checkpoints.restore(checkpoints.steps()[-1], like)
        batches.set_state(position)
        start = int(state.step)
        say(f"stage {name}: continuing after update {start}")
    samples = "" if batches.num_samples is None else f"{batches.num_samples:,} samples, "
    counts = f"{paths.count(trained):,} parameters trained, {paths.count(frozen):,} frozen"
    say(f"stage [bold]{name}[/bold]: {counts}, {samples}{steps:,} updates")

    # -------------------------------------------------------------------------------------------- the loop
    step_fn = make_train_step(
        model,
        optimizer,
        mesh,
        shardings,
        param_shardings(frozen, mesh),
        label_tokens=label_tokens,
        accumulation=stage.accumulation,
        seed=config.seed,
    )
    log = RunLog(directory, name, steps, start, write=jax.process_index() == 0)
    stop = stop_requested()
    try:
        for step in range(start + 1, steps + 1):
            batch = next(batches)
            build.check_label_count(batch, label_tokens)
            state, metrics = step_fn(state, frozen, to_device(batch, mesh))
            log.add(step, metrics, batch["ids"], batch["skipped"])
            last = step == steps or bool(stop)
            if step % stage.log_every == 0 or step % stage.checkpoint_every == 0 or last:
                log.flush(float(rate(step - 1)))
            if step % stage.checkpoint_every == 0 or last:
                checkpoints.save(state, batches.get_state(), log.loss_since_checkpoint())
            if stop and step < steps:
                raise SystemExit(
                    f"stopped by a signal after step {step}; the same command continues from there"
                )
            if step == start + 1:
                log.pause_clock()  # the first update compiles
    finally:
        log.close()
        checkpoints.close()
        batches.close()
    return paths.merge(state.params, frozen)


def stop_requested() -> list[int]:
    """A list that stays empty until SIGTERM asks to stop (a preempted machine)."""
    signals: list[int] = []
    signal.signal(signal.SIGTERM, lambda number, _: signals.append(number))
    return signals


def main(_):
    begin = time.time()
    logging.set_verbosity(logging.WARNING)  # Orbax tells every write
    if DISTRIBUTED.value:
        jax.distributed.initialize()
    config = CONFIG.value
    directory = pathlib.Path(WORKDIR.value)

    # ------------------------------------------------------------------- check everything before any compute
    check(config)
    mesh = make_mesh(config.mesh)
    model = build.model_config(config)
    tokenizer = load_tokenizer(config.model.llm.path)
    workdir.claim(directory, resolved(config))
    say(
        f"connector [bold]{config.model.connector.name}[/bold], {model.tokens_per_image} visual tokens per image, "
        f"mesh {dict(mesh.shape)} of {jax.devices()[0].device_kind}"
    )

    with use_mesh(mesh):
        # ----------------------------------------------------- stages, each from the one before; done ones are skipped
        params = None
        for name in config.stage_order:
            done = directory / "params" / name
            if done.exists():
                params = build.load_stage(done, config, model, mesh)
                say(f"stage {name}: done before, parameters read from {done}")
                continue
            params = params if params is not None else build.pretrained_params(config, model)
            params = train_stage(config, name, model, tokenizer, mesh, directory, params)
            checkpoint.save_params(done, params)
            plots.plot_losses(directory / "metrics.jsonl", directory / "loss.png")

        # -------------------------------------------------------------------------------------- evaluation
        if EVALUATE.value and config.eval.benchmarks:
            bundle = build.bundle(config, model, params, tokenizer)
            run.evaluate(bundle, build.eval_config(config, directory), directory)
    say(f"finished in {time.time() - begin:.0f} s; everything is in {directory}")


if __name__ == "__main__":
    flags.mark_flags_as_required(["config"])
    app.run(main)
