"""The symbols of docs/api.md and the examples in their docstrings."""

import doctest
import importlib
import inspect
import pathlib
import re
from typing import Any

PAGE = pathlib.Path(__file__).parents[1] / "docs" / "api.md"
# These load a model: tests/inference/test_python_docs.py runs them, where one is.
WITH_A_MODEL = ("mllm_jax.inference.", "mllm_jax.data.video.")


def symbols() -> list[str]:
    """Dotted names of all symbols on the page."""
    return re.findall(r"^::: (\S+)$", PAGE.read_text(encoding="utf-8"), re.M)


def resolve(name: str) -> tuple[Any, Any]:
    """A symbol and the module that it is written in."""
    module, _, attribute = name.rpartition(".")
    found = getattr(importlib.import_module(module), attribute)
    return found, importlib.import_module(inspect.unwrap(found).__module__)


def run_examples(name: str) -> int:
    """Runs the examples of a symbol and its methods; gives their number.

    Raises:
      AssertionError: there is none, or one prints something else than it says.
    """
    found, module = resolve(name)
    tests = [test for test in doctest.DocTestFinder().find(found, name, module=module) if test.examples]
    assert tests, f"{name} has no example"
    said: list[str] = []
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS)
    for test in tests:
        runner.run(test, out=said.append)
    assert not runner.failures, "".join(said)
    return runner.tries
