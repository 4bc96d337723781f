import argparse
import base64
import hashlib
import io
import json
import re

import numpy as np
import pytest
from ml_collections import ConfigDict
from PIL import Image
from rich.console import Console
from test_answer import make_model, mini  # noqa: F401  (a fixture)

from mllm_jax.cli import report as report_verb
from mllm_jax.evaluation.grouping import Entry, load_groups, paper_axes
from mllm_jax.evaluation.regroup import regroup
from mllm_jax.evaluation.report import content, cost_plot, losses, paired, radar
from mllm_jax.evaluation.report.example_sheet import plot_examples
from mllm_jax.evaluation.report.runs import ReportError, load_runs
from mllm_jax.evaluation.report.write import write_report
from mllm_jax.evaluation.run import evaluate
from mllm_jax.evaluation.store import StoreError
from mllm_jax.evaluation.tables import (
    combined_groups,
    markdown_table,
    percent,
    print_scores,
    rows_from_dicts,
    score_rows,
)

GROUPS = {"scene": "coarse", "style": "coarse", "counting": "fine", "reading": "fine"}


def scores(shift=0.0):
    """What `scores.json` holds, with made-up numbers."""

    def one(value):
        return {
            "score": value,
            "subtasks": dict.fromkeys(GROUPS, value),
            "groups": {"coarse": value, "fine": value},
        }

    counts = {name: [4, 10] for name in GROUPS}
    head = {"n": 40, "unparsed": 1, "unit": "fraction", "counts": counts}
    return (
        head
        | one(0.8 + shift)
        | {"blind": one(0.3), "majority": one(0.25), "open": {"predictions": one(0.7)}}
    )


def metrics(stage, count):
    for step in range(1, count + 1):
        record = {"stage": stage, "step": step, "loss": 2 / step, "learning_rate": 1e-3, "step_seconds": 0.5}
        yield record | {"tokens_per_second": 1000.0, "grad_norm": 1.0, "grad_norm/connector": 0.5}


def picture():
    buffer = io.BytesIO()
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(buffer, "PNG")
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def make_run(directory, connector="mlp2x_gelu", tokens=144, shift=0.0, image_size=84):
    """A work directory with an evaluation, as training and `evaluate` leave it."""
    out = directory / "eval"
    (out / "mini").mkdir(parents=True)
    rows = [{**vars(row)} for row in score_rows(scores(shift), GROUPS)]
    model = {
        "connector": connector, "connector_options": {}, "visual_tokens": tokens, "image_size": image_size,
        "vision": "ViT", "llm": "LLM", "parameters": {"vision": 10, "connector": 2, "llm": 7},
    }  # fmt: skip
    benchmark = {"kind": "mini", "groups": GROUPS, "rows": rows, "scores": scores(shift)}
    (out / "summary.json").write_text(json.dumps({"model": model, "benchmarks": {"mini": benchmark}}))
    example = {
        "pictures": [picture()],
        "question": "how <b>many</b>?",
        "answers": ["2"],
        "ability": "counting",
    }
    examples = [example | {"text": "2", "right": True}, example | {"text": "", "right": False}]
    (out / "mini" / "examples.json").write_text(json.dumps(examples))
    (directory / "config.json").write_text(
        json.dumps({"model": {"connector": {"name": connector}}, "seed": 0})
    )
    records = [*metrics("pretrain", 5), *metrics("finetune", 60)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(r) + "\n" for r in records))
    return directory


def is_png(path):
    with Image.open(path) as image:
        image.load()
        return image.format == "PNG" and min(image.size) > 300


def test_rows_of_a_score():
    rows = score_rows(scores(), GROUPS)
    assert [row.name for row in rows] == ["all", "coarse", "scene", "style", "fine", "counting", "reading"]
    assert rows[0].n == 40
    assert rows[1].n == 20
    assert rows[2].values == {"model": 0.8, "blind": 0.3, "majority": 0.25, "open": 0.7}
    assert rows_from_dicts([vars(row) for row in rows]) == rows
    text = markdown_table(rows)
    assert "| **coarse** | **20** | **80.0** | **30.0** | **25.0** | **70.0** |" in text
    console = Console(record=True, width=100, file=io.StringIO())
    print_scores(console, "mini", rows)
    assert re.search(r"scene\s+│\s+10\s+│\s+80\.0", console.export_text())
    assert score_rows({"score": None, "subtasks": {}, "groups": {}, "n": 3}, {}) == []
    assert percent(None) == "–"


def test_percent_scores_become_fractions():
    value = {"score": 80.0, "subtasks": {"a": 50.0}, "groups": {}, "n": 2, "unit": "percent"}
    rows = score_rows(value, {"a": ""})
    assert [row.values["model"] for row in rows] == [0.8, 0.5]


def test_questions_without_an_ability_have_a_row_beside_abilities_only():
    value = {"score": 0.8, "subtasks": {"all": 0.8}, "groups": {}, "n": 5, "unit": "fraction"}
    assert [row.level for row in score_rows(value, {"all": ""})] == ["all"]
    value["subtasks"] = {"all": 0.5, "nouns": 1.0}
    rows = score_rows(value, {"all": "", "nouns": ""})
    assert [(row.level, row.name, row.values["model"]) for row in rows[1:]] == [
        ("ability", "all", 0.5),
        ("ability", "nouns", 1.0),
    ]


def test_radar(tmp_path):
    values = dict.fromkeys(GROUPS, 0.5)
    series = [radar.Series("m", values), radar.Series("b", {"scene": 0.1}, "blind")]
    radar.plot_radar(series, GROUPS, tmp_path / "deep" / "radar.png", "title")
    assert is_png(tmp_path / "deep" / "radar.png")
    radar.plot_radar(series, GROUPS, tmp_path / "own.png", own_scales=True)
    assert is_png(tmp_path / "own.png")
    with pytest.raises(ValueError, match="at least three"):
        radar.plot_radar(series, {"scene": "coarse"}, tmp_path / "x.png")


@pytest.mark.parametrize(
    ("scores_of_models", "ends"),
    [
        ((0.62, 0.81), (0.55, 0.85)),
        ((0.5, 0.5), (0.45, 0.55)),
        ((0.0, 0.01), (0.0, 0.1)),
        ((0.99, 1.0), (0.9, 1.0)),
        ((), (0, 1)),
    ],
)
def test_an_axis_of_its_own_scale_holds_all_models(scores_of_models, ends):
    series = [radar.Series("m", {"a": score}) for score in scores_of_models]
    assert radar.own_scale([*series, radar.Series("b", {"a": 0.2}, "blind")], "a") == pytest.approx(ends)


def test_cost(tmp_path):
    points = [cost_plot.CostPoint("c", f"{n:g} px", n, {"fine": n / 100}) for n in (56.0, 84.0)]
    cost_plot.plot_cost(points, "fine", "tokens", tmp_path / "cost.png")
    assert is_png(tmp_path / "cost.png")
    with pytest.raises(ValueError, match="no run has a score for 'coarse'"):
        cost_plot.plot_cost(points, "coarse", "tokens", tmp_path / "none.png")


def test_lines_join_what_is_asked_of_them(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(cost_plot.plots, "save_figure", lambda figure, out: figures.append(figure))
    points = [
        cost_plot.CostPoint(
            "pool", f"{size} px", tokens, {"fine": (tokens + size) / 200}, f"{tokens:g} tokens"
        )
        for size in (56, 84)
        for tokens in (16.0, 36.0)
    ]
    cost_plot.plot_cost(points, "fine", "tokens", tmp_path / "cost.png")
    lines = [line.get_xydata().tolist() for line in figures[0].axes[0].lines]
    assert [line for line in lines if len(line) > 1] == [[[16, 36], [16, 50]], [[36, 46], [36, 60]]]


def test_a_run_has_the_same_colour_in_every_chart(tmp_path):
    runs = load_runs([make_run(tmp_path / "dear"), make_run(tmp_path / "cheap", "linear", 36)])
    assert runs[0].costs["visual tokens per image"] > runs[1].costs["visual tokens per image"]
    for cost in set(runs[0].costs) & set(runs[1].costs):
        points = content._cost_points("mini", runs, cost)  # colours go by their order
        assert [point.series for point in points] == ["dear", "cheap"]


def test_loss_curves_and_what_a_restart_wrote_again(tmp_path):
    path = tmp_path / "metrics.jsonl"
    records = list(metrics("pretrain", 4))
    again = [record | {"loss": 9.0} for record in records[2:]]
    path.write_text("".join(json.dumps(r) + "\n" for r in records + again) + '{"stage": "pre')
    found = losses.read_metrics(path)
    assert [record["step"] for record in found["pretrain"]] == [1, 2, 3, 4]
    assert [record["loss"] for record in found["pretrain"]][2:] == [9.0, 9.0]
    losses.plot_losses(path, tmp_path / "loss.png")
    assert is_png(tmp_path / "loss.png")
    path.write_text('{"stage": "a", "step": 1, "loss": 1}\nbroken\n{"stage": "a", "step": 2, "loss": 1}\n')
    with pytest.raises(ValueError, match="line 2 is damaged"):
        losses.read_metrics(path)
    path.write_text("")
    with pytest.raises(ValueError, match="no records"):
        losses.plot_losses(path, tmp_path / "none.png")


def test_example_sheet(tmp_path):
    base = {
        "pictures": [picture()],
        "question": "what? $5 or $x^2$ 山\x1e\nA. one\nB. two",
        "answers": ["a"],
        "ability": "x_y",
    }
    items = [base | {"text": "a", "right": r} for r in (True, False, None)] * 3
    items += [
        base | {"text": "", "right": False, "pictures": []},
        base | {"text": "a", "right": True, "pictures": [picture()] * 2},
    ]
    plot_examples(items, tmp_path / "examples.png")
    assert is_png(tmp_path / "examples.png")


def test_report_of_one_run(tmp_path):
    run = make_run(tmp_path / "alone")
    page = write_report([run], run / "eval").read_text()
    assert "<h1>alone</h1>" in page
    assert "how &lt;b&gt;many&lt;/b&gt;?" in page  # what people wrote is never markup
    assert "prefers-color-scheme: dark" in page
    assert 'name="viewport"' in page
    assert not re.findall(r'(?:src|href)="(?!data:)', page)  # nothing is fetched
    assert page.count("data:image/png;base64,") == 3 + 2  # radar, loss of two stages, two examples
    text = (run / "eval" / "report.md").read_text()
    assert "| coarse | 20 | 80.0 | 30.0 | 25.0 | 70.0 |" in text
    for name in re.findall(r"!\[.*?\]\((.*?)\)", text):
        assert is_png(run / "eval" / name), name
    (only,) = json.loads((run / "eval" / "report.json").read_text())["runs"]
    assert only["costs"] == {
        "visual tokens per image": 144,
        "seconds per update": 0.5,
        "training tokens/s": 1000,
    }
    assert only["final_loss"] == {"pretrain": 2 / 5, "finetune": 2 / 60}


def test_report_of_several_runs(tmp_path, capsys):
    runs = [
        make_run(tmp_path / "a" / "run"),
        make_run(tmp_path / "b" / "run", "average_pool", 36, -0.2),
        make_run(tmp_path / "c", "mlp2x_gelu", 256, 0.1, image_size=112),
    ]
    out = tmp_path / "out"
    args = argparse.Namespace(runs=[str(run) for run in runs], out=str(out), groups=None, baseline=None)
    assert report_verb.run(args) == 0
    assert capsys.readouterr().out.strip() == str(out / "report.html")
    text = (out / "report.md").read_text()
    names = [load.name for load in load_runs(runs)]
    assert names[:2] == ["a/run", "b/run"]
    assert f"| % | n | {' | '.join(names)} | {', blind | '.join(names)}, blind | majority |" in text
    assert '| model.connector.name | "mlp2x_gelu" | "average_pool" |' in text
    assert {p.name for p in out.glob("*.png")} == {
        "radar_84px.png", "radar_84px_own_scales.png", "radar_112px.png",
        "cost_tokens_1_coarse.png", "cost_tokens_2_fine.png", "loss_pretrain.png", "loss_finetune.png",
        "examples_1.png", "examples_2.png", "examples_3.png",
    }  # fmt: skip
    assert report_verb.run(argparse.Namespace(runs=["x", "y"], out=None, groups=None, baseline=None)) == 2


@pytest.mark.slow
def test_many_runs_stand_under_each_other(tmp_path, monkeypatch):
    monkeypatch.setattr(content, "_WIDE", 1)
    write_report([make_run(tmp_path / "r0"), make_run(tmp_path / "r1", "linear", 36)], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "| % | all | coarse | fine |" in text
    assert "| r1 | 80.0 | 80.0 | 80.0 |" in text
    assert "| r1 | linear | 84 |" in text
    assert "<summary>mini: examples of r1</summary>" in (tmp_path / "out" / "report.html").read_text()


@pytest.mark.slow
def test_runs_that_were_asked_other_questions_are_said_to_be(tmp_path):
    runs = [make_run(tmp_path / name) for name in ("all", "few", "same")]
    summary = json.loads((runs[1] / "eval" / "summary.json").read_text())
    benchmark = summary["benchmarks"]["mini"]
    benchmark["scores"]["n"] = 12
    for row in benchmark["rows"]:
        row["n"] = 6 if row["level"] == "group" else 12 if row["level"] == "all" else 3
    (runs[1] / "eval" / "summary.json").write_text(json.dumps(summary))
    for run, ids in zip(runs, (range(40), range(30, 42), range(40)), strict=True):
        answers = "".join(json.dumps({"question_id": f"q{i}", "text": "a"}) + "\n" for i in ids)
        (run / "eval" / "mini" / "predictions.jsonl").write_text(answers)
    write_report(runs[:2], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "not asked the same questions (all 40, few 12); 10 question ids are common to all" in text
    assert "are not to be compared" in text
    assert (
        "| % | n, all | n, few | all | few | all, blind | few, blind | all, majority | few, majority |"
        in text
    )
    assert "| coarse | 20 | 6 | 80.0 |" in text
    assert "40 questions." not in text
    write_report([runs[0], runs[2]], tmp_path / "like")
    text = (tmp_path / "like" / "report.md").read_text()
    assert "40 questions." in text
    assert "| % | n | all | same |" in text
    assert "not asked" not in text
    for run, digest in ((runs[0], "x"), (runs[2], "y")):  # the same ids, other prompts
        (run / "eval" / "mini" / "manifest.json").write_text(json.dumps({"benchmark": digest}))
    write_report([runs[0], runs[2]], tmp_path / "words")
    text = (tmp_path / "words" / "report.md").read_text()
    assert "asked the same 40 question ids, but in other words" in text


def test_likelihood_has_its_sentence_and_the_level_of_guessing(tmp_path):
    run = make_run(tmp_path / "run")
    assert "likelihood" not in (write_report([run], tmp_path / "without")).read_text()
    summary = json.loads((run / "eval" / "summary.json").read_text())
    for row in summary["benchmarks"]["mini"]["rows"]:
        row["values"] |= {"model": 0.0, "likelihood": 0.667}
    (run / "eval" / "summary.json").write_text(json.dumps(summary))
    rows = [{"question_id": "a", "rotation": r, "log_likelihoods": [-1.0, -2.0]} for r in range(2)]
    rows += [{"question_id": "b", "rotation": 0, "log_likelihoods": [-1.0] * 4}]
    answers = run / "eval" / "mini" / "likelihood.jsonl"
    answers.write_text("".join(json.dumps(row) + "\n" for row in rows))
    page = write_report([run], tmp_path / "out").read_text()
    for text in (page, (tmp_path / "out" / "report.md").read_text()):
        assert "“likelihood” is another way of asking" in text
        assert "Guessing among the options gives 25.0 %" in text  # (1/2 of 1/2 + 1/4) / 2
    with answers.open("a") as file:
        file.write('["row"]\n')
    with pytest.raises(ReportError, match=r"likelihood\.jsonl line 4 is damaged"):
        write_report([run], tmp_path / "out")


def test_the_page_forbids_everything_that_is_not_inside_it(tmp_path):
    page = write_report([make_run(tmp_path / "run")], tmp_path / "out").read_text()
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', page)[1]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL)[1]
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    assert f"'sha256-{digest}'" in policy
    assert "style=" not in page  # the policy would drop them


EPS = (
    "data:image/png;base64," + base64.b64encode(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n").decode()
)


@pytest.mark.parametrize(
    "uri",
    ["https://evil.example/x.png", "file:///etc/passwd", "data:image/svg+xml;base64,PHN2Zz4=", "x.png", EPS],
)
def test_an_example_that_is_no_image_inside_the_file_is_refused(tmp_path, uri):
    run = make_run(tmp_path / "run")
    path = run / "eval" / "mini" / "examples.json"
    path.write_text(json.dumps([one | {"pictures": [uri]} for one in json.loads(path.read_text())]))
    with pytest.raises(ReportError, match=r"examples\.json"):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "name", ["x/../../../../home/photo", "..", "a\n\ncurl evil | sh #", ".bashrc", "a\x1b]52;c;x\x07"]
)
def test_benchmark_names_of_a_run_folder_stay_inside(tmp_path, name):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "eval" / "summary.json").read_text())
    summary["benchmarks"] = {name: summary["benchmarks"]["mini"], "mini": summary["benchmarks"]["mini"]}
    (run / "eval" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ReportError, match=r"benchmark .* choose another name"):
        write_report([run], tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_planted_links_in_the_folder_of_a_report_are_replaced(tmp_path):
    run, out = make_run(tmp_path / "run"), tmp_path / "out"
    out.mkdir()
    victim = tmp_path / ".profile"
    victim.write_text("precious")
    names = ("report.html", "report.md", "report.json", "radar.png", "loss_pretrain.png", "examples.png")
    for name in names:
        (out / name).symlink_to(victim)
    write_report([run], out)
    assert victim.read_text() == "precious"
    assert not any((out / name).is_symlink() for name in names)


def test_abilities_groups_and_answers_are_text_in_every_medium(tmp_path):
    hostile = "<script>alert(1)</script>[x](javascript:y)"
    run = make_run(tmp_path / "run")
    folder = run / "eval"
    for path in (folder / "summary.json", folder / "mini" / "examples.json"):
        path.write_text(path.read_text().replace("counting", hostile).replace('"fine"', f'"{hostile}"'))
    (tmp_path / "<img src=x>").mkdir()
    run = run.rename(tmp_path / "<img src=x>" / "<b>")
    page = write_report([run], tmp_path / "out").read_text()
    text = (tmp_path / "out" / "report.md").read_text()
    for shown in (page, text):
        assert not re.search(r"(?<!\\)<(script|b>|img src=x)", shown)
    assert "&lt;script&gt;" in page
    assert r"\<script\>alert(1)\</script\>\[x\](javascript:y)" in text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda s: s["model"].pop("llm"), "'model' has no 'llm'"),
        (lambda s: s["model"].update(visual_tokens="many"), "'visual_tokens' is 'many'"),
        (lambda s: s.update(benchmarks=[]), "'benchmarks' is not an object"),
        (lambda s: s["benchmarks"]["mini"]["rows"].append({}), r"'rows'\[7\] has no 'level'"),
        (lambda s: s["benchmarks"]["mini"]["scores"].update(groups={"a": "b"}), "'groups': 'a' is 'b'"),
        (lambda s: s["benchmarks"]["mini"]["scores"].update(n=True), "'n' is True"),
    ],
)
def test_a_summary_of_another_shape_is_a_message(tmp_path, change, message):
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "eval" / "summary.json").read_text())
    change(summary)
    (run / "eval" / "summary.json").write_text(json.dumps(summary))
    with pytest.raises(ReportError, match=rf"summary\.json cannot be read: .*{message}"):
        load_runs([run])


def test_the_chart_of_mmbench_has_the_papers_axes(tmp_path):
    assert paper_axes("mini") == []
    assert paper_axes("mmbench_cn") == paper_axes("mmbench")
    assert len(paper_axes("mmbench")) == 12
    run = make_run(tmp_path / "run")
    summary = json.loads((run / "eval" / "summary.json").read_text())
    groups = {name: entry.group for name, entry in load_groups()["mmbench"].items()}
    values = dict.fromkeys(groups, 0.5)
    held = dict.fromkeys(("coarse", "fine", "reasoning"), 0.25)
    found = {"n": 20, "unparsed": 0, "unit": "fraction", "score": 0.5, "subtasks": values, "groups": held}
    found["group_scores"] = {"micro": held, "macro": dict.fromkeys(held, 0.5)}
    rows = [vars(row) for row in score_rows(found, groups)]
    summary["benchmarks"] = {"mmbench": {"kind": "mmbench", "groups": groups, "rows": rows, "scores": found}}
    (run / "eval" / "summary.json").write_text(json.dumps(summary))
    write_report([run], tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "The charts show the 12 abilities here that are on the paper's chart." in text
    assert "| micro, % | 25.0 | 25.0 | 25.0 |\n| macro, % | 50.0 | 50.0 | 50.0 |" in text


def test_stored_scores_under_another_grouping():
    scene, place, video = "Scene Understanding", "Spatial Relation", "Action Recognition"
    table = {"seed_bench": {scene: Entry("x", "proposed"), place: Entry("fine", "verified")}}
    one = {"score": 0.3, "subtasks": {scene: 0.25, place: 0.5, video: 0.0}, "groups": {"fine": 0.3}}
    one["counts"] = {scene: [1, 4], place: [1, 2], video: [0, 3]}
    scores = one | {"n": 6, "unparsed": 0, "unit": "fraction", "blind": one}
    stored = {"kind": "seed_bench", "groups": dict.fromkeys((scene, place), "fine"), "scores": scores}
    stored["rows"] = [{}]
    found = regroup(stored, table)
    assert found["groups"] == {place: "fine", scene: "x", video: ""}
    rows = {(row["level"], row["name"]): row["values"] for row in found["rows"]}
    assert rows["group", "x"] == {"model": 0.25, "blind": 0.25}
    assert rows["group", "fine"] == {"model": 0.5, "blind": 0.5}
    assert rows["ability", video] == {"model": 0.0, "blind": 0.0}
    assert found["scores"]["group_scores"]["normalised"] == {"fine": 50.0, "x": 25.0}
    assert stored["scores"]["groups"] == {"fine": 0.3}  # the stored ones are left as they were
    with pytest.raises(ValueError, match="no sub-task 'Spatial Relation'"):
        regroup(stored, {"seed_bench": {scene: Entry("x", "proposed")}})
    assert regroup(stored, {}) == stored
    points = {
        "score": 300.0,
        "unit": "points",
        "n": 8,
        "unparsed": 0,
        "subtasks": {"scene": 100.0, "OCR": 200.0},
    }
    table = {"mme": {"scene": Entry("coarse", "proposed"), "OCR": Entry("coarse", "proposed")}}
    found = regroup(
        stored | {"kind": "mme", "scores": points | {"groups": {}, "group_normalised": {}}}, table
    )
    assert found["scores"]["groups"] == {"coarse": 300.0}
    assert found["scores"]["group_normalised"] == {"coarse": 75.0}


def test_regrouping_keeps_how_groups_are_combined():
    """`mini`: groups are the mean of abilities, the pooled ones stand beside it, open answers lie deeper."""
    counts = {"scene": [1, 4], "style": [3, 6], "counting": [2, 2], "reading": [0, 2]}

    def one(shift=0):
        cells = {name: [max(0, right - shift), n] for name, (right, n) in counts.items()}
        found = {"n": 14, "unit": "fraction", "score": 0.5, "counts": cells}
        found["subtasks"] = {name: right / n for name, (right, n) in cells.items()}
        return found | {"groups": {"coarse": 9.0}, "micro_groups": {"coarse": 9.0}}

    deep = {"predictions": one(1), "blind": one(2), "majority": one(3)}
    stored = {"kind": "mini", "groups": GROUPS, "rows": [{}], "scores": one() | {"open": deep}}
    table = {"mini": {name: Entry("all" if name != "counting" else "few", "proposed") for name in GROUPS}}
    found = regroup(stored, table)
    scores = found["scores"]
    assert scores["groups"] == pytest.approx({"few": 1.0, "all": (1 / 4 + 3 / 6 + 0) / 3})
    assert scores["micro_groups"] == pytest.approx({"few": 1.0, "all": 4 / 12})
    assert combined_groups(scores)["micro, %"] == {"all": "33.3", "few": "100.0"}
    assert scores["open"]["predictions"]["groups"] == pytest.approx({"few": 0.5, "all": (2 / 6) / 3})
    rows = {(row["level"], row["name"]): row["values"] for row in found["rows"]}
    assert set(rows["group", "few"]) == {"model", "open", "open blind", "open majority"}
    assert rows["group", "few"]["open blind"] == 0.0
    assert stored["scores"]["open"]["predictions"]["groups"] == {"coarse": 9.0}
    entries = {name if name != "counting" else "conting": Entry("x", "proposed") for name in GROUPS}
    with pytest.raises(ValueError, match="no sub-task 'counting'; did you mean 'conting'"):
        regroup(stored, {"mini": entries})


def test_percent_groups_stay_percent():
    scores = {"n": 4, "unit": "percent", "score": 25.0, "subtasks": {"a": 25.0}, "counts": {"a": [1, 4]}}
    stored = {"kind": "blink", "groups": {"a": ""}, "rows": [{}], "scores": scores | {"groups": {}}}
    found = regroup(stored, {"blink": {"a": Entry("x", "proposed")}})
    assert [row["values"]["model"] for row in found["rows"]] == [0.25, 0.25, 0.25]


def write_groups(path, **benchmarks):
    table = {
        kind: {name: {"group": group, "status": "proposed"} for name, group in entries.items()}
        for kind, entries in benchmarks.items()
    }
    path.write_text(json.dumps(table))
    return path


def with_counts(run, **changes):
    """Gives a run of `make_run` the counts that real scores have under every condition."""
    path = run / "eval" / "summary.json"
    summary = json.loads(path.read_text())
    held = summary["benchmarks"]["mini"]
    for one in (held["scores"]["blind"], held["scores"]["majority"], held["scores"]["open"]["predictions"]):
        one["counts"] = held["scores"]["counts"]
    held |= changes
    path.write_text(json.dumps(summary))
    return run


def test_the_page_names_the_grouping_file_and_what_it_used(tmp_path):
    run = with_counts(make_run(tmp_path / "run"))
    file = write_groups(tmp_path / "my.json", mini=GROUPS | {"scene": "new"}, mmbench={"ocr": "fine"})
    write_report([run], tmp_path / "out", file)
    text = (tmp_path / "out" / "report.md").read_text()
    assert f"Sub-tasks of mini are grouped by {file}. It also groups mmbench, of which no scores" in text
    assert "| new | 10 |" in text
    assert str(file) in (tmp_path / "out" / "report.html").read_text()
    assert json.loads((tmp_path / "out" / "report.json").read_text())["groups"] == str(file)


@pytest.mark.parametrize(
    ("kind", "benchmarks", "message"),
    [
        ("mini", {"minni": GROUPS}, "'minni' is no benchmark; did you mean 'mini'"),
        ("mini", {"mmbench": {"ocr": "fine"}}, "groups mmbench, but the benchmarks scored here are mini"),
        ("mini", {}, "groups nothing"),
        ("mini", {"mini": {"scene": "x"}}, "the grouping of 'mini' has no sub-task"),
        ("pope", {"pope": GROUPS}, "stored scores of 'pope' do not say.*leave 'pope' out"),
    ],
)
def test_grouping_files_that_cannot_be_used(tmp_path, capsys, kind, benchmarks, message):
    run = with_counts(make_run(tmp_path / "run"), kind=kind)
    if kind == "pope":  # its sub-tasks' scores are no shares of questions
        path = run / "eval" / "summary.json"
        summary = json.loads(path.read_text())
        del summary["benchmarks"]["mini"]["scores"]["counts"]
        path.write_text(json.dumps(summary))
    file = write_groups(tmp_path / "my.json", **benchmarks)
    args = argparse.Namespace(runs=[str(run)], out=str(tmp_path / "out"), groups=str(file), baseline=None)
    assert report_verb.run(args) == 1
    assert re.search(message, capsys.readouterr().err)
    args.groups = str(tmp_path / "absent.json")
    assert report_verb.run(args) == 1
    assert "absent.json: not a readable grouping file" in capsys.readouterr().err


def test_groups_of_similar_names_have_their_own_pictures(tmp_path, monkeypatch):
    monkeypatch.setattr(
        cost_plot, "plot_cost", lambda points, group, cost, path: path.write_text(f"{cost}: {group}")
    )
    names = ("粗", "细", "a b", "a_b")
    runs = load_runs([make_run(tmp_path / "r0"), make_run(tmp_path / "r1", "linear", 36)])
    for run in runs:
        run.benchmarks["mini"]["rows"] = [
            {"level": "group", "name": name, "group": name, "n": 1, "values": {"model": 0.5}}
            for name in names
        ]
    (section,) = content._costs("mini", runs, tmp_path, "")
    files = [figure.file for part in section.parts for figure in part.figures]
    assert [(tmp_path / file).read_text() for file in files] == [
        f"visual tokens per image: {name}" for name in names
    ]


def test_groups_of_points_are_combined_by_sum_and_mean():
    found = {"unit": "points", "groups": {"fine": 300.0}, "group_mean": {"fine": 150.0}}
    assert combined_groups(found | {"group_normalised": {"fine": 75.0}}) == {
        "normalised, 0–100": {"fine": "75.0"},
        "sum, points": {"fine": "300.0"},
        "mean, points": {"fine": "150.0"},
    }
    assert combined_groups({"groups": {}}) == {}


def test_runs_that_cannot_be_reported(tmp_path, capsys):
    with pytest.raises(ReportError, match=r"holds no evaluation.*eval\.py --workdir"):
        write_report([tmp_path], tmp_path)
    run = make_run(tmp_path / "run")
    with pytest.raises(ReportError, match="given twice"):
        load_runs([run, run])
    (run / "eval" / "summary.json").write_text("{")
    assert report_verb.run(argparse.Namespace(runs=[str(run)], out=None, groups=None, baseline=None)) == 1
    assert "summary.json cannot be read" in capsys.readouterr().err


def test_evaluate_writes_everything(mini, tmp_path):  # noqa: F811
    model = make_model()
    work = tmp_path / "work"
    look = {"kind": "caption", "path": str(mini.parent / "images"), "images": "", "max_new_tokens": 2}
    config = ConfigDict(
        {
            "benchmarks": {"mini": {"kind": "mini", "path": str(mini), "images": ""}, "look": look},
            "batch_size": 8, "max_new_tokens": 3, "blind": True, "likelihood": True, "examples": 4,
            "buckets": (128, 192),
        }
    )  # fmt: skip
    console = Console(record=True, width=120, file=io.StringIO())
    summary = evaluate(model, config, work, console)
    out = work / "eval"
    assert summary == json.loads((out / "summary.json").read_text())
    assert set(summary["benchmarks"]) == {"mini", "look"}
    assert summary["model"]["visual_tokens"] == 4
    assert summary["benchmarks"]["mini"]["rows"][0]["values"].keys() == {
        "model", "blind", "majority", "likelihood", "open", "open blind", "open majority",
    }  # fmt: skip
    assert "## mini" in (out / "table.md").read_text()
    for name in ("report.html", "report.md", "report.json", "examples_mini.png", "examples_look.png"):
        assert (out / name).stat().st_size > 500, name
    shown = json.loads((out / "mini" / "examples.json").read_text())
    assert [one["ability"] for one in shown] == ["scene", "scene", "counting", "counting"]
    rows = [json.loads(line) for line in (out / "look" / "predictions.jsonl").read_text().splitlines()]
    assert all(row["new_tokens"] <= 2 for row in rows)
    printed = console.export_text()
    assert "report.html" in printed
    assert "counting" in printed
    before = {p: p.read_bytes() for p in out.rglob("*.jsonl")}
    assert evaluate(model, config, work, Console(file=io.StringIO())) == summary
    assert {p: p.read_bytes() for p in out.rglob("*.jsonl")} == before
    config.benchmarks = {"again": look}
    assert set(evaluate(model, config, work, Console(file=io.StringIO()))["benchmarks"]) == {
        "mini",
        "look",
        "again",
    }
    with pytest.raises(StoreError, match="holds the evaluation of another model"):
        evaluate(make_model(seed=1), config, work, Console(file=io.StringIO()))


def answer_rows(right, options=("x", "y"), ability="scene"):
    """Answers to questions q0, q1, ...: the letter of `right` says which get their right answer "x"."""
    for number, letter in enumerate(right):
        yield {
            "question_id": f"q{number}", "rotation": 0, "ability": ability, "group": "", "options": list(options),
            "answer": "x", "prompt": f"what is {number}?", "text": "x" if letter == "1" else "y",
        }  # fmt: skip


def with_answers(run, rows, name="mini", file="predictions.jsonl"):
    (run / "eval" / name / file).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return run


def difference_of(out, run=0, group=0):
    return json.loads((out / "report.json").read_text())["differences"]["mini"][run]["differences"][group]


def test_differences_are_of_common_questions_alone(tmp_path):
    """q0-q9 are common, of which b asks q9 in other words; each has questions that the other one lacks."""
    ours, theirs = list(answer_rows("1100000000" + "1111")), list(answer_rows("1111110000"))
    theirs[9]["prompt"] = "other words"
    theirs.append(theirs[0] | {"question_id": "only b"})
    for row in (*ours[6:], *theirs[6:]):
        row["ability"] = "counting"
    runs = [with_answers(make_run(tmp_path / name), rows) for name, rows in (("a", ours), ("b", theirs))]
    write_report(runs, tmp_path / "out")
    found = json.loads((tmp_path / "out" / "report.json").read_text())
    assert found["baseline"] == "a"
    (comparison,) = found["differences"]["mini"]
    assert [(one["group"], one["n"]) for one in comparison["differences"]] == [
        ("all", 9),
        ("coarse", 6),
        ("fine", 3),
    ]
    everything, coarse, fine = comparison["differences"]
    assert everything["baseline"] == pytest.approx(2 / 9)
    assert everything["score"] == pytest.approx(6 / 9)
    assert everything["difference"] == pytest.approx(4 / 9)
    # Of 9 draws with probability 4/9 each: none has probability 0.005, at most one 0.041, 8 or 9 0.008, 7 to 9 0.046.
    assert (everything["low"], everything["high"]) == (pytest.approx(1 / 9), pytest.approx(7 / 9))
    assert coarse["difference"] == pytest.approx(4 / 6)
    assert (fine["difference"], fine["low"], fine["high"]) == (0, 0, 0)
    text = (tmp_path / "out" / "report.md").read_text()
    assert "### mini: differences from a" in text
    assert r"| **all** | **9** | **22.2** | **66.7** | **+44.4** | **\[+11.1, +77.8\]** |" in text
    assert "<h3>mini: differences from a</h3>" in (tmp_path / "out" / "report.html").read_text()


def test_a_question_counts_in_a_difference_if_all_its_rotations_are_right(tmp_path):
    runs = []
    for name, second in (("a", "x"), ("b", "y")):
        rows = list(answer_rows("11"))
        rows += [row | {"rotation": 1, "text": second} for row in rows[:1]]
        runs.append(with_answers(make_run(tmp_path / name), rows))
    write_report(runs, tmp_path / "out")
    found = difference_of(tmp_path / "out")
    assert (found["n"], found["baseline"], found["score"]) == (2, 1.0, 0.5)


def test_the_baseline_is_chosen_and_three_runs_are_compared_with_it(tmp_path, capsys):
    said = {"a": "1111", "b": "1000", "c": "1100"}
    runs = [str(with_answers(make_run(tmp_path / name), answer_rows(right))) for name, right in said.items()]
    args = argparse.Namespace(runs=runs, out=str(tmp_path / "out"), groups=None, baseline="b")
    assert report_verb.run(args) == 0
    found = json.loads((tmp_path / "out" / "report.json").read_text())["differences"]["mini"]
    assert [(one["run"], one["differences"][0]["difference"]) for one in found] == [("a", 0.75), ("c", 0.25)]
    text = (tmp_path / "out" / "report.md").read_text()
    assert "differences from b" in text
    assert "| c, coarse | 4 | 25.0 | 50.0 |" in text
    args.baseline = runs[2]
    assert report_verb.run(args) == 0
    assert "differences from c" in (tmp_path / "out" / "report.md").read_text()
    args.baseline = "bb"
    assert report_verb.run(args) == 1
    assert re.search("baseline 'bb' is none of the runs;.*there are a, b, c", capsys.readouterr().err)


def test_where_no_difference_can_be_computed_the_page_says_why(tmp_path):
    runs = [with_answers(make_run(tmp_path / "a"), answer_rows("10"))]
    others = {
        "nothing": [],
        "elsewhere": [row | {"question_id": "z"} for row in answer_rows("1")],
        "newer": [row | {"options": ["x", "y", "z"]} for row in answer_rows("11")],
        "odd": [{"question_id": "q0", "text": "x"}],
    }
    for name, rows in others.items():
        runs.append(with_answers(make_run(tmp_path / name), rows))
    (runs[1] / "eval" / "mini" / "predictions.jsonl").unlink()
    write_report(runs, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "No difference is shown: nothing holds no answers" in text
    assert "No difference is shown: elsewhere and a have no question in common" in text
    assert "No difference is shown: newer and a have no question in common" in text
    assert "No difference is shown: the answers of odd cannot be graded" in text
    assert "95 % interval" not in text
    write_report(runs[:1], tmp_path / "alone")
    assert "differences from" not in (tmp_path / "alone" / "report.md").read_text()
    assert "differences" not in json.loads((tmp_path / "alone" / "report.json").read_text())


def test_a_question_that_is_answered_twice_is_no_pair(tmp_path):
    rows = list(answer_rows("11"))
    runs = [
        with_answers(make_run(tmp_path / "a"), rows),
        with_answers(make_run(tmp_path / "b"), [*rows, rows[0]]),
    ]
    with pytest.raises(ReportError, match=r"predictions\.jsonl line 3 answers .* a second time"):
        write_report(runs, tmp_path / "out")


def test_a_run_that_was_not_asked_a_benchmark_is_no_baseline_for_it(tmp_path):
    runs = [with_answers(make_run(tmp_path / name), answer_rows("10")) for name in ("a", "b", "c")]
    summary = json.loads((runs[0] / "eval" / "summary.json").read_text())
    summary["benchmarks"] = {"other": summary["benchmarks"]["mini"]}
    (runs[0] / "eval" / "summary.json").write_text(json.dumps(summary))
    write_report(runs, tmp_path / "out")
    text = (tmp_path / "out" / "report.md").read_text()
    assert "None: a was not asked mini." in text
    write_report(runs, tmp_path / "out", baseline="c")
    assert "| all | 2 | 50.0 | 50.0 |" in (tmp_path / "out" / "report.md").read_text().replace("*", "")


def test_the_bootstrap_interval_is_that_of_the_binomial():
    # Of 10 draws of 0 or 1: 2 or fewer have probability 0.055, 1 or fewer 0.011.
    assert paired.bootstrap_interval(np.array([0.0, 1.0] * 5)) == pytest.approx((0.2, 0.8))
    assert paired.bootstrap_interval(np.array([0.3] * 7)) == pytest.approx((0.3, 0.3))
    assert paired.bootstrap_interval(np.array([-1.0])) == (-1, -1)
    low, high = paired.bootstrap_interval(np.array([1.0] * 600 + [-1.0] * 400))
    assert (low, high) == pytest.approx((0.2 - 1.96 * 0.96**0.5 / 1000**0.5, 0.2 + 1.96 * 0.031), abs=0.004)


def test_partial_credit_is_shown(tmp_path):
    run = make_run(tmp_path / "run")
    path = run / "eval" / "mini" / "examples.json"
    full, none = json.loads(path.read_text())
    soft = full | {"text": "two", "credit": 0.6}
    path.write_text(
        json.dumps([full | {"credit": 1.0}, soft, none | {"credit": 0.0}, none | {"credit": None}])
    )
    page = write_report([run], tmp_path / "out").read_text()
    assert page.count("(credit ") == 1
    assert "two ✓ (credit 0.6)" in page
    path.write_text(json.dumps([soft | {"credit": "much"}]))
    with pytest.raises(ReportError, match="'credit' is 'much'"):
        write_report([run], tmp_path / "out")
