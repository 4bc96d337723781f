"""Mutated checkpoint files: a message or a model, never a traceback, no file elsewhere touched, memory bounded.

`MLLM_JAX_FUZZ` sets how many inputs each reader gets (5,000 in all were run with 1,000).
"""

import json
import os
import pathlib
import random
import resource

import jax
import numpy as np
import pytest

from mllm_jax import interop
from mllm_jax.interop import native, peft, special_tokens
from mllm_jax.interop.checkpoints import plan_model, save_llava_hf
from mllm_jax.interop.source import Source
from mllm_jax.models import mllm
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.mllm import ModelConfig
from mllm_jax.models.vit import VisionConfig

COUNT = int(os.environ.get("MLLM_JAX_FUZZ", "60"))
VALUES = [None, True, False, 0, -1, 1, 7, 10**9, 10**30, 0.5, -2.5, 1e308, float("nan"), float("inf"), "", "x", "../x",
          "/etc/passwd", "a\0b", "\ud800", [], [1], [[]], [None], {}, {"a": 1}, "9" * 5000]  # fmt: skip
CONFIG = ModelConfig(
    VisionConfig(width=8, depth=2, heads=2, mlp_width=8, patch=4, image_size=8),
    DecoderConfig(vocab=16, width=8, depth=1, heads=2, kv_heads=1, head_width=4, mlp_width=8),
    8,
)
MEMORY = 400 << 20  # bytes that reading hostile files may add to the process


def places(value, path=()):
    """Paths of every entry of nested JSON."""
    yield path
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        yield from places(item, (*path, key))


def mutated(value, rng):
    """A copy with one entry replaced, removed or added."""
    value = json.loads(json.dumps(value))
    found = [place for place in places(value) if place]
    if not found:
        return value
    path = rng.choice(found)
    parent = value
    for key in path[:-1]:
        parent = parent[key]
    action = rng.randrange(6)
    if action == 0:
        del parent[path[-1]]
    elif action == 1 and isinstance(parent, dict):
        parent[
            rng.choice(["quantization_config", "text_config", "vision_config", "mm_x", "rope_scaling"])
        ] = rng.choice(VALUES)
    else:
        parent[path[-1]] = rng.choice(VALUES)
    return value


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    """A llava-hf checkpoint, a model directory and an adapter, all tiny and sound."""
    root = tmp_path_factory.mktemp("sound")
    params = jax.device_get(jax.jit(lambda key: mllm.init(CONFIG, key))(jax.random.key(0)))
    save_llava_hf(root / "hf", CONFIG, params, generation={"eos_token_id": 2})
    fields = json.loads((root / "hf" / "config.json").read_text())
    del fields["mllm_jax"]
    (root / "hf" / "config.json").write_text(json.dumps(fields))
    native.save_native(root / "native", CONFIG, params, "safetensors", template="v1")
    (root / "adapter").mkdir()
    (root / "adapter" / peft.CONFIG).write_text(
        json.dumps({"r": 2, "lora_alpha": 4, "peft_type": "LORA", "bias": "none", "modules_to_save": None})
    )
    return root


def read_hf(directory):
    plan_model(directory)
    special_tokens.generation(directory)
    special_tokens.image_token(directory)


READERS = {
    "config.json": ("hf", read_hf),
    "preprocessor_config.json": ("hf", read_hf),
    "generation_config.json": ("hf", read_hf),
    "model.json": ("native", native.load_config),
    peft.CONFIG: ("adapter", peft.read_lora),
}
ALLOWED = (ValueError, OSError)


@pytest.fixture
def guard(monkeypatch, tmp_path, checkpoints):
    """Opening a file that no reader of these folders has any business with fails the test."""
    real, inside = open, [str(tmp_path), str(checkpoints)]

    def checked(file, mode="r", *args, **kwargs):
        name = os.fspath(file) if isinstance(file, str | os.PathLike) else ""
        if name.startswith("/etc/passwd") or ("w" in mode and name and not name.startswith(tuple(inside))):
            pytest.fail(f"opened {name}")
        return real(file, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", checked)
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *a, **k: pytest.fail("asked the hub"))


def copied(checkpoints, name, target):
    """The files of a checkpoint linked into a fresh folder."""
    target.mkdir()
    for path in (checkpoints / name).iterdir():
        os.link(path, target / path.name)
    return target


@pytest.mark.parametrize("name", READERS)
def test_json_files(name, checkpoints, tmp_path, guard):
    kind, read = READERS[name]
    place = copied(checkpoints, kind, tmp_path / "x")
    sound = json.loads((place / name).read_text())
    read(place)
    messages: list[str] = []
    rng, before = random.Random(name), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    (place / name).unlink()
    for _ in range(COUNT):
        text = json.dumps(mutated(mutated(sound, rng) if rng.random() < 0.5 else sound, rng))
        if rng.random() < 0.1:
            text = text[: rng.randrange(len(text))]
        (place / name).write_bytes(text.encode("utf-8", "surrogatepass"))
        try:
            read(place)
        except ALLOWED as error:
            messages.append(str(error))
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{text[:2000]}") from error
    assert len(messages) > COUNT // 10  # most changes are seen
    assert all(messages)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEMORY >> 10, f"{grown >> 10} MB more"


def binary_files(root):
    """A sound safetensors file, its sound index, and a `.bin` where torch can write one."""
    from safetensors.numpy import save_file

    save_file(
        {f"t{i}": np.arange(6, dtype=np.float32).reshape(2, 3) for i in range(4)}, root / "model.safetensors"
    )
    found = {"model.safetensors": (root / "model.safetensors").read_bytes()}
    index = {"metadata": {"total_size": 96}, "weight_map": {f"t{i}": "model.safetensors" for i in range(4)}}
    found["model.safetensors.index.json"] = json.dumps(index).encode()
    from test_foreign import Tensor, torch_bin

    torch_bin(
        root / "x.bin", {"a": Tensor((2, 3), (3, 1), 6)}, {"0": np.arange(6, dtype=np.float32).tobytes()}
    )
    found["pytorch_model.bin"] = (root / "x.bin").read_bytes()
    (root / "x.bin").unlink()
    (root / "model.safetensors").unlink()
    return found


@pytest.mark.parametrize("name", ["model.safetensors", "model.safetensors.index.json", "pytorch_model.bin"])
def test_weight_files(name, tmp_path, guard):
    files = binary_files(tmp_path)
    if name.endswith("index.json"):
        (tmp_path / "model.safetensors").write_bytes(files["model.safetensors"])
    messages: list[str] = []
    rng, before = random.Random(name), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for _ in range(COUNT):
        data = bytearray(files[name])
        for _ in range(rng.randint(1, 4)):
            place = rng.randrange(len(data))
            if rng.random() < 0.7:
                data[place] = rng.randrange(256)
            else:
                data[place : place + rng.randint(0, 4)] = rng.randbytes(rng.randint(0, 4))
        (tmp_path / name).write_bytes(data)
        try:
            source = Source(tmp_path)
            for tensor in source:
                source.read(tensor)
        except ALLOWED as error:
            messages.append(str(error))
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error}\n{bytes(data)[:2000]!r}") from error
    assert len(messages) > COUNT // 10  # most changes are seen
    assert all(messages)
    grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before
    assert grown < MEMORY >> 10, f"{grown >> 10} MB more"


def test_tokenizer_files(tmp_path, guard):
    mini = pathlib.Path(interop.resolve_path("mini"))
    names = [name for name in ("tokenizer.json", "tokenizer_config.json") if (mini / name).exists()]
    sound = {name: json.loads((mini / name).read_text()) for name in names}
    rng, messages = random.Random(0), []
    for _ in range(max(COUNT // 3, 10)):
        changed = rng.choice(names)
        for name in names:
            value = mutated(sound[name], rng) if name == changed else sound[name]
            (tmp_path / name).write_bytes(json.dumps(value).encode("utf-8", "surrogatepass"))
        try:
            interop.load_tokenizer(tmp_path)
        except ALLOWED as error:
            messages.append(str(error))
    assert all(messages)
