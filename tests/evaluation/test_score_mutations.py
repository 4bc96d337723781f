"""Files of strangers: one field of one row is something else than it should be.

`mllm-jax score` then gives a score or a message that names a file, never a traceback, and prints valid JSON that any
terminal can show. A bounded share of the mutations runs here; all of a seed:

    python tests/evaluation/test_score_mutations.py 5000
"""

import collections
import contextlib
import copy
import io
import json
import random
import sys
import tempfile
from pathlib import Path

import pytest
import test_score_fuzz

from mllm_jax.cli.main import main
from mllm_jax.evaluation import caption_java
from mllm_jax.evaluation.benchmarks.mme import TASKS


def _q_bench_a3(d, texts):
    rows = [
        {"img_path": f"{i}.jpg", "gt_score": score, "logit_good": good, "logit_poor": 10.0}
        for i, (score, good) in enumerate([(1.0, 9.0), (2.5, 12.0), (4.0, 11.0)])
    ]
    for name in ("spaq", "koniq", "flive", "livec", "cgi", "agi", "kadid"):
        (d / "p").mkdir(exist_ok=True)
        _write(d / "p" / f"{name}.json", rows, False)
    return d / "p", None


FILES = {**test_score_fuzz.FILES, "q_bench_a3": _q_bench_a3}
TEXTS = ["A", "(B) dog", "yes", "cat", "[0.1, 0.2, 0.3, 0.4]"]
GRADES = {"llava_bench": ["8 9", "7 7"], "mm_vet": [0.5, 0.25], "msvd_qa": ["{'pred': 'no', 'score': 2}"]}
GRADES["video_chatgpt"] = GRADES["msvd_qa"]
ABSENT = object()
VALUES = [
    *(
        ABSENT,
        None,
        True,
        0,
        -1,
        7.5,
        float("nan"),
        float("inf"),
        1e308,
        10**40,
        "",
        " ",
        "nan",
        "\ud800",
        "ü\u2028",
    ),
    *("x" * 300, "1e999", "[[", [], ["a"], [None], [1e308] * 4, {}, {"a": 1}, [[1]], {"answer": None}),
]


def _read(path):
    text = path.read_text(encoding="utf-8")
    try:
        return json.loads(text), False
    except ValueError:
        return [json.loads(line) for line in text.splitlines()], True


def _write(path, value, lines):
    text = "\n".join(map(json.dumps, value)) if lines else json.dumps(value)
    path.write_text(text, encoding="utf-8")


def _spots(value, path=()):
    """The paths to every container's members, at most three levels deep."""
    if len(path) == 3:
        return
    members = (
        value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    )
    for key, member in members:
        yield (*path, key)
        yield from _spots(member, (*path, key))


def mutate(files, rng):
    """Changes one member of one of the JSON files; says what it did."""
    path = rng.choice(files)
    value, lines = _read(path)
    spot = rng.choice(list(_spots(value)))
    inner = value
    for key in spot[:-1]:
        inner = inner[key]
    new = rng.choice(VALUES)
    if new is ABSENT:
        del inner[spot[-1]]
    else:
        inner[spot[-1]] = copy.deepcopy(new)
    _write(path, value, lines)
    return f"{path.name} {spot} = {'absent' if new is ABSENT else repr(new)[:60]}"


class Terminal(io.TextIOWrapper):
    """Standard output of an ASCII terminal."""

    def __init__(self):
        super().__init__(io.BytesIO(), encoding="ascii", errors="strict", write_through=True)


def outcome(args, folder):
    """What is wrong with the program's outcome, "" if nothing."""
    out, err = Terminal(), io.StringIO()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            code = main(args)
    except UnicodeEncodeError as error:
        return f"cannot be printed: {error}"
    except Exception as error:
        return f"traceback: {type(error).__name__}: {error}"
    printed = out.buffer.getvalue().decode("ascii")
    if code == 2:
        named = str(folder) in err.getvalue()
        return "" if named and not printed else f"names no file: {err.getvalue()!r}"
    if code not in (0, 1):
        return f"exit code {code}"
    try:
        json.loads(printed, parse_constant=lambda constant: pytest.fail(f"{constant} in JSON"))
    except ValueError as error:
        return f"invalid JSON: {error}"
    return ""


def attempt(name, folder, rng):
    """One mutation of one benchmark's files, and what is wrong with its outcome."""
    texts = GRADES.get(name, TEXTS)[: 1 if name == "vizwiz" else None]
    predictions, annotations = FILES[name](folder, texts)
    files = [path for path in folder.rglob("*") if path.is_file() and path.suffix not in (".txt", ".csv")]
    change = mutate(sorted(files), rng)
    args = ["score", name, "--predictions", str(predictions)]
    return change, outcome(
        args if annotations is None else [*args, "--annotations", str(annotations)], folder
    )


@pytest.mark.parametrize("name", sorted(FILES))
def test_one_changed_field(name, monkeypatch, tmp_path):
    monkeypatch.setattr(caption_java, "missing", lambda: "not in this test")
    rng = random.Random(name)
    found = []
    for number in range(8 if name in ("mme", "captions") else 25):
        folder = tmp_path / str(number)
        folder.mkdir()
        change, wrong = attempt(name, folder, rng)
        if wrong:
            found.append(f"{change}: {wrong}")
    assert not found


def test_q_bench_a3(tmp_path, capsys):
    _q_bench_a3(tmp_path, None)
    assert main(["score", "q_bench_a3", "--predictions", str(tmp_path / "p")]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["n"], result["unparsed"]) == (21, 0)
    # Ranks 1 2 3 and 1 3 2; the softmax is nearly linear at a temperature of 100.
    assert result["score"] == pytest.approx(0.5)
    assert result["mean_plcc"] == pytest.approx(0.6547, abs=1e-3)
    # Annotations go by the database, whichever of the two forms either file has.
    (tmp_path / "g").mkdir()
    for path in sorted((tmp_path / "p").iterdir()):
        (tmp_path / "g" / path.name).write_text(path.read_text())
        rows = [json.dumps(row) for row in json.loads(path.read_text())]
        path.rename(path.with_suffix(".jsonl")).write_text("\n".join(rows))
    given = ["--predictions", str(tmp_path / "p"), "--annotations", str(tmp_path / "g")]
    assert main(["score", "q_bench_a3", *given]) == 0
    assert json.loads(capsys.readouterr().out) == result
    (tmp_path / "g" / "kadid.json").unlink()
    assert main(["score", "q_bench_a3", *given]) == 2
    assert "no kadid.json" in " ".join(capsys.readouterr().err.split())
    (tmp_path / "p" / "kadid.jsonl").unlink()
    assert main(["score", "q_bench_a3", "--predictions", str(tmp_path / "p")]) == 1


def test_what_is_no_answer_does_not_count_as_its_text(tmp_path, capsys):
    rows = [
        {"question_id": i, "text": text} for i, text in enumerate([float("nan"), ["cat"], {"a": 1}, True])
    ]
    gold = [
        {"question_id": i, "answer": text} for i, text in enumerate(["nan", "['cat']", "{'a': 1}", "True"])
    ]
    _write(tmp_path / "p", rows, True)
    _write(tmp_path / "g", gold, True)
    assert (
        main(["score", "gqa", "--predictions", str(tmp_path / "p"), "--annotations", str(tmp_path / "g")])
        == 0
    )
    result = json.loads(capsys.readouterr().out)
    assert (result["score"], result["unparsed"]) == (0.0, 4)
    assert result["problems"]["unusable_answer"]["count"] == 4


def test_messages_about_files(tmp_path, capsys):
    (tmp_path / "empty.json").write_text("[]")
    for path, said in ((tmp_path, "is a folder"), (tmp_path / "empty.json", "no JSON found; expected")):
        assert main(["score", "vqa", "--predictions", str(path), "--annotations", str(path)]) == 2
        message = capsys.readouterr().err
        assert said in message
        assert "half-written" not in message


if __name__ == "__main__":
    caption_java.missing = lambda: "not here"
    rng, kinds, count = random.Random(0), collections.Counter(), int(sys.argv[1])
    assert len(TASKS) == 14
    for number in range(count):
        benchmark = sorted(FILES)[number % len(FILES)]
        with tempfile.TemporaryDirectory() as folder:
            change, wrong = attempt(benchmark, Path(folder), rng)
        if wrong:
            kinds[wrong.split(":")[0]] += 1
            print(f"{benchmark}: {change}: {wrong}"[:300])
    print(f"{count} mutations: {dict(kinds) or 'nothing wrong'}")
