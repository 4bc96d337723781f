"""Our side of gpu.py, one or more sections a process; each result is a line of JSON in --out."""

import argparse
import functools
import itertools
import json
import pathlib
import statistics
import tempfile
import time
import zlib

import jax
import jax.numpy as jnp
import numpy as np
from gpu_shapes import LLAVA, TINY, Shapes, model_flops, packed_rows

from mllm_jax.config import default_config, stage_config
from mllm_jax.data.batch import Batch
from mllm_jax.data.layout import VisualLayout
from mllm_jax.data.tokens import EncodedSample, layout_row
from mllm_jax.inference import runs
from mllm_jax.inference.batching import Request
from mllm_jax.inference.prefixes import batch_prompts
from mllm_jax.inference.session import Session
from mllm_jax.models import attention, mllm
from mllm_jax.models.attention import AttentionMask
from mllm_jax.models.attention_uses import chosen_backends
from mllm_jax.parallel.mesh import make_mesh, use_mesh
from mllm_jax.training.stage import StagePlan
from mllm_jax.training.step import init_state, to_device

TOLERANCE = 3e-2  # relative error of bfloat16 outputs and gradients against float32


def peak_bytes() -> int:
    """Most bytes in use on the device so far; 0 where it does not say."""
    return (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use", 0)


def timed(call, calls: int, groups: int = 3) -> float:
    """Median over groups of the seconds of one call."""
    jax.block_until_ready(call())
    found = []
    for _ in range(groups):
        begin = time.perf_counter()
        for _ in range(calls):
            last = call()
        jax.block_until_ready(last)
        found.append((time.perf_counter() - begin) / calls)
    return statistics.median(found)


def peak(shapes: Shapes, args: argparse.Namespace):
    """The rate of a large matrix product and of a large copy."""
    size = shapes.matrix
    a, b = (jax.random.normal(jax.random.key(i), (size, size), jnp.bfloat16) for i in range(2))
    product = jax.jit(lambda a, b: a @ b)
    seconds = timed(lambda: product(a, b), 10)
    whole = jax.random.normal(jax.random.key(2), (size, 8 * size), jnp.bfloat16)
    copy = jax.jit(lambda x: -x)
    copied = timed(lambda: copy(whole), 10)
    yield {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "flops": 2 * size**3 / seconds,
        "bandwidth": 2 * whole.nbytes / copied,
    }


def parity(shapes: Shapes, args: argparse.Namespace):
    """Every attention backend on packed rows of the second stage, against "xla" in float32."""
    shape = shapes.stages["finetune"]
    heads = shapes.llm["num_attention_heads"]
    head_width = shapes.llm["hidden_size"] // heads
    segments = np.zeros((shape.rows, shape.length), np.int32)
    for row, samples in enumerate(packed_rows("finetune", shapes)):
        ends = np.cumsum([sample[0] for sample in samples])
        for index, (begin, end) in enumerate(zip([0, *ends], ends, strict=False)):
            segments[row, begin:end] = index + 1
    mask = AttentionMask(jnp.asarray(segments), jnp.asarray(segments))
    shape_of = (shape.rows, shape.length, heads, head_width)
    q, k, v, out = (jax.random.normal(jax.random.key(i), shape_of, jnp.bfloat16) for i in range(4))
    used = jnp.asarray(segments != 0)[:, :, None, None]

    @functools.partial(jax.jit, static_argnums=0)
    def both(backend, q, k, v):
        def weighted(q, k, v):
            y = jnp.where(used, attention.attend(q, k, v, mask, backend), 0)
            return (y.astype(jnp.float32) * out.astype(jnp.float32)).sum(), y

        grads, y = jax.grad(weighted, argnums=(0, 1, 2), has_aux=True)(q, k, v)
        return y, grads

    exact = jax.device_get(both("xla", *(x.astype(jnp.float32) for x in (q, k, v))))

    def error(found, wanted):
        found, wanted = (
            np.concatenate([np.asarray(x, np.float32).ravel() for x in jax.tree.leaves(tree)])
            for tree in (found, wanted)
        )
        return float(np.linalg.norm(found - wanted) / np.linalg.norm(wanted))

    for backend in attention.BACKENDS:
        try:
            seconds = timed(lambda backend=backend: both(backend, q, k, v), 5)
            y, grads = jax.device_get(both(backend, q, k, v))
        except Exception as problem:  # a backend of another platform, or one that refuses segments by name
            yield {"backend": backend, "unavailable": f"{type(problem).__name__}: {problem}"[:160]}
            continue
        errors = {"output": error(y, exact[0]), "gradient": error(grads, exact[1])}
        right = all(each < TOLERANCE for each in errors.values())  # NaN is not
        yield {"backend": backend, **errors, "right": right, "seconds": seconds}


def recipe(
    stage: str, shapes: Shapes, layers: int, remat: str, folder: pathlib.Path, args: argparse.Namespace
):
    """The recipe of a stage whose model is described by two `config.json` in `folder`."""
    llm = {**shapes.llm, "num_hidden_layers": layers}
    for name, fields in (("vision", shapes.vision), ("llm", llm)):
        (folder / name).mkdir(exist_ok=True)
        (folder / name / "config.json").write_text(json.dumps(fields), encoding="utf-8")
    config = default_config()
    config.model.vision.path, config.model.llm.path = str(folder / "vision"), str(folder / "llm")
    config.model.vision.image_size = shapes.vision["image_size"]
    config.model.dtype = config.model.frozen_dtype = "bfloat16"
    config.model.attention = args.attention
    config.model.vision.remat, config.model.llm.remat = "none", remat
    shape = shapes.stages[stage]
    config.data.seq_len, config.data.image_slots = shape.length, shape.slots
    config.data.label_tokens = shape.labels
    settings = stage_config()
    settings.batch_size, settings.steps, settings.samples_per_row = shape.rows, 100, 64
    if stage == "finetune":
        settings.trainable, settings.learning_rate = ("connector/.*", "llm/.*"), 2e-5
        config.model.param_dtype = args.param_dtype
    config.stages, config.stage_order = {stage: settings}, (stage,)
    return config


@functools.partial(jax.jit, static_argnums=(1, 2))
def _normal(seed, shape, dtype):
    return 0.02 * jax.random.normal(jax.random.key(seed), shape, dtype)


def random_arrays(shapes, seed: int):
    """Arrays of these shapes, dtypes and shardings, made on the device one by one; norm scales are 1."""

    def leaf(path, spec):
        if path[-1].key == "scale":
            return jnp.ones(spec.shape, spec.dtype, device=spec.sharding)
        key = (zlib.crc32(jax.tree_util.keystr(path).encode()) + seed) % 2**31
        return jax.device_put(_normal(key, spec.shape, spec.dtype), spec.sharding)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def sample(needs: np.ndarray, layout: VisualLayout, vocab: int, rng: np.random.Generator) -> EncodedSample:
    """Random tokens behind one image per image slot, the last ones supervised."""
    length, images, labels, _ = (int(need) for need in needs)
    visual = images * layout.num_tokens
    index = np.full(length, -1, np.int32)
    index[:visual] = np.arange(visual)
    weights = np.zeros(length, np.float32)
    weights[length - labels :] = 1
    tokens = np.where(index < 0, rng.integers(1, vocab, length), 0).astype(np.int32)
    image_of = np.where(index < 0, -1, index // max(layout.num_tokens, 1)).astype(np.int32)
    return EncodedSample("random", tokens, weights, index, image_of, (layout,) * images)


def batch_of(plan: StagePlan, rows: list[list[np.ndarray]], mesh) -> Batch:
    """A batch of random samples of these sizes, on the device."""
    rng = np.random.default_rng(0)
    rule, vocab = plan.model.visual_layout, plan.model.llm.vocab
    layout = rule(lambda: plan.model.slot_size)
    spec = mllm.batch_spec(plan.model, length=plan.seq_len, slots=plan.config.data.image_slots, labels=True)
    made = []
    for samples in rows:
        row, images = layout_row([sample(needs, layout, vocab, rng) for needs in samples], spec)
        for *_, slots in images:
            row.images[slots] = rng.integers(0, 256, row.images[slots].shape)
        made.append(row)
    return to_device(jax.tree.map(lambda *leaves: np.stack(leaves), *made), mesh)


def train(stage: str, shapes: Shapes, args: argparse.Namespace):
    """Steps of a stage: all layers that fit, keeping as many activations as fit with them."""
    depths = shapes.depths if stage == "finetune" else shapes.depths[:1]
    for layers, remat in itertools.product(depths, ("none",) if args.tiny else ("dots", "full")):
        try:
            found = step_time(stage, shapes, layers, remat, args)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
            found = None
        if found is not None:
            yield found
            return
    raise MemoryError(f"{depths[-1]} layers do not fit the device")


def fits(step: jax.stages.Compiled) -> bool:
    """Whether arguments, results and temporaries of a program fit the device together."""
    limit = (jax.devices()[0].memory_stats() or {}).get("bytes_limit")
    used = step.memory_analysis()
    need = used.argument_size_in_bytes + used.output_size_in_bytes - used.alias_size_in_bytes
    return limit is None or need + used.temp_size_in_bytes < limit


def step_time(stage: str, shapes: Shapes, layers: int, remat: str, args: argparse.Namespace) -> dict | None:
    """Time, tokens and memory of a step; None if it does not fit the device."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    rows = packed_rows(stage, shapes)
    with tempfile.TemporaryDirectory() as folder, use_mesh(mesh):
        plan = StagePlan(recipe(stage, shapes, layers, remat, pathlib.Path(folder), args), stage, mesh)
        begin = time.perf_counter()
        step = plan.lower().compile()
        compiled = time.perf_counter() - begin
        if not fits(step):
            return None
        frozen = random_arrays(plan.frozen, 0)
        create = jax.jit(
            lambda params: init_state(params, plan.optimizer),
            donate_argnums=0,
            out_shardings=jax.tree.map(lambda leaf: leaf.sharding, plan.state),
        )
        state = create(random_arrays(plan.state.params, 1))
        batch = batch_of(plan, rows, mesh)

        def run():
            nonlocal state
            state, metrics = step(state, frozen, batch)
            return metrics

        seconds = timed(run, max(1, shapes.steps // 3))
        loss = float(run()["loss"])
    if not np.isfinite(loss):
        raise FloatingPointError(f"the loss of random weights is {loss}")
    segments = [needs for samples in rows for needs in samples]
    tokens = int(sum(needs[0] for needs in segments))
    shape = shapes.stages[stage]
    dtype = plan.config.model.param_dtype
    useful = tokens / (shape.rows * shape.length)
    chosen = chosen_backends(plan.model, shape.length)
    backends = ", ".join(f"{part} {each.backend}" for part, each in chosen.items())
    trained = "connector" if stage == "pretrain" else f"connector and LLM, {dtype} with AdamW states"
    return {
        "seconds": seconds,
        "compile_seconds": compiled,
        "layers": layers,
        "shape": f"{shape.rows} x {shape.length}",
        "tokens_per_second": tokens / seconds,
        "useful_share": useful,
        "model_flops": model_flops(stage, shapes, layers, segments, stage == "finetune"),
        "peak_bytes": peak_bytes(),
        "loss": loss,
        "note": f"{trained}; attention: {backends}; remat {remat}, {useful:.1%} of tokens useful",
    }


def decode(shapes: Shapes, args: argparse.Namespace):
    """Greedy answers of a fixed length to prompts with an image."""
    mesh = make_mesh({"data": 1, "fsdp": 1, "tensor": 1}, jax.devices()[:1])
    with tempfile.TemporaryDirectory() as folder, use_mesh(mesh):
        config = recipe("pretrain", shapes, shapes.depths[0], "none", pathlib.Path(folder), args)
        config.model.param_dtype = "bfloat16"
        model = runs.model_config(config)
        params = random_arrays(
            jax.tree.map(
                lambda leaf: jax.ShapeDtypeStruct(
                    leaf.shape, jnp.bfloat16, sharding=jax.sharding.SingleDeviceSharding(jax.devices()[0])
                ),
                mllm.abstract_params(model),
            ),
            0,
        )
        session = Session(model, params, stop_ids=[-1])  # no token ends an answer
        rng = np.random.default_rng(0)
        layout = model.visual_layout(lambda: model.slot_size)
        needs = np.array([layout.num_tokens + shapes.prompt, 1, 0, 1])
        images = rng.integers(0, 256, (max(shapes.batches), 1, *model.slot_size, 3), np.uint8)
        for size in shapes.batches:
            requests = [
                Request(str(i), sample(needs, layout, model.llm.vocab, rng), (i,)) for i in range(size)
            ]

            def answer(requests=requests):
                prompts = batch_prompts(model, params, requests, load_image=lambda key, _: images[key])
                return session.answer(prompts, max_new_tokens=shapes.new_tokens)

            seconds = timed(answer, 1)
            yield {
                "batch": size,
                "seconds": seconds,
                "new_tokens": shapes.new_tokens,
                "tokens_per_second": size * shapes.new_tokens / seconds,
            }


SECTIONS = {
    "peak": peak,
    "parity": parity,
    "pretrain": functools.partial(train, "pretrain"),
    "finetune": functools.partial(train, "finetune"),
    "decode": decode,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("sections", nargs="+", choices=SECTIONS)
    parser.add_argument("--out", type=pathlib.Path, required=True)
    parser.add_argument("--attention", default="auto")
    parser.add_argument("--param_dtype", default="bfloat16")
    parser.add_argument("--tiny", action="store_true")
    args = parser.parse_args()
    for name in args.sections:
        for result in SECTIONS[name](TINY if args.tiny else LLAVA, args):
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(json.dumps({"side": "ours", "section": name, **result}) + "\n")


if __name__ == "__main__":
    main()
