"""A bucket of Google Cloud Storage in memory, behind the part of its JSON API that TensorStore and gcsfs speak.

Generations count up with every write of the bucket, and `ifGenerationMatch` is obeyed: OCDBT relies on both.
"""

import base64
import contextlib
import email
import email.policy
import hashlib
import http.server
import itertools
import json
import re
import sys
import threading
from collections.abc import Iterator
from urllib.parse import parse_qs, unquote, urlsplit

OBJECT = re.compile(r"(?:/download)?/storage/v1/b/([^/]+)/o/([^/]+)")
COPY = re.compile(OBJECT.pattern + r"/(?:rewriteTo/b/[^/]+|moveTo)/o/([^/]+)")
INSIDE_BATCH = re.compile(rb"^DELETE (\S+)", re.MULTILINE)


class Bucket:
    """objects: content and generation by name. refuses: everything, as of somebody without the right to."""

    def __init__(self):
        self.objects: dict[str, tuple[bytes, int]] = {}
        self.refuses = False
        self.generations = itertools.count(1)
        self.lock = threading.Lock()

    def put(self, name: str, content: bytes, match: str | None = None) -> dict | None:
        """Its description, or None where the object has another generation than asked for."""
        with self.lock:
            if match is not None and int(match) != self.objects.get(name, (b"", 0))[1]:
                return None
            self.objects[name] = content, next(self.generations)
            return self.describe(name)

    def describe(self, name: str) -> dict:
        content, generation = self.objects[name]
        return {
            "kind": "storage#object",
            "bucket": "bucket",
            "name": name,
            "size": str(len(content)),
            "generation": str(generation),
            "metageneration": "1",
            "md5Hash": base64.b64encode(hashlib.md5(content).digest()).decode(),
            "updated": "2026-01-01T00:00:00.000Z",
            "timeCreated": "2026-01-01T00:00:00.000Z",
        }

    def listing(self, query: dict[str, str]) -> dict:
        prefix, delimiter = query.get("prefix", ""), query.get("delimiter")
        items, prefixes = [], set()
        for name in sorted(self.objects):
            rest = name.removeprefix(prefix)
            if not name.startswith(prefix) or not query.get("startOffset", "") <= name:
                continue
            if delimiter and delimiter in rest:
                prefixes.add(prefix + rest[: rest.index(delimiter) + 1])
            else:
                items.append(self.describe(name))
        limit = int(query.get("maxResults", 1000))
        return {"kind": "storage#objects", "items": items[:limit], "prefixes": sorted(prefixes)[:limit]}


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # head and body of an answer are written apart: 40 ms otherwise
    bucket: Bucket

    def log_message(self, *args):
        pass

    def _answer(self, status: int, body: bytes | dict = b"", kind: str = "application/json", **headers: str) -> None:
        body = json.dumps(body).encode() if isinstance(body, dict) else body
        self.send_response(status)
        for name, value in {"Content-Type": kind, "Content-Length": str(len(body)), **headers}.items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        self.wfile.write(body)

    def _read(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _serve(self) -> None:
        url = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(url.query).items()}
        body = self._read()
        if self.bucket.refuses:
            return self._answer(403, {"error": {"code": 403, "message": "you may not"}})
        if match := COPY.fullmatch(url.path):
            if unquote(match[2]) not in self.bucket.objects:
                return self._answer(404, {"error": {"code": 404, "message": f"no object {match[2]}"}})
            content, _ = self.bucket.objects[unquote(match[2])]
            described = self.bucket.put(unquote(match[3]), content)
            if "/moveTo/" in url.path:
                del self.bucket.objects[unquote(match[2])]
                return self._answer(200, described)
            return self._answer(200, {"kind": "storage#rewriteResponse", "done": True, "resource": described})
        if match := OBJECT.fullmatch(url.path):
            return self._object(unquote(match[2]), query)
        if url.path.startswith("/upload/"):
            return self._upload(query, body)
        if url.path == "/batch/storage/v1":
            return self._batch(body)
        if url.path == "/storage/v1/b/bucket":
            return self._answer(200, {"kind": "storage#bucket", "name": "bucket"})
        if url.path == "/storage/v1/b/bucket/o":
            return self._answer(200, self.bucket.listing(query))
        return self._answer(404, {"error": {"code": 404, "message": f"no {self.path}"}})

    do_GET = do_POST = do_PUT = do_DELETE = _serve

    def _object(self, name: str, query: dict[str, str]) -> None:
        if name not in self.bucket.objects:
            return self._answer(404, {"error": {"code": 404, "message": f"no object {name}"}})
        content, generation = self.bucket.objects[name]
        if self.command == "DELETE":
            with self.bucket.lock:
                self.bucket.objects.pop(name, None)
            return self._answer(204)
        if query.get("ifGenerationNotMatch") == str(generation):
            return self._answer(304)
        if query.get("ifGenerationMatch", str(generation)) != str(generation):
            return self._answer(412, {"error": {"code": 412, "message": "another generation"}})
        if query.get("alt") != "media":
            return self._answer(200, self.bucket.describe(name))
        headers = {"x_goog_generation": str(generation), "x_goog_stored_content_length": str(len(content))}
        kind, status = "application/octet-stream", 200
        if match := re.fullmatch(r"bytes=(\d*)-(\d*)", self.headers.get("Range", "")):
            first = int(match[1]) if match[1] else len(content) - int(match[2])
            last = min(int(match[2]), len(content) - 1) if match[1] and match[2] else len(content) - 1
            headers["Content_Range"] = f"bytes {first}-{last}/{len(content)}"
            content, status = content[first : last + 1], 206
        return self._answer(status, content, kind, **headers)

    def _upload(self, query: dict[str, str], body: bytes) -> None:
        name = query.get("name")
        if query.get("uploadType") == "resumable" and self.command == "POST":
            return self._answer(200, Location=f"http://{self.headers['Host']}/upload/storage/v1/b/bucket/o?name={name}")
        if query.get("uploadType") == "multipart":
            head = f"Content-Type: {self.headers['Content-Type']}\n\n".encode()
            description, content = email.message_from_bytes(head + body, policy=email.policy.HTTP).iter_parts()
            name, body = json.loads(description.get_content())["name"], content.get_payload(decode=True)
        described = self.bucket.put(unquote(name), body, query.get("ifGenerationMatch"))
        if described is None:
            return self._answer(412, {"error": {"code": 412, "message": "another generation"}})
        return self._answer(200, described)

    def _batch(self, body: bytes) -> None:
        parts = []
        for index, path in enumerate(INSIDE_BATCH.findall(body), 1):
            with self.bucket.lock:
                self.bucket.objects.pop(unquote(OBJECT.match(path.decode())[2]), None)
            parts.append(
                f"--end\r\nContent-Type: application/http\r\nContent-ID: <response-{index}>\r\n\r\n"
                "HTTP/1.1 204 No Content\r\n\r\n\r\n"
            )
        self._answer(200, ("".join(parts) + "--end--\r\n").encode(), "multipart/mixed; boundary=end")


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request, client_address):
        """A client that has hung up is no error."""
        if not isinstance(sys.exception(), ConnectionError):
            super().handle_error(request, client_address)


@contextlib.contextmanager
def serve() -> Iterator[tuple[Bucket, str]]:
    """The bucket, which is called 'bucket', and the address of its server."""
    bucket = Bucket()
    handler = type("Handler", (_Handler,), {"bucket": bucket})
    server = _Server(("127.0.0.1", 0), handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield bucket, f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()
        thread.join()


def environment(url: str) -> dict[str, str]:
    """Variables by which TensorStore and gcsfs (through fsspec) find the bucket there and ask for no credentials."""
    return {
        "TENSORSTORE_GCS_HTTP_URL": url,
        "GOOGLE_AUTH_TOKEN_FOR_TESTING": "none",
        "STORAGE_EMULATOR_HOST": url,
        "GOOGLE_CLOUD_PROJECT": "none",
        "FSSPEC_GCS_TOKEN": "anon",
        "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",
    }
