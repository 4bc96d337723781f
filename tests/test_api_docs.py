"""docs/api.md names what is public, and the examples in the docstrings of all of it run."""

import api_docs
import pytest

import mllm_jax
from mllm_jax import connectors

ALONE = [name for name in api_docs.symbols() if not name.startswith(api_docs.WITH_A_MODEL)]


@pytest.mark.parametrize("name", ALONE)
def test_examples(name):
    assert api_docs.run_examples(name)


def test_the_page_has_what_the_packages_offer():
    named = [api_docs.resolve(name)[0] for name in api_docs.symbols()]
    offered = {
        f"mllm_jax.{name}": getattr(mllm_jax, name) for name in mllm_jax.__all__ if name != "connectors"
    }
    offered |= {f"connectors.{name}": getattr(connectors, name) for name in connectors.__all__}
    # The table and the alias of a pair of numbers have no docstring of their own.
    missing = [name for name, each in offered.items() if each not in named]
    assert missing == ["connectors.CONNECTORS", "connectors.Grid"]
