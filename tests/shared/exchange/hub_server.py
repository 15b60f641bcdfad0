"""A server on this machine that speaks the Hub's HTTP API, as far as repositories of files go, and its faults."""

from __future__ import annotations

import base64
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".npz", ".pt", ".zst", ".parquet")
"""Files that are kept in LFS, whose checksum is a SHA-256."""


def git_digest(content):
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


class HubServer:
    """Repositories by name, each a dictionary of paths and contents.

    `private` names those that need the token `hf_secret`. `cut` says how many bytes of each of the next downloads are
    sent before the connection closes; `wrong` names files that are sent with another byte. `downloads` and `commits`
    list what was served and received.
    """

    def __init__(self):
        self.repositories, self.private, self.cut, self.wrong = {}, set(), [], set()
        self.downloads, self.commits, self.uploaded = [], [], {}
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), type("Bound", (_Handler,), {"hub": self}))
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self):
        self._server.shutdown()
        self._server.server_close()

    def sha(self, repository):
        facts = sorted((path, git_digest(content)) for path, content in self.repositories[repository].items())
        return hashlib.sha1(repr(facts).encode()).hexdigest()

    def entry(self, repository, path):
        content = self.repositories[repository][path]
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_digest(content)}
        if path.endswith(LARGE):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
        return entry


class _Handler(BaseHTTPRequestHandler):
    hub: HubServer
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self._get(body=True)

    def do_HEAD(self):
        self._get(body=False)

    def _get(self, body):
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        if parts[0] == "api":
            return self._describe(parts[2:])
        kind = 1 if parts[0] == "datasets" else 0
        repository, (resolve, _revision, *path) = "/".join(parts[kind : kind + 2]), parts[kind + 2 :]
        assert resolve == "resolve"
        if not self._admitted(repository):
            return None
        return self._file(repository, "/".join(path), body)

    def _admitted(self, repository):
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        known = repository in self.hub.repositories
        if known and (repository not in self.hub.private or token == "hf_secret"):
            return True
        self._answer(401 if not token else 404, {"error": "Repository not found"}, {"X-Error-Code": "RepoNotFound"})
        return False

    def _describe(self, parts):
        repository, rest = "/".join(parts[:2]), parts[2:]
        if not self._admitted(repository):
            return
        files, sha = self.hub.repositories[repository], self.hub.sha(repository)
        if rest[:1] == ["tree"]:
            prefix = "/".join(rest[2:])
            inside = [path for path in sorted(files) if not prefix or path.startswith(prefix + "/")]
            below = {path: path[len(prefix) + 1 if prefix else 0 :] for path in inside}
            recursive = "recursive=True" in self.path or "recursive=true" in self.path
            entries = [self.hub.entry(repository, path) for path in inside if recursive or "/" not in below[path]]
            return self._answer(200, entries)
        if rest[:1] == ["revision"] and rest[1] not in ("main", sha):
            return self._answer(404, {"error": "Revision not found"}, {"X-Error-Code": "RevisionNotFound"})
        self._answer(200, {"id": repository, "sha": sha, "siblings": [{"rfilename": path} for path in files]})

    def _file(self, repository, path, body):
        files = self.hub.repositories[repository]
        if path not in files:
            return self._answer(404, {"error": "Entry not found"}, {"X-Error-Code": "EntryNotFound"})
        content, entry = files[path], self.hub.entry(repository, path)
        digest = entry["lfs"]["oid"] if "lfs" in entry else entry["oid"]
        if path in self.hub.wrong:
            content = bytes([content[0] ^ 1]) + content[1:]
        first, status = 0, 200
        if self.headers.get("range"):
            first = int(self.headers["range"].removeprefix("bytes=").partition("-")[0])
            status = 206
        part = content[first:]
        self.send_response(status)
        self.send_header("Content-Length", str(len(part)))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{len(content) - 1}/{len(content)}")
        self.send_header("X-Repo-Commit", self.hub.sha(repository))
        self.send_header("ETag", f'"{digest}"')
        if "lfs" in entry:
            self.send_header("X-Linked-Etag", f'"{digest}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.end_headers()
        if body:
            self.hub.downloads.append((path, first))
            if self.hub.cut and path.endswith(LARGE):
                part = part[: self.hub.cut.pop(0)]
                self.close_connection = True
            self.wfile.write(part)

    def do_PUT(self):
        content = self.rfile.read(int(self.headers["content-length"]))
        self.hub.uploaded[hashlib.sha256(content).hexdigest()] = content
        self._answer(200, {})

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("content-length") or 0))
        parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
        token = self.headers.get("authorization", "").removeprefix("Bearer ")
        if parts[:2] == ["api", "validate-yaml"]:
            return self._answer(200, {"errors": [], "warnings": []})
        if parts[-1] == "batch":
            objects = json.loads(body)["objects"]
            answers = [
                {"oid": each["oid"], "size": each["size"]}
                | (
                    {}
                    if each["oid"] in self.hub.uploaded
                    else {"actions": {"upload": {"href": f"{self.hub.url}/lfs/{each['oid']}"}}}
                )
                for each in objects
            ]
            return self._answer(200, {"transfer": "basic", "objects": answers})
        if parts[-1] == "paths-info" or parts[-2] == "paths-info":
            return self._paths("/".join(parts[2:4]), body)
        if token != "hf_secret":
            return self._answer(401, {"error": "Invalid username or password."})
        if parts[:3] == ["api", "repos", "create"]:
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else asked["name"]
            if name in self.hub.repositories:
                return self._answer(409, {"error": "exists", "url": f"{self.hub.url}/{name}"})
            self.hub.repositories[name] = {}
            if asked.get("private"):
                self.hub.private.add(name)
            return self._answer(200, {"url": f"{self.hub.url}/{name}", "name": name})
        repository = "/".join(parts[2:4])
        if parts[4] == "preupload":
            files = json.loads(body)["files"]
            answers = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for each in files
            ]
            return self._answer(200, {"files": answers})
        return self._commit(repository, body)

    def _paths(self, repository, body):
        if not self._admitted(repository):
            return
        asked = json.loads(body) if body[:1] == b"{" else parse_qs(body.decode())
        found = []
        for path in asked["paths"]:
            files = self.hub.repositories[repository]
            if path in files:
                found.append(self.hub.entry(repository, path))
            elif any(name.startswith(path + "/") for name in files):
                found.append({"type": "directory", "path": path, "oid": "0" * 40})
        self._answer(200, found)

    def _commit(self, repository, body):
        files, names = self.hub.repositories[repository], []
        for line in body.splitlines():
            item = json.loads(line)
            value = item["value"]
            if item["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
                names.append(value["path"])
            elif item["key"] == "lfsFile":
                files[value["path"]] = self.hub.uploaded[value["oid"]]
                names.append(value["path"])
        self.hub.commits.append(names)
        sha = self.hub.sha(repository)
        self._answer(200, {"success": True, "commitOid": sha, "commitUrl": f"{self.hub.url}/{repository}/commit/{sha}"})

    def _answer(self, status, value, headers=()):
        content = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        for name, text in dict(headers).items():
            self.send_header(name, text)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)
