"""A web server on this machine that serves a folder in byte ranges, and goes wrong when told to."""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


class Server(ThreadingHTTPServer):
    """Serves a folder in byte ranges. faults: what goes wrong with the next GETs of a name, one after another."""

    daemon_threads = True
    request_queue_size = 128  # where it is full, a connection takes a second

    def __init__(self, folder: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.folder, self.faults = folder, dict[str, list[str]]()
        self.gets, self.heads = Counter[str](), Counter[str]()
        self.lock, self.busy, self.most_busy = threading.Lock(), 0, 0
        self.delay, self.released = 0.0, threading.Event()
        self.url = f"http://127.0.0.1:{self.server_port}"

    def handle_error(self, request: object, client_address: object) -> None:
        """Clients go away in these tests."""


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_HEAD(self) -> None:
        name = self.path.removeprefix("/")
        self.server.heads[name] += 1
        self.answer(name, head=True)

    def do_GET(self) -> None:
        server, name = self.server, self.path.removeprefix("/")
        with server.lock:
            server.gets[name] += 1
            server.busy += 1
            server.most_busy = max(server.most_busy, server.busy)
            fault = server.faults[name].pop(0) if server.faults.get(name) else ""
        try:
            time.sleep(server.delay)
            self.answer(name, fault)
        finally:
            with server.lock:
                server.busy -= 1

    def answer(self, name: str, fault: str = "", head: bool = False) -> None:
        path = self.server.folder / name
        if fault.isdigit() or not path.is_file():
            self.send_error(int(fault or 404))
            return
        data = path.read_bytes()
        self.send_response(206 if "Range" in self.headers and fault != "no ranges" else 200)
        if "Range" in self.headers and fault != "no ranges":
            begin, end = self.headers["Range"].removeprefix("bytes=").split("-")
            self.send_header("Content-Range", f"bytes {begin}-{end}/{len(data)}")
            data = data[int(begin) : int(end) + 1]
        if fault == "short":
            data = data[:-7]
        self.send_header("ETag", f'"{path.stat().st_mtime_ns}"')
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        if fault == "stall":
            self.server.released.wait(25)
        if not head:
            self.wfile.write(data[: len(data) // 2] if fault in ("cut", "stall half") else data)
        if fault == "cut":
            self.close_connection = True
        if fault == "stall half":
            self.wfile.flush()
            self.server.released.wait(25)

    def log_message(self, *_: object) -> None:
        """Not onto the terminal."""


@contextmanager
def serving(folder: Path) -> Iterator[Server]:
    server = Server(folder)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        server.released.set()
        server.shutdown()
        server.server_close()
        thread.join()
