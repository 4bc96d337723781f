"""`mllm-jax validate` finds every kind of problem, names the samples, and sets its exit code."""

import json
import re
import struct
import sys
import zlib

import pytest
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mllm_jax.cli.main import main
from mllm_jax.data import tfds_llava
from mllm_jax.data.anyres import AnyRes, Tiles
from mllm_jax.data.layout import Slot, WholeImage
from mllm_jax.data.measure import sizes
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.rows import ImageReader, RowEncoder
from mllm_jax.data.validate import Layout, validate


def entry(sample_id, image="ok.png", question="<image>\nWhat?", answer="A cat."):
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": sample_id, "conversations": turns} | ({"image": image} if image else {})


def bomb_png(side=60_000):
    """A valid PNG header that promises side x side pixels, in 57 bytes."""

    def chunk(kind, data):
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IEND", b"")


@pytest.fixture
def folder(tmp_path):
    Image.effect_noise((32, 24), 90).convert("RGB").save(tmp_path / "ok.png")
    Image.effect_noise((64, 48), 90).convert("RGB").save(tmp_path / "ok.jpg")
    whole = (tmp_path / "ok.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "text.jpg").write_text("this is no picture")
    (tmp_path / "empty.png").touch()
    (tmp_path / "bomb.png").write_bytes(bomb_png())
    return tmp_path


def write(folder, entries):
    path = folder / "data.json"
    path.write_text(json.dumps(entries), encoding="utf-8")
    return path


BAD = {
    "cut": ("unusable-image", entry("cut", "cut.jpg"), "cut.jpg: damaged or truncated"),
    "text": ("unusable-image", entry("text", "text.jpg"), "text.jpg: not an image"),
    "empty": ("unusable-image", entry("empty", "empty.png"), "empty.png is empty"),
    "bomb": (
        "unusable-image",
        entry("bomb", "bomb.png"),
        "60000 x 60000 = 3600000000 pixels exceed the limit",
    ),
    "gone": ("missing-image", entry("gone", "gone.png"), "gone.png does not exist"),
    "tags": ("image-count", entry("tags", question="no tag"), "0 <image>"),
    "mute": ("empty-answer", entry("mute", answer=""), "the answer is empty"),
    "typo": ("missing-key", {"id": "typo", "conversation": []}, "has no 'conversations'"),
    "same": ("duplicate-id", entry("same"), "more than once"),
}


@pytest.fixture
def bad_path(folder):
    good = [entry("good"), entry("jpeg", "ok.jpg"), entry("words", None, "Hello?"), entry("same")]
    return write(folder, [*good, *(item for _, item, _ in BAD.values())])


def test_every_problem_is_found(bad_path, folder):
    report = validate(bad_path, folder)
    found = {problem.sample: problem for problem in report.problems}
    assert found.keys() == BAD.keys()
    assert len(report.problems) == len(BAD)
    for name, (kind, _, message) in BAD.items():
        assert found[name].kind == kind
        assert message in found[name].message
    assert (report.samples, report.sound) == (13, 3)
    assert next(iter(report.by_kind())) == "unusable-image"
    assert report.stats["text_only"] == 1


def test_a_sample_with_two_problems_shows_both_and_shared_images_name_all_users(folder):
    entries = [
        entry("both", "cut.jpg", answer=" "),
        entry("also", "cut.jpg"),
        entry("twice", ["cut.jpg"] * 2),
    ]
    report = validate(write(folder, entries), folder, num_threads=1)
    assert [(problem.kind, problem.sample) for problem in report.problems] == [
        ("empty-answer", "both"),
        ("image-count", "twice"),
        ("unusable-image", "both"),
        ("unusable-image", "also"),
        ("unusable-image", "twice"),
    ]


def test_layout_problems_need_a_template_or_tokenizer(folder):
    turns = [*entry("x")["conversations"], *entry("x", None, "And?")["conversations"]]
    entries = [
        entry("short"),
        entry("long", answer="word " * 60),
        {"id": "rounds", "image": "ok.png", "conversations": turns},
        entry("words", None, "Hello?"),
        entry("pair", ["ok.png", "ok.png"], "<image><image>"),
    ]
    path = write(folder, entries)
    assert validate(path, folder).problems == ()
    plain = validate(path, folder, layout=Layout("plain", image_slots=1))
    assert [(problem.kind, problem.sample) for problem in plain.problems] == [
        ("conversation", "rounds"),
        ("conversation", "words"),
        ("too-many-images", "pair"),
    ]
    layout = Layout("v0", tiny_tokenizer(), seq_len=80, visual_layout=WholeImage(Slot(4)))
    report = validate(path, folder, layout=layout)
    (problem,) = report.problems
    assert (problem.kind, problem.sample) == ("overlong", "long")
    low, _, longest = report.stats["tokens"]
    assert f"has {longest} tokens" in problem.message
    assert low < 80 < longest
    assert report.stats["learned_tokens"] > 60
    exact = Layout("v0", tiny_tokenizer(), seq_len=longest, visual_layout=WholeImage(Slot(4)))
    assert validate(path, folder, layout=exact).problems == ()
    few = Layout("v0", tiny_tokenizer(), seq_len=longest, visual_layout=WholeImage(Slot(4)), label_tokens=60)
    (problem,) = validate(path, folder, layout=few).problems
    assert (problem.kind, problem.sample) == ("too-many-labels", "long")
    assert re.search(r"has 6\d supervised tokens, more than the limit of 60", problem.message)
    with pytest.raises(ValueError, match="seq_len and visual_layout only"):
        Layout("plain", tiny_tokenizer())


def test_counts_are_those_that_training_stores(folder, monkeypatch):
    """Text alone, several images, and images whose tokens depend on their size, in one process and in several."""
    Image.effect_noise((90, 30), 90).convert("RGB").save(folder / "wide.png")
    entries = [
        entry("text", None, "Hello?", "word " * 30),
        entry("one"),
        entry("wide", "wide.png"),
        entry("pair", ["wide.png", "ok.jpg"], "<image> and <image>?", "cat . word"),
    ]
    path = write(folder, entries)
    tiles = Tiles(merge="spatial_unpad", pinpoints=((1, 2), (2, 1)))
    rule = AnyRes(Slot(16, size=(32, 32)), tiles, (4, 4))
    tokenizer = tiny_tokenizer()
    reader = ImageReader(ImageProcessor.clip(32))
    encoder = RowEncoder(reader, rule, tokenizer, "v0", seq_len=4096, image_slots=8)
    prepared = tfds_llava.prepare(
        path, folder, folder / "prepared", max_image_pixels=10_000, show_progress=False
    )
    stored = sizes(prepared, encoder, folder / "sizes", threads=1)
    limit = int(stored[:, 0].max()) - 1
    layout = Layout("v0", tokenizer, limit, rule, samples_per_row=2)
    monkeypatch.setattr("mllm_jax.data.validate.MANY", 2)
    monkeypatch.setattr("mllm_jax.data.validate.CHUNK", 3)
    for workers in (1, 2):
        report = validate(path, folder, layout=layout, workers=workers)
        assert report.counts.needs.tolist() == stored.tolist()
        assert report.counts.images.tolist() == [0, 1, 1, 2]
    assert len(set(report.counts.visual.tolist())) == 4  # the wide image's depend on its size
    rows = report.stats["rows"]
    fits = stored[:, 0] <= limit
    assert rows["over_row"] == (~fits).sum() == 1
    assert rows["useful_alone"] == pytest.approx(stored[fits, 0].mean() / limit)
    assert rows["useful_packed"] == pytest.approx(stored[fits, 0].sum() / limit / rows["rows_packed"])
    assert [(one["images"], one["samples"]) for one in rows["by_images"]] == [(0, 1), (1, 2), (2, 1)]
    assert sum(one["visual_tokens"] for one in rows["by_images"]) == report.stats["visual_tokens"]


def test_unreadable_files_and_missing_folders_are_problems(folder):
    path = folder / "data.json"
    path.write_text('{"id": 3}')
    (problem,) = validate(path, folder).problems
    assert (problem.kind, problem.sample) == ("unreadable-file", "")
    assert "expected a JSON list" in problem.message
    assert validate(path, folder).samples == 0
    (problem,) = validate(write(folder, [entry("a"), entry("b", None, "?")]), None).problems
    assert (problem.kind, problem.sample) == ("no-image-folder", "a")


def tiny_tokenizer():
    words = ["<unk>", "word", "cat", "What", "?", "."]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, "<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def test_command_reports_and_exits_with_one(bad_path, folder, capsys):
    report_path = folder / "report.json"
    arguments = ["--json", str(bad_path), "--images", str(folder), "--show", "2"]
    assert main(["validate", *arguments, "--json-report", str(report_path)]) == 1
    output = capsys.readouterr().out
    assert "unusable-image: 4" in output
    assert "and 2 more" in output
    assert "9 problems; 10 of 13 samples affected" in output
    report = json.loads(report_path.read_text(encoding="utf-8"))
    assert {problem["sample"] for problem in report["problems"]} == BAD.keys()
    assert report["counts"]["unusable-image"] == 4
    assert (report["samples"], report["sound"]) == (13, 3)


def test_command_is_content_with_sound_data(folder, capsys):
    path = write(folder, [entry("good"), entry("jpeg", "ok.jpg")])
    assert main(["validate", "--json", str(path), "--images", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "2 samples, 2 answers, 2 images" in output
    assert "No problems found." in output
    assert "Lengths were not checked" in output


def test_command_checks_lengths_with_a_tokenizer(folder, capsys):
    tiny_tokenizer().save_pretrained(folder / "tokenizer")
    path = write(folder, [entry("good"), entry("long", answer="word " * 60)])
    arguments = ["validate", "--json", str(path), "--images", str(folder), "--template", "v0"]
    arguments += ["--tokenizer", str(folder / "tokenizer"), "--tokens-per-image", "4", "--seq-len"]
    assert main([*arguments, "80"]) == 1
    assert "overlong: 1" in capsys.readouterr().out
    assert main([*arguments, "400"]) == 0
    assert "learned tokens" in capsys.readouterr().out
    assert main([*arguments, "400", "--label-tokens", "60"]) == 1
    assert "too-many-labels: 1" in capsys.readouterr().out
    assert main([*arguments, "400", "--plot", str(folder / "plots/tokens.png")]) == 0
    said = capsys.readouterr().out
    assert re.search(
        r"rows of 400: 0 of 2 samples .*used with one sample a row, .* with packing \(1 rows\)", said
    )
    with Image.open(folder / "plots/tokens.png") as plot:
        assert plot.size == (1725, 540)


def test_command_takes_what_a_recipe_decides(folder, capsys):
    path = write(folder, [entry("good", question="<image>\nWhat is it?"), entry("long", answer="red " * 60)])
    arguments = ["validate", "--json", str(path), "--images", str(folder), "--config", "own_data"]
    assert main(arguments) == 0
    assert "rows of 512" in capsys.readouterr().out
    assert (
        main(
            [
                *arguments,
                "--set",
                "data.seq_len=160",
                "model.connector.name=average_pool",
                "model.connector.average_pool.tokens=36",
            ]
        )
        == 0
    )
    assert main([*arguments, "--set", "data.seq_len=160"]) == 1
    assert "overlong: 1" in capsys.readouterr().out
    for wrong, message in (
        (["--seq-len", "9"], "--seq-len: the recipe decides this"),
        (["--stage", "pretrian"], "the recipe has pretrain, finetune"),
        (["--set", "data.sequ_len=9"], "did you mean"),
        (["--config", "own_date"], "there is no recipe own_date"),
    ):
        assert main([*arguments, *wrong]) == 2
        assert message in capsys.readouterr().err


def test_command_takes_the_shipped_tokenizer(folder, capsys):
    path = write(folder, [entry("good"), entry("long", answer="red " * 60)])
    arguments = ["validate", "--json", str(path), "--images", str(folder), "--template", "mini"]
    arguments += ["--tokenizer", "mini", "--tokens-per-image", "4", "--seq-len", "60"]
    assert main(arguments) == 1
    assert "overlong: 1" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--tokenizer", "x"], "--tokenizer needs --template and --seq-len and --tokens-per-image too"),
        (["--seq-len", "9"], "need --tokenizer too"),
        (["--label-tokens", "9"], "need --tokenizer too"),
        (["--image-slots", "9"], "--image-slots needs --template too"),
        (["--plot", "x.png"], "--plot needs --tokenizer or --config"),
        (["--template", "vicuna"], "did you mean 'vicuna_v1'"),
    ],
)
def test_options_that_do_not_go_together(folder, capsys, options, message):
    assert main(["validate", "--json", "data.json", "--images", str(folder), *options]) == 2
    assert message in capsys.readouterr().err


def test_a_path_that_is_not_there_is_one_message(folder, capsys):
    path = write(folder, [entry("a")])
    for wrong in (
        ["--json", str(folder / "dta.json")],
        ["--json", str(path), "--images", str(folder / "pics")],
    ):
        assert main(["validate", *wrong]) == 2
        output = capsys.readouterr()
        assert f"{wrong[-2]} {wrong[-1]}: no such" in output.err
        assert not output.out


def test_unknown_and_missing_verbs_show_the_table(capsys):
    assert main(["validat"]) == 2
    assert "did you mean 'validate'?" in capsys.readouterr().err
    assert main([]) == 2
    assert main(["--help"]) == 0
    assert "convert" in capsys.readouterr().out


def test_verbs_are_imported_only_when_called(monkeypatch):
    for name in [name for name in sys.modules if name.startswith("mllm_jax.cli.validate")]:
        monkeypatch.delitem(sys.modules, name)
    assert main(["--help"]) == 0
    assert "mllm_jax.cli.validate" not in sys.modules


def question(number, image="ok.png", **fields):
    return {"question_id": number, "image": image, "question": "What?", "answer": "cat"} | fields


def test_questions_are_recognised_and_their_images_read(folder, capsys):
    path = write(folder, [question("1"), question("2", "ok.jpg"), question("3", None)])
    assert main(["validate", "--json", str(path), "--images", str(folder)]) == 0
    output = capsys.readouterr().out
    assert "benchmark 'vqa'" in output
    assert "3 samples, 3 answers, 2 images, 1 text-only" in output
    path = write(folder, [question("1", "no.png"), question("2", "../secret.png"), question("3")])
    assert (
        main(
            [
                "validate",
                "--json",
                str(path),
                "--images",
                str(folder),
                "--json-report",
                str(folder / "r.json"),
            ]
        )
        == 1
    )
    report = json.loads((folder / "r.json").read_text(encoding="utf-8"))
    assert sorted(problem["sample"] for problem in report["problems"]) == ["1", "2"]
    assert any("must be relative" in problem["message"] for problem in report["problems"])
    path = write(folder, [question("1"), question("2", question="<image>\nWhat?")])
    assert main(["validate", "--json", str(path), "--images", str(folder)]) == 1
    assert "question '2' holds <image>" in " ".join(capsys.readouterr().out.split())


def test_what_would_be_left_out_is_said(bad_path, folder, capsys):
    main(["validate", "--json", str(bad_path), "--images", str(folder)])
    report = validate(bad_path, folder)
    kinds = {p.sample: p.kind for p in report.problems if p.kind != "duplicate-id"}
    assert report.broken == len(kinds)
    assert f"data.broken=skip leaves {report.broken} samples out" in capsys.readouterr().out


def test_names_with_half_characters_can_be_shown_and_stored(folder, capsys):
    path = folder / "half.json"
    path.write_text(json.dumps([entry("cut \ud83d"), entry("b", answer="\ud83d")]))
    assert (
        main(
            [
                "validate",
                "--json",
                str(path),
                "--images",
                str(folder),
                "--json-report",
                str(folder / "r.json"),
            ]
        )
        == 1
    )
    assert len(json.loads((folder / "r.json").read_text(encoding="utf-8"))["problems"]) == 2
