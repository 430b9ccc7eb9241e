"""A stand-in for the Hugging Face Hub: as much of its HTTP interface as the real `huggingface_hub` client asks for.

Not the Hub. No Xet, no redirects to a content network: files are served from memory, with ranges, and every byte of every file
that leaves is counted, so that a test can say what was *not* downloaded. Reading needs no login; uploading
(tests/hub_uploads.py) needs the token TOKEN.
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

import pytest
from hub_uploads import LARGE, Uploads


class HubStandIn(Uploads):
    """Repositories with commits and names for them. `sent[path]` counts bytes, `ranges` lists partial requests."""

    def __init__(self) -> None:
        self.commits: dict[str, dict[str, dict[str, bytes]]] = {}  # repo -> commit -> path -> content
        self.names: dict[str, dict[str, str]] = {}  # repo -> branch or tag -> commit
        self.gated: set[str] = set()
        super().__init__()
        self.sent: Counter[str] = Counter()
        self.ranges: list[str] = []
        self.asked: list[str] = []  # every file whose content was asked for
        self.requests = 0
        self.closed = False
        self.broken: dict[str, int] = {}  # path -> how many more downloads end in the middle
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def push(self, repo: str, folder: Path, *tags: str) -> str:
        """Commit a folder to `main`, and tag it; returns the commit."""
        files = {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        return self.commit(repo, files, *tags)

    def commit(self, repo: str, files: dict[str, bytes], *tags: str) -> str:
        """Make these files the newest commit of a repository; returns its hash, which is of their content."""
        commit = hashlib.sha1(json.dumps({k: hashlib.sha1(v).hexdigest() for k, v in files.items()}).encode()).hexdigest()
        self.commits.setdefault(repo, {})[commit] = files
        self.names.setdefault(repo, {}).update(dict.fromkeys(("main", *tags), commit))
        return commit

    def now(self, repo: str) -> dict[str, bytes]:
        """The files of `main`."""
        return self.commits[repo][self.names[repo]["main"]]

    def close(self) -> None:
        self.closed = True  # also for connections that are kept alive
        self._server.shutdown()
        self._server.server_close()

    def videos_sent(self) -> int:
        """Bytes of videos that left, over all requests."""
        return sum(count for path, count in self.sent.items() if path.endswith(".mp4"))

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_) -> None:
                pass

            def do_HEAD(self) -> None:  # noqa: N802
                self._answer(body=False)

            def do_GET(self) -> None:  # noqa: N802
                self._answer(body=True)

            def do_POST(self) -> None:  # noqa: N802
                self._take("POST")

            def do_PUT(self) -> None:  # noqa: N802
                self._take("PUT")

            def do_DELETE(self) -> None:  # noqa: N802
                self._take("DELETE")

            def _take(self, verb: str) -> None:
                data = self.rfile.read(int(self.headers.get("Content-Length") or 0))
                if hub.closed:
                    self.close_connection = True
                    return
                path = unquote(urlsplit(self.path).path).strip("/")
                with hub._lock:
                    status, value = hub.take(verb, path, self.headers.get("Authorization"), data)
                self._json(value, status)

            def _answer(self, body: bool) -> None:
                if hub.closed:
                    self.close_connection = True
                    return
                with hub._lock:
                    hub.requests += 1
                url = urlsplit(self.path)
                parts = unquote(url.path).strip("/").split("/")
                api = parts[0] == "api"
                # Files of models are at /user/name/resolve/..., of datasets at /datasets/user/name/resolve/...
                first = 2 if api else int(parts[0] == "datasets")
                repo, rest = "/".join(parts[first : first + 2]), parts[first + 2 :]
                if repo in hub.private and self.headers.get("Authorization") != hub.login:
                    return self._refuse(401, "RepoNotFound")
                if repo not in hub.commits:
                    return self._refuse(404 if api else 401, "RepoNotFound")
                if repo in hub.gated and not api:
                    return self._refuse(403, "GatedRepo")
                if api and rest[:1] == ["refs"]:
                    refs = [{"name": n, "ref": f"refs/x/{n}", "targetCommit": c} for n, c in hub.names[repo].items()]
                    heads = [r for r in refs if r["name"] == "main"]
                    return self._json({"branches": heads, "tags": [r for r in refs if r not in heads], "converts": []})
                revision = rest[1] if len(rest) > 1 else "main"
                commit = hub.names[repo].get(revision, revision)
                if commit not in hub.commits[repo]:
                    return self._refuse(404, "RevisionNotFound")
                files = hub.commits[repo][commit]
                if api and rest[:1] == ["tree"]:
                    assert parse_qs(url.query).get("recursive") in (["True"], ["true"]), url.query
                    return self._json([_entry(path, data) for path, data in files.items()])
                if api:
                    return self._json({"id": repo, "sha": commit, "siblings": [{"rfilename": path} for path in files]})
                path = "/".join(rest[2:])
                if path not in files:
                    return self._refuse(404, "EntryNotFound")
                self._file(path, files[path], commit, body)

            def _file(self, path: str, data: bytes, commit: str, body: bool) -> None:
                etag = _oid(path, data)
                first, last = 0, len(data) - 1
                asked = self.headers.get("Range")
                if asked:
                    begin, _, end = asked.removeprefix("bytes=").partition("-")
                    first, last = int(begin), int(end) if end else last
                    if body:
                        hub.ranges.append(f"{path} {asked}")
                hub.asked.append(path) if body else None
                piece = data[first : last + 1]
                self.send_response(206 if asked else 200)
                for name, value in (("ETag", f'"{etag}"'), ("X-Repo-Commit", commit), ("Accept-Ranges", "bytes"),
                                    ("Content-Length", len(piece)), ("X-Linked-Size", len(data)),
                                    ("X-Linked-ETag", f'"{etag}"')):  # fmt: skip
                    self.send_header(name, str(value))
                if asked:
                    self.send_header("Content-Range", f"bytes {first}-{last}/{len(data)}")
                self.end_headers()
                if not body:
                    return
                with hub._lock:
                    if hub.broken.get(path, 0) > 0:
                        hub.broken[path] -= 1
                        piece, self.close_connection = piece[: len(piece) // 2], True
                    hub.sent[path] += len(piece)
                self.wfile.write(piece)

            def _json(self, value: object, status: int = 200) -> None:
                data = json.dumps(value).encode()
                self.send_response(status)
                if isinstance(value, dict) and "code" in value:
                    self.send_header("X-Error-Code", value["code"])
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(data)))
                self.end_headers()
                self.wfile.write(data)

            def _refuse(self, status: int, code: str) -> None:
                self.send_response(status)
                self.send_header("X-Error-Code", code)
                self.send_header("X-Error-Message", code)
                self.send_header("Content-Length", "0")
                self.end_headers()

        return Handler


def _oid(path: str, data: bytes) -> str:
    if path.endswith(LARGE):
        return hashlib.sha256(data).hexdigest()
    return hashlib.sha1(f"blob {len(data)}\0".encode() + data).hexdigest()


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
    if path.endswith(LARGE):
        entry["lfs"] = {"oid": _oid(path, data), "size": len(data), "pointerSize": 130}
    return entry


@pytest.fixture()
def hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    """The stand-in, and the real client pointed at it."""
    from huggingface_hub import constants

    served = HubStandIn()
    monkeypatch.setenv("HF_ENDPOINT", served.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # for spawned processes; this one has read it already
    monkeypatch.setenv("HF_HUB_DISABLE_XET", "1")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hf"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    yield served
    served.close()
