"""`mllm-jax train` and `eval`, and recipes by name; the wheel that carries them."""

import os
import pathlib
import shutil
import subprocess
import sys
import sysconfig
import venv
import zipfile

import pytest

from mllm_jax.cli import shipped
from mllm_jax.cli.main import main

ROOT = pathlib.Path(__file__).parents[2]


def test_the_scripts_are_those_of_the_checkout(monkeypatch):
    calls = []
    monkeypatch.setattr(os, "execv", lambda *arguments: calls.append(arguments) or sys.exit(0))
    for verb in ("train", "eval"):
        with pytest.raises(SystemExit):
            main([verb, "--workdir=a b"])
        assert calls[-1] == (sys.executable, [sys.executable, str(ROOT / f"{verb}.py"), "--workdir=a b"])


def test_recipes_by_name(tmp_path, monkeypatch):
    quickstart = str(ROOT / "configs" / "quickstart.py")
    assert shipped.recipe("quickstart") == quickstart
    assert shipped.recipe("quickstart:dci") == f"{quickstart}:dci"
    for as_it_is in ("nowhere", "configs/quickstart.py:dci", "my.py"):
        assert shipped.recipe(as_it_is) == as_it_is
    monkeypatch.chdir(tmp_path)
    pathlib.Path("quickstart").touch()  # a file of one's own comes first
    assert shipped.recipe("quickstart") == "quickstart"
    assert {"quickstart", "llava15"} <= set(shipped.names())


@pytest.mark.slow
def test_the_wheel_works_without_the_checkout(tmp_path):
    """Made from the source distribution, in an environment of its own that borrows the packages installed here."""
    source = tmp_path / "source"  # building leaves files behind
    for folder in ("mllm_jax", "configs"):
        shutil.copytree(ROOT / folder, source / folder, ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE", "train.py", "eval.py"):
        shutil.copy(ROOT / file, source)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    both = [sys.executable, "-m", "build", "--outdir", tmp_path, source]
    done = subprocess.run(both, cwd=tmp_path, capture_output=True, text=True, check=False)
    said = done.stdout + done.stderr
    if done.returncode and ("No module named build" in said or "No matching distribution" in said):
        pytest.skip("the package build is missing, or setuptools cannot be fetched")
    assert done.returncode == 0, said
    assert list(tmp_path.glob("*.tar.gz"))
    (built,) = tmp_path.glob("*.whl")
    carried = set(zipfile.ZipFile(built).namelist())
    files = (path for path in (source / "mllm_jax").rglob("*") if path.is_file())
    assert not {str(path.relative_to(source)) for path in files} - carried
    venv.create(tmp_path / "venv")
    python = tmp_path / "venv" / "bin" / "python"
    subprocess.run([*pip, "--python", python, "install", "--no-deps", built], env=environment, check=True)
    (site,) = tmp_path.glob("venv/lib/python*/site-packages")
    (site / "borrowed.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for recipe, message in (("quickstart:nothing", "'nothing'"), ("nowhere", "no recipe nowhere")):
        done = subprocess.run(
            [tmp_path / "venv" / "bin" / "mllm-jax", "train", f"--config={recipe}", "--workdir=run"],
            env=environment,
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 1, done.stderr
        assert message in done.stderr
        assert "quickstart" in done.stderr or recipe != "nowhere"
        assert "Traceback" not in done.stderr
