"""Reading and writing .safetensors one tensor at a time, without torch, every float type.

Layout (https://github.com/huggingface/safetensors): 8 bytes little-endian header length, a JSON header
{name: {dtype, shape, data_offsets}}, then the bytes of the tensors.

The package `safetensors` writes a file from tensors that are all in memory at once. A 70B model does not fit there
beside what it is made from, so tensors are written here as they come; and headers of strangers are checked against
the file's size before anything is allocated.
"""

import json
import math
import pathlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import ml_dtypes
import numpy as np

from mllm_jax import files, limits

DTYPES: dict[str, np.dtype] = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F8_E4M3": np.dtype(ml_dtypes.float8_e4m3fn),
    "F8_E5M2": np.dtype(ml_dtypes.float8_e5m2),
    "I64": np.dtype(np.int64),
    "I32": np.dtype(np.int32),
    "I16": np.dtype(np.int16),
    "I8": np.dtype(np.int8),
    "U64": np.dtype(np.uint64),
    "U32": np.dtype(np.uint32),
    "U16": np.dtype(np.uint16),
    "U8": np.dtype(np.uint8),
    "BOOL": np.dtype(np.bool_),
}
_DIMENSIONS = 32  # of an array in NumPy
CODES = {dtype: code for code, dtype in DTYPES.items()}


class SafetensorsFile:
    """An opened file: its header is checked whole, its tensors are read when asked for.

    Attributes:
      path: the file.
      tensors: {name: (dtype, shape)}.

    Raises:
      ValueError: the file is damaged; the message says what is wrong.
    """

    def __init__(self, path: pathlib.Path):
        self.path = pathlib.Path(path)
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or not 2 <= length <= size - 8:
                raise self._damaged(f"its header claims {length} bytes of a {size}-byte file")
            limits.check("MAX_HEADER_BYTES", length, self.path)
            try:
                header = json.loads(file.read(length), object_pairs_hook=_once)
            except (ValueError, RecursionError) as error:
                raise self._damaged(f"its header is not JSON ({error})") from error
        if not isinstance(header, dict):
            raise self._damaged("its header is not an object")
        header.pop("__metadata__", None)
        self.tensors: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
        self._starts: dict[str, int] = {}
        for name, entry in header.items():
            self.tensors[name], self._starts[name] = self._entry(name, entry, size - 8 - length)
            self._starts[name] += 8 + length
        self._check_apart()

    def _damaged(self, what: str) -> ValueError:
        return ValueError(f"{self.path} is not a valid safetensors file: {what}. Download it again.")

    def _entry(self, name: str, entry: Any, data_bytes: int) -> tuple[tuple[np.dtype, tuple[int, ...]], int]:
        if not isinstance(entry, dict) or not all(
            isinstance(entry.get(key), list) and all(type(n) is int and n >= 0 for n in entry[key])
            for key in ("shape", "data_offsets")
        ):
            raise self._damaged(f"entry {name!r} is malformed")
        code, shape = entry.get("dtype"), tuple(entry["shape"])
        if len(entry["data_offsets"]) != 2 or len(shape) > _DIMENSIONS:
            raise self._damaged(f"entry {name!r} is malformed")
        start, end = entry["data_offsets"]
        if not isinstance(code, str) or code not in DTYPES:
            raise self._damaged(f"tensor {name!r} has dtype {code!r}; known: {', '.join(DTYPES)}")
        if not 0 <= start <= end <= data_bytes or end - start != math.prod(shape) * DTYPES[code].itemsize:
            raise self._damaged(f"tensor {name!r} of shape {shape} does not fit its {end - start} bytes")
        return (DTYPES[code], shape), start

    def _check_apart(self) -> None:
        """Tensors that share bytes would make a small file large in memory."""
        end, before = 0, ""
        for name in sorted(self._starts, key=lambda name: (self._starts[name], self._bytes(name))):
            if self._starts[name] < end and self._bytes(name):
                raise self._damaged(f"tensors {before!r} and {name!r} share bytes")
            end, before = max(end, self._starts[name] + self._bytes(name)), name

    def _bytes(self, name: str) -> int:
        dtype, shape = self.tensors[name]
        return math.prod(shape) * dtype.itemsize

    def read(self, name: str) -> np.ndarray:
        """One tensor, copied from the file (no memory map: what is not used any more is freed)."""
        dtype, shape = self.tensors[name]
        count = int(np.prod(shape, dtype=np.int64))
        flat = np.fromfile(self.path, dtype, count, offset=self._starts[name])
        return flat.reshape(shape)


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """A JSON object whose names are all different.

    Raises:
      ValueError: one is there twice.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a name is there twice")
    return found


# (name, dtype, shape, function that gives the array)
Announced = tuple[str, np.dtype, tuple[int, ...], Callable[[], np.ndarray]]
SHARD_BYTES = 5 << 30  # transformers' default


def write_safetensors(path: pathlib.Path, tensors: Iterable[Announced]) -> None:
    """Writes tensors one after the other; each is computed only when its turn comes.

    Args:
      path: the file; appears when it is complete.
      tensors: (name, dtype, shape, function that gives the array).

    Raises:
      ValueError: a dtype that the format has no code for, or an array that is not as announced.
    """
    tensors = list(tensors)
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, dtype, shape, _ in tensors:
        if np.dtype(dtype) not in CODES:
            raise ValueError(f"safetensors cannot store {name!r}: dtype {dtype}")
        end = offset + int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        header[name] = {"dtype": CODES[np.dtype(dtype)], "shape": list(shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header).encode()
    encoded += b" " * (-len(encoded) % 8)
    with files.replacing(path) as file:
        file.write(len(encoded).to_bytes(8, "little") + encoded)
        for name, dtype, shape, make in tensors:
            array = np.asarray(make())
            if array.dtype != dtype or array.shape != tuple(shape):
                raise ValueError(f"{name!r} is {array.dtype}{array.shape}, announced as {dtype}{shape}")
            file.write(np.ascontiguousarray(array).reshape(-1).view(np.uint8).data)


def write_sharded(directory: pathlib.Path, tensors: Sequence[Announced], limit: int = SHARD_BYTES) -> None:
    """Writes model.safetensors, or shards of at most `limit` bytes (or one tensor) and their index."""
    shards: list[list[Announced]] = [[]]
    sizes = [0]
    for tensor in tensors:
        size = int(np.prod(tensor[2], dtype=np.int64)) * np.dtype(tensor[1]).itemsize
        if shards[-1] and sizes[-1] + size > limit:
            shards.append([])
            sizes.append(0)
        shards[-1].append(tensor)
        sizes[-1] += size
    if len(shards) == 1:
        return write_safetensors(directory / "model.safetensors", tensors)
    names = [f"model-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors(directory / name, shard)
    weight_map = {tensor[0]: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
    index = {"metadata": {"total_size": sum(sizes)}, "weight_map": weight_map}
    files.write_json(directory / "model.safetensors.index.json", index)
    return None
