"""The cells of a sweep: each a run of train.py, whose configuration is checked before anything is computed."""

import dataclasses
import fnmatch
import importlib.util
import inspect
import json
import pathlib
import types
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ml_collections import ConfigDict

from mllm_jax import storage
from mllm_jax.config import ConfigError, changes_scores, check, resolved
from mllm_jax.connectors import CONNECTORS
from mllm_jax.history import HISTORY, starts
from mllm_jax.inference import runs
from mllm_jax.interop.published import shipped_geometry
from mllm_jax.schema import did_you_mean
from mllm_jax.storage import Path
from mllm_jax.sweep.overrides import Overrides, Sweep, apply, check_names, flags
from mllm_jax.workdir import check_same, data_dir

RUNS, CELLS = "runs", "cells"  # below the sweep's directory
CONNECTOR = "model.connector.name"


@dataclasses.dataclass(frozen=True)
class Cell:
    """One run.

    Attributes:
      name: of its folders: the variant's with the seed.
      variant: the name that `get_sweep` gives it.
      seed: of the run.
      overrides: what `get_sweep` says, the seed left out.
      config: the whole configuration.
      order: of the variant in the sweep.
    """

    name: str
    variant: str
    seed: int
    overrides: Overrides
    config: ConfigDict
    order: int = 0

    def workdir(self, directory: Path) -> Path:
        """The run's work directory, in the sweep's."""
        return directory / RUNS / self.name

    @property
    def options(self) -> list[str]:
        """What of the configuration is said to train.py, beside what all cells share."""
        return flags({**self.overrides, "seed": self.seed})

    def note(self, recipe: str) -> dict[str, Any]:
        """What is kept of the cell beside its run."""
        kept = ("name", "variant", "seed", "order", "overrides")
        values = {**{key: getattr(self, key) for key in kept}, "recipe": recipe}
        return json.loads(json.dumps(values))  # tuples as lists


def load_recipe(path: pathlib.Path) -> types.ModuleType:
    """A recipe as a module.

    Raises:
      ConfigError: it is no Python file, or has no `get_sweep`.
    """
    if path.suffix != ".py" or not path.is_file():
        raise ConfigError(f"there is no recipe {path}; give a Python file (FILE.py or FILE.py:ARGUMENT)")
    spec = importlib.util.spec_from_file_location(f"recipe_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    if missing := [name for name in ("get_config", "get_sweep") if not hasattr(module, name)]:
        raise ConfigError(
            f"{path} has no {missing[0]}; the recipe of a sweep has get_config, which gives a run's configuration, and "
            "beside it get_sweep, which gives the sweep's cells (docs/sweep.md)"
        )
    return module


def read_sweep(recipe: str, connectors: Sequence[str] = ()) -> Sweep:
    """The overrides of a recipe's cells.

    Args:
      recipe: FILE.py or FILE.py:ARGUMENT.
      connectors: names of those whose cells are taken, all if none; with `+` before a name its cells are added.

    Raises:
      ConfigError: a recipe without a sweep, or that cannot take further connectors; an unknown connector, one without
        cells, or one that cannot take the sweep's sizes.
    """
    path, _, argument = recipe.partition(":")
    function = load_recipe(pathlib.Path(path)).get_sweep
    added = tuple(name[1:] for name in connectors if name.startswith("+"))
    kept = [name for name in connectors if not name.startswith("+")]
    for name in (*added, *kept):
        if name not in CONNECTORS:
            raise ConfigError(
                f"--connectors: there is no connector {name!r}; {did_you_mean(name, CONNECTORS)}a new one is a file "
                "and a row in mllm_jax/connectors/__init__.py (docs/connectors.md)"
            )
    options: dict[str, Any] = {}
    if added:
        if "added" not in inspect.signature(function).parameters:
            raise ConfigError(f"--connectors=+{added[0]}: get_sweep of {path} has no parameter `added`")
        options["added"] = added
    try:
        sweep = function(argument, **options) if argument else function(**options)
    except ConfigError:
        raise
    except ValueError as error:  # of a connector that cannot take one of the sizes
        raise ConfigError(f"{recipe}: a cell of the sweep cannot be made: {error}") from error
    if not (isinstance(sweep, Mapping) and all(isinstance(each, Mapping) for each in sweep.values())):
        raise ConfigError(f"get_sweep of {path} must return a dict: name of a cell -> {{key: value}}")
    check_names(sweep)
    if kept:
        has = dict.fromkeys(o[CONNECTOR] for o in sweep.values() if CONNECTOR in o)
        if missing := [name for name in kept if name not in has]:
            raise ConfigError(
                f"--connectors={missing[0]}: {recipe} has no cell of it, only of {', '.join(has)}; "
                f"--connectors=+{missing[0]} adds some"
            )
        sweep = {name: o for name, o in sweep.items() if o.get(CONNECTOR) in (*kept, *added)}
    return sweep


def make_cells(
    sweep: Sweep,
    base: ConfigDict,
    given: Collection[str],
    seeds: Sequence[int],
    directory: Path,
    only: Sequence[str] = (),
) -> list[Cell]:
    """The cells, those of one seed together, each checked as far as that needs no data and no weights.

    Args:
      sweep: variant -> overrides.
      base: the recipe with what the command line sets.
      given: the keys that the command line sets.
      seeds: of every variant.
      directory: of the sweep.
      only: patterns (`*px-seed0`) of names; a variant's own name stands for all of its seeds.

    Raises:
      ConfigError: with the errors of all cells.
    """
    cells: list[Cell] = []
    faults: dict[str, list[str]] = {}  # message -> variants
    for order, (variant, overrides) in enumerate(sweep.items()):
        names = {seed: f"{variant}-seed{seed}" for seed in seeds}
        chosen = [s for s, name in names.items() if not only or any(_matches(p, name, variant) for p in only)]
        for cell in [Cell(names[seed], variant, seed, overrides, base, order) for seed in chosen]:
            try:
                if twice := sorted(set(given) & {*overrides, "seed"}):
                    raise ConfigError(
                        f"config key {twice[0]!r} is set by the sweep itself; choose cells by --only, --seeds or "
                        "--connectors instead"
                    )
                cells.append(_make(cell, directory))
            except (ValueError, OSError) as error:  # alike for cells that differ by their folder alone
                fault = str(error).replace(str(cell.workdir(directory)), str(directory / RUNS / "CELL"))
                if variant not in faults.setdefault(fault, []):
                    faults[fault].append(variant)
    if faults:
        count = sum(map(len, faults.values()))
        lines = (
            f"{'all' if len(variants) == len(sweep) else ', '.join(variants)}: {fault}"
            for fault, variants in faults.items()
        )
        raise ConfigError(f"{count} of {len(sweep)} cells cannot run:\n  " + "\n  ".join(lines))
    if not cells:
        raise ConfigError(
            f"no cell is called {' or '.join(only)}; --list shows them"
            if only
            else "there is no cell; give the sweep at least one, and at least one seed"
        )
    return sorted(cells, key=lambda cell: seeds.index(cell.seed))


def _matches(pattern: str, name: str, variant: str) -> bool:
    return fnmatch.fnmatchcase(name, pattern) or fnmatch.fnmatchcase(variant, pattern)


def _make(cell: Cell, directory: Path) -> Cell:
    """The cell with its own configuration instead of the base, checked."""
    config = cell.config.copy_and_resolve_references()
    apply(config, cell.overrides)
    config.seed = cell.seed
    cell = dataclasses.replace(cell, config=config)
    flags(cell.overrides)
    check(config)
    with shipped_geometry():
        runs.model_config(config)
    # Prepared data in a bucket are copied to the machine that trains, which may be another one.
    if not (config.data.prepared and config.data.dir.startswith(storage.BUCKET)):
        data_dir(config, cell.workdir(directory))
    check_same(cell.workdir(directory), resolved(config))
    return cell


def is_done(cell: Cell, directory: Path) -> bool:
    """Whether the cell's run is complete and, where the recipe evaluates, its evaluation too.

    Raises:
      ConfigError: the folder holds another configuration's run.
    """
    workdir, config = cell.workdir(directory), cell.config
    if not (workdir / "config.json").exists():
        return False
    if any(changes_scores(key) for key in check_same(workdir, resolved(config))):
        return False
    if config.stage_order[-1] not in runs.finished_stages(workdir, config) or _is_outdated(workdir):
        return False
    return not config.eval.benchmarks or set(config.eval.benchmarks) <= set(summary(workdir)["benchmarks"])


def _is_outdated(workdir: Path) -> bool:
    """Whether the run has been started with another evaluation since its last one, and has not come to its end."""
    try:
        written = [storage.modified(path) for path in (workdir / "eval" / "summary.json", workdir / HISTORY)]
    except FileNotFoundError:  # nothing changed, or nothing was evaluated
        return False
    changed = (key for start in starts(workdir) for key in start.changed)
    return any(map(changes_scores, changed)) and written[0] < written[1]


def summary(workdir: Path) -> dict[str, Any]:
    """What the evaluation of a run found (`eval/summary.json`), without benchmarks if there is none yet."""
    try:
        return json.loads(storage.read_text(workdir / "eval" / "summary.json"))
    except (FileNotFoundError, ValueError):
        return {"benchmarks": {}}
