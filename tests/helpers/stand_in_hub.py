"""A hub on loopback that speaks what pushing and loading a model need."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import huggingface_hub
import yaml
from huggingface_hub import constants

TOKEN, READER = "hf_" + "w" * 34, "hf_" + "r" * 34
"""Tokens that may write to the organisations `team` and `my-team`, and only read."""


class Repository:
    """The branches of a repository, each with its commit and its files."""

    def __init__(self, private):
        self.private = private
        self.branches = {"main": {}}
        self.commits = {}

    def sha(self, branch):
        files = self.branches[branch]
        found = hashlib.sha1(repr(sorted(files.items())).encode()).hexdigest()
        self.commits[found] = dict(files)
        return found

    def files(self, revision):
        return self.branches.get(revision) or self.commits.get(revision)


class Hub:
    """What the stand-in holds, and all that it was sent."""

    def __init__(self):
        self.repositories, self.blobs, self.received = {}, {}, []

    def files(self, name, branch="main"):
        return self.repositories[name].branches[branch]


ROUTES = [
    ("GET", r"/api/models/([^/]+/[^/]+)(?:/revision/([^/]+))?", "info"),
    ("GET", r"/api/models/([^/]+/[^/]+)/tree/([^/]+).*", "tree"),
    ("POST", r"/api/repos/create", "create"),
    ("POST", r"/api/validate-yaml", "validate"),
    ("POST", r"/api/models/([^/]+/[^/]+)/preupload/([^/]+)", "preupload"),
    ("POST", r"/api/models/([^/]+/[^/]+)/commit/([^/]+)", "commit"),
    ("POST", r"/api/models/([^/]+/[^/]+)/branch/([^/]+)", "branch"),
    ("POST", r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", "batch"),
    ("PUT", r"/lfs/([0-9a-f]{64})", "store"),
    ("GET", r"/([^/]+/[^/]+)/resolve/([^/]+)/(.+)", "resolve"),
]


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def do_GET(self):
        self.body = self.read_body()
        self.hub.received.append(self.body)
        path, method = unquote(urlsplit(self.path).path), self.command.replace("HEAD", "GET")
        for wanted, pattern, name in ROUTES:
            if wanted == method and (found := re.fullmatch(pattern, path)):
                return getattr(self, name)(*found.groups())
        return self.send({"error": f"the stand-in knows no {method} {path}"}, 501)

    def read_body(self):
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    do_HEAD = do_POST = do_PUT = do_GET

    def send(self, content, status=200, **headers):
        if not isinstance(content, bytes):
            content = json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(content), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    @property
    def token(self):
        return (self.headers.get("Authorization") or "").removeprefix("Bearer ")

    def repository(self, name):
        """Return a repository that the reader may see, or answer as the hub does for others."""
        found = self.hub.repositories.get(name)
        if found is None or (found.private and self.token not in (TOKEN, READER)):
            status = 404 if self.token else 401
            self.send({"error": "Repository not found"}, status, X_Error_Code="RepoNotFound")
            return None
        return found

    def may_write(self, organization):
        if self.token == TOKEN and organization in ("team", "my-team"):
            return True
        self.send({"error": "no write access"}, 403 if self.token else 401)
        return False

    def info(self, name, revision):
        if repository := self.repository(name):
            branch = revision or "main"
            files = repository.files(branch)
            if files is None and branch != "main":
                return self.send({}, 404, X_Error_Code="RevisionNotFound")
            sha = repository.sha(branch) if branch in repository.branches else branch
            siblings = [{"rfilename": path} for path in files or {}]
            values = {"id": name, "sha": sha, "private": repository.private, "siblings": siblings}
            return self.send(values)
        return None

    def tree(self, name, revision):
        if repository := self.repository(name):
            files = repository.files(revision)
            listed = [
                {"type": "file", "path": p, "size": len(c), "oid": hashlib.sha1(c).hexdigest()}
                for p, c in files.items()
            ]
            self.send(listed)

    def create(self):
        asked = json.loads(self.body)
        name = f"{asked['organization']}/{asked['name']}"
        if not self.may_write(asked["organization"]):
            return
        if name in self.hub.repositories:
            self.send({"error": "You already created this model repo"}, 409)
            return
        private = asked.get("private") or asked.get("visibility") == "private"
        self.hub.repositories[name] = Repository(bool(private))
        self.send({"url": f"{self.base}/{name}", "name": name})

    def validate(self):
        """Check the metadata of a card as the hub does: YAML whose results have their parts."""
        content = json.loads(self.body)["content"]
        errors = []
        try:
            metadata = yaml.safe_load(content.split("---")[1])
            for model in metadata.get("model-index", ()):
                for result in model["results"]:
                    assert {"task", "dataset", "metrics"} <= result.keys()
                    assert all({"type", "value"} <= one.keys() for one in result["metrics"])
                    assert {"type", "name"} <= result["dataset"].keys()
        except Exception as error:
            errors.append({"message": repr(error)})
        self.send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name, revision):
        if self.may_write(name.split("/")[0]):
            asked = json.loads(self.body)["files"]
            mode = {True: "lfs", False: "regular"}
            files = [
                {
                    "path": one["path"],
                    "uploadMode": mode[one["path"].endswith(".safetensors")],
                    "shouldIgnore": False,
                    "oid": None,
                }
                for one in asked
            ]
            self.send({"files": files})

    def batch(self, name):
        if self.may_write(name.split("/")[0]):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.base}/lfs/{one['oid']}"}}}
                for one in json.loads(self.body)["objects"]
            ]
            self.send({"transfer": "basic", "objects": objects})

    def store(self, oid):
        assert hashlib.sha256(self.body).hexdigest() == oid
        self.hub.blobs[oid] = self.body
        self.send(b"")

    def branch(self, name, branch):
        if self.may_write(name.split("/")[0]):
            branches = self.hub.repositories[name].branches
            if branch in branches:
                self.send({"error": "the branch exists"}, 409)
            else:
                branches[branch] = dict(branches["main"])
                self.send({})

    def commit(self, name, branch):
        if not self.may_write(name.split("/")[0]):
            return
        repository = self.hub.repositories[name]
        files = repository.branches[branch]
        for line in self.body.splitlines():
            kind, value = (json.loads(line)[key] for key in ("key", "value"))
            if kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif kind == "deletedFile":
                del files[value["path"]]
        sha = repository.sha(branch)
        self.send({"commitUrl": f"{self.base}/{name}/commit/{sha}", "commitOid": sha})

    def resolve(self, name, revision, path):
        if repository := self.repository(name):
            files = repository.files(revision)
            if path not in files:
                self.send({}, 404, X_Error_Code="EntryNotFound")
                return
            etag = hashlib.sha256(files[path]).hexdigest()
            sha = repository.sha(revision) if revision in repository.branches else revision
            self.send(files[path], ETag=f'"{etag}"', X_Repo_Commit=sha, Accept_Ranges="none")


@contextmanager
def stand_in_hub():
    """Run a hub in a thread; yield it with its address."""
    hub = Hub()
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    base = f"http://127.0.0.1:{server.server_port}"
    server.RequestHandlerClass = type("Bound", (Handler,), {"hub": hub, "base": base})
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield hub, base
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


@contextmanager
def using_hub(base, cache, patch, token=TOKEN):
    """Let this process use the hub at `base`, with a cache and a login of its own."""
    huggingface_hub.utils.close_session()
    values = {"ENDPOINT": base, "HF_HUB_OFFLINE": False, "HF_HUB_CACHE": str(cache)}
    values |= {"HF_HUB_DISABLE_XET": True, "HF_TOKEN_PATH": str(cache / "token")}
    values |= {"HUGGINGFACE_CO_URL_TEMPLATE": base + "/{repo_id}/resolve/{revision}/{filename}"}
    for name, value in values.items():
        patch.setattr(constants, name, value)
    patch.setenv("HF_TOKEN", token) if token else patch.delenv("HF_TOKEN", raising=False)
    try:
        yield
    finally:
        huggingface_hub.utils.close_session()
