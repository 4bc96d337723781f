"""The work directory: which configuration it belongs to, who trains in it, and from where and with what changes."""

import contextlib
import json
import os
import pathlib
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
from ml_collections import ConfigDict

from mllm_jax import bucket_lock, files, lock, storage
from mllm_jax.answers_kept import find_conflict
from mllm_jax.bucket_copy import local_copy
from mllm_jax.bucket_lock import BucketLock
from mllm_jax.config import SCHEMA, ConfigError, check, differences, map_paths
from mllm_jax.history import HISTORY, starts
from mllm_jax.line_file import LineFile
from mllm_jax.lock import Lock
from mllm_jax.parallel import processes
from mllm_jax.schema import Key, Named, defaults
from mllm_jax.storage import Path, make_folder

CONFIG, LOCK = "config.json", "lock"
LOGS = (".log", ".out", ".err")  # of schedulers and `tee`
FOREIGN = ("Thumbs.db", "desktop.ini", "lost+found")  # what systems leave besides hidden files
SHOWN = 5  # further keys that an error names


def data_dir(config: ConfigDict, workdir: Path) -> pathlib.Path:
    """Where a run's prepared data are, on this machine: `data.dir`, or `data/` in the work directory.

    What `mllm-jax prepare` wrote and somebody put into a bucket is copied to this machine first.

    Raises:
      ConfigError: neither is on this machine, and data still have to be prepared.
    """
    if config.data.dir.startswith(storage.BUCKET):
        if not config.data.prepared:
            raise ConfigError(
                f"config key 'data.dir' is {config.data.dir}, from where only prepared data are read: run `mllm-jax "
                "prepare` with a local folder, copy that into the bucket and give --config.data.prepared, or give a "
                "local folder here"
            )
        return local_copy(storage.as_path(config.data.dir))
    if config.data.dir:
        return pathlib.Path(config.data.dir)
    if storage.is_bucket(workdir):
        raise ConfigError(
            f"config key 'data.dir' is not set and the work directory is {workdir}: prepared data are read from a "
            "local folder, or copied into one; give --config.data.dir=FOLDER (see docs/operating.md)"
        )
    return workdir / "data"


def saved_config(workdir: Path) -> ConfigDict:
    """The configuration that a work directory was trained with.

    A relative path in it is looked for in the current directory and then in those where the run was started.

    Raises:
      ConfigError: not a work directory, a damaged file, or a key or value in it that this version does not know.
    """
    saved = _read(workdir)
    try:
        config = ConfigDict(_completed(saved, SCHEMA))
        check(config)
    except (
        ValueError,
        TypeError,
        AttributeError,
        RecursionError,
    ) as error:  # ConfigDict takes few names of keys
        raise ConfigError(f"{workdir / CONFIG}: {error}") from error
    bases = _bases(workdir)
    map_paths(config, lambda path, _: _located(path, bases))
    return config


@contextlib.contextmanager
def open_run(workdir: Path, resolved: dict[str, Any]) -> Iterator[Callable[[], None]]:
    """Makes `workdir` belong to this configuration, or checks that it does, and keeps other runs out of it meanwhile.

    The first process writes; all must call this at the same point.

    Yields:
      A function to call before more is written into it: in the first process it raises `LockLostError` if another run
      has taken the directory over meanwhile.

    Raises:
      ConfigError: the directory holds another configuration's run, or something else, or another run is training in
        it now.
    """
    with contextlib.ExitStack() as held:

        def enter() -> Lock | BucketLock | None:
            changed = check_same(workdir, resolved)
            if jax.process_index():
                return None
            make_folder(workdir)
            locked = bucket_lock.locked if storage.is_bucket(workdir) else lock.locked
            taken = held.enter_context(locked(workdir))
            _write(workdir, resolved, changed)
            return taken

        taken = processes.first_then_others(enter, "work directory entered")
        yield taken.check if taken else lambda: None


def check_same(workdir: Path, resolved: dict[str, Any]) -> dict[str, list[Any]]:
    """Checks that a run of this configuration may be begun or continued in `workdir`; writes nothing.

    Returns:
      What differs from the run in it and may: {key: [value before, value now]}.

    Raises:
      ConfigError: it holds another configuration's run, whose most telling key is named, or answers to other questions,
        or something else.
    """
    if not (workdir / CONFIG).exists():
        if found := sorted(entry.name for entry in _content(workdir)):
            raise ConfigError(
                f"{workdir} is not empty ({', '.join(found[:SHOWN])}) and holds no run (no {CONFIG}); choose another "
                "--workdir"
            )
        return {}
    bases = _bases(workdir)
    fixed, changed = [], {}
    for key, node, before, now in differences(_read(workdir), resolved):
        if node is not None and node.resumable:
            changed[key] = [before, now]
        elif not (isinstance(node, Key) and node.path and _same_place(before, now, bases)):
            fixed.append((key, before, now))
    if fixed:
        (key, before, now), *others = fixed
        more = ", ".join(name for name, _, _ in others[:SHOWN]) + (", ..." if len(others) > SHOWN else "")
        raise ConfigError(
            f"{workdir} holds a run with {key} = {before!r}, not {now!r}{f' (also other: {more})' if more else ''}; "
            "choose another --workdir, or go back to that run's configuration to continue it"
        )
    if conflict := find_conflict(workdir, resolved, changed):
        folder, key = conflict
        before, now = changed[key]
        raise ConfigError(
            f"{folder} holds answers given with {key} = {before!r}, not {now!r}; go back to that value, or move the "
            "folder away to have the questions answered again"
        )
    return changed


def _write(workdir: Path, resolved: dict[str, Any], changed: dict[str, list[Any]]) -> None:
    files.remove_stale(workdir)
    if changed or pathlib.Path.cwd() not in _bases(workdir):
        start = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
            "host": socket.gethostname(),
            "process": os.getpid(),
            "directory": str(pathlib.Path.cwd()),
            "changed": changed,
        }
        with LineFile(workdir / HISTORY) as file:
            file.append(json.dumps(start))
    # Last: a start that fails before has changed nothing, and the next one finds the same differences.
    files.write_text(workdir / CONFIG, json.dumps(resolved, indent=1, sort_keys=True))


def _content(workdir: Path) -> Iterator[Path]:
    """What makes a directory one of something else: not a log, nor what systems and a killed start leave behind."""
    for entry in workdir.iterdir() if workdir.exists() else ():
        log = entry.suffix in LOGS and entry.is_file()
        if not (log or entry.name.startswith(".") or entry.name in (LOCK, HISTORY, *FOREIGN)):
            yield entry


def _read(workdir: Path) -> dict[str, Any]:
    path = workdir / CONFIG
    try:
        values = json.loads(storage.read_text(path))
    except FileNotFoundError:
        raise ConfigError(
            f"{workdir} holds no run: {path.name} is missing; give the --workdir of a run of train.py"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ConfigError(
            f"{path} is damaged ({error}); put back the configuration that the run was begun with"
        ) from error
    if not isinstance(values, dict) or "stage_order" not in values:
        raise ConfigError(f"{path} is not that of a run; give the --workdir of a run of train.py")
    return values


def _completed(saved: Any, node: Any) -> Any:
    """Saved values, with the defaults of keys that are newer than the run, and tuples for lists."""
    if isinstance(saved, list):
        return tuple(_completed(item, None) for item in saved)
    if isinstance(node, Key) or not isinstance(saved, dict) or node is None:
        return saved
    if isinstance(node, Named):
        return {name: _completed(entry, node.entry) for name, entry in saved.items()}
    missing = defaults({name: child for name, child in node.items() if name not in saved})
    return {**missing, **{name: _completed(value, node.get(name)) for name, value in saved.items()}}


def _bases(workdir: Path) -> list[pathlib.Path]:
    """The directories where the run was started, the latest first."""
    return list(dict.fromkeys(reversed([start.directory for start in starts(workdir) if start.directory])))


def _located(path: str, bases: Iterable[pathlib.Path]) -> str:
    """A path that exists as it stands or below one of `bases`; as it stands if there is none."""
    if not path or os.path.isabs(path) or os.path.exists(path):
        return path
    return next((str(base / path) for base in bases if (base / path).exists()), path)


def _same_place(before: Any, now: Any, bases: Iterable[pathlib.Path]) -> bool:
    """Whether two different paths, of the run and given now, lead to the same file or folder."""
    if not (isinstance(before, str) and isinstance(now, str)):
        return False
    before = _located(before, bases)
    return os.path.exists(before) and os.path.exists(now) and os.path.samefile(before, now)
