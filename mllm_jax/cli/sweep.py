"""Run all cells of a recipe's sweep: what is missing, what was stopped, and nothing twice.

    mllm-jax sweep --config=configs/preserve_or_compress.py:mini --workdir=runs/preserve_or_compress
    mllm-jax sweep ... --connectors=+max_pool            your own connector beside the stored cells
    mllm-jax sweep ... --only='*-84px' --seeds=0         some cells
    mllm-jax sweep ... --list                            the cells, where they are, and what they set
    mllm-jax sweep ... --emit=slurm > study.sbatch       one command per cell that is not done, for others to run

A cell is a run of train.py in WORKDIR/runs/CELL, with the configuration that `get_sweep` of the recipe gives it. All
configurations are checked before anything is computed. Several of these commands may work on one WORKDIR, on one
machine or many that share it: each cell is taken by one of them. Stopped, however hard, the same command goes on where
it was. --config.KEY=VALUE holds for all cells. See docs/sweep.md.

  --workers=N           cells at once (default 1)
  --seeds=0,1,2         of every cell (default 0,1,2)
  --only=PATTERN,...    cells whose names match, such as q_former-*
  --connectors=NAME,... only cells with these connectors; +NAME adds cells for one that the recipe does not have
  --list                show the cells and stop
  --emit=FORM           print one command per cell that is not done: commands, slurm or kubernetes
  --image=IMAGE         of the containers of --emit=kubernetes
  --train=FILE          the training script (default: train.py here, or beside the recipe's folder)
  --logs=DIR            where the cells' output goes (default: train.log in each run)

The exit code is 0 if all cells are done, 1 if one failed (they are listed, each with its log) or an argument is wrong.
"""

import functools
import os
import pathlib
import re
import sys
from typing import Any

from mllm_jax.console import complain, make_console, print_table, say


def main(arguments: list[str]) -> int:
    """Runs the verb."""
    if not arguments or {"-h", "--help", "--helpfull"} & set(arguments):
        print(__doc__.strip())
        return 0
    from absl import flags, logging

    from mllm_jax.cli import script
    from mllm_jax.sweep.emit import FORMS

    config = script.define_config()
    workdir = flags.DEFINE_string("workdir", None, "Folder of the sweep, or gs://.", required=True)
    workers = flags.DEFINE_integer("workers", 1, "Cells at once.", lower_bound=1)
    seeds = flags.DEFINE_list("seeds", ["0", "1", "2"], "Seeds of every cell.")
    only = flags.DEFINE_list("only", [], "Patterns of cells' names.")
    connectors = flags.DEFINE_list("connectors", [], "Connectors whose cells run; +NAME adds cells.")
    listing = flags.DEFINE_bool("list", False, "Show the cells.")
    form = flags.DEFINE_enum("emit", None, FORMS, "Print commands instead of running them.")
    image = flags.DEFINE_string("image", "registry.example.com/mllm-jax:gpu", "Container image.")
    train = flags.DEFINE_string("train", None, "Training script.")
    logs = flags.DEFINE_string("logs", None, "Folder for the cells' output.")

    def run(_: list[str]) -> None:
        from mllm_jax.config import ConfigError
        from mllm_jax.storage import as_path, is_bucket
        from mllm_jax.sweep.cells import Cell, is_done, make_cells, read_sweep

        logging.set_verbosity(logging.WARNING)
        directory, recipe = as_path(workdir.value), _recipe(arguments)
        if not is_bucket(directory) and directory.exists() and not directory.is_dir():
            raise ConfigError(f"--workdir: {directory} is a file; give a folder")
        given = _given(arguments, flags.FLAGS)
        base = config.value
        if not base.data.dir and not is_bucket(directory):
            base.data.dir = str(directory / "data")  # shared: what is drawn or computed of it is, once
            given.append(f"--config.data.dir={base.data.dir}")
        try:
            chosen = [int(seed) for seed in seeds.value]
        except ValueError:
            raise ConfigError(
                f"--seeds={','.join(seeds.value)}: give whole numbers, as in --seeds=0,1,2"
            ) from None
        keys = [re.sub(r"--?(no)?config\.([^=\[]+).*", r"\2", argument) for argument in given]
        sweep = read_sweep(recipe, connectors.value)
        cells = make_cells(sweep, base, keys, chosen, directory, only.value)
        program = train.value or _find_train(recipe)

        def command(cell: Cell, python: str = sys.executable) -> list[str]:
            place = f"--workdir={cell.workdir(directory)}"
            return [python, program, f"--config={recipe}", place, *given, *cell.options]

        if listing.value:
            _list(cells, directory, recipe)
            return
        if form.value:
            from mllm_jax.sweep.emit import emit

            left = [cell for cell in cells if not is_done(cell, directory)]
            if left:
                named = functools.partial(command, python="python")
                print(emit(form.value, left, named, recipe, image.value), end="")
            complain(f"not done: {len(left)} of {len(cells)} cells")
            return
        folder = logs.value or ("logs" if is_bucket(directory) else None)
        sys.exit(run_cells(cells, directory, recipe, command, workers.value, folder))

    sys.argv[1:] = arguments  # where ml_collections looks for values of keys
    script.run(run, ["mllm-jax sweep", *arguments])
    return 0


def run_cells(cells: Any, directory: Any, recipe: str, command: Any, workers: int, logs: str | None) -> int:
    from mllm_jax.sweep.display import Display, print_failures, print_results
    from mllm_jax.sweep.runner import FAILED, Runner, Stopped

    console = make_console()
    say(console, f"{len(cells)} cell{'s' if len(cells) > 1 else ''} in {directory}, {workers} at once")
    log_of = (lambda cell: pathlib.Path(logs) / f"{cell.name}.log") if logs else None
    try:
        with Display(console, directory) as display:
            runner = Runner(cells, directory, recipe, command, workers, log_of, display)
            runner.run()
    except Stopped as stopped:
        complain("stopped; the same command goes on from here")
        return 128 + stopped.args[0]
    states = {name: status.state for name, status in runner.states.items()}
    print_results(console, cells, directory, states)
    print_failures(console, runner)
    return 1 if FAILED in states.values() else 0


def _list(cells: Any, directory: Any, recipe: str) -> None:
    from mllm_jax.sweep.cells import is_done
    from mllm_jax.sweep.claims import Claims

    claims = Claims(directory, recipe)

    def state(cell: Any) -> str:
        if is_done(cell, directory):
            return "done"
        if (taken := claims.is_taken(cell)) is not False:
            return "running" if taken else "claimed"
        return "begun" if (cell.workdir(directory) / "config.json").exists() else ""

    rows = [(cell.name, state(cell), " ".join(cell.options).replace("--config.", "")) for cell in cells]
    print_table(make_console(), ("cell", "state", "sets"), rows, f"cells: {len(rows)}", text_columns=3)


def _given(arguments: list[str], known: Any) -> list[str]:
    """The options that set keys of the configuration, each in one piece: `--config.KEY VALUE` takes two."""
    given = []
    for index, argument in enumerate(arguments):
        if not re.match(r"--?(no)?config\.", argument):
            continue
        name = argument.lstrip("-")
        if "=" not in name and name in known and not known[name].boolean:
            argument = f"{argument}={arguments[index + 1]}"
        given.append(argument)
    return given


def _recipe(arguments: list[str]) -> str:
    from mllm_jax.cli import shipped
    from mllm_jax.cli.script import values_of

    return shipped.recipe(os.path.expanduser(values_of(arguments, "config")[-1]))


def _find_train(recipe: str) -> str:
    """train.py in the current directory, or beside the folder of the recipe."""
    from mllm_jax.config import ConfigError

    places = (
        pathlib.Path("train.py"),
        pathlib.Path(recipe.partition(":")[0]).absolute().parents[1] / "train.py",
    )
    for place in places:
        if place.is_file():
            return os.fspath(place)
    raise ConfigError(f"there is no {' and no '.join(map(str, places))}; give --train=FILE")
