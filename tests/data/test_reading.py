"""Files from elsewhere: what names may reach, and what text is accepted."""

import json
import os

import pytest

from mllm_jax.data.reading import DataError, is_safe_name, read_image_file, read_json_rows, read_text


@pytest.mark.parametrize(
    "name",
    [
        "/etc/passwd",
        "../secret.png",
        "a/../../secret.png",
        "..\\secret.png",
        "C:/secret.png",
        "C:secret.png",
        "\\\\host\\share\\secret.png",
        "a\0.png",
        "",
    ],
)
def test_names_do_not_leave_the_folder(name, tmp_path):
    (tmp_path / "secret.png").write_bytes(b"secret")
    (tmp_path / "root" / "a").mkdir(parents=True)
    assert not is_safe_name(name)
    with pytest.raises(DataError, match=r"sample 's1': image path .* must be relative"):
        read_image_file(tmp_path / "root", name, "s1")


def test_links_that_a_user_made_are_followed(tmp_path):
    (tmp_path / "store" / "coco").mkdir(parents=True)
    (tmp_path / "store" / "coco" / "1.png").write_bytes(b"pixels")
    (tmp_path / "root").mkdir()
    (tmp_path / "root" / "coco").symlink_to(tmp_path / "store" / "coco")
    (tmp_path / "root" / "2.png").symlink_to(tmp_path / "store" / "coco" / "1.png")
    (tmp_path / "as_root").symlink_to(tmp_path / "root")
    for root, name in (("root", "coco/1.png"), ("root", "2.png"), ("as_root", "coco/1.png")):
        assert read_image_file(tmp_path / root, name, "s") == b"pixels"


def test_what_is_no_regular_file_is_refused_and_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "device.png").symlink_to("/dev/zero")
    (tmp_path / "folder.png").mkdir()
    for name in ("pipe.png", "device.png", "folder.png"):
        with pytest.raises(DataError, match=rf"sample 's': .*{name}"):
            read_image_file(tmp_path, name, "s")


def test_large_files_are_refused_before_they_are_read(tmp_path, monkeypatch):
    with (tmp_path / "sparse").open("wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(DataError, match="MLLM_JAX_MAX_IMAGE_FILE_BYTES"):
        read_image_file(tmp_path, "sparse", "s")
    with pytest.raises(DataError, match="MLLM_JAX_MAX_TEXT_BYTES"):
        read_text(tmp_path / "sparse")


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":' * 100_000, "[" + "9" * 5000 + "]", '["\\ud83d', "", "NaN]"]
)
@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_json_that_cannot_be_read_is_named(text, name, tmp_path):
    path = tmp_path / name
    path.write_text(text or " ?")
    with pytest.raises(DataError, match=f"{name}.*not valid JSON"):
        read_json_rows(path)


@pytest.mark.parametrize("name", ["data.json", "data.jsonl"])
def test_files_from_windows(name, tmp_path):
    rows = [{"a": "é\u2028"}, {"b": 2}]
    text = json.dumps(rows, ensure_ascii=False)
    if name == "data.jsonl":
        text = "\r\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\r\n"
    (tmp_path / name).write_bytes(text.encode("utf-8-sig"))
    assert read_json_rows(tmp_path / name) == rows
    (tmp_path / name).write_bytes(text.encode("utf-16"))
    with pytest.raises(DataError, match="not UTF-8"):
        read_json_rows(tmp_path / name)
