"""A web server that misbehaves when it is told to."""

import socket
import struct
import threading
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote, urlsplit

STALL = 20  # seconds, longer than any test has patience


class Server(ThreadingHTTPServer):
    """Serves a folder, as badly as it is told to.

    Attributes:
        requests: How often each file was asked for.
        faults: What goes wrong with the next requests for a file, one after the other.
        delay: Seconds that each answer takes.
        heard: Path and headers of the last request.
        most: Requests that were answered at the same time, at most.
    """

    daemon_threads = True
    block_on_close = False

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder = folder
        self.requests: Counter[str] = Counter()
        self.faults: dict[str, list[str]] = {}
        self.delay = 0.0
        self.heard: tuple[str, dict[str, str]] = ("", {})
        self.now, self.most = 0, 0
        self.ending = threading.Event()
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"

    def stop(self) -> None:
        self.ending.set()
        self.shutdown()
        self.server_close()

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients that leave are part of the tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server

    def log_message(self, format: str, *args: object) -> None:
        pass

    def do_GET(self) -> None:
        server, name = self.server, unquote(urlsplit(self.path).path).lstrip("/")
        server.requests[name] += 1
        server.heard = self.path, dict(self.headers)
        fault = server.faults[name].pop(0) if server.faults.get(name) else ""
        server.now += 1
        server.most = max(server.most, server.now)
        server.ending.wait(server.delay)
        self.answer(server.folder / name, fault)
        server.now -= 1

    def answer(self, path: Path, fault: str) -> None:
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        content = bytearray(path.read_bytes())
        half = len(content) // 2
        self.close_connection = True
        self.send_response(200)
        if fault == "flipped":
            content[half] ^= 1
        if fault == "long":
            content += content
        if fault != "short, no length":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if fault == "silent":
            self.server.ending.wait(STALL)
        cut = fault in ("stalled", "reset", "short", "short, no length")
        self.wfile.write(content[:half] if cut else content)
        self.wfile.flush()
        if fault == "stalled":
            self.server.ending.wait(STALL)
        if fault == "reset":
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()
