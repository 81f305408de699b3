"""A /metrics port for a process that serves nothing else (the worker). Read-only, one thread."""

from __future__ import annotations

import socket
import threading
from collections.abc import Callable, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from app.bearer import bears
from app.telemetry.metrics import Metrics
from app.telemetry.prometheus import Exporter


def serve_metrics(host: str, port: int, metrics: Metrics, tokens: Callable[[], Sequence[str]] | None = None) -> ThreadingHTTPServer:
    """Answer GET /metrics on `port` until `shutdown`, with `tokens` only to who bears one of them. Raises OSError when the port is taken."""
    exporter = Exporter(metrics, set)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            given = self.headers.get("Authorization", "")
            if tokens is not None and not any(bears(given, token) for token in tokens()):
                self.send_error(401)
                return
            body, content_type = exporter.render(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are not news."""

    family, _, _, _, address = socket.getaddrinfo(host or None, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]

    class Server(ThreadingHTTPServer):
        address_family = family

    server = Server((str(address[0]), port), Handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
