import json

import pytest

from mllm_jax.cli.main import VERBS, main
from mllm_jax.evaluation.benchmarks import BENCHMARKS


def _write(path, value):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(value))
    return str(path)


@pytest.fixture
def blink(tmp_path):
    gold = {"val_Jigsaw_1": "(A)", "val_Jigsaw_2": "(B)"}
    said = {"val_Jigsaw_1": "(A)", "val_Jigsaw_2": "(A)"}
    return _write(tmp_path / "said.json", said), _write(tmp_path / "gold.json", gold)


def test_score_prints_one_json_object(blink, capsys):
    assert main(["score", "blink", "--predictions", blink[0], "--annotations", blink[1]]) == 0
    result = json.loads(capsys.readouterr().out)
    assert {"benchmark", "n", "unparsed", "score", "subtasks", "groups"} <= set(result)
    assert (result["benchmark"], result["n"], result["score"]) == ("blink", 2, 0.5)


def test_incomplete_files_exit_with_1_and_no_score(blink, tmp_path, capsys):
    said = _write(tmp_path / "part.json", {"val_Jigsaw_1": "(A)"})
    args = ["score", "blink", "--predictions", said, "--annotations", blink[1]]
    assert main(args) == 1
    output = capsys.readouterr()
    assert json.loads(output.out)["score"] is None
    assert "'missing': 1" in output.err
    assert main([*args, "--answered-only"]) == 1
    result = json.loads(capsys.readouterr().out)
    assert (result["score"], result["complete"], result["answered_questions_only"]) == (1.0, False, 1)


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ([], "give a BENCHMARK"),
        (["blnk", "--predictions", "x"], "no benchmark 'blnk'"),
        (["blink", "--predictions", "x"], "--annotations is needed"),
        (["blink", "--predictions", "x", "--annotations", "absent"], "no such file"),
        (
            ["blink", "--predictions", "x", "--annotations", "y", "--tokenizer", "java"],
            "no option 'tokenizer'",
        ),
    ],
)
def test_what_cannot_be_scored_exits_with_2(args, message, capsys):
    assert main(["score", *args]) == 2
    assert message in capsys.readouterr().err


def test_list_names_every_benchmark(capsys):
    assert main(["score", "--list"]) == 0
    printed = capsys.readouterr().out
    assert all(f"{name}  (score" in printed for name, one in BENCHMARKS.items() if not one.not_scored)


def test_groups_option(tmp_path, capsys):
    groups = _write(tmp_path / "g.json", {"mmbench": {"ocr": {"group": "reading", "status": "proposed"}}})
    row = {"index": 1, "A": "x", "B": "y", "answer": "A", "prediction": "A", "category": "ocr"}
    said = _write(tmp_path / "p.json", [row, {**row, "index": 2}])
    assert main(["score", "mmbench", "--predictions", said, "--groups", groups]) == 0
    assert json.loads(capsys.readouterr().out)["groups"] == {"reading": 1.0}


@pytest.fixture
def data(tmp_path):
    folder = tmp_path / "data" / "blink"
    _write(folder / "val_answers.json", {"val_Jigsaw_1": "(A)", "val_Jigsaw_2": "(B)"})
    _write(folder / "predictions" / "m.json", {"val_Jigsaw_1": "(A)", "val_Jigsaw_2": "(A)"})
    expected = {"total": 0.5, "tasks": {"Jigsaw": 0.5}, "micro_accuracy": 0.5, "n": 2, "published": {"x": 1}}
    _write(folder / "expected.json", {"scorer": "s", "m": expected})
    return tmp_path / "data"


def test_score_all_compares_every_figure(data, capsys):
    assert main(["score-all", "--data", str(data)]) == 0
    output = capsys.readouterr()
    assert "4/4" in output.out
    assert "4 of 4 figures equal in every digit" in output.err
    assert main(["score-all", "--data", str(data), "--markdown"]) == 0
    assert "| blink | blink/predictions/m.json | total | 0.5 | 0.5 | 0 | 4/4 |" in capsys.readouterr().out


def test_score_all_finds_a_difference_in_the_last_digit(data, capsys):
    path = data / "blink" / "expected.json"
    expected = json.loads(path.read_text())
    expected["m"]["tasks"]["Jigsaw"] = 0.5000000000000001
    expected["m"]["tasks"]["Counting"] = 0.5
    path.write_text(json.dumps(expected))
    assert main(["score-all", "--data", str(data), "--json"]) == 1
    output = capsys.readouterr()
    assert "tasks.Jigsaw (0.5000000000000001, 0.5)" in output.err
    assert "tasks.Counting (0.5, nan)" in output.err
    assert json.loads(output.out)[0]["benchmark"] == "blink"


def test_score_all_compares_rows(data, capsys):
    folder = data / "relaxed_accuracy"
    _write(folder / "expected.json", {"m": {"n": 2, "relaxed_correct": 1, "relaxed_accuracy": 0.5}})
    rows = [{"pid": 1, "prediction": "10.2", "target": "10", "relaxed_correct": True}]
    rows.append({"pid": 2, "prediction": "12", "target": "10", "relaxed_correct": True})
    (folder / "m.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert main(["score-all", "--data", str(data)]) == 0
    assert main(["score-all", "--data", str(data), "--rows"]) == 1
    assert "right or wrong (2, 1)" in capsys.readouterr().err


def test_score_all_refuses_other_folders(tmp_path, data, capsys):
    assert main(["score-all", "--data", str(tmp_path / "data" / "blink")]) == 2
    _write(data / "other" / "expected.json", {})
    assert main(["score-all", "--data", str(data)]) == 2
    output = capsys.readouterr()
    assert "no rule for this folder" in output.err
    assert "4/4" in output.out  # the others are compared
    (data / "blink" / "predictions" / "m.json").write_text("{")
    assert main(["score-all", "--data", str(data)]) == 2
    assert "m.json" in capsys.readouterr().err


def test_the_verbs_are_in_the_table():
    assert {"score", "score-all", "judge"} <= set(VERBS)
