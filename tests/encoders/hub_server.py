"""A stand-in of the Hugging Face hub: the calls of its HTTP interface that an upload and a download make."""

import base64
import hashlib
import json
import os
import re
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_a_token"


class Repository:
    """Commits by hash, each a dictionary of file contents; branches by name."""

    def __init__(self, files=None, visibility="private"):
        self.visibility, self.is_gated = visibility, False
        self.commits, self.branches = {}, {}
        self.commit(files or {})

    def commit(self, files, branch="main"):
        sha = hashlib.sha1(repr(sorted(files.items())).encode() + str(len(self.commits)).encode()).hexdigest()
        self.commits[sha] = dict(files)
        self.branches[branch] = sha
        return sha

    def at(self, revision):
        """The hash and the files of a revision; None if there is none."""
        sha = self.branches.get(revision, revision)
        return (sha, self.commits[sha]) if sha in self.commits else None


class Hub:
    """The server and what it holds: repositories, large files by hash, requests.

    `cut` names files whose next download ends in the middle.
    """

    def __init__(self):
        self.repositories, self.large, self.cut, self.requests = {}, {}, set(), []
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self.server.server_port}"
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        """Print nothing."""

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self._path()
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            return self._error(401, "")
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path == "/api/validate-yaml":
            return self._json({"errors": [], "warnings": []})
        if match := re.fullmatch(r"/api/models/(.+?)/preupload/(.+)", path):
            modes = [
                {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular"}
                | {"shouldIgnore": False}
                for file in json.loads(body)["files"]
            ]
            return self._json({"files": modes})
        if re.fullmatch(r"/(.+)\.git/info/lfs/objects/batch", path):
            objects = [
                {**one, "actions": {"upload": {"href": f"{self.hub.url}/lfs/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects}, "application/vnd.git-lfs+json")
        if match := re.fullmatch(r"/api/models/(.+?)/commit/(.+)", path):
            return self._commit(match[1], match[2], body)
        return self._error(404, "RepoNotFound")

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["Content-Length"]))
        oid = self._path().removeprefix("/lfs/")
        assert hashlib.sha256(content).hexdigest() == oid
        self.hub.large[oid] = content
        return self._json({})

    def do_HEAD(self):
        self.do_GET()

    def do_GET(self):
        path = self._path()
        patterns = (
            r"/api/models/(?P<name>[^/]+/[^/]+)(/revision/(?P<revision>[^/]+))?",
            r"/api/models/(?P<name>[^/]+/[^/]+)/tree/(?P<revision>[^/]+)",
            r"/(?P<name>[^/]+/[^/]+)/resolve/(?P<revision>[^/]+)/(?P<file>.+)",
        )
        match = next((found for pattern in patterns if (found := re.fullmatch(pattern, path))), None)
        repository = match and self.hub.repositories.get(match["name"])
        has_token = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        if not repository or (repository.visibility == "private" and not has_token):
            return self._error(404 if has_token else 401, "RepoNotFound")
        found = repository.at(unquote(match["revision"] or "main"))
        if found is None:
            return self._error(404, "RevisionNotFound")
        sha, files = found
        if "file" in match.groupdict():
            if repository.is_gated:
                return self._error(403, "GatedRepo")
            return self._file(sha, match["file"], files.get(unquote(match["file"])))
        if "/tree/" in path:
            return self._json([{"type": "file", "path": name, **_stored(content)} for name, content in files.items()])
        siblings = [{"rfilename": name, **_stored(content), "blobId": _oid(content)} for name, content in files.items()]
        return self._json({"id": match["name"], "sha": sha, "siblings": siblings, "private": True, "tags": []})

    def _create(self, fields):
        name = f"{fields['organization']}/{fields['name']}"
        if name in self.hub.repositories:
            return self._json({"url": f"{self.hub.url}/{name}"}, status=409)
        self.hub.repositories[name] = Repository(visibility=fields.get("visibility", "public"))
        return self._json({"url": f"{self.hub.url}/{name}", "name": name})

    def _commit(self, name, branch, body):
        repository = self.hub.repositories[name]
        found = repository.at(branch)
        if found is None:
            return self._error(404, "RevisionNotFound")
        files = dict(found[1])
        for line in body.decode().splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif entry["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
        sha = repository.commit(files, branch)
        return self._json({"commitUrl": f"{self.hub.url}/{name}/commit/{sha}", "commitOid": sha})

    def _file(self, sha, name, content):
        if content is None:
            self._error(404, "EntryNotFound")
            return
        first = int(match[1]) if (match := re.match(r"bytes=(\d+)-", self.headers.get("Range", ""))) else 0
        self.send_response(206 if first else 200)
        self.send_header("ETag", f'"{_oid(content)}"')
        self.send_header("X-Repo-Commit", sha)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(content) - first))
        if first:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if self.command == "HEAD":
            return
        if name in self.hub.cut:
            self.hub.cut.remove(name)
            self.wfile.write(content[first : len(content) // 2])
            self.close_connection = True
        else:
            self.wfile.write(content[first:])

    def _json(self, content, kind="application/json", status=200):
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def _error(self, status, code):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def _path(self):
        path = urlsplit(self.path).path
        self.hub.requests.append((self.command, unquote(path)))
        return path


def _oid(content):
    return hashlib.sha256(content).hexdigest()


def _stored(content):
    return {"size": len(content), "oid": _oid(content)}


def redirect(server, tmp_path, monkeypatch):
    """Send this process's calls of the hub to the server, with an empty cache of downloads and a token."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", f"{server.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
    )
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no token"))
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_TELEMETRY", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)


if __name__ == "__main__":
    # For the examples of the documents: writes its address into a file, and runs until it is ended.
    hub = Hub()
    with open(f"{sys.argv[1]}.part", "w") as file:  # noqa: PTH123
        file.write(hub.url)
    os.replace(f"{sys.argv[1]}.part", sys.argv[1])  # noqa: PTH105
    threading.Event().wait()
