"""Frames of a video file, decoded with PyAV: exactly those that were asked for, and none is kept besides them.

A file is read twice. Once without decoding: how many frames there are, when each is shown, and from which of them on
decoding may begin. Then the frames that were picked are decoded; what lies between them is left out where the codec's
rules say that this changes nothing, and is decoded and dropped otherwise.
"""

import contextlib
import dataclasses
import os
import stat
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import UInt8

from mllm_jax import limits
from mllm_jax.data.images import MAX_PIXELS, ImageError

INSTALL = "videos are read and written with PyAV, which is not installed: pip install 'mllm-jax[video]'"
AGAIN = "write the file anew (ffmpeg -i FILE NEW.mp4) or leave it out"

# Containers that hold one file's own frames; others name further files or addresses, which are not opened.
_CONTAINERS = "mov,matroska,avi,mpeg,mpegts,flv,asf,gif,ogg,nut,h264,hevc,mpegvideo,m4v,3gp,mp4,webm"
_TIMED = ("mov", "matroska", "avi")  # whose header says how long the file is
_LOST = 0.5  # seconds by which a file may be shorter than its header says

# What tells that a frame and all that are shown behind it need nothing from before it: for codecs whose keyframes may
# need it, the type of a unit of the stream (ITU-T H.264 7.4.1.2.4, H.265 7.4.2.2), by the unit's first byte.
_RESETS: dict[str, Callable[[int], bool] | None] = {
    "h264": lambda byte: byte & 31 == 5,
    "hevc": lambda byte: 16 <= byte >> 1 & 63 <= 21,
    **dict.fromkeys(("vp8", "vp9", "av1", "mpeg4", "mpeg1video", "mpeg2video", "mjpeg")),
}


class VideoError(ImageError):
    """A video that cannot be used; the message names the file and what to do."""


@dataclasses.dataclass(frozen=True)
class VideoIndex:
    """What a video file holds, found without decoding.

    Attributes:
      name: what messages call the file.
      size: height and width as they are stored, in pixels.
      total: frames.
      rate: frames a second, on average; None where the file does not say it.
      shown: when each is shown, in the order in which they are, in units of the stream; None where the file does not
        say it of every frame.
      entries: times of the frames from which decoding may begin, in order.
    """

    name: str
    size: tuple[int, int]
    total: int
    rate: float | None
    shown: tuple[int, ...] | None
    entries: tuple[int, ...]


def video_index(path: str | os.PathLike, name: str = "") -> VideoIndex:
    """What a video file holds; every byte of it is read, and nothing is decoded.

    Args:
      path: of the file.
      name: what messages call it; "" = its path.

    Raises:
      VideoError: no file, empty, no video, cut off, or a header that contradicts what follows it.
      ModuleNotFoundError: PyAV is not installed.
    """
    name = name or str(path)
    with _opened(path, name) as (container, stream):
        context = stream.codec_context
        if context.width < 1 or context.height < 1:
            raise VideoError(f"{name}: the video has no pixels ({context.width} x {context.height})")
        times: list[int | None] = []
        entries, end, places = [], 0.0, 0
        for packet in _packets(container):
            if packet.pts is not None and packet.time_base:
                end = max(end, float((packet.pts + (packet.duration or 0)) * packet.time_base))
            if packet.stream_index != stream.index or not packet.size or packet.is_discard:
                continue
            times.append(packet.pts)
            places = max(places, (packet.dts or 0) + 1)
            if packet.is_keyframe and packet.pts is not None and _resets(packet, context):
                entries.append(packet.pts)
        if not times:
            raise VideoError(f"{name}: the video has no frames; {AGAIN}")
        _check_whole(name, container, stream, len(times), places, end)
        rate = float(stream.average_rate) if stream.average_rate else None
        reordered = bool(context.has_b_frames)
    known = None not in times and len(set(times)) == len(times)
    shown = tuple(sorted(times)) if known else None
    if known and reordered and list(shown) == times:
        shown = (
            None  # AVI keeps no times, and FFmpeg's guess for H.264 is the order in which frames are decoded
        )
    size = (context.height, context.width)
    return VideoIndex(name, size, len(times), rate, shown, tuple(sorted(entries)))


def decode_frames(
    path: str | os.PathLike, index: VideoIndex, picked: Sequence[int], max_pixels: int = MAX_PIXELS
) -> list[UInt8[np.ndarray, "h w 3"]]:
    """The frames with these numbers (from 0, in the order in which they are shown), upright.

    Pixels that are not square are left as they are stored.

    Args:
      path: of the file.
      index: what `video_index` found in it.
      picked: numbers, which may repeat.
      max_pixels: larger frames are refused before any is decoded.

    Raises:
      VideoError: a frame that is damaged or missing, or too large.
      ModuleNotFoundError: PyAV is not installed.
    """
    height, width = index.size
    if height * width > max_pixels:
        raise VideoError(
            f"{index.name}: frames of {width} x {height} = {width * height} pixels exceed the limit of {max_pixels}; "
            "shrink the video or raise data.max_image_pixels"
        )
    wanted = sorted(set(picked))
    try:
        limits.check("MAX_DECODING_BYTES", 3 * height * width * len(wanted), f"{index.name}: its frames")
    except limits.LimitError as error:
        raise VideoError(str(error)) from None
    found = _jumping(path, index, wanted) if index.shown and index.entries else None
    if found is None:
        found = _forward(path, index, wanted)
    return [found[number] for number in picked]


def _jumping(
    path: str | os.PathLike, index: VideoIndex, wanted: Sequence[int]
) -> dict[int, UInt8[np.ndarray, "h w 3"]] | None:
    """The frames, without what need not be decoded; None where the file cannot be read from its middle like that."""
    found: dict[int, UInt8[np.ndarray, "h w 3"]] = {}
    with _opened(path, index.name) as (container, stream):
        position, frames = None, iter(())
        for number in wanted:
            time = index.shown[number]
            entry = max((each for each in index.entries if each <= time), default=None)
            if entry is None:
                return None
            if position is None or entry > position:
                container.seek(entry, stream=stream)
                frames = _frames(container, stream, index.name, entry)
            for frame in frames:
                position = frame.pts
                if position == time:
                    found[number] = _upright(frame, index.name)
                    break
                if position is None or position > time:
                    return None
            else:
                return None
    return found


def _forward(
    path: str | os.PathLike, index: VideoIndex, wanted: Sequence[int]
) -> dict[int, UInt8[np.ndarray, "h w 3"]]:
    """The frames, with everything before the last of them decoded."""
    times = dict(zip(wanted, wanted, strict=True))
    if index.shown is not None:
        times = {index.shown[number]: number for number in wanted}
    found: dict[int, UInt8[np.ndarray, "h w 3"]] = {}
    decoded = 0
    with _opened(path, index.name) as (container, stream):
        for frame in _frames(container, stream, index.name):
            number = times.get(decoded if index.shown is None else frame.pts)
            decoded += 1
            if number is not None:
                found[number] = _upright(frame, index.name)
                if len(found) == len(wanted):
                    return found
    missing = next(number for number in wanted if number not in found)
    raise VideoError(
        f"{index.name}: the file holds {index.total} frames, but {decoded} can be decoded (number {missing} cannot); "
        f"{AGAIN}"
    )


def _frames(container: Any, stream: Any, name: str, entry: int | None = None) -> Iterator[Any]:
    """Decoded frames from here on, or from the entry at this time on; none where the packet here is another one."""
    import av

    try:
        for number, packet in enumerate(_packets(container, stream)):
            if entry is not None and number == 0 and packet.pts != entry:
                return
            for frame in packet.decode():
                if entry is not None and frame.pts is not None and frame.pts < entry:
                    continue  # it needs what is before the entry
                if frame.is_corrupt:
                    raise VideoError(f"{name}: damaged near {_clock(frame.time)}; {AGAIN}")
                yield frame
    except av.FFmpegError as error:
        raise VideoError(f"{name}: damaged: {error.strerror}; {AGAIN}") from error


def _packets(container: Any, *streams: Any) -> Iterator[Any]:
    """The packets of these streams, or of all, and an empty one behind those of each stream.

    Where a stream begins only behind the header (FLV, MPEG-TS), PyAV may trip over it when all packets have been read.
    """
    with contextlib.suppress(IndexError):
        yield from container.demux(*streams)


def _clock(seconds: float | None) -> str:
    return "its beginning" if seconds is None else f"{seconds:.2f} s"


@contextlib.contextmanager
def _opened(path: str | os.PathLike, name: str) -> Iterator[tuple[Any, Any]]:
    """The container and its video; what is wrong with the file is a VideoError."""
    try:
        import av
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(INSTALL) from error

    path = Path(path)
    try:
        status = path.stat()
    except (OSError, ValueError) as error:  # a NUL in the name
        said = getattr(error, "strerror", None) or error
        raise VideoError(f"{name}: the video cannot be read: {said}") from error
    if not stat.S_ISREG(status.st_mode):
        raise VideoError(f"{name}: the video is not a regular file")
    if not status.st_size:
        raise VideoError(f"{name}: the video file is empty")
    options = {"format_whitelist": _CONTAINERS, "protocol_whitelist": "file"}
    try:
        with av.open(f"file:{path.absolute()}", container_options=options, **_any_encoding(av)) as container:
            videos = [one for one in container.streams.video if not _is_cover(one)]
            if not videos:
                held = ", ".join(sorted({one.type or "data" for one in container.streams})) or "nothing"
                raise VideoError(f"{name}: no video in the file, which holds {held}")
            if videos[0].codec_context is None:
                raise VideoError(f"{name}: its video is in a format that cannot be decoded; {AGAIN}")
            yield container, videos[0]
    except av.FFmpegError as error:
        raise VideoError(f"{name}: not a video, or damaged: {error.strerror}; {AGAIN}") from error


def _any_encoding(av: Any) -> dict[str, str]:
    """What a file says about itself may be in any encoding; PyAV 19 takes it so by itself."""
    return {"metadata_errors": "replace"} if int(av.__version__.split(".")[0]) < 19 else {}


def _is_cover(stream: Any) -> bool:
    """Whether it is the picture of a piece of music."""
    return bool(stream.disposition & type(stream.disposition).attached_pic)


def _check_whole(name: str, container: Any, stream: Any, total: int, places: int, end: float) -> None:
    """Refuses a file of which a part is missing, as far as its header tells.

    Args:
      total: frames that are there.
      places: in AVI the same with frames that were dropped when it was made, but for those behind the last one; its
        header counts all of them.
      end: when the last packet ends, in seconds.
    """
    held = container.format.name.split(",")[0]
    # The header of MP4 counts frames of which it then leaves some out (edit lists); its index does not.
    told = sum(not one.is_discard for one in stream.index_entries) if held == "mov" else stream.frames
    dropped = held == "avi" and 0 <= told - places < places / total
    if told and told != total and not dropped:
        raise VideoError(
            f"{name}: its header says {told} frames, but {total} are there: the file is cut off or damaged; {AGAIN}"
        )
    lasts = (container.duration or 0) / 1e6
    begins = (container.start_time or 0) / 1e6
    if held in _TIMED and end and begins + lasts - end > _LOST:
        raise VideoError(
            f"{name}: its header says {lasts:.1f} s, but it ends after {end - begins:.1f} s: the file is cut off; "
            f"{AGAIN}"
        )


def _resets(packet: Any, context: Any) -> bool:
    """Whether a keyframe needs nothing from before it, and neither does what is shown behind it."""
    name = context.name if context.name in _RESETS else context.codec.canonical_name
    if name not in _RESETS:
        return False
    is_reset = _RESETS[name]
    return is_reset is None or any(map(is_reset, _unit_types(bytes(packet), context.extradata or b"", name)))


def _unit_types(data: bytes, extradata: bytes, codec: str) -> Iterator[int]:
    """The first byte of every unit of a packet of H.264 or H.265."""
    if extradata[:1] == b"\x01":  # as in MP4: each unit behind its length
        width = (extradata[21 if codec == "hevc" else 4] & 3) + 1
        place = 0
        while place + width < len(data):
            yield data[place + width]
            place += width + int.from_bytes(data[place : place + width], "big")
    else:
        place = data.find(b"\0\0\1")
        while 0 <= place < len(data) - 3:
            yield data[place + 3]
            place = data.find(b"\0\0\1", place + 3)


def _upright(frame: Any, name: str) -> UInt8[np.ndarray, "h w 3"]:
    """The frame's pixels, turned and mirrored as its display matrix says (ISO/IEC 14496-12 8.3.2)."""
    pixels = frame.to_ndarray(format="rgb24")
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return pixels
    across, down, back, up = (np.sign(v) for v in np.frombuffer(bytes(matrix), "<i4")[[0, 1, 3, 4]])
    if not across and not up:  # rows become columns
        pixels, across, up = pixels.swapaxes(0, 1), back, down
    elif down or back:
        raise VideoError(f"{name}: turned by an angle that is no multiple of 90 degrees; {AGAIN}")
    return np.ascontiguousarray(pixels[:: int(up) or 1, :: int(across) or 1])
