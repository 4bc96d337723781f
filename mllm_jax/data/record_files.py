"""How much a shard of prepared data can make its reader allocate: no more than the file's own size, or it is refused.

ArrayRecord's reader, which is C++, unpacks whatever a chunk of a shard says, and a chunk of some kilobytes can say
gigabytes. Shards written here are not compressed (`tfds_versions.WRITER_OPTIONS`). So the headers of all chunks that
the reader will unpack are looked at first, and a compressed one is an error.

Layout (google/array_record, google/riegeli): chunks one behind the other, interrupted every 64 KiB by a block header.
The last block begins with a chunk that says where the index is; the index is a chunk that says where each record is.
"""

import array
import functools
import os
import struct
from pathlib import Path

from mllm_jax import limits
from mllm_jax.data.reading import DataError

_BLOCK, _BLOCK_HEADER = 1 << 16, 24
# Hash of the header, size and hash of the data, kind (1 byte) and number of records (7 bytes), size of the records.
_CHUNK = struct.Struct("<5Q")
_RECORDS, _PLAIN = ord("r"), 0  # kinds of a chunk, and of compression


class RecordFile:
    """The chunks of one shard, looked at before they are unpacked.

    Attributes:
      count: how many records it has.
    """

    def __init__(self, path: Path):
        """Finds the index.

        Raises:
          DataError: it is damaged or compressed, or larger than `MAX_INDEX_BYTES`.
        """
        self.path = path
        self.size = path.stat().st_size
        if self.size < 2 * _BLOCK or self.size % _BLOCK:
            raise self._damaged("it is cut off")
        last = self._unpacked(self.size - _BLOCK)
        self._index = _numbers(last[0]).get(1, 0) if last else 0
        stored, _, entries = self._header(self._index)
        if not entries:
            raise self._damaged("its index is empty")
        try:
            limits.check("MAX_INDEX_BYTES", stored, path)
        except limits.LimitError as error:
            raise DataError(str(error)) from None
        self.count = entries - 1  # the first entry describes the index

    @functools.cached_property
    def _offsets(self) -> array.array:
        """Where the chunk of each record begins, 8 bytes each.

        Raises:
          DataError: the index is damaged, or chunks hold several records.
        """
        entries = [_numbers(entry) for entry in self._unpacked(self._index)[1:]]
        if any(entry.get(3) != 1 for entry in entries):
            raise self._damaged("its chunks do not hold one record each")
        return array.array("Q", (min(entry.get(1, 0), self.size) for entry in entries))

    def check(self, number: int) -> None:
        """Raises DataError if the chunk of a record is damaged or compressed."""
        self._header(self._offsets[number])

    def _damaged(self, why: str) -> DataError:
        return DataError(f"{self.path}: a shard is damaged ({why}); move it away, prepare again")

    def _header(self, at: int) -> tuple[int, int, int]:
        """Bytes of a chunk, of its records, and how many records; the records are stored as they are."""
        header = self._read(at, _CHUNK.size + 1)
        if len(header) <= _CHUNK.size:
            raise self._damaged(f"no chunk at byte {at}")
        _, stored, _, kind, unpacked = _CHUNK.unpack_from(header)
        kind, records = kind & 0xFF, kind >> 8
        if header[-1] != _PLAIN or kind != _RECORDS:
            raise DataError(
                f"{self.path}: the chunk at byte {at} is compressed, which prepared data never are, and says that it "
                f"unpacks from {stored:,} to {unpacked:,} bytes; move the data set away, prepare again"
            )
        if max(unpacked, records) > stored or stored > self.size - at:
            raise self._damaged(
                f"the chunk at byte {at} says {records:,} records of {unpacked:,} bytes in {stored:,}"
            )
        return stored, unpacked, records

    def _unpacked(self, at: int) -> list[bytes]:
        """The records of a chunk."""
        stored, unpacked, records = self._header(at)
        data = self._read(at, _CHUNK.size + stored)[_CHUNK.size :]
        lengths, begin = [], stored - unpacked
        try:
            _, place = _varint(data, 1)  # bytes of the lengths
            for _ in range(records):
                length, place = _varint(data, place)
                lengths.append(length)
        except IndexError:
            raise self._damaged(f"the chunk at byte {at} ends too early") from None
        if place != begin or sum(lengths) != unpacked:
            raise self._damaged(f"the chunk at byte {at} holds something else")
        found = []
        for length in lengths:
            found.append(data[begin : begin + length])
            begin += length
        return found

    def _read(self, at: int, count: int) -> bytes:
        """Bytes of a chunk, without the block headers between them; fewer at the end of the file."""
        pieces = []
        with open(self.path, "rb", buffering=0) as file:
            while count > 0 and at < self.size:
                if at % _BLOCK == 0:
                    at += _BLOCK_HEADER
                piece = os.pread(file.fileno(), min(count, _BLOCK - at % _BLOCK), at)
                if not piece:
                    break
                pieces.append(piece)
                at, count = at + len(piece), count - len(piece)
        return b"".join(pieces)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """A number of a protocol buffer, and where it ends.

    Raises:
      IndexError: it does not end.
    """
    value = shift = 0
    while data[at] & 0x80:
        value |= (data[at] & 0x7F) << shift
        at, shift = at + 1, min(shift + 7, 63)
    return value | data[at] << shift, at + 1


def _numbers(message: bytes) -> dict[int, int]:
    """{field: value} of a protocol buffer's numbers, up to the first field that is none."""
    found: dict[int, int] = {}
    at = 0
    try:
        while at < len(message):
            key, at = _varint(message, at)
            if key & 7:
                break
            found[key >> 3], at = _varint(message, at)
    except IndexError:
        pass
    return found
