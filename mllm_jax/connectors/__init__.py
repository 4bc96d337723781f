"""Connectors between vision encoder and LLM, chosen by exact name from `CONNECTORS`.

To add one: a file with a `Connector` subclass, a row here, a test.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from mllm_jax.connectors.average_pool import AveragePool
from mllm_jax.connectors.base import (
    OPTION,
    Connector,
    FeatureRequest,
    Grid,
    VisionFeatures,
    VisionSpec,
    collect,
    normalize,
    option,
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
from mllm_jax.connectors.preserving import PreservingConnector
from mllm_jax.connectors.q_former import QFormer
from mllm_jax.connectors.resampler import Resampler
from mllm_jax.connectors.sci import SCI
from mllm_jax.connectors.spatial_pool import SpatialPool
from mllm_jax.connectors.sti import STI
from mllm_jax.connectors.token_packer import TokenPacker
from mllm_jax.schema import Key, did_you_mean

__all__ = [
    "CONNECTORS",
    "Connector",
    "FeatureRequest",
    "Grid",
    "VisionFeatures",
    "VisionSpec",
    "collect",
    "create",
    "declared_options",
    "normalize",
    "option",
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
    "spatial_pool": (SpatialPool, {}),
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


def _entry(name: str) -> tuple[type[Connector], dict[str, Any]]:
    if name not in CONNECTORS:
        raise ValueError(
            f"unknown connector {name!r}; {did_you_mean(name, CONNECTORS)}valid: {', '.join(CONNECTORS)}"
        )
    return CONNECTORS[name]


def declared_options(name: str) -> dict[str, Key]:
    """The options of a connector as configuration keys.

    A field's default tells its type: whole numbers are at least 1 and others at least 0, unless the default is less
    or the connector declares another range with `option`.

    Raises:
      ValueError: unknown name; the nearest valid one is named.

    Examples:
      >>> key = declared_options("average_pool")["mode"]
      >>> key.default, key.choices
      ('2d', ('1d', '2d'))
    """
    connector, fixed = _entry(name)
    given_by_model = {field.name for field in dataclasses.fields(Connector)} | set(fixed)
    fields = [field for field in dataclasses.fields(connector) if field.name not in given_by_model]
    return {
        field.name: dataclasses.replace(_declared(field), help=_meaning(connector, field.name))
        for field in fields
    }


def _declared(field: dataclasses.Field) -> Key:
    if OPTION in field.metadata:
        return field.metadata[OPTION]
    kind = type(field.default)
    least = min(1 if kind is int else 0, field.default) if kind in (int, float) else None
    return Key(field.default, least=least, items=int if kind is tuple else None)


def _meaning(connector: type[Connector], option: str) -> str:
    """What the docstring of the connector, or of a base, says about an option below "Attributes:"."""
    pattern = rf"(?:\n|  ) *{option}: (.*?)(?=(?:\n|  ) *\w+: |\n *\n|\Z)"
    for each in connector.__mro__:
        if found := re.search(pattern, (each.__doc__ or "").partition("Attributes:")[2], re.DOTALL):
            return " ".join(found[1].split()).rstrip(".")
    return ""


def options(name: str) -> dict[str, Any]:
    """The options of a connector and their defaults.

    Raises:
      ValueError: unknown name; the nearest valid one is named.

    Examples:
      >>> options("average_pool")
      {'tokens': 144, 'mode': '2d', 'layers': 2}
    """
    return {option: key.default for option, key in declared_options(name).items()}


def _checked(name: str, option: str, value: Any) -> Any:
    """An option's value in its default's type.

    Raises:
      ValueError: no such option, or not a value of it.
    """
    valid = declared_options(name)
    if option not in valid:
        having = [other for other in CONNECTORS if option in declared_options(other)]
        hint = f"; {', '.join(having)} have it" if having else ""
        raise ValueError(
            f"connector {name!r} has no option {option!r}; valid: {', '.join(valid) or 'none'}{hint}"
        )
    if problem := valid[option].problem(value):
        raise ValueError(f"option {option!r} of connector {name!r} {problem}")
    return valid[option].kind(value)


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

    Args:
      name: a key of `CONNECTORS`.
      vision: the encoder.
      width: D, of the LLM.
      option_values: of its options (`options`); the others keep their defaults.
      dtype, param_dtype: of the computation and of fresh parameters.
      module_name: where it is a part of another module.

    Raises:
      ValueError: unknown name or option, a value of the wrong type, hidden states that the encoder does not
        have, or a patch grid (`vision.grid`) on which the connector is not defined.

    Examples:
      >>> import jax
      >>> vision = VisionSpec(width=64, depth=6, select_layer=5, grid=(12, 12))
      >>> pool = create("average_pool", vision, width=128, option_values={"tokens": 36})
      >>> features = collect(pool.request(), [jnp.ones((1, 144, 64))] * 7, grid=(12, 12))
      >>> tokens, params = pool.init_with_output(jax.random.key(0), features)
      >>> tokens.shape
      (1, 36, 128)
      >>> create("average_pol", vision, width=128)
      Traceback (most recent call last):
        ...
      ValueError: unknown connector 'average_pol'; did you mean 'average_pool'? valid: linear, ...
    """
    connector, fixed = _entry(name)
    given = {key: _checked(name, key, value) for key, value in (option_values or {}).items()}
    made = connector(
        vision=vision, width=width, dtype=dtype, param_dtype=param_dtype, name=module_name, **fixed, **given
    )
    made.request()
    if not vision.regular and not made.treats_patches_alone():
        alone = [each for each, (kind, _) in CONNECTORS.items() if issubclass(kind, PreservingConnector)]
        raise ValueError(
            f"connector {name!r} with these options needs patches on one grid, which there is not with "
            f"vision.max_patches or vision.combine='tokens'; choose {', '.join(alone)}, without reduction and "
            "convolution"
        )
    made.num_tokens(vision.grid)
    return made
