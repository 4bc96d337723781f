"""Writes tensors as `torch.save` does: a zip archive with a pickle that names them, and the data of each.

The counterpart of `torch_pickle`; `torch.load(weights_only=True)` reads it as well.
"""

import itertools
import pathlib
import struct
import zipfile
from collections.abc import Mapping

import numpy as np

from mllm_jax import files
from mllm_jax.interop.torch_pickle import STORAGES

_STORAGE_OF = {dtype: name for name, dtype in STORAGES.items()}


def save(path: pathlib.Path, tensors: Mapping[str, np.ndarray]) -> None:
    """Writes a state dict, complete or not at all.

    Raises:
      KeyError: a dtype that PyTorch has no storage of.
    """
    with files.replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        archive.writestr("archive/data.pkl", _pickle(tensors))
        archive.writestr("archive/byteorder", "little")
        for key, array in enumerate(tensors.values()):
            archive.writestr(f"archive/data/{key}", array.tobytes())
        archive.writestr("archive/version", "3\n")


def _pickle(tensors: Mapping[str, np.ndarray]) -> bytes:
    """A dict of calls of `_rebuild_tensor_v2`, in protocol 2."""
    rebuild, hooks = _name("torch._utils", "_rebuild_tensor_v2"), _name("collections", "OrderedDict") + b")R"
    items = []
    for key, (name, array) in enumerate(tensors.items()):
        kind = _name("torch", _STORAGE_OF[array.dtype])
        storage = _tuple(_text("storage"), kind, _text(str(key)), _text("cpu"), _number(array.size)) + b"Q"
        strides = [*itertools.accumulate(array.shape[:0:-1], int.__mul__, initial=1)][::-1][: array.ndim]
        shape, stride = (_tuple(*map(_number, each)) for each in (array.shape, strides))
        no_gradient = b"\x89"
        arguments = _tuple(storage, _number(0), shape, stride, no_gradient, hooks)
        items.append(_text(name) + rebuild + arguments + b"R")
    return b"\x80\x02}(" + b"".join(items) + b"u."


def _name(module: str, name: str) -> bytes:
    return f"c{module}\n{name}\n".encode()


def _text(value: str) -> bytes:
    data = value.encode()
    return b"X" + struct.pack("<I", len(data)) + data


def _number(value: int) -> bytes:
    return b"\x8a\x08" + struct.pack("<q", value)


def _tuple(*items: bytes) -> bytes:
    return b"(" + b"".join(items) + b"t"
