"""Paths as users type them: on this machine, or in a bucket of Google Cloud Storage (`gs://bucket/run`).

A work directory may be either. Prepared data and checkpoints that are read may be in a bucket, too: they are copied to
this machine first (`bucket_copy`). Everything else is on this machine. What takes a path below a work directory takes a
`Path` and uses only what both kinds have: `/`, `name`, `parent`, `exists`, `is_dir`, `is_file`, `iterdir`, `glob`,
`read_bytes` and `unlink`; for the rest there are the functions here, and it writes with `mllm_jax.files`.

Object storage is no file system. A folder exists while there is an object below it; an object appears whole or not at
all, but nothing can be appended to one, and nothing renamed.
"""

import functools
import importlib.util
import os
import pathlib
import re
import shutil
from collections.abc import Collection, Iterable

from etils import epath

Path = pathlib.Path | epath.Path  # what may be below a work directory
STORAGE = re.compile(r"(gs|s3|az|abfss?|wasbs?|hdfs|hf|r2|oci)://")
BUCKET = "gs://"
LOCAL_ONLY = (
    "is object storage, and only a work directory, prepared data and checkpoints may be there: give a local file or "
    "folder (or a mounted bucket)"
)


def fault(text: str, buckets: bool = False) -> str | None:
    """What keeps a path from being one that can be used, in words that follow the path; None if nothing does.

    Args:
      buckets: it may also be in a bucket.
    """
    if not STORAGE.match(text):
        return None
    if not text.startswith(BUCKET):
        return (
            f"is object storage that is not supported: a work directory may be on {BUCKET}; give a local folder (or a "
            "mounted bucket)"
        )
    if not buckets:
        return LOCAL_ONLY
    if not text.removeprefix(BUCKET).strip("/"):
        return "names no bucket; write gs://BUCKET/FOLDER"
    if importlib.util.find_spec("gcsfs") is None:
        return "is in a bucket, which takes a package that is not installed: pip install 'mllm-jax[gcs]'"
    return None


def local_path(text: str, buckets: bool = False) -> str:
    """A path with `~` expanded; an empty one stays empty.

    Args:
      buckets: one in a bucket stays as it is.

    Raises:
      ValueError: object storage, as in "gs://bucket/run".
    """
    if problem := fault(text, buckets):
        raise ValueError(f"{text} {problem}")
    return os.path.expanduser(text)


def as_path(path: str | os.PathLike[str]) -> Path:
    """A path on this machine or in a bucket.

    Raises:
      ValueError: object storage other than gs://, or what gs:// needs is not installed.

    Example:
      >>> as_path("runs/quickstart"), as_path("gs://bucket/run") / "eval"
      (PosixPath('runs/quickstart'), PosixGPath('gs://bucket/run/eval'))
    """
    if isinstance(path, pathlib.Path | epath.Path):
        return path
    text = local_path(os.fspath(path), buckets=True)
    if not text.startswith(BUCKET):
        return pathlib.Path(text)
    _prepare()
    return epath.Path(text)


def is_bucket(path: Path) -> bool:
    """Whether a path is in a bucket."""
    return not isinstance(path, pathlib.Path)


def absolute(path: Path) -> Path:
    """The path from the root; links stay as they are."""
    return path if is_bucket(path) else path.absolute()


def resolve(path: Path) -> Path:
    """The path from the root, with links followed."""
    return path if is_bucket(path) else path.resolve()


def make_folder(path: Path) -> None:
    """Makes a folder and those above it, where they are not there; in a bucket there is nothing to make.

    Raises:
      FileExistsError: it is a file.
    """
    if not is_bucket(path):
        try:
            path.mkdir(parents=True, exist_ok=True)
        except FileExistsError:
            raise FileExistsError(f"{path} is a file; give a folder") from None


def remove_folder(path: Path) -> None:
    """Removes a folder with everything in it."""
    if is_bucket(path):
        path.rmtree()
    else:
        shutil.rmtree(path)


def size(path: Path) -> int:
    """Bytes of a file.

    Raises:
      OSError: there is none.
    """
    status = path.stat()
    return status.length if is_bucket(path) else status.st_size


def modified(path: Path) -> float:
    """When a file was last written, in seconds since the epoch.

    Raises:
      OSError: there is none.
    """
    status = path.stat()
    return status.mtime if is_bucket(path) else status.st_mtime


def read_text(path: Path, errors: str = "strict") -> str:
    """The text of a UTF-8 file, without its byte order mark.

    Raises:
      OSError: there is none.
      UnicodeDecodeError: another encoding.
    """
    return path.read_bytes().decode("utf-8-sig", errors)


@functools.cache
def _prepare() -> None:
    """Makes `epath` reach buckets without TensorFlow, and see at once what other machines write there."""
    os.environ.setdefault("EPATH_USE_TF", "false")
    import fsspec.config

    fsspec.config.conf.setdefault("gcs", {}).setdefault("use_listings_cache", False)


def expand_arguments(arguments: Iterable[str], buckets: Collection[str] = ()) -> list[str]:
    """Command-line arguments with `~` expanded, which shells leave alone in `--workdir=~/runs/x`.

    Args:
      buckets: options that take gs:// too, without dashes; "" for those without an option.

    Raises:
      ValueError: object storage where it cannot be used; the option is named.
    """
    expanded = []
    before = ""
    for argument in arguments:
        option, equals, value = argument.partition("=") if argument.startswith("-") else ("", "", argument)
        # `--workdir gs://bucket/run`, in two arguments
        named = option or (before if before.startswith("-") and "=" not in before else "")
        before = argument
        try:
            value = local_path(value, named.lstrip("-") in buckets)
        except ValueError as error:
            raise ValueError(f"{named}: {error}" if named else str(error)) from None
        expanded.append(f"{option}{equals}{value}")
    return expanded
