import dataclasses
import json
import shutil

import jax
import numpy as np
import pytest
from PIL import Image
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mllm_jax.data.images import ImageError
from mllm_jax.data.preprocessing import ImageProcessor
from mllm_jax.data.reading import DataError
from mllm_jax.data.tokens import SampleTooLong
from mllm_jax.data.video import read_frames
from mllm_jax.evaluation import answer as answer_module
from mllm_jax.evaluation.answer import Settings, answer_benchmark
from mllm_jax.evaluation.benchmarks import BenchmarkError, read_benchmark
from mllm_jax.evaluation.media import BLIND, PREDICTIONS, SINGLE_FRAME, Media, watching
from mllm_jax.evaluation.store import AnswerFile, StoreError, check_manifest
from mllm_jax.inference.beam_sampling import BeamSampling
from mllm_jax.inference.generate import Generation
from mllm_jax.inference.model import Model
from mllm_jax.mini.world.videos import write_benchmark
from mllm_jax.models import mllm
from mllm_jax.models.decoder import DecoderConfig
from mllm_jax.models.vit import VisionConfig
from mllm_jax.parallel.processes import OtherProcessError

SETTINGS = Settings(max_new_tokens=3, batch_size=8, buckets=(128, 192))
HALF = (0.5, 0.5, 0.5)


def make_tokenizer():
    """Bytes as tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {token: index for index, token in enumerate(["<pad>", "<s>", "</s>", *alphabet])}
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )


def make_model(seed=0, **changes):
    tokenizer = make_tokenizer()
    config = mllm.ModelConfig(
        vision=VisionConfig(
            16, 2, 2, 32, 4, 8, class_token=False, pre_norm=False, patch_bias=True, mean=HALF, std=HALF
        ),
        llm=DecoderConfig(len(tokenizer), 16, 2, 2, 1, 8, 24, max_positions=256),
        image_size=8,
    )
    params = jax.jit(mllm.init, static_argnums=0)(config, jax.random.key(seed))
    params = jax.tree.map(lambda leaf: leaf * (12 if leaf.ndim > 1 else 1), params)
    bundle = Model(config, params, tokenizer, ImageProcessor.siglip(8), "mini")
    return dataclasses.replace(bundle, **changes)


@pytest.fixture(scope="module")
def model():
    return make_model()


QUESTIONS = [
    ("scene_0", "a.png", "scene", "coarse", ["sea", "city", "snow"], "sea"),
    ("scene_1", "b.png", "scene", "coarse", ["snow", "sea", "city"], "sea"),
    ("scene_2", "c.png", "scene", "coarse", ["city", "snow"], "snow"),
    ("count_0", "a.png", "counting", "fine", ["1", "2", "3"], "2"),
    ("count_1", "b.png", "counting", "fine", ["3", "2", "1"], "3"),
]


@pytest.fixture
def mini(tmp_path):
    """A small benchmark in the files' form."""
    rng = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for name in "abc":
        pixels = rng.integers(0, 256, (9, 12, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "images" / f"{name}.png")
    keys = ("question_id", "image", "ability", "group", "options", "answer")
    rows = [dict(zip(keys, values, strict=True)) | {"question": "what is it?"} for values in QUESTIONS]
    path = tmp_path / "mini.json"
    path.write_text(json.dumps(rows))
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def run(model, kind, path, out, settings=SETTINGS, **options):
    return answer_benchmark(model, read_benchmark(kind, path), out, settings, name=kind, **options)


def test_mini_end_to_end(model, mini, tmp_path):
    out = tmp_path / "out"
    scores = run(model, "mini", mini, out, likelihood=True)
    assert scores == json.loads((out / "scores.json").read_text())
    assert scores["n"] == 5
    assert set(scores["subtasks"]) == {"scene", "counting"}
    assert set(scores["groups"]) == {"coarse", "fine"}
    rotations = 3 + 3 + 2 + 3 + 3
    for name, count in (
        ("predictions", rotations),
        ("blind", rotations),
        ("majority", rotations),
        ("likelihood", rotations),
        ("predictions_open", 5),
        ("blind_open", 5),
        ("majority_open", 5),
    ):
        assert len(lines(out / f"{name}.jsonl")) == count, name
    row = next(
        r for r in lines(out / "predictions.jsonl") if r["rotation"] == 1 and r["question_id"] == "count_0"
    )
    assert row["options"] == ["2", "3", "1"]
    assert row["prompt"] == "what is it?\nA. 2\nB. 3\nC. 1\nAnswer with one of the options."
    assert {"text", "parsed", "how", "stopped", "new_tokens", "answer", "ability", "group"} <= set(row)
    # The majority answers "sea" where it is offered: right twice of three, under every rotation; "snow" is then
    # the only one left. Counts 2 and 3 are equally frequent, so "2" is right once.
    assert scores["majority"]["counts"] == {"scene": [3, 3], "counting": [1, 2]}
    assert scores["open"]["majority"]["counts"] == {"scene": [2, 3], "counting": [1, 2]}
    likely = lines(out / "likelihood.jsonl")
    assert all(r["text"] == r["options"][int(np.argmax(r["log_likelihoods"]))] for r in likely)
    assert all(max(r["log_likelihoods"]) < 0 for r in likely)


def test_questions_about_videos(model, tmp_path):
    pytest.importorskip("av")
    path = write_benchmark(tmp_path / "mini_video", 1, seed=0, progress=False)
    scores = run(model, "mini_video", path, tmp_path / "out")
    assert (scores["n"], set(scores["subtasks"])) == (3, {"direction", "order", "count"})
    assert set(scores["open"]) == {"predictions", "single_frame", "blind", "majority"}
    found = {
        name: lines(tmp_path / "out" / f"{name}.jsonl") for name in ("predictions", "single_frame", "blind")
    }
    assert [len(rows) for rows in found.values()] == [12, 12, 12]
    assert json.loads((tmp_path / "out" / "manifest.json").read_text())["video"]["frames"] == 8
    assert [row["text"] for row in found["predictions"]] != [row["text"] for row in found["single_frame"]]
    whole, single = ([row for row in rows if not row["rotation"]] for rows in list(found.values())[:2])
    videos = [path.parent / "videos" / row["video"] for row in whole]
    prompts = [row["prompt"] for row in whole]
    said = model.generate(video=videos, prompt=prompts, max_new_tokens=3)
    assert said == [row["text"] for row in whole]
    frames = [read_frames(video, 1)[0] for video in videos]
    assert model.generate(frames, prompts, max_new_tokens=3) == [row["text"] for row in single]


def test_own_questions_about_folders_of_frames(model, tmp_path):
    (tmp_path / "videos" / "clip").mkdir(parents=True)
    pixels = np.random.default_rng(0).integers(0, 256, (3, 9, 12, 3), dtype=np.uint8)
    for number, frame in enumerate(pixels):
        Image.fromarray(frame).save(tmp_path / "videos" / "clip" / f"{number}.png")
    row = {"question_id": "1", "video": "clip", "question": "what is it?", "answer": "x"}
    (tmp_path / "vqa.json").write_text(json.dumps([row]))
    benchmark = read_benchmark("vqa", tmp_path / "vqa.json")
    (question,) = benchmark.questions
    seeing = watching(model, benchmark, {"frames": 2})
    shown = {}
    for condition in (PREDICTIONS, SINGLE_FRAME, BLIND):
        media = Media(seeing, benchmark, condition)
        (layout,), (key,) = media.layouts(question), media.keys(question)
        shown[condition] = media.load(key, layout)
        assert len(shown[condition]) == len(layout.slots)
    assert [len(slots) for slots in shown.values()] == [2, 1, 2]
    np.testing.assert_array_equal(shown[PREDICTIONS], [model.processor(pixels[i]) for i in (0, 1)])
    np.testing.assert_array_equal(shown[SINGLE_FRAME][0], model.processor(pixels[1]))
    assert len(np.unique(shown[BLIND])) == 1
    with pytest.raises(BenchmarkError, match=r"wider than|more than a frame"):
        watching(model, benchmark, {"window": 99})
    (tmp_path / "vqa.json").write_text(json.dumps([row | {"image": "a.png"}]))
    with pytest.raises(BenchmarkError, match="without an 'image' beside it"):
        read_benchmark("vqa", tmp_path / "vqa.json")


def test_blind_answers_do_not_depend_on_the_picture(model, mini, tmp_path):
    run(model, "mini", mini, tmp_path / "out")
    texts = {}
    for row in lines(tmp_path / "out" / "blind_open.jsonl"):
        texts.setdefault(row["prompt"], set()).add(row["text"])
    assert all(len(found) == 1 for found in texts.values())
    seen = {row["text"] for row in lines(tmp_path / "out" / "predictions_open.jsonl")}
    assert len(seen) > 1  # the same question about three pictures


def test_a_benchmark_that_samples(model, mini, tmp_path, monkeypatch):
    benchmark = read_benchmark("mini", mini)
    monkeypatch.setattr(type(benchmark), "sampling", BeamSampling(seed=7))
    settings = []

    def drawing(config, params, requests, tokenizer, **given):
        settings.append(given["sampling"])
        return (Generation(request.id, (5,), "sea", True) for request in requests)

    monkeypatch.setattr(answer_module, "generate", drawing)
    out = tmp_path / "out"
    answer_benchmark(model, benchmark, out, SETTINGS, name="mini", blind=False)
    assert settings == [BeamSampling(7)]
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["sampling"] == {"seed": 7, "beams": 5, "temperature": 1.0, "top_k": 50}
    monkeypatch.setattr(type(benchmark), "sampling", BeamSampling(seed=8))
    with pytest.raises(StoreError, match="sampling"):  # answers of two seeds are not mixed
        answer_benchmark(model, benchmark, out, SETTINGS, name="mini", blind=False)


def test_stopped_run_goes_on_where_it_was(model, mini, tmp_path, monkeypatch):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    run(model, "mini", mini, whole)
    run(model, "mini", mini, broken)
    path = broken / "predictions.jsonl"
    kept = path.read_bytes().split(b"\n")
    path.write_bytes(b"\n".join(kept[:6]) + b"\n" + kept[6][:25])  # killed while writing the seventh line
    (broken / "blind_open.jsonl").unlink()
    asked = []
    original = answer_module.generate

    def counting(config, params, requests, *args, **settings):
        def tap():
            for request in requests:
                asked.append(request.id)
                yield request

        return original(config, params, tap(), *args, **settings)

    monkeypatch.setattr(answer_module, "generate", counting)
    scores = run(model, "mini", mini, broken)
    assert len(asked) == 14 - 6 + 5
    for name in ("predictions", "blind", "predictions_open", "blind_open"):
        assert (broken / f"{name}.jsonl").read_bytes() == (whole / f"{name}.jsonl").read_bytes(), name
    assert scores == json.loads((whole / "scores.json").read_text())


def test_answers_that_cannot_be_written_end_every_process(model, mini, tmp_path, monkeypatch, as_processes):
    """Only the first one writes; the other would go on alone to the next batch, and wait in it."""
    asked = [[], []]

    def answering(config, params, requests, tokenizer, **_):
        for request in requests:
            asked[jax.process_index()].append(request.id)
            yield Generation(request.id, (5,), "A", True)

    def full(file, row):
        if file._file is not None:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(answer_module, "generate", answering)
    monkeypatch.setattr(answer_module, "MEETING", 4)
    monkeypatch.setattr(AnswerFile, "append", full)
    found = as_processes(lambda _: run(model, "mini", mini, tmp_path / "out", blind=False))
    assert [type(error) for error in found] == [OSError, OtherProcessError]
    assert asked[0] == asked[1]
    assert len(asked[0]) == 4


def test_processes_go_on_together_from_one_folder_and_refuse_folders_of_their_own(
    model, mini, tmp_path, monkeypatch, as_processes
):
    asked = [[], []]

    def answering(config, params, requests, tokenizer, **_):
        for request in requests:
            asked[jax.process_index()].append(request.id)
            yield Generation(request.id, (5,), "A", True)

    monkeypatch.setattr(answer_module, "generate", answering)

    def stopped(out):
        """A run of two processes, as it was after six answers."""
        outcomes = as_processes(lambda _: run(model, "mini", mini, out, blind=False))
        assert isinstance(outcomes[0], dict), outcomes[0]
        path = out / "predictions.jsonl"
        path.write_text("".join(path.read_text().splitlines(keepends=True)[:6]))
        for ids in asked:
            ids.clear()

    stopped(tmp_path / "common")
    as_processes(lambda _: run(model, "mini", mini, tmp_path / "common", blind=False))
    assert len(asked[0]) == 14 - 6
    assert asked[0] == asked[1]
    assert len(lines(tmp_path / "common" / "predictions.jsonl")) == 14  # only the first one writes

    stopped(tmp_path / "own0")
    outcomes = as_processes(lambda index: run(model, "mini", mini, tmp_path / f"own{index}", blind=False))
    assert asked == [[], []]
    for index, (outcome, left) in enumerate(zip(outcomes, (8, 19), strict=True)):
        assert isinstance(outcome, StoreError), outcome
        assert f"own{index}: the processes of this run do not find the same predictions" in str(outcome)
        assert f"process {index} has {left} of 19 left" in str(outcome)
        assert "to a shared disk and give that as --out" in str(outcome)


def test_answers_of_others_are_refused(model, mini, tmp_path):
    out = tmp_path / "out"
    run(model, "mini", mini, out, blind=False)
    before = (out / "predictions.jsonl").read_bytes()
    with pytest.raises(StoreError, match=r"out holds answers .*\(of another model\)"):
        run(make_model(seed=1), "mini", mini, out)
    with pytest.raises(StoreError, match="max_new_tokens: 3 there, 4 now"):
        run(model, "mini", mini, out, dataclasses.replace(SETTINGS, max_new_tokens=4))
    rows = json.loads(mini.read_text())
    rows[0]["answer"] = "city"
    mini.write_text(json.dumps(rows))
    with pytest.raises(StoreError, match=r"\(to other questions\)"):
        run(model, "mini", mini, out)
    assert (out / "predictions.jsonl").read_bytes() == before
    (out / "manifest.json").unlink()
    with pytest.raises(StoreError, match=r"no manifest.json says whose"):
        check_manifest(out, {})


def test_damaged_and_repeated_lines_name_the_line(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"question_id": 1}\n{"questi\n{"question_id": 2}\n')
    with pytest.raises(StoreError, match="line 2 is damaged"):
        AnswerFile(path)
    path.write_text('{"question_id": 1}\n{"question_id": "1", "rotation": 0}\n')
    with pytest.raises(StoreError, match=r"line 2 answers .* a second time"):
        AnswerFile(path)
    path.write_text('{"question_id": 1}\n{"question_id": 2}')
    assert len(AnswerFile(path, writable=False).rows) == 1
    assert path.read_text().endswith("2}")
    with AnswerFile(path) as file:
        file.append({"question_id": 2, "text": "…\u2028"})
    assert [row["question_id"] for row in AnswerFile(path).rows.values()] == [1, 2]


def test_vqa_and_its_baselines(model, mini, tmp_path):
    rows = [
        {"question_id": i, "image": f"{'abc'[i % 3]}.png", "question": "color?", "answer": answer}
        | ({"ability": ability, "group": "fine"} if ability else {})
        for i, (answer, ability) in enumerate(
            [("red", "color"), ("red", "color"), ("blue", "color"), ("yes", "yes_no"), ("no", "yes_no")]
        )
    ]
    path = tmp_path / "vqa.json"
    path.write_text(json.dumps(rows))
    scores = run(model, "vqa", path, tmp_path / "out")
    assert scores["n"] == 5
    assert scores["majority"]["subtasks"] == {"color": 2 / 3, "yes_no": 1 / 2}
    assert scores["majority"]["groups"] == {"fine": (2 / 3 + 1 / 2) / 2}
    assert {"score", "unparsed", "blind"} <= set(scores)
    texts = {row["question_id"]: row["text"] for row in lines(tmp_path / "out" / "majority.jsonl")}
    assert texts == {0: "red", 1: "red", 2: "red", 3: "no", 4: "no"}


def test_captions_from_folder_and_list(model, mini, tmp_path):
    plain = dataclasses.replace(model, template="plain")
    scores = run(plain, "caption", mini.parent / "images", tmp_path / "folder", likelihood=True)
    assert scores["n"] == 3
    assert scores["score"] is None
    found = lines(tmp_path / "folder" / "predictions.jsonl")
    assert [row["image"] for row in found] == ["a.png", "b.png", "c.png"]
    assert not (tmp_path / "folder" / "blind.jsonl").exists()
    assert not any("\n" in row["text"] for row in found)
    path = tmp_path / "captions.json"
    of_video = {"video": "frames", "question_id": "v"}
    path.write_text(
        json.dumps(
            [{"image": "b.png", "video": "", "captions": ["one", "two"], "question_id": "b"}, of_video]
        )
    )
    (tmp_path / "videos" / "frames").mkdir(parents=True)
    for name in ("a.png", "b.png"):
        shutil.copyfile(mini.parent / "images" / name, tmp_path / "videos" / "frames" / name)
    run(plain, "caption", path, tmp_path / "list")
    row, shown = lines(tmp_path / "list" / "predictions.jsonl")
    assert (row["image"], row["captions"]) == ("b.png", ["one", "two"])
    assert row["text"] == found[1]["text"]
    assert [each["prompt"] for each in (row, shown)] == [
        f"Describe the {it} briefly." for it in ("image", "video")
    ]


@pytest.mark.parametrize(
    ("kind", "content", "message"),
    [
        ("minni", "[]", "no benchmark 'minni'; did you mean 'mini'"),
        ("vqa", "[]", "holds no question"),
        ("vqa", "{}", "expected a list"),
        ("vqa", "nonsense", "not valid JSON"),
        ("vqa", "[3]", "entry #0 is no JSON object"),
        ("vqa", '[{"question_id": 1, "question": "q"}]', "entry 1: 'answer' must be a str"),
        ("vqa", '[{"question_id": 1, "question": "q", "answer": " "}]', "entry 1: 'answer' is empty"),
        ("vqa", '[{"id": "a", "conversations": []}]', "entry '#0': 'question_id' .* this is training data"),
        (
            "vqa",
            '[{"question_id": 1, "question": "q", "answer": "a", "image": 5}]',
            "entry 1: 'image' must be a file name",
        ),
        (
            "vqa",
            '[{"question_id": 1, "question": "q", "answer": "a"}, {"question_id": 1, "question": "r", "answer": "a"}]',
            "question id 1 occurs twice",
        ),
        (
            "mini",
            '[{"question_id": "x", "ability": "a", "group": "g", "question": "q",'
            ' "answer": "1", "options": ["2", "3"]}]',
            "entry 'x': 'options' must be",
        ),
        ("caption", '[{"question_id": 1}]', "entry 1 has no 'image'"),
    ],
)
def test_unusable_benchmarks_are_named(tmp_path, kind, content, message):
    path = tmp_path / "b.json"
    path.write_text(content)
    with pytest.raises(BenchmarkError, match=message):
        read_benchmark(kind, path)


def test_missing_files(tmp_path, model):
    with pytest.raises(BenchmarkError, match=r"none.json: no such"):
        read_benchmark("vqa", tmp_path / "none.json")
    with pytest.raises(BenchmarkError, match="needs the path"):
        read_benchmark("vqa", "")
    (tmp_path / "q.json").write_text(
        '[{"question_id": 1, "question": "q", "answer": "a", "image": "gone.png"}]'
    )
    with pytest.raises(DataError, match=r"sample '1': image file .*gone\.png cannot be read"):
        run(model, "vqa", tmp_path / "q.json", tmp_path / "out")


def test_a_picture_that_is_none_is_named_with_its_question(tmp_path, model):
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "page.png").write_text("<html>")
    question = {"question_id": "q7", "question": "q", "answer": "a", "image": "page.png"}
    (tmp_path / "q.json").write_text(json.dumps([question]))
    with pytest.raises(ImageError, match=r"question 'q7', page\.png: not an image"):
        run(model, "vqa", tmp_path / "q.json", tmp_path / "out")


def test_prompt_longer_than_the_context(tmp_path, model):
    (tmp_path / "q.json").write_text(
        json.dumps([{"question_id": "q7", "question": "q" * 300, "answer": "a"}])
    )
    with pytest.raises(SampleTooLong, match=r"'q7'.*limit of 256"):
        run(model, "vqa", tmp_path / "q.json", tmp_path / "out")


def test_bundle_checks_its_parts(model):
    with pytest.raises(ValueError, match=r"images of 16 x 16 px, .* holds 8 x 8"):
        dataclasses.replace(model, processor=ImageProcessor.siglip(16))
    with pytest.raises(ValueError, match="mean and std"):
        dataclasses.replace(model, processor=ImageProcessor.clip(8))
    small = dataclasses.replace(model.config, llm=dataclasses.replace(model.config.llm, vocab=100))
    with pytest.raises(ValueError, match="259 tokens, more than the LLM's vocabulary of 100"):
        dataclasses.replace(model, config=small)


def test_fingerprint(model):
    assert model.fingerprint == make_model().fingerprint
    assert model.fingerprint != make_model(seed=1).fingerprint
    assert model.fingerprint != dataclasses.replace(model, template="vicuna_v1").fingerprint
    same = dataclasses.replace(model, config=dataclasses.replace(model.config, remat="none"))
    assert model.fingerprint == same.fingerprint


def test_blind_image_is_zero_after_normalisation(model):
    image = model.blind_image()
    assert image.shape == (8, 8, 3)
    assert np.abs(model.processor.normalize(image)).max() < 0.01


def test_ids_that_end_an_answer_stand_once(model):
    tokenizer = make_tokenizer()
    plain = dataclasses.replace(model, template="plain", tokenizer=tokenizer)
    newline = tokenizer.convert_tokens_to_ids("Ċ")
    assert plain.stops == ([tokenizer.eos_token_id, newline], "\n")
    tokenizer.eos_token = "Ċ"  # as models whose answers end with a line
    assert dataclasses.replace(plain).stops == ([newline], "\n")
