"""A bucket on this machine: the emulator, with the preconditions of Cloud Storage that it leaves out."""

import contextlib
import http.server
import importlib.util
import io
import os
import re
import threading
from functools import partial
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

BUCKET = "bucket"


def start():
    """Starts the emulator with one empty bucket; returns the server and the environment that leads clients to it."""
    for name in ("gcsfs", "gcp_storage_emulator"):
        if importlib.util.find_spec(name) is None:  # importing gcsfs reads the environment
            pytest.skip(f"{name} is not installed")
    from gcp_storage_emulator.exceptions import NotFound
    from gcp_storage_emulator.server import RequestHandler
    from gcp_storage_emulator.storage import Storage

    storage = Storage(use_memory_fs=True)
    storage.create_bucket(BUCKET, {"kind": "storage#bucket", "id": BUCKET, "name": BUCKET})

    class Handler(RequestHandler):
        def do_POST(self):
            if self.holds():
                super().do_POST()

        def do_DELETE(self):
            if self.holds():
                super().do_DELETE()

        def do_GET(self):
            if self.holds():
                super().do_GET()

        def holds(self):
            """Whether the object has the generation that the request expects; answers if not."""
            parts = urlsplit(self.path)
            query = parse_qs(parts.query)
            if "ifGenerationMatch" not in query:
                return True
            body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            self.rfile = io.BytesIO(body)
            if parts.path.endswith("/o"):  # an upload, which names the object itself
                name = (
                    query["name"][0] if "name" in query else re.search(rb'"name": ?"(.*?)"', body)[1].decode()
                )
            else:
                name = unquote(parts.path.rsplit("/o/", 1)[1])
            generation = "0"
            with contextlib.suppress(NotFound):
                generation = storage.get_file_obj(BUCKET, name)["generation"]
            if generation == query["ifGenerationMatch"][0]:
                return True
            self.send_response(412)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return False

        def log_message(self, *_):
            pass

    class Server(http.server.HTTPServer):
        def handle_error(self, *_):  # clients that have seen enough hang up
            pass

    server = Server(("127.0.0.1", 0), partial(Handler, storage))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = f"http://127.0.0.1:{server.server_port}"
    environment = {
        "STORAGE_EMULATOR_HOST": url,
        "TENSORSTORE_GCS_HTTP_URL": url,
        "FSSPEC_GCS_TOKEN": "anon",
        "NO_GCE_CHECK": "true",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # asks Google what kind of bucket it is
    }
    return server, environment


if __name__ == "__main__":
    server, environment = start()
    print(" ".join(f"{name}={value}" for name, value in environment.items()), flush=True)
    with contextlib.suppress(KeyboardInterrupt):
        threading.Event().wait()
    os._exit(0)
