"""Named configuration overrides, which a recipe's `get_sweep` puts together.

A sweep is a dict: cell's name -> {config key: value}. Names become folders, so they are checked and must never change
meaning: a stored run is found again by its name.

    def get_sweep(argument: str = "") -> Sweep:
        connectors = over("model.connector.name", ["linear", "mlp2x_gelu"])
        sizes = over("model.vision.image_size", [56, 84], "{}px")
        return product(connectors, sizes)     # linear-56px, linear-84px, mlp2x_gelu-56px, mlp2x_gelu-84px
"""

import re
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from ml_collections import ConfigDict

from mllm_jax.config import check_key
from mllm_jax.schema import ConfigError

Overrides = dict[str, Any]
Sweep = dict[str, Overrides]

# Folders on every file system, and parts of Kubernetes names once they are in lower case.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._+-]*")
LONGEST = 120  # characters
JOINT = "-"


def over(key: str, values: Iterable[Any], name: str = "{}") -> Sweep:
    """One cell per value of a key.

    Args:
      name: of a cell, with the value in the place of `{}`; the items of a tuple are joined by `+`.

    Examples:
      >>> over("stages.finetune.learning_rate", [1e-5, 2e-5], "rate{}")
      {'rate1e-05': {'stages.finetune.learning_rate': 1e-05}, 'rate2e-05': {'stages.finetune.learning_rate': 2e-05}}
    """
    return chain(*({name.format(_text(value)): {key: value}} for value in values))


def product(*sweeps: Mapping[str, Overrides]) -> Sweep:
    """Every combination of the sweeps' cells, the last one's changing fastest; names are joined by `-`.

    Raises:
      ConfigError: two of them set one key.

    Examples:
      >>> connectors = over("model.connector.name", ["linear", "sci"])
      >>> list(product(connectors, over("model.vision.image_size", [56, 84], "{}px")))
      ['linear-56px', 'linear-84px', 'sci-56px', 'sci-84px']
    """
    found: Sweep = {"": {}}
    for sweep in sweeps:
        found = chain(
            *(
                {_joined(name, other): _merged(name, overrides, other, more)}
                for name, overrides in found.items()
                for other, more in sweep.items()
            )
        )
    return found


def zip_(*sweeps: Mapping[str, Overrides]) -> Sweep:
    """The sweeps' first cells together, then their second ones, and so on.

    Raises:
      ConfigError: they have different numbers of cells, or set one key.

    Examples:
      >>> towers = over("model.vision.path", ["clip", "siglip"])
      >>> zip_(towers, over("model.vision.image_size", [336, 384], "{}px"))["siglip-384px"]
      {'model.vision.path': 'siglip', 'model.vision.image_size': 384}
    """
    sizes = [len(sweep) for sweep in sweeps]
    if len(set(sizes)) > 1:
        raise ConfigError(f"zip_ of sweeps with {', '.join(map(str, sizes))} cells; give each as many")
    return chain(*(product(*({name: sweep[name]} for name, sweep in zip(names, sweeps, strict=True)))
                   for names in zip(*sweeps, strict=True)))  # fmt: skip


def chain(*sweeps: Mapping[str, Overrides]) -> Sweep:
    """The cells of all sweeps, one after the other.

    Raises:
      ConfigError: two cells have one name but different overrides.

    Examples:
      >>> list(chain(over("seed", [0, 1], "seed{}"), {"long": {"stages.finetune.epochs": 3}}))
      ['seed0', 'seed1', 'long']
    """
    found: Sweep = {}
    for sweep in sweeps:
        for name, overrides in sweep.items():
            if found.setdefault(name, dict(overrides)) != dict(overrides):
                raise ConfigError(f"two cells of the sweep are called {name!r}; give them different names")
    return found


def changes(base: ConfigDict, config: ConfigDict) -> Overrides:
    """The overrides that make `config` of `base`: keys whose values differ, options of other connectors left out.

    Raises:
      ConfigError: `config` has keys that `base` lacks, or the other way round (stages, sources, benchmarks).

    Examples:
      >>> from mllm_jax.config import default_config
      >>> config = default_config()
      >>> config.model.connector.name = "dci"
      >>> changes(default_config(), config)
      {'model.connector.name': 'dci'}
    """
    before, after = dict(_flat(base)), dict(_flat(config))
    if odd := sorted(before.keys() ^ after.keys()):
        raise ConfigError(
            f"a cell can only change values of keys that are there; these are not: {', '.join(odd[:5])}"
        )
    other = re.compile(rf"model\.connector\.(?!{re.escape(config.model.connector.name)}\.)\w+\.")
    return {key: value for key, value in after.items() if value != before[key] and not other.match(key)}


def check_names(sweep: Mapping[str, Overrides]) -> None:
    """Checks that every name may become a folder, on file systems that ignore upper and lower case too.

    Raises:
      ConfigError: naming the cell.

    Examples:
      >>> check_names({"a/b": {}})
      Traceback (most recent call last):
        ...
      mllm_jax.schema.ConfigError: the cell's name 'a/b' cannot become a folder: use letters, ...
    """
    seen: dict[str, str] = {}
    for name in sweep:
        if not NAME.fullmatch(name) or len(name) > LONGEST:
            raise ConfigError(
                f"the cell's name {name!r:.200} cannot become a folder: use letters, digits and . _ + -, at most "
                f"{LONGEST}"
            )
        if (twin := seen.setdefault(name.lower(), name)) != name:
            raise ConfigError(f"cells {twin!r} and {name!r} differ in upper and lower case alone; rename one")


def apply(config: ConfigDict, overrides: Overrides) -> None:
    """Sets keys of a configuration, as the command line does.

    Raises:
      ConfigError: no such key, or a value of another type.

    Examples:
      >>> from mllm_jax.config import default_config
      >>> config = default_config()
      >>> apply(config, {"model.connector.name": "dci", "seed": 1})
      >>> config.model.connector.name, config.seed
      ('dci', 1)
    """
    for key, value in overrides.items():
        check_key(config, key)
        place = config
        *parents, last = key.split(".")
        for parent in parents:
            place = place[parent]
        try:
            place[last] = value
        except (TypeError, ValueError) as error:
            raise ConfigError(f"config key {key!r} cannot be {value!r}: {error}") from None


def flags(overrides: Overrides) -> list[str]:
    """The overrides as options of train.py.

    Raises:
      ConfigError: a value that no option can give.

    Examples:
      >>> flags({"model.connector.name": "sci", "model.connector.sci.layers": (7, 15), "seed": 1})
      ['--config.model.connector.name=sci', '--config.model.connector.sci.layers=(7, 15)', '--config.seed=1']
    """
    if missing := [key for key, value in overrides.items() if value is None]:
        raise ConfigError(f"config key {missing[0]!r}: a cell cannot set a key to None; give it a value")
    return [f"--config.{key}={value}" for key, value in overrides.items()]


def _flat(config: ConfigDict, path: str = "") -> Iterator[tuple[str, Any]]:
    for name, value in config.items():
        here = f"{path}.{name}" if path else name
        if isinstance(value, ConfigDict):
            yield from _flat(value, here)
        else:
            yield here, value


def _joined(*names: str) -> str:
    return JOINT.join(filter(None, names))


def _merged(name: str, overrides: Overrides, other: str, more: Overrides) -> Overrides:
    if twice := sorted(overrides.keys() & more.keys()):
        raise ConfigError(f"cells {name!r} and {other!r} of a product both set {twice[0]!r}")
    return {**overrides, **more}


def _text(value: Any) -> str:
    return "+".join(map(_text, value)) if isinstance(value, tuple | list) else str(value)
