"""A /metrics port for a process that serves nothing else (the worker). Read-only, one thread."""

from __future__ import annotations

import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

from app.telemetry.metrics import Metrics
from app.telemetry.prometheus import Exporter


def serve_metrics(host: str, port: int, metrics: Metrics) -> ThreadingHTTPServer:
    """Answer GET /metrics on `port` until `shutdown`. Raises OSError when the port is taken."""
    exporter = Exporter(metrics, set)

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            if self.path.partition("?")[0] != "/metrics":
                self.send_error(404)
                return
            body, content_type = exporter.render(self.headers.get("Accept", ""))
            self.send_response(200)
            self.send_header("Content-Type", content_type)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, format: str, *args: object) -> None:
            """Scrapes are not news."""

    server = ThreadingHTTPServer((host, port), Handler)
    threading.Thread(target=server.serve_forever, name="metrics", daemon=True).start()
    return server
