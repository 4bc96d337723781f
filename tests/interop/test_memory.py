"""Reading streams: the host holds the model and no more than two of its largest tensor besides."""

import json
import os
import subprocess
import sys
import tracemalloc

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from test_torch_pickle import dumps, tensor, write_zip

from mllm_jax import interop
from mllm_jax.interop import families
from mllm_jax.interop.parts import LLM_SPELLINGS, llm_part, llm_shapes, plan_parts
from mllm_jax.interop.safetensors_io import write_sharded
from mllm_jax.interop.sinks import read_to_devices
from mllm_jax.interop.source import Source
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.paths import flatten

CONFIG = DecoderConfig(
    vocab=2048, width=256, depth=6, heads=4, kv_heads=2, head_width=64, mlp_width=1024, tied=False
)


def write_llm(directory, config, dtype=np.float32, limit=4 << 20):
    """A Llama checkpoint of zeros and its sizes: (all bytes, largest tensor)."""
    family = families.LLMS["llama"]
    shapes = llm_shapes(config)
    tensors = []
    for rule in family.rules(config):
        shape = shapes[rule.path][1:] if rule.stacked else shapes[rule.path]
        shape = rule.transform.write(np.broadcast_to(np.int8(0), shape)).shape
        for i in range(config.depth) if rule.stacked else (0,):
            name = rule.name.replace("{i}", str(i))
            tensors.append((name, np.dtype(dtype), shape, lambda s=shape, i=i: np.full(s, i, dtype)))
    directory.mkdir(exist_ok=True)
    (directory / "config.json").write_text(json.dumps(family.write(config)))
    write_sharded(directory, tensors, limit)
    sizes = [int(np.prod(shape)) * np.dtype(dtype).itemsize for _, _, shape, _ in tensors]
    return sum(sizes), max(sizes)


def rewrite_as_bin(directory):
    """The same tensors as one PyTorch archive."""
    source, entries, storages = Source(directory), {}, {}
    for key, name in enumerate(source):
        array = np.ascontiguousarray(source.read(name))
        stride = tuple(step // array.itemsize for step in array.strides)
        entries[name] = tensor("FloatStorage", str(key), array.size, 0, array.shape, stride)
        storages[str(key)] = array.tobytes()
    for path in directory.glob("*.safetensors*"):
        path.unlink()
    write_zip(directory / "pytorch_model.bin", dumps(entries), storages)


@pytest.mark.parametrize(("dtype", "form"), [(None, "shards"), (jnp.bfloat16, "shards"), (None, "bin")])
def test_host_arrays(dtype, form, tmp_path):
    total, largest = write_llm(tmp_path, CONFIG)
    assert len(list(tmp_path.glob("model-*-of-*.safetensors"))) > 3
    if form == "bin":
        rewrite_as_bin(tmp_path)
    interop.llm_config(tmp_path)  # imports done before measuring
    model_bytes = total if dtype is None else total // 2
    tracemalloc.start()
    params = interop.load_llm(tmp_path, dtype=dtype)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(leaf.nbytes for leaf in jax.tree.leaves(params)) == model_bytes
    assert peak <= model_bytes + 2 * largest + (1 << 20)
    assert (params["blocks"]["up"]["kernel"] == np.arange(6)[:, None, None]).all()


def test_devices_receive_one_tensor_at_a_time(tmp_path):
    _, largest = write_llm(tmp_path, CONFIG)
    mesh = Mesh(np.array(jax.devices()[:1]).reshape(1, 1), ("fsdp", "tensor"))

    def sharding_of(path, shape):
        spec = PartitionSpec(None, "fsdp", "tensor") if len(shape) == 3 else PartitionSpec()
        return NamedSharding(mesh, spec)

    source = Source(tmp_path)
    placements, shapes, _ = plan_parts(source, [llm_part(CONFIG, families.LLMS["llama"])])
    read_to_devices(source, placements, shapes, sharding_of)  # compiles
    tracemalloc.start()
    params = read_to_devices(source, placements, shapes, sharding_of)
    peak = tracemalloc.get_traced_memory()[1]  # NumPy's; device memory is XLA's
    tracemalloc.stop()
    assert peak <= 2 * largest + (1 << 20)
    expected = interop.load_llm(tmp_path)
    jax.tree.map(np.testing.assert_array_equal, params, expected)
    for path, leaf in flatten(params).items():
        assert leaf.sharding == sharding_of(path, leaf.shape)


SCRIPT = """
import os, sys, threading, time
import jax, numpy as np, psutil
from mllm_jax.interop import families, llm_config
from mllm_jax.interop.parts import llm_part, plan_parts
from mllm_jax.interop.sinks import read_to_devices
from mllm_jax.interop.source import Source

here = jax.sharding.SingleDeviceSharding(jax.devices()[0])
def read(directory):
    source = Source(directory)
    part = llm_part(llm_config(directory), families.LLMS["llama"])
    placements, shapes, _ = plan_parts(source, [part])
    return read_to_devices(source, placements, shapes, lambda path, shape: here)
read(sys.argv[1])  # compiles and imports
process, peak, stop = psutil.Process(), [0], threading.Event()
def watch():
    while not stop.is_set():
        peak[0] = max(peak[0], process.memory_info().rss)
        time.sleep(0.001)
before = process.memory_info().rss
thread = threading.Thread(target=watch)
thread.start()
params = read(sys.argv[2])
stop.set()
thread.join()
print(peak[0] - before)
"""


def test_the_whole_process(tmp_path):
    """Resident memory grows by the model, two of its largest tensor, and what compiling the new shapes takes.

    glibc keeps freed blocks of up to 32 MB for later, tens of megabytes that nobody holds; from 64 kB on they are given
    back here, so that what is measured is what is held.
    """
    small = DecoderConfig(vocab=64, width=64, depth=2, heads=2, kv_heads=2, head_width=32, mlp_width=96)
    write_llm(tmp_path / "small", small)
    big = DecoderConfig(vocab=8192, width=512, depth=8, heads=8, kv_heads=8, head_width=64, mlp_width=1408)
    total, largest = write_llm(tmp_path / "big", big, limit=32 << 20)
    assert total > 8 * largest
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, tmp_path / "small", tmp_path / "big"],
        capture_output=True,
        text=True,
        check=True,
        env={**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"},
    )
    grown = int(done.stdout.split()[-1])
    assert grown <= total + 2 * largest + (8 << 20)


def test_spellings_are_distinct():
    assert len(set(LLM_SPELLINGS)) == len(LLM_SPELLINGS)


SHARDED = """
import sys
import jax, numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec as P
from mllm_jax import interop
from mllm_jax.interop import families
from mllm_jax.interop.parts import llm_part, plan_parts
from mllm_jax.interop.sinks import read_to_devices
from mllm_jax.interop.source import Source
from mllm_jax.parallel.sharding import spec_of

mesh = Mesh(np.array(jax.devices()).reshape(2, 2), ("fsdp", "tensor"))
source, config = Source(sys.argv[1]), interop.llm_config(sys.argv[1])
placements, shapes, _ = plan_parts(source, [llm_part(config, families.LLMS["llama"], "llm")])
params = read_to_devices(source, placements, shapes, lambda path, shape: NamedSharding(mesh, spec_of(path)))
expected = {"llm": interop.load_llm(sys.argv[1])}
jax.tree.map(np.testing.assert_array_equal, jax.device_get(params), expected)
kernel = params["llm"]["blocks"]["up"]["kernel"]
assert kernel.sharding.spec == P(None, "fsdp", "tensor"), kernel.sharding
assert kernel.addressable_shards[0].data.size * 4 == kernel.size
print(len(jax.devices()))
"""


def test_four_devices_hold_their_shards(tmp_path):
    config = DecoderConfig(vocab=32, width=16, depth=2, heads=2, kv_heads=2, head_width=8, mlp_width=24)
    write_llm(tmp_path, config, limit=4096)
    environment = os.environ | tiny.fake_devices(4)
    done = subprocess.run(
        [sys.executable, "-c", SHARDED, tmp_path],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.stdout.strip() == "4", done.stderr
