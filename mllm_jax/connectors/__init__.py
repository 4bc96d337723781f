"""Connectors between vision encoder and LLM, chosen by exact name from `CONNECTORS`.

To add one: a file with a `Connector` subclass, a row here, a test.
"""

import dataclasses
import difflib
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mllm_jax.connectors.average_pool import AveragePool
from mllm_jax.connectors.base import (
    Connector,
    FeatureRequest,
    Grid,
    VisionFeatures,
    VisionSpec,
    collect,
    normalize,
)
from mllm_jax.connectors.c_abstractor import CAbstractor
from mllm_jax.connectors.d_abstractor import DAbstractor
from mllm_jax.connectors.dci import DCI
from mllm_jax.connectors.ldp import LDP
from mllm_jax.connectors.ldpv2 import LDPv2
from mllm_jax.connectors.linear import Linear
from mllm_jax.connectors.mlp import MLP
from mllm_jax.connectors.perceiver import Perceiver
from mllm_jax.connectors.pixel_shuffle import PixelShuffle
from mllm_jax.connectors.q_former import QFormer
from mllm_jax.connectors.resampler import Resampler
from mllm_jax.connectors.sci import SCI
from mllm_jax.connectors.sti import STI
from mllm_jax.connectors.token_packer import TokenPacker

__all__ = [
    "CONNECTORS",
    "Connector",
    "FeatureRequest",
    "Grid",
    "VisionFeatures",
    "VisionSpec",
    "collect",
    "create",
    "normalize",
    "options",
]

# name -> (class, fields that the name itself fixes)
CONNECTORS: dict[str, tuple[type[Connector], dict[str, Any]]] = {
    # feature-preserving
    "linear": (Linear, {}),
    "mlp1x_gelu": (MLP, {"layers": 1}),
    "mlp2x_gelu": (MLP, {"layers": 2}),
    "mlp3x_gelu": (MLP, {"layers": 3}),
    "sti": (STI, {}),
    "sci": (SCI, {}),
    "dci": (DCI, {}),
    # feature-compressing
    "average_pool": (AveragePool, {}),
    "q_former": (QFormer, {}),
    "resampler": (Resampler, {}),
    "perceiver": (Perceiver, {}),
    "c_abstractor": (CAbstractor, {}),
    "d_abstractor": (DAbstractor, {}),
    "pixel_shuffle": (PixelShuffle, {}),
    "ldp": (LDP, {}),
    "ldpv2": (LDPv2, {}),
    "token_packer": (TokenPacker, {}),
}

MAY_BE_ZERO = ("depth", "end_tokens")  # integer options, besides those whose default is not positive


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


def _checked(name: str, key: str, value: Any) -> Any:
    """An option's value in its default's type.

    Raises:
      ValueError: no such option, or another type.
    """
    valid = options(name)
    if key not in valid:
        having = [other for other in CONNECTORS if key in options(other)]
        hint = f"; {', '.join(having)} have it" if having else ""
        raise ValueError(
            f"connector {name!r} has no option {key!r}; valid: {', '.join(valid) or 'none'}{hint}"
        )
    kind = type(valid[key])
    if kind is tuple and isinstance(value, list | tuple) and all(type(v) is int for v in value):
        return tuple(value)
    if kind is float and type(value) is int:
        return float(value)
    if type(value) is not kind or kind is tuple:
        wanted = "a list of integers" if kind is tuple else kind.__name__
        raise ValueError(f"option {key!r} of connector {name!r} must be {wanted}, not {value!r}")
    least = 1 if kind is int and key not in MAY_BE_ZERO else 0
    least = min(least, valid[key]) if kind in (int, float) else least
    if kind in (int, float) and value < least:
        raise ValueError(f"option {key!r} of connector {name!r} must be at least {least}: {value!r}")
    return value


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
      ValueError: unknown name or option, a value of the wrong type, hidden states that the encoder does not
        have, or a patch grid (`vision.grid`) on which the connector is not defined.
    """
    connector, fixed = _entry(name)
    given = {key: _checked(name, key, value) for key, value in (option_values or {}).items()}
    made = connector(
        vision=vision, width=width, dtype=dtype, param_dtype=param_dtype, name=module_name, **fixed, **given
    )
    made.request()
    made.num_tokens(vision.grid)
    return made
