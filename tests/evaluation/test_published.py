"""Published benchmarks from tiny hand-written files in the official formats: prompts, pictures, scores, uploads."""

import base64
import io
import json
import pathlib

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from PIL import Image

from mllm_jax.data.conversations import SampleError
from mllm_jax.evaluation.answer import answer_by_majority, question_turn
from mllm_jax.evaluation.benchmarks import PUBLISHED, BenchmarkError, read_benchmark
from mllm_jax.evaluation.benchmarks.base import Question
from mllm_jax.evaluation.benchmarks.mme import TASKS
from mllm_jax.evaluation.examples import pick_examples
from mllm_jax.evaluation.predictions import Problems
from mllm_jax.evaluation.run import ability_groups
from mllm_jax.evaluation.selection import select_benchmarks
from mllm_jax.evaluation.store import AnswerFile, key_of
from mllm_jax.evaluation.table_files import read_table
from mllm_jax.evaluation.tables import score_rows
from mllm_jax.inference.beam_sampling import BeamSampling

SHORT = "Answer the question using a single word or phrase."
LETTER = "Answer with the option's letter from the given choices directly."


def png(seed=0, size=(6, 4)):
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def put(path, value):
    """Writes text, bytes or JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(value, bytes):
        path.write_bytes(value)
    else:
        path.write_text(value if isinstance(value, str) else json.dumps(value), encoding="utf-8")
    return path


def parquet(path, rows, pictures, group=2):
    """A Parquet file as the hub writes it: pictures are structs of bytes and path."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = pyarrow.struct([("bytes", pyarrow.binary()), ("path", pyarrow.string())])
    columns = {}
    for name in rows[0]:
        cells = [row[name] for row in rows]
        if name in pictures:
            cells = [None if cell is None else {"bytes": cell, "path": None} for cell in cells]
            columns[name] = pyarrow.array(cells, picture)
        else:
            columns[name] = pyarrow.array(cells)
    pyarrow.parquet.write_table(pyarrow.table(columns), path, row_group_size=group)


def answer(benchmark, directory, texts):
    """Stores answers as `answer.py` does; `texts` is one text per prompt, or id -> text."""
    directory.mkdir(exist_ok=True)
    if isinstance(texts, dict):
        texts = [texts[question.row["question_id"]] for question in benchmark.questions]
    with AnswerFile(directory / "predictions.jsonl") as file:
        for question, text in zip(benchmark.questions, texts, strict=True):
            file.append(benchmark.answer_row(question, text))
    scores = benchmark.score_answers(directory / "predictions.jsonl")
    check_credits(benchmark, directory / "predictions.jsonl", scores)
    return scores


def check_credits(benchmark, path, scores):
    """What examples mark as right is what the score counted."""
    credits = benchmark.credits(path)
    if scores is None or "CIDEr" in scores:
        assert credits == {}
        return
    questions = {}
    for row in AnswerFile(path, writable=False).rows.values():
        questions.setdefault(benchmark.counted_as(row), []).append(credits.pop(key_of(row)))
    assert not credits
    mean = sum(map(min, questions.values())) / len(questions)
    details = scores.get("details", {}).values()  # POPE's headline is F1, MME's are points
    if benchmark.name == "pope":
        expected = sum(one["accuracy"] * one["n"] for one in details) / scores["n"]
    elif benchmark.name == "mme":
        expected = sum(one["acc"] * one["rows"] for one in details) / scores["n"]
    elif benchmark.name == "blink":  # the mean of the tasks' means
        expected = scores["micro_accuracy"]
    else:
        expected = scores["score"] / (100 if scores["unit"] == "percent" else 1)
    assert mean == pytest.approx(expected, abs=1e-12)


def submission(benchmark, directory):
    (line,) = benchmark.submit(directory)
    assert line.startswith("submission for"), line
    return directory / "submission" / benchmark.upload.file.format(name=benchmark.name)


def prompts(benchmark):
    return [question.prompt for question in benchmark.questions]


def check_pictures(benchmark):
    """Every picture can be read."""
    for question in benchmark.questions:
        for name in question.images:
            Image.open(io.BytesIO(benchmark.read_image(name))).load()


def lines(path):
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


# --- MMBench --------------------------------------------------------------------------------------------------------

HEADER = "index question hint A B C D answer category image source l2-category comment split".split()


def mmbench_rows():
    one, two = (base64.b64encode(png(seed)).decode() for seed in (1, 2))
    rest = ["made", "coarse_perception", "", "dev"]
    return [
        ["7", "What is it?", "A hint\nin two lines.", "cat", "dog", "", "", "B", "image_scene", one, *rest],
        ["9", "Color?", "nan", "red", "blue", "green", "", "A", "image_style", two, *rest],
        [
            "1000007",
            "What is it?",
            "A hint\nin two lines.",
            "dog",
            "cat",
            "",
            "",
            "A",
            "image_scene",
            one,
            *rest,
        ],
        ["1000009", "Color?", "", "blue", "green", "red", "", "C", "image_style", "9", *rest],
        ["2000009", "Color?", "", "green", "red", "blue", "", "B", "image_style", two, *rest],
    ]


def mmbench(folder, name="mmbench_dev_20230712.tsv", rows=None):
    cells = [["\t".join(f'"{c}"' if "\n" in c else c for c in row)] for row in rows or mmbench_rows()]
    return put(folder / name, "\n".join(["\t".join(HEADER), *(row[0] for row in cells)]) + "\n")


def test_mmbench(tmp_path):
    mmbench(tmp_path)
    benchmark = read_benchmark("mmbench", tmp_path)
    assert [question.row["question_id"] for question in benchmark.questions] == [
        7,
        1000007,
        9,
        1000009,
        2000009,
    ]
    assert prompts(benchmark)[:3] == [
        f"A hint\nin two lines.\nWhat is it?\nA. cat\nB. dog\n{LETTER}",
        f"A hint\nin two lines.\nWhat is it?\nA. dog\nB. cat\n{LETTER}",
        f"Color?\nA. red\nB. blue\nC. green\n{LETTER}",
    ]
    assert (
        benchmark.questions[0].images == benchmark.questions[1].images
    )  # one picture: its prefix is computed once
    assert benchmark.questions[3].images == benchmark.questions[2].images  # a cell that names another row
    assert benchmark.read_image(benchmark.questions[0].images[0]) == png(1)
    assert [len(question.options) for question in benchmark.questions] == [2, 2, 3, 3, 3]
    assert benchmark.max_new_tokens == 1024
    scores = answer(benchmark, tmp_path / "out", ["B", "A. dog", "A", "C", "A"])
    assert (scores["n"], scores["score"], scores["vanilla_accuracy"]) == (2, 0.5, 1.0)
    assert scores["complete"]
    assert scores["subtasks"] == {"image_scene": 1.0, "image_style": 0.0}
    assert scores["groups"] == {"coarse": 0.5}
    rows = read_table(submission(benchmark, tmp_path / "out"), Problems())
    assert list(rows[0]) == ["index", "question", "A", "B", "C", "D", "prediction", "answer", "split"]
    assert [(row["index"], row["prediction"]) for row in rows] == [
        ("7", "B"),
        ("9", "A"),
        ("1000007", "A. dog"),
        ("1000009", "C"),
        ("2000009", "A"),
    ]
    assert (rows[0]["C"], rows[0]["split"]) == ("", "dev")


def test_mmbench_upload_keeps_strange_answers_as_text(tmp_path):
    import openpyxl

    mmbench(tmp_path)
    benchmark = read_benchmark("mmbench", tmp_path)
    answer(benchmark, tmp_path / "out", ["=1+1", "\x00B\x1b", "", "  A  ", "ü\u2028"])
    sheet = openpyxl.load_workbook(submission(benchmark, tmp_path / "out")).active
    cells = {row[0].value: row[6] for row in sheet.iter_rows(min_row=2)}
    assert (cells[7].value, cells[7].data_type) == ("=1+1", "s")
    assert cells[1000007].value == " B "
    assert cells[1000009].value == "  A  "
    assert isinstance(sheet["A2"].value, int)


def test_mmbench_vanilla_and_chinese(tmp_path):
    mmbench(tmp_path)
    vanilla = read_benchmark("mmbench", tmp_path, rounds="vanilla")
    assert [question.row["question_id"] for question in vanilla.questions] == [7, 9]
    scores = answer(vanilla, tmp_path / "out", ["B", "B"])
    assert (scores["n"], scores["score"], scores["evaluation"][:7]) == (2, 0.5, "vanilla")
    mmbench(tmp_path, "mmbench_dev_cn_20231003.tsv")
    chinese = read_benchmark("mmbench_cn", tmp_path)
    assert prompts(chinese)[2] == "Color?\nA. red\nB. blue\nC. green\n请直接回答选项字母。"
    assert chinese.questions[0].row["group"] == "coarse"


def test_mmbench_tables_of_others(tmp_path):
    """Wrapped and data-URI base64, indices that pandas wrote as floats, categories of their own (CCBench)."""
    rows = mmbench_rows()
    wrapped = "\n".join(rows[0][9][i : i + 76] for i in range(0, len(rows[0][9]), 76))
    rows[0][9], rows[1][9] = wrapped, f"data:image/png;base64,{rows[1][9]}"
    rows[3][9] = "9.0"
    for row in rows:
        row[0] = f"{row[0]}.0"
        row[8] = row[8].replace("image_style", "cultural_relic")
    mmbench(tmp_path, rows=rows)
    benchmark = read_benchmark("mmbench", tmp_path)
    assert [question.row["question_id"] for question in benchmark.questions][:2] == [7, 9]
    images = [benchmark.read_image(question.images[0]) for question in benchmark.questions]
    assert images[:2] == [png(1), png(2)]
    assert benchmark.ungrouped == ["cultural_relic"]
    scores = answer(benchmark, tmp_path / "out", {7: "B", 1000007: "A", 9: "A", 1000009: "C", 2000009: "B"})
    assert (scores["score"], scores["groups"]) == (1.0, {"coarse": 1.0})
    assert scores["subtasks"] == {"image_scene": 1.0, "cultural_relic": 1.0}
    names = [row.name for row in score_rows(scores, ability_groups(benchmark))]
    assert names == ["all", "coarse", "image_scene", "cultural_relic"]
    upload = read_table(submission(benchmark, tmp_path / "out"), Problems())
    assert [row["index"] for row in upload] == ["7", "9", "1000007", "1000009", "2000009"]


def test_mmbench_without_answers_is_only_uploaded(tmp_path):
    rows = [[*row[:7], "", *row[8:]] for row in mmbench_rows()]
    path = mmbench(tmp_path, "mmbench_test_en_20231003.tsv", rows)
    benchmark = read_benchmark("mmbench", path)
    assert answer(benchmark, tmp_path / "out", ["A"] * 5) is None
    assert not benchmark.has_baselines
    assert submission(benchmark, tmp_path / "out").exists()


def test_mmbench_likelihood_and_majority(tmp_path):
    mmbench(tmp_path)
    benchmark = read_benchmark("mmbench", tmp_path)
    out = tmp_path / "out"
    answer(benchmark, out, ["A"] * 5)
    with AnswerFile(out / "likelihood.jsonl") as file:
        for question in benchmark.questions:
            file.append(
                question.row
                | {"text": question.row["gold"], "parsed": question.row["gold"], "how": "likelihood"}
            )
    assert benchmark.score_answers(out / "likelihood.jsonl")["score"] == 1.0
    answer_by_majority(benchmark, out)
    texts = [row["text"] for row in lines(out / "majority.jsonl")]
    assert texts == ["A", "A", "A", "A", "A"]  # every letter is right once; the first in the alphabet
    assert benchmark.score_answers(out / "majority.jsonl")["score"] == 0.0


# --- yes or no ------------------------------------------------------------------------------------------------------


def test_pope(tmp_path):
    number = 0
    for split, labels in (("random", "yes"), ("popular", "no yes"), ("adversarial", "no")):
        rows = []
        for label in labels.split():
            number += 1
            row = {
                "question_id": 1,
                "image": f"{number}.jpg",
                "text": f"Is there a {split} {number}?",
                "label": label,
            }
            rows.append(json.dumps(row))
            put(tmp_path / "val2014" / f"{number}.jpg", png(number))
        put(tmp_path / "coco" / f"coco_pope_{split}.json", "\n".join(rows) + "\n")
    benchmark = read_benchmark("pope", tmp_path)
    assert prompts(benchmark) == [
        f"Is there a {name}?\n{SHORT}" for name in ("adversarial 4", "random 1", "popular 2", "popular 3")
    ]
    assert [question.row["question_id"] for question in benchmark.questions] == [
        1,
        10_000_001,
        20_000_001,
        20_000_002,
    ]
    check_pictures(benchmark)
    assert benchmark.max_new_tokens == 128
    scores = answer(benchmark, tmp_path / "out", ["No", "Yes", "Yes", "Yes"])
    assert scores["subtasks"] == {"adversarial": 0.0, "popular": 2 / 3, "random": 1.0}
    assert scores["mean_f1"] == (1.0 + 2 / 3 + 0.0) / 3
    assert scores["details"]["adversarial"]["accuracy"] == 1.0


def mme(folder):
    root = folder / "MME_Benchmark_release_version"
    for number, task in enumerate(TASKS):
        inside = task in ("celebrity", "posters", "scene", "landmark", "artwork")
        texts = root / task / ("questions_answers_YN" if inside else "")
        blank = "  " if task == "OCR" else " "
        text = f"Is it {task}?{blank}Please answer yes or no.\tYes\nIs it a cat?{blank}Please answer yes or no.\tNo\n"
        put(texts / "0001.txt", text)
        put(
            root / task / ("images" if inside else "") / ("0001.png" if number % 2 else "0001.jpg"),
            png(number),
        )


def test_mme(tmp_path):
    mme(tmp_path)
    benchmark = read_benchmark("mme", tmp_path)
    assert len(benchmark.questions) == 28
    assert prompts(benchmark)[:2] == [f"Is it existence?\n{SHORT}", f"Is it a cat?\n{SHORT}"]
    assert [benchmark.questions[i].key for i in (0, 1)] == [
        ("existence/0001.jpg", 0),
        ("existence/0001.jpg", 1),
    ]
    check_pictures(benchmark)
    scores = answer(benchmark, tmp_path / "out", ["Yes", "No"] * 14)
    assert (scores["perception"], scores["cognition"], scores["complete"]) == (2000.0, 800.0, True)
    scores = answer(benchmark, tmp_path / "always_yes", ["yes"] * 28)
    assert scores["perception"] == 500.0
    rows = {row.name: row.values["model"] for row in score_rows(scores, ability_groups(benchmark))}
    assert (rows["all"], rows["OCR"], rows["coarse"], rows["reasoning"]) == (
        0.25,
    ) * 4  # of what can be reached
    folder = submission(benchmark, tmp_path / "out")
    assert (folder / "OCR.txt").read_text() == (
        "0001.png\tIs it OCR?  Please answer yes or no.\tYes\tYes\n"
        "0001.png\tIs it a cat?  Please answer yes or no.\tNo\tNo\n"
    )


def test_mme_names_what_is_missing(tmp_path):
    with pytest.raises(
        BenchmarkError, match=r"MME_Benchmark_release_version is missing .*download it from http"
    ):
        read_benchmark("mme", tmp_path)
    mme(tmp_path)
    (tmp_path / "MME_Benchmark_release_version" / "OCR" / "0001.png").unlink()
    with pytest.raises(BenchmarkError, match=r"OCR/0001.txt asks about an image"):
        read_benchmark("mme", tmp_path)


# --- short answers --------------------------------------------------------------------------------------------------


def ten(*answers):
    return [{"answer": answers[i % len(answers)], "answer_id": i} for i in range(10)]


def vqa_files(folder, questions, annotations, split):
    asked = [
        {"image_id": 42, "question": "What animal?", "question_id": 42000},
        {"image_id": 43, "question": "How many?", "question_id": 43001},
    ]
    truths = [
        {"question_id": 42000, "answers": ten("cat"), "answer_type": "other", "question_type": "what"},
        {
            "question_id": 43001,
            "answers": ten("2", "3"),
            "answer_type": "number",
            "question_type": "how many",
        },
    ]
    put(folder / questions, {"info": {}, "questions": asked})
    if annotations:
        put(folder / annotations, {"annotations": truths})
    for number in (42, 43):
        put(folder / split / f"COCO_{split}_{number:012d}.jpg", png(number))


def test_vqav2(tmp_path):
    vqa_files(
        tmp_path,
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
        "val2014",
    )
    benchmark = read_benchmark("vqav2", tmp_path)
    assert prompts(benchmark) == [f"What animal?\n{SHORT}", f"How many?\n{SHORT}"]
    check_pictures(benchmark)
    scores = answer(benchmark, tmp_path / "out", ["cat", "Two."])
    assert scores["score"] == 100.0
    assert scores["subtasks"] == {"other": 100.0, "number": 100.0}
    assert json.loads(submission(benchmark, tmp_path / "out").read_text()) == [
        {"question_id": 42000, "answer": "cat"},
        {"question_id": 43001, "answer": "2"},
    ]


def test_vqav2_marks_as_right_what_the_score_counts(tmp_path):
    vqa_files(
        tmp_path,
        "v2_OpenEnded_mscoco_val2014_questions.json",
        "v2_mscoco_val2014_annotations.json",
        "val2014",
    )
    benchmark = read_benchmark("vqav2", tmp_path)
    # The official script normalises neither side where all ten people agree.
    scores = answer(benchmark, tmp_path / "out", ["The cat.", "The 2."])
    assert (scores["score"], scores["score_always_normalised"]) == (50.0, 100.0)
    credits = benchmark.credits(tmp_path / "out" / "predictions.jsonl")
    assert credits == {("42000", 0): 0.0, ("43001", 0): 1.0}
    shown = pick_examples(benchmark, tmp_path / "out", 2)
    assert {row["question_id"]: row["right"] for row in shown} == {42000: False, 43001: True}


def test_vqav2_upload_covers_test2015(tmp_path):
    vqa_files(tmp_path, "v2_OpenEnded_mscoco_test-dev2015_questions.json", None, "test2015")
    benchmark = read_benchmark("vqav2", tmp_path, split="test-dev2015")
    check_pictures(benchmark)
    assert answer(benchmark, tmp_path / "out", ["A cat", "2"]) is None
    assert benchmark.submit(tmp_path / "out")[0].startswith("no submission: ")
    everything = [{"image_id": 1, "question": "?", "question_id": n} for n in (1000, 43001, 42000)]
    put(tmp_path / "v2_OpenEnded_mscoco_test2015_questions.json", {"questions": everything})
    assert json.loads(submission(benchmark, tmp_path / "out").read_text()) == [
        {"question_id": 1000, "answer": ""},
        {"question_id": 43001, "answer": "2"},
        {"question_id": 42000, "answer": "cat"},
    ]


def test_vqav2_reads_llavas_question_file(tmp_path):
    row = {
        "question_id": 5,
        "image": "COCO_test2015_000000000005.jpg",
        "text": f"Why?\n{SHORT}",
        "category": "default",
    }
    path = put(tmp_path / "llava_vqav2_mscoco_test-dev2015.jsonl", json.dumps(row))
    put(tmp_path / "test2015" / row["image"], png())
    benchmark = read_benchmark("vqav2", path, split="test-dev2015")
    assert prompts(benchmark) == [row["text"]]
    check_pictures(benchmark)


def test_ok_vqa(tmp_path):
    vqa_files(
        tmp_path, "OpenEnded_mscoco_val2014_questions.json", "mscoco_val2014_annotations.json", "val2014"
    )
    sentence = "When the provided information is insufficient, respond with 'Unanswerable'."
    assert prompts(read_benchmark("ok_vqa", tmp_path))[0] == f"What animal?\n{sentence}\n{SHORT}"
    benchmark = read_benchmark("ok_vqa", tmp_path, prompt="short")
    assert prompts(benchmark)[0] == f"What animal?\n{SHORT}"
    assert answer(benchmark, tmp_path / "out", ["cat", "cat"])["score"] == 50.0


def test_vizwiz(tmp_path):
    rows = [
        {
            "image": "VizWiz_val_0.jpg",
            "question": "what IS this",
            "answers": ten("soup"),
            "answer_type": "other",
        },
        {"image": "VizWiz_val_1.jpg", "question": "Is it?", "answers": ten("yes"), "answer_type": "yes/no"},
    ]
    put(tmp_path / "val.json", rows)
    for row in rows:
        put(tmp_path / "val" / row["image"], png())
    benchmark = read_benchmark("vizwiz", tmp_path)
    suffix = f"\nWhen the provided information is insufficient, respond with 'Unanswerable'.\n{SHORT}"
    assert prompts(benchmark) == [f"what IS this{suffix}", f"Is it?{suffix}"]
    assert prompts(read_benchmark("vizwiz", tmp_path, capitalize="true"))[0] == f"What is this{suffix}"
    check_pictures(benchmark)
    scores = answer(benchmark, tmp_path / "out", ["Soup.", "unanswerable"])
    assert scores["subtasks"] == {"other": 100.0, "yes/no": 0.0}
    assert json.loads(submission(benchmark, tmp_path / "out").read_text())[0] == {
        "image": "VizWiz_val_0.jpg",
        "answer": "soup",
    }
    put(tmp_path / "test.json", [{"image": "t.jpg", "question": "What?"}])
    put(tmp_path / "test" / "t.jpg", png())
    assert answer(read_benchmark("vizwiz", tmp_path, split="test"), tmp_path / "test_out", ["x"]) is None


def textvqa(folder):
    truths = [
        {
            "question_id": 34602,
            "image_id": "ab12",
            "question": "what is the brand?",
            "answers": ["dakota"] * 10,
        },
        {"question_id": 34603, "image_id": "ab12", "question": "what color?", "answers": ["red", "blue"] * 5},
    ]
    put(folder / "TextVQA_0.5.1_val.json", {"dataset_type": "val", "data": truths})
    asked = [
        {"question_id": "ab12", "image": "ab12.jpg", "text": f"{q}\nReference OCR token: DAKOTA, 7\n{SHORT}"}
        for q in ("What is the brand?", "What color?")
    ]
    put(folder / "llava_textvqa_val_v051_ocr.jsonl", "\n".join(map(json.dumps, asked)))
    put(folder / "train_images" / "ab12.jpg", png())


def test_textvqa(tmp_path):
    textvqa(tmp_path)
    benchmark = read_benchmark("textvqa", tmp_path)
    assert prompts(benchmark)[0] == f"What is the brand?\nReference OCR token: DAKOTA, 7\n{SHORT}"
    check_pictures(benchmark)
    scores = answer(benchmark, tmp_path / "out", ["Dakota", "green"])
    assert (scores["n"], scores["score"], scores["complete"]) == (2, 50.0, True)
    without = read_benchmark("textvqa", tmp_path, ocr="false")
    assert prompts(without) == [f"What is the brand?\n{SHORT}", f"What color?\n{SHORT}"]
    assert answer(without, tmp_path / "without", ["Dakota", "red"])["score"] == 100.0


def test_textvqa_question_that_is_not_annotated(tmp_path):
    textvqa(tmp_path)
    row = {"question_id": "ab12", "image": "ab12.jpg", "text": f"Who?\n{SHORT}"}
    put(tmp_path / "llava_textvqa_val_v051_ocr.jsonl", json.dumps(row))
    with pytest.raises(BenchmarkError, match=r"'Who\?' about ab12 is not in the annotations"):
        read_benchmark("textvqa", tmp_path)


def test_gqa(tmp_path):
    types = {"structural": "query", "semantic": "attr"}
    rows = {
        "201": {
            "question": "Which color?",
            "imageId": "n1",
            "answer": "red",
            "isBalanced": True,
            "types": types,
        },
        "202": {
            "question": "Left out?",
            "imageId": "n1",
            "answer": "no",
            "isBalanced": False,
            "types": types,
        },
        "203": {
            "question": "Is it?",
            "imageId": "n2",
            "answer": "yes",
            "types": types | {"structural": "verify"},
        },
    }
    put(tmp_path / "testdev_balanced_questions.json", rows)
    put(tmp_path / "images" / "n1.jpg", png())
    put(tmp_path / "images" / "n2.jpg", png())
    benchmark = read_benchmark("gqa", tmp_path)
    assert prompts(benchmark) == [f"Which color?\n{SHORT}", f"Is it?\n{SHORT}"]
    check_pictures(benchmark)
    scores = answer(benchmark, tmp_path / "out", ["Red.", "No"])
    assert (scores["n"], scores["score"], scores["answer_kinds"]) == (2, 50.0, {"open": 100.0, "binary": 0.0})
    assert json.loads(submission(benchmark, tmp_path / "out").read_text()) == [
        {"questionId": "201", "prediction": "red"},
        {"questionId": "203", "prediction": "no"},
    ]


def test_chartqa(tmp_path):
    for split, label in (("human", "14"), ("augmented", "Japan")):
        row = {"imgname": f"{split}.png", "query": f"How {split}?", "label": label}
        put(tmp_path / "test" / f"test_{split}.json", [row])
        put(tmp_path / "test" / "png" / f"{split}.png", png())
    benchmark = read_benchmark("chartqa", tmp_path)
    assert prompts(benchmark) == [f"How augmented?\n{SHORT}", f"How human?\n{SHORT}"]
    assert benchmark.max_new_tokens == 16
    check_pictures(benchmark)
    scores = answer(benchmark, tmp_path / "out", ["japan", "14.5"])
    assert scores["subtasks"] == {"augmented": 1.0, "human": 1.0}


def test_chartqa_from_parquet(tmp_path):
    rows = [
        {"type": f"{split}_test", "question": f"How {split}?", "answer": "7", "image": png(seed)}
        for seed, split in enumerate(("human", "augmented", "human"))
    ]
    parquet(tmp_path / "data" / "test-00000-of-00001.parquet", rows, ["image"])
    benchmark = read_benchmark("chartqa", tmp_path)
    assert [question.row["question_id"] for question in benchmark.questions] == [
        "human_1",
        "augmented_1",
        "human_2",
    ]
    assert [benchmark.read_image(question.images[0]) for question in benchmark.questions] == [
        png(i) for i in range(3)
    ]


# --- letters --------------------------------------------------------------------------------------------------------


def test_seed_bench(tmp_path):
    def question(number, kind, data_type, answer):
        row = {
            "question_id": number,
            "question_type_id": kind,
            "data_type": data_type,
            "data_id": f"pic{number}",
        }
        choices = {f"choice_{letter}": f"{letter}{number}" for letter in "abcd"}
        return row | choices | {"question": "What?", "answer": answer}

    rows = [question("1", 1, "image", "B"), question("2", 5, "image", "D"), question("v3", 10, "video", "A")]
    put(tmp_path / "SEED-Bench.json", {"questions": rows, "question_type": {}})
    for name in ("pic1", "pic2"):
        put(tmp_path / "SEED-Bench-image" / name, png())
    benchmark = read_benchmark("seed_bench", tmp_path)
    assert prompts(benchmark) == [f"What?\nA. a{n}\nB. b{n}\nC. c{n}\nD. d{n}\n{LETTER}" for n in (1, 2)]
    check_pictures(benchmark)
    scores = answer(benchmark, tmp_path / "out", ["B", "D."])
    assert (scores["n"], scores["score"], scores["lmms_image_accuracy"]) == (2, 0.5, 1.0)
    assert scores["subtasks"] == {"Scene Understanding": 1.0, "Instances Counting": 0.0}
    assert benchmark.questions[0].row["group"] == "coarse"
    assert lines(submission(benchmark, tmp_path / "out")) == [
        {"question_id": "1", "prediction": "B"},
        {"question_id": "2", "prediction": "D."},
    ]


def test_scienceqa(tmp_path):
    base = {"choices": ["x", "y", "z"], "answer": 1, "subject": "natural science", "split": "test"}
    problems = {
        "4": base | {"question": "Which?", "hint": "", "image": None},
        "5": base | {"question": "Where?", "hint": "Look at\nit.", "image": "image.png"},
        "6": base | {"question": "Train?", "hint": "", "image": None, "split": "train"},
    }
    put(tmp_path / "problems.json", problems)
    put(tmp_path / "pid_splits.json", {"train": ["6"], "test": ["5", "4"]})
    put(tmp_path / "images" / "test" / "5" / "image.png", png())
    benchmark = read_benchmark("scienceqa", tmp_path)
    assert prompts(benchmark) == [
        f"Context: Look at\nit.\nWhere?\nA. x\nB. y\nC. z\n{LETTER}",
        f"Which?\nA. x\nB. y\nC. z\n{LETTER}",
    ]
    assert [question.images for question in benchmark.questions] == [("5/image.png",), ()]
    check_pictures(benchmark)
    scores = answer(benchmark, tmp_path / "out", ["B", "C. z"])
    assert (scores["n"], scores["score"], scores["img_accuracy"]) == (2, 50.0, 100.0)
    assert len(read_benchmark("scienceqa", tmp_path, part="img").questions) == 1


def test_q_bench(tmp_path):
    rows = [
        {
            "img_path": "a.jpg",
            "question": "Is it sharp?",
            "candidates": ["Yes", "No"],
            "correct_ans": "No",
            "type": 0,
            "concern": 1,
        },
        {
            "img_path": "a.jpg",
            "question": "Noise?",
            "candidates": ["High", "Low"],
            "correct_ans": "High",
            "type": 2,
        },
    ]
    put(tmp_path / "llvisionqa_dev.json", rows)
    put(tmp_path / "images_llvisionqa" / "a.jpg", png())
    benchmark = read_benchmark("q_bench", tmp_path)
    assert (
        prompts(benchmark)[0]
        == "Is it sharp?\nChoose between one of the options as follows:\nA. Yes\nB. No\n"
    )
    check_pictures(benchmark)
    scores = answer(benchmark, tmp_path / "out", ["B. No", "Low"])
    assert (scores["n"], scores["score"]) == (2, 0.5)
    assert lines(submission(benchmark, tmp_path / "out"))[0] == rows[0] | {"response": "B. No"}
    put(tmp_path / "质衡-问答-验证集.json", rows)
    chinese = read_benchmark("q_bench_zh", tmp_path)
    assert prompts(chinese)[0] == "Is it sharp?\\在下列选项中选择一个:\nA. Yes\nB. No\n"
    assert prompts(read_benchmark("q_bench_zh", tmp_path, backslash="false"))[0][12:14] == "\n在"


def test_blink(tmp_path):
    def row(number, task, second, answer):
        choices = {
            "prompt": "Which one?\n(A) left\n(B) right",
            "choices": ["left", "right"],
            "answer": answer,
        }
        pictures = {"image_1": png(number), "image_2": second, "image_3": None, "image_4": None}
        return {"idx": f"val_{task}_{number}"} | pictures | choices

    pictures = [f"image_{i}" for i in range(1, 5)]
    parquet(
        tmp_path / "Art_Style" / "val-00000-of-00001.parquet",
        [
            row(1, "Art_Style", png(9), "(A)"),
            row(2, "Art_Style", None, "(B)"),
            row(3, "Art_Style", None, "(B)"),
        ],
        pictures,
    )
    parquet(
        tmp_path / "Multi-view_Reasoning" / "val-00000-of-00001.parquet",
        [row(1, "Multi-view_Reasoning", None, "(A)")],
        pictures,
    )
    benchmark = read_benchmark("blink", tmp_path)
    assert prompts(benchmark)[0] == f"Which one?\n(A) left\n(B) right\n{LETTER}"
    assert (
        prompts(read_benchmark("blink", tmp_path, instruction="false"))[0]
        == "Which one?\n(A) left\n(B) right"
    )
    assert [len(question.images) for question in benchmark.questions] == [2, 1, 1, 1]
    assert [benchmark.read_image(name) for name in benchmark.questions[0].images] == [png(1), png(9)]
    scores = answer(benchmark, tmp_path / "out", ["A", "(B) right", "I do not know", "Left, so (B)"])
    assert scores["subtasks"] == {"Art_Style": 2 / 3, "Multi-view_Reasoning": 0.0}
    assert scores["unparsed"] == 1
    assert json.loads(submission(benchmark, tmp_path / "out").read_text())["val_Art_Style_2"] == "(B)"


def mmmu(folder):
    rows = [
        {
            "id": "validation_Art_1",
            "question": "Who painted <image 1>?",
            "options": "['Monet', \"O'Keeffe\"]",
            "answer": "B",
            "question_type": "multiple-choice",
            "image_1": png(1),
            "image_2": png(2),
        },
        {
            "id": "validation_Art_2",
            "question": "How many?",
            "options": "[]",
            "answer": "['3', 'three']",
            "question_type": "open",
            "image_1": png(3),
            "image_2": None,
        },
    ]
    parquet(folder / "Art" / "validation-00000-of-00001.parquet", rows, ["image_1", "image_2"])


def test_mmmu(tmp_path):
    mmmu(tmp_path)
    benchmark = read_benchmark("mmmu", tmp_path)
    assert prompts(benchmark) == [
        f"Who painted <image 1>?\n(A) Monet\n(B) O'Keeffe\n\n{LETTER}",
        f"How many?\n{SHORT}",
    ]
    assert [len(question.images) for question in benchmark.questions] == [1, 1]
    assert benchmark.read_image(benchmark.questions[1].images[0]) == png(3)
    scores = answer(benchmark, tmp_path / "out", ["It is (B)", "The result is three."])
    assert (scores["n"], scores["score"], scores["random_fallbacks"]) == (2, 1.0, 0)
    assert benchmark.sampling is None
    sampled = read_benchmark("mmmu", tmp_path, decoding="sampled", seed="7")
    assert sampled.sampling == BeamSampling(seed=7, beams=5, temperature=1.0, top_k=50)
    for options, message in (
        ({"decoding": "sampled", "seed": "x"}, "'x' is no whole number"),
        ({"seed": "7"}, "add decoding=sampled"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            read_benchmark("mmmu", tmp_path, **options)
    item = json.loads(submission(benchmark, tmp_path / "out").read_text())[0]
    assert item["index2ans"] == {"A": "Monet", "B": "O'Keeffe"}
    with AnswerFile(tmp_path / "out" / "likelihood.jsonl") as file:  # the open question has no options
        file.append(benchmark.questions[0].row | {"text": "A", "parsed": "A", "how": "likelihood"})
    scores = benchmark.score_answers(tmp_path / "out" / "likelihood.jsonl")
    assert (scores["n"], scores["score"], scores["complete"]) == (1, 0.0, True)


def test_mmmu_pro(tmp_path):
    options = str([f"o{i}" for i in range(10)])
    row = {"id": "test_Art_1", "question": "Is <image 2> like <image 1>?", "options": options, "answer": "J"}
    row |= {"subject": "Art", "image_1": png(1), "image_2": png(2), "image_3": png(3)}
    names = ["image_1", "image_2", "image_3"]
    parquet(tmp_path / "standard (10 options)" / "test-00000-of-00001.parquet", [row], names)
    benchmark = read_benchmark("mmmu_pro", tmp_path)
    listed = "\n".join(f"{letter}. o{i}" for i, letter in enumerate("ABCDEFGHIJ"))
    assert prompts(benchmark) == [
        f"<image>\nIs <image> like <image>?\n{listed}\nAnswer with the option letter from the given choices directly."
    ]
    assert [benchmark.read_image(name) for name in benchmark.questions[0].images] == [png(3), png(2), png(1)]
    assert benchmark.questions[0].interleaved
    scores = answer(benchmark, tmp_path / "out", ["J"])
    assert (scores["n"], scores["score"]) == (1, 100.0)
    assert lines(submission(benchmark, tmp_path / "out"))[0]["response"] == "J"
    steps = read_benchmark("mmmu_pro", tmp_path, mode="cot")
    assert prompts(steps)[0].endswith("LETTER is one of options. Think step by step before answering.")


def test_mmmu_pro_vision(tmp_path):
    row = {"id": "test_Art_1", "options": str(["x", "y"]), "answer": "A", "subject": "Art", "image": png(4)}
    parquet(tmp_path / "vision" / "test-00000-of-00001.parquet", [row], ["image"])
    benchmark = read_benchmark("mmmu_pro_vision", tmp_path)
    assert prompts(benchmark) == [
        "Answer with the option letter from the given choices directly. The last line of your response should be of "
        "the following format: 'Answer: $LETTER' (without quotes) where LETTER is one of options."
    ]
    scores = answer(benchmark, tmp_path / "out", ["So.\nAnswer: A"])
    assert (scores["benchmark"], scores["score"]) == ("mmmu_pro_vision", 100.0)


# --- free answers ---------------------------------------------------------------------------------------------------


def test_mm_vet(tmp_path):
    rows = {
        f"v1_{i}": {"imagename": "a.png", "question": f"Q{i}?", "answer": "x", "capability": ["ocr"]}
        for i in (0, 1)
    }
    put(tmp_path / "mm-vet.json", rows)
    put(tmp_path / "images" / "a.png", png())
    benchmark = read_benchmark("mm_vet", tmp_path)
    assert prompts(benchmark) == ["Q0?", "Q1?"]
    check_pictures(benchmark)
    assert answer(benchmark, tmp_path / "out", ["one", "two"]) is None
    assert json.loads(submission(benchmark, tmp_path / "out").read_text()) == {"v1_0": "one", "v1_1": "two"}


def test_llava_bench(tmp_path):
    row = {"question_id": 3, "image": "001.jpg", "text": "Describe it.", "category": "detail"}
    put(tmp_path / "questions.jsonl", json.dumps(row))
    put(tmp_path / "images" / "001.jpg", png())
    benchmark = read_benchmark("llava_bench", tmp_path)
    assert prompts(benchmark) == ["Describe it."]
    assert answer(benchmark, tmp_path / "out", ["A volcano."]) is None
    assert lines(submission(benchmark, tmp_path / "out"))[0]["text"] == "A volcano."


def test_mathvista(tmp_path):
    base = {
        "image": "images/1.jpg",
        "unit": None,
        "choices": None,
        "precision": None,
        "metadata": {"task": "vqa"},
    }
    rows = {
        "1": base
        | {
            "question_type": "multi_choice",
            "answer_type": "text",
            "choices": ["cat", "dog"],
            "answer": "dog",
        },
        "2": base | {"question_type": "free_form", "answer_type": "integer", "answer": "7", "unit": "cm"},
        "3": base
        | {"question_type": "free_form", "answer_type": "float", "answer": "1.25", "precision": 2.0},
        "4": base | {"question_type": "free_form", "answer_type": "list", "answer": "[1, 2]"},
    }
    put(tmp_path / "testmini.json", {i: {"pid": i, "question": f"Q{i}?"} | row for i, row in rows.items()})
    put(tmp_path / "images" / "1.jpg", png())
    benchmark = read_benchmark("mathvista", tmp_path)
    hint = "Hint: Please answer the question"
    assert prompts(benchmark) == [
        f"{hint} and provide the correct option letter, e.g., A, B, C, D, at the end.\n"
        "Question: Q1?\nChoices:\n(A) cat\n(B) dog",
        f"{hint} requiring an integer answer and provide the final value, e.g., 1, 2, 3, at the end.\n"
        "Question: Q2? (Unit: cm)",
        f"{hint} requiring a floating-point number with two decimal places and provide the final value, e.g., 1.23, "
        "1.34, 1.45, at the end.\nQuestion: Q3?",
        f"{hint} requiring a Python list as an answer and provide the final list, e.g., [1, 2, 3], [1.2, 1.3, 1.4], at "
        "the end.\nQuestion: Q4?",
    ]
    check_pictures(benchmark)
    scores = answer(benchmark, tmp_path / "out", ["dog", "7", "1.3", "The list is [1, 2]"])
    assert (scores["n"], scores["correct"], scores["without_extraction"]) == (4, 2, 1)
    found = json.loads(submission(benchmark, tmp_path / "out").read_text())["2"]
    assert (found["response"], found["query"], found["answer"]) == ("7", benchmark.questions[1].prompt, "7")


# --- boxes and captions ---------------------------------------------------------------------------------------------


@pytest.fixture
def without_java(monkeypatch):
    """METEOR takes longer than all else here together; test_score_captions.py looks at it."""
    monkeypatch.setattr("mllm_jax.evaluation.caption_java.missing", lambda: "not wanted in this test")


def refcoco(folder):
    rows = [
        {
            "question_id": "77",
            "image": png(0, (20, 10)),
            "answer": ["left cup", "the red one"],
            "bbox": [0.0, 0.0, 10.0, 5.0],
            "segmentation": [1.0, 1.0, 8.0, 1.0, 8.0, 4.0],
        }
    ]
    parquet(folder / "data" / "val-00000-of-00001.parquet", rows, ["image"])


@pytest.mark.parametrize("kind", ["refcoco", "refcoco+", "refcocog"])
def test_refcoco(tmp_path, kind):
    refcoco(tmp_path)
    benchmark = read_benchmark(kind, tmp_path)
    assert [prompt.split("describes: ")[1] for prompt in prompts(benchmark)] == ["left cup", "the red one"]
    assert prompts(benchmark)[0].startswith(
        "Bounding box coordinates are specified in the format (top-left x, top-left y"
    )
    scores = answer(benchmark, tmp_path / "out", ["[0.0, 0.0, 0.5, 0.5]", "nowhere"])
    assert (scores["benchmark"], scores["score"], scores["unparsed"]) == (kind, 0.5, 1)
    assert not benchmark.has_baselines


@pytest.mark.parametrize("kind", ["refcoco_caption", "refcoco+_caption", "refcocog_caption"])
def test_region_captions(tmp_path, kind, without_java):
    refcoco(tmp_path)
    benchmark = read_benchmark(kind, tmp_path)
    assert prompts(benchmark) == ["Provide a short description for this region."]
    pixels = np.asarray(Image.open(io.BytesIO(benchmark.read_image(benchmark.questions[0].images[0]))))
    plain = np.asarray(Image.open(io.BytesIO(png(0, (20, 10)))))
    assert pixels.shape == (10, 20, 3)
    assert (pixels[0, :11] == (255, 0, 0)).all()
    assert (pixels[5, :11] == (255, 0, 0)).all()
    assert (pixels[1:5, 1:10] == plain[1:5, 1:10]).all()
    polygon = read_benchmark(kind, tmp_path, outline="polygon")
    drawn = np.asarray(Image.open(io.BytesIO(polygon.read_image(polygon.questions[0].images[0]))))
    assert (drawn[1, 1:9] == 255).all()
    scores = answer(benchmark, tmp_path / "out", ["left cup"])
    assert (scores["n"], scores["Bleu_1"]) == (1, pytest.approx(1.0))


def test_captions(tmp_path, without_java):
    images = [{"id": 5, "file_name": "000000000005.jpg"}, {"id": 6, "file_name": "000000000006.jpg"}]
    said = [
        {"image_id": i, "caption": text}
        for i, text in ((5, "a cat sits"), (5, "one cat"), (6, "two dogs run"))
    ]
    put(tmp_path / "annotations" / "captions_val2017.json", {"images": images, "annotations": said})
    for image in images:
        put(tmp_path / "val2017" / image["file_name"], png())
    benchmark = read_benchmark("captions", tmp_path)
    assert prompts(benchmark) == ["Provide a one-sentence caption for the provided image."] * 2
    assert benchmark.max_new_tokens == 64
    check_pictures(benchmark)
    scores = answer(benchmark, tmp_path / "out", ["A cat sits.", "two dogs"])
    assert (scores["n"], scores["n_references"], scores["complete"]) == (2, 3, True)
    assert json.loads(submission(benchmark, tmp_path / "out").read_text())[0] == {
        "image_id": 5,
        "caption": "A cat sits.",
    }


def test_interleaved_pictures_stand_where_the_words_mention_them():
    def turn(prompt, images, interleaved):
        return question_turn(Question({"question_id": "q7"}, prompt, images, interleaved=interleaved)).parts

    assert turn("Is <image> it?", ("a",), True) == ("Is ", " it?")
    assert turn("Is <image> it?", ("a",), False) == ("", "\nIs <image> it?")
    assert turn("Is it?", (), False) == ("Is it?",)
    with pytest.raises(SampleError, match="'q7': 1 places for 2 images"):
        turn("Is <image> it?", ("a", "b"), True)


# --- names, options, mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", sorted(PUBLISHED))
def test_a_missing_file_is_named_with_its_source(tmp_path, kind):
    with pytest.raises(
        BenchmarkError, match=rf"^{kind.replace('+', '[+]')}: .* is missing.*; download it from "
    ):
        read_benchmark(kind, tmp_path / kind)


def test_selection(tmp_path):
    chosen = select_benchmarks(["mmbench", "vqav2:split=test-dev2015", "textvqa:ocr=false"], tmp_path)
    assert sorted(chosen) == ["mmbench", "textvqa-ocr=false", "vqav2-test-dev2015"]
    assert chosen["vqav2-test-dev2015"].path == str(tmp_path / "vqav2")
    shared = select_benchmarks(["mmbench_cn", "refcoco+_caption"], tmp_path)
    assert [entry.path for entry in shared.values()] == [str(tmp_path / n) for n in ("mmbench", "refcoco+")]
    for names, message in (
        (["mmbensh"], "no benchmark 'mmbensh'; did you mean 'mmbench'"),
        (["q_bench_a3"], "'q_bench_a3' cannot be asked: it needs the logits"),
        (["mini"], "--benchmark=mini --path"),
        (["vqav2:splt=val2014"], "unknown option 'splt'; did you mean 'split'"),
        (["vqav2:split=train"], "'train' is none of val2014, test-dev2015, test2015"),
        (["textvqa:ocr"], "options are given as NAME:OPTION=VALUE"),
        (["textvqa:ocr=maybe"], "'maybe' is neither 'true' nor 'false'"),
        (["pope", "pope"], "names 'pope' twice"),
    ):
        with pytest.raises(BenchmarkError, match=message):
            select_benchmarks(names, tmp_path)


def test_incomplete_answers_are_not_submitted(tmp_path):
    mmbench(tmp_path)
    benchmark = read_benchmark("mmbench", tmp_path)
    answer(benchmark, tmp_path / "out", ["A"] * 5)
    path = tmp_path / "out" / "predictions.jsonl"
    path.write_text("\n".join(path.read_text().splitlines()[:3]) + "\n")
    assert benchmark.submit(tmp_path / "out") == [
        "no submission: 2 questions are not answered, the first is 1000009"
    ]


def test_damaged_pictures_are_named(tmp_path):
    rows = mmbench_rows()
    rows[0][9] = "no base64! " * 9
    mmbench(tmp_path, rows=rows)
    benchmark = read_benchmark("mmbench", tmp_path)
    with pytest.raises(BenchmarkError, match="not base64"):
        benchmark.read_image(benchmark.questions[0].images[0])
    put(tmp_path / "x.parquet", b"no parquet")
    with pytest.raises(BenchmarkError, match=r"x.parquet: no readable Parquet file"):
        read_benchmark("refcoco", tmp_path / "x.parquet")


def test_the_guide_lists_every_benchmark_its_files_and_options():
    guide = (pathlib.Path(__file__).parents[2] / "docs" / "benchmarks.md").read_text(encoding="utf-8")
    for kind, benchmark in PUBLISHED.items():
        (row,) = [line for line in guide.splitlines() if line.startswith(f"| `{kind}` | ") and "://" in line]
        names = [name for file in benchmark.files.values() for name in file.names]
        missing = [
            name
            for name in (*names, *benchmark.options, f"| {benchmark.max_new_tokens} |")
            if name not in row
        ]
        assert not missing, kind
