"""Train, evaluate and study multimodal LLMs and their connectors in JAX/Flax.

    import mllm_jax

    model = mllm_jax.load("runs/quickstart")
    print(model.generate("cat.jpg", "What is this?"))

Importing this package is cheap; what its names stand for is imported when they are first used. docs/python.md is the
guide.
"""

import importlib
import os
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mllm_jax import connectors
    from mllm_jax.inference.load import load
    from mllm_jax.inference.model import Model
    from mllm_jax.parallel.mesh import make_mesh

# transformers would say at its import that there is no torch, which nothing here needs.
os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")

__all__ = ["Model", "connectors", "load", "make_mesh"]

_HOMES = {"Model": "inference.model", "load": "inference.load", "make_mesh": "parallel.mesh"}


def __getattr__(name: str) -> Any:
    if name == "connectors":
        return importlib.import_module("mllm_jax.connectors")
    if name not in _HOMES:
        raise AttributeError(f"module 'mllm_jax' has no attribute {name!r}")
    return getattr(importlib.import_module(f"mllm_jax.{_HOMES[name]}"), name)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
