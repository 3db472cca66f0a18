"""A stand-in for Google Cloud Storage on this machine: its JSON interface, for a few buckets.

gcsfs, TensorStore and `google.cloud.storage` talk to it as they would to the real one. It holds
objects in memory and knows what locks rest on: generations, and what may happen only if an object
has a certain one. `environment` is what processes need to find it.
"""

from __future__ import annotations

import contextlib
import json
import re
import threading
import time
import urllib.parse
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, NamedTuple


class Stored(NamedTuple):
    content: bytes
    generation: int
    updated: str


class Refused(Exception):
    """A request that gets an error: its HTTP status."""

    def __init__(self, status: int):
        super().__init__(status)
        self.status = status


class Buckets:
    """The objects, by bucket and name; each change of one gives it a new generation."""

    def __init__(self, *names: str):
        self.objects: dict[str, dict[str, Stored]] = {name: {} for name in names}
        self.lock = threading.RLock()
        self.generation = 1000
        self.uploads: dict[str, tuple[str, str, dict]] = {}
        self.down = False  # whether it answers no request
        self.requests: list[str] = []

    def bucket(self, name: str) -> dict[str, Stored]:
        if name not in self.objects:
            raise Refused(404)
        return self.objects[name]

    def get(self, bucket: str, name: str, query: dict) -> Stored:
        found = self.bucket(bucket).get(name)
        if found is None:
            raise Refused(404)
        asked = query.get("generation", query.get("ifGenerationMatch"))
        if asked is not None and int(asked) != found.generation:
            raise Refused(412 if "ifGenerationMatch" in query else 404)
        if query.get("ifGenerationNotMatch") == str(found.generation):
            raise Refused(304)
        return found

    def put(self, bucket: str, name: str, content: bytes, query: dict) -> Stored:
        objects = self.bucket(bucket)
        there = objects[name].generation if name in objects else 0
        if "ifGenerationMatch" in query and int(query["ifGenerationMatch"]) != there:
            raise Refused(412)
        self.generation += 1
        now = time.strftime("%Y-%m-%dT%H:%M:%S.000Z", time.gmtime())
        objects[name] = Stored(content, self.generation, now)
        return objects[name]

    def delete(self, bucket: str, name: str, query: dict) -> None:
        self.get(bucket, name, query)
        del self.bucket(bucket)[name]

    def list(self, bucket: str, query: dict) -> dict[str, Any]:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter", "")
        first, end = query.get("startOffset", ""), query.get("endOffset")
        items, prefixes = [], set()
        for name, found in sorted(self.bucket(bucket).items()):
            if not name.startswith(prefix) or name < first or (end and name >= end):
                continue
            rest = name[len(prefix) :]
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest.split(delimiter)[0] + delimiter)
            else:
                items.append(described(bucket, name, found))
        return {"kind": "storage#objects", "items": items, "prefixes": sorted(prefixes)}


def described(bucket: str, name: str, found: Stored) -> dict[str, Any]:
    return {
        "kind": "storage#object",
        "id": f"{bucket}/{name}/{found.generation}",
        "bucket": bucket,
        "name": name,
        "size": str(len(found.content)),
        "generation": str(found.generation),
        "metageneration": "1",
        "contentType": "application/octet-stream",
        "storageClass": "STANDARD",
        "timeCreated": found.updated,
        "updated": found.updated,
    }


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    wbufsize = -1
    buckets: Buckets

    def log_message(self, *_: Any) -> None:
        pass

    def _handle(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        if self.buckets.down:
            self.close_connection = True
            return
        with self.buckets.lock:
            self.buckets.requests.append(f"{self.command} {self.path}")
            try:
                status, headers, answer = self.answer(self.command, self.path, self.headers, body)
            except Refused as e:
                error = {"error": {"code": e.status, "message": "refused", "errors": []}}
                status, headers = e.status, {"Content-Type": "application/json"}
                answer = b"" if e.status == 304 else json.dumps(error).encode()
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        if self.command != "HEAD" and status not in (204, 304):
            self.wfile.write(answer)
        self.wfile.flush()

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = _handle

    def answer(self, method: str, target: str, headers: Any, body: bytes) -> tuple:
        path, _, text = target.partition("?")
        query = dict(urllib.parse.parse_qsl(text, keep_blank_values=True))
        if path.startswith("/batch/"):
            return self._batch(headers, body)
        if path.startswith("/upload/"):
            return self._upload(path, query, headers, body)
        match = re.fullmatch(
            r"(?:/download)?/storage/v1/b/([^/]+)(?:/(o|storageLayout)(?:/(.+))?)?", path
        )
        if not match:
            raise Refused(404)
        bucket, kind, name = (urllib.parse.unquote(x) if x else x for x in match.groups())
        if name and method == "POST":
            return self._copy(bucket, match[3])
        if not name:
            self.buckets.bucket(bucket)
            if kind == "o":
                return as_json(self.buckets.list(bucket, query))
            about = {"kind": "storage#bucket", "id": bucket, "name": bucket, "location": "US"}
            return as_json(about | {"locationType": "region", "metageneration": "1"})
        if method == "DELETE":
            self.buckets.delete(bucket, name, query)
            return 204, {}, b""
        found = self.buckets.get(bucket, name, query)
        if query.get("alt") == "media" or path.startswith("/download"):
            return media(found, headers.get("Range"))
        return as_json(described(bucket, name, found))

    def _copy(self, bucket: str, rest: str) -> tuple:
        match = re.fullmatch(r"(.+)/(moveTo|copyTo|rewriteTo)(?:/b/([^/]+))?/o/(.+)", rest)
        if not match:
            raise Refused(404)
        name, target = (urllib.parse.unquote(match[i]) for i in (1, 4))
        content = self.buckets.get(bucket, name, {}).content
        other = match[3] or bucket
        made = described(other, target, self.buckets.put(other, target, content, {}))
        if match[2] == "moveTo":
            self.buckets.delete(bucket, name, {})
            return as_json(made)
        return as_json({"kind": "storage#rewriteResponse", "done": True, "resource": made})

    def _upload(self, path: str, query: dict, headers: Any, body: bytes) -> tuple:
        bucket = re.search(r"/b/([^/]+)/o", path)[1]
        session = query.get("upload_id")
        if query.get("uploadType") == "resumable" and not session:
            name = query.get("name") or json.loads(body)["name"]
            session = f"upload{len(self.buckets.uploads)}"
            self.buckets.uploads[session] = (name, b"", query)
            place = f"http://{self.headers['Host']}{path}?uploadType=resumable&upload_id={session}"
            return 200, {"Location": place}, b""
        if session:
            name, before, first = self.buckets.uploads[session]
            content = before + body
            self.buckets.uploads[session] = (name, content, first)
            if headers.get("Content-Range", "/1").endswith("/*"):
                return 308, {"Range": f"bytes=0-{len(content) - 1}"}, b""
            query = first
        elif query.get("uploadType") == "multipart":
            about, content = parts(headers, body)
            name = json.loads(about)["name"]
        else:
            name, content = query["name"], body
        return as_json(described(bucket, name, self.buckets.put(bucket, name, content, query)))

    def _batch(self, headers: Any, body: bytes) -> tuple:
        answers = []
        for part in parts(headers, body):
            line = part.split(b"\r\n")[0].decode().split(" ")
            try:
                status = self.answer(line[0], line[1], {}, b"")[0]
            except Refused as e:
                status = e.status
            answers.append(
                "--answers\r\nContent-Type: application/http\r\n\r\n"
                f"HTTP/1.1 {status} Done\r\nContent-Length: 0\r\n\r\n\r\n"
            )
        text = "".join(answers) + "--answers--"
        return 200, {"Content-Type": "multipart/mixed; boundary=answers"}, text.encode()


def parts(headers: Any, body: bytes) -> list[bytes]:
    """The contents of a multipart body."""
    boundary = re.search(r'boundary="?([^";]+)', headers["Content-Type"])[1].encode()
    found = body.split(b"--" + boundary)[1:-1]
    return [
        part.partition(b"\r\n\r\n")[2].removesuffix(b"\r\n")
        if b"\r\n\r\n" in part
        else part.partition(b"\n\n")[2].removesuffix(b"\n")
        for part in found
    ]


def as_json(tree: Any) -> tuple:
    return 200, {"Content-Type": "application/json"}, json.dumps(tree).encode()


def media(found: Stored, asked: str | None) -> tuple:
    headers = {
        "Content-Type": "application/octet-stream",
        "x-goog-generation": str(found.generation),
        "x-goog-stored-content-length": str(len(found.content)),
    }
    if not asked:
        return 200, headers, found.content
    first, last = asked.removeprefix("bytes=").split("-")
    size = len(found.content)
    start = int(first) if first else max(0, size - int(last))
    end = min(int(last), size - 1) if first and last else size - 1
    if start >= size:
        raise Refused(416)
    headers["Content-Range"] = f"bytes {start}-{end}/{size}"
    return 206, headers, found.content[start : end + 1]


class Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: Any) -> None:
        """A client that has gone."""


@contextlib.contextmanager
def serve(*names: str) -> Iterator[tuple[Buckets, str]]:
    """Serves buckets of these names: (their content, the server's address)."""
    buckets = Buckets(*names)
    handler = type("BucketHandler", (Handler,), {"buckets": buckets})
    server = Server(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield buckets, f"http://127.0.0.1:{server.server_address[1]}"
    finally:
        server.shutdown()
        server.server_close()


def environment(address: str) -> dict[str, str]:
    """What gcsfs, TensorStore and Google's own client read to find the stand-in."""
    return {
        "STORAGE_EMULATOR_HOST": address,
        "TENSORSTORE_GCS_HTTP_URL": address,
        "GCE_METADATA_ROOT": address.removeprefix("http://"),
        "GOOGLE_CLOUD_PROJECT": "fake",
        "EPATH_USE_TF": "false",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # else it asks for credentials
    }
