"""A web server on this machine that has one file, and the faults that real ones have."""

import hashlib
import random
import re
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

CONTENT = random.Random(0).randbytes(3_500_000)
SHA256 = hashlib.sha256(CONTENT).hexdigest()
SIZE = len(CONTENT)


class Server(ThreadingHTTPServer):
    """Serves `content`; as each test wants it, it ignores ranges, cuts the connection, ..."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.content, self.etag, self.headers = CONTENT, '"one"', {}
        self.ranges, self.lengths = True, True
        self.cut = lambda number: None  # bytes that request `number` gets, None: all of them
        self.pause = 0.0  # seconds between pieces
        self.asked = []  # the Range of each request, or None
        self.url = f"http://127.0.0.1:{self.server_port}/file"

    def handle_error(self, request, client_address):
        """A client that is gone: no news."""


class Handler(BaseHTTPRequestHandler):
    def log_message(self, *_):
        pass

    def do_GET(self):
        server = self.server
        if self.path == "/moved":
            self.send_response(302)
            for name, value in server.headers.items():
                self.send_header(name, value)
            self.send_header("Location", "/file")
            self.send_header("Content-Length", "0")
            return self.end_headers()
        asked = self.headers.get("Range")
        server.asked.append(asked)
        if self.path != "/file":
            return self.send_error(404)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.ranges else 0
        total = len(server.content)
        if start >= total:
            return self.send_error(416)
        self.send_response(206 if start else 200)
        if start:
            self.send_header("Content-Range", f"bytes {start}-{total - 1}/{total}")
        if server.lengths:
            self.send_header("Content-Length", str(total - start))
        if server.etag:
            self.send_header("ETag", server.etag)
        for name, value in server.headers.items():
            if name != "X-Linked-Etag":
                self.send_header(name, value)
        self.end_headers()
        body = server.content[start:][: server.cut(len(server.asked))]
        for at in range(0, len(body), 100_000):
            self.wfile.write(body[at : at + 100_000])
            time.sleep(server.pause)
        self.close_connection = True
        return None


@contextmanager
def serving():
    """A running `Server`."""
    with Server() as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        yield running
        running.shutdown()
        thread.join()
