"""What a run says of itself before it starts: its model, and how long its stages are."""

from collections.abc import Iterator, Mapping

import jax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from mllm_jax.config import row_lengths
from mllm_jax.data.packing import PackingPlan
from mllm_jax.data.samples import Source
from mllm_jax.models import mllm, paths
from mllm_jax.models.attention_uses import chosen_backends
from mllm_jax.models.mllm import ModelConfig

FEW_STEPS = 50  # with fewer, a new connector has learned nothing yet


def model_lines(config: ConfigDict, model: ModelConfig, mesh: Mesh) -> Iterator[str]:
    """Yields the connector and the devices, and the connector's size where it is larger than the LLM."""
    name = config.model.connector.name
    tower, (side, _) = model.vision.inputs(model.slot_size)[0]
    patch = tower.patch
    divided = jax.default_backend() == "cpu" and jax.local_device_count() > 1
    made = f" as {jax.local_device_count()} devices" if divided else ""
    unseen = f" ({side % patch} of {side} pixels a side unseen by patches of {patch})" if side % patch else ""
    rule = model.image_layout
    tokens = f"{rule.slot.num_tokens} visual tokens per image"
    if model.max_patches:
        tokens = f"at most {rule.most_tokens} visual tokens per image"
    if model.tiles:
        tokens = f"{rule.slot.num_tokens} visual tokens per tile, at most {rule.most_tokens:,} per image"
    if model.video:
        frames = model.video.frames
        tokens += f", {model.visual_layout.of_video(frames).num_tokens:,} per video of {frames} frames"
    yield (
        f"connector {name}, {tokens}{unseen}, mesh {dict(mesh.shape)} of {jax.devices()[0].device_kind}{made}"
    )
    params = mllm.abstract_params(model)
    connector, llm = paths.count(params["connector"]), paths.count(params["llm"])
    if connector > llm:
        yield (
            f"connector {name} has {connector:,} parameters, more than the LLM's {llm:,}, and its steps cost "
            f"accordingly; the options config.model.connector.{name}.* set its size (docs/connectors.md)"
        )


def attention_lines(config: ConfigDict, model: ModelConfig) -> Iterator[str]:
    """Yields which backend computes attention in each part of the model, and why; for each length of rows."""
    told: dict[str, list[int]] = {}
    for length in row_lengths(config):
        parts = chosen_backends(model, length)
        said = ", ".join(f"{part} {chosen.backend} ({chosen.reason})" for part, chosen in parts.items())
        told.setdefault(said, []).append(length)
    for said, lengths in told.items():
        rows = f" in rows of {' and '.join(map(str, lengths))}" if len(told) > 1 else ""
        yield f"attention{rows}: {said}"


def length_lines(
    config: ConfigDict,
    sources: Mapping[str, Mapping[str, Source]],
    packing: Mapping[str, PackingPlan | None],
) -> Iterator[str]:
    """Yields how many steps each stage takes, and which key changes that where they are few.

    Args:
      sources: prepared data sets by name, of each stage that is still to be trained.
      packing: which samples share a row in each of these stages.
    """
    short = {}
    for name, prepared in sources.items():
        stage, plan = config.stages[name], packing[name]
        if stage.steps:
            about = "" if plan is None else "about "
            yield f"stage {name}: {stage.steps:,} steps of {about}{stage.batch_size} samples"
            continue
        epochs = f"{stage.epochs} epoch" + "s" * (stage.epochs > 1)
        samples = sum(map(len, prepared.values()))
        rows = samples * stage.epochs if plan is None else len(plan)
        per_step = stage.batch_size if plan is None else plan.rows_holding(stage.batch_size)
        steps = -(-rows // per_step)
        yield (
            f"stage {name}: {steps:,} steps ({samples:,} samples x {epochs} / batch size {stage.batch_size})"
            + ("" if plan is None else f", packed in {per_step} rows a step")
        )
        if steps < FEW_STEPS:
            short[name] = stage.epochs * -(-FEW_STEPS // steps)
    if short:
        keys = " ".join(f"--config.stages.{name}.epochs={epochs}" for name, epochs in short.items())
        yield (
            f"fewer than {FEW_STEPS} steps teach little: give {keys} or more (or stages.*.steps, or a smaller "
            "stages.*.batch_size), or start from weights that have learned to see (docs/data.md, 'With few images')"
        )
