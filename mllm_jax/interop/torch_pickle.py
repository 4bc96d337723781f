"""Reads tensors from PyTorch `.bin` files without torch and without running anything that is in them.

A pickle is a program: unpickling may call any function that it names. Here the opcodes are interpreted one by one by
`_interpret`, which knows containers, numbers, strings and the few names in `ALLOWED`; those do not call anything
either but stand for "a tensor in that storage". Every other name or opcode is refused and reported. Tensor data are
read only when asked for, one tensor at a time.

Formats: the zip archives of PyTorch >= 1.6 and the older stream format.
"""

import dataclasses
import io
import math
import pathlib
import pickletools
import zipfile
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import ml_dtypes
import numpy as np

from mllm_jax import limits

STORAGES: dict[str, np.dtype] = {
    "DoubleStorage": np.dtype(np.float64),
    "FloatStorage": np.dtype(np.float32),
    "HalfStorage": np.dtype(np.float16),
    "BFloat16Storage": np.dtype(ml_dtypes.bfloat16),
    "LongStorage": np.dtype(np.int64),
    "IntStorage": np.dtype(np.int32),
    "ShortStorage": np.dtype(np.int16),
    "CharStorage": np.dtype(np.int8),
    "ByteStorage": np.dtype(np.uint8),
    "BoolStorage": np.dtype(np.bool_),
}
ALLOWED = (
    "collections OrderedDict",
    "torch._utils _rebuild_tensor_v2",
    "torch._utils _rebuild_parameter",
    *(f"torch {name}" for name in STORAGES),
)
LEGACY_MAGIC = 0x1950A86A20F9469CFC6C


class UnsafeFileError(ValueError):
    """The file names something other than tensors; nothing was run."""


class DamagedFileError(ValueError):
    """The file is cut off or inconsistent."""


@dataclasses.dataclass(frozen=True)
class Name:
    """A global that the pickle names, e.g. "torch FloatStorage"."""

    text: str


@dataclasses.dataclass(frozen=True)
class Storage:
    """A block of data of the file."""

    dtype: np.dtype
    key: str
    count: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A view of a storage, not yet read."""

    storage: Storage
    offset: int
    shape: tuple[int, ...]
    stride: tuple[int, ...]


_MARK = object()
_SMALL = 1 << 20  # bytes below which a file is not called small for what it holds


class _Damaged(Exception):
    """The stack does not hold what an opcode needs."""


# What reading raises where a length is absurd, or an archive is encrypted or compressed in an unknown way.
_UNREADABLE = (MemoryError, OverflowError, RuntimeError, zipfile.BadZipFile, zlib.error)


def _interpret(file: io.BufferedIOBase, refuse: Callable[[str], Exception]) -> Any:
    """The value that a pickle describes, with `Name`, `Storage` and `Tensor` in place of objects."""
    stack: list[Any] = []
    memo: dict[int, Any] = {}
    most = limits.limit("MAX_PICKLE_STEPS")

    def pop_to_mark() -> list[Any]:
        for index in range(len(stack) - 1, -1, -1):
            if stack[index] is _MARK:
                items = stack[index + 1 :]
                del stack[index:]
                return items
        raise _Damaged("no mark")

    def set_items(target: Any, items: list[Any]) -> None:
        if not isinstance(target, dict) or len(items) % 2:
            raise _Damaged("items for something that is no dict")
        target.update(_entries(zip(items[::2], items[1::2], strict=True)))

    def extend(target: Any, items: list[Any]) -> None:
        if not isinstance(target, list):
            raise _Damaged("items for something that is no list")
        target.extend(items)

    for step, (opcode, argument, _) in enumerate(pickletools.genops(file)):
        if step == most:
            limits.check("MAX_PICKLE_STEPS", step + 1, getattr(file, "name", "the pickle of a .bin file"))
        match opcode.name:
            case "PROTO" | "FRAME":
                pass
            case "STOP":
                return stack.pop()
            case "MARK":
                stack.append(_MARK)
            case "EMPTY_DICT":
                stack.append({})
            case "EMPTY_LIST":
                stack.append([])
            case "EMPTY_TUPLE":
                stack.append(())
            case "NONE":
                stack.append(None)
            case "NEWTRUE":
                stack.append(True)
            case "NEWFALSE":
                stack.append(False)
            case (
                "BINUNICODE" | "SHORT_BINUNICODE" | "BINUNICODE8" | "UNICODE"
                | "BININT" | "BININT1" | "BININT2" | "INT" | "LONG" | "LONG1" | "BINFLOAT" | "FLOAT"
                | "SHORT_BINSTRING" | "BINSTRING" | "STRING" | "SHORT_BINBYTES" | "BINBYTES"
            ):  # fmt: skip
                stack.append(argument)
            case "TUPLE":
                stack.append(tuple(pop_to_mark()))
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                count = int(opcode.name[-1])
                items = tuple(stack[-count:])
                del stack[-count:]
                stack.append(items)
            case "LIST":
                stack.append(pop_to_mark())
            case "DICT":
                items, new = pop_to_mark(), {}
                set_items(new, items)
                stack.append(new)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = pop_to_mark()
                set_items(stack[-1], items)
            case "APPEND":
                value = stack.pop()
                extend(stack[-1], [value])
            case "APPENDS":
                items = pop_to_mark()
                extend(stack[-1], items)
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                memo[argument] = stack[-1]
            case "MEMOIZE":
                memo[len(memo)] = stack[-1]
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(memo[argument])
            case "POP":
                stack.pop()
            case "GLOBAL":
                stack.append(_allowed(argument, refuse))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                if not isinstance(module, str) or not isinstance(attribute, str):
                    raise _Damaged("a name that is no text")
                stack.append(_allowed(f"{module} {attribute}", refuse))
            case "BINPERSID":
                stack.append(_storage(stack.pop()))
            case "REDUCE":
                arguments, function = stack.pop(), stack.pop()
                stack.append(_rebuild(function, arguments, refuse))
            case "BUILD":
                state = stack.pop()
                # An OrderedDict's attributes (`_metadata` of a state dict): no data, not needed.
                if not isinstance(stack[-1], dict) or not isinstance(state, dict):
                    raise refuse("the state of an object")
            case name:
                raise refuse(f"opcode {name}")
    raise _Damaged("no end")


def _entries(pairs: Iterable[Any]) -> dict[str | int, Any]:
    """A dictionary with plain keys: of tuples nested in each other, a hash alone could take for ever."""
    found = {}
    for key, value in pairs:
        if not isinstance(key, str | int):
            raise _Damaged("an entry without a plain name")
        found[key] = value
    return found


def _allowed(text: str, refuse: Callable[[str], Exception]) -> Name:
    if text not in ALLOWED:
        raise refuse(f"{text.replace(' ', '.', 1)!r}")
    return Name(text)


def _storage(record: Any) -> Storage:
    match record:
        case ("storage", Name(text), str(key), _, int(count), *_) if text.removeprefix("torch ") in STORAGES:
            return Storage(STORAGES[text.removeprefix("torch ")], key, count)
    raise _Damaged("a storage record that is none")


def _rebuild(function: Any, arguments: Any, refuse: Callable[[str], Exception]) -> Any:
    match function, arguments:
        case Name("collections OrderedDict"), ():
            return {}
        case Name("collections OrderedDict"), (list(pairs),):
            return _entries(pairs)
        case Name("torch._utils _rebuild_tensor_v2"), (
            Storage() as storage,
            int(offset),
            tuple(shape),
            tuple(stride),
            *_,
        ):
            return Tensor(storage, offset, shape, stride)
        case Name("torch._utils _rebuild_parameter"), (Tensor() as tensor, *_):
            return tensor
    what = function.text.replace(" ", ".", 1) if isinstance(function, Name) else type(function).__name__
    raise refuse(f"a call of {what!r} with unexpected arguments")


class TorchFile:
    """An opened `.bin` file; its pickle is interpreted now, its tensors are read when asked for.

    Attributes:
      path: the file.
      tensors: {name: (dtype, shape)}.

    Raises:
      UnsafeFileError: it names anything but tensors; the name is reported.
      DamagedFileError: it is cut off or inconsistent, or no PyTorch file.
    """

    def __init__(self, path: pathlib.Path):
        self.path = pathlib.Path(path)
        self._offsets: dict[str, tuple[int, int]] = {}  # storage key -> (place in the file, bytes)
        self._zip: zipfile.ZipFile | None = None
        try:
            value = self._open_zip() if zipfile.is_zipfile(self.path) else self._open_stream()
        except (UnsafeFileError, DamagedFileError):
            raise
        except limits.LimitError as error:
            raise limits.LimitError(f"{self.path}: {error}") from error
        except (
            _Damaged,
            KeyError,
            IndexError,
            ValueError,
            TypeError,
            EOFError,
            OSError,
            *_UNREADABLE,
        ) as error:
            raise self._damaged(f"{type(error).__name__}: {error}") from error
        self._tensors = self._named(value)
        for name, tensor in self._tensors.items():
            self._check(name, tensor)
        self._check_total()
        self.tensors = {name: (t.storage.dtype, t.shape) for name, t in self._tensors.items()}

    def _damaged(self, what: str) -> DamagedFileError:
        return DamagedFileError(f"{self.path} is damaged or no PyTorch file ({what}). Download it again.")

    def _refuse(self, what: str) -> UnsafeFileError:
        return UnsafeFileError(
            f"{self.path} was not loaded: it contains {what}, which is no tensor, so it could run code. "
            f"Allowed: {', '.join(name.replace(' ', '.', 1) for name in ALLOWED[:3])} and torch storages. "
            "Use a .safetensors file of this checkpoint."
        )

    def _open_zip(self) -> Any:
        self._zip = zipfile.ZipFile(self.path)
        members = {info.filename: info for info in self._zip.infolist()}
        pickles = [name for name in members if name.endswith("data.pkl")]
        if len(pickles) != 1:
            raise self._damaged(f"{len(pickles)} data.pkl in the archive")
        root = pickles[0].removesuffix("data.pkl")
        order = members.get(f"{root}byteorder")
        if order and (order.file_size > len("little") or self._zip.read(order) != b"little"):
            raise self._damaged("big-endian data")
        limits.check("MAX_PICKLE_BYTES", members[pickles[0]].file_size, self.path)
        self._members = {
            name.removeprefix(f"{root}data/"): info
            for name, info in members.items()
            if name.startswith(f"{root}data/")
        }
        return _interpret(io.BytesIO(self._zip.read(pickles[0])), self._refuse)

    def _open_stream(self) -> Any:
        size = self.path.stat().st_size
        with open(self.path, "rb") as file:
            if _interpret(file, self._refuse) != LEGACY_MAGIC:
                raise self._damaged("unknown format")
            version = _interpret(file, self._refuse)
            if version != 1001:
                raise self._damaged(f"protocol {version if isinstance(version, int) else 'unknown'}")
            system = _interpret(file, self._refuse)
            if not isinstance(system, dict) or system.get("little_endian") is not True:
                raise self._damaged("big-endian data")
            value = _interpret(file, self._refuse)
            keys = _interpret(file, self._refuse)
            storages = {t.storage.key: t.storage for t in _tensors_in(value)}
            for key in keys:
                count = int.from_bytes(file.read(8), "little")
                if not isinstance(key, str) or key not in storages:
                    raise self._damaged("a storage belongs to no tensor")
                length = count * storages[key].dtype.itemsize
                if count != storages[key].count or file.tell() + length > size:
                    raise self._damaged(f"storage {key!r} is cut off")
                self._offsets[key] = (file.tell(), length)
                file.seek(length, io.SEEK_CUR)
        return value

    def _named(self, value: Any) -> dict[str, Tensor]:
        """{name: tensor} of a state dict, also when a training checkpoint wraps it."""
        for wrapper in ("state_dict", "model", "module"):
            if isinstance(value, dict) and isinstance(value.get(wrapper), dict):
                value = value[wrapper]
        if not isinstance(value, dict):
            raise self._damaged(f"it holds a {type(value).__name__}, not tensors by name")
        for name, item in value.items():
            if not isinstance(name, str) or not isinstance(item, Tensor):
                raise self._damaged(f"entry {str(name)[:80]!r} is a {type(item).__name__}, not a tensor")
        return value

    def _check(self, name: str, tensor: Tensor) -> None:
        storage = tensor.storage
        numbers = (tensor.offset, storage.count, *tensor.shape, *tensor.stride)
        if len(tensor.shape) != len(tensor.stride) or not all(type(n) is int and n >= 0 for n in numbers):
            raise self._damaged(f"tensor {name!r} has impossible sizes")
        span = sum((n - 1) * step for n, step in zip(tensor.shape, tensor.stride, strict=True))
        if 0 not in tensor.shape and tensor.offset + span >= storage.count:
            raise self._damaged(f"tensor {name!r} reaches beyond its storage")
        if self._zip is None:
            held = self._offsets.get(storage.key, (0, -1))[1]
        else:
            held = self._members[storage.key].file_size if storage.key in self._members else -1
        if held < storage.count * storage.dtype.itemsize:
            raise self._damaged(f"the data of tensor {name!r} are missing or cut off")

    def _check_total(self) -> None:
        """Bounds what the tensors take in memory: data may be compressed, shared or repeated by a stride of zero."""
        taken = sum(t.storage.dtype.itemsize * math.prod(t.shape) for t in self._tensors.values())
        size = max(self.path.stat().st_size, _SMALL)
        limits.check("MAX_UNPACK_RATIO", -(-taken // size), f"{self.path}: tensors of {taken:,} bytes")

    def read(self, name: str) -> np.ndarray:
        """One tensor.

        Raises:
          DamagedFileError: its data cannot be read or fail the archive's checksum.
        """
        tensor = self._tensors[name]
        dtype, shape = tensor.storage.dtype, tensor.shape
        span = 0
        if 0 not in shape:
            span = 1 + sum((n - 1) * step for n, step in zip(shape, tensor.stride, strict=True))
        start, length = tensor.offset * dtype.itemsize, span * dtype.itemsize
        try:
            data = self._bytes(tensor.storage.key, start, length)
        except (OSError, EOFError, *_UNREADABLE) as error:
            raise self._damaged(f"tensor {name!r}: {error}") from error
        if len(data) != length:
            raise self._damaged(f"the data of tensor {name!r} are cut off")
        strides = tuple(step * dtype.itemsize for step in tensor.stride)
        return np.lib.stride_tricks.as_strided(np.frombuffer(data, dtype), shape, strides)

    def _bytes(self, key: str, start: int, length: int) -> bytes:
        if self._zip is None:
            with open(self.path, "rb") as file:
                file.seek(self._offsets[key][0] + start)
                return file.read(length)
        with self._zip.open(self._members[key]) as member:
            if start:  # of a compressed member, what lies before is unpacked piece by piece and thrown away
                member.seek(start)
            return member.read(length)


def _tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested containers; each container once, as they may hold each other or themselves."""
    found, seen, left = [], set(), [value]
    while left:
        item = left.pop()
        if isinstance(item, Tensor):
            found.append(item)
        elif isinstance(item, dict | list | tuple) and id(item) not in seen:
            seen.add(id(item))
            left.extend(item.values() if isinstance(item, dict) else item)
    return found
