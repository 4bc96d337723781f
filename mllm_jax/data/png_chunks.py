"""PNG files without the text and colour profiles in them, which Pillow refuses where they are large.

Prompts of image generators and profiles of scanners reach megabytes; a sound image with such a chunk must not count as
damaged, and a small chunk that unpacks to gigabytes must not be unpacked. What a viewer shows does not depend on them,
but for an orientation that some programs write as text.
"""

import struct
import zlib

SIGNATURE = b"\x89PNG\r\n\x1a\n"
_SKIPPED = (b"tEXt", b"zTXt", b"iTXt", b"iCCP")
_ORIENTATION = (b"XML:com.adobe.xmp", b"Raw profile type exif", b"Raw profile type APP1")
_LARGEST = 1 << 20  # bytes of text in which an orientation is still looked for; Pillow's own limit


def without_text(data: bytes) -> bytes:
    """The file without its texts and colour profiles; other formats, and files cut short, as they are."""
    if not data.startswith(SIGNATURE):
        return data
    kept, place = [SIGNATURE], len(SIGNATURE)
    while place + 12 <= len(data):
        length, kind = struct.unpack_from(">I4s", data, place)
        end = place + 12 + length
        if kind not in _SKIPPED or (kind != b"iCCP" and _may_orient(kind, data[place + 8 : end - 4])):
            kept.append(data[place:end])
        place = end
    return b"".join([*kept, data[place:]])


def may_be_turned(data: bytes) -> bool:
    """Whether a PNG file may say how it is to be turned; that may stand behind its pixels."""
    return any(mark in data for mark in (b"eXIf", *_ORIENTATION))


def _may_orient(kind: bytes, chunk: bytes) -> bool:
    """Whether a chunk of text may hold EXIF or XMP and is small enough to be read."""
    key, _, value = chunk.partition(b"\0")
    if key not in _ORIENTATION:
        return False
    if kind == b"zTXt":
        packed = value[1:]
    elif kind == b"iTXt" and value[:1] == b"\1":
        packed = value[2:].split(b"\0", 2)[-1]
    else:
        return len(value) <= _LARGEST
    unpacker = zlib.decompressobj()
    try:
        return len(unpacker.decompress(packed, _LARGEST + 1)) <= _LARGEST
    except zlib.error:
        return False
