"""The writing half of the Hub's stand-in: create, preupload, LFS batch and PUT, commit, tags. See tests/hub_stand_in.py."""

from __future__ import annotations

import base64
import hashlib
import json
from typing import Any

import yaml

TOKEN = "hf_of_the_stand_in"
LARGE = (".mp4", ".parquet", ".safetensors")
"""Kept as LFS objects, as the Hub's default .gitattributes has it."""
_LICENCES = {"apache-2.0", "mit", "cc-by-4.0", "other", "unknown"}


class Uploads:
    """What `HubStandIn` does with requests that write; `user` may write to repositories of that name only."""

    commits: dict[str, dict[str, dict[str, bytes]]]
    names: dict[str, dict[str, str]]
    url: str

    def __init__(self) -> None:
        self.user, self.login = "you", f"Bearer {TOKEN}"
        self.kinds: dict[str, str] = {}  # repo -> "model" or "dataset"
        self.private: set[str] = set()
        self.objects: dict[str, bytes] = {}  # sha256 -> content
        self.uploaded: list[str] = []  # sha256 of every large file that came over the wire
        self.fail: dict[str, int] = {}  # part of a path -> the status it is answered with

    def commit(self, repo: str, files: dict[str, bytes], *tags: str) -> str:
        raise NotImplementedError

    def take(self, verb: str, path: str, login: str | None, data: bytes) -> tuple[int, Any]:
        """(status, JSON) in answer to a request that writes."""
        for part, status in self.fail.items():
            if part in path:
                return status, {"error": "said by the test"}
        if path.startswith("lfs/"):  # presigned: without a login
            oid = path.removeprefix("lfs/")
            if hashlib.sha256(data).hexdigest() != oid:
                return 400, {"error": "other bytes than announced"}
            self.objects[oid] = data
            self.uploaded.append(oid)
            return 200, {}
        if login != self.login:
            return 401, {"error": "Invalid username or password."}
        if path == "api/validate-yaml":
            return self._validate(json.loads(data)["content"])
        if path == "api/repos/create":
            return self._create(json.loads(data))
        parts = path.split("/")
        if path.endswith(".git/info/lfs/objects/batch"):
            objects = [{**one, "actions": {"upload": {"href": f"{self.url}/lfs/{one['oid']}", "header": {}}}}
                       if one["oid"] not in self.objects else one for one in json.loads(data)["objects"]]  # fmt: skip
            return 200, {"transfer": "basic", "objects": objects}
        repo, what, rest = "/".join(parts[2:4]), parts[4], parts[5:]
        if repo not in self.commits or self.kinds[repo] != parts[1].removesuffix("s"):
            return 404, {"error": "Repository not found"}
        if what == "preupload":
            return 200, {"files": [{"path": f["path"], "uploadMode": "lfs" if f["path"].endswith(LARGE) else "regular",
                                    "shouldIgnore": False} for f in json.loads(data)["files"]]}  # fmt: skip
        if what == "commit":
            return self._commit(repo, [json.loads(line) for line in data.splitlines()])
        if what == "tag" and verb == "DELETE":
            if self.names[repo].pop(rest[0], None) is None:
                return 404, {"error": "no such tag", "code": "RevisionNotFound"}
            return 200, {}
        if what == "tag":
            tag = json.loads(data)["tag"]
            if tag in self.names[repo]:
                return 409, {"error": "it is there"}
            self.names[repo][tag] = self.names[repo].get(rest[0], rest[0])
            return 200, {}
        return 404, {"error": f"{verb} {path}"}

    def _validate(self, content: str) -> tuple[int, Any]:
        _, front, _ = content.split("---\n", 2)
        fields = yaml.safe_load(front)
        if fields.get("license") not in _LICENCES:
            return 400, {"errors": [{"message": f'"license" must be one of {sorted(_LICENCES)}'}], "warnings": []}
        return 200, {"errors": [], "warnings": []}

    def _create(self, asked: dict[str, Any]) -> tuple[int, Any]:
        owner = asked.get("organization") or self.user
        repo, kind = f"{owner}/{asked['name']}", asked.get("type", "model")
        if owner != self.user:
            return 403, {"error": f"You don't have the rights to create a {kind} under the namespace {owner!r}"}
        if repo in self.commits:
            return 409, {"error": "You already created this repo", "url": f"{self.url}/{repo}"}
        self.kinds[repo] = kind
        if asked.get("private") or asked.get("visibility") == "private":
            self.private.add(repo)
        self.commit(repo, {".gitattributes": b"*.safetensors filter=lfs\n"})
        return 200, {"url": f"{self.url}/{'datasets/' if kind == 'dataset' else ''}{repo}", "name": repo}

    def _commit(self, repo: str, lines: list[dict[str, Any]]) -> tuple[int, Any]:
        files = dict(self.commits[repo][self.names[repo]["main"]])
        for line in lines[1:]:
            value = line["value"]
            match line["key"]:
                case "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                case "lfsFile":
                    files[value["path"]] = self.objects[value["oid"]]
                case "deletedFile":
                    del files[value["path"]]
        oid = self.commit(repo, files)
        return 200, {"commitUrl": f"{self.url}/{repo}/commit/{oid}", "commitOid": oid, "success": True}
