"""A model, parameters, data and batches small enough that a test takes seconds (functions; fixtures: conftest)."""

import base64
import dataclasses
import fractions
import functools
import io
import json
import os

import jax
import numpy as np
from PIL import Image

IMAGE_SIZE, PATCH = 28, 7


def fake_devices(count):
    """Environment variables of a process that takes the CPU for `count` devices; other flags of XLA as in this one."""
    flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count={count}"
    return {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags.strip()}


def model_config():
    """`ModelConfig` of a two-block tower and a two-block LLM, 4 visual tokens per image."""
    from mllm_jax.models.decoder import DecoderConfig
    from mllm_jax.models.mllm import ModelConfig
    from mllm_jax.models.vit import VisionConfig

    return ModelConfig(
        vision=VisionConfig(width=32, depth=2, heads=2, mlp_width=48, patch=PATCH, image_size=IMAGE_SIZE),
        llm=DecoderConfig(
            vocab=260, width=32, depth=2, heads=4, kv_heads=2, head_width=8, mlp_width=48, max_positions=512
        ),
        image_size=IMAGE_SIZE,
        select_layer=-1,
        connector="average_pool",
        connector_options=(("tokens", 4),),
        remat="none",
        vision_remat="none",
    )


def interpreted_splash():
    """Splash attention as a backend that runs anywhere."""
    from mllm_jax.models import attention
    from mllm_jax.models.attention import splash

    interpreted = functools.partial(splash.attend, interpret=True)
    return attention.BACKENDS["splash"]._replace(attend=interpreted, platforms=attention.EVERY)


def make_tokenizer():
    """One token per byte; `<pad>`, `<s>` and `</s>` first."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    specials = ["<pad>", "<s>", "</s>"]
    symbols = [*specials, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    tokenizer = Tokenizer(models.BPE({symbol: i for i, symbol in enumerate(symbols)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>"
    )


def random_params(shapes, seed=0):
    """NumPy parameters of given shapes and dtypes that keep activations of order one; norm scales near one."""
    rng = np.random.default_rng(seed)

    def leaf(path, shape):
        values = rng.standard_normal(shape.shape)
        if path[-1].key == "scale":
            values = 1 + 0.1 * values
        else:
            values *= shape.shape[-2] ** -0.5 if path[-1].key == "kernel" else 0.1
        return values.astype(shape.dtype)

    return jax.tree_util.tree_map_with_path(leaf, shapes)


def read_only(tree):
    """The tree, whose NumPy arrays can no longer be written to.

    On CPUs, JAX computes after the call has returned, and takes many arrays without copying them: what is written into
    an argument afterwards may or may not be seen. So a test that changes an input makes a changed copy.
    """
    for leaf in jax.tree.leaves(tree):
        leaf.setflags(write=False)
    return tree


def png(seed, size=(IMAGE_SIZE, IMAGE_SIZE)):
    """Bytes of a random picture."""
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def write_llava(directory, conversations):
    """A LLaVA-format data set: {id: (number of images, [(question, answer), ...])}; returns (json, images)."""
    images = directory / "images"
    images.mkdir(parents=True, exist_ok=True)
    entries = []
    for number, (sample, (pictures, rounds)) in enumerate(conversations.items()):
        names = [f"{sample}_{i}.png" for i in range(pictures)]
        for i, name in enumerate(names):
            (images / name).write_bytes(png(1000 * number + i))
        turns = []
        for question, answer in rounds:
            mark = "<image>" * pictures if not turns else ""
            turns += [{"from": "human", "value": mark + question}, {"from": "gpt", "value": answer}]
        entry = {"id": sample, "conversations": turns}
        if pictures:
            entry["image"] = names if pictures > 1 else names[0]
        entries.append(entry)
    path = directory / "data.json"
    path.write_text(json.dumps(entries))
    return path, images


@dataclasses.dataclass(frozen=True)
class Row:
    """One row for `make_batch`: images, text tokens behind them, and how many of the last ones are supervised."""

    images: int
    text: int
    labels: int


def make_batch(model, rows, length, slots=2, seed=0):
    """A `Batch` of random tokens and pixels, one sample per row; its arrays are read-only (`read_only`)."""
    from mllm_jax.models import mllm

    rng = np.random.default_rng(seed)
    slot = model.visual_layout.slot
    batch = mllm.batch_spec(model, len(rows), length=length, slots=slots, labels=True).empty()
    for index, row in enumerate(rows):
        visual = row.images * slot.num_tokens
        used = visual + row.text
        assert used <= length
        assert row.labels <= row.text
        batch.visual_index[index, :visual] = np.arange(visual)
        batch.tokens[index, visual:used] = rng.integers(3, model.llm.vocab, row.text)
        batch.positions[index, :used] = np.arange(used)
        batch.segment_ids[index, :used] = 1
        batch.loss_weights[index, used - row.labels : used] = 1
        batch.images[index, : row.images] = rng.integers(0, 256, (row.images, *slot.size, 3))
        batch.image_mask[index, : row.images] = True
    return read_only(batch)


def write_data(root):
    """Two LLaVA-format data sets as (json, images): "captions" and mixed "instructions"."""
    captions = {f"caption{i}": (1, [("", "a picture " + "of it " * (i % 3))]) for i in range(8)}
    instructions = {
        f"sample{i}": ((0, 1, 2)[i % 3], [("what?", "it is " + "so " * (i % 4)), ("and?", "no")][: 1 + i % 2])
        for i in range(10)
    }
    return {
        "captions": write_llava(root / "captions", captions),
        "instructions": write_llava(root / "instructions", instructions),
    }


def recipe(checkpoints, data):
    """A two-stage recipe that trains in seconds: captions, then instructions with accumulation."""
    from mllm_jax.config import default_config, source_config, stage_config

    config = default_config()
    config.seed = 7
    config.model.vision.path = str(checkpoints["vision"])
    config.model.llm.path = str(checkpoints["llm"])
    config.model.vision.image_size = IMAGE_SIZE
    config.model.vision.select_layer = -1
    config.model.vision.remat = config.model.llm.remat = "none"
    config.model.connector.name = "average_pool"
    config.model.connector.average_pool.tokens = 4
    config.data.seq_len = 80
    config.data.image_slots = 2
    config.data.threads = 1
    config.eval.template = "mistral_instruct"
    for name, source_name, template in (
        ("pretrain", "captions", "plain"),
        ("finetune", "instructions", "mistral_instruct"),
    ):
        stage, source = stage_config(), source_config()
        source.json, source.images = (str(path) for path in data[source_name])
        stage.sources = {source_name: source}
        stage.template = template
        stage.batch_size = 4
        stage.steps = 6
        stage.learning_rate = 1e-2
        stage.warmup_ratio = 0.2
        stage.log_every = 1
        stage.checkpoint_every = 2
        config.stages[name] = stage
    config.stages.finetune.trainable = ("connector/.*", "llm/.*")
    config.stages.finetune.accumulation = 2
    config.stage_order = ("pretrain", "finetune")
    return config


def write_benchmarks(root):
    """MMBench with three rotations of one question and a second question, and POPE with one question a split."""
    header = "index question hint A B C D answer category image source l2-category comment split".split()
    rows = []
    for base, options, kind in ((3, ("red", "blue", "green"), "image_style"), (5, ("1", "2"), "ocr")):
        image = base64.b64encode(png(base)).decode()
        for turn in range(len(options)):
            cells = (*options[turn:], *options[:turn], "", "")[:4]
            answer = "ABC"[(-turn) % len(options)]
            rows.append(
                [base + turn * 1_000_000, "What?", "", *cells, answer, kind, image, "", "", "", "dev"]
            )
    (root / "mmbench").mkdir(parents=True)
    lines = ["\t".join(map(str, row)) for row in [header, *rows]]
    (root / "mmbench" / "mmbench_dev_20230712.tsv").write_text("\n".join(lines) + "\n")
    (root / "pope" / "val2014").mkdir(parents=True)
    for split in ("adversarial", "popular", "random"):
        row = {"question_id": 1, "image": "a.png", "text": f"Is there a {split} cat?", "label": "yes"}
        (root / "pope" / f"coco_pope_{split}.json").write_text(json.dumps(row) + "\n")
    (root / "pope" / "val2014" / "a.png").write_bytes(png(9))
    return root


def moving_square(count, size=(48, 64), seed=0):
    """uint8 [count, h, w, 3]: a square that moves to the right, another colour in every frame."""
    height, width = size
    frames = np.full((count, height, width, 3), np.random.default_rng(seed).integers(30, 200, 3), np.uint8)
    for index, frame in enumerate(frames):
        left = 2 * index % (width - 12)
        frame[height // 4 : height // 4 + 12, left : left + 12] = (220, 5 * index % 255, 30)
    return frames


def write_video(path, frames, codec="libx264", format="yuv420p", gop=12, times=None, **options):
    """A video file of frames uint8 [n, h, w, 3]; `times` in ms where they do not come 25 a second."""
    import av

    with av.open(os.fspath(path), "w") as container:
        stream = container.add_stream(codec, rate=25, options=options)
        stream.height, stream.width = frames[0].shape[:2]
        stream.pix_fmt, stream.codec_context.gop_size = format, gop
        if times is not None:
            stream.time_base = stream.codec_context.time_base = fractions.Fraction(1, 1000)
        for index, pixels in enumerate(frames):
            frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(pixels), format="rgb24")
            if times is not None:
                frame.pts, frame.time_base = int(times[index]), fractions.Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode())
    return path
