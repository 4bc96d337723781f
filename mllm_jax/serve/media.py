"""Images and videos as requests give them: data URIs and, where allowed, files of one folder or of named hosts."""

import base64
import binascii
import dataclasses
import http.client
import os
import re
import stat
import time
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

from mllm_jax.serve.errors import ApiError

_DATA = re.compile(r"data:([-\w.+]+/[-\w.+]+)?(?:;[-\w]+=[-\w.]+)*;base64,", re.ASCII)
_WAIT = 10  # seconds that a host may be silent
_PIECE = 1 << 16
_MOST_FRAMES = 4096  # of a video that is given as its frames


@dataclasses.dataclass(frozen=True)
class Media:
    """Where images and videos may come from.

    Attributes:
      folder: files below it may be named as `file:NAME`; None = none.
      hosts: from which files may be fetched; () = nothing is ever fetched.
      most_bytes: of a file.
      seconds: that fetching a file may take.
    """

    folder: Path | None = None
    hosts: tuple[str, ...] = ()
    most_bytes: int = 20 << 20
    seconds: float | int = 30

    def read(self, url: str, param: str) -> bytes | tuple[bytes, ...]:
        """The file that a URL holds or names; of a video given as its frames (`data:video/jpeg`), those of all.

        Args:
          param: the field of the request, for messages.

        Raises:
          ApiError: 400; it cannot be read, or may not be.
        """
        scheme = url.split(":", 1)[0].lower() if ":" in url[:16] else ""
        match scheme:
            case "data":
                return _data(url, param)
            case "file":
                return self._file(url, param)
            case "http" | "https":
                return self._fetched(url, param)
        raise _refused(
            f"{url[:40]!r} is no data URI (data:image/png;base64,...){' or file:NAME' * bool(self.folder)}",
            param,
        )

    def _file(self, url: str, param: str) -> bytes:
        if self.folder is None:
            raise _refused("this server reads no local files; send a data URI", param)
        parts = urllib.parse.urlsplit(url)
        name = urllib.parse.unquote(parts.path)
        folder = self.folder.resolve()
        try:
            if parts.netloc not in ("", "localhost") or "\0" in name or parts.query or parts.fragment:
                raise ValueError
            path = (folder / name).resolve(strict=True)
            if not path.is_relative_to(folder):
                raise ValueError
            # Without waiting (a pipe has no end) and without following a link that was put there since.
            flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_NOFOLLOW", 0)
            with open(os.open(path, flags), "rb") as file:
                if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                    raise ValueError
                return self._limited(file.read(self.most_bytes + 1), param)
        except (OSError, ValueError, RuntimeError):  # whatever is outside looks as if it were not there
            raise _refused(f"there is no file {name[:200]!r} in the server's media folder", param) from None

    def _fetched(self, url: str, param: str) -> bytes:
        try:
            host = (urllib.parse.urlsplit(url).hostname or "").lower()
        except ValueError:
            host = ""
        if host not in self.hosts:
            from_where = f"only from {', '.join(self.hosts)}" if self.hosts else "nothing"
            raise _refused(f"this server fetches {from_where}; send the file as a data URI", param)
        deadline, data = time.monotonic() + self.seconds, b""
        try:
            with _OPENER.open(url, timeout=_WAIT) as answer:
                while piece := answer.read1(_PIECE):
                    data += piece
                    if len(data) > self.most_bytes or time.monotonic() > deadline:
                        break
                else:
                    return data
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise _refused(f"{host} does not give the file: {error}", param) from None
        raise _refused(f"the file has more than {self.most_bytes:,} bytes or takes too long", param)

    def _limited(self, data: bytes, param: str) -> bytes:
        if len(data) > self.most_bytes:
            raise _refused(f"the file has more than {self.most_bytes:,} bytes", param)
        return data


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """A redirect may lead to another host: it is an error."""

    def redirect_request(self, *args: Any) -> None:
        return None


# Without proxies of the environment, and for HTTP alone: urllib would open ftp and file, too.
_OPENER = urllib.request.OpenerDirector()
for _handler in (
    urllib.request.HTTPHandler,
    urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler,
    urllib.request.HTTPErrorProcessor,
    _NoRedirect,
):
    _OPENER.add_handler(_handler())


def _data(url: str, param: str) -> bytes | tuple[bytes, ...]:
    head = _DATA.match(url[:256])
    if head is None:
        raise _refused("a data URI begins with data:image/png;base64, or the like", param)
    frames = head[1] == "video/jpeg"
    pieces = url[head.end() :].split(",", _MOST_FRAMES) if frames else [url[head.end() :]]
    if len(pieces) > _MOST_FRAMES:
        raise _refused(f"the video has more than {_MOST_FRAMES} frames; leave some out", param)
    try:
        files = tuple(base64.b64decode(piece, validate=True) for piece in pieces)
    except (binascii.Error, ValueError) as error:
        raise _refused(f"the data URI is not base64: {error}", param) from None
    if not all(files):
        raise _refused("the data URI holds no file", param)
    return files if frames else files[0]


def _refused(message: str, param: str) -> ApiError:
    return ApiError(400, f"{param}: {message}", param=param, code="invalid_media")
