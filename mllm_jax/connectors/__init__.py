"""Connectors between vision encoder and LLM, chosen by exact name from `CONNECTORS`.

To add one: a file with a `Connector` subclass, a row here, a test.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mllm_jax.connectors.average_pool import AveragePool
from mllm_jax.connectors.base import Connector, FeatureRequest, Grid, VisionFeatures, VisionSpec
from mllm_jax.connectors.linear import Linear
from mllm_jax.connectors.mlp import MLP

__all__ = ["CONNECTORS", "Connector", "FeatureRequest", "Grid", "VisionFeatures", "VisionSpec", "create", "options"]

# name -> (class, fields that the name itself fixes)
CONNECTORS: dict[str, tuple[type[Connector], dict[str, Any]]] = {
    "linear": (Linear, {}),
    "mlp1x_gelu": (MLP, {"layers": 1}),
    "mlp2x_gelu": (MLP, {"layers": 2}),
    "mlp3x_gelu": (MLP, {"layers": 3}),
    "average_pool": (AveragePool, {}),
}


def _entry(name: str) -> tuple[type[Connector], dict[str, Any]]:
    if name not in CONNECTORS:
        near = difflib.get_close_matches(str(name), CONNECTORS, n=1)
        hint = f"did you mean {near[0]!r}? " if near else ""
        raise ValueError(f"unknown connector {name!r}; {hint}valid: {', '.join(CONNECTORS)}")
    return CONNECTORS[name]


def options(name: str) -> dict[str, Any]:
    """The options of a connector and their defaults.

    Raises:
      ValueError: unknown name; the nearest valid one is named.
    """
    connector, fixed = _entry(name)
    given_by_model = {field.name for field in dataclasses.fields(Connector)} | set(fixed)
    return {f.name: f.default for f in dataclasses.fields(connector) if f.name not in given_by_model}


def create(
    name: str,
    vision: VisionSpec,
    width: int,
    option_values: Mapping[str, Any] | None = None,
    dtype: Any = jnp.float32,
    param_dtype: Any = jnp.float32,
    module_name: str | None = None,
) -> Connector:
    """Builds a connector (an unbound Flax module).

    Raises:
      ValueError: unknown name or option, or a grid on which the connector is not defined.
    """
    connector, fixed = _entry(name)
    given = dict(option_values or {})
    valid = options(name)
    for key in given:
        if key not in valid:
            raise ValueError(f"connector {name!r} has no option {key!r}; valid: {', '.join(valid) or 'none'}")
    return connector(
        vision=vision, width=width, dtype=dtype, param_dtype=param_dtype, name=module_name, **fixed, **given
    )
