"""A small hub on this machine, for what `huggingface_hub` asks a real one: files, and commits.

It takes every file as a regular one of git's, as the real hub takes small ones; the protocols of
large files (LFS, xet) are not served. Repositories live in memory.
"""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_tests"


class Repository:
    """Files by commit, and the commits that branches and tags stand for."""

    def __init__(self, private=False):
        self.private, self.refs, self.commits, self.messages = private, {}, {}, []
        self.commit({}, "initial commit")

    def commit(self, files, message, deleted=(), branch="main"):
        """Add and delete files; the commit's hash."""
        content = {**self.commits.get(self.refs.get(branch), {}), **files}
        content = {name: data for name, data in content.items() if name not in deleted}
        sha = hashlib.sha1(f"{len(self.commits)} {message}".encode()).hexdigest()
        self.commits[sha], self.refs[branch] = content, sha
        self.messages.append(message)
        return sha

    def files(self, revision="main"):
        return self.commits[self.refs.get(revision, revision)]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        self.server.hub.requests.append(f"{self.command} {self.path}")

    def do_GET(self):
        path = unquote(urlsplit(self.path).path)
        api = re.fullmatch(r"/api/models/([^/]+/[^/]+)(?:/(revision|tree)/(.+))?", path)
        file = re.fullmatch(r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", path)
        if not (api or file):
            return self.answer(404)
        name, what, revision = api.groups() if api else (file[1], "file", file[2])
        repo = self.server.hub.repos.get(name)
        if repo is None or (repo.private and not self.logged_in()):
            return self.answer(401, code="RepoNotFound")
        sha = repo.refs.get(revision or "main", revision)
        if sha not in repo.commits:
            return self.answer(404, code="RevisionNotFound")
        files = repo.commits[sha]
        if what == "tree":
            return self.answer(200, [entry(*pair) for pair in files.items()])
        if what == "file" and file[3] not in files:
            return self.answer(404, code="EntryNotFound")
        if what == "file":
            return self.answer(200, files[file[3]], sha=sha)
        siblings = [{"rfilename": path} for path in files]
        about = {"id": name, "sha": sha, "private": repo.private, "siblings": siblings}
        return self.answer(200, about)

    do_HEAD = do_GET

    def do_POST(self):
        body, hub = self.rfile.read(int(self.headers["Content-Length"])), self.server.hub
        if self.path == "/api/validate-yaml":
            return self.answer(200, {"errors": [], "warnings": []})
        if not self.logged_in():
            return self.answer(401)
        if self.path == "/api/repos/create":
            about = json.loads(body)
            name = f"{about['organization']}/{about['name']}"
            if about["organization"] != "user":
                return self.answer(403)
            there = name in hub.repos
            hub.repos.setdefault(name, Repository(about.get("visibility") == "private"))
            url = {"url": f"{hub.url}/{name}", "id": name}
            return self.answer(409 if there else 200, url)
        name, what = re.fullmatch(r"/api/models/(.+)/(preupload|commit)/main", self.path).groups()
        if what == "preupload":
            asked = [one["path"] for one in json.loads(body)["files"]]
            told = {"uploadMode": "regular", "shouldIgnore": False}
            modes = [{"path": path, **told} for path in asked]
            return self.answer(200, {"files": modes})
        lines = [json.loads(line) for line in body.splitlines()]
        values = {key: [x["value"] for x in lines if x["key"] == key] for key in KEYS}
        files = {one["path"]: base64.b64decode(one["content"]) for one in values["file"]}
        deleted = [one["path"] for one in values["deletedFile"]]
        sha = hub.repos[name].commit(files, values["header"][0]["summary"], deleted)
        url = f"{hub.url}/{name}/commit/{sha}"
        return self.answer(200, {"commitUrl": url, "commitOid": sha, "success": True})

    def logged_in(self):
        return self.headers["Authorization"] == f"Bearer {TOKEN}"

    def answer(self, status, content=None, code=None, sha=None):
        """Send JSON, or bytes as they are; code: what the hub calls an error."""
        content = {} if content is None else content
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        headers = {"Content-Length": len(data), "ETag": f'"{oid(data)}"'}
        headers |= {"X-Error-Code": code} if code else {}
        headers |= {"X-Repo-Commit": sha} if sha else {}
        self.send_response(status)
        for header, value in headers.items():
            self.send_header(header, str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)


KEYS = ("header", "file", "deletedFile")  # of the lines of a commit


def oid(data):
    """What git calls a file of this content."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def entry(path, data):
    return {"type": "file", "path": path, "size": len(data), "oid": oid(data)}


class Hub:
    """Its address, its repositories by name, and what was asked of it."""

    def __init__(self, port):
        self.url, self.repos, self.requests = f"http://127.0.0.1:{port}", {}, []


@contextmanager
def serving():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.hub = Hub(server.server_port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield server.hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
