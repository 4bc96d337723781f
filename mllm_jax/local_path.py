"""Paths as users type them."""

import os
import re
from collections.abc import Iterable

STORAGE = re.compile(r"(gs|s3|az|abfss?|hdfs)://")
NOT_SUPPORTED = "is object storage, which is not supported: give a local folder (or a mounted bucket)"


def local_path(text: str) -> str:
    """A path with `~` expanded; an empty one stays empty.

    Raises:
      ValueError: object storage, as in "gs://bucket/run".
    """
    if STORAGE.match(text):
        raise ValueError(f"{text} {NOT_SUPPORTED}")
    return os.path.expanduser(text)


def local_arguments(arguments: Iterable[str]) -> list[str]:
    """Command-line arguments with `~` expanded, which shells leave alone in `--workdir=~/runs/x`.

    Raises:
      ValueError: object storage; the option is named.
    """
    expanded = []
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        try:
            expanded.append(f"{option}{equals}{local_path(value)}")
        except ValueError as error:
            raise ValueError(f"{option}: {error}" if option else str(error)) from None
    return expanded
