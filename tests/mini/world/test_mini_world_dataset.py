"""Writing mini-world data sets: LLaVA's format, reuse, refusal of a mismatch, the balanced benchmark."""

import json
from collections import Counter

import numpy as np
import pytest
from PIL import Image

from mllm_jax.data.images import image_size
from mllm_jax.data.llava_json import iter_problems, read_records
from mllm_jax.mini.world import (
    ABILITIES,
    DatasetMismatchError,
    dataset,
    render_array,
    sample_scene,
    write_benchmark,
    write_split,
)


def listing(root):
    return {p.name: (p.stat().st_mtime_ns, p.stat().st_size) for p in root.rglob("*") if p.is_file()}


@pytest.mark.parametrize("stage", ["caption", "instruct"])
def test_split_is_sound_llava_data(tmp_path, stage):
    path = write_split(tmp_path, "finetune", 60, stage, seed=1, progress=False)
    assert not list(iter_problems(path, tmp_path / "images"))
    records = list(read_records(path, tmp_path / "images"))
    assert len(records) == 60
    rows = json.loads(path.read_text())
    pictured = [r for r in rows if "image" in r]
    turns = Counter(len(r["conversations"]) for r in rows)
    if stage == "caption":
        assert len(pictured) == 60
        assert turns == {2: 60}
    else:
        assert 45 <= len(pictured) < 60
        assert turns[12] > 20
        text = [t["value"] for r in rows for t in r["conversations"][::2]]
        assert 0.3 < np.mean(["\nA. " in t for t in text]) < 0.7
    for row in pictured[:5]:
        index = int(row["id"].rsplit("_", 1)[1])
        picture = np.asarray(Image.open(tmp_path / "images" / row["image"]))
        assert np.array_equal(picture, render_array(sample_scene(1, index, "finetune")))
        assert row["conversations"][0]["value"].startswith("<image>\n")


def test_framed_images_hold_the_same_scenes_at_many_aspect_ratios(tmp_path):
    plain = write_split(tmp_path / "plain", "finetune", 12, "caption", seed=1, progress=False)
    framed = write_split(tmp_path / "framed", "finetune", 12, "caption", seed=1, progress=False, framed=True)
    assert plain.read_text() == framed.read_text()
    shapes = set()
    for row in json.loads(plain.read_text()):
        scene, canvas = (
            np.asarray(Image.open(path.parent / "images" / row["image"])) for path in (plain, framed)
        )
        side, (height, width) = len(scene), canvas.shape[:2]
        assert side == min(height, width) <= max(height, width) <= 2.2 * side
        places = [
            canvas[y : y + side, x : x + side]
            for y in range(height - side + 1)
            for x in range(width - side + 1)
        ]
        assert sum(np.array_equal(place, scene) for place in places) == 1
        shapes.add((height, width))
    assert len(shapes) > 8
    assert any(height > width for height, width in shapes)
    assert any(height < width for height, width in shapes)
    with pytest.raises(DatasetMismatchError, match="framed"):
        write_split(tmp_path / "framed", "finetune", 12, "caption", seed=1, progress=False)


@pytest.mark.parametrize("framed", [False, True])
def test_several_processes_write_what_one_writes(framed, tmp_path, monkeypatch):
    one = write_split(tmp_path / "one", "finetune", 13, "instruct", seed=3, progress=False, framed=framed)
    monkeypatch.setattr(dataset, "IN_PROCESSES", 1)
    monkeypatch.setattr(dataset, "_CHUNK", 3)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    two = write_split(tmp_path / "two", "finetune", 13, "instruct", seed=3, progress=False, framed=framed)
    files = [
        {
            path.relative_to(root.parent): path.read_bytes()
            for path in root.parent.rglob("*")
            if path.is_file()
        }
        for root in (one, two)
    ]
    assert files[0] == files[1]
    assert len(files[0]) > 10


def test_a_call_that_was_stopped_goes_on(tmp_path, monkeypatch):
    whole = write_split(tmp_path / "whole", "finetune", 13, "instruct", seed=3, progress=False).parent
    drawn = []

    def render(scene):
        drawn.append(scene)
        if len(drawn) == 7:
            raise KeyboardInterrupt
        return original(scene)

    original = dataset.render
    monkeypatch.setattr(dataset, "render", render)
    root = tmp_path / "stopped"
    with pytest.raises(KeyboardInterrupt):
        write_split(root, "finetune", 13, "instruct", seed=3, progress=False)
    write_split(root, "finetune", 13, "instruct", seed=3, progress=False)
    images = len(list((whole / "images").iterdir()))
    assert len(drawn) == images + 1  # of those that were there, none again
    for path in whole.rglob("*"):
        other = root / path.relative_to(whole)
        assert path.is_dir() or other.read_bytes() == path.read_bytes()
    assert len(list(root.rglob("*"))) == len(list(whole.rglob("*")))

    drawn.clear()
    with pytest.raises(KeyboardInterrupt):  # other parameters keep nothing
        write_split(tmp_path / "other", "finetune", 13, "instruct", seed=3, progress=False)
    drawn[:] = [None] * 7
    other = write_split(tmp_path / "other", "finetune", 13, "instruct", seed=4, progress=False)
    assert len(drawn) == 7 + sum("image" in row for row in json.loads(other.read_text()))


def test_a_call_goes_on_when_another_has_finished_the_same(tmp_path, monkeypatch):
    def render(scene):
        monkeypatch.undo()
        call()
        return original(scene)

    def call():
        return write_split(tmp_path, "finetune", 3, "caption", seed=3, progress=False)

    original = dataset.render
    monkeypatch.setattr(dataset, "render", render)
    path = call()
    assert call() == path
    assert sorted(p.name for p in tmp_path.iterdir()) == ["finetune.json", "finetune.manifest.json", "images"]


def test_processes_run_no_module_of_the_current_folder(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('the wrong json')\n")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(dataset, "IN_PROCESSES", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    path = write_split(tmp_path / "out", "pretrain", 3, "caption", seed=0, progress=False)
    assert len(json.loads(path.read_text())) == 3


def test_a_process_that_fails_is_noticed(tmp_path, monkeypatch):
    monkeypatch.setattr(dataset, "IN_PROCESSES", 1)
    monkeypatch.setattr("os.cpu_count", lambda: 2)
    monkeypatch.setattr("sys.executable", "/bin/false")
    with pytest.raises(RuntimeError, match="ended early"):
        write_split(tmp_path, "pretrain", 3, "caption", seed=0, progress=False)
    assert not list(tmp_path.glob("*.json"))


def test_a_finished_data_set_is_reused(tmp_path):
    write_split(tmp_path, "pretrain", 5, "caption", seed=0, progress=False)
    before = listing(tmp_path)
    write_split(tmp_path, "pretrain", 5, "caption", seed=0, progress=False)
    assert listing(tmp_path) == before


def test_another_request_names_the_difference(tmp_path):
    write_split(tmp_path, "pretrain", 5, "caption", seed=0, progress=False)
    before = listing(tmp_path)
    with pytest.raises(DatasetMismatchError, match=r"n is 5, asked for 6, seed is 0, asked for 2"):
        write_split(tmp_path, "pretrain", 6, "caption", seed=2, progress=False)
    assert listing(tmp_path) == before


def test_a_changed_generator_is_noticed(tmp_path, monkeypatch):
    write_split(tmp_path, "pretrain", 2, "caption", seed=0, progress=False)
    monkeypatch.setattr(dataset, "LOOK_VERSION", -1)
    with pytest.raises(DatasetMismatchError, match="look is"):
        write_split(tmp_path, "pretrain", 2, "caption", seed=0, progress=False)


def test_an_unfinished_data_set_is_finished(tmp_path, monkeypatch):
    whole = write_split(tmp_path / "whole", "pretrain", 4, "caption", seed=0, progress=False)
    real, calls = dataset.render, []

    def killed(scene):
        calls.append(scene)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(scene)

    monkeypatch.setattr(dataset, "render", killed)
    with pytest.raises(KeyboardInterrupt):
        write_split(tmp_path / "cut", "pretrain", 4, "caption", seed=0, progress=False)
    assert not list((tmp_path / "cut").glob("*.json"))
    monkeypatch.setattr(dataset, "render", real)
    again = write_split(tmp_path / "cut", "pretrain", 4, "caption", seed=0, progress=False)
    assert again.read_bytes() == whole.read_bytes()
    names = {p.name for p in (tmp_path / "cut" / "images").iterdir()}
    assert names == {p.name for p in (tmp_path / "whole" / "images").iterdir()}


def test_foreign_or_damaged_data_is_not_overwritten(tmp_path):
    (tmp_path / "pretrain.json").write_text("[]")
    with pytest.raises(DatasetMismatchError, match=r"exists without pretrain\.manifest\.json"):
        write_split(tmp_path, "pretrain", 2, "caption", seed=0, progress=False)
    assert (tmp_path / "pretrain.json").read_text() == "[]"
    path = write_split(tmp_path / "b", "pretrain", 2, "caption", seed=0, progress=False)
    path.unlink()
    with pytest.raises(DatasetMismatchError, match=r"pretrain\.json is gone"):
        write_split(tmp_path / "b", "pretrain", 2, "caption", seed=0, progress=False)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"split": "mini"}, "cannot write training data of split 'mini'"),
        ({"split": "train"}, "one of foundation, pretrain, finetune"),
        ({"stage": "captions"}, "unknown stage 'captions'; one of caption, instruct"),
        ({"n": 0}, "at least one sample"),
    ],
)
def test_bad_requests(tmp_path, kwargs, message):
    with pytest.raises(ValueError, match=message):
        write_split(tmp_path, **{"split": "pretrain", "n": 3, "stage": "caption", "seed": 0, **kwargs})
    assert not list(tmp_path.iterdir())


def test_benchmark_rows(tmp_path):
    path = write_benchmark(tmp_path, 6, seed=0, progress=False)
    rows = json.loads(path.read_text())
    assert Counter(r["ability"] for r in rows) == dict.fromkeys(ABILITIES, 6)
    assert len({r["question_id"] for r in rows}) == len(rows)
    for row in rows:
        assert list(row) == ["question_id", "image", "ability", "group", "question", "options", "answer"]
        assert row["group"] == ABILITIES[row["ability"]].group
        assert row["answer"] in row["options"]
        assert (tmp_path / "images" / row["image"]).exists()
    before = listing(tmp_path)
    write_benchmark(tmp_path, 6, seed=0, progress=False)
    assert listing(tmp_path) == before
    framed = write_benchmark(tmp_path / "framed", 1, seed=0, progress=False, framed=True)
    sizes = {image_size(path.read_bytes(), source=path.name) for path in (framed.parent / "images").iterdir()}
    assert len(sizes) > 5
    assert all(min(size) == 112 and max(size) <= 112 * 2.2 for size in sizes)
    with pytest.raises(DatasetMismatchError, match="n_per_ability is 6, asked for 7"):
        write_benchmark(tmp_path, 7, seed=0, progress=False)


def test_benchmark_answers_are_balanced_and_each_scene_asked_once_per_ability():
    pairs = dataset.benchmark_questions(40, seed=0)
    for ability in ABILITIES:
        mine = [(index, q) for index, q in pairs if q.ability == ability]
        assert len({index for index, _ in mine}) == 40
        counts = Counter(q.answer for _, q in mine)
        assert max(counts.values()) <= 40 * 0.3, (ability, counts)
    with pytest.raises(ValueError, match="at least one question"):
        dataset.benchmark_questions(0, seed=0)
