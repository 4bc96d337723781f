"""Running the cells of a sweep: failures, several workers, kills, and what is emitted for others to run."""

import contextlib
import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest
import sweep_worker
import yaml
from absl import flags

from mllm_jax.cli.sweep import _given, run_cells
from mllm_jax.config import ConfigError, resolved
from mllm_jax.connectors import CONNECTORS, Connector, PreservingConnector
from mllm_jax.connectors.grids import divided
from mllm_jax.recipes.mini import study_config
from mllm_jax.sweep import emit
from mllm_jax.sweep.cells import is_done, make_cells, read_sweep
from mllm_jax.sweep.claims import Claims

ROOT = pathlib.Path(__file__).parents[2]
WORKER = [sys.executable, sweep_worker.__file__]
NAMES = [f"{name}-seed{seed}" for seed in (0, 1) for name in sweep_worker.CONNECTORS]


def starts(directory):
    return Counter((directory / "starts").read_text().split())


def table(text):
    """The words of the lines of the table of results."""
    lines = (line.replace("│", " ").split() for line in text.splitlines())
    return [w for w in lines if w and re.fullmatch(r".*-seed\d", w[0]) and w[1] in ("done", "failed")]


def start(directory, seconds, workers, environment):
    command = [*WORKER, str(directory), str(seconds), str(workers)]
    return subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=environment
    )


def wait_for(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_a_failed_cell_stops_no_other_and_is_run_again(tmp_path, capsys):
    cells, bad = sweep_worker.cells_in(tmp_path, seeds=(0,)), "mlp2x_gelu-seed0"
    failing = sweep_worker.command_in(tmp_path, 0, (bad,))
    assert run_cells(cells, tmp_path, "x.py", failing, 2, None) == 1
    text = capsys.readouterr().out
    assert [words[:2] for words in table(text)] == [
        ["linear-seed0", "done"], [bad, "failed"], ["average_pool-seed0", "done"],
    ]  # fmt: skip
    assert f"{bad} failed: exit status 3; {tmp_path / 'runs' / bad / 'train.log'}:" in text
    assert text.rstrip().endswith("DataError: sample 'a' has no image")

    working = sweep_worker.command_in(tmp_path, 0)
    assert run_cells(cells, tmp_path, "x.py", working, 1, None) == 0
    assert starts(tmp_path) == {"linear-seed0": 1, bad: 2, "average_pool-seed0": 1}
    assert not list((tmp_path / "cells").glob("*/lock"))

    shutil.rmtree(tmp_path / "cells")  # as after programs that ran by --emit
    assert run_cells(cells, tmp_path, "x.py", working, 1, None) == 0
    notes = [json.loads(path.read_text())["name"] for path in (tmp_path / "cells").glob("*/cell.json")]
    assert sorted(notes) == sorted(cell.name for cell in cells)
    assert starts(tmp_path) == {"linear-seed0": 1, bad: 2, "average_pool-seed0": 1}


def test_two_sweeps_on_one_directory_share_the_cells(tmp_path, script_environment):
    both = [start(tmp_path, 0.05, 1, script_environment) for _ in range(2)]
    texts = [each.communicate(timeout=100)[0] for each in both]
    assert [each.returncode for each in both] == [0, 0], texts
    assert starts(tmp_path) == dict.fromkeys(NAMES, 1)
    assert len(table(texts[0])) == len(NAMES)
    assert table(texts[0]) == table(texts[1])


def test_a_killed_sweep_ends_with_the_same_table(tmp_path, script_environment):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    undisturbed = start(whole, 0, 2, script_environment)
    text = undisturbed.communicate(timeout=100)[0]
    assert undisturbed.returncode == 0, text

    first = start(killed, 0.3, 2, script_environment)
    # Two cells are done, and two others have begun.
    wait_for(lambda: (killed / "starts").exists() and len(starts(killed)) == 4)
    wait_for(lambda: len(list(killed.glob("runs/*/metrics.jsonl"))) == 4)
    first.kill()
    first.communicate()
    done = {path.parts[-3] for path in killed.glob("runs/*/eval/summary.json")}
    assert len(done) == 2
    if sys.platform == "linux":  # no program is left over
        begun = {name for name in starts(killed) if name not in done}
        before = {name: (killed / "runs" / name / "metrics.jsonl").read_text() for name in begun}
        time.sleep(0.7)
        assert before == {name: (killed / "runs" / name / "metrics.jsonl").read_text() for name in begun}

    again = start(killed, 0, 2, script_environment)
    continued = again.communicate(timeout=100)[0]
    assert again.returncode == 0, continued
    assert table(continued) == table(text)
    assert starts(killed) == {name: 2 if name in begun else 1 for name in NAMES}


def test_a_sweep_that_is_asked_to_stop_stops_its_programs(tmp_path, script_environment):
    worker = start(tmp_path, 30, 1, script_environment)
    wait_for(lambda: (tmp_path / "starts").exists())
    worker.send_signal(signal.SIGTERM)
    text = worker.communicate(timeout=20)[0]
    assert worker.returncode == 128 + signal.SIGTERM, text
    assert "the same command goes on" in text
    assert not list(tmp_path.glob("cells/*/lock"))


def test_a_cell_in_use_is_not_claimed(tmp_path):
    cell, *_ = sweep_worker.cells_in(tmp_path)
    mine, theirs = Claims(tmp_path, "x.py"), Claims(tmp_path, "x.py")
    assert theirs.is_taken(cell) is False
    with mine.take(cell):
        assert theirs.is_taken(cell) is True
        assert theirs.take(cell, look=True) is None
    with contextlib.closing(theirs.take(cell)):
        pass
    workdir = cell.workdir(tmp_path)
    workdir.mkdir(parents=True)
    lock = tmp_path / "cells" / cell.name / "lock"
    with mine.take(cell):
        (workdir / "lock").write_bytes(lock.read_bytes())  # a train.py without a sweep
    assert theirs.take(cell) is None


def test_all_faults_are_told_before_anything_runs(tmp_path):
    sweep = {
        "good": {"model.connector.name": "linear"},
        "name": {"model.connector.name": "liner"},
        "grid": {"model.connector.name": "c_abstractor", "model.connector.c_abstractor.tokens": 35},
        "key": {"model.conector.name": "linear"},
    }
    with pytest.raises(ConfigError) as error:
        make_cells(sweep, study_config("mlp2x_gelu"), (), (0, 1), tmp_path)
    text = str(error.value)
    assert text.startswith("3 of 4 cells cannot run")
    assert all(
        word in text for word in ("name: ", "'liner'", "grid: ", "tokens=35", "key: ", "'model.conector'")
    )
    with pytest.raises(ConfigError, match=r"'seed' is set by the sweep itself"):
        make_cells({"good": sweep["good"]}, study_config("mlp2x_gelu"), ("seed",), (0,), tmp_path)
    with pytest.raises(
        ConfigError, match=r"2 of 2 cells cannot run:\n  all: config key 'seed' is set"
    ) as error:
        make_cells({"a": {}, "b": {}}, study_config("mlp2x_gelu"), ("seed",), (0, 1), tmp_path)
    assert str(error.value).count("\n") == 1
    with pytest.raises(ConfigError, match=r"no cell is called fine"):
        make_cells({"good": sweep["good"]}, study_config("mlp2x_gelu"), (), (0,), tmp_path, ("fine",))


def test_another_configuration_in_a_cells_folder_is_refused(tmp_path):
    cells = sweep_worker.cells_in(tmp_path, (0,))
    assert run_cells(cells, tmp_path, "x.py", sweep_worker.command_in(tmp_path, 0), 3, None) == 0
    base = study_config("mlp2x_gelu")
    base.eval.batch_size = 3  # changes no score
    assert all(is_done(cell, tmp_path) for cell in _cells(base, tmp_path))
    base.eval.max_new_tokens = 3
    changed = _cells(base, tmp_path)
    assert not any(is_done(cell, tmp_path) for cell in changed)
    for cell in changed:  # starts of train.py that did not come to the end of the new evaluation
        workdir = cell.workdir(tmp_path)
        (workdir / "config.json").write_text(json.dumps(resolved(cell.config)))
        (workdir / "history.jsonl").write_text('{"changed": {"eval.max_new_tokens": [8, 3]}}\n')
        os.utime(workdir / "eval" / "summary.json", (0, 0))
    assert not any(is_done(cell, tmp_path) for cell in changed)
    assert run_cells(changed, tmp_path, "x.py", sweep_worker.command_in(tmp_path, 0), 3, None) == 0
    base.stages.finetune.learning_rate = 1e-3
    with pytest.raises(ConfigError, match=r"(?s)3 of 3 .*learning_rate"):
        _cells(base, tmp_path)


def _cells(base, directory):
    variants = {name: {"model.connector.name": name} for name in sweep_worker.CONNECTORS}
    return make_cells(variants, base, (), (0,), directory)


class Plain(PreservingConnector):
    """Without options."""


class Thirds(Connector):
    """For grids that 3 divides."""

    def num_tokens(self, grid):
        return divided(grid, 3, "thirds.side")[0] ** 2


def test_own_connectors_without_options_or_for_some_sizes(monkeypatch):
    # Stand-ins for rows that were added to the table: neither has options of its own in the configuration.
    monkeypatch.setitem(CONNECTORS, "plain", (Plain, {"reduction": 1, "reduced_grid": ()}))
    monkeypatch.setitem(CONNECTORS, "thirds", (Thirds, {}))
    for recipe, name, connector in (
        ("preserve_or_compress.py:mini", "plain-84px", "plain"),
        ("dense_connector.py:mini", "thirds", "thirds"),
        ("dense_connector.py", "clip-vicuna-7b-plain", "plain"),
    ):
        cells = read_sweep(f"{ROOT}/configs/{recipe}", [f"+{connector}"])
        assert cells[name]["model.connector.name"] == connector
    with pytest.raises(ConfigError, match=r"thirds\.side=3 does not divide the 8x8"):
        read_sweep(f"{ROOT}/configs/preserve_or_compress.py:mini", ["+thirds"])


def test_options_in_two_pieces_reach_the_cells():
    known = flags.FlagValues()
    flags.DEFINE_integer("config.model.vision.select_layer", 0, "", flag_values=known)
    flags.DEFINE_bool("config.data.prepared", False, "", flag_values=known)
    arguments = [
        "--config=x.py",
        "--config.data.prepared",
        "--config.model.vision.select_layer",
        "-3",
        "--list",
    ]
    assert _given(arguments, known) == ["--config.data.prepared", "--config.model.vision.select_layer=-3"]


def test_own_connectors_join_by_name():
    recipe = f"{ROOT}/configs/preserve_or_compress.py:mini"
    everything = read_sweep(recipe)
    more = read_sweep(recipe, ["+ldpv2", "+resampler"])
    assert {name: more[name] for name in everything} == everything
    assert set(more) - set(everything) == {
        *(f"ldpv2-{tokens}-{px}px" for px in (56, 84, 112) for tokens in (16, 36)),
        *(f"resampler-{tokens}-{px}px" for px in (56, 84, 112) for tokens in (16, 36)),
    }
    assert set(read_sweep(recipe, ["linear"])) == {f"linear-{px}px" for px in (56, 84, 112)}
    with pytest.raises(
        ConfigError, match=r"--connectors=sci: .* has no cell of it, only of linear, mlp2x_gelu"
    ):
        read_sweep(recipe, ["linear", "sci"])
    with pytest.raises(ConfigError, match=r"no connector 'max_pol'.*docs/connectors.md"):
        read_sweep(recipe, ["+max_pol"])


def test_what_is_emitted(tmp_path):
    cells = sweep_worker.cells_in(tmp_path)

    def command(cell):
        return [
            "python",
            "train.py",
            f"--workdir=runs/{cell.name}",
            "--config.model.tiles.pinpoints=((1, 2),)",
        ]

    lines = emit.emit("commands", cells, command, "configs/x.py:mini", "image").splitlines()
    assert [shlex.split(line) for line in lines] == [command(cell) for cell in cells]

    script = emit.emit("slurm", cells, command, "configs/x.py:mini", "image")
    (tmp_path / "array.sh").write_text(script.replace("srun --kill-on-bad-exit=1 bash -c", "printf '%s'"))
    assert "#SBATCH --array=0-5\n" in script
    for index in (0, 5):
        environment = {**os.environ, "SLURM_ARRAY_TASK_ID": str(index)}
        done = subprocess.run(
            ["bash", tmp_path / "array.sh"], env=environment, capture_output=True, text=True
        )
        assert shlex.split(done.stdout) == command(cells[index]), done.stderr

    jobs = list(yaml.safe_load_all(emit.emit("kubernetes", cells, command, "configs/x.py:mini", "image")))
    names = [job["metadata"]["name"] for job in jobs]
    assert len(set(names)) == len(cells)
    assert all(re.fullmatch(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?", name) for name in names)
    (container,) = jobs[1]["spec"]["template"]["spec"]["containers"]
    assert (container["command"], container["image"]) == (command(cells[1]), "image")


@pytest.mark.slow
def test_a_real_sweep_and_its_report(tmp_path, script_environment):
    """Two connectors, a few steps: the tower's features are computed once, and the results make a page."""
    few = {
        "stages.pretrain.steps": 2, "stages.finetune.steps": 2, "stages.pretrain.sources.captions.count": 16,
        "stages.finetune.sources.instructions.count": 16, "eval.benchmarks.mini.count": 2, "mesh.cpu_devices": 1,
    }  # fmt: skip
    command = [sys.executable, "-m", "mllm_jax.cli.main"]
    arguments = [
        "sweep", "--config=configs/preserve_or_compress.py:mini", f"--workdir={tmp_path / 'sweep'}", "--workers=2",
        "--only=linear-56px,average_pool-16-56px", "--seeds=0", *(f"--config.{key}={n}" for key, n in few.items()),
    ]  # fmt: skip

    def run(*more):
        done = subprocess.run(
            [*command, *more], cwd=ROOT, env=script_environment, capture_output=True, text=True, timeout=250
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    rows = table(run(*arguments))
    assert [row[:3] for row in rows] == [
        ["linear-56px-seed0", "done", "64"], ["average_pool-16-56px-seed0", "done", "16"],
    ]  # fmt: skip
    (features,) = (tmp_path / "sweep" / "data" / "features").iterdir()
    record = 32 + 64 * 128 * 4  # digest, patches, width, bytes
    images = sum(path.stat().st_size for path in features.glob("*.features")) / record
    texts = [(tmp_path / "sweep" / "runs" / row[0] / "train.log").read_text() for row in rows]
    assert images <= 32  # of both stages; those without an image have none
    assert sum(text.count("feature cache: encoding") > 0 for text in texts) >= 1

    assert table(run(*arguments)) == rows  # nothing is left to do
    summary = tmp_path / "summary.json"
    run("study", "collect", str(tmp_path / "sweep"), "--out", str(summary))
    for stage in json.loads(summary.read_text())["runs"][0]["stages"].values():
        assert all(norm > 0 for norm in stage["grad_norm"])
    times = tmp_path / "times.json"
    run("study", "latency", str(tmp_path / "sweep"), "--out", str(times))
    keys = {"prefill_seconds", "token_seconds", "step_seconds/pretrain", "step_seconds/finetune"}
    for cell in json.loads(times.read_text())["cells"].values():
        assert cell.keys() == keys
        assert min(cell.values()) > 0
    run("study", "report", str(summary), str(times), "--out", str(tmp_path / "docs"), "--baseline=linear")
    page = (tmp_path / "docs" / "study.md").read_text()
    assert "image to first token" in page
    assert "56 px: preserving beats compressing" in page
    assert len((tmp_path / "docs" / "report.csv").read_text().splitlines()) == 1 + 2 * 12
