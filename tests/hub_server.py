"""A Hub on loopback: the parts of the HTTP API that `huggingface_hub` uses to create, upload, commit and download."""

import base64
import hashlib
import http.server
import json
import os
import re
import threading
import time

import yaml

COMMIT = "c0ffee" + "0" * 34
TOKEN = "hf_" + "a" * 34
ORGANISATION = "lab"
"""The only organisation that the token's owner may write to."""
REFUSALS = {
    "gated": (403, "GatedRepo"),
    "nowhere": (404, "RepoNotFound"),
    "broken": (418, ""),
}
"""Repositories that the server refuses: status, and the Hub's error code."""
LFS = (".pt", ".safetensors", ".png")


class Hub(http.server.ThreadingHTTPServer):
    """The server and its contents.

    `repos`: (type, id) to a list of commits (oid, {path: content}). `blobs`: SHA-256 to content. `requests`: requests
    received, as (method, path). `faults`: rules [method, part of the path, action, how often]; an action is a status,
    "drop" (no answer) or "hang" (no answer for a long time).
    """

    def __init__(self, repositories=None):
        self.repos = {("model", name): [(COMMIT, files)] for name, files in (repositories or {}).items()}
        self.repos |= {("dataset", name): commits for (_, name), commits in self.repos.items()}
        self.blobs, self.requests, self.faults, self.sdks = {}, [], [], {}
        self.hanging = threading.Event()
        self.lock = threading.Lock()
        super().__init__(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{self.server_address[1]}"
        self.elsewhere = f"http://localhost:{self.server_address[1]}"  # large files are on another host

    def fault(self, method, path):
        with self.lock:
            self.requests.append((method, path))
            for rule in self.faults:
                if rule[0] == method and rule[1] in path and rule[3] > 0:
                    rule[3] -= 1
                    return rule[2]
        return None

    def commits(self, repo, kind="model"):
        return self.repos.get((kind, repo), [])

    def files(self, repo, kind="model"):
        return self.commits(repo, kind)[-1][1]


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def handle_any(self):
        path = self.path.split("?")[0]
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            while size := int(self.rfile.readline(), 16):
                self.body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        action = self.server.fault(self.command, path)
        if action == "hang":
            self.server.hanging.set()
            time.sleep(60)
        if action in ("drop", "hang"):
            self.close_connection = True
            return
        if action:
            self.refuse(action, "told to fail")
            return
        parts = path.strip("/").split("/")
        if self.command in ("GET", "HEAD"):
            self.read(parts)
        else:
            self.write(parts)

    do_GET = do_HEAD = do_POST = do_PUT = handle_any

    # --- reading ---

    def read(self, parts):
        if parts == ["api", "whoami-v2"]:
            if self.owner():
                self.answer(200, {"type": "user", "name": "ada", "orgs": [{"name": ORGANISATION}]})
            return
        if parts[0] == "cdn":
            self.answer(200, self.server.blobs[parts[1]], {"ETag": f'"{parts[1]}"'})
            return
        api = parts[0] == "api"
        parts = parts[1:] if api else parts
        kind = {"datasets": "dataset", "spaces": "space", "models": "model"}.get(parts[0])
        parts = parts[1:] if kind else parts
        kind = kind or "model"
        repository, rest = "/".join(parts[:2]), parts[2:]
        status, code = REFUSALS.get(repository.split("/")[-1], (0, ""))
        if status:
            self.answer(status, b"", {"X-Error-Code": code})
            return
        if not self.server.commits(repository, kind):
            self.answer(401 if api else 404, b"", {"X-Error-Code": "RepoNotFound"})
            return
        wanted = rest[1] if len(rest) > 1 else "main"
        found = [c for c in self.server.commits(repository, kind) if wanted in ("main", c[0])]
        if not found:
            self.answer(404, b"", {"X-Error-Code": "RevisionNotFound"})
        elif api:
            self.describe(repository, found[-1], rest[:1] == ["tree"])
        else:
            self.download(found[-1], "/".join(rest[2:]))

    def describe(self, repository, commit, tree):
        oid, files = commit
        if not tree:
            siblings = [{"rfilename": name} for name in files]
            facts = {"id": repository, "sha": oid, "siblings": siblings, "private": False, "tags": []}
            self.answer(200, facts)
            return
        entries = []
        for name, content in files.items():
            entry = {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
            digest = hashlib.sha256(content).hexdigest()
            if digest in self.server.blobs:
                entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 130}
            entries.append(entry)
        self.answer(200, entries)

    def download(self, commit, name):
        oid, files = commit
        content = files.get(name)
        if content is None:
            self.answer(404, b"", {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": oid})
            return
        digest = hashlib.sha256(content).hexdigest()
        headers = {"X-Repo-Commit": oid}
        if digest in self.server.blobs:
            headers |= {"X-Linked-Etag": f'"{digest}"', "X-Linked-Size": str(len(content))}
            self.answer(302, b"", headers | {"Location": f"{self.server.elsewhere}/cdn/{digest}"})
        else:
            self.answer(200, content, headers | {"ETag": f'"{hashlib.sha1(content).hexdigest()}"'})

    # --- writing ---

    def write(self, parts):
        if parts[0] == "lfs":
            self.store(parts[1])
            return
        if not self.owner():
            return
        if parts[:2] == ["api", "validate-yaml"]:
            self.validate(json.loads(self.body)["content"])
        elif parts == ["api", "repos", "create"]:
            self.create(json.loads(self.body))
        elif parts[-3:] == ["lfs", "objects", "batch"]:
            self.batch(json.loads(self.body))
        elif parts[0] == "api" and parts[4] in ("preupload", "commit"):
            kind, repository = parts[1].removesuffix("s"), "/".join(parts[2:4])
            if parts[2] != ORGANISATION:
                self.refuse(403, f"you may not write to {parts[2]}")
            elif (kind, repository) not in self.server.repos:
                self.answer(404, b"", {"X-Error-Code": "RepoNotFound"})
            elif parts[4] == "preupload":
                self.preupload(kind, repository)
            else:
                self.commit(kind, repository)
        else:
            self.answer(404, b"", {})

    def owner(self):
        if self.headers.get("Authorization") == f"Bearer {TOKEN}":
            return "ada"
        self.refuse(401, "Invalid credentials in Authorization header")
        return None

    def validate(self, content):
        try:
            front = yaml.safe_load(content.split("---\n")[1])
            index = [r for model in front.get("model-index", []) for r in model["results"]]
            bad = [r for r in index if not (r["task"]["type"] and r["dataset"]["name"] and r["metrics"])]
        except (yaml.YAMLError, KeyError, IndexError, AttributeError) as error:
            bad = [repr(error)]
        self.answer(400 if bad else 200, {"errors": [{"message": str(b)} for b in bad], "warnings": []})

    def create(self, wanted):
        repository, kind = f"{wanted['organization']}/{wanted['name']}", wanted.get("type", "model")
        url = f"{self.server.endpoint}/{'spaces/' if kind == 'space' else ''}{repository}"
        if wanted["organization"] != ORGANISATION:
            self.refuse(403, f"you may not create a repository under {wanted['organization']}")
        elif (kind, repository) in self.server.repos:
            self.answer(409, {"error": "You already created this repo", "url": url})
        else:
            self.server.repos[kind, repository] = [("0" * 40, {".gitattributes": b"*.pt filter=lfs\n"})]
            self.server.sdks[repository] = wanted.get("sdk")
            self.answer(200, {"url": url})

    def preupload(self, kind, repository):
        present, answers = self.server.files(repository, kind), []
        for file in json.loads(self.body)["files"]:
            base64.b64decode(file["sample"], validate=True)
            mode = "lfs" if file["path"].endswith(LFS) else "regular"
            answer = {"path": file["path"], "uploadMode": mode, "shouldIgnore": False}
            if (content := present.get(file["path"])) is not None:
                git = hashlib.sha1(f"blob {len(content)}\0".encode() + content).hexdigest()
                answer["oid"] = hashlib.sha256(content).hexdigest() if mode == "lfs" else git
            answers.append(answer)
        self.answer(200, {"files": answers})

    def batch(self, wanted):
        assert wanted["operation"] == "upload" and wanted["hash_algo"] == "sha256"
        objects = []
        for item in wanted["objects"]:
            if item["oid"] not in self.server.blobs:
                upload = {"href": f"{self.server.elsewhere}/lfs/{item['oid']}"}
                verify = {"href": f"{self.server.endpoint}/lfs/verify"}
                item = item | {"actions": {"upload": upload, "verify": verify}}
            objects.append(item)
        self.answer(200, {"transfer": "basic", "objects": objects})

    def store(self, oid):
        if oid == "verify":
            item = json.loads(self.body)
            right = len(self.server.blobs.get(item["oid"], b"")) == item["size"]
        else:
            right = hashlib.sha256(self.body).hexdigest() == oid
            if right:
                self.server.blobs[oid] = self.body
        self.answer(200 if right else 400, b"", {})

    def commit(self, kind, repository):
        """Commit everything or nothing."""
        files = dict(self.server.files(repository, kind))
        header, *lines = [json.loads(line) for line in self.body.splitlines()]
        assert header["key"] == "header" and header["value"]["summary"]
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            elif value["oid"] in self.server.blobs:
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                self.refuse(400, f"no object {value['oid']} for {value['path']}")
                return
        oid = hashlib.sha1(self.body).hexdigest()
        self.server.repos[kind, repository].append((oid, files))
        url = f"{self.server.endpoint}/{'spaces/' if kind == 'space' else ''}{repository}/commit/{oid}"
        self.answer(200, {"success": True, "commitOid": oid, "commitUrl": url})

    # --- answering ---

    def refuse(self, status, message):
        self.answer(status, {"error": message}, {"X-Error-Message": message})

    def answer(self, status, content, headers=None):
        if not isinstance(content, bytes):
            content, headers = json.dumps(content).encode(), {"Content-Type": "application/json", **(headers or {})}
        self.send_response(status)
        for name, value in {**(headers or {}), "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def log_message(self, *args):
        pass


def serve(repositories=None):
    """A Hub that answers in its own thread; `server.shutdown()` ends it."""
    server = Hub(repositories)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


def client_environment(server, home, **more):
    """Environment variables that point the unpatched client at the server, with its cache in `home`.

    The client's content-chunked protocol is switched off: it needs other servers.
    """
    names = ("HF_HUB_OFFLINE", "TRANSFORMERS_OFFLINE", "HF_HUB_CACHE", "HUGGING_FACE_HUB_TOKEN")
    clean = {name: value for name, value in os.environ.items() if name not in names}
    own = {"HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return {**clean, "HF_ENDPOINT": server.endpoint, "HF_TOKEN": TOKEN, "OMP_NUM_THREADS": "1", **own, **more}


def python_blocks(text):
    """The Python code blocks of a Markdown text."""
    return re.findall(r"^```python\n(.*?)^```$", text, re.S | re.M)
