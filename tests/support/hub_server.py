"""A small Hub on the loopback interface: enough of its HTTP protocol for an unmodified huggingface_hub client.

Repositories hold git-like commits: a commit is a set of files and a parent, its hash covers both, and branches point to
commits. Large files travel by LFS: the client asks where to put them, uploads them, and the commit names their sha256;
downloads are redirected to them. Everything lives in memory.

    with HubServer() as hub:
        subprocess.run(command, env={**os.environ, **hub.environment(tmp_path)})

Served: whoami, card validation (which accepts all), create repository, create branch, preupload, LFS batch, upload and
verify, commit, repository info by revision, tree, resolve (HEAD, GET). A client finds it through
HF_ENDPOINT, read when it is imported.
"""

import base64
import hashlib
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Optional
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_tester"
LARGE = (".safetensors", ".bin", ".onnx")


@dataclass(frozen=True)
class File:
    """One file of a commit.

    Attributes:
        content: its bytes; of a large file, those of its LFS pointer.
        sha256: of the large content, None for a file that git holds itself.
        size: of what a download brings, in bytes.
    """

    content: bytes
    sha256: Optional[str]
    size: int

    @property
    def oid(self) -> str:
        """Hash of the git blob."""
        return hashlib.sha1(b"blob %d\0" % len(self.content) + self.content).hexdigest()


@dataclass(frozen=True)
class Commit:
    """A state of a repository."""

    files: dict[str, File]
    parent: Optional[str]
    message: str

    @property
    def oid(self) -> str:
        """Hash of the files, the parent and the message."""
        tree = [f"{path} {file.oid}" for path, file in sorted(self.files.items())]
        return hashlib.sha1("\n".join([*tree, self.parent or "", self.message]).encode()).hexdigest()


@dataclass
class Repository:
    """Commits by hash, and branches that point to them."""

    private: bool
    commits: dict[str, Commit] = field(default_factory=dict)
    branches: dict[str, str] = field(default_factory=dict)

    def add(self, branch: str, commit: Commit) -> str:
        """Put a commit at the tip of a branch; returns its hash."""
        self.commits[commit.oid] = commit
        self.branches[branch] = commit.oid
        return commit.oid

    def find(self, revision: str) -> Optional[str]:
        """The commit that a branch name or a hash stands for, or None."""
        return self.branches.get(revision, revision if revision in self.commits else None)


class Refused(Exception):
    """An answer that is an error: status, the Hub's error code, a message."""

    def __init__(self, status: int, code: str, message: str):
        super().__init__(message)
        self.status, self.code = status, code


class Handler(BaseHTTPRequestHandler):
    """Answers one request after another on a connection; `self.server.hub` is the state."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        """Keep the test's output clean."""

    def do_GET(self):
        self.serve("GET")

    def do_HEAD(self):
        self.serve("HEAD")

    def do_POST(self):
        self.serve("POST")

    def do_PUT(self):
        self.serve("PUT")

    def serve(self, method: str) -> None:
        """Find the route, read the body, answer."""
        url = urlsplit(self.path)
        path = unquote(url.path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if "chunked" in self.headers.get("Transfer-Encoding", ""):
            body = self.read_chunks()
        try:
            for allowed, pattern, answer in ROUTES:
                match = pattern.fullmatch(path)
                if match and method in allowed:
                    return answer(self, body, parse_qs(url.query), **match.groupdict())
            raise Refused(404, "NotImplemented", f"{method} {path} is not part of this small Hub")
        except Refused as refusal:
            self.reply_json(
                {"error": str(refusal)}, refusal.status, {"X-Error-Code": refusal.code, "X-Error-Message": str(refusal)}
            )

    def read_chunks(self) -> bytes:
        """Read a body that is sent in chunks."""
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def reply(self, content: bytes, status: int = 200, headers: Optional[dict] = None) -> None:
        """Send an answer."""
        self.send_response(status)
        for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def reply_json(self, content, status: int = 200, headers: Optional[dict] = None) -> None:
        """Send JSON."""
        self.reply(json.dumps(content).encode(), status, {"Content-Type": "application/json", **(headers or {})})

    def has_token(self) -> bool:
        """Whether the request carries the owner's token."""
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def need_token(self) -> None:
        """Refuse a request without token."""
        if not self.has_token():
            raise Refused(401, "Unauthorized", "Invalid username or password.")

    def repository(self, repo: str) -> Repository:
        """The repository, where it exists and the caller may see it; the Hub does not tell these cases apart."""
        found = self.server.hub.repositories.get(repo)
        if found is None or (found.private and not self.has_token()):
            raise Refused(404 if self.has_token() else 401, "RepoNotFound", "Repository not found")
        return found

    def commit(self, repo: str, revision: str) -> tuple[str, Commit]:
        """Hash and content of the commit at a revision."""
        repository = self.repository(repo)
        oid = repository.find(revision)
        if oid is None:
            raise Refused(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return oid, repository.commits[oid]

    def whoami(self, body, query):
        self.need_token()
        self.reply_json({"type": "user", "name": "tester", "fullname": "Tester", "orgs": []})

    def validate_card(self, body, query):
        self.reply_json({"errors": [], "warnings": []})

    def create_repository(self, body, query):
        self.need_token()
        wanted = json.loads(body)
        repo = f"{wanted.get('organization') or 'tester'}/{wanted['name']}"
        repositories, url = self.server.hub.repositories, f"{self.server.hub.url}/{repo}"
        if repo in repositories:
            return self.reply_json({"error": "You already created this model repo", "url": url}, 409)
        repositories[repo] = Repository(bool(wanted.get("private")) or wanted.get("visibility") == "private")
        repositories[repo].add("main", Commit({}, None, "initial commit"))
        self.reply_json({"url": url, "name": repo, "id": repo})

    def create_branch(self, body, query, repo, branch):
        self.need_token()
        repository = self.repository(repo)
        if branch in repository.branches:
            raise Refused(409, "Conflict", f"Reference already exists: refs/heads/{branch}")
        start, _ = self.commit(repo, json.loads(body or b"{}").get("startingPoint") or "main")
        repository.branches[branch] = start
        self.reply_json({})

    def preupload(self, body, query, repo, revision):
        self.need_token()
        _, commit = self.commit(repo, revision)
        answers = []
        for file in json.loads(body)["files"]:
            known = commit.files.get(file["path"])
            oid = None if known is None else known.sha256 or known.oid
            mode = "lfs" if file["path"].endswith(LARGE) else "regular"
            answers.append({"path": file["path"], "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        self.reply_json({"files": answers})

    def lfs_batch(self, body, query, repo):
        self.need_token()
        self.repository(repo)
        objects = []
        for wanted in json.loads(body)["objects"]:
            url = f"{self.server.hub.url}/lfs/{wanted['oid']}"
            actions = {"upload": {"href": url}, "verify": {"href": f"{url}/verify"}}
            there = wanted["oid"] in self.server.hub.large
            objects.append({**wanted, **({} if there else {"actions": actions})})
        self.reply_json({"transfer": "basic", "objects": objects})

    def lfs_upload(self, body, query, sha256):
        if hashlib.sha256(body).hexdigest() != sha256:
            raise Refused(400, "BadRequest", "the content does not have the announced sha256")
        self.server.hub.large[sha256] = body
        self.reply(b"")

    def lfs_verify(self, body, query, sha256):
        if len(self.server.hub.large.get(sha256, b"")) != json.loads(body)["size"]:
            raise Refused(404, "NotFound", "this object was not uploaded, or has another size")
        self.reply_json({})

    def lfs_download(self, body, query, sha256):
        self.reply(self.server.hub.large[sha256], headers={"ETag": f'"{sha256}"'})

    def create_commit(self, body, query, repo, revision):
        self.need_token()
        parent, old = self.commit(repo, revision)
        repository = self.repository(repo)
        if revision not in repository.branches:
            raise Refused(400, "BadRequest", f"{revision} is not a branch")
        files, message = dict(old.files), ""
        for line in body.splitlines():
            item = json.loads(line)
            kind, value = item["key"], item["value"]
            if kind == "header":
                message = value["summary"]
                if value.get("parentCommit") not in (None, parent):
                    raise Refused(412, "PreconditionFailed", "A commit has happened since.")
            elif kind == "file":
                content = base64.b64decode(value["content"])
                files[value["path"]] = File(content, None, len(content))
            elif kind == "lfsFile":
                large = self.server.hub.large.get(value["oid"])
                if large is None:
                    raise Refused(400, "BadRequest", f"{value['path']}: its content was not uploaded")
                pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{value['oid']}\nsize {len(large)}\n"
                files[value["path"]] = File(pointer.encode(), value["oid"], len(large))
            elif kind == "deletedFile":
                del files[value["path"]]
            else:
                raise Refused(400, "BadRequest", f"unknown operation {kind}")
        oid = repository.add(revision, Commit(files, parent, message))
        self.reply_json({"success": True, "commitOid": oid, "commitUrl": f"{self.server.hub.url}/{repo}/commit/{oid}"})

    def repository_info(self, body, query, repo, revision="main"):
        oid, commit = self.commit(repo, revision)
        files = [{"rfilename": path} for path in sorted(commit.files)]
        about = {"private": self.repository(repo).private, "downloads": 0, "likes": 0, "tags": []}
        self.reply_json({"id": repo, "sha": oid, "siblings": files, **about})

    def tree(self, body, query, repo, revision, folder=None):
        oid, commit = self.commit(repo, revision)
        prefix = f"{folder.rstrip('/')}/" if folder else ""
        entries = []
        for path, file in sorted(commit.files.items()):
            if path.startswith(prefix):
                entry = {"type": "file", "path": path, "size": file.size, "oid": file.oid}
                if file.sha256:
                    entry["lfs"] = {"oid": file.sha256, "size": file.size, "pointerSize": len(file.content)}
                entries.append(entry)
        if prefix and not entries:
            raise Refused(404, "EntryNotFound", f"{folder} does not exist on {revision}")
        self.reply_json(entries, headers={"X-Repo-Commit": oid})

    def resolve(self, body, query, repo, revision, path):
        oid, commit = self.commit(repo, revision)
        file = commit.files.get(path)
        if file is None:
            raise Refused(404, "EntryNotFound", f"{path} does not exist on {revision}")
        headers = {"X-Repo-Commit": oid, "ETag": f'"{file.oid}"'}
        if file.sha256 is None:
            return self.reply(file.content, headers=headers)
        headers |= {"X-Linked-Etag": f'"{file.sha256}"', "X-Linked-Size": str(file.size)}
        self.reply(b"", 302, {**headers, "Location": f"{self.server.hub.storage_url}/lfs/{file.sha256}"})


# Old repositories have no owner.
REPO, REVISION = r"(?P<repo>[^/]+(?:/[^/]+)?)", r"(?P<revision>[^/]+)"
ROUTES = [
    (methods.split(), re.compile(pattern), answer)
    for methods, pattern, answer in (
        ("GET", r"/api/whoami-v2", Handler.whoami),
        ("POST", r"/api/validate-yaml", Handler.validate_card),
        ("POST", r"/api/repos/create", Handler.create_repository),
        ("POST", rf"/api/models/{REPO}/branch/(?P<branch>.+)", Handler.create_branch),
        ("POST", rf"/api/models/{REPO}/preupload/{REVISION}", Handler.preupload),
        ("POST", rf"/{REPO}\.git/info/lfs/objects/batch", Handler.lfs_batch),
        ("PUT", r"/lfs/(?P<sha256>\w+)", Handler.lfs_upload),
        ("POST", r"/lfs/(?P<sha256>\w+)/verify", Handler.lfs_verify),
        ("GET HEAD", r"/lfs/(?P<sha256>\w+)", Handler.lfs_download),
        ("POST", rf"/api/models/{REPO}/commit/{REVISION}", Handler.create_commit),
        ("GET", rf"/api/models/{REPO}/revision/{REVISION}", Handler.repository_info),
        ("GET", rf"/api/models/{REPO}/tree/{REVISION}(?:/(?P<folder>.+))?", Handler.tree),
        ("GET", rf"/api/models/{REPO}", Handler.repository_info),
        ("GET HEAD", rf"/{REPO}/resolve/{REVISION}/(?P<path>.+)", Handler.resolve),
    )
]


class HubServer:
    """The Hub's state, and the thread that serves it while the `with` block runs.

    Attributes:
        repositories: `owner/name` to `Repository`.
        large: sha256 to content of uploaded large files.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.large: dict[str, bytes] = {}
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.server.hub = self
        self.server.daemon_threads = True

    @property
    def url(self) -> str:
        """Where it listens."""
        return f"http://127.0.0.1:{self.server.server_address[1]}"

    @property
    def storage_url(self) -> str:
        """Where large files are downloaded from: another host name, as on the Hub; the client tells hosts apart."""
        return f"http://localhost:{self.server.server_address[1]}"

    def environment(self, home, token: Optional[str] = TOKEN) -> dict[str, str]:
        """Variables that send a client here, with a cache of its own.

        Args:
            home: folder for the client's cache and token.
            token: None: not logged in.
        """
        variables = {"HF_ENDPOINT": self.url, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1", "HF_HUB_OFFLINE": "0"}
        variables |= {"HF_HUB_DISABLE_TELEMETRY": "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
        return {**variables, "HF_TOKEN": token or "", "TRANSFORMERS_OFFLINE": "0", "NO_PROXY": "127.0.0.1,localhost"}

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc):
        self.server.shutdown()
        self.server.server_close()
