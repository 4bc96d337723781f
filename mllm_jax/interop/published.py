"""The geometry of the published models that the documentation names, shipped as data: what planning needs of them.

Shapes, FLOPs and memory follow from geometry alone, so none of them waits for a download. Training still reads the
checkpoint itself, with its own `config.json`.
"""

import contextlib
import contextvars
import functools
import json
import pathlib
from collections.abc import Iterator
from typing import Any

from mllm_jax.interop.hub import ASSETS, local_only

FILE = ASSETS / "published.json"
_SHIPPED: contextvars.ContextVar[bool] = contextvars.ContextVar("shipped", default=False)


@functools.cache
def published(part: str) -> tuple[dict[str, Any], ...]:
    """The shipped models: `name`, hub `ids`, number of `parameters`, how it was `checked`, and `config` (config.json).

    Args:
      part: "vision" or "llms".
    """
    return tuple(json.loads(FILE.read_text(encoding="utf-8"))[part])


@contextlib.contextmanager
def shipped_geometry() -> Iterator[None]:
    """Inside, `interop.vision_config` and `llm_config` know these models by their hub ids, and nothing is fetched."""
    token = _SHIPPED.set(True)
    try:
        with local_only():
            yield
    finally:
        _SHIPPED.reset(token)


def shipped_config(path: str | pathlib.Path, part: str) -> dict[str, Any] | None:
    """config.json of a shipped model, within `shipped_geometry`; None elsewhere, for directories and for other models.

    Args:
      part: "vision" or "llms".
    """
    if not _SHIPPED.get() or pathlib.Path(path).expanduser().is_dir():
        return None
    return next((model["config"] for model in published(part) if str(path) in model["ids"]), None)
