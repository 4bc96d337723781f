"""Question files from elsewhere: what is read as what, and what they cannot reach."""

import json
import subprocess
import sys

import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mllm_jax.data.reading import DataError
from mllm_jax.evaluation.benchmarks import BenchmarkError, read_benchmark
from mllm_jax.evaluation.benchmarks.question_files import EmbeddedImages
from mllm_jax.evaluation.table_files import is_absent


def row(number="1", **fields):
    return {"question_id": number, "image": "a.png", "question": "What?", "answer": "cat"} | fields


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "images").mkdir()
    Image.new("RGB", (3, 2)).save(tmp_path / "images" / "a.png")
    return tmp_path


def write(folder, rows, encoding="utf-8", name="test.json"):
    text = json.dumps(rows, ensure_ascii=False, indent=1)
    if name.endswith("l"):
        text = "\n".join(json.dumps(one, ensure_ascii=False) for one in rows)
    (folder / name).write_bytes(text.replace("\n", "\r\n").encode(encoding))
    return folder / name


@pytest.mark.parametrize("name", ["test.json", "test.jsonl"])
def test_files_from_windows(name, folder):
    plain = read_benchmark("vqa", write(folder, [row(answer="schön")], name=name))
    marked = read_benchmark("vqa", write(folder, [row(answer="schön")], "utf-8-sig", name))
    assert marked.fingerprint == plain.fingerprint
    assert marked.questions[0].row["answer"] == "schön"


@pytest.mark.parametrize("kind", ["vqa", "caption"])
@pytest.mark.parametrize("text", ["<image>\nWhat?", "What is in <image> here?", "<image><image> Compare."])
def test_the_mark_of_training_data_is_not_read_as_text(kind, text, folder):
    path = write(folder, [row("1"), row("q2", question=text)])
    with pytest.raises(
        BenchmarkError, match=r"test\.json: question 'q2' holds <image>, the mark of training data"
    ):
        read_benchmark(kind, path)
    word = row("1", question="What does <video> mean in HTML?")
    video = row("q2", question=text.replace("image", "video"), image=None, video="a.mp4")
    with pytest.raises(BenchmarkError, match=r"'q2' holds <video>, .*videos are shown before"):
        read_benchmark(kind, write(folder, [word, video]))


@pytest.mark.parametrize(
    ("key", "value"), [("images", ["a.png"]), ("video", "a.mp4"), ("system", "Be brief."), ("audio", "a.wav")]
)
def test_keys_that_would_be_ignored_are_named(key, value, folder):
    path = write(folder, [row("1"), row("q2", **{key: value})])
    with pytest.raises(BenchmarkError, match=f"'q2': .*'{key}'"):
        read_benchmark("vqa", path)
    assert read_benchmark("vqa", write(folder, [row("1", **{key: None})])).questions


@pytest.mark.parametrize("name", ["/etc/passwd", "../secret.png", "..\\secret.png", "sub/../../secret.png"])
def test_questions_show_no_file_outside_of_the_image_folder(name, folder):
    (folder / "secret.png").write_bytes((folder / "images" / "a.png").read_bytes())
    benchmark = read_benchmark("vqa", write(folder, [row("q1", image=name)]))
    with pytest.raises(DataError, match=r"sample 'q1': image path .* must be relative"):
        benchmark.read_image(name)


def parquet(path, columns):
    pyarrow.parquet.write_table(pyarrow.table(columns), path, compression="zstd")
    return path


def test_tables_that_unpack_to_far_more_are_refused_before_they_do(folder):
    """One text of 8 MB, kept once in the file and named by each of 2,000 rows: 16 GB of texts."""
    texts = pyarrow.DictionaryArray.from_arrays(pyarrow.array([0] * 2000, "int32"), ["x" * (8 << 20)])
    path = parquet(folder / "bomb.parquet", {"question": texts})
    assert path.stat().st_size < 1 << 20
    script = (
        "import pathlib, sys\n"
        "from mllm_jax.evaluation.benchmarks import BenchmarkError\n"
        "from mllm_jax.evaluation.benchmarks.question_files import EmbeddedImages\n"
        "import pyarrow.parquet\n"
        # In KB, of this program alone: ru_maxrss begins with what the process that started it had.
        "def peak(): return int(open('/proc/self/status').read().split('VmHWM:')[1].split()[0])\n"
        "before = peak()\n"
        "try: EmbeddedImages().add_parquet(pathlib.Path(sys.argv[1]))\n"
        "except BenchmarkError as error: print(error)\n"
        "print(peak() - before)"
    )

    ran = subprocess.run(
        [sys.executable, "-c", script, str(path)], capture_output=True, text=True, check=True
    )
    message, used = ran.stdout.splitlines()
    assert "bomb.parquet" in message
    assert "MLLM_JAX_MAX_ARCHIVE_RATIO" in message
    assert int(used) < 500_000  # kilobytes


def test_images_in_parquet_are_read_by_row(folder):
    data = [f"image {index}".encode() for index in range(50)]
    cells = [{"bytes": one, "path": f"{index}.png"} for index, one in enumerate(data)]
    path = folder / "images.parquet"
    table = pyarrow.table({"id": list(range(50)), "image": cells})
    pyarrow.parquet.write_table(table, path, row_group_size=20)
    images = EmbeddedImages()
    rows = images.add_parquet(path)
    assert [one["id"] for one in rows] == list(range(50))
    for index in (49, 0, 19, 20, 21):
        assert images.read(rows[index]["image"]) == data[index]


@pytest.mark.parametrize(
    "cell", [None, float("nan"), "", "nan", "NaN", "None", "NONE", "N/A", "NA", "null", "<NA>"]
)
def test_cells_that_pandas_and_llava_read_as_missing(cell):
    assert is_absent(cell)


@pytest.mark.parametrize("cell", ["Na", "na", "Null", "none of these", "No", "0", 0, False, " ", "N.A."])
def test_cells_that_only_look_as_if_they_were_missing(cell):
    """ "Na" is sodium; pandas looks at the exact text."""
    assert not is_absent(cell)
