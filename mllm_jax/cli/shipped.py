"""The scripts and recipes that come with the library, in a checkout or in an installed wheel.

    mllm-jax train --config=quickstart --workdir=runs/quickstart
    mllm-jax eval --workdir=runs/quickstart

are train.py and eval.py themselves, run from where they are; the arguments are theirs. A recipe is a file or, where
there is no such file, the name of a shipped one, with its argument: `--config=quickstart:dci`.
"""

import importlib.metadata
import os
import pathlib
import re
import subprocess
import sys

PLACE = "mllm_jax"  # below share/ in a wheel, as pyproject.toml has it
HELP = {"-h", "--help", "--helpfull", "--helpshort"}


def home() -> pathlib.Path:
    """The folder that holds train.py, eval.py and configs/.

    Raises:
      FileNotFoundError: the package was copied somewhere without them.
    """
    checkout = pathlib.Path(__file__).parents[2]
    if (checkout / "train.py").is_file():
        return checkout
    try:
        files = importlib.metadata.files("mllm-jax") or ()
    except importlib.metadata.PackageNotFoundError:
        files = ()
    for file in files:
        if file.parts[-2:] == (PLACE, "train.py"):
            return pathlib.Path(file.locate()).resolve().parent
    raise FileNotFoundError("train.py, eval.py and configs/ are not here; install mllm-jax again")


def recipe(given: str) -> str:
    """`NAME` or `NAME:ARGUMENT` of a shipped recipe as `FILE.py` or `FILE.py:ARGUMENT`; anything else as it is."""
    name, colon, argument = given.partition(":")
    if re.fullmatch(r"\w+", name) and not pathlib.Path(name).is_file():
        file = home() / "configs" / f"{name}.py"
        if file.is_file():
            return f"{file}{colon}{argument}"
    return given


def names() -> list[str]:
    """Names of the shipped recipes."""
    return sorted(file.stem for file in (home() / "configs").glob("*.py"))


def run(script: str, arguments: list[str]) -> int:
    """Becomes `python SCRIPT ARGUMENTS`, so that signals and restarts are the script's; only its help comes back."""
    command = [sys.executable, str(home() / script), *arguments]
    sys.stdout.flush()
    if HELP & set(arguments):
        return subprocess.call(command)
    os.execv(sys.executable, command)
