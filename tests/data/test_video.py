"""Videos as picked frames: which, exactly which pixels, and one clear error for every kind of bad file."""

import builtins
import contextlib
import math
import os

import numpy as np
import pytest
import tiny
from PIL import Image

from mllm_jax.data import video_file
from mllm_jax.data.images import ImageError
from mllm_jax.data.video import VideoError, frame_numbers, num_frames, read_frames

# ------------------------------------------------------------------------------------------------- which frames

# connectors.md 5
PUBLISHED = {
    (100, 8): (6, 18, 31, 43, 56, 68, 80, 93),
    (300, 8): (18, 56, 93, 131, 168, 205, 243, 280),
    (250, 8): (15, 46, 77, 108, 140, 171, 202, 233),
    (31, 4): (4, 11, 18, 26),
    (8, 8): (0, 1, 2, 3, 4, 4, 5, 6),
    (5, 8): (0, 1, 2, 2, 3),
    (2, 4): (0, 0),
    (1, 8): (0,),
    (1000, 16): (31, 93, 156, 218, 281, 343, 406, 468, 531, 593, 655, 718, 780, 843, 905, 968),
}


def middles_in_whole_numbers(total, count):
    """The rule without floating point: twice the exact bound (total - 1) * i / n decides how it is rounded."""

    def rounded(i):
        whole, rest = divmod((total - 1) * i, count)
        up = 2 * rest > count or (2 * rest == count and whole % 2 == 1)
        return whole + up

    count = min(total, count)
    return [math.floor((rounded(i) + rounded(i + 1)) / 2) for i in range(count)]


def test_frames_are_the_middles_of_equal_parts():
    for (total, count), numbers in PUBLISHED.items():
        assert tuple(frame_numbers(total, count)) == numbers
    totals = (1, 2, 3, 7, 8, 9, 15, 31, 32, 33, 64, 100, 101, 250, 299, 300, 1000, 5401)
    cases = [(total, count) for total in totals for count in (1, 2, 4, 8, 16, 32)]
    assert len(cases) == 108
    for case in cases:
        assert frame_numbers(*case) == middles_in_whole_numbers(*case)


def test_frames_from_the_first_to_the_last():
    assert frame_numbers(100, 4, "linspace") == [0, 33, 66, 99]
    assert frame_numbers(3, 8, "linspace") == [0, 1, 2]
    assert frame_numbers(9, 1, "linspace") == [0]


@pytest.mark.parametrize(
    ("arguments", "said"), [((0, 4), "at least 1"), ((4, 0), "at least 1"), ((4, 4, "all"), "none of")]
)
def test_impossible_choices_of_frames(arguments, said):
    with pytest.raises(ValueError, match=said):
        frame_numbers(*arguments)


# ------------------------------------------------------------------------------------------------- exact frames

# Keyframes every 12 frames, frames that refer to later ones, groups that refer to the one before, no time stamps.
FILES = {
    "h264.mp4": {"bf": "2"},
    "open.mkv": {"bf": "3", "x264-params": "open-gop=1:log-level=none"},
    "refresh.mp4": {"x264-params": "intra-refresh=1:log-level=none"},
    "stream.ts": {"bf": "2"},
    "hevc.mp4": {"codec": "libx265", "x265-params": "log-level=none"},
    "mpeg4.avi": {"codec": "mpeg4", "bf": "2"},
    "h264.avi": {"bf": "2"},  # FFmpeg makes up times that are not those of the frames
    "vp9.webm": {"codec": "libvpx-vp9"},
    "mjpeg.avi": {"codec": "mjpeg", "format": "yuvj420p"},
    "animated.gif": {"codec": "gif", "format": "rgb8"},
}
TOTAL = 32


@pytest.fixture(scope="module")
def clips(tmp_path_factory):
    root, frames = tmp_path_factory.mktemp("clips"), tiny.moving_square(TOTAL)
    for name, options in FILES.items():
        tiny.write_video(root / name, frames, **options)
    return root


def decoded(path):
    """Every frame of a file by PyAV alone, from the beginning."""
    import av

    with av.open(os.fspath(path)) as container:
        return [frame.to_ndarray(format="rgb24") for frame in container.decode(video=0)]


@pytest.mark.parametrize("name", FILES)
def test_picked_frames_are_those_of_decoding_all(clips, name):
    path, whole = clips / name, decoded(clips / name)
    assert num_frames(path) == len(whole) == TOTAL
    for count, sampling in ((5, "segments"), (8, "linspace"), (64, "segments")):
        found = read_frames(path, count, sampling)
        numbers = frame_numbers(TOTAL, count, sampling)
        for number, frame in zip(numbers, found, strict=True):
            np.testing.assert_array_equal(frame, whole[number])
    index = video_file.video_index(path)
    for number in (TOTAL - 1, 0, 13, 25):  # alone, so that nothing before it is decoded for another one
        (frame,) = video_file.decode_frames(path, index, [number])
        np.testing.assert_array_equal(frame, whole[number])


def test_little_is_decoded_where_the_codec_allows_it(clips, monkeypatch):
    seen = []
    frames = video_file._frames

    def counted(*arguments):
        for frame in frames(*arguments):
            seen.append(frame.pts)
            yield frame

    monkeypatch.setattr(video_file, "_frames", counted)
    for name, most in (("h264.mp4", 12), ("vp9.webm", 12), ("refresh.mp4", TOTAL)):
        seen.clear()
        index = video_file.video_index(clips / name)
        video_file.decode_frames(clips / name, index, [TOTAL - 1])
        assert 1 <= len(seen) <= most, name


def test_segments_in_seconds_and_frames(clips):
    whole = decoded(clips / "h264.mp4")  # 25 frames a second
    for segment, first, last in (
        ((0.2, 0.8), 5, 20), ((0.2, math.inf), 5, 31), ((-1.0, 0.2), 0, 5), ((3, 9), 3, 9), ((3, 99), 3, 32)
    ):  # fmt: skip
        assert num_frames(clips / "h264.mp4", segment) == last - first
        found = read_frames(clips / "h264.mp4", 3, segment=segment)
        for number, frame in zip(frame_numbers(last - first, 3), found, strict=True):
            np.testing.assert_array_equal(frame, whole[first + number])
    for segment in ((0.8, 0.2), (99.0, 100.0), (-3, 9), (40, 50)):
        with pytest.raises(VideoError, match=r"h264\.mp4: no frame in the segment"):
            read_frames(clips / "h264.mp4", 3, segment=segment)


def test_frames_that_come_at_any_time(tmp_path):
    """Frames are counted, not timed, as by the originals."""
    times = np.cumsum([40, 5, 300, 40, 1, 900, 33, 33, 2, 500, 40, 40])
    path = tiny.write_video(tmp_path / "v.mkv", tiny.moving_square(12), times=times)
    whole = decoded(path)
    for number, frame in zip(frame_numbers(12, 4), read_frames(path, 4), strict=True):
        np.testing.assert_array_equal(frame, whole[number])


def test_avi_counts_frames_that_were_dropped_when_it_was_made(tmp_path):
    times = 40 * np.array([0, 1, 2, 6, 7, 8, 9, 10, 14, 15, 16, 17])
    path = tiny.write_video(tmp_path / "v.avi", tiny.moving_square(12), codec="mpeg4", times=times, bf="2")
    whole = decoded(path)
    assert num_frames(path) == len(whole) == 12
    for number, frame in zip(frame_numbers(12, 5), read_frames(path, 5), strict=True):
        np.testing.assert_array_equal(frame, whole[number])
    data = path.read_bytes()
    path.write_bytes(data[: data.index(b"idx1") // 2])
    with pytest.raises(VideoError, match="cut off or damaged"):
        read_frames(path, 4)


# Display matrices (a, b, c, d of ISO/IEC 14496-12 8.3.2), and what a viewer shows of the stored frame.
TURNS = {
    (0, 1, -1, 0): lambda a: np.rot90(a, -1),  # a telephone held upright: a quarter turn clockwise
    (0, -1, 1, 0): lambda a: np.rot90(a, 1),
    (-1, 0, 0, -1): lambda a: np.rot90(a, 2),
    (-1, 0, 0, 1): lambda a: a[:, ::-1],
    (1, 0, 0, -1): lambda a: a[::-1],
    (0, 1, 1, 0): lambda a: a.swapaxes(0, 1),
}


@pytest.mark.parametrize("matrix", TURNS)
def test_turned_videos_stand_upright(clips, tmp_path, matrix):
    data = bytearray((clips / "h264.mp4").read_bytes())
    place = data.index(b"tkhd") + 4 + 40  # version 0: the matrix stands behind 40 bytes

    def fixed(value):
        return (value << 16 & 0xFFFFFFFF).to_bytes(4, "big")

    assert data[place : place + 20] == fixed(1) + bytes(12) + fixed(1)
    a, b, c, d = matrix
    data[place : place + 20] = fixed(a) + fixed(b) + bytes(4) + fixed(c) + fixed(d)
    path = tmp_path / "turned.mp4"
    path.write_bytes(data)
    for turned, stored in zip(read_frames(path, 3), read_frames(clips / "h264.mp4", 3), strict=True):
        np.testing.assert_array_equal(turned, TURNS[matrix](stored))


# --------------------------------------------------------------------------------------- folders, arrays, lists


def test_folder_of_frames_is_sorted_by_numbers(tmp_path):
    frames = tiny.moving_square(11)
    for number, pixels in enumerate(frames, 1):
        Image.fromarray(pixels).save(tmp_path / f"frame{number}.png")
    (tmp_path / "notes.txt").write_text("left out")
    (tmp_path / ".hidden.png").write_text("left out")
    assert num_frames(tmp_path) == 11
    np.testing.assert_array_equal(read_frames(tmp_path, 4), frames[frame_numbers(11, 4)])
    (tmp_path / "frame5.png").write_bytes(b"no image")
    with pytest.raises(ImageError, match=r"frame5\.png"):
        read_frames(tmp_path, 11)


def test_arrays_and_lists_of_images():
    frames = tiny.moving_square(9)
    picked = frames[frame_numbers(9, 4)]
    for source in (frames, list(frames), [Image.fromarray(frame) for frame in frames]):
        np.testing.assert_array_equal(read_frames(source, 4), picked)
    assert len(read_frames(frames[:1], 8)) == 1
    for wrong, error, said in (
        (frames[0], VideoError, r"uint8\[n, h, w, 3\]"),
        (frames.astype(np.float32), VideoError, r"float32.*a frame is uint8"),
        ([], VideoError, "no frames"),
        (7, TypeError, "is a int"),
    ):
        with pytest.raises(error, match=said):
            read_frames(wrong, 4)


# ---------------------------------------------------------------------------------------------------- bad files


def cut(share):
    return lambda data: data[: int(share * len(data))]


def damaged(data):
    """Its frames, not its tables: their place varies by a byte from one encoding to the next."""
    first = max(data.find(b"mdat"), data.find(b"movi"))
    last = max(data.find(b"moov", first), data.find(b"idx1", first))
    data = bytearray(data)
    for place in np.random.default_rng(1).integers((3 * first + last) // 4, last, 60):
        data[place] ^= 0xFF
    return bytes(data)


def lying(frames):
    def change(data):
        place = data.index(b"strh") + 8 + 32  # AVI: the stream's length
        return data[:place] + frames.to_bytes(4, "little") + data[place + 4 :]

    return change


@pytest.mark.parametrize(
    ("name", "change", "said"),
    [
        ("h264.mp4", lambda data: b"", "is empty"),
        ("h264.mp4", lambda data: b"no video " * 50, "not a video, or damaged"),
        ("h264.mp4", cut(0.6), "not a video, or damaged"),
        ("h264.mp4", damaged, "damaged"),
        ("open.mkv", cut(0.5), "cut off"),
        ("vp9.webm", cut(0.5), "cut off"),
        ("mjpeg.avi", cut(0.7), "its header says 32 frames, but"),
        ("mjpeg.avi", damaged, "damaged"),
        ("mjpeg.avi", lying(400), "its header says 400 frames, but 32 are there"),
        ("mjpeg.avi", lying(7), "its header says 7 frames, but 32 are there"),
    ],
)
def test_bad_file_is_one_error_with_its_name(clips, tmp_path, name, change, said):
    path = tmp_path / f"bad-{name}"
    path.write_bytes(change((clips / name).read_bytes()))
    with pytest.raises(VideoError, match=said) as caught:
        read_frames(path, 8)
    assert f"bad-{name}" in str(caught.value)
    with pytest.raises(VideoError, match=r"^sample 7, clip: "):
        read_frames(path, 8, name="sample 7, clip")


def test_files_without_a_video(tmp_path):
    import av

    with av.open(os.fspath(tmp_path / "sound.mp4"), "w") as container:
        stream = container.add_stream("aac", rate=16000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 4096), np.float32), format="fltp", layout="mono")
        frame.rate = 16000
        container.mux(stream.encode(frame))
        container.mux(stream.encode())
    Image.new("RGB", (8, 8)).save(tmp_path / "image.png")
    (tmp_path / "folder").mkdir()
    for name, said in (
        ("sound.mp4", "no video in the file, which holds audio"),
        ("image.png", "not a video"),
        ("folder", "no frames in the folder"),
        ("absent.mp4", "cannot be read: No such file"),
        (f"{300 * 'a'}.mp4", "cannot be read: File name too long"),
        ("nul\0.mp4", "cannot be read: embedded null byte"),
    ):
        with pytest.raises(VideoError, match=f"{name}: .*{said}"):
            read_frames(tmp_path / name, 4)


def test_one_frame_and_a_wrong_name(clips, tmp_path):
    one = tiny.write_video(tmp_path / "one.mp4", tiny.moving_square(1))
    assert num_frames(one) == len(read_frames(one, 8)) == 1
    misnamed = tmp_path / "clip.jpg"
    misnamed.write_bytes((clips / "vp9.webm").read_bytes())
    np.testing.assert_array_equal(read_frames(misnamed, 4), read_frames(clips / "vp9.webm", 4))


def remuxed(source, path, title="", **options):
    """The same packets in another file."""
    import av

    with av.open(os.fspath(source)) as old, av.open(os.fspath(path), "w", options=options) as new:
        new.metadata["title"] = title
        stream = new.add_stream_from_template(old.streams.video[0])
        for packet in old.demux(video=0):
            if packet.size:
                packet.stream = stream
                new.mux(packet)
    return path


def test_file_cut_behind_its_header(clips, tmp_path):
    path = remuxed(clips / "h264.mp4", tmp_path / "fast.mp4", movflags="faststart")
    assert len(read_frames(path, 4)) == 4
    path.write_bytes(cut(0.9)(path.read_bytes()))
    with pytest.raises(VideoError, match="its header says 32 frames, but"):
        read_frames(path, 4)


def test_titles_in_any_encoding_and_fragments(clips, tmp_path):
    expected = read_frames(clips / "h264.mp4", 4)
    for name, options in (("v.mp4", {}), ("v.mkv", {}), ("f.mp4", {"movflags": "frag_keyframe+empty_moov"})):
        path = remuxed(clips / "h264.mp4", tmp_path / name, "cafe!", **options)
        data = path.read_bytes()
        assert b"cafe!" in data
        path.write_bytes(data.replace(b"cafe!", b"caf\xe9!"))  # Latin-1
        np.testing.assert_array_equal(read_frames(path, 4), expected)


def test_streams_that_begin_behind_the_header(clips, monkeypatch):
    """As PyAV 18 and 19 end where a stream has appeared meanwhile."""
    import av

    expected, demux = read_frames(clips / "stream.ts", 4), av.container.InputContainer.demux

    class Container:
        def __init__(self, container):
            self.container = container

        def __getattr__(self, name):
            return getattr(self.container, name)

        def demux(self, *streams):
            yield from demux(self.container, *streams)
            raise IndexError("list index out of range")

    opened = video_file._opened

    @contextlib.contextmanager
    def late(*arguments):
        with opened(*arguments) as (container, stream):
            yield Container(container), stream

    monkeypatch.setattr(video_file, "_opened", late)
    np.testing.assert_array_equal(read_frames(clips / "stream.ts", 4), expected)


def test_playlists_open_nothing_else(clips, tmp_path):
    address = (clips / "stream.ts").as_posix()
    for text in (f"#EXTM3U\n#EXTINF:1,\nfile:{address}\n", f"ffconcat version 1.0\nfile '{address}'\n"):
        for name in ("list.m3u8", "list.mp4", "list.ffconcat"):
            (tmp_path / name).write_text(text)
            with pytest.raises(VideoError, match=name):
                read_frames(tmp_path / name, 4)


def test_frames_that_are_too_large(clips, monkeypatch):
    with pytest.raises(VideoError, match="exceed the limit of 100"):
        read_frames(clips / "h264.mp4", 4, max_pixels=100)
    monkeypatch.setenv("MLLM_JAX_MAX_DECODING_BYTES", "20000")
    assert len(read_frames(clips / "h264.mp4", 2)) == 2
    with pytest.raises(VideoError, match="MLLM_JAX_MAX_DECODING_BYTES"):
        read_frames(clips / "h264.mp4", 4)


def test_without_pyav_the_extra_is_named(clips, monkeypatch):
    find = builtins.__import__

    def without(name, *rest):
        if name == "av":
            raise ModuleNotFoundError("No module named 'av'", name="av")
        return find(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(ModuleNotFoundError, match=r"pip install 'mllm-jax\[video\]'"):
        read_frames(clips / "h264.mp4", 4)
    assert len(read_frames(tiny.moving_square(3), 2)) == 2
