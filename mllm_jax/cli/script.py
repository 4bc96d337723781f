"""Starting a script with a recipe: flags whose mistakes are named, and errors that end in one message.

CONFIG = script.define_config()

def main(_): ...

if __name__ == "__main__":
    script.run(main)
"""

import contextlib
import functools
import itertools
import operator
import pathlib
import re
import sys
from collections.abc import Callable, Sequence
from typing import Any

from absl import app, flags
from ml_collections import ConfigDict, config_flags

from mllm_jax import compilation_cache, no_torch
from mllm_jax.cli import shipped
from mllm_jax.config import SCHEMA, ConfigError, check_key, map_paths
from mllm_jax.console import complain, write_anything
from mllm_jax.data.conversations import SampleError
from mllm_jax.data.images import ImageError
from mllm_jax.data.reading import DataError
from mllm_jax.evaluation.benchmarks import BenchmarkError
from mllm_jax.evaluation.store import StoreError
from mllm_jax.interop.saved_params import CheckpointError
from mllm_jax.lock import LockLostError
from mllm_jax.mini.world.dataset import DatasetMismatchError
from mllm_jax.models.attention.selfcheck import BackendError
from mllm_jax.parallel import endings
from mllm_jax.parallel.processes import OtherProcessError
from mllm_jax.schema import Named, defaults, find
from mllm_jax.storage import expand_arguments, local_path
from mllm_jax.training.metrics import NonFiniteLoss

# What a user can cause and mend; anything else is a mistake of ours and keeps its traceback.
USER_ERRORS = (
    BackendError,
    BenchmarkError,
    CheckpointError,
    ConfigError,
    DataError,
    DatasetMismatchError,
    ImageError,
    LockLostError,
    ModuleNotFoundError,
    NonFiniteLoss,
    OSError,
    OtherProcessError,
    SampleError,
    StoreError,
)
BUCKETS = ("workdir", "out", "model", "tower", "tokenizer")  # options that take a path in a bucket, too
FLAGS = flags.FLAGS
flags.DEFINE_bool("traceback", False, "Show where in the code an error was raised.")
flags.DEFINE_string(
    "compilation_cache",
    compilation_cache.DEFAULT,
    "Folder of your own where compiled programs are kept for later starts; empty for none.",
)


class RecipeParser(flags.ArgumentParser):
    """Loads a recipe and adds the sources and benchmarks that only the command line names.

    `--config.stages.finetune.sources.more.json=...` adds the source `more`: see `Named.created_by`.

    Attributes:
      load: loads the recipe of `FILE.py` or `FILE.py:ARGUMENT`.
      arguments: the command line.
    """

    def __init__(self, load: Callable[[str], ConfigDict]) -> None:
        self.load = load
        self.arguments: Sequence[str] = ()

    def parse(self, argument: str) -> ConfigDict:
        try:
            config = self.load(shipped.recipe(argument))
        except ValueError as error:  # ml_collections puts a traceback into its message
            raise error.__context__ if isinstance(error.__context__, ConfigError) else error from None
        except AttributeError as error:
            if error.name != "get_config" or getattr(error.obj, "__name__", "") != "config_config":
                raise
            raise ConfigError(
                f"--config: {argument} has no get_config, the function that returns the configuration"
            ) from None
        for key in _overridden(self.arguments):
            parent, _, last = key.rpartition(".")
            above, _, name = parent.rpartition(".")
            with contextlib.suppress(ConfigError, KeyError):  # of an unknown key, which is said later
                node = find(SCHEMA, above)
                place = functools.reduce(operator.getitem, above.split("."), config)
                if isinstance(node, Named) and last in node.created_by and name not in place:
                    with place.unlocked():
                        place[name] = defaults(node.entry)
        return config


def define_config() -> flags.FlagHolder:
    """Defines `--config=RECIPE` or `--config=RECIPE:ARGUMENT`, and `--config.KEY=VALUE` for each of its keys.

    RECIPE is a file or the name of a shipped recipe.
    """
    text = "The recipe: FILE.py, FILE.py:ARGUMENT, or a shipped one's NAME. --config.KEY=VALUE sets any of its keys."
    holder = config_flags.DEFINE_config_file("config", None, text, lock_config=True)
    FLAGS["config"].parser = RecipeParser(FLAGS["config"].parser.parse)
    flags.mark_flag_as_required("config")
    return holder


def run(main: Callable[[list[str]], Any], argv: Sequence[str] | None = None) -> None:
    """Parses the flags, calls `main` and exits.

    An error that its user can mend ends the program with exit code 1 and one message on standard error; the traceback
    is shown with --traceback.
    """
    no_torch.block()
    write_anything()
    app.run(lambda arguments: _start(main, arguments), argv=argv, flags_parser=_parse)


def _start(main: Callable[[list[str]], Any], arguments: list[str]) -> Any:
    if problem := compilation_cache.use(FLAGS.compilation_cache):
        complain(problem)
    try:
        return _guarded(main, arguments)
    except BaseException as error:
        endings.leave(error)
        raise


def _guarded(main: Callable[[list[str]], Any], arguments: list[str]) -> Any:
    try:
        with endings.told():
            return main(arguments)
    except USER_ERRORS as error:
        if FLAGS.traceback:
            raise
        _fail(error)
    except KeyboardInterrupt:
        if FLAGS.traceback:
            raise
        print("\ninterrupted; the same command continues from the last checkpoint", file=sys.stderr)
        sys.exit(130)


def _fail(error: BaseException) -> None:
    fix = f"; {error.fix}" if hasattr(error, "fix") else ""
    complain(f"{type(error).__name__}: {error}{fix}")
    sys.exit(1)


def _parse(arguments: list[str]) -> list[str]:
    if "config" in FLAGS:
        FLAGS["config"].parser.arguments = arguments
    try:
        try:
            arguments = expand_arguments(arguments, BUCKETS)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for recipe in values_of(arguments, "config"):
            file = pathlib.Path(shipped.recipe(recipe).partition(":")[0])
            if not file.is_file() or file.suffix != ".py":
                raise ConfigError(
                    f"--config: there is no recipe {recipe.partition(':')[0]}; give a Python file or one that comes "
                    f"with the library: {', '.join(shipped.names())}"
                )
        left = FLAGS(arguments)
        if len(left) > 1:
            raise ConfigError(f"{left[1]!r} is no option; options are written --NAME=VALUE, without spaces")
        for key in _overridden(arguments):
            _check_connector_option(key, FLAGS["config"].value)
        if "config" in FLAGS:
            map_paths(FLAGS["config"].value, local_path)
        return left
    except ConfigError as error:
        _fail(error)
    except flags.Error as error:
        if isinstance(error.__context__, ConfigError):  # of the recipe
            _fail(error.__context__)
        complain(f"{str(error).rstrip(' .')}; --help shows the options")
        sys.exit(1)
    except (AttributeError, KeyError, TypeError):
        # ml_collections lets these out for a key that does not exist; find it and say so properly.
        try:
            for recipe in values_of(arguments, "config"):
                config = FLAGS["config"].parser.parse(recipe)
                for key in _overridden(arguments):
                    check_key(config, key)
        except ConfigError as error:
            _fail(error)
        raise


def _check_connector_option(key: str, config: ConfigDict) -> None:
    """Refuses an option of another connector than the chosen one: it would do nothing."""
    match = re.fullmatch(r"(model\.connector)\.(\w+)\..+", key)
    if match and match[2] != (chosen := config.model.connector.name):
        raise ConfigError(
            f"config key {key!r} is an option of another connector than the chosen {chosen!r}; leave it out, or add "
            f"--config.{match[1]}.name={match[2]}"
        )


def values_of(arguments: Sequence[str], flag: str) -> list[str]:
    """Values given as `--flag=value` or `--flag value`."""
    found = [a.partition("=")[2] for a in arguments if re.match(rf"--?{flag}=", a)]
    pairs = itertools.pairwise(arguments)
    return found + [value for a, value in pairs if re.fullmatch(rf"--?{flag}", a)]


def _overridden(arguments: Sequence[str]) -> list[str]:
    """Keys set as `--config.KEY=VALUE`."""
    matches = (re.match(r"--?(?:no)?config\.([^=\[]+)", argument) for argument in arguments)
    return [match.group(1) for match in matches if match]
