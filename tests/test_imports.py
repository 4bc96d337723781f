"""Importing the package is cheap, and its parts import each other in one direction only."""

import ast
import pathlib
import subprocess
import sys

import pytest

import mllm_jax

PACKAGE = pathlib.Path(mllm_jax.__file__).parent
_TOP = {"evaluation", "planning", "sweep", "cli", "serve", "harness"}
ABOVE = {
    "sweep": _TOP - {"sweep"} | {"training"},
    "evaluation": {"sweep", "cli", "serve", "harness"},
    "harness": _TOP - {"harness"} | {"training"},
    "planning": _TOP - {"planning"},
    "recipes": {"training", "inference", *_TOP},
    "training": _TOP,
    "inference": {"training", *_TOP},
    "interop": {"training", "inference", *_TOP},
    "data": {"training", "inference", "interop", *_TOP},
    "parallel": {"training", "inference", "interop", *_TOP},
    "models": {"training", "inference", "interop", *_TOP},
    "connectors": {"training", "inference", "interop", "models", "data", "parallel", *_TOP},
}


def imported(path):
    """Modules of the package that a file imports, wherever in it."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("mllm_jax"):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("mllm_jax"))


@pytest.mark.parametrize("part", ABOVE)
def test_imports_point_down(part):
    for path in (PACKAGE / part).rglob("*.py"):
        up = {name for name in imported(path) if name.split(".")[1:2] and name.split(".")[1] in ABOVE[part]}
        assert not up, f"{path.relative_to(PACKAGE)} imports {', '.join(sorted(up))}"


def test_importing_the_package_imports_nothing_else():
    code = "import sys, mllm_jax; print([name for name in ('jax', 'flax', 'numpy', 'PIL') if name in sys.modules])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=PACKAGE.parent
    )
    assert done.stdout.strip() == "[]"


def test_names_of_the_package():
    for name in mllm_jax.__all__:
        assert getattr(mllm_jax, name).__name__.rsplit(".", 1)[-1] == name
        assert name in dir(mllm_jax)
    with pytest.raises(AttributeError, match="no attribute 'lode'"):
        _ = mllm_jax.lode


def test_no_two_test_files_have_the_same_name():
    """pytest imports them by name alone, and then refuses the second."""
    names = [path.name for path in pathlib.Path(__file__).parent.rglob("test_*.py")]
    assert not {name for name in names if names.count(name) > 1}
