"""Data sets as people publish them become LLaVA samples; what is left out or changed is counted by rule."""

import base64
import io
import json
import tarfile

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from mllm_jax.cli.main import main
from mllm_jax.data.foreign import json_files, sources
from mllm_jax.data.foreign.conversion import convert_files
from mllm_jax.data.foreign.drafts import Style
from mllm_jax.data.llava_json import entry_problems, read_records
from mllm_jax.data.reading import DataError


def image(number, form="JPEG"):
    buffer = io.BytesIO()
    Image.new("RGB", (8, 6), (number, 255 - number, 7)).save(buffer, form)
    return buffer.getvalue()


A, B, C = image(1), image(2, "PNG"), image(3)
ASK = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "A cat."}]
STRUCT = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
TURN = pa.struct([("from", pa.string()), ("value", pa.string())])


def turns(*values):
    return [{"from": ("human", "gpt")[place % 2], "value": value} for place, value in enumerate(values)]


def write_tar(path, members, mode="w"):
    with tarfile.open(path, mode) as tar:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))


def read(out):
    samples = [json.loads(line) for line in (out / "train.jsonl").read_text().split("\n") if line]
    report = json.loads((out / "report.json").read_text())
    return {sample["id"]: sample for sample in samples}, report


def counts(report, what="dropped"):
    return {kind: one["count"] for kind, one in report[what].items()}


def stored(out, sample):
    names = sample["image"] if isinstance(sample["image"], list) else [sample["image"]]
    return [(out / "images" / name).read_bytes() for name in names]


def convert(source, out, **options):
    convert_files(source, out, **options)
    samples, report = read(out)
    assert not (out / ".unfinished").exists()
    assert len(read_records(out / "train.jsonl", out / "images")) == report["written"] == len(samples)
    return samples, report


@pytest.fixture
def onevision(tmp_path):
    """Two shards of LLaVA-OneVision-Data's columns; rows groups of two rows."""
    folder = tmp_path / "onevision"
    folder.mkdir()
    rows = [
        {"id": "a/1.jpg", "image": {"bytes": A, "path": "x/../../1.jpg"}, "conversations": ASK},
        {"id": "a/1.jpg", "image": {"bytes": A, "path": None}, "conversations": turns("And?", "Two.")},
        {"id": "text", "image": None, "conversations": turns("Hello?", "Hi &amp; bye.", "So?")},
        {"id": "cut", "image": {"bytes": C[:200], "path": "c.jpg"}, "conversations": ASK},
        {"id": None, "image": {"bytes": B, "path": "b"}, "conversations": ASK},
        {"id": "mute", "image": {"bytes": B, "path": "b"}, "conversations": turns("<image>\nWhat?", " ")},
        {
            "id": "two",
            "image": {"bytes": C, "path": "c"},
            "conversations": turns("<image> <image> Same?", "No."),
        },
        {"id": "gone", "image": None, "conversations": ASK},
    ]
    schema = pa.schema(
        [
            ("id", pa.string()),
            ("image", STRUCT),
            ("conversations", pa.list_(TURN)),
            ("data_source", pa.string()),
        ]
    )
    rows = [row | {"data_source": "made"} for row in rows]
    for number, shard in enumerate((rows[:5], rows[5:])):
        table = pa.Table.from_pylist(shard, schema)
        pq.write_table(table, folder / f"train-{number:05}-of-00002.parquet", row_group_size=2)
    (folder / "dataset_infos.json").write_text("{}")
    return folder


def test_onevision_parquet(onevision, tmp_path):
    samples, report = convert(onevision, tmp_path / "out")
    assert list(samples) == ["a/1.jpg", "a/1.jpg#2", "text", "train-00000-of-00002-4"]
    assert stored(tmp_path / "out", samples["a/1.jpg"]) == [A]
    assert samples["a/1.jpg"]["image"] == samples["a/1.jpg#2"]["image"]  # stored once
    assert len([path for path in (tmp_path / "out/images").rglob("*") if path.is_file()]) == 2
    assert samples["a/1.jpg#2"]["conversations"][0]["value"] == "<image>\nAnd?"
    assert samples["text"] == {"id": "text", "conversations": turns("Hello?", "Hi &amp; bye.")}
    assert counts(report) == {"unusable-image": 1, "empty-answer": 1, "image-count": 2}
    assert report["dropped"]["image-count"]["first"] == ["two", "gone"]
    assert "damaged or truncated" in report["dropped"]["unusable-image"]["example"]
    assert counts(report, "changed") == {
        "id-made": 1, "id-numbered": 1, "marks-added": 1, "last-question-cut": 1, "html-kept": 1,
    }  # fmt: skip
    assert {name: one["count"] for name, one in report["unread"].items()} == {
        "data_source": 8,
        "files of other kinds": 1,
    }


def test_processes_and_stopped_conversions_write_the_same(onevision, tmp_path, monkeypatch):
    convert(onevision, tmp_path / "one")
    assert (
        main(["convert", "--source", str(onevision), "--out", str(tmp_path / "two"), "--workers", "2"]) == 0
    )
    later = onevision / "train-00001-of-00002.parquet"
    whole = later.read_bytes()
    later.write_bytes(whole[:300] + bytes(60) + whole[360:])
    with pytest.raises(DataError, match=r"train-00001-of-00002.parquet: row group 0 is damaged"):
        convert(onevision, tmp_path / "three")
    with pytest.raises(DataError, match="unfinished conversion with other settings"):
        convert(onevision, tmp_path / "three", style=Style(system="drop"))
    later.write_bytes(whole)
    groups = []
    asked = sources.rows
    monkeypatch.setattr(sources, "rows", lambda part, *more: groups.append(part.first) or asked(part, *more))
    convert(onevision, tmp_path / "three")
    assert groups == [0, 2]  # of the second file: what was done is not done again
    for name in ("train.jsonl", "report.json"):
        texts = {(tmp_path / out / name).read_text() for out in ("one", "two", "three")}
        assert len(texts) == 1


def test_strict_stops_at_the_first(onevision, tmp_path, capsys):
    arguments = ["convert", "--source", str(onevision), "--out", str(tmp_path / "out"), "--workers", "1"]
    assert main([*arguments, "--strict"]) == 1
    assert "sample 'cut': sample 'cut': damaged" in capsys.readouterr().err
    assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "Parquet, 2 files; layout 'conversations'" in said
    assert "4 samples with 3 images from 8 entries, 4 entries left out" in said
    assert "not read: data_source (8), files of other kinds (1)" in said
    assert main(arguments) == 1
    assert "nothing is overwritten" in capsys.readouterr().err


def test_cauldron_parquet(tmp_path):
    text = pa.struct([("user", pa.string()), ("assistant", pa.string()), ("source", pa.string())])
    rows = [
        {
            "images": [{"bytes": A, "path": None}, {"bytes": B, "path": None}],
            "texts": [
                {"user": "Which?", "assistant": "The first.", "source": "x"},
                {"user": "Why?", "assistant": "", "source": "x"},
                {"user": "Where?", "assistant": "Here.", "source": "x"},
            ],
        },
        {
            "images": [{"bytes": None, "path": None}],
            "texts": [{"user": "?", "assistant": "!", "source": "x"}],
        },
        {"images": [], "texts": [{"user": "", "assistant": "!", "source": "x"}]},
    ]
    schema = pa.schema([("images", pa.list_(STRUCT)), ("texts", pa.list_(text))])
    pq.write_table(pa.Table.from_pylist(rows, schema), tmp_path / "c.parquet")
    samples, report = convert(tmp_path / "c.parquet", tmp_path / "out")
    (sample,) = samples.values()
    assert stored(tmp_path / "out", sample) == [A, B]
    assert sample["conversations"] == turns("<image>\n<image>\nWhich?", "The first.", "Where?", "Here.")
    assert counts(report) == {"missing-image": 1, "empty-answer": 1}
    assert counts(report, "changed") == {"id-made": 1, "empty-pair-cut": 1}


def test_vqa_parquet(tmp_path):
    said = [{"answer": each} for each in ("cat", "dog", "dog")]
    rows = [
        {"question_id": 7, "pic": {"bytes": A, "path": None}, "prompt": "What?", "answers": said},
        {"question_id": 8, "pic": {"bytes": A, "path": None}, "prompt": "<image> Who?", "answers": said[:1]},
        {"question_id": 9, "pic": {"bytes": A, "path": None}, "prompt": "Who?", "answers": []},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "v.parquet")
    with pytest.raises(DataError, match=r"'prompt'.* none of a known layout.*--columns question=prompt"):
        convert(tmp_path / "v.parquet", tmp_path / "out")
    with pytest.raises(DataError, match=r"has no column 'nothing'"):
        convert(tmp_path / "v.parquet", tmp_path / "out", columns={"image": "nothing"})
    columns = {"question": "prompt", "image": "pic"}
    style = Style(closing="Answer briefly.")
    samples, report = convert(tmp_path / "v.parquet", tmp_path / "out", columns=columns, style=style)
    assert samples["7"]["conversations"] == turns("<image>\nWhat?\nAnswer briefly.", "dog")
    assert samples["8"]["conversations"] == turns("<image> Who?\nAnswer briefly.", "cat")
    assert counts(report) == {"missing-key": 1}

    rows = [
        {"question": "Which?", "choices": ["red", "blue"], "answer": answer, "image": None}
        for answer in (1, 2)
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "choices.parquet")
    samples, report = convert(tmp_path / "choices.parquet", tmp_path / "letters")
    (sample,) = samples.values()
    letters = "Which?\nA. red\nB. blue\nAnswer with the option's letter from the given choices directly."
    assert sample["conversations"] == turns(letters, "B")
    assert counts(report) == {"no-choice": 1}


def test_webdataset(tmp_path):
    shards = tmp_path / "shards"
    shards.mkdir()
    captions = {
        "000.jpg": A, "000.txt": b"A cat.", "000.json": b'{"url": "http://x", "width": 8}',
        "001.jpg": A[:200], "001.txt": b"A dog.",
        "002.cls": b"3", "002.png": B, "002.txt": "Käse\u2028!".encode(),
        "README": b"no extension",
    }  # fmt: skip
    write_tar(shards / "000.tar.gz", captions, "w:gz")
    write_tar(shards / "001.tar", {"000.jpg": C, "000.txt": b"Another."})
    samples, report = convert(shards, tmp_path / "out", style=Style(caption_prompt="What is this?"))
    assert list(samples) == ["000", "002", "000#2"]
    assert samples["002"]["conversations"] == turns("<image>\nWhat is this?", "Käse\u2028!")
    assert stored(tmp_path / "out", samples["000#2"]) == [C]
    assert counts(report) == {"unusable-image": 1}
    unread = {name: one["count"] for name, one in report["unread"].items()}
    assert unread == {
        "url": 1, "width": 1, "members .cls": 1, "members that are no files, or without an extension": 1,
    }  # fmt: skip

    asked = {
        "messages": [
            {"role": "user", "content": "<image><image>Same?"},
            {"role": "assistant", "content": "No."},
        ]
    }
    several = {
        "a.10.png": B, "a.2.jpg": A, "a.json": json.dumps(asked).encode(),
        "b.x.jpg": C, "b.y.jpg": A, "b.json": json.dumps(asked | {"images": ["b.y.jpg", "b.x.jpg"]}).encode(),
        "c.0.jpg": C, "c.json": json.dumps(asked | {"images": ["c.0.jpg", "c.1.jpg"]}).encode(),
        "d.0.jpg": C, "d.json": b"{", "e.mp4": b"film", "e.json": json.dumps(asked).encode(),
    }  # fmt: skip
    write_tar(tmp_path / "several.tar", several)
    samples, report = convert(tmp_path / "several.tar", tmp_path / "several")
    assert [stored(tmp_path / "several", samples[key]) for key in "ab"] == [[A, B], [A, C]]
    assert counts(report) == {"missing-image": 1, "unreadable-line": 1, "unread-medium": 1}
    whole = (tmp_path / "several.tar").read_bytes()
    for cut in (700, 1024, 3000, len(whole) - 9000):  # in a file, behind one, in a header
        (tmp_path / "bad.tar").write_bytes(whole[:cut])
        with pytest.raises(DataError, match=r"bad\.tar: damaged"):
            convert(tmp_path / "bad.tar", tmp_path / f"bad{cut}")
    (tmp_path / "bad.tgz").write_bytes((shards / "000.tar.gz").read_bytes()[:-6])
    with pytest.raises(DataError, match=r"bad\.tgz: damaged"):
        convert(tmp_path / "bad.tgz", tmp_path / "bad")


def test_tars_lose_no_sample_silently(tmp_path):
    captions = {f"{n}.{end}": data for n in range(4) for end, data in (("jpg", A), ("txt", b"A cat."))}
    write_tar(tmp_path / "a.tar", captions)
    whole = (tmp_path / "a.tar").read_bytes()
    (tmp_path / "bad.tar").write_bytes(
        whole.replace(b"2.jpg", b"9.jpg", 1)
    )  # the sum of its header is another
    with pytest.raises(DataError, match=r"bad\.tar: damaged.*checksum"):
        convert(tmp_path / "bad.tar", tmp_path / "bad")
    (tmp_path / "joined.tar").write_bytes(whole * 2)
    assert convert(tmp_path / "joined.tar", tmp_path / "joined")[1]["written"] == 8

    asked = {"conversations": turns("<image> <image> Same?", "No.")}
    named = {
        "K.x.JPG": A, "K.y.jpg": C, "K.json": json.dumps(asked | {"images": ["d/K.y.jpg", "d/K.x.jpg"]}).encode(),
        "L.x.jpg": A, "L.y.jpg": C, "L.json": json.dumps(asked | {"images": ["1", "2", "3"]}).encode(),
        "M.json": json.dumps({"conversations": turns("What?", "A."), "image": "beside.png"}).encode(),
        "N.jpg": A, "N.more.jpg": C, "N.json": json.dumps({"conversations": ASK, "image": "N.jpg"}).encode(),
    }  # fmt: skip
    write_tar(tmp_path / "named.tar", named)
    (tmp_path / "beside.png").write_bytes(B)
    samples, report = convert(tmp_path / "named.tar", tmp_path / "named")
    assert {key: stored(tmp_path / "named", samples[key]) for key in samples} == {
        "K": [C, A],
        "M": [B],
        "N": [A],
    }
    assert counts(report) == {"missing-image": 1}
    assert counts(report, "unread") == {"members of images that the JSON does not name": 1}

    several = {"1.jpg": A, "1.0.txt": b"\xef\xbb\xbfone", "1.1.txt": b"two", "1.json": b'{"hash": "x"}'}
    write_tar(tmp_path / "several.tar", several)
    samples, report = convert(tmp_path / "several.tar", tmp_path / "several")
    assert samples["1"]["conversations"][1]["value"] == "one"
    assert counts(report, "unread") == {"members .txt": 1, "hash": 1}


def test_what_is_not_read_is_said(tmp_path):
    (tmp_path / "a.jpg").write_bytes(A)
    (tmp_path / "b.png").write_bytes(B)
    (tmp_path / "a.mp4").write_bytes(b"film")
    parts = [{"type": "image", "index": 1}, {"type": "image", "index": 0}, {"type": "text", "text": "Same?"}]
    talk = [{"role": "user", "content": parts}, {"role": "assistant", "content": "No.", "weight": 0}]
    entries = [
        {"id": 1, "messages": talk, "images": ["a.jpg", "b.png"], "image_path": "c", "question": "?"},
        {"id": 2, "messages": turns("<image> What?", "A film."), "image": "a.mp4"},
        {"id": 3, "messages": turns("<video> &lt;b&gt; ?x=1&copy=2", "Rain."), "video": "a.mp4"},
        {
            "id": 4,
            "messages": [{"role": "user", "content": [parts[1], *parts[1:]]}, talk[1]],
            "images": ["a.jpg", "b.png"],
        },
        {"id": 5, "messages": talk, "images": ["a.jpg"]},
    ]
    (tmp_path / "X.JSONL").write_text("\n\n".join(map(json.dumps, entries)) + "\n{")
    samples, report = convert(tmp_path / "X.JSONL", tmp_path / "out", style=Style(html="unescape"))
    assert stored(tmp_path / "out", samples["1"]) == [B, A]
    assert samples["3"]["conversations"][0]["value"] == "<video> <b> ?x=1&copy=2"
    assert (tmp_path / "out/images" / samples["3"]["video"]).read_bytes() == b"film"
    assert counts(report) == {"unusable-image": 1, "image-count": 2, "unreadable-line": 1}
    assert report["read"] == report["written"] + sum(counts(report).values())
    assert counts(report, "unread") == {"image_path": 1, "question": 1, "messages[].weight": 1}
    in_order = {"id": 1, "messages": talk, "image": ["a.jpg", "b.png"]}
    assert "index 1 where 0 is due" in entry_problems(in_order, "1")[0].message

    rows = [
        {"image": {"bytes": A}, "caption": ["One.", " ", None, "Two."], "text": "x", "system": "Be brief."},
        {"image": {"bytes": A[:200]}, "caption": ["One."], "text": None, "system": None},
    ]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "c.parquet")
    samples, report = convert(tmp_path / "c.parquet", tmp_path / "c")
    said = [[turn["value"] for turn in sample["conversations"]] for sample in samples.values()]
    question = "<image>\nDescribe the image briefly."
    assert said == [["Be brief.", question, "One."], ["Be brief.", question, "Two."]]
    assert list(samples) == ["c-0-0", "c-0-3"]
    assert (counts(report), counts(report, "unread")) == ({"unusable-image": 1}, {"text": 1})
    assert counts(report, "changed") == {"id-made": 2, "empty-caption-cut": 1}


def test_a_killed_conversion_goes_on(onevision, tmp_path):
    out = tmp_path / "out"
    (out / ".unfinished").mkdir(parents=True)  # killed before its settings were written
    whole = (later := onevision / "train-00001-of-00002.parquet").read_bytes()
    later.write_bytes(whole[:300] + bytes(60) + whole[360:])
    with pytest.raises(DataError, match="damaged"):
        convert(onevision, out)
    later.write_bytes(whole)
    left = out / "images" / f".0.jpg.{'0' * 16}.part"  # killed while an image was written
    left.write_bytes(A[:50])
    with pytest.raises(DataError, match=r"sample 'cut'.*--strict"):  # what is done already counts, too
        convert(onevision, out, strict=True)
    convert(onevision, out)
    assert not left.exists()


def test_sharegpt_json(tmp_path):
    folder = tmp_path / "images"
    folder.mkdir()
    (folder / "a.jpg").write_bytes(A)
    (folder / "b.png").write_bytes(B)
    (folder / "clip.mp4").write_bytes(b"film")
    uri = f"data:image/png;base64,{base64.b64encode(B).decode()}"
    parts = [
        {"type": "image_url", "image_url": {"url": uri}},
        {"type": "text", "text": "\nSame as "},
        {"type": "image", "image": "a.jpg"},
        {"type": "text", "text": "?"},
    ]
    system = {"from": "system", "value": "Be brief."}

    def one(name, talk=ASK, **more):
        return {"id": name, "conversations": talk} | more

    entries = [
        one("plain", image="a.jpg"),
        {"id": 2, "messages": [{"role": "user", "content": parts}, {"role": "assistant", "content": "No."}]},
        one("absolute", images=[str(folder / "a.jpg")], model="gpt-4"),
        one("roles", [{"from": "user", "value": "Hi?"}, {"from": "assistant", "value": "Yes."}]),
        one("system", [system, *ASK], image="a.jpg"),
        one("late", [{"from": "gpt", "value": "Hm."}, *turns("Hi?", "Yes.")]),
        one("film", turns("<video>\nWhat?", "Rain."), video="clip.mp4"),
        one("escape", image="../secret.jpg"),
        one("far", image="https://example.com/a.jpg"),
        one("lost", image="z.jpg"),
        one("tool", [{"from": "human", "value": "Hi"}, {"from": "function_call", "value": "f()"}]),
        one("order", turns("a", "b", "c", "d")[:2] * 1 + turns("x", "y")[1:]),
        one("heard", image="a.jpg", audio="a.wav"),
        one("half", turns("Hi \ud83d", "Yes.")),
        one("shown", turns("Draw.", "<image>"), image="a.jpg"),
        "nothing",
    ]
    path = tmp_path / "data.json"
    path.write_text(json.dumps(entries))
    samples, report = convert(path, tmp_path / "out", images=folder)
    assert list(samples) == ["plain", "2", "absolute", "roles", "system", "late", "film"]
    assert stored(tmp_path / "out", samples["2"]) == [B, A]
    assert samples["2"]["conversations"][0]["value"] == "<image>\nSame as <image>?"
    assert samples["system"]["conversations"] == [system, *ASK]
    assert samples["late"]["conversations"] == turns("Hi?", "Yes.")
    assert (tmp_path / "out/images" / samples["film"]["video"]).read_bytes() == b"film"
    assert counts(report) == {
        "image-path": 1, "remote-image": 1, "missing-image": 1, "turns": 1, "roles": 1, "unread-medium": 1, "text": 1,
        "image-count": 1, "wrong-type": 1,
    }  # fmt: skip
    assert {name: one["first"] for name, one in report["unread"].items()} == {"model": ["absolute"]}

    lines = tmp_path / "lines.jsonl"
    lines.write_text("\n".join(map(json.dumps, entries[:5])) + '\n{"id": "cut"\n')
    style = Style(system="drop")
    samples, report = convert(lines, tmp_path / "lines", images=folder, style=style)
    assert samples["system"]["conversations"] == ASK
    assert counts(report) == {"unreadable-line": 1}
    assert counts(report, "changed") == {"system-cut": 1}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("[]", []),
        ('\ufeff [1, {"a": [2]}, "x", -3.5e2 ]\n', [1, {"a": [2]}, "x", -350.0]),
        ('{"a": 1}\n{"a": 2}', [{"a": 1}, {"a": 2}]),
        ('["\\ud83d", "a long text that goes over several pieces", 1234567]', None),
        ('[{"a": 1} {"a": 2}]', "expected ','"),
        ('[{"a": 1}', "the list has no end|expected"),
        ('[{"a": 1}] 2', "behind the list"),
        ('[{"a": 1},]', "not valid JSON at character 10"),
        ("[" * 100_000, "nested too deeply"),
    ],
)
@pytest.mark.parametrize("size", [1, 7, 1 << 20])
def test_json_is_parsed_piece_by_piece_as_whole(text, expected, size, tmp_path, monkeypatch):
    monkeypatch.setattr(json_files, "_READ", size)
    path = tmp_path / "x.json"
    path.write_text(text, encoding="utf-8")
    with path.open(encoding="utf-8-sig") as file:
        if isinstance(expected, str):
            with pytest.raises(DataError, match=expected):
                list(json_files._values(file, path))
        else:
            expected = json.loads(text) if expected is None else expected
            assert list(json_files._values(file, path)) == expected


def test_what_is_no_data_set_is_named(tmp_path):
    (tmp_path / "a.txt").write_text("x")
    with pytest.raises(DataError, match=r"holds no file that ends in .tar"):
        sources.find(tmp_path)
    for name in ("train-0.parquet", "test-0.parquet", "empty.json"):
        (tmp_path / name).write_bytes(b"[]")
    with pytest.raises(DataError, match=r"splits test, train.*--files 'train\*'"):
        sources.find(tmp_path)
    with pytest.raises(DataError, match=r"train-0\.parquet: damaged or no Parquet file"):
        convert(tmp_path, tmp_path / "out", pattern="train-*")
    with pytest.raises(DataError, match=r"empty\.json: holds no rows"):
        convert(tmp_path / "empty.json", tmp_path / "out")
    (tmp_path / "lost.jsonl").write_text(json.dumps({"id": "1", "image": "no.jpg", "conversations": ASK}))
    with pytest.raises(DataError, match=r"no sample of 1 can be used.*missing-image"):
        convert(tmp_path / "lost.jsonl", tmp_path / "out")
    for split in ("train", "test"):
        (tmp_path / "folders" / split).mkdir(parents=True)
        (tmp_path / "folders" / split / "0.jsonl").write_text("{}")
        (tmp_path / "names").mkdir(exist_ok=True)
        (tmp_path / "names" / f"cc3m-{split}-0.tar").write_bytes(b"")
    with pytest.raises(DataError, match=r"splits test, train.*the folder of one"):
        sources.find(tmp_path / "folders")
    with pytest.raises(DataError, match=r"splits test, train.*--files '\*train\*'"):
        sources.find(tmp_path / "names")
    assert len(sources.find(tmp_path / "names", "*train*").paths) == 1
