"""A model hub on loopback: the few calls that make, fill and read a repository, each as the real one answers
them."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(ThreadingHTTPServer):
    """repos: files by name, by repository; commits: the messages of what was pushed; token: what writers must
    carry; large: contents that came by Git LFS, as the hub wants those of .safetensors files, by SHA-256."""

    daemon_threads = True

    def __init__(self, token: str = "hf_secret") -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repos: dict[str, dict[str, bytes]] = {}
        self.commits: list[str] = []
        self.large: dict[str, bytes] = {}
        self.token = token

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class _Handler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def _answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _json(self, value: object, status: int = 200) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json")

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if self.headers.get("Authorization") != f"Bearer {self.server.token}":
            return self._answer(401, b"{}", X_Error_Message="Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked.get('organization') or 'me'}/{asked['name']}"
            self.server.repos.setdefault(name, {})
            return self._json({"url": f"{self.server.url}/{name}"})
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.server.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        kind, owner, repo, action = path.removeprefix("/api/").split("/")[:4]
        name = f"{owner}/{repo}"
        if kind == "models" and action == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(".safetensors") else "regular" for path in paths}
            files = [
                {"path": path, "uploadMode": mode, "shouldIgnore": False} for path, mode in modes.items()
            ]
            return self._json({"files": files})
        if kind == "models" and action == "commit":
            for line in body.decode().splitlines():
                part = json.loads(line)
                if part["key"] == "header":
                    self.server.commits.append(part["value"]["summary"])
                if part["key"] == "file":
                    content = base64.b64decode(part["value"]["content"])
                    self.server.repos[name][part["value"]["path"]] = content
                if part["key"] == "lfsFile":
                    content = self.server.large[part["value"]["oid"]]
                    self.server.repos[name][part["value"]["path"]] = content
            return self._json(
                {
                    "success": True,
                    "commitOid": COMMIT,
                    "commitUrl": f"{self.server.url}/{name}/commit/{COMMIT}",
                }
            )
        return self._answer(404)

    def do_PUT(self) -> None:
        content = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.path == f"/lfs/{hashlib.sha256(content).hexdigest()}"
        self.server.large[self.path.removeprefix("/lfs/")] = content
        self._answer(200)

    def do_GET(self) -> None:
        parts = unquote(self.path.split("?")[0]).strip("/").split("/")
        if parts[:2] == ["api", "models"]:
            return self._repo_info("/".join(parts[2:4]))
        name, file = "/".join(parts[:2]), "/".join(parts[4:])
        if name not in self.server.repos or parts[2:3] != ["resolve"]:
            return self._answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        if parts[3] not in ("main", COMMIT):
            return self._answer(404, X_Error_Code="RevisionNotFound", X_Error_Message="Invalid rev id")
        if file not in self.server.repos[name]:
            return self._answer(404, X_Error_Code="EntryNotFound", X_Error_Message="Entry not found")
        content = self.server.repos[name][file]
        etag = f'"{hashlib.sha1(content).hexdigest()}"'
        return self._answer(200, content, ETag=etag, X_Repo_Commit=COMMIT)

    do_HEAD = do_GET

    def _repo_info(self, name: str) -> None:
        if name not in self.server.repos:
            return self._answer(404, X_Error_Code="RepoNotFound", X_Error_Message="Repository not found")
        files = [{"rfilename": file} for file in self.server.repos[name]]
        return self._json({"id": name, "sha": COMMIT, "private": False, "tags": [], "siblings": files})


@contextmanager
def serving() -> Iterator[Hub]:
    """A hub that answers until the block ends."""
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
        thread.join()
