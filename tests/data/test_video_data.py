"""Videos as training data: JSON, preparation, rows, and what `mllm-jax validate` finds."""

import dataclasses
import json
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny
from PIL import Image

from mllm_jax.cli.main import main
from mllm_jax.data import llava_json, tfds_llava
from mllm_jax.data.feature_cache import digest, digests
from mllm_jax.data.images import ImageError, decode_image
from mllm_jax.data.layout import Slot, WholeImage
from mllm_jax.data.measure import sizes
from mllm_jax.data.packing import pack
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.reading import DataError
from mllm_jax.data.rows import ImageReader, RowEncoder, stack_rows
from mllm_jax.data.samples import Clip, FolderSource
from mllm_jax.data.tfds_llava import prepare
from mllm_jax.data.validate import Layout, validate
from mllm_jax.data.video import read_frames
from mllm_jax.data.video_layout import Video, WithVideo
from mllm_jax.models import mllm

VIDEO = Video(frames=4)


def entry(name, question, answer="A square.", **shown):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": name, "conversations": turns, **shown}


ENTRIES = [
    entry("alone", "<video>\nWhat?", video="clip.mp4"),
    entry("beside", "Is <image> in <video>?", image="image.png", video="short.mkv"),
    entry("text", "What is a square?"),
    entry("folder", "<image>\nWhere to?", "Right.", video="frames"),
    entry("several", "<video>\n<video>\nThe same?", "No, it is not.", video=["short.mkv", "frames"]),
    entry("image", "<image>\nWhat?", image="image.png"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("media")
    tiny.write_video(root / "clip.mp4", tiny.moving_square(30), bf="2")
    tiny.write_video(root / "short.mkv", tiny.moving_square(3, seed=1))
    (root / "frames").mkdir()
    for number, frame in enumerate(tiny.moving_square(5, seed=2)):
        Image.fromarray(frame).save(root / "frames" / f"{number}.jpg")
    (root / "image.png").write_bytes(tiny.png(3, (30, 20)))
    (root / "bad.mp4").write_bytes((root / "clip.mp4").read_bytes()[:1500])
    return root


def write(path, entries):
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def data(folder):
    return write(folder / "data.json", ENTRIES)


def test_videos_stand_where_they_are_named(data, folder):
    records = {record.id: record for record in llava_json.read_records(data, folder)}
    shown = {name: (record.images, record.videos) for name, record in records.items()}
    assert shown == {
        "alone": (("clip.mp4",), (0,)),
        "beside": (("image.png", "short.mkv"), (1,)),
        "text": ((), ()),
        "folder": (("frames",), (0,)),
        "several": (("short.mkv", "frames"), (0, 1)),
        "image": (("image.png",), ()),
    }
    assert records["beside"].conversations[0]["value"] == "Is <image> in <image>?"
    message = {"role": "user", "content": [{"type": "video"}, {"type": "text", "text": " What?"}]}
    chat = {"id": "1", "video": "clip.mp4", "messages": [message, {"role": "assistant", "content": "A."}]}
    first = entry("2", "<video> and <image>", image="image.png", video="clip.mp4")
    word = entry("3", "What does <video> mean in HTML?", video="")  # as tables hold it where there is none
    one, two, three = llava_json.read_records(write(folder / "more.json", [chat, first, word]), folder)
    assert three.videos == ()
    assert one.conversations[0]["value"] == "<image> What?"
    assert (two.images, two.videos) == (("clip.mp4", "image.png"), (0,))
    assert three.conversations[0]["value"] == "What does <video> mean in HTML?"


@pytest.mark.parametrize(
    ("bad", "kind", "said"),
    [
        (
            entry("x", "What?", video="clip.mp4"),
            "image-count",
            "0 <video> in the human turns but 1 under 'video'",
        ),
        (entry("x", "<video>", video=["clip.mp4", "frames"]), "image-count", "1 <video> .* but 2"),
        (
            entry("x", "<image> <image>", image="image.png", video="clip.mp4"),
            "image-count",
            "2 <image> in the human turns but 1 under 'image'",
        ),
        (entry("x", "<video>", "<video>", video="clip.mp4"), "image-count", "in an answer"),
        (entry("x", "<video>", video=7), "wrong-type", "'video' must be a path"),
        (entry("x", "<video>", video="none.mp4"), "missing-video", "video file .*none.mp4 does not exist"),
        (entry("x", "<video>", video="../clip.mp4"), "video-path", "must be relative"),
        (entry("x", "<image>", image="frames"), "missing-image", "image file"),
    ],
)
def test_problems_with_videos(bad, kind, said, folder, tmp_path):
    (problem,) = llava_json.iter_problems(write(tmp_path / "bad.json", [bad]), folder)
    assert (problem.kind, problem.sample) == (kind, "x")
    with pytest.raises(DataError, match=said):
        llava_json.read_records(tmp_path / "bad.json", folder)


def pixels(image):
    return decode_image(image, source="frame")


def test_prepared_frames_are_the_videos(data, folder, tmp_path):
    source = prepare(data, folder, tmp_path, video=VIDEO, show_progress=False)
    records = llava_json.read_records(data, folder)
    direct = FolderSource(records, folder, VIDEO)
    assert len(source) == len(ENTRIES)
    for index, record in enumerate(records):
        assert source[index] == direct[index]
        for place, path in enumerate(record.images):
            shown = source[index].images[place]
            if place in record.videos:
                assert isinstance(shown, Clip)
                expected = read_frames(folder / path, *VIDEO.picked)
                np.testing.assert_array_equal([pixels(frame) for frame in shown.frames], expected)
            else:
                assert shown == (folder / path).read_bytes()
    assert source[3].images[0].frames[0] == (folder / "frames" / "0.jpg").read_bytes()  # as they are
    again = prepare(
        data, folder, tmp_path, video=dataclasses.replace(VIDEO, pool="none"), show_progress=False
    )
    assert again.directory == source.directory
    other = prepare(data, folder, tmp_path, video=Video(frames=2), show_progress=False)
    assert len(other[0].images[0].frames) == 2
    assert other.directory != source.directory
    files = pickle.loads(pickle.dumps(tfds_llava.MediaFiles(folder, VIDEO, None)))  # as workers receive it
    assert files.example(records[1])["frames"] == [0, 3]


def test_images_are_prepared_as_before(folder, tmp_path):
    path = write(tmp_path / "images.json", ENTRIES[-1:])
    plain = prepare(path, folder, tmp_path / "a", show_progress=False)
    beside = prepare(path, folder, tmp_path / "b", video=VIDEO, show_progress=False)
    assert plain.fingerprint == beside.fingerprint
    assert plain[0] == beside[0]


def test_broken_videos(folder, tmp_path):
    bad = write(tmp_path / "bad.json", [entry("bad", "<video>\nWhat?", video="bad.mp4"), ENTRIES[0]])
    with pytest.raises(ImageError, match=r"sample 'bad', .*bad\.mp4: "):
        prepare(bad, folder, tmp_path / "a", video=VIDEO, max_image_pixels=10**6, show_progress=False)
    source = prepare(
        bad, folder, tmp_path / "a", video=VIDEO, max_image_pixels=10**6, broken="skip", show_progress=False
    )
    assert [source[0].id, *(one["sample"] for one in source.skipped)] == ["alone", "bad"]
    with pytest.raises(DataError, match=r"sample 'bad' shows a video, and model\.video\.frames is 0"):
        prepare(bad, folder, tmp_path / "b", show_progress=False)


def test_slots_of_a_cache_are_frames():
    frames = tuple(tiny.png(seed, (9, 9)) for seed in range(3))
    assert digests(Clip(frames), WholeImage(Slot(4))()) == [digest(frame) for frame in frames]


@pytest.mark.parametrize(
    "video",
    [
        VIDEO,
        Video(4, pool="average2d", newline="frame"),
        Video(4, pool="none", time="mean", newline="one_token"),
    ],
)
def test_packed_videos_compute_what_they_do_alone(video, data, folder, tiny_model, tiny_tokenizer, tmp_path):
    model = dataclasses.replace(tiny_model, video=video)
    records = llava_json.read_records(data, folder)
    source = FolderSource(records, folder, video)
    samples = [source[index] for index in range(len(source))]
    encode = RowEncoder(
        ImageReader(ImageProcessor.clip(tiny.IMAGE_SIZE, aspect="pad")), model.visual_layout, tiny_tokenizer,
        "mistral_instruct", seq_len=256, image_slots=14, samples_per_row=6,
    )  # fmt: skip
    needs = sizes(samples, encode, tmp_path, threads=1)
    assert needs[:, 1].tolist() == [4, 4, 0, 4, 7, 1]  # slots: 3 frames of the short video, 4 of the others
    rows = pack(needs, encode.limits, np.random.default_rng(0))
    assert len(rows) < len(samples)
    empty = [[]] * (len(samples) - len(rows))  # so that one program computes both
    packed = stack_rows([encode([samples[i] for i in row]) for row in [*rows, *empty]]).arrays
    unpacked = stack_rows([encode([one]) for one in samples]).arrays
    params = jax.tree.map(jnp.asarray, tiny.random_params(mllm.abstract_params(model)))
    logits = jax.jit(lambda batch: mllm.apply(model, params, batch))
    together, alone = np.asarray(logits(packed)), np.asarray(logits(unpacked))
    for row, members in enumerate(rows):
        for segment, sample in enumerate(members, 1):
            here, there = packed.segment_ids[row] == segment, unpacked.segment_ids[sample] == 1
            np.testing.assert_allclose(together[row, here], alone[sample, there], atol=2e-5)


def test_validate_reads_videos(data, folder, tmp_path, capsys):
    bad = write(tmp_path / "bad.json", [*ENTRIES, entry("bad", "<video>", video="bad.mp4")])
    report = tmp_path / "report.json"
    given = ["validate", "--images", str(folder), "--json-report", str(report), "--json"]
    assert main([*given, str(bad)]) == 1
    (problem,) = json.loads(report.read_text())["problems"]
    assert (problem["kind"], problem["sample"]) == ("unusable-video", "bad")
    assert "bad.mp4: " in problem["message"]
    lengths = ["--template", "mini", "--tokenizer", "mini", "--seq-len", "200", "--tokens-per-image", "16"]
    assert main([*given, str(data), *lengths, "--video-frames", "4"]) == 0
    stats = json.loads(report.read_text())["stats"]
    assert (stats["images"], stats["videos"]) == (1, 3)
    longest = stats["tokens"][2]
    assert 7 * 8 < longest < 7 * 8 + 40  # seven frames in one sample, pooled by two
    capsys.readouterr()


def test_validate_counts_the_slots_of_videos(data, folder, tiny_tokenizer):
    def kinds(rule, slots=None):
        layout = Layout("mistral_instruct", tiny_tokenizer, 256, rule, slots)
        found = validate(data, folder, layout=layout, num_threads=1)
        return {(problem.kind, problem.sample) for problem in found.problems}

    whole = WholeImage(Slot(4))
    assert kinds(WithVideo(whole, VIDEO, None), 7) == set()
    assert kinds(WithVideo(whole, VIDEO, None), 6) == {("too-many-images", "several")}
    assert kinds(whole) == {("conversation", name) for name in ("alone", "beside", "folder", "several")}
