"""A study: intervals, what is asked of them, the choice of learning rates, and the pages."""

import csv
import json
import pathlib

import numpy as np
import pytest

from mllm_jax.cli.main import main
from mllm_jax.evaluation.report.runs import ReportError
from mllm_jax.evaluation.study.cost import cell_cost
from mllm_jax.evaluation.study.findings import (
    ABSENT,
    FAILS,
    HOLDS,
    OPEN,
    Finding,
    answer,
    answer_time,
    as_dicts,
    difference,
    faster,
    from_dicts,
)
from mllm_jax.evaluation.study.intervals import ALL, Bootstrap, interval
from mllm_jax.evaluation.study.rates import choose, rates_section, untried
from mllm_jax.evaluation.study.results import Study
from mllm_jax.evaluation.study.summary import packed, unpacked
from mllm_jax.evaluation.study.terms import joined, terms
from mllm_jax.evaluation.study.times import Times
from mllm_jax.planning.topology import parse
from mllm_jax.recipes.mini import study_config
from mllm_jax.sweep.cells import load_recipe, read_sweep

ABILITIES = [
    ["scene", "coarse", 60],
    ["counting", "fine", 40],
    ["reading", "fine", 80],
    ["sum", "reasoning", 20],
]
COUNT = 200


def outcomes(share, seed):
    return (np.random.default_rng(seed).random(COUNT) < share).astype(float)


def run(variant, connector, seed, share, scale=1.0, questions="q"):
    overrides = {"model.connector.name": connector}
    if scale != 1:
        overrides["stages.pretrain.connector_rate_scale"] = scale
    tokens = 36 if connector == "average_pool" else 144
    model = {
        "connector": connector,
        "connector_options": {"tokens": tokens},
        "visual_tokens": tokens,
        "image_size": 84,
        "vision": "ViT 6 x 128, patch 7",
        "llm": "4 x 128, vocabulary 1024",
        "parameters": {"connector": 99},
    }
    stage = {"steps": 20, "at": [10, 20], "loss": [2.0, 1.0], "grad_norm": [0.5, 0.1], "step_seconds": 0.25}
    benchmark = {
        "questions": questions,
        "model": packed(outcomes(share, seed).tolist()),
        "blind": packed([0] * COUNT),
    }
    return {
        "name": f"{variant}-seed{seed}", "variant": variant, "seed": seed, "order": 0, "overrides": overrides,
        "model": model, "stages": {"pretrain": stage, "finetune": stage}, "benchmarks": {"mini": benchmark},
    }  # fmt: skip


def summary(runs, findings=(), kind="study"):
    return {
        "format": 1, "kind": kind, "recipe": "configs/x.py:mini", "findings": as_dicts(findings),
        "questions": {"q": ABILITIES, "other": ABILITIES}, "runs": runs,
    }  # fmt: skip


def test_outcomes_are_kept_as_bits():
    values = outcomes(0.4, 0)
    assert len(packed(values.tolist())) == COUNT / 4
    np.testing.assert_array_equal(unpacked(packed(values.tolist()), COUNT), values)
    np.testing.assert_array_equal(unpacked(packed([0.25, 1.0]), 2), [0.25, 1])
    with pytest.raises(ValueError, match="bits for 300 questions"):
        unpacked(packed(values.tolist()), 300)


def test_intervals_are_those_of_a_mean():
    """One seed, one ability: the normal approximation. Equal seeds add nothing when questions are the same."""
    n = 900
    layout, values = [("a", "g", n)], outcomes(0.5, 1)
    values = np.resize(values, n)
    value, low, high = interval(Bootstrap(layout, 1).scores(values[None])["a"])
    error = np.sqrt(value * (1 - value) / n)
    assert value == pytest.approx(values.mean())
    assert (low, high) == pytest.approx((value - 1.96 * error, value + 1.96 * error), abs=0.003)

    same = np.stack([values] * 4)
    crossed = interval(Bootstrap(layout, 4).scores(same)[ALL])
    nested = interval(Bootstrap(layout, 4, crossed=False).scores(same)[ALL])
    assert crossed[2] - crossed[1] == pytest.approx(high - low, rel=0.05)
    assert nested[2] - nested[1] == pytest.approx((high - low) / 2, rel=0.1)


def test_seeds_count_and_differences_are_paired():
    bootstrap = Bootstrap([tuple(each) for each in ABILITIES], 3)
    seeds = np.stack([outcomes(share, 5) for share in (0.3, 0.5, 0.7)])  # seeds that differ much
    scores = bootstrap.scores(seeds)
    assert scores["fine"][0] == pytest.approx((seeds[:, 60:100].mean() + seeds[:, 100:180].mean()) / 2)
    assert scores[ALL][0] == pytest.approx(seeds.mean())
    _, low, high = interval(scores[ALL])
    assert high - low > 0.2
    better = seeds.copy()
    better[:, :60] = 1  # in one ability
    other = bootstrap.scores(better)
    assert interval(other["fine"] - scores["fine"]) == (0, 0, 0)
    _, low, high = interval(other[ALL] - scores[ALL])
    assert low > 0.05
    assert high - low < 0.2


def test_verdicts():
    samples = {
        name: {"fine": np.concatenate([[center], center + np.linspace(-0.02, 0.02, 101)])}
        for name, center in (("kept-84px", 0.6), ("half-84px", 0.5), ("half-2-84px", 0.5), ("low", 0.3))
    }
    base = {"fine": np.full(102, 0.5)}
    samples["base"] = base

    def verdict(left, right, expect):
        (one,) = from_dicts(as_dicts([difference("claim", left, right, "fine", expect)]))
        return answer(one, samples).verdict

    assert verdict("kept-*", "base", "above") == HOLDS
    assert verdict("low", "base", "above") == FAILS
    assert verdict("half-*", "base", "above") == OPEN
    assert verdict("half-*", "base", "at least") == verdict("half-*", "base", "near") == HOLDS
    assert verdict("kept-*", "base", "near") == FAILS
    assert verdict("low|half-84px", "base", "at least") == FAILS  # their mean
    assert verdict("none", "base", "near") == verdict("low|none", "base", "at least") == ABSENT
    assert answer(difference("claim", "half-*", "low", "fine"), samples, ["half-3-84px"]).verdict == ABSENT


def test_times_are_compared_as_ratios():
    key = "step_seconds/finetune"
    seconds = {
        "slow-1": {key: 4.0},
        "slow-2": {key: 1.0},
        "half-1": {key: 0.5},
        "half-2": {key: 0.5},
        "new": {},
    }

    def found(left, right, time=key):
        (one,) = from_dicts(as_dicts([faster("claim", left, right, time)]))
        found = answer_time(one, seconds)
        return round(found.value, 9), round(found.low, 9), round(found.high, 9), found.verdict

    assert found("half-*", "slow-*") == (0.25, 0.125, 0.5, HOLDS)
    assert found("slow-*", "half-1") == (4, 2, 8, FAILS)
    assert found("slow-*", "slow-2")[1:] == (1, 4, OPEN)  # one of them is not
    assert found("half-1", "half-2")[-1] == OPEN  # no faster than can be measured
    assert found("half-*", "none")[-1] == found("half-*", "slow-*", "prefill_seconds")[-1] == ABSENT
    assert found("half-*|new", "slow-*")[-1] == ABSENT  # of one there is no time
    with pytest.raises(ValueError, match="'claim' compares times"):
        Finding("claim", ((-1, "a"), (1, "b")), key, "faster")


def test_measured_times_come_before_logged_ones():
    runs = [run("mlp", "mlp2x_gelu", 0, 0.9), run("pool", "average_pool", 0, 0.4)]
    cells = {
        name: {"step_seconds/pretrain": 1.0, "step_seconds/finetune": 2.0, "token_seconds": 3.0}
        for name in ("mlp", "pool")
    }
    times = Times(Study(summary(runs)), {"device": "1 x cpu", "cells": cells})
    assert times.seconds == cells
    assert times.keys == ["step_seconds/pretrain", "step_seconds/finetune", "token_seconds"]
    assert "1 x cpu" in times.about
    assert "logged" not in times.about
    del cells["pool"]["step_seconds/finetune"]  # then all are those of the logs
    times = Times(Study(summary(runs)), {"device": "1 x cpu", "cells": cells})
    assert [times.seconds[name]["step_seconds/finetune"] for name in ("mlp", "pool")] == [0.25, 0.25]
    assert times.seconds["pool"]["step_seconds/pretrain"] == 1
    assert "Steps of finetune are as the runs logged them" in times.about


def test_seeds_that_are_compared():
    """Those that most cells share: neither one cell with further seeds nor one with fewer takes the others out."""

    def compared(**seeds):
        runs = [run(name, "linear", seed, 0.5) for name, its in seeds.items() for seed in its]
        benchmark = Study(summary(runs)).benchmarks["mini"]
        assert all(len(benchmark.outcomes(v.name)) == len(benchmark.seeds) for v in benchmark.variants)
        return benchmark.seeds, [v.name for v in benchmark.variants], benchmark.incomplete

    assert compared(a=(0, 1), b=(0, 1), c=(0,)) == ([0, 1], ["a", "b"], ["c"])
    assert compared(a=(0, 1), b=(0, 1), c=range(5)) == ([0, 1], ["a", "b", "c"], [])
    assert compared(a=(0, 1, 2), b=(0, 1), c=(0, 1)) == ([0, 1], ["a", "b", "c"], [])


def test_summaries_of_several_folders_become_one(tmp_path, capsys):
    """What ran elsewhere is compared with what runs here: a shipped study with a connector of one's own."""

    def collect(*summaries):
        files = [tmp_path / f"{index}.json" for index in range(len(summaries))]
        for file, content in zip(files, summaries, strict=True):
            file.write_text(json.dumps(content))
        return main(["study", "collect", *map(str, files), f"--out={tmp_path / 'all.json'}"])

    def names():
        return [found["name"] for found in json.loads((tmp_path / "all.json").read_text())["runs"]]

    shipped = summary([run("a", "linear", 0, 0.5), run("b", "sci", 0, 0.4), run("a", "linear", 2, 0.5)])
    shipped["runs"][1]["order"] = 1
    own = summary([run("a", "linear", 1, 0.6), run("c", "max_pool", 0, 0.7), run("a", "linear", 0, 0.5)])
    own["runs"][1]["order"], own["recipe"] = 2, "/elsewhere/configs/x.py:mini"
    assert collect(shipped, own) == 0
    assert names() == ["a-seed0", "a-seed1", "a-seed2", "b-seed0", "c-seed0"]
    assert collect(json.loads((tmp_path / "all.json").read_text())) == 0
    assert len(names()) == 5

    shipped["terms"], other_model = {"data.seed": 0}, run("a", "linear", 3, 0.5)
    other_model["stages"] = {"pretrain": {"steps": 7}}
    for change, message in (
        (summary([run("a", "linear", 0, 0.9)]), "a-seed0 has other results in "),
        (summary([run("a", "linear", 3, 0.5, scale=3)]), "the cell a is set otherwise in "),
        (summary([other_model]), "runs of the cell a have other models or numbers of steps in "),
        (
            {**summary([run("d", "linear", 0, 0.5)]), "terms": {"data.seed": 1, "image": 2}},
            "1.json ran with data.seed = 1 and ",
        ),
        (summary([run("a", "linear", 3, 0.5)], kind="rates"), "(study), not of configs/x.py:mini (rates)"),
        ({**own, "recipe": "configs/y.py:mini"}, "not of configs/y.py:mini (study)"),
        ({"format": 1, "kind": "cost", "recipe": "x", "cells": {}}, "holds no runs (cost)"),
    ):
        kept = (tmp_path / "all.json").read_text()
        assert collect(shipped, change) == 1
        assert message in capsys.readouterr().err
        assert (tmp_path / "all.json").read_text() == kept


def test_runs_have_terms_in_common():
    """All but what the cell sets, its connector, places, and what changes nothing but speed."""
    config = study_config("linear")
    config.seed, config.data.dir, config.data.threads, config.model.llm.path = 7, "/here", 3, "/models/mini"
    overrides = {"model.connector.name": "linear", "model.vision.image_size": 84}
    found = terms(config, overrides, "a-seed7")
    assert found["model.llm.path"] == "mini"
    assert found["stages.finetune.batch_size"] == 4
    assert found["eval.max_new_tokens"] == 8
    assert json.loads(json.dumps(found)) == found
    assert not {"seed", "data.dir", "data.threads", *overrides} & found.keys()
    assert not any(key.startswith("model.connector.linear") for key in found)
    with pytest.raises(
        ReportError, match=r"a-seed7 ran with model\.vision\.image_size = 84, but its cell has 56"
    ):
        terms(config, {"model.vision.image_size": 56}, "a-seed7")
    assert joined({"a": 1, "b": 2}, {"b": 2, "c": 3}, "one", "other") == {"a": 1, "b": 2, "c": 3}
    with pytest.raises(ReportError, match="other ran with b = 3 and one with 2, so"):
        joined({"a": 1, "b": 2}, {"b": 3}, "one", "other")


def test_damaged_files_of_a_sweep_are_named(tmp_path, capsys):
    note, rates = tmp_path / "cells" / "linear-seed0" / "cell.json", tmp_path / "rates.json"
    note.parent.mkdir(parents=True)
    note.write_text('{"name": "linear-seed0", "seed"')
    assert main(["study", "collect", str(tmp_path), f"--out={tmp_path / 'summary.json'}"]) == 1
    assert f"{note} is damaged" in capsys.readouterr().err
    for kind in ("latency", "cost"):
        rates.write_text(json.dumps({"format": 1, "kind": kind, "recipe": "x.py"}))
        assert main(["study", "report", str(rates), f"--out={tmp_path / 'docs'}"]) == 1
        assert f"{rates} is no summary of a study ({rates} has no 'cells')" in capsys.readouterr().err
    rates.write_text(json.dumps({"format": 1, "kind": "what", "recipe": "x.py", "cells": {}}))
    assert main(["study", "report", str(rates), f"--out={tmp_path / 'docs'}"]) == 1
    assert "kind 'what' is none of study, latency, rates, cost" in capsys.readouterr().err
    bad = {
        "format": 1,
        "kind": "latency",
        "recipe": "x.py",
        "device": "cpu",
        "cells": {"a": {"token_seconds": 0}},
    }
    rates.write_text(json.dumps(bad))
    assert main(["study", "report", str(rates), f"--out={tmp_path / 'docs'}"]) == 1
    assert "(token_seconds of a is 0)" in capsys.readouterr().err
    for count in (0, 10**15, 2.5):
        rates.write_text(json.dumps({**summary([]), "questions": {"q": [["scene", "coarse", count]]}}))
        assert main(["study", "report", str(rates), f"--out={tmp_path / 'docs'}"]) == 1
        assert "are not [ability, group, number]" in capsys.readouterr().err
    rates.write_text("[]")
    assert main(["study", "rates", str(tmp_path), "--scale=mini", f"--out={rates}"]) == 1
    assert f"{rates} does not hold choices" in capsys.readouterr().err


def test_the_choice_of_learning_rates():
    runs = [
        run(f"{name}-rate{scale}", name.split("-")[0], 0, share, scale)
        for name, shares in (
            ("linear", (0.3, 0.5, 0.9)),
            ("sci", (0.6, 0.6, 0.6)),
            ("sci-learnable", (0.9, 0.6, 0.3)),
        )
        for scale, share in zip((0.3, 1.0, 3.0), shares, strict=True)
    ]
    chosen = choose(Study(summary(runs)))
    assert chosen["linear"]["factor"] == 3
    assert chosen["linear"]["scores"]["1"] == pytest.approx(outcomes(0.5, 0).mean())
    assert [untried(choice) for choice in chosen.values()] == ["larger", "", "smaller"]
    assert chosen["sci"]["factor"] == 1  # of equal ones, what changes least
    section = rates_section(Study(summary(runs)))
    assert section.parts[1].head == ("cell", "× 0.3", "× 1", "× 3", "best")
    assert [row[-1] for row in section.parts[1].rows] == ["3", "1", "0.3"]
    (row,) = rates_section(Study(summary(runs[:1]))).parts[1].rows  # a sweep that has not run yet
    assert row[-1] == "–"
    more = [run(f"linear-rate{scale}", "linear", 1, 0.5, scale) for scale in (0.3, 1.0, 3.0)]
    with pytest.raises(ReportError, match=r"sci-rate0\.3 has no answers to mini with all of the seeds 0, 1"):
        choose(Study(summary([*runs[:4], *more])))
    with pytest.raises(ReportError, match=r"factor 0\.3 only"):
        choose(Study(summary(runs[:1])))


def test_pages_of_a_study(tmp_path):
    runs = [
        run(variant, connector, seed, share)
        for variant, connector, share in (("mlp", "mlp2x_gelu", 0.9), ("pool", "average_pool", 0.4))
        for seed in (0, 1, 2)
    ]
    claims = [
        difference("keeping is better", "mlp", "pool", "fine"),
        faster("pooling is faster", "pool", "mlp", "step_seconds/finetune"),
        faster("pooling answers sooner", "pool", "mlp", "prefill_seconds"),
    ]
    half = run("half", "linear", 0, 0.5)
    half["stages"] = {name: {**stage} for name, stage in half["stages"].items()}
    for stage in half["stages"].values():
        del stage["grad_norm"]  # as an older summary
    source, grid, times, out = (tmp_path / name for name in ("z.json", "a.json", "b.json", "docs"))
    source.write_text(json.dumps(summary([*runs, half], claims)))
    grid.write_text(json.dumps(summary(runs[:1], kind="rates")))
    cells = {"mlp": {"prefill_seconds": 0.4}, "pool": {"prefill_seconds": 0.1}, "half": {}}
    latency = {
        "format": 1,
        "kind": "latency",
        "recipe": "/elsewhere/x.py:mini",  # the same recipe
        "device": "1 x cpu",
        "cells": cells,
    }
    times.write_text(json.dumps(latency))
    assert main(["study", "report", str(grid), str(times), str(source), "--out", str(out)]) == 0

    rows = list(csv.DictReader((out / "report.csv").read_text().splitlines()))
    assert len(rows) == 7 * len(ABILITIES)
    row = next(
        row for row in rows if (row["variant"], row["seed"], row["ability"]) == ("pool", "2", "reading")
    )
    part = outcomes(0.4, 2)[100:180]
    assert (row["group"], row["n"], float(row["right"])) == ("fine", "80", part.sum())
    assert float(row["accuracy"]) == pytest.approx(part.mean(), abs=1e-6)
    assert (row["blind"], row["majority"], row["step_seconds_finetune"]) == ("0.0", "", "0.25")

    page = (out / "study.md").read_text()
    assert (
        "leaves out what did not answer it with all of these: half." in page
    )  # it ran with one seed of three
    (claim,) = (line for line in page.splitlines() if "keeping is better" in line)
    assert HOLDS in claim
    (claim,) = (line for line in page.splitlines() if "pooling answers sooner" in line)
    assert "0.25 | 0.25 to 0.25" in claim
    assert page.index("## configs/x.py:mini\n") < page.index("configs/x.py:mini: learning rates")
    (study,) = json.loads((out / "report.json").read_text())["studies"]
    assert [one["verdict"] for one in study["findings"]["mini"]] == [HOLDS]
    assert [one["verdict"] for one in study["time_findings"]] == [OPEN, HOLDS]
    facts = study["scores"]["mini"]
    assert facts["pool"]["scene"]["low"] < facts["pool"]["scene"]["score"] < facts["pool"]["scene"]["high"]
    html = (out / "study.html").read_text()
    assert html.count("data:image/png") == len(list((out / "images" / "study").glob("*.png"))) == 9


def test_the_cell_that_others_are_compared_with(tmp_path, capsys):
    """Of several with the baseline's connector the one that is set most alike."""
    runs = [
        run(f"{connector}-rate{scale:g}", connector, 0, 0.5, scale)
        for connector in ("mlp2x_gelu", "linear", "dci")
        for scale in (0.3, 1.0, 3.0)
    ]
    source, out = tmp_path / "study.json", tmp_path / "docs"
    source.write_text(json.dumps(summary(runs)))

    def compared(*options):
        assert main(["study", "report", str(source), "--out", str(out), *options]) == 0
        page = (out / "study.md").read_text().partition("### Differences from")[2].partition("###")[0]
        rows = [line.strip("|").split("|") for line in page.splitlines() if line.startswith("|")][2:]
        return [(one.strip(), other.strip()) for one, other, *_ in rows]

    assert compared() == [
        (f"{connector}-rate{scale}", f"mlp2x_gelu-rate{scale}")
        for connector in ("linear", "dci")
        for scale in ("0.3", "1", "3")
    ]
    assert compared("--baseline=dci")[-1] == ("linear-rate3", "dci-rate3")
    assert main(["study", "report", str(source), "--out", str(out), "--baseline=dic"]) == 1
    assert (
        "no cell has the connector 'dic' (--baseline); give one of mlp2x_gelu, linear, dci"
        in capsys.readouterr().err
    )
    source.write_text(json.dumps(summary([run("a", "linear", 0, 0.5), run("b", "dci", 0, 0.6)])))
    assert compared() == [("b", "a")]
    options = [("sti", {}, 1.0), ("sti-5+6", {"layers": [5, 6]}, 3.0), ("sci-5+6", {"layers": [5, 6]}, 1.0)]
    runs = [run(name, name[:3], 0, 0.5, scale) for name, _, scale in options]
    for each, (name, chosen, _) in zip(runs, options, strict=True):
        each["overrides"] |= {f"model.connector.{name[:3]}.{key}": value for key, value in chosen.items()}
    source.write_text(json.dumps(summary(runs)))
    assert compared("--baseline=sti") == [("sci-5+6", "sti-5+6")]  # whatever their rates


def test_a_summary_has_each_run_once(tmp_path, capsys):
    source = tmp_path / "study.json"
    for runs, says in (
        ([], "holds no runs"),
        ([run("a", "linear", 0, 0.5), run("a", "linear", 0, 0.7)], "seed 0 of a is there twice"),
    ):
        source.write_text(json.dumps(summary(runs)))
        assert main(["study", "report", str(source), "--out", str(tmp_path / "docs")]) == 1
        assert says in capsys.readouterr().err


def test_times_without_their_study(tmp_path, capsys):
    file, twice = tmp_path / "times.json", tmp_path / "again.json"
    latency = {
        "format": 1,
        "kind": "latency",
        "recipe": "configs/x.py:mini",
        "device": "1 x cpu",
        "cells": {},
    }
    for each in (file, twice):
        each.write_text(json.dumps(latency))
    assert main(["study", "report", str(file), "--out", str(tmp_path)]) == 1
    assert f"{file}: times of configs/x.py:mini, whose results are not given" in capsys.readouterr().err
    (tmp_path / "s.json").write_text(json.dumps(summary([run("a", "linear", 0, 0.5)])))
    assert (
        main(["study", "report", *map(str, (file, twice, tmp_path / "s.json")), "--out", str(tmp_path)]) == 1
    )
    assert f"{twice}: further times of configs/x.py:mini" in capsys.readouterr().err


@pytest.mark.parametrize(
    "recipe",
    [f"preserve_or_compress:{scale}" for scale in ("full", "mini", "mini-longer")]
    + [f"dense_connector:{llm}" for llm in ("llama3-8b", "mini")],
)
def test_findings_are_about_cells_of_their_recipe(recipe):
    file, _, argument = recipe.partition(":")
    path = pathlib.Path(__file__).parents[2] / "configs" / f"{file}.py"
    cells = read_sweep(f"{path}:{argument}")
    seconds = {name: {"prefill_seconds": 1.0, "step_seconds/finetune": 1.0} for name in cells}
    samples = {name: dict.fromkeys((ALL, "coarse", "fine", "reasoning"), np.zeros(3)) for name in cells}
    for finding in load_recipe(path).get_findings(argument):
        found = answer_time(finding, seconds) if finding.expect == "faster" else answer(finding, samples)
        assert found.verdict != ABSENT, finding


def test_what_cannot_be_compared(tmp_path, capsys):
    file = tmp_path / "summary.json"
    file.write_text(
        json.dumps(summary([run("a", "linear", 0, 0.5), run("b", "sci", 0, 0.5, questions="other")]))
    )
    assert main(["study", "report", str(file), "--out", str(tmp_path)]) == 1
    assert "a and b were asked different questions of mini with seed 0" in capsys.readouterr().err
    file.write_text("{}")
    assert main(["study", "report", str(file), "--out", str(tmp_path)]) == 1
    assert "mllm-jax study collect" in capsys.readouterr().err


@pytest.mark.slow
def test_costs_follow_the_visual_tokens():
    machine = parse("v5e:2x2")

    def cost(connector):
        config = study_config(connector)
        for stage in config.stages.values():
            stage.batch_size = 16  # which four chips divide
        return cell_cost(config, machine)

    kept, pooled = cost("mlp2x_gelu"), cost("average_pool")
    assert (kept["visual_tokens"], pooled["visual_tokens"]) == (144, 36)
    # keys and values, float32, 4 blocks, 4 heads of 32
    assert kept["cache_bytes"] == 2 * 4 * 4 * 4 * 32 * (144 + 64)
    for key in ("prefill_flops", "cache_bytes"):
        assert pooled[key] < kept[key]
    for stage in ("pretrain", "finetune"):
        one, other = kept["stages"][stage], pooled["stages"][stage]
        assert other["flops"] < one["flops"] == one["steps"] * one["step_flops"]
