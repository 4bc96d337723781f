"""A folder in a bucket, copied to this machine: what is read at random or mapped into memory has to be a file here.

Prepared data and checkpoints are copied once for each host. Later starts, and other processes of the host, look for
what has changed in the bucket and copy that; a copy that was stopped goes on with the files that it lacks.
"""

import functools
import json
import os
import pathlib
import shutil
import threading
import time
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any

from mllm_jax.console import make_console, progress_bar, say, size_text
from mllm_jax.files import is_temporary
from mllm_jax.line_file import LineFile, whole_lines
from mllm_jax.storage import BUCKET, Path

NOTES = ".copied.jsonl"  # which generation of an object each file is a copy of
THREADS = 16


def home() -> pathlib.Path:
    """Where copies are kept: `buckets` in the user's cache."""
    return pathlib.Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "mllm_jax" / "buckets"


@functools.cache
def local_copy(path: Path) -> pathlib.Path:
    """The copy of a folder, or a file, in a bucket, made now or brought up to date; once in a process.

    What is there besides (feature caches, sizes) stays.

    Raises:
      FileNotFoundError: there is nothing of that name.
      ValueError: an object whose name leads out of the folder.
      OSError: there is no room, or the bucket cannot be read.
    """
    import fsspec
    from filelock import FileLock

    bucket = fsspec.filesystem("gcs")
    name = str(path).removeprefix(BUCKET).strip("/")
    found = bucket.find(name, detail=True)
    alone = set(found) == {name}
    root = name.rpartition("/")[0] if alone else name
    objects = {each.removeprefix(f"{root}/"): info for each, info in found.items() if not each.endswith("/")}
    if not objects:
        raise FileNotFoundError(f"{path} holds nothing; check the name of bucket and folder")
    if outside := next((each for each in objects if _leads_out(each)), None):
        raise ValueError(f"{path} holds {outside!r}, whose name leads out of the folder")
    folder = home() / root
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(f"{folder}.lock"), LineFile(folder / NOTES) as notes:
        have = _noted(folder)
        lacking = {each: info for each, info in objects.items() if not _is_there(folder, each, info, have)}
        if lacking:
            _copy(bucket, f"{BUCKET}{root}", folder, lacking, notes)
        for each in () if alone else have.keys() - objects.keys():  # gone from the bucket
            (folder / each).unlink(missing_ok=True)
    return home() / name


def _leads_out(name: str) -> bool:
    parts = name.split("/")
    return "" in parts or "." in parts or ".." in parts or "\0" in name or parts[0] == NOTES


def _noted(folder: pathlib.Path) -> dict[str, str]:
    notes = (json.loads(line) for line in whole_lines(folder / NOTES, repair=True).splitlines())
    return {note["name"]: note["generation"] for note in notes}


def _is_there(folder: pathlib.Path, name: str, info: dict[str, Any], have: dict[str, str]) -> bool:
    file = folder / name
    return (
        have.get(name) == str(info["generation"])
        and file.is_file()
        and file.stat().st_size == int(info["size"])
    )


def _copy(
    bucket: Any, root: str, folder: pathlib.Path, objects: dict[str, dict[str, Any]], notes: LineFile
) -> None:
    total, begin, console = (
        sum(int(info["size"]) for info in objects.values()),
        time.monotonic(),
        make_console(),
    )
    if (free := shutil.disk_usage(folder).free) < total:
        raise OSError(
            f"{root} needs {size_text(total)} in {folder}, where {size_text(free)} are free; make room, set "
            "XDG_CACHE_HOME to a larger disk, or copy it yourself and give that folder"
        )
    say(console, f"{root}: copying {len(objects):,} files, {size_text(total)}, to {folder}")
    for file in folder.rglob(".*.part"):  # of a copy that was stopped; the lock is held
        if is_temporary(file):
            file.unlink()
    noting = threading.Lock()

    def copy(name: str) -> int:
        file, info = folder / name, objects[name]
        file.parent.mkdir(parents=True, exist_ok=True)
        part = file.with_name(f".{file.name}.{0:016x}.part")
        bucket.get_file(f"{root}/{name}", str(part))
        if (size := part.stat().st_size) != int(info["size"]):
            raise OSError(f"{root}/{name} changed while it was copied; start again")
        os.replace(part, file)
        with noting:
            notes.append(json.dumps({"name": name, "generation": str(info["generation"])}))
        return size

    with progress_bar(console) as progress, ThreadPoolExecutor(THREADS) as pool:
        task = progress.add_task(f"{root}, MB", total=-(-total // 10**6))
        copied = 0
        futures = [pool.submit(copy, name) for name in objects]
        try:
            for future in as_completed(futures):
                copied += future.result()
                progress.update(task, completed=-(-copied // 10**6))
        finally:  # after an error, what has not begun is not waited for
            for future in futures:
                future.cancel()
    seconds = time.monotonic() - begin
    say(console, f"{root}: copied in {seconds:.0f} s, {size_text(total / max(seconds, 1e-3))}/s")
