"""Known data sets become sound LLaVA JSON, an image folder and evaluation rows; bad archives are refused."""

import io
import json
import zipfile

import pytest
from PIL import Image

from mllm_jax.cli.main import main
from mllm_jax.data.convert import conversation, convert
from mllm_jax.data.llava_json import read_records
from mllm_jax.data.reading import DataError

SUFFIX = "\nAnswer the question using a single word or phrase."


def png(color=(255, 0, 0)):
    buffer = io.BytesIO()
    Image.new("RGB", (4, 4), color).save(buffer, "PNG")
    return buffer.getvalue()


def write_zip(path, members):
    with zipfile.ZipFile(path, "w") as file:
        for name, data in members.items():
            file.writestr(name, data)


def row(question, answer, image_id):
    return {"question": question, "answer": answer, "image_id": image_id}


@pytest.fixture
def easy(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    train = [
        row("what shape is in the image?", "circle", 1),
        row("is it red?", "no", 0),
        row("what color is the shape?", "teal", 1),
        row("is it blue?", "yes", 1),
    ]
    test = [
        row("is there a circle?", "no", 0),
        row("what color is it?", "red", 0),
        row("which shape?", "triangle", 0),
    ]
    (source / "train_questions.json").write_text(json.dumps(train))
    (source / "test_questions.json").write_text(json.dumps(test))
    write_zip(source / "train_images.zip", {"0.png": png(), "1.png": png((0, 1, 0)), "2.png": png()})
    write_zip(source / "test_images.zip", {"0.png": png((0, 0, 9))})
    return source


def read(path):
    return json.loads(path.read_text(encoding="utf-8"))


def test_easy_vqa_groups_the_questions_of_a_picture(easy, tmp_path):
    out = tmp_path / "new" / "out"
    counts = convert("easy_vqa", easy, out)
    assert counts == {"training samples": 2, "training answers": 4, "test rows": 3, "images": 3}
    first, second = read(out / "train.json")
    assert (first["id"], first["image"]) == ("train-1", "train/1.png")
    assert [turn["value"] for turn in first["conversations"]] == [
        f"<image>\nwhat shape is in the image?{SUFFIX}",
        "circle",
        f"what color is the shape?{SUFFIX}",
        "teal",
        f"is it blue?{SUFFIX}",
        "yes",
    ]
    assert second["id"] == "train-0"
    assert read(out / "test.json") == [
        {
            "question_id": f"test-{index}",
            "image": "test/0.png",
            "question": question,
            "answer": answer,
            "ability": ability,
        }
        for index, (question, answer, ability) in enumerate(
            [
                ("is there a circle?", "no", "yes_no"),
                ("what color is it?", "red", "color"),
                ("which shape?", "triangle", "shape"),
            ]
        )
    ]
    assert (out / "images/train/1.png").read_bytes() == png((0, 1, 0))
    assert (out / "images/test/0.png").read_bytes() == png((0, 0, 9))
    assert len(read_records(out / "train.json", out / "images")) == 2
    assert sorted(path.name for path in out.parent.iterdir()) == ["out"]  # no temporary folder is left


def test_easy_vqa_in_parts_of_a_few_turns(easy, tmp_path):
    assert convert("easy_vqa", easy, tmp_path / "out", max_turns=2)["training samples"] == 3
    samples = read(tmp_path / "out" / "train.json")
    assert [sample["id"] for sample in samples] == ["train-1-0", "train-1-1", "train-0"]
    assert [len(sample["conversations"]) for sample in samples] == [4, 2, 2]
    assert samples[1]["conversations"][0]["value"] == f"<image>\nis it blue?{SUFFIX}"


def test_coco_cc_gives_a_sample_per_caption_and_references(tmp_path):
    source = tmp_path / "source"
    (source / "images").mkdir(parents=True)
    rows = []
    for image_id, split in ((11, "train"), (12, "eval")):
        (source / "images" / f"{image_id}.jpg").write_bytes(png())
        captions = ["A cat. ", "Two\n dogs"]
        rows.append(
            {"image_id": image_id, "file": f"images/{image_id}.jpg", "split": split, "captions": captions}
        )
    (source / "annotations.json").write_text(json.dumps(rows))
    counts = convert("coco_cc", source, tmp_path / "out")
    assert counts == {"training samples": 2, "training answers": 2, "test rows": 1, "images": 2}
    train = read(tmp_path / "out" / "train.json")
    assert [sample["id"] for sample in train] == ["11-0", "11-1"]
    assert [sample["conversations"][1]["value"] for sample in train] == ["A cat.", "Two dogs"]
    (test,) = read(tmp_path / "out" / "test.json")
    assert test["captions"] == ["A cat.", "Two dogs"]
    assert (test["question_id"], test["image"]) == ("12", "12.jpg")

    with pytest.raises(DataError, match="coco_cc have one question each"):
        convert("coco_cc", source, tmp_path / "out2", max_turns=3)
    for change, message in (
        ({"file": "../x.jpg"}, "must be relative"),
        ({"file": "images/12.jpg"}, "two images are called '12.jpg'"),
        ({"file": "images/9.jpg"}, "sample '11': image file .*9.jpg cannot be read"),
        ({"split": "dev"}, "'dev' is neither"),
        ({"captions": []}, "'captions' must be a non-empty list"),
    ):
        (source / "annotations.json").write_text(json.dumps([rows[1], rows[0] | change]))
        with pytest.raises(DataError, match=message):
            convert("coco_cc", source, tmp_path / "out3")
    assert not (tmp_path / "out3").exists()


def test_nlvr_asks_whether_the_sentence_is_true(tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    for split in ("train", "eval"):
        line = {"identifier": "7-1", "file": "7.png", "sentence": "There is a box.", "label": "false"}
        (source / f"{split}.jsonl").write_text(json.dumps(line) + "\n")
        write_zip(source / f"{split}_images.zip", {"7.png": png()})
    convert("nlvr", source, tmp_path / "out")
    (sample,) = read(tmp_path / "out" / "train.json")
    question = 'Is this sentence about the image true or false? "There is a box."'
    assert sample == conversation("train-7-1", "train/7.png", [(question + SUFFIX, "false")])
    (test,) = read(tmp_path / "out" / "test.json")
    assert test == {"question_id": "test-7-1", "image": "test/7.png", "question": question, "answer": "false"}


@pytest.mark.parametrize(
    "name", ["../evil.png", "/evil.png", "a/../../evil.png", "..\\evil.png", "C:/evil.png"]
)
def test_archives_that_would_write_elsewhere_are_refused(easy, tmp_path, name):
    write_zip(easy / "test_images.zip", {"0.png": png(), name: b"evil"})
    with pytest.raises(DataError, match=r"test_images\.zip: unsafe file name"):
        convert("easy_vqa", easy, tmp_path / "out")
    assert not list(tmp_path.rglob("*evil*"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]  # and nothing half-done is left


def test_bad_sources_are_named(easy, tmp_path, monkeypatch):
    out = tmp_path / "out"
    archive = easy / "test_images.zip"
    whole = archive.read_bytes()
    monkeypatch.setenv("MLLM_JAX_MAX_IMAGE_FILE_BYTES", "60")
    with pytest.raises(DataError, match=r"'\d\.png': .*MLLM_JAX_MAX_IMAGE_FILE_BYTES"):
        convert("easy_vqa", easy, out)
    monkeypatch.undo()
    archive.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(DataError, match=r"test_images\.zip: damaged or unsupported zip"):
        convert("easy_vqa", easy, out)
    damaged = bytearray(whole)
    damaged[60] ^= 255  # inside the stored picture: only its checksum tells
    archive.write_bytes(damaged)
    with pytest.raises(DataError, match=r"test_images\.zip: damaged or unsupported zip.*CRC"):
        convert("easy_vqa", easy, out)
    write_zip(archive, {"5.png": png()})
    with pytest.raises(DataError, match=r"test_images\.zip: does not hold '0\.png'"):
        convert("easy_vqa", easy, out)
    archive.unlink()
    with pytest.raises(DataError, match=r"test_images\.zip: no such file"):
        convert("easy_vqa", easy, out)
    for rows, message in (
        ([row("q", "", 0)], "entry #0: 'answer' must be"),
        ([{}], "entry #0 has no 'question'"),
    ):
        (easy / "test_questions.json").write_text(json.dumps(rows))
        with pytest.raises(DataError, match=rf"test_questions\.json: {message}"):
            convert("easy_vqa", easy, out)
    with pytest.raises(DataError, match="no such folder"):
        convert("easy_vqa", easy / "nothing", out)
    with pytest.raises(DataError, match="at least one turn"):
        convert("easy_vqa", easy, out, max_turns=0)
    assert not out.exists()


def test_command(easy, tmp_path, capsys):
    arguments = ["convert", "easy_vqa", "--source", str(easy), "--out", str(tmp_path / "out")]
    assert main(arguments) == 0
    assert "2 training samples, 4 training answers, 3 test rows, 3 images" in capsys.readouterr().out
    assert main(arguments) == 1  # nothing is overwritten
    assert "exists already; choose another folder" in capsys.readouterr().err
    assert (
        main(["validate", "--json", f"{tmp_path}/out/train.json", "--images", f"{tmp_path}/out/images"]) == 0
    )
    with pytest.raises(SystemExit):
        main(["convert", "unknown", "--source", "a", "--out", "b"])
    assert "choose from" in capsys.readouterr().err


def test_archives_that_unpack_to_far_more_are_refused_before_they_do(easy, tmp_path):
    large = Image.new("RGB", (6000, 6000))  # 108 MB as BMP, 105 kB packed
    buffer = io.BytesIO()
    large.save(buffer, "BMP")
    with zipfile.ZipFile(easy / "test_images.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("0.png", buffer.getvalue())
    with pytest.raises(DataError, match=r"test_images\.zip: .*MLLM_JAX_MAX_ARCHIVE_RATIO"):
        convert("easy_vqa", easy, tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("data", [b"root:x:0:0:", b"", b"%!PS-Adobe-3.0 EPSF-3.0\n"])
def test_only_images_are_handed_on(data, easy, tmp_path):
    write_zip(easy / "test_images.zip", {"0.png": data})
    with pytest.raises(DataError, match=r"test_images\.zip: '0\.png': "):
        convert("easy_vqa", easy, tmp_path / "out")


def test_links_in_archives_are_refused(easy, tmp_path):
    link = zipfile.ZipInfo("0.png")
    link.external_attr = 0o120777 << 16
    with zipfile.ZipFile(easy / "test_images.zip", "w") as file:
        file.writestr(link, "/etc/passwd")
    with pytest.raises(DataError, match=r"'0\.png' is a symbolic link"):
        convert("easy_vqa", easy, tmp_path / "out")


@pytest.mark.parametrize("file", ["../secret.png", "/etc/hostname", "notes.txt"])
def test_coco_copies_only_images_below_its_folder(file, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (tmp_path / "secret.png").write_bytes(png())
    (source / "notes.txt").write_text("private")
    rows = [{"image_id": 1, "file": file, "split": "train", "captions": ["A cat."]}]
    (source / "annotations.json").write_text(json.dumps(rows))
    with pytest.raises(DataError, match=r"notes\.txt: not an image|must be relative"):
        convert("coco_cc", source, tmp_path / "out")
    assert not (tmp_path / "out").exists()
