"""An HTTP proxy that fails when told to: what a network and a storage in trouble do to their clients."""

import http.client
import socket
import struct
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass(frozen=True)
class Request:
    method: str
    path: str
    range: str  # of bytes, as in the header; "" without

    def reads(self, name: str) -> bool:
        # The whole last part: a bucket's random name, of which a list is made, can end as a short file name does.
        return self.method == "GET" and self.path.partition("?")[0].rpartition("/")[2] == name


# What can happen to a request: "" it is passed on, a number is the status of an error, and
#   reset     the connection is reset before an answer
#   truncate  the connection is closed after half of the body
#   stall     nothing comes, ever
#   trickle   the first byte of the body, then nothing
#   slow      the answer comes after 0.3 seconds
#   corrupt   the body's first byte is another
Fault = str
ERRORS = {
    "403": ("Forbidden", "AccessDenied", "Access Denied"),
    "500": ("Internal Server Error", "InternalError", "We encountered an internal error."),
    "503": ("Slow Down", "SlowDown", "Please reduce your request rate."),
}


class FaultyServer:
    """A proxy in front of `upstream` (host, port). `plan(request)` chooses each request's fault."""

    def __init__(self, upstream: tuple[str, int]):
        self.plan: Callable[[Request], Fault] = lambda request: ""
        self.requests: list[Request] = []
        self.active = self.most_active = 0  # requests at one time
        self.closing = threading.Event()
        self._lock = threading.Lock()
        outer = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def forward(self) -> None:
                with outer._lock:
                    outer.active += 1
                    outer.most_active = max(outer.most_active, outer.active)
                try:
                    self.answer()
                finally:
                    with outer._lock:
                        outer.active -= 1

            def answer(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                request = Request(self.command, self.path, self.headers.get("Range", ""))
                with outer._lock:
                    outer.requests.append(request)
                    fault = outer.plan(request)
                if fault == "stall":
                    outer.closing.wait()
                if fault in ("stall", "reset"):
                    # With this option the kernel answers with RST, not with an orderly end.
                    self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    self.connection.close()
                    self.close_connection = True
                    return
                if fault == "slow":
                    time.sleep(0.3)
                if fault in ERRORS:
                    reason, code, message = ERRORS[fault]
                    answer = f"<Error><Code>{code}</Code><Message>{message}</Message></Error>".encode()
                    status, headers = int(fault), [("Content-Type", "application/xml")]
                else:
                    connection = http.client.HTTPConnection(*upstream, timeout=30)
                    connection.request(self.command, self.path, body, dict(self.headers))
                    response = connection.getresponse()
                    status, reason, headers, answer = (
                        response.status,
                        response.reason,
                        response.getheaders(),
                        response.read(),
                    )
                    connection.close()
                if fault == "corrupt":
                    answer = bytes([answer[0] ^ 1]) + answer[1:]
                self.send_response_only(status, reason)
                lengths = [value for key, value in headers if key.lower() == "content-length"]  # of HEAD: no body
                for key, value in headers:
                    if key.lower() not in ("content-length", "connection", "transfer-encoding"):
                        self.send_header(key, value)
                self.send_header(
                    "Content-Length", lengths[0] if lengths and self.command == "HEAD" else str(len(answer))
                )
                self.end_headers()
                if self.command == "HEAD":
                    return
                if fault in ("truncate", "trickle"):
                    self.wfile.write(answer[: len(answer) // 2 if fault == "truncate" else 1])
                    self.wfile.flush()
                    self.close_connection = True
                    if fault == "trickle":
                        outer.closing.wait()
                    return
                self.wfile.write(answer)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = forward

            def log_message(self, *args: object) -> None:
                pass

        class Server(ThreadingHTTPServer):
            daemon_threads = True
            block_on_close = False

            def handle_error(self, request: object, client_address: object) -> None:
                pass  # a client that went away is no news

        self._server = Server(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def reads(self, name: str) -> list[str]:
        """The ranges of bytes asked for, of one file."""
        return [request.range for request in self.requests if request.reads(name)]

    def close(self) -> None:
        self.closing.set()
        self._server.shutdown()
        self._server.server_close()
