"""What starting a program imports, and the cache that spares it compiling."""

import os
import pathlib
import subprocess
import sys

import jax
import pytest

from mllm_jax import compilation_cache
from mllm_jax.cli.main import VERBS

# Each takes a tenth of a second to several seconds to import, and no help text needs it.
HEAVY = (
    "array_record",
    "grain",
    "matplotlib",
    "openpyxl",
    "orbax",
    "pandas",
    "pyarrow",
    "scipy",
    "sklearn",
    "tensorboardX",
    "tensorflow_datasets",
    "transformers",
)
SCRIPT = """
import runpy, sys
for arguments in {commands}:
    sys.argv = list(arguments)
    try:
        if arguments[0].endswith(".py"):
            runpy.run_path(arguments[0], run_name="__main__")
        else:
            from mllm_jax.cli.main import main
            main(arguments[1:])
    except SystemExit:
        pass
    found = sorted(set({heavy}) & sys.modules.keys())
    assert not found, f"{{' '.join(arguments)}} imports {{', '.join(found)}}"
"""


@pytest.mark.parametrize(
    "commands",
    [
        [("train.py", "--help")],
        [("eval.py", "--help")],
        [("mllm-jax", "--help"), *(("mllm-jax", verb, "--help") for verb in VERBS)],
    ],
    ids=["train", "eval", "verbs"],
)
def test_help_imports_nothing_slow(commands, run_script):
    done = run_script("-c", SCRIPT.format(commands=commands, heavy=HEAVY))
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("--help") or "usage: mllm-jax" in done.stdout


@pytest.fixture
def settings(monkeypatch):
    """What the cache tells JAX, which is not told it."""
    found = {}
    monkeypatch.setattr(jax.config, "update", found.__setitem__)
    monkeypatch.delenv("JAX_COMPILATION_CACHE_DIR", raising=False)
    return found


def test_the_cache_is_a_folder_of_ones_own(settings, tmp_path):
    folder = tmp_path / "made" / "here"
    assert compilation_cache.use(str(folder)) is None
    assert folder.stat().st_mode & 0o777 == 0o700
    assert settings["jax_compilation_cache_dir"] == str(folder)
    assert settings["jax_compilation_cache_max_size"] > 0  # without a limit JAX does not lock the folder


def test_no_cache_where_none_is_wanted_or_another_is_set(settings, tmp_path, monkeypatch):
    assert compilation_cache.use("") is None
    monkeypatch.setenv("JAX_COMPILATION_CACHE_DIR", str(tmp_path))
    assert compilation_cache.use(str(tmp_path / "other")) is None
    assert not settings
    assert not (tmp_path / "other").exists()


def test_a_folder_that_others_may_write_to_is_not_used(settings, tmp_path):
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    (tmp_path / "file").write_text("")
    assert "others may write" in compilation_cache.use(str(tmp_path / "shared"))
    assert str(tmp_path / "file") in compilation_cache.use(str(tmp_path / "file"))
    assert not settings


def test_a_user_without_a_home_goes_on_without_the_cache(settings, monkeypatch):
    def homeless(path):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(pathlib.Path, "expanduser", homeless)
    assert "home directory" in compilation_cache.use("~/cache")
    assert not settings


def test_a_second_start_compiles_nothing(script_environment, tmp_path):
    code = """
import jax
from mllm_jax.cli import script
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event))
def main(_):
    print(jax.jit(lambda x: x * 2 + 1)(3), hits.count("/jax/compilation_cache/cache_hits"))
script.run(main)
"""
    environment = {k: v for k, v in script_environment.items() if not k.startswith(("JAX_COMP", "JAX_PERS"))}
    command = [sys.executable, "-c", code, f"--compilation_cache={tmp_path / 'cache'}"]
    said = [
        subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=True)
        for _ in range(2)
    ]
    assert [int(each.stdout.split()[0]) for each in said] == [7, 7]
    assert int(said[0].stdout.split()[1]) == 0
    assert int(said[1].stdout.split()[1]) > 0
    assert os.listdir(tmp_path / "cache")
