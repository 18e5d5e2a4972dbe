"""A local Hugging Face Hub with as much of its HTTP interface as an upload and a download of a model need.

It keeps repositories in a folder, takes small files within the commit and large ones by git LFS, as the Hub
does for files with weights, and only answers clients that send its token.
"""

import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

TOKEN = "hf_abcdefghijklmnopqrstuvwxyzABCDEF"


class Hub(BaseHTTPRequestHandler):
    root: Path
    private: dict[str, bool]  # of the repositories that were created
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def answer(self, status: int, body: object = None, **headers: str) -> None:
        data = body if isinstance(body, bytes) else json.dumps(body).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def refused(self) -> bool:
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return False
        self.answer(401, {"error": "Invalid credentials in Authorization header"})
        return True

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers["Content-Length"]))

    @property
    def address(self) -> str:
        host, port = self.server.server_address[:2]
        return f"http://{host!s}:{port}"

    def folder(self, repository: str) -> Path:
        return self.root / repository

    def sha(self, repository: str) -> str:
        files = sorted(self.folder(repository).iterdir())
        return hashlib.sha1(b"".join(file.name.encode() + file.read_bytes() for file in files)).hexdigest()

    def do_POST(self) -> None:
        data = self.body()
        if self.refused():
            return
        parts = self.path.strip("/").split("/")
        if self.path == "/api/repos/create":
            asked = json.loads(data)
            name = f"{asked.get('organization') or 'someone'}/{asked['name']}"
            if name.startswith("others/"):
                return self.answer(403, {"error": "You don't have the rights to create a model there"})
            if name in self.private:
                return self.answer(409, {"error": "exists", "url": f"{self.address}/{name}"})
            self.private[name] = asked.get("private") is True or asked.get("visibility") == "private"
            self.folder(name).mkdir(parents=True)
            return self.answer(200, {"url": f"{self.address}/{name}"})
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if parts[-2] == "preupload":
            files = json.loads(data)["files"]
            modes = {True: "lfs", False: "regular"}
            said = [
                {"path": f["path"], "uploadMode": modes[f["path"].endswith("safetensors")],
                 "shouldIgnore": False, "oid": None}
                for f in files
            ]  # fmt: skip
            return self.answer(200, {"files": said})
        if parts[-1] == "batch":  # git LFS asks where to upload each object
            objects = [
                {"oid": o["oid"], "size": o["size"], "authenticated": True,
                 "actions": {"upload": {"href": f"{self.address}/objects/{o['oid']}"}}}
                for o in json.loads(data)["objects"]
            ]  # fmt: skip
            return self.answer(200, {"transfer": "basic", "objects": objects})
        assert parts[-2] == "commit", self.path
        name = "/".join(parts[2:4])
        for line in data.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                (self.folder(name) / value["path"]).write_bytes(base64.b64decode(value["content"]))
            if entry["key"] == "lfsFile":
                stored = self.root / "objects" / value["oid"]
                (self.folder(name) / value["path"]).write_bytes(stored.read_bytes())
        sha = self.sha(name)
        self.answer(
            200, {"success": True, "commitOid": sha, "commitUrl": f"{self.address}/{name}/commit/{sha}"}
        )

    def do_PUT(self) -> None:
        data, oid = self.body(), self.path.rsplit("/", 1)[1]
        assert hashlib.sha256(data).hexdigest() == oid
        (self.root / "objects").mkdir(exist_ok=True)
        (self.root / "objects" / oid).write_bytes(data)
        self.answer(200)

    def do_GET(self) -> None:
        if self.refused():
            return
        if self.path == "/api/whoami-v2":
            return self.answer(200, {"type": "user", "name": "someone", "auth": {"type": "access_token"}})
        parts = unquote(self.path.partition("?")[0]).strip("/").split("/")
        name = "/".join(parts[2:4]) if parts[0] == "api" else "/".join(parts[:2])
        if not self.folder(name).is_dir() or not any(self.folder(name).iterdir()):
            return self.answer(404, {"error": "Repository not found"}, X_Error_Code="RepoNotFound")
        files = sorted(self.folder(name).iterdir())
        if parts[0] == "api" and "tree" in parts:
            return self.answer(
                200,
                [{"type": "file", "path": f.name, "size": f.stat().st_size, "oid": "0" * 40} for f in files],
            )
        if parts[0] == "api":
            about = {"id": name, "sha": self.sha(name), "private": self.private[name], "tags": []}
            return self.answer(200, about | {"siblings": [{"rfilename": file.name} for file in files]})
        assert parts[2] == "resolve", self.path
        data = (self.folder(name) / parts[4]).read_bytes()
        tag = hashlib.sha256(data).hexdigest()
        self.answer(200, data, ETag=f'"{tag}"', X_Repo_Commit=self.sha(name))

    do_HEAD = do_GET


@contextmanager
def hub(root: Path):
    """Run the hub and yield (its address, whether each repository is private)."""
    kind = type("Here", (Hub,), {"root": root, "private": {}})
    server = ThreadingHTTPServer(("127.0.0.1", 0), kind)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", kind.private
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
