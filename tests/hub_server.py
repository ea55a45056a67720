"""A Hub on this machine: the part of its API that huggingface_hub calls, serving folders from 127.0.0.1.

What is imitated, and no more: model_info and the tree listing, HEAD and GET of `resolve` with ETag, X-Repo-Commit,
X-Linked-Size and X-Linked-Etag, the redirect of large files to another host (`localhost`, to which no token may be
sent), Range requests, and X-Error-Code with 401, 403 and 404; of writing, without Xet: repositories and branches made,
preupload, LFS's batch and PUT, and commits. Every request is kept in `requests`, with the number of bytes answered, so
that a test can say what was fetched.
"""

import base64
import hashlib
import json
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

LARGE = (".safetensors", ".bin", ".gguf", ".msgpack", ".pth")  # what git keeps in LFS


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str | None
    token: str | None
    sent: int  # bytes of the answer's body (fewer where the client hung up)


@dataclass
class Repository:
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)  # commit → file name → content
    branches: dict[str, str] = field(default_factory=dict)
    token: str | None = None  # private: who sends this token may read
    gated: bool = False  # listed for everybody, files for nobody

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        """Make the files the new content of a branch; returns the commit."""
        commit = hashlib.sha1(repr((branch, len(self.commits), sorted(files.items()))).encode()).hexdigest()
        self.commits[commit] = files
        self.branches[branch] = commit
        return commit


class HubServer:
    """Use as a context manager; `url` is the endpoint."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.requests: list[Request] = []
        self.drops: dict[str, int] = {}  # file name → times its connection is still to be dropped halfway
        self.down: int | None = None  # answer everything with this status
        self.silent = threading.Event()  # set: accept connections and answer nothing
        self.ignore_ranges = False
        self.login_page = False  # answer questions with a page of HTML, as a hotel's network does
        self.writers: dict[str, set[str]] = {}  # organization → tokens that may write there
        self.objects: dict[str, bytes] = {}  # LFS: sha256 → content
        self.refuse_uploads: int | None = None  # answer LFS's PUT with this status
        self.closing = threading.Event()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02})

    def __enter__(self) -> "HubServer":
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def stop(self) -> None:
        """Close the port; from now on connections are refused."""
        if not self.closing.is_set():
            self.closing.set()
            self._server.shutdown()
            self._thread.join()
            self._server.server_close()

    def add(
        self, name: str, folder: Path, *, branch: str = "main", token: str | None = None, gated: bool = False
    ) -> str:
        """Serve a folder's present content as a new commit of a branch; returns the commit."""
        files = {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
        commit = hashlib.sha1(repr((name, sorted(files.items()))).encode()).hexdigest()
        repository = self.repositories.setdefault(name, Repository())
        repository.commits[commit] = files
        repository.branches[branch] = commit
        repository.token, repository.gated = token, gated
        return commit

    def drop(self, name: str, times: int = 1) -> None:
        """Drop the connection in the middle of a file, so many times."""
        self.drops[name] = times

    def fetched(self, suffix: str = "") -> list[Request]:
        """The GET requests that were answered with (part of) a file whose name ends so."""
        return [r for r in self.requests if r.method == "GET" and r.sent and r.path.endswith(suffix)]

    def sent(self, suffix: str = "") -> int:
        """How many bytes of files whose name ends so were sent."""
        return sum(request.sent for request in self.fetched(suffix))


def _handler(hub: HubServer) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            self.answer()

        def do_HEAD(self) -> None:
            self.answer()

        def do_POST(self) -> None:
            self.write()

        def do_PUT(self) -> None:
            self.write()

        def log_message(self, format: str, *args: Any) -> None:
            pass

        def answer(self) -> None:
            if hub.silent.is_set():
                hub.closing.wait(20)
                self.close_connection = True
                return
            url = urlsplit(self.path)
            parts = [unquote(part) for part in url.path.strip("/").split("/")]
            if hub.down:
                self.error(hub.down, "", "out of order")
            elif hub.login_page:
                self.body(200, b"<html>please log in</html>", {"Content-Type": "text/html"})
            elif parts[0] == "cdn":
                self.file("/".join(parts[3:]), hub.repositories["/".join(parts[1:3])].commits[parts[-2]][parts[-1]], {})
            elif parts[:2] == ["api", "models"]:
                self.api("/".join(parts[2:4]), parts[4:], parse_qs(url.query))
            elif parts[2:3] == ["resolve"]:
                self.resolve("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
            else:
                self.error(404, "", "no such page")

        def find(self, name: str, revision: str) -> tuple[str, dict[str, bytes]] | None:
            """The commit and its files, or None where an error was answered."""
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            repository = hub.repositories.get(name)
            if token == "expired":
                self.error(401, "", "Invalid credentials in Authorization header")
            elif repository is None or repository.token not in (None, token):
                self.error(404 if token else 401, "RepoNotFound", "Repository not found")
            elif (commit := repository.branches.get(revision, revision)) not in repository.commits:
                self.error(404, "RevisionNotFound", f"Invalid rev id: {revision}")
            else:
                return commit, repository.commits[commit]
            return None

        def api(self, name: str, rest: list[str], query: dict[str, list[str]]) -> None:
            found = self.find(name, rest[1] if len(rest) > 1 else "main")
            if found is None:
                return
            commit, files = found
            entries: list[dict[str, Any]] = []
            for path, content in files.items():
                entry: dict[str, Any] = {"size": len(content)}
                if path.endswith(LARGE):
                    sha = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"size": len(content), "sha256": sha, "oid": sha, "pointerSize": 130}
                oid = hashlib.sha1(content).hexdigest()
                if rest[:1] == ["tree"]:
                    entries.append({"type": "file", "path": path, "oid": oid, **entry})
                else:
                    entries.append({"rfilename": path, **({"blobId": oid, **entry} if "blobs" in query else {})})
            private = hub.repositories[name].token is not None
            info = {"id": name, "sha": commit, "private": private, "siblings": entries}
            answer = entries if rest[:1] == ["tree"] else info
            self.body(200, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def write(self) -> None:
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0)) or self.chunks()
            parts = [unquote(part) for part in urlsplit(self.path).path.strip("/").split("/")]
            if hub.down:
                self.error(hub.down, "", "out of order")
            elif parts[0] == "lfs":
                if hub.refuse_uploads is None:
                    assert hashlib.sha256(content).hexdigest() == parts[1]
                    hub.objects[parts[1]] = content
                self.body(hub.refuse_uploads or 200, b"", {})
            elif parts == ["api", "validate-yaml"]:
                self.json({"errors": [], "warnings": []})
            elif parts == ["api", "repos", "create"]:
                asked = json.loads(content)
                self.create(f"{asked['organization']}/{asked['name']}", asked)
            elif parts[2:] == ["info", "lfs", "objects", "batch"]:
                self.batch("/".join(parts[:2]).removesuffix(".git"), json.loads(content))
            else:
                self.change("/".join(parts[2:4]), parts[4], parts[5], content)

        def chunks(self) -> bytes:
            """A body of unknown length."""
            data = b""
            while self.headers.get("Transfer-Encoding") == "chunked" and (size := int(self.rfile.readline(), 16)):
                data += self.rfile.read(size)
                self.rfile.readline()
            return data

        def may_write(self, name: str) -> str | None:
            """The token, if it may write; None where an error was answered."""
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            if token is None or token == "expired":
                self.error(401, "", "Invalid username or password.")
            elif token not in hub.writers.get(name.partition("/")[0], ()):
                self.error(403, "", "You don't have the rights to create a model under this namespace")
            else:
                return token
            return None

        def create(self, name: str, asked: dict[str, Any]) -> None:
            token = self.may_write(name)
            if token is None:
                return
            if name in hub.repositories:
                self.json({"error": "You already created this model repo", "url": f"{hub.url}/{name}"}, 409)
                return
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            repository = hub.repositories[name] = Repository(token=token if private else None)
            repository.commit("main", {".gitattributes": b"*.safetensors filter=lfs\n"})
            self.json({"url": f"{hub.url}/{name}"})

        def batch(self, name: str, asked: dict[str, Any]) -> None:
            if self.may_write(name) is None:
                return
            objects = []
            for each in asked["objects"]:
                known = each["oid"] in hub.objects
                action = {} if known else {"actions": {"upload": {"href": f"{hub.url}/lfs/{each['oid']}"}}}
                objects.append({**each, **action})
            self.json({"transfer": "basic", "objects": objects})

        def change(self, name: str, what: str, branch: str, content: bytes) -> None:
            if self.may_write(name) is None:
                return
            repository = hub.repositories[name]
            if what == "branch":
                if branch in repository.branches:
                    self.json({"error": "Reference already exists"}, 409)
                    return
                repository.branches[branch] = repository.branches["main"]
                self.json({})
            elif branch not in repository.branches:
                self.error(404, "RevisionNotFound", f"Invalid rev id: {branch}")
            elif what == "preupload":
                modes = [
                    {
                        "path": file["path"],
                        "uploadMode": "lfs" if file["path"].endswith(LARGE) else "regular",
                        "shouldIgnore": False,
                    }
                    for file in json.loads(content)["files"]
                ]
                self.json({"files": modes})
            else:
                files = dict(repository.commits[repository.branches[branch]])
                for line in content.splitlines():
                    operation = json.loads(line)
                    value = operation["value"]
                    if operation["key"] == "file":
                        files[value["path"]] = base64.b64decode(value["content"])
                    elif operation["key"] == "lfsFile":
                        files[value["path"]] = hub.objects[value["oid"]]
                    elif operation["key"] == "deletedFile":
                        del files[value["path"]]
                commit = repository.commit(branch, files)
                self.json({"commitUrl": f"{hub.url}/{name}/commit/{commit}", "commitOid": commit})

        def json(self, answer: dict[str, Any], status: int = 200) -> None:
            self.body(status, json.dumps(answer).encode(), {"Content-Type": "application/json"})

        def resolve(self, name: str, revision: str, path: str) -> None:
            found = self.find(name, revision)
            if found is None:
                return
            commit, files = found
            if hub.repositories[name].gated:
                self.error(403, "GatedRepo", "Access to this model is restricted")
                return
            if path not in files:
                self.error(404, "EntryNotFound", "Entry not found")
                return
            content = files[path]
            headers = {"X-Repo-Commit": commit, "ETag": f'"{hashlib.sha256(content).hexdigest()}"'}
            if path.endswith(LARGE):
                headers |= {"X-Linked-Size": str(len(content)), "X-Linked-Etag": headers["ETag"]}
                headers["Location"] = f"http://localhost:{hub.port}/cdn/{name}/{commit}/{path}"
                self.body(302, b"", headers)
            else:
                self.file(path, content, headers)

        def file(self, path: str, content: bytes, headers: dict[str, str]) -> None:
            asked = self.headers.get("Range")
            status, total = 200, len(content)
            if asked and not hub.ignore_ranges:
                first, _, last = asked.removeprefix("bytes=").partition("-")
                start, stop = int(first), min(int(last) + 1 if last else total, total)
                if start >= total:
                    self.body(416, b"", {"Content-Range": f"bytes */{total}"})
                    return
                content = content[start:stop]
                status = 206
                headers = {**headers, "Content-Range": f"bytes {start}-{stop - 1}/{total}"}
            name = path.rpartition("/")[2]
            if self.command == "GET" and hub.drops.get(name, 0) > 0:
                hub.drops[name] -= 1
                self.body(status, content, headers, cut=len(content) // 2)
            else:
                self.body(status, content, headers)

        def error(self, status: int, code: str, message: str) -> None:
            headers = {"X-Error-Message": message, **({"X-Error-Code": code} if code else {})}
            self.body(status, b"", headers)

        def body(self, status: int, content: bytes, headers: dict[str, str], cut: int | None = None) -> None:
            sent = 0 if self.command == "HEAD" else len(content) if cut is None else cut
            token = (self.headers.get("Authorization") or "").removeprefix("Bearer ") or None
            # noted before it is answered, so that a client that has its answer finds its request noted
            hub.requests.append(Request(self.command, unquote(self.path), self.headers.get("Range"), token, sent))
            self.send_response(status)
            for key, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(key, value)
            self.end_headers()
            try:
                self.wfile.write(content[:sent])
            except OSError:  # the client has enough
                self.close_connection = True
            if cut is not None:
                self.close_connection = True

    return Handler
