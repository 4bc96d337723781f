"""Shards of strangers: what unpacks to more than the file holds is refused before it is unpacked."""

import re
from pathlib import Path

import numpy as np
import pytest
from array_record.python import array_record_module
from tensorflow_datasets import features as tfds_features

from mllm_jax.data.reading import DataError
from mllm_jax.data.record_files import RecordFile
from mllm_jax.data.tfds_versions import WRITER_OPTIONS, Records


def write(path, records, options=WRITER_OPTIONS):
    writer = array_record_module.ArrayRecordWriter(str(path), options)
    for record in records:
        writer.write(record)
    writer.close()
    return path


def features():
    return {"id": tfds_features.Text()}


def opened(path, split="train"):
    """The records of a folder whose only shard is this one."""
    path.rename(path.parent / f"some-{split}.array_record-00000-of-00001")
    return Records(path.parent, split, features)


def peak_of(work):
    """Bytes that `work` added to this process at its peak."""
    status = Path("/proc/self/status")
    if not status.exists():
        pytest.skip("needs /proc")

    def resident(key):
        return int(re.search(rf"{key}:\s*(\d+)", status.read_text())[1]) << 10

    Path("/proc/self/clear_refs").write_text("5")
    before = resident("VmRSS")
    work()
    return resident("VmHWM") - before


@pytest.mark.parametrize("count", [1, 2, 700])
def test_every_record_of_our_own_shards_is_found(count, tmp_path):
    rng = np.random.default_rng(0)
    sizes = [int(size) for size in rng.integers(0, 3000, count)]
    sizes[-1] = 200_000  # across several block headers
    records = [rng.bytes(size) for size in sizes]
    file = RecordFile(write(tmp_path / "a", records))
    assert file.count == count
    for number, record in enumerate(records):
        file.check(number)
        assert file._unpacked(file._offsets[number]) == [record]


@pytest.mark.parametrize(
    "options", ["group_size:1", "group_size:1,zstd:19", "group_size:1,brotli:5", "group_size:1,snappy"]
)
def test_a_compressed_shard_is_refused_before_it_is_unpacked(options, tmp_path):
    """300 MB of zeros in some kilobytes; gigabytes take the same way."""
    path = write(tmp_path / "bomb", [bytes(300 << 20)], options)
    assert path.stat().st_size < 20 << 20

    def read():
        with pytest.raises(DataError, match=r"is compressed, which prepared data never are.* unpacks from"):
            opened(path)[0]

    assert peak_of(read) < 64 << 20


def test_a_compressed_record_behind_a_plain_index_is_refused(tmp_path):
    """The first record's chunk says that it is compressed; hash and index are left as they are."""
    path = write(tmp_path / "a", [b"one" * 9, b"two" * 9])
    data = bytearray(path.read_bytes())
    file = RecordFile(path)
    data[file._offsets[0] + 40] = ord("z")
    path.write_bytes(data)
    records = opened(path)
    assert len(records) == 2
    with pytest.raises(DataError, match="is compressed"):
        records[0]


def test_several_records_in_a_chunk_are_refused(tmp_path):
    path = write(tmp_path / "a", [b"one", b"two", b"three"], "group_size:2,uncompressed")
    with pytest.raises(DataError, match="index is damaged"):
        opened(path)
    path = write(tmp_path / "b", [b"one", b"two", b"three"], "group_size:2,uncompressed")
    with pytest.raises(DataError, match="do not hold one record each"):
        RecordFile(path).check(0)


@pytest.mark.parametrize("at", [8, 24, 25, 32])
def test_a_chunk_that_says_more_than_it_holds_is_refused(at, tmp_path):
    """Sizes and counts of 2^40 and more in a chunk's header."""
    path = write(tmp_path / "a", [b"one" * 9] * 3)
    data = bytearray(path.read_bytes())
    begin = RecordFile(path)._offsets[1]
    data[begin + at + 5] = 255
    path.write_bytes(data)
    with pytest.raises(DataError, match=f"{path.name}: "):
        RecordFile(path).check(1)


def test_damaged_files_are_named_and_never_a_traceback(tmp_path):
    path = write(tmp_path / "a", [bytes([number]) * 90 for number in range(9)])
    sound = path.read_bytes()
    rng = np.random.default_rng(0)
    refused = 0
    for _ in range(400):
        data = bytearray(sound)
        for place in rng.choice(np.flatnonzero(np.frombuffer(sound, np.uint8)), 3):
            data[place] = rng.integers(256)
        path.write_bytes(data[: len(data) if rng.random() < 0.8 else int(rng.integers(len(data)))])
        try:
            file = RecordFile(path)
            for number in range(min(file.count, 9)):
                file.check(number)
        except DataError:
            refused += 1
    assert refused > 100


def test_the_index_has_a_limit(tmp_path, monkeypatch):
    path = write(tmp_path / "a", [b""] * 500)
    monkeypatch.setenv("MLLM_JAX_MAX_INDEX_BYTES", "1000")
    with pytest.raises(DataError, match="MLLM_JAX_MAX_INDEX_BYTES"):
        RecordFile(path)
