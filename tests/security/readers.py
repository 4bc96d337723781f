"""The readers of what comes from elsewhere: sound files, and the call that reads them as a user's command does."""

import base64
import contextlib
import dataclasses
import importlib.util
import json
import random
import shutil
import tarfile
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from unittest import mock

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import tiny
from guard import ROOT
from test_foreign import Tensor, torch_bin
from test_score_fuzz import FILES as ANSWERS

from mllm_jax import interop
from mllm_jax.cli.main import main
from mllm_jax.cli.script import USER_ERRORS
from mllm_jax.data import tfds_benchmarks, tfds_llava
from mllm_jax.data.chat_template import resolve_template
from mllm_jax.data.images import decode_image
from mllm_jax.evaluation import caption_java, store
from mllm_jax.evaluation.benchmarks import read_benchmark
from mllm_jax.evaluation.judge import requests
from mllm_jax.evaluation.report import content
from mllm_jax.interop import native, special_tokens
from mllm_jax.interop.checkpoints import save_llava_hf
from mllm_jax.interop.source import Source
from mllm_jax.workdir import saved_config

JSON, BYTES = "json", "bytes"
Make = Callable[[Path], None]
Read = Callable[[Path, Path, random.Random], None]


@dataclasses.dataclass(frozen=True)
class Reader:
    """One kind of input.

    Attributes:
      make: writes sound files into an empty folder.
      files: patterns below the folder -> how the files are changed.
      read: reads the folder; may write into the second one.
      errors: what it may raise: what its callers turn into messages.
      share: of all inputs; slow readers get fewer.
      refuses: the least share of changed files that it refuses; one that no longer checks refuses fewer.
    """

    make: Make
    files: Mapping[str, str]
    read: Read
    errors: tuple[type[Exception], ...] = USER_ERRORS
    share: int = 4
    refuses: float = 0.0


CODES: list[int] = []  # of the verbs that ran


def verb(*arguments: object) -> None:
    """Runs `mllm-jax VERB`, which raises nothing whatever it reads."""
    CODES.append(main(list(map(str, arguments))))


def _json(path: Path, value: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))


def _lines(path: Path, rows: list) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _images(folder: Path) -> None:
    folder.mkdir(parents=True)
    for seed, name in enumerate(("a.png", "b.png")):
        (folder / name).write_bytes(tiny.png(seed, (6, 5)))


# ---------------------------------------------------------------------------------------------- checkpoints
def _llm(folder: Path) -> None:
    shutil.copytree(ROOT / "mllm_jax/assets/mini_llm", folder, dirs_exist_ok=True)


def _tower(folder: Path) -> None:
    shutil.copytree(ROOT / "mllm_jax/assets/mini_vit", folder, dirs_exist_ok=True)


def _params() -> tuple:
    from mllm_jax.models import mllm

    model = tiny.model_config()
    return dataclasses.replace(model, connector="mlp2x_gelu", connector_options=()), mllm


def _llava_hf(folder: Path) -> None:
    model, mllm = _params()
    save_llava_hf(
        folder, model, tiny.random_params(mllm.abstract_params(model)), generation={"eos_token_id": 2}
    )
    fields = json.loads((folder / "config.json").read_text())
    fields.pop("mllm_jax", None)
    _json(folder / "config.json", fields)


def _native(folder: Path) -> None:
    model, mllm = _params()
    native.save_native(
        folder, model, tiny.random_params(mllm.abstract_params(model)), "safetensors", template="v1"
    )


def _inspect(folder: Path, out: Path, rng: random.Random) -> None:
    verb("inspect", folder, *(["--json"] if rng.random() < 0.5 else []))


def _inspect_hf(folder: Path, out: Path, rng: random.Random) -> None:
    _inspect(folder, out, rng)
    special_tokens.generation(folder)
    special_tokens.image_token(folder)


def _weights(folder: Path) -> None:
    from safetensors.numpy import save_file

    tensors = {f"t{i}": np.arange(6, dtype=np.float32).reshape(2, 3) for i in range(4)}
    save_file(tensors, folder / "model.safetensors")
    index = {"metadata": {"total_size": 96}, "weight_map": dict.fromkeys(tensors, "model.safetensors")}
    _json(folder / "model.safetensors.index.json", index)


def _bin(folder: Path) -> None:
    data = np.arange(6, dtype=np.float32).tobytes()
    torch_bin(folder / "pytorch_model.bin", {name: Tensor((2, 3), (3, 1), 6) for name in "ab"}, {"0": data})


def _header(folder: Path) -> None:
    """A safetensors header as JSON of its own; `_read_header` puts it in front of the data."""
    entries = {
        f"t{i}": {"dtype": "F32", "shape": [2, 3], "data_offsets": [24 * i, 24 * i + 24]} for i in range(3)
    }
    _json(folder / "header.json", {"__metadata__": {"format": "pt"}, **entries})


def _read_header(folder: Path, out: Path, rng: random.Random) -> None:
    header = (folder / "header.json").read_bytes()
    (out / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header + bytes(72))
    _read_weights(out, out, rng)


def _read_weights(folder: Path, out: Path, rng: random.Random) -> None:
    source = Source(folder)
    for name in source:
        source.read(name)


def _adapter(folder: Path) -> None:
    from safetensors.numpy import save_file

    config = {"r": 2, "lora_alpha": 4, "peft_type": "LORA", "bias": "none", "target_modules": ["q_proj"]}
    _json(folder / "adapter_config.json", config)
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_"
    tensors = {f"{name}A.weight": np.ones((2, 8), np.float32), f"{name}B.weight": np.ones((8, 2), np.float32)}
    save_file(tensors, folder / "adapter_model.safetensors")


def _read_tokenizer(folder: Path, out: Path, rng: random.Random) -> None:
    tokenizer = interop.load_tokenizer(folder)
    if rng.random() < 0.05:  # runs the template in a program of its own
        resolve_template("chat", tokenizer)


# ---------------------------------------------------------------------------------------------- data
TURNS = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]


def _llava(folder: Path) -> None:
    _images(folder / "images")
    two = [TURNS[0] | {"value": "<image><image>\nWhich?"}, TURNS[1]]
    samples = [
        {"id": "one", "image": "a.png", "conversations": TURNS, "width": 5},
        {"id": "two", "image": ["a.png", "b.png"], "conversations": two, "system": "Be brief."},
        {
            "id": 3,
            "conversations": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}],
        },
    ]
    _json(folder / "data.json", samples)


def _validate(folder: Path, out: Path, rng: random.Random) -> None:
    arguments = ["--json-report", out / "report.json"] if rng.random() < 0.5 else []
    verb(
        "validate", "--json", folder / "data.json", "--images", folder / "images", "--threads", 1, *arguments
    )


def _prepared(folder: Path) -> None:
    _llava(folder / "source")
    source = folder / "source"
    tfds_llava.prepare(source / "data.json", source / "images", folder / "out", show_progress=False)
    shutil.copytree(next((folder / "out").glob("*/*")), folder / "1.0.0")
    shutil.rmtree(folder / "out")


def _read_prepared(folder: Path, out: Path, rng: random.Random) -> None:
    source = tfds_llava.LlavaSource(folder / "1.0.0")
    for index in range(len(source)):
        sample = source[index]
        for image in sample.images:
            decode_image(image, source=sample.id)


def _prepared_benchmark(folder: Path) -> None:
    images = {name: tiny.png(seed, (6, 5)) for seed, name in enumerate("abc")}
    rows = [{"prompt": "What?", "row": {"question_id": 1}}, {"prompt": "Wo?", "row": {"question_id": 2}}]
    sets = [
        tfds_benchmarks.ImageSet(("a",), tuple(rows)),
        tfds_benchmarks.ImageSet(("b", "c"), tuple(rows[:1])),
    ]
    _json(folder / "manual" / "questions.json", [])
    source = tfds_benchmarks.prepare_benchmark(
        kind="toy",
        sets=sets,
        read_image=images.__getitem__,
        stamp="1",
        content=lambda: "one",
        data_dir=folder / "out",
        files=[folder / "manual" / "questions.json"],
        manual_dir=folder / "manual",
        options={},
        show_progress=False,
    )
    shutil.copytree(source.directory, folder / "1.0.0")
    shutil.rmtree(folder / "out")


def _read_prepared_benchmark(folder: Path, out: Path, rng: random.Random) -> None:
    source = tfds_benchmarks.BenchmarkSource(folder / "1.0.0")
    for one in source.sets:
        for name in one.images:
            decode_image(source.image(name), source=name)


_ENTRY = {
    "id": "1",
    "conversations": [{"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A cat."}],
}


def _convertible(folder: Path) -> None:
    rows = [{"question": "is it red?", "answer": "no", "image_id": i} for i in (0, 1)]
    for split in ("train", "test"):
        _json(folder / f"easy/{split}_questions.json", rows)
        with zipfile.ZipFile(folder / f"easy/{split}_images.zip", "w") as file:
            for number in (0, 1):
                file.writestr(f"{number}.png", tiny.png(number, (6, 5)))
    _images(folder / "coco")
    entries = [("a.png", "train"), ("b.png", "eval")]
    rows = [{"image_id": f, "file": f, "split": s, "captions": ["A cat.", "A dog."]} for f, s in entries]
    _json(folder / "coco/annotations.json", rows)
    _json(folder / "foreign/data.json", [_ENTRY | {"image": "a.png"}] * 2)
    _json(folder / "foreign/1.json", _ENTRY)
    image = {"bytes": tiny.png(1, (6, 5)), "path": "a.png"}
    pq.write_table(pa.Table.from_pylist([_ENTRY | {"image": image}] * 3), folder / "foreign/x.parquet")
    with tarfile.open(folder / "foreign/x.tar", "w") as tar:
        tar.add(folder / "coco/a.png", "1.png")
        tar.add(folder / "foreign/1.json", "1.json")


def _convert(folder: Path, out: Path, rng: random.Random) -> None:
    for name, source in (("easy_vqa", "easy"), ("coco_cc", "coco")):
        verb("convert", name, "--source", folder / source, "--out", out / name)
    for name in ("data.json", "x.parquet", "x.tar"):
        options = ["--images", folder / "coco", "--workers", 1]
        verb("convert", "--source", folder / "foreign" / name, "--out", out / name, *options)


def _pictures(folder: Path) -> None:
    from PIL import Image

    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    for form in ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM"):
        Image.fromarray(pixels).save(folder / f"x.{form.lower()}", form)


def _decode(folder: Path, out: Path, rng: random.Random) -> None:
    for path in folder.iterdir():
        with contextlib.suppress(USER_ERRORS):
            decode_image(path.read_bytes(), source=path.name)


# ---------------------------------------------------------------------------------------------- questions, answers
def _questions(folder: Path) -> None:
    _images(folder / "images")
    row = {"question_id": "1", "image": "a.png", "question": "What?", "answer": "cat"}
    options = row | {"options": ["cat", "dog"], "ability": "scene", "group": "coarse", "answer": "A"}
    _json(folder / "vqa.json", [row, row | {"question_id": 2, "image": ["a.png", "b.png"]}])
    _lines(folder / "mini.jsonl", [options, options | {"question_id": "2"}])
    head = "index\tquestion\thint\tA\tB\tanswer\tcategory\tl2-category\timage\n"
    (folder / "mmbench.tsv").write_text(head + "1\tWhat?\t\tcat\tdog\tA\tocr\tfine\tiVBORw0KGgo=\n" * 2)
    text_vqa = {
        "question_id": 1,
        "image_id": "a",
        "question": "?",
        "answers": ["cat"] * 10,
        "ocr_tokens": ["x"],
    }
    _json(folder / "textvqa" / "TextVQA_0.5.1_val.json", {"data": [text_vqa]})
    _lines(
        folder / "textvqa" / "llava_textvqa_val_v051_ocr.jsonl",
        [{"question_id": "a", "text": "?", "image": "a.png"}],
    )


def _ask(folder: Path, out: Path, rng: random.Random) -> None:
    for name, path in (
        ("vqa", "vqa.json"),
        ("mini", "mini.jsonl"),
        ("mmbench", "mmbench.tsv"),
        ("textvqa", "textvqa"),
    ):
        with contextlib.suppress(USER_ERRORS):
            benchmark = read_benchmark(name, folder / path, folder / "images")
            for question in benchmark.questions:
                for image in question.images:
                    decode_image(benchmark.read_image(image), source=image)
    verb("validate", "--json", folder / "vqa.json", "--images", folder / "images", "--threads", 1)


def _tables(folder: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    from mllm_jax.evaluation.table_files import write_xlsx

    rows = [{"index": i, "question": "What?", "A": "cat", "B": "dog", "answer": "A"} for i in (1, 2)]
    write_xlsx(folder / "rows.xlsx", list(rows[0]), rows, ["index"])
    images = [row | {"image": {"bytes": tiny.png(0, (6, 5)), "path": "a.png"}} for row in rows]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(images), folder / "rows.parquet")
    lines = ["index,question,A", *(f"{i},What?,cat" for i in (1, 2))]
    (folder / "rows.csv").write_text("\n".join(lines))


def _read_tables(folder: Path, out: Path, rng: random.Random) -> None:
    from mllm_jax.evaluation.benchmarks.question_files import EmbeddedImages, read_rows

    for path in folder.iterdir():
        with contextlib.suppress(USER_ERRORS):
            images = EmbeddedImages()
            for row in read_rows(path, images):
                if row.get("image") in images:
                    decode_image(images.read(row["image"]), source=path.name)


_SCORED = ("blink", "gqa", "mini", "pope", "mmbench", "nextqa", "refcoco", "scienceqa", "textvqa", "vqav2")


def _answers(folder: Path) -> None:
    for name in _SCORED:
        (folder / name).mkdir()
        ANSWERS[name](folder / name, ["A", "(B) dog", "yes", "cat", "[0.1, 0.2, 0.3, 0.4]"])
    _json(folder / "groups.json", {"mini": {"a": {"group": "fine", "status": "ours", "note": "x"}}})


def _score(folder: Path, out: Path, rng: random.Random) -> None:
    name = rng.choice(_SCORED)
    annotations = next(
        (path for path in sorted((folder / name).iterdir()) if path.name.startswith("g")), None
    )
    given = ["--annotations", annotations] if annotations else []
    grouped = ["--groups", folder / "groups.json"] if name == "mini" else []
    verb("score", name, "--predictions", folder / name / "p", *given, *grouped)


def _judged(folder: Path) -> None:
    _json(folder / "p.json", {"v1_0": "A cat.", "v1_1": "B"})
    row = {"question": "What?", "answer": "cat<AND>dog", "capability": ["ocr"], "imagename": "a.png"}
    _json(folder / "g.json", {"v1_0": row, "v1_1": row})
    asked = requests.build_requests(
        "mm_vet", folder / "p.json", folder / "g.json", requests.Problems(), None, 1, None
    )
    facts = {
        "model": "m",
        "fingerprint": "f",
        "created": 1,
        "usage": {"prompt_tokens": 1, "completion_tokens": 1},
    }
    rows = [{"id": r.id, "digest": r.digest, "requested": "m", "content": "0.5", **facts} for r in asked]
    _lines(folder / "judge" / requests.ANSWERS, rows)


def _judge(folder: Path, out: Path, rng: random.Random) -> None:
    shutil.copytree(folder / "judge", out / "judge")
    given = ["--predictions", folder / "p.json", "--annotations", folder / "g.json"]
    verb("judge", "mm_vet", *given, "--out", out / "judge")


# ---------------------------------------------------------------------------------------------- run folders
def _run_config(folder: Path) -> None:
    spec = importlib.util.spec_from_file_location("recipe", ROOT / "configs" / "quickstart.py")
    recipe = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(recipe)
    _json(folder / "config.json", json.loads(recipe.get_config().to_json_best_effort()))
    _lines(
        folder / "history.jsonl",
        [{"time": "t", "host": "h", "process": 1, "directory": "/nowhere", "changed": {}}],
    )


def _read_run(folder: Path, out: Path, rng: random.Random) -> None:
    with contextlib.suppress(USER_ERRORS):
        saved_config(folder)
    _inspect(folder, out, rng)


_ABILITIES = {"scene": "coarse", "style": "coarse", "counting": "fine", "reading": "fine"}


def _evaluated(folder: Path) -> None:
    one = {"score": 0.5, "subtasks": dict.fromkeys(_ABILITIES, 0.5), "groups": {"coarse": 0.5, "fine": 0.5}}
    head = {
        "n": 8,
        "unparsed": 1,
        "unit": "fraction",
        "counts": {name: [1, 2] for name in _ABILITIES},
        "complete": True,
    }
    scores = head | one | {"blind": one, "majority": one, "likelihood": one, "problems": {}}
    values = {"model": 0.5, "blind": 0.3, "majority": 0.25, "likelihood": 0.4}
    rows = [{"level": "all", "name": "all", "group": "", "n": 8, "values": values}]
    rows += [{"level": "group", "name": g, "group": g, "n": 4, "values": values} for g in ("coarse", "fine")]
    rows += [
        {"level": "ability", "name": a, "group": g, "n": 2, "values": values} for a, g in _ABILITIES.items()
    ]
    model = {
        "connector": "mlp2x_gelu", "connector_options": {"depth": 2}, "visual_tokens": 144, "image_size": 84,
        "vision": "ViT", "llm": "LLM", "parameters": {"vision": 10, "connector": 2, "llm": 7}, "fingerprint": "f",
    }  # fmt: skip
    benchmark = {"kind": "mini", "groups": _ABILITIES, "rows": rows, "scores": scores}
    for name, tokens in (("one", 144), ("two", 36)):
        run = folder / name
        _json(
            run / "eval/summary.json",
            {"model": model | {"visual_tokens": tokens}, "benchmarks": {"mini": benchmark}},
        )
        uri = "data:image/png;base64," + base64.b64encode(tiny.png(0, (6, 5))).decode()
        example = {
            "pictures": [uri],
            "question": "how many?",
            "answers": ["2"],
            "ability": "counting",
            "text": "2",
        }
        _json(run / "eval/mini/examples.json", [example | {"right": True}, example | {"right": None}])
        _json(run / "eval/mini/manifest.json", {"benchmark": "d", "model": "f"})
        _json(run / "eval/mini/scores.json", scores)
        question = {
            "ability": "scene",
            "group": "coarse",
            "options": ["a", "b"],
            "answer": "a",
            "prompt": "?",
        }
        answers = [question | {"question_id": i, "rotation": 0, "text": "A"} for i in range(2)]
        _lines(run / "eval/mini/predictions.jsonl", answers)
        _lines(
            run / "eval/mini/likelihood.jsonl", [one | {"log_likelihoods": [-1.0, -2.0]} for one in answers]
        )
        _json(
            run / "config.json",
            {"model": {"connector": {"name": name}}, "seed": 0, "stage_order": ["pretrain"]},
        )
        record = {
            "stage": "pretrain",
            "loss": 2.0,
            "learning_rate": 1e-3,
            "step_seconds": 0.5,
            "tokens_per_second": 9.0,
        }
        _lines(run / "metrics.jsonl", [record | {"step": step, "grad_norm": 1.0} for step in (1, 2, 3)])


def _figure(*arguments: object, **options: object) -> None:
    path = next(one for one in (*arguments, *options.values()) if isinstance(one, Path))
    path.write_bytes(tiny.png(0, (2, 2)))


def _report(folder: Path, out: Path, rng: random.Random) -> None:
    with contextlib.ExitStack() as stack:
        if rng.random() < 0.95:  # drawing takes a second
            for module, name in (
                (content, "plot_examples"),
                (content.losses, "plot_loss_curves"),
                (content.radar, "plot_radar"),
                (content.cost_plot, "plot_cost"),
            ):
                stack.enter_context(mock.patch.object(module, name, _figure))
        alone = rng.random() < 0.5
        verb(
            "report",
            *([folder / "one"] if alone else [folder / "one", folder / "two"]),
            "--out",
            out / "report",
        )


def _continue(folder: Path, out: Path, rng: random.Random) -> None:
    """What eval.py reads of an evaluation that was begun."""
    from mllm_jax.evaluation.run import earlier_summary

    place = folder / "one" / "eval"
    with contextlib.suppress(USER_ERRORS):
        earlier_summary(place, {"fingerprint": "f"})
    with contextlib.suppress(USER_ERRORS):
        store.check_manifest(place / "mini", {"benchmark": "d", "model": "f"})
    store.AnswerFile(place / "mini" / "predictions.jsonl", writable=False)


_OURS = (ValueError, OSError)  # `inspect`, `import` and `load` turn these into messages
SEEN = 0.3  # some 0.6 to 0.95 are; broken JSON alone makes 0.1
READERS = {
    "LLM checkpoint": Reader(_llm, {"config.json": JSON}, _inspect, refuses=SEEN),
    "vision tower": Reader(
        _tower, {"config.json": JSON, "preprocessor_config.json": JSON}, _inspect, refuses=SEEN
    ),
    "llava-hf checkpoint": Reader(
        _llava_hf,
        {"config.json": JSON, "preprocessor_config.json": JSON, "generation_config.json": JSON},
        _inspect_hf,
        _OURS,
        share=8,
        refuses=SEEN,
    ),
    "model directory": Reader(_native, {"model.json": JSON}, _inspect, refuses=SEEN),
    "PEFT adapter": Reader(
        _adapter, {"adapter_config.json": JSON, "*.safetensors": BYTES}, _inspect, refuses=SEEN
    ),
    "safetensors index": Reader(_weights, {"*.index.json": JSON}, _read_weights, _OURS, refuses=SEEN),
    "safetensors file": Reader(_weights, {"model.safetensors": BYTES}, _read_weights, _OURS, refuses=SEEN),
    "safetensors header": Reader(_header, {"header.json": JSON}, _read_header, _OURS, refuses=SEEN),
    ".bin": Reader(_bin, {"*.bin": BYTES}, _read_weights, _OURS, refuses=SEEN),
    "tokenizer": Reader(_llm, {"tokenizer*.json": JSON}, _read_tokenizer, _OURS),
    "LLaVA JSON": Reader(_llava, {"data.json": JSON}, _validate, share=8),
    "images": Reader(_pictures, {"x.*": BYTES}, _decode),
    "data sets to convert": Reader(_convertible, {"*/*.json": JSON, "*/*.[zpt]*": BYTES}, _convert),
    "prepared data": Reader(_prepared, {"1.0.0/*.json": JSON, "1.0.0/*array_record*": BYTES}, _read_prepared),
    "prepared benchmarks": Reader(
        _prepared_benchmark, {"1.0.0/*.json": JSON, "1.0.0/*array_record*": BYTES}, _read_prepared_benchmark
    ),
    "question files": Reader(
        _questions,
        {"vqa.json": JSON, "mini.jsonl": JSON, "textvqa/*": JSON, "mmbench.tsv": BYTES},
        _ask,
        share=8,
    ),
    "tables": Reader(_tables, {"rows.*": BYTES}, _read_tables),
    "answer files": Reader(
        _answers, {"*/[pg]*": JSON, "*/*.csv": BYTES, "groups.json": JSON}, _score, share=8
    ),
    "judge answers": Reader(_judged, {"*.json": JSON, "judge/*": JSON}, _judge),
    "run configuration": Reader(_run_config, {"*.json*": JSON}, _read_run),
    "report of run folders": Reader(
        _evaluated, {"*/eval/summary.json": JSON, "*/eval/mini/*": JSON, "*/*.json*": JSON}, _report, share=12
    ),
    "evaluation continued": Reader(
        _evaluated, {"one/eval/summary.json": JSON, "one/eval/mini/*": JSON}, _continue
    ),
}
caption_java.missing = lambda: "not in this test"
