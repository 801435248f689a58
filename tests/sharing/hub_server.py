"""A small Hub on loopback: the HTTP calls of huggingface_hub that push a model and load it, and faults when asked."""

import base64
import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "a-token-of-nobody"
LFS_SUFFIXES = (".safetensors",)


class Hub(ThreadingHTTPServer):
    """Everything that it was given, and what goes wrong.

    Attributes:
        repos: name -> {"private": bool, "commits": [{file name: content}, ...]}, the newest commit last.
        blobs: sha256 -> content, of large files that were put, whether or not a commit names them yet.
        faults: [method, part of the path, fault, times left]; a fault is a status, "reset" (the connection ends before
            an answer), "truncate" (half of a body is read, or sent, and the connection ends) or "stall" (no answer).
        requests: "METHOD /path" of each, in order.
    """

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.repos: dict[str, dict[str, Any]] = {}
        self.blobs: dict[str, bytes] = {}
        self.faults: list[list[Any]] = []
        self.requests: list[str] = []
        self.over = threading.Event()

    def fault(self, method: str, path: str) -> int | str:
        for entry in self.faults:
            if entry[0] == method and entry[1] in path and entry[3] > 0:
                entry[3] -= 1
                return entry[2]
        return ""

    def handle_error(self, request, client_address):
        pass  # a client that went away is what the tests are about


@contextmanager
def serving() -> Iterator[Hub]:
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.over.set()
            hub.shutdown()
            thread.join()


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub

    def log_message(self, *args):
        pass

    def do_GET(self):
        self.handle_call()

    do_HEAD = do_POST = do_PUT = do_GET

    def handle_call(self) -> None:
        path = unquote(urlsplit(self.path).path)
        self.server.requests.append(f"{self.command} {path}")
        fault = self.server.fault(self.command, path)
        if fault == "stall":
            self.server.over.wait()
        if fault in ("stall", "reset") or (fault == "truncate" and self.command == "PUT"):
            if fault == "truncate":
                self.rfile.read(100)
            self.close_connection = True
            return
        body = self.body()
        if isinstance(fault, int):
            self.answer({"error": "as the test wants it"}, fault)
        elif path.startswith("/blobs/"):
            self.blob(path.split("/")[2], body)  # a signed URL: without a token
        elif self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.answer({"error": "Invalid username or password."}, 401)
        elif path.startswith("/api/"):
            self.api(path.removeprefix("/api/"), body)
        elif path.endswith(".git/info/lfs/objects/batch"):
            self.answer({"transfer": "basic", "objects": [self.instruct(o) for o in json.loads(body)["objects"]]})
        else:
            self.resolve(path, fault == "truncate")

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def api(self, call: str, body: bytes) -> None:
        if call == "whoami-v2":
            self.answer({"type": "user", "name": "me", "auth": {"accessToken": {"role": "write"}}})
        elif call == "validate-yaml":
            self.answer({"errors": [], "warnings": []})
        elif call == "repos/create":
            self.create(json.loads(body))
        else:
            _, user, name, *rest = call.split("/")
            self.of_repository(f"{user}/{name}", rest, body)

    def create(self, wanted: dict[str, Any]) -> None:
        name = f"{wanted['organization']}/{wanted['name']}"
        answer = {"url": f"{self.server.url}/{name}", "name": name}
        if name in self.server.repos:
            self.answer(answer, 409)
            return
        is_private = wanted.get("visibility") == "private" or wanted.get("private") is True
        self.server.repos[name] = {"private": is_private, "commits": [{}]}
        self.answer(answer)

    def of_repository(self, name: str, rest: list[str], body: bytes) -> None:
        repo = self.server.repos.get(name)
        if repo is None:
            self.missing("RepoNotFound")
            return
        files = repo["commits"][-1]
        if not rest or rest[0] == "revision":
            siblings = [{"rfilename": file} for file in files]
            self.answer({"id": name, "private": repo["private"], "sha": commit_id(repo), "siblings": siblings})
        elif rest[0] == "tree":
            if len(rest) > 2 and not any(file.startswith("/".join(rest[2:]) + "/") for file in files):
                self.missing("EntryNotFound")
            else:
                entries = [(file, len(data), hashlib.sha1(data).hexdigest()) for file, data in files.items()]
                self.answer([{"type": "file", "path": f, "size": size, "oid": oid} for f, size, oid in entries])
        elif rest[0] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            modes = {path: "lfs" if path.endswith(LFS_SUFFIXES) else "regular" for path in paths}
            self.answer({"files": [{"path": p, "uploadMode": m, "shouldIgnore": False} for p, m in modes.items()]})
        elif rest[0] == "commit":
            self.commit(name, repo, [json.loads(line) for line in body.splitlines()])
        else:
            self.missing("EntryNotFound")

    def commit(self, name: str, repo: dict[str, Any], lines: list[dict[str, Any]]) -> None:
        files = dict(repo["commits"][-1])
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                if value["oid"] not in self.server.blobs:
                    self.answer({"error": "this object was never put"}, 400)
                    return
                files[value["path"]] = self.server.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        repo["commits"].append(files)
        self.answer({"commitUrl": f"{self.server.url}/{name}/commit/{commit_id(repo)}", "commitOid": commit_id(repo)})

    def instruct(self, wanted: dict[str, Any]) -> dict[str, Any]:
        if wanted["oid"] in self.server.blobs:
            return wanted
        return wanted | {"actions": {"upload": {"href": f"{self.server.url}/blobs/{wanted['oid']}"}}}

    def blob(self, oid: str, body: bytes) -> None:
        if hashlib.sha256(body).hexdigest() != oid:
            self.answer({"error": "other content than was announced"}, 400)
            return
        self.server.blobs[oid] = body
        self.answer({})

    def resolve(self, path: str, truncated: bool) -> None:
        """/me/x/resolve/main/config.json, whole or from the byte on that a Range names."""
        _, user, name, _, _, file = path.split("/", 5)
        repo = self.server.repos.get(f"{user}/{name}")
        if repo is None or file not in repo["commits"][-1]:
            self.missing("RepoNotFound" if repo is None else "EntryNotFound")
            return
        data = repo["commits"][-1][file]
        headers = {"X-Repo-Commit": commit_id(repo), "ETag": f'"{hashlib.sha256(data).hexdigest()}"'}
        status = 200
        if wanted := self.headers.get("Range"):
            start = int(wanted.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
            data, status = data[start:], 206
        self.send(data, status, headers, truncated)

    def missing(self, code: str) -> None:
        self.send(b"{}", 404, {"X-Error-Code": code, "Content-Type": "application/json"})

    def answer(self, content: Any, status: int = 200) -> None:
        self.send(json.dumps(content).encode(), status, {"Content-Type": "application/json"})

    def send(self, data: bytes, status: int, headers: dict[str, str], truncated: bool = False) -> None:
        self.send_response(status)
        for name, value in (headers | {"Content-Length": str(len(data))}).items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data[: len(data) // 2] if truncated else data)
        self.close_connection = self.close_connection or truncated


def commit_id(repo: dict[str, Any]) -> str:
    return f"{len(repo['commits']):040x}"
