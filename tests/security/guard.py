"""Watches what a process does by Python's audit events: code it runs, hosts it asks, files it opens.

Files that C++ or Rust code opens by itself are not seen; the folder outside is compared besides (`Outside`).
"""

import os
import sys
import sysconfig
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
SECRET = "SECRET-4b1d"  # what the files outside hold: it may appear nowhere
_STARTS = (
    "subprocess.Popen",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.system",
    "os.startfile",
    "pty.spawn",
)
_ASKS = ("socket.connect", "socket.getaddrinfo", "socket.sendto", "urllib.Request")
_WRITES = (
    "os.chmod",
    "os.link",
    "os.mkdir",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.symlink",
    "os.truncate",
)
_TEMPLATES = str(ROOT / "mllm_jax" / "data" / "template_worker.py")  # the one program that a reader starts
_SYSTEM = (
    "/proc/",
    "/sys/",
    "/dev/",
    "/lib",
    "/usr/lib",
    "/usr/share",
    "/usr/local/lib",
    "/etc/localtime",
    "/etc/fonts",
)


class Guard:
    """What happened while `watching`.

    Attributes:
      inside: the folder that may be read and written.
      found: what must not happen, in words.
    """

    def __init__(self, inside: Path) -> None:
        self.inside = os.path.realpath(inside)
        self.found: list[str] = []
        self.watching = False
        self._busy = threading.local()
        places = [*sysconfig.get_paths().values(), sys.prefix, sys.base_prefix, str(ROOT), *sys.path]
        self._readable = tuple(os.path.realpath(place) for place in places if place and place != self.inside)
        sys.addaudithook(self._hook)

    def _hook(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.watching or getattr(self._busy, "now", False):
            return
        self._busy.now = True  # asking for real paths is no event, but a message may be
        try:
            if said := self._fault(event, arguments):
                self.found.append(said)
        finally:
            self._busy.now = False

    def _fault(self, event: str, arguments: Sequence[Any]) -> str:
        if event in _STARTS:
            ours = len(arguments) > 1 and _TEMPLATES in map(str, arguments[1] or ())
            return "" if ours else f"{event} {arguments[:2]!r:.200}"
        if event in _ASKS:
            return f"{event} {arguments!r:.200}"
        if event == "pickle.find_class":
            return f"unpickled {arguments!r:.200}"
        if event == "exec":
            file = getattr(arguments[0], "co_filename", "")
            return f"ran {file}" if os.path.isabs(file) and self._is_below(file, (self.inside,)) else ""
        if event == "open":
            path, mode, flags = arguments
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)) or (
                mode and set("wax+") & set(mode)
            )
            return self._opened(path, bool(writes))
        if event in _WRITES:
            # A path may be relative to a folder that is open already: `shutil.rmtree` looks at those itself.
            paths = [one for one in arguments[:2] if isinstance(one, str | bytes | os.PathLike)]
            return next((said for path in paths if (said := self._changed(path, event))), "")
        return ""

    def _changed(self, path: Any, event: str) -> str:
        name = os.fsdecode(path)
        return f"{event} {name}" if os.path.isabs(name) and not self._is_below(name, (self.inside,)) else ""

    def _opened(self, path: Any, writes: bool) -> str:
        if isinstance(path, int) or path is None:
            return ""
        name = os.fsdecode(path)
        if "\0" in name or self._is_below(name, (self.inside,)) or name == os.devnull:
            return ""
        if writes:
            return f"opened {name} for writing"
        allowed = name.startswith(_SYSTEM) or self._is_below(name, self._readable)
        return "" if allowed else f"opened {name}"

    @staticmethod
    def _is_below(name: str, folders: Sequence[str]) -> bool:
        real = os.path.realpath(name) if "\0" not in name else name
        return any(real == folder or real.startswith(folder + os.sep) for folder in folders)


class Outside:
    """A folder beside the one inside, which holds what an attacker would like to read or replace."""

    def __init__(self, folder: Path, image: bytes) -> None:
        folder.mkdir()
        self.folder = folder
        (folder / "secret.txt").write_text(SECRET)
        (folder / "secret.json").write_text(f'[{{"question_id": 1, "text": "{SECRET}"}}]')
        (folder / "secret.png").write_bytes(image)
        self._state = self._look()

    def _look(self) -> dict[str, Any]:
        return {
            entry.name: (entry.stat().st_mtime_ns, entry.stat().st_size) for entry in os.scandir(self.folder)
        }

    def changed(self) -> str:
        """What was changed outside since the last look."""
        before, self._state = self._state, self._look()
        return "" if before == self._state else f"changed outside: {before} -> {self._state}"
