"""Each connector's learning rate: a small grid of factors, of which a validation split chooses, and the choice on file.

The grid is a factor on the recipe's rates for the connector's parameters in both stages; what the LLM learns at is the
same for all. A cell trains at its own choice if there is one, as that of a variant which adds parameters, else at
its connector's, else at the recipe's own rates.
"""

import json
import pathlib
from collections.abc import Iterable, Mapping

from mllm_jax.schema import ConfigError
from mllm_jax.sweep.overrides import Overrides, Sweep, product

FACTORS = (0.1, 0.3, 1.0, 3.0, 10.0)
STAGES = ("pretrain", "finetune")
SUFFIX = "-rates"  # ends the argument of a recipe whose sweep is such a grid


def scaled(factor: float) -> Overrides:
    """The overrides that multiply the connector's learning rates by `factor`."""
    return {} if factor == 1 else {f"stages.{stage}.connector_rate_scale": factor for stage in STAGES}


def grid(cells: Sweep) -> Sweep:
    """Each cell at each of `FACTORS`: `linear-rate0.1`, `linear-rate0.3`, ... `linear-rate10`."""
    return product(cells, {f"rate{factor:g}": scaled(factor) for factor in FACTORS})


def with_chosen(cells: Sweep, file: pathlib.Path, scale: str) -> Sweep:
    """The cells, each with its own choice, or else its connector's.

    Args:
      cells: those whose overrides name a connector; others keep the recipe's rates.
      file: the choices, `{scale: {cell or connector: {"factor": ..., ...}}}`; need not be there.
      scale: which of them.

    Raises:
      ConfigError: the file holds something else.
    """
    chosen = read(file, scale)
    found = {}
    for name, overrides in cells.items():
        of_connector = chosen.get(overrides.get("model.connector.name", ""), 1.0)
        found[name] = {**overrides, **scaled(chosen.get(name, of_connector))}
    return found


def read(file: pathlib.Path, scale: str) -> dict[str, float]:
    """Cell or connector -> chosen factor.

    Raises:
      ConfigError: the file holds something else.
    """
    try:
        values = json.loads(file.read_text(encoding="utf-8")).get(scale, {}) if file.exists() else {}
        found = {name: choice["factor"] for name, choice in values.items()}
        if wrong := [one for one in found.values() if type(one) not in (int, float)]:
            raise ValueError(f"factor {wrong[0]!r}")
        return {name: float(factor) for name, factor in found.items()}
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
        raise ConfigError(
            f"{file} does not hold choices of learning rates ({type(error).__name__}: {error}); "
            "make it again with `mllm-jax study rates`"
        ) from None


def check_scale(
    argument: str, scales: Iterable[str], recipe: str, others: Mapping[str, str] | None = None
) -> str:
    """The scale of a recipe's argument: one of `scales`, which may have `SUFFIX` behind it, or what `others` says.

    Raises:
      ConfigError: it is something else.
    """
    if others and argument in others:
        return others[argument]
    scale = argument.removesuffix(SUFFIX)
    if scale not in scales:
        valid = [*(name for s in scales for name in (s, s + SUFFIX)), *(others or ())]
        raise ConfigError(f"{recipe}:{argument}: choose {', '.join(valid[:-1])} or {valid[-1]}")
    return scale
