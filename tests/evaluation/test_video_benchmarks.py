"""Benchmarks about videos: official files, videos that are missing, and uploads."""

import json

import pytest

from mllm_jax.evaluation.benchmarks import BenchmarkError, read_benchmark
from mllm_jax.evaluation.benchmarks.video_judgements import read_score
from mllm_jax.evaluation.judge.requests import build_requests
from mllm_jax.evaluation.predictions import Problems
from mllm_jax.evaluation.prepared import prepare
from mllm_jax.evaluation.store import AnswerFile

LETTER = "Answer with the option's letter from the given choices directly."


def put(path, value=""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def answered(benchmark, folder, text="yes"):
    """Stores the same answer to every question; gives the folder's file of answers."""
    folder.mkdir(exist_ok=True)
    with AnswerFile(folder / "predictions.jsonl") as file:
        for question in benchmark.questions:
            file.append(benchmark.answer_row(question, text))
    return folder / "predictions.jsonl"


def uploaded(benchmark, folder):
    (line,) = benchmark.submit(folder)
    assert line.startswith("submission for"), line
    return folder / "submission" / benchmark.upload.file.format(name=benchmark.name)


def qa_files(folder, names):
    rows = [
        {"video_name": name, "question": f"what {name}?", "question_id": f"q{i}"}
        for i, name in enumerate(names)
    ]
    put(folder / "test_q.json", rows)
    put(folder / "test_a.json", [{"answer": f"a{i}", "question_id": f"q{i}"} for i in range(len(names))])


@pytest.mark.parametrize("name", ["msvd_qa", "msrvtt_qa", "tgif_qa", "activitynet_qa"])
def test_open_questions_find_their_videos_and_tell_which_are_missing(tmp_path, name):
    qa_files(tmp_path, ["one", "two", "gone", "one"])
    folder = {"msvd_qa": "videos", "msrvtt_qa": "videos/all", "tgif_qa": "mp4", "activitynet_qa": "all_test"}[
        name
    ]
    prefix = "v_" if name == "activitynet_qa" else ""
    put(tmp_path / folder / f"{prefix}one.mkv")
    put(tmp_path / folder / f"{prefix}one.avi")  # tried earlier
    put(tmp_path / folder / f"{prefix}two.mp4")
    benchmark = read_benchmark(name, tmp_path)
    assert [(q.row["question_id"], q.images[0], q.prompt) for q in benchmark.questions] == [
        ("q0", f"{prefix}one.avi", "what one?"),
        ("q3", f"{prefix}one.avi", "what one?"),
        ("q1", f"{prefix}two.mp4", "what two?"),
    ]
    assert benchmark.unasked() == {"missing_videos": {"videos": 1, "questions": 1, "first": ["gone"]}}
    assert "1 of 3 videos are not in" in benchmark.missing_videos
    assert "1 of 4 questions are not asked" in benchmark.missing_videos
    assert benchmark.max_new_tokens == 512
    before = benchmark.fingerprint
    put(tmp_path / folder / f"{prefix}gone.mov")  # what was answered before is kept
    whole = read_benchmark(name, tmp_path)
    assert len(whole.questions) == 4
    assert (whole.fingerprint, whole.missing_videos) == (before, "")
    said = answered(whole, tmp_path / "out")
    assert lines(uploaded(whole, tmp_path / "out"))[0] == {
        "id": "q0", "question": "what one?", "answer": "a0", "pred": "yes"
    }  # fmt: skip
    for path in (said, uploaded(whole, tmp_path / "out")):
        requests = build_requests(name, path, None, Problems(), None, 1, None)
        assert {request.question for request in requests} == {"q0", "q1", "q2", "q3"}
        assert all("what" in request.body["messages"][-1]["content"] for request in requests)


def test_no_video_at_all_and_files_that_do_not_belong_together_are_errors(tmp_path):
    qa_files(tmp_path, ["one"])
    (tmp_path / "videos").mkdir()
    with pytest.raises(BenchmarkError, match=r"1 of 1 videos .*one.*Video-LLaVA"):
        read_benchmark("msvd_qa", tmp_path)
    put(tmp_path / "videos" / "one.mp4")
    with pytest.raises(BenchmarkError, match="without --prepared"):
        prepare("msvd_qa", tmp_path, tmp_path / "data")
    put(tmp_path / "test_a.json", [{"answer": "a", "question_id": "q7"}])
    with pytest.raises(BenchmarkError, match="'q0' is expected, not 'q7'"):
        read_benchmark("msvd_qa", tmp_path)
    put(tmp_path / "test_a.json", [{"answer": "a"}] * 2)
    with pytest.raises(BenchmarkError, match="1 questions, but 2 answers"):
        read_benchmark("msvd_qa", tmp_path)


def test_the_five_scores_of_video_chatgpt(tmp_path):
    put(tmp_path / "generic_qa.json", [{"video_name": "v_1", "Q": "what?", "A": "a"}] * 2)
    put(tmp_path / "temporal_qa.json", [{"video_name": "v_1", "Q": "when?", "A": "a"}])
    put(tmp_path / "consistency_qa.json", [{"video_name": "v_2", "Q1": "is it?", "Q2": "was it?", "A": "a"}])
    put(tmp_path / "Test_Videos" / "v_1.mp4")
    put(tmp_path / "Test_Videos" / "v_2.mkv")
    benchmark = read_benchmark("video_chatgpt", tmp_path)
    ids = ["generic_0", "generic_1", "temporal_0", "consistency_0_1", "consistency_0_2"]
    assert [q.row["question_id"] for q in benchmark.questions] == ids
    answered(benchmark, tmp_path / "out", "it is")
    folder = uploaded(benchmark, tmp_path / "out")
    assert lines(folder / "consistency_qa.jsonl") == [
        {"video_name": "v_2", "Q1": "is it?", "Q2": "was it?", "A": "a", "pred1": "it is", "pred2": "it is"}
    ]
    assert lines(folder / "temporal_qa.jsonl") == [
        {"video_name": "v_1", "Q": "when?", "A": "a", "pred": "it is"}
    ]
    requests = build_requests("video_chatgpt", folder, None, Problems(), None, 1, None)
    aspects = [request.task.name.partition(".")[2] for request in requests]
    assert sorted(aspects) == ["consistency", "context", "context", "correctness", "correctness", "detail", "detail",
                               "temporal"]  # fmt: skip


def test_scores_are_cut_to_whole_numbers():
    assert [read_score({"score": said}) for said in (4, 4.8, "4", "4.8", 5.5, -1, True, None)] == [
        4, 4, 4, None, 5, None, None, None
    ]  # fmt: skip


NEXT_QA = """video,frame_count,width,height,question,answer,qid,type,a0,a1,a2,a3,a4
11,9,4,4,why did he go,3,0,CW,run,"hide, or not",jump,sleep,eat
11,9,4,4,what then,1,1,TP,run,hide,jump,sleep,eat
12,9,4,4,where is it,0,5,DL,park,house,street,car,sea
"""


def test_next_qa_is_asked_with_letters_and_scored_like_its_files(tmp_path):
    put(tmp_path / "val.csv", NEXT_QA)
    put(tmp_path / "map_vid_vidorID.json", {"11": "0001/11", "12": "0001/12"})
    put(tmp_path / "NExTVideo" / "0001" / "11.mp4")
    put(tmp_path / "NExTVideo" / "12.mp4")
    benchmark = read_benchmark("nextqa", tmp_path)
    assert [q.images[0] for q in benchmark.questions] == ["0001/11.mp4", "0001/11.mp4", "12.mp4"]
    options = "A. run\nB. hide, or not\nC. jump\nD. sleep\nE. eat"
    assert benchmark.questions[0].prompt == f"why did he go\n{options}\n{LETTER}"
    assert [(q.row["gold"], q.row["ability"]) for q in benchmark.questions] == [
        ("D", "CW"), ("B", "TN"), ("A", "DL")
    ]  # fmt: skip
    out = answered(benchmark, tmp_path / "out", "D. sleep")
    scores = benchmark.score_answers(out)
    assert scores["score"] == pytest.approx(100 / 3)
    assert scores["subtasks"] == {"CW": 100.0, "TN": 0.0, "DL": 0.0}
    assert json.loads(uploaded(benchmark, tmp_path / "out").read_text()) == {
        "11_0": {"prediction": 3, "answer": 3},
        "11_1": {"prediction": 3, "answer": 1},
        "12_5": {"prediction": 3, "answer": 0},
    }
    (tmp_path / "NExTVideo" / "12.mp4").unlink()
    fewer = read_benchmark("nextqa", tmp_path)
    (tmp_path / "NExTVideo" / "0001" / "12.mp4").touch()  # as in a download that goes on: answers are kept
    assert {fewer.fingerprint, read_benchmark("nextqa", tmp_path).fingerprint} == {benchmark.fingerprint}
    scores = fewer.score_answers(answered(fewer, tmp_path / "fewer", "D"))
    assert (scores["score"], scores["problems"]["missing"]["count"], scores["partial"]["score"]) == (
        None,
        1,
        50.0,
    )


def test_the_video_part_of_seed_bench(tmp_path):
    common = {f"choice_{letter}": letter for letter in "abcd"} | {"question": "what?", "answer": "B"}
    rows = [
        common | {"question_id": "1", "question_type_id": 5, "data_type": "image", "data_id": "i.jpg"},
        common | {"question_id": "v1", "question_type_id": 10, "data_type": "video", "data_id": "9.webm"},
        common
        | {"question_id": "v2", "question_type_id": 11, "data_type": "video", "data_id": "P03/P03_24.MP4"}
        | {"segment": [648.0, 658.0]},
        common
        | {"question_id": "v3", "question_type_id": 12, "data_type": "video", "data_id": "P06/c.avi"}
        | {"segment": [18, 166]},
    ]  # fmt: skip
    put(tmp_path / "SEED-Bench.json", {"questions": rows})
    put(tmp_path / "SEED-Bench-image" / "i.jpg")
    put(tmp_path / "SSV2/videos/9.webm")
    put(tmp_path / "EPIC-KITCHENS/3h91syskeag572hl6tvuovwv4d/videos/test/P03/P03_24.MP4")
    put(tmp_path / "BreakfastII_15fps_qvga_sync/P06/c.avi")
    assert [q.row["question_id"] for q in read_benchmark("seed_bench", tmp_path).questions] == ["1"]
    benchmark = read_benchmark("seed_bench", tmp_path, part="video")
    assert [(q.images[0].split("/")[-1], q.segment) for q in benchmark.questions] == [
        ("9.webm", None), ("P03_24.MP4", (648.0, 658.0)), ("c.avi", (18, 166))
    ]  # fmt: skip
    scores = benchmark.score_answers(answered(benchmark, tmp_path / "out", "B"))
    assert (scores["score"], scores["n"], scores["image"]["n"]) == (1.0, 3, 0)
    whole = read_benchmark("seed_bench", tmp_path, part="all")
    scores = whole.score_answers(answered(whole, tmp_path / "all", "B"))
    assert (scores["n"], scores["video"]["n"], scores["all"]["n"]) == (1, 3, 4)
    put(tmp_path / "llava.jsonl", {"question_id": "v1", "text": "what?", "image": "v1.png"})
    with pytest.raises(BenchmarkError, match="one frame of each video"):
        read_benchmark("seed_bench", tmp_path / "llava.jsonl", part="video")
