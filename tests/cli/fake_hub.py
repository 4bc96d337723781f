"""What `huggingface_hub` asks a hub for when it uploads: repositories that are made and committed to, in memory."""

import base64
import contextlib
import hashlib
import http.server
import json
import re
import threading


class Hub(http.server.ThreadingHTTPServer):
    """Repositories in memory.

    Attributes:
      private: repository -> whether it is private.
      commits: (repository, branch, message, {path: content}).
      branches: (repository, branch) that were made.
    """

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.private, self.commits, self.branches, self.blobs = {}, [], [], {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"


class Handler(http.server.BaseHTTPRequestHandler):
    """The endpoints."""

    def do_GET(self):
        asked = re.fullmatch(r"/api/models/([^/]+/[^/]+)", self.path)
        if asked:
            self._send({"id": asked[1], "private": self.server.private[asked[1]]})
        else:
            self._send({"error": self.path}, 404)

    def do_PUT(self):
        content = self._body()
        self.server.blobs[hashlib.sha256(content).hexdigest()] = content
        self._send({})

    def do_POST(self):
        body, path, hub = self._body(), self.path.split("?")[0], self.server
        if self.headers.get("Authorization") != "Bearer hf_right" and "/objects/" not in path:
            self._send({"error": "no such token"}, 401)
        elif path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            known = name in hub.private
            hub.private.setdefault(name, asked.get("visibility") == "private" or bool(asked.get("private")))
            self._send({"url": f"{hub.url}/{name}", "id": name}, 409 if known else 200)
        elif path == "/api/validate-yaml":
            assert "pipeline_tag" in json.loads(body)["content"]
            self._send({"errors": [], "warnings": []})
        elif "/preupload/" in path:
            files = json.loads(body)["files"]
            modes = ["lfs" if each["path"].endswith(".safetensors") else "regular" for each in files]
            told = [
                {"path": each["path"], "uploadMode": mode, "shouldIgnore": False}
                for each, mode in zip(files, modes, strict=True)
            ]
            self._send({"files": told})
        elif path.endswith("/info/lfs/objects/batch"):
            objects = json.loads(body)["objects"]
            actions = {"upload": {"href": f"{hub.url}/blob"}}
            self._send({"transfer": "basic", "objects": [{**each, "actions": actions} for each in objects]})
        elif "/branch/" in path:
            hub.branches.append(tuple(path.removeprefix("/api/models/").split("/branch/")))
            self._send({})
        elif "/commit/" in path:
            repository, branch = path.removeprefix("/api/models/").split("/commit/")
            header, *rows = [json.loads(line) for line in body.splitlines()]
            files = {}
            for row in rows:
                value = row["value"]
                content = (
                    hub.blobs[value["oid"]] if row["key"] == "lfsFile" else base64.b64decode(value["content"])
                )
                files[value["path"]] = content
            hub.commits.append((repository, branch, header["value"]["summary"], files))
            self._send(
                {"commitUrl": f"{hub.url}/{repository}/commit/abc", "commitOid": "abc", "hookOutput": ""}
            )
        else:
            self._send({"error": path}, 404)

    def _body(self):
        if self.headers.get("Transfer-Encoding") == "chunked":
            parts = iter(lambda: self.rfile.read(int(self.rfile.readline(), 16) + 2)[:-2], b"")
            return b"".join(parts)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _send(self, value, status=200):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_):
        pass


@contextlib.contextmanager
def serving():
    """A hub that answers while inside."""
    with Hub() as hub:
        threading.Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
