"""A web server that injects faults, and programs that read shards from it."""

import contextlib
import os
import socket
import struct
import subprocess
import sys
import threading
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

from launch import environment
from vae_scale.data.cache import Cache
from vae_scale.data.shards import ShardSet

STALL_SECONDS = 20  # longer than the stall timeout of any test


class Server(ThreadingHTTPServer):
    """Serves a folder.

    Attributes:
        requests: Number of requests for each file.
        faults: Faults of the next requests for each file.
        delay: Seconds before each response.
        last_request: Path and headers of the last request.
        max_active: Maximum number of simultaneous requests.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.faults: dict[str, list[str]] = {}
        self.delay = 0.0
        self.last_request: tuple[str, dict[str, str]] = ("", {})
        self.active, self.max_active = 0, 0
        self.stopped = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.stopped.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignores clients that close the connection."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server, name = self.server, unquote(urlsplit(self.path).path).lstrip("/")
        server.requests[name] += 1
        server.last_request = self.path, dict(self.headers)
        fault = server.faults[name].pop(0) if server.faults.get(name) else ""
        server.active += 1
        server.max_active = max(server.max_active, server.active)
        server.stopped.wait(server.delay)
        self.respond(server.folder / name, fault)
        server.active -= 1

    def respond(self, path: Path, fault: str) -> None:
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        content = bytearray(path.read_bytes())
        half = len(content) // 2
        self.close_connection = True
        self.send_response(200)
        if fault == "bit flip":
            content[half] ^= 1
        if fault == "too long":
            content += content
        if fault != "truncated, no length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "no data":
            self.server.stopped.wait(STALL_SECONDS)
        is_cut = fault in ("stalled", "reset", "truncated", "truncated, no length")
        self.wfile.write(content[:half] if is_cut else content)
        self.wfile.flush()
        if fault == "stalled":
            self.server.stopped.wait(STALL_SECONDS)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


FAST_RETRIES = "from vae_scale.data import remote; remote.RETRY_POLICY = remote.RetryPolicy(3, 0.1, 5.0)\n"
READ_ALL = """
import hashlib, sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from vae_scale.data.cache import Cache
from vae_scale.data.shards import ShardSet
from vae_scale.data.cache import Cache
shards = ShardSet.open(sys.argv[1], Cache(Path(sys.argv[2])))
with ThreadPoolExecutor(4) as pool:
    parts = pool.map(lambda index: shards.read(index).tobytes(), range(len(shards.shards)))
    print(hashlib.sha256(b"".join(parts)).hexdigest())
"""


def start(code: str, *args: object, **extra: str) -> "subprocess.Popen[str]":
    command = [sys.executable, "-c", FAST_RETRIES + code, *map(str, args)]
    return subprocess.Popen(command, env=environment(**extra), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def read_pixels(shards: ShardSet) -> list[bytes]:
    """Returns the pixels of each shard, read by several threads."""
    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(lambda index: shards.read(index).tobytes(), range(len(shards.shards))))


def cache_bytes(cache: Cache) -> int:
    """Returns the size of the cache, including incomplete downloads."""
    total = 0
    for folder, _, names in os.walk(cache.folder):
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                total += Path(folder, name).stat().st_size
    return total
