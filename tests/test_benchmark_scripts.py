"""The scripts of benchmarks/ fit the library: what they import and use exists, and their calls fit its signatures."""

import ast
import contextlib
import importlib
import inspect
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "benchmarks").glob("*.py"))
OURS = {"mllm_jax", "train"} | {path.stem for path in SCRIPTS}
MISSING = object()


def imported(tree):
    """What a script's names for our modules and their contents stand for; names that do not exist are `MISSING`."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module.split(".")[0] in OURS:
            module = importlib.import_module(node.module)
            for alias in node.names:
                if hasattr(module, "__path__") and not hasattr(module, alias.name):  # perhaps a module of it
                    with contextlib.suppress(ModuleNotFoundError):
                        importlib.import_module(f"{node.module}.{alias.name}")
                found[alias.asname or alias.name] = getattr(module, alias.name, MISSING)
        elif isinstance(node, ast.Import):
            for alias in node.names:
                if alias.name in OURS:
                    found[alias.asname or alias.name] = importlib.import_module(alias.name)
    return found


def resolved(node, names):
    """The object that `name` or `module.name` is; None where it is not one of ours."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    if isinstance(node, ast.Attribute) and inspect.ismodule(module := resolved(node.value, names)):
        return getattr(module, node.attr, MISSING)
    return None


def faults(source):
    """What of a script does not fit the library."""
    tree = ast.parse(source)
    names = imported(tree)
    for name, value in names.items():
        if value is MISSING:
            yield f"{name} does not exist"
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and resolved(node, names) is MISSING:
            yield f"line {node.lineno}: {ast.unparse(node)} does not exist"
        if not isinstance(node, ast.Call) or not callable(function := resolved(node.func, names)):
            continue
        if any(isinstance(each, ast.Starred) for each in node.args) or None in {k.arg for k in node.keywords}:
            continue  # how many arguments those are is known only when it runs
        try:
            inspect.signature(function).bind(*node.args, **{k.arg: k.value for k in node.keywords})
        except TypeError as error:
            yield f"line {node.lineno}: {ast.unparse(node)}: {error}"


@pytest.mark.parametrize("path", SCRIPTS, ids=lambda path: path.stem)
def test_a_script_fits_the_library(path, monkeypatch):
    monkeypatch.syspath_prepend(str(path.parent))
    monkeypatch.syspath_prepend(str(ROOT))
    assert list(faults(path.read_text(encoding="utf-8"))) == []


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("from mllm_jax.training.step import make_a_step", "make_a_step does not exist"),
        ("from mllm_jax.training import step\nstep.make_step", "step.make_step does not exist"),
        ("from mllm_jax.parallel.mesh import use_mesh\nuse_mesh()", "missing a required argument"),
        ("from mllm_jax.models import mllm\nmllm.init(1, 2, seed=3)", "unexpected keyword argument 'seed'"),
    ],
)
def test_what_does_not_fit_is_found(source, fault, monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    (found,) = faults(source)
    assert fault in found


@pytest.mark.slow
@pytest.mark.parametrize(
    ("script", "arguments", "said"),
    [
        ("feature_cache", ("--steps=4", "--samples=24"), "times as fast"),
        ("int8_base", ("--rows=2",), "greedy tokens are the same"),
        ("notes_accuracy", ("--scenes=1",), "| question form |"),
        ("packing", ("--samples=200",), "| 144 | 8192 |"),
    ],
)
def test_a_script_runs_at_a_small_size(script, arguments, said, tmp_path, script_environment):
    command = [sys.executable, str(ROOT / "benchmarks" / f"{script}.py"), *arguments]
    if script == "feature_cache":
        command.append(f"--workdir={tmp_path}")
    done = subprocess.run(command, env=script_environment, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert said in done.stdout
