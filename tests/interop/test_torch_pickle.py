"""`.bin` files: read without torch, one tensor at a time; malicious and damaged ones refused."""

import collections
import io
import os
import pickle
import subprocess
import sys
import zipfile

import ml_dtypes
import numpy as np
import pytest

from mllm_jax.interop.source import Source, weight_files
from mllm_jax.interop.torch_pickle import DamagedFileError, TorchFile, UnsafeFileError


def write_zip(path, pickled, storages, root="archive", byteorder=b"little"):
    """A PyTorch zip archive from a ready pickle and {key: bytes}."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_STORED) as archive:
        archive.writestr(f"{root}/data.pkl", pickled)
        archive.writestr(f"{root}/byteorder", byteorder)
        for key, data in storages.items():
            archive.writestr(f"{root}/data/{key}", data)
        archive.writestr(f"{root}/version", b"3\n")


class FakeGlobal:
    """Pickles as the global `module name`, or as a call of it, without importing it."""

    def __init__(self, module, name):
        self.module, self.name = module, name


class FakePickler(pickle._Pickler):
    """A Python pickler that writes any global, persistent storages, and calls."""

    def save(self, obj, save_persistent_id=True):
        if isinstance(obj, FakeGlobal):
            self.write(b"c" + f"{obj.module}\n{obj.name}\n".encode())
        elif isinstance(obj, Call):
            self.save(obj.function)
            self.save(obj.arguments)
            self.write(b"R")
        elif isinstance(obj, Persistent):
            self.save(obj.record)
            self.write(b"Q")
        else:
            super().save(obj, save_persistent_id)


Call = collections.namedtuple("Call", "function arguments")
Persistent = collections.namedtuple("Persistent", "record")
REBUILD = FakeGlobal("torch._utils", "_rebuild_tensor_v2")


def dumps(value):
    """The bytes of a pickle with fakes in it."""
    file = io.BytesIO()
    FakePickler(file, protocol=2).dump(value)
    return file.getvalue()


def tensor(storage="FloatStorage", key="0", count=6, offset=0, shape=(2, 3), stride=(3, 1)):
    """The call that stands for a tensor."""
    record = ("storage", FakeGlobal("torch", storage), key, "cpu", count)
    empty = Call(FakeGlobal("collections", "OrderedDict"), ())
    return Call(REBUILD, (Persistent(record), offset, shape, stride, False, empty))


DATA = np.arange(6, dtype=np.float32)


def test_views_and_types_of_a_written_archive(tmp_path):
    value = {
        "whole": tensor(),
        "transposed": tensor(shape=(3, 2), stride=(1, 3)),
        "tail": tensor(offset=4, shape=(2,), stride=(1,)),
        "scalar": tensor(offset=5, shape=(), stride=()),
        "empty": tensor(shape=(0, 3), stride=(3, 1)),
        "parameter": Call(FakeGlobal("torch._utils", "_rebuild_parameter"), (tensor(), True, {})),
        "bf16": tensor("BFloat16Storage", "1", 2, 0, (2,), (1,)),
        "half": tensor("HalfStorage", "2", 2, 0, (2,), (1,)),
    }
    storages = {
        "0": DATA.tobytes(),
        "1": np.array([1.5, -2], ml_dtypes.bfloat16).tobytes(),
        "2": np.array([0.5, 3], np.float16).tobytes(),
    }
    write_zip(tmp_path / "x.bin", dumps(value), storages)
    file = TorchFile(tmp_path / "x.bin")
    np.testing.assert_array_equal(file.read("whole"), DATA.reshape(2, 3))
    np.testing.assert_array_equal(file.read("transposed"), DATA.reshape(2, 3).T)
    np.testing.assert_array_equal(file.read("tail"), [4, 5])
    assert file.read("scalar") == 5
    assert file.read("empty").shape == (0, 3)
    np.testing.assert_array_equal(file.read("parameter"), DATA.reshape(2, 3))
    assert file.tensors["bf16"] == (np.dtype(ml_dtypes.bfloat16), (2,))
    np.testing.assert_array_equal(file.read("bf16").astype(np.float32), [1.5, -2])
    np.testing.assert_array_equal(file.read("half"), [0.5, 3])


@pytest.mark.parametrize("legacy", [False, True])
def test_equal_to_torch(legacy, tmp_path):
    torch = pytest.importorskip("torch")
    base = torch.randn(4, 6)
    layer = torch.nn.Linear(3, 2)
    values = {
        "a": base,
        "b": base.T[1:3],  # shares a's storage
        "c": base.to(torch.bfloat16),
        "d": base.to(torch.float16)[:, ::2],
        "e": torch.arange(5),
        "f": torch.tensor(True),
        "g": torch.nn.Parameter(torch.ones(2, 2, dtype=torch.float64)),
    }
    state = layer.state_dict()  # an OrderedDict with _metadata
    state.update(values)
    path = tmp_path / "pytorch_model.bin"
    torch.save(state, path, _use_new_zipfile_serialization=not legacy)
    source = Source(tmp_path)
    assert set(source) == {*values, "weight", "bias"}
    for name, value in state.items():
        expected = value.detach()
        got = source.read(name)
        assert got.shape == tuple(expected.shape) == source.shape(name)
        np.testing.assert_array_equal(got.astype(np.float64), expected.to(torch.float64).numpy())


MALICIOUS = {
    "os.system": Call(FakeGlobal("os", "system"), ("touch {marker}",)),
    "builtins.eval": Call(FakeGlobal("builtins", "eval"), ("open('{marker}', 'w')",)),
    "builtins.getattr": Call(FakeGlobal("builtins", "getattr"), (FakeGlobal("torch", "load"), "x")),
    "torch.load": FakeGlobal("torch", "load"),
    "torch.storage._load_from_bytes": Call(FakeGlobal("torch.storage", "_load_from_bytes"), (b"x",)),
    "torch.serialization.load": Call(FakeGlobal("torch.serialization", "load"), ("x",)),
    "torch._utils._rebuild_from_type_v2": FakeGlobal("torch._utils", "_rebuild_from_type_v2"),
    "subprocess.Popen": Call(FakeGlobal("subprocess", "Popen"), (["touch", "{marker}"],)),
    "numpy.core.multiarray._reconstruct": FakeGlobal("numpy.core.multiarray", "_reconstruct"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", MALICIOUS)
def test_any_other_name_is_refused_and_nothing_runs(name, legacy, tmp_path):
    marker = tmp_path / "marker"
    payload = dumps({"x": MALICIOUS[name]}).replace(b"{marker}", str(marker).encode())
    if b"{marker}" in dumps(MALICIOUS[name]):  # the replaced string is longer: write it afresh
        call = MALICIOUS[name]
        arguments = tuple(
            [part.format(marker=marker) for part in a] if isinstance(a, list) else a.format(marker=marker)
            for a in call.arguments
        )
        payload = dumps({"x": Call(call.function, arguments)})
    path = tmp_path / "evil.bin"
    if legacy:
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + payload + pickle.dumps([], 2))
    else:
        write_zip(path, payload, {"0": DATA.tobytes()})
    with pytest.raises(UnsafeFileError, match=name.replace(".", r"\.")):
        TorchFile(path)
    assert not marker.exists()


def test_a_real_reduce_attack_does_not_run(tmp_path):
    marker = tmp_path / "marker"

    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(marker),)

    for protocol in range(6):
        write_zip(tmp_path / "evil.bin", pickle.dumps({"x": Evil()}, protocol), {})
        with pytest.raises((UnsafeFileError, DamagedFileError)):
            TorchFile(tmp_path / "evil.bin")
    assert not marker.exists()


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"x": tensor(shape=(3, 3))}, "'x' reaches beyond its storage"),
        ({"x": tensor(offset=-1)}, "impossible sizes"),
        ({"x": tensor(stride=(3, -1))}, "impossible sizes"),
        ({"x": tensor(stride=(1,))}, "impossible sizes"),
        ({"x": tensor(count=600, shape=(200, 3))}, "missing or cut off"),
        ({"x": tensor(key="9")}, "missing or cut off"),
        ({"x": 3}, "entry 'x' is a int"),
        ([tensor()], "not tensors by name"),
        ({"x": Persistent(("module", 1))}, "storage record"),
    ],
)
def test_inconsistent_files_are_refused(value, message, tmp_path):
    write_zip(tmp_path / "x.bin", dumps(value), {"0": DATA.tobytes()})
    with pytest.raises(DamagedFileError, match=message):
        TorchFile(tmp_path / "x.bin")


LAUGHS = b"(K\x01K\x02t" + b"".join(
    b"q" + bytes([i]) + b"h" + bytes([i]) + b"\x86" for i in range(60)
)  # 2**60 items
BOMBS = {
    "dictionary key": (b"}" + LAUGHS + b"K\x01s", "without a plain name"),
    "key of an OrderedDict": (
        b"ccollections\nOrderedDict\n](" + LAUGHS + b"K\x01\x86e\x85R",
        "without a plain name",
    ),
    "name": (LAUGHS + b"\x8c\x01x\x93", "a name that is no text"),
    "content": (b"}\x8c\x01x" + LAUGHS + b"s", "entry 'x' is a tuple"),
    "itself": (b"}q\x00\x8c\x01xh\x00s", "entry 'x' is a dict"),
    "length of a text": (b"\x8d" + (1 << 60).to_bytes(8, "little") + b"x", "no PyTorch file"),
    "number": (b"L" + b"9" * 10_000 + b"L\n", "no PyTorch file"),
}


@pytest.mark.parametrize("legacy", [False, True])
@pytest.mark.parametrize("name", BOMBS)
def test_files_made_to_exhaust_the_reader_are_refused_at_once(name, legacy, tmp_path):
    body, message = BOMBS[name]
    payload, path = b"\x80\x02" + body + b".", tmp_path / "x.bin"
    if legacy:
        head = [0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}]
        path.write_bytes(b"".join(pickle.dumps(part, 2) for part in head) + payload + pickle.dumps([], 2))
    else:
        write_zip(path, payload, {})
    with pytest.raises(DamagedFileError, match=message):
        TorchFile(path)


@pytest.mark.parametrize("place", range(4))
def test_bombs_where_the_stream_format_has_its_head(place, tmp_path):
    parts = [pickle.dumps(part, 2) for part in (0x1950A86A20F9469CFC6C, 1001, {"little_endian": True}, {})]
    parts[place] = b"\x80\x02" + LAUGHS + b"."
    (tmp_path / "x.bin").write_bytes(b"".join(parts) + b"\x80\x02(" + LAUGHS + b"l.")
    with pytest.raises(DamagedFileError):
        TorchFile(tmp_path / "x.bin")


def test_an_encrypted_archive_is_refused(tmp_path):
    write_zip(tmp_path / "x.bin", dumps({"x": tensor()}), {"0": DATA.tobytes()})
    data = bytearray((tmp_path / "x.bin").read_bytes())
    for mark, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        place = data.find(mark)
        while place >= 0:
            data[place + flags] |= 1
            place = data.find(mark, place + 1)
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(DamagedFileError, match="encrypted"):
        TorchFile(tmp_path / "x.bin")


def test_object_states_and_unknown_opcodes_are_refused(tmp_path):
    build = b"\x80\x02ctorch\nFloatStorage\n}b."  # BUILD on something that is no dict
    new_object = b"\x80\x02ctorch\nFloatStorage\n)\x81."  # NEWOBJ
    for payload in (build, new_object):
        write_zip(tmp_path / "x.bin", payload, {})
        with pytest.raises(UnsafeFileError, match=r"the state of an object|opcode NEWOBJ"):
            TorchFile(tmp_path / "x.bin")


def test_every_truncation_is_an_error_and_never_a_crash(tmp_path):
    torch = pytest.importorskip("torch")
    state = {"a": torch.randn(3, 3), "b": torch.randn(2)}
    for legacy in (False, True):
        whole = tmp_path / "whole.bin"
        torch.save(state, whole, _use_new_zipfile_serialization=not legacy)
        data = whole.read_bytes()
        for length in range(0, len(data) - 1, 7):
            cut = tmp_path / "cut.bin"
            cut.write_bytes(data[:length])
            with pytest.raises((DamagedFileError, UnsafeFileError)):
                TorchFile(cut)


def test_flipped_bytes_never_give_wrong_tensors_silently(tmp_path):
    write_zip(tmp_path / "x.bin", dumps({"x": tensor()}), {"0": DATA.tobytes()})
    data = bytearray((tmp_path / "x.bin").read_bytes())
    place = data.index(DATA.tobytes())
    data[place + 5] ^= 0xFF
    (tmp_path / "x.bin").write_bytes(data)
    with pytest.raises(DamagedFileError, match="CRC"):
        TorchFile(tmp_path / "x.bin").read("x")


@pytest.mark.parametrize("order", [b"big", b"little" + bytes(1000)])
def test_big_endian_files_are_refused(tmp_path, order):
    write_zip(tmp_path / "x.bin", dumps({"x": tensor()}), {"0": DATA.tobytes()}, byteorder=order)
    with pytest.raises(DamagedFileError, match="big-endian"):
        TorchFile(tmp_path / "x.bin")


def test_training_leftovers_are_not_weights(tmp_path):
    write_zip(tmp_path / "pytorch_model.bin", dumps({"x": tensor()}), {"0": DATA.tobytes()})
    (tmp_path / "training_args.bin").write_bytes(b"evil")
    assert [path.name for path in weight_files(tmp_path)] == ["pytorch_model.bin"]
    (tmp_path / "pytorch_model.bin").unlink()
    with pytest.raises(FileNotFoundError, match="holds no weights"):
        Source(tmp_path)


def test_reading_needs_no_torch(tmp_path):
    write_zip(tmp_path / "pytorch_model.bin", dumps({"x": tensor()}), {"0": DATA.tobytes()})
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from mllm_jax.interop.torch_pickle import TorchFile\n"
        f"print(TorchFile({str(tmp_path / 'pytorch_model.bin')!r}).read('x').sum())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "15.0"
