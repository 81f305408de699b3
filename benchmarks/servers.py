"""Starts and stops the servers under test as processes of their own, on free ports of this host, and asks them things.

Knows command lines and ports; measures nothing.
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Final, Self

from app.serving.procfs import descendants
from benchmarks.machine import cpu_of_tree

HOST: Final = "127.0.0.1"


class ServerUnderTest:
    """One server process. `stop` ends it and everything below it."""

    def __init__(self, command: list[str], port: int, log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.port = port
        self.log = log
        self.started = time.monotonic()
        with log.open("ab") as file:
            self.process = subprocess.Popen(command, stdout=file, stderr=file, env={**os.environ, **(environment or {})})

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, path: str, timeout_s: float = 120.0) -> float:
        """Seconds from the start of the process to the first 200 on `path`."""
        while time.monotonic() - self.started < timeout_s:
            if self.process.poll() is not None:
                break
            with contextlib.suppress(OSError, http.client.HTTPException):
                if self.ask("GET", path)[0] == 200:
                    return time.monotonic() - self.started
            time.sleep(0.01)
        raise RuntimeError(f"no answer on {path}; the end of {self.log}:\n{self.log.read_text()[-2000:]}")

    def ask(
        self, method: str, path: str, data: bytes = b"", headers: Mapping[str, str] | None = None, timeout_s: float = 60.0
    ) -> tuple[int, Mapping[str, str], bytes]:
        """(status, headers, body) of one request on a connection of its own."""
        connection = http.client.HTTPConnection(HOST, self.port, timeout=timeout_s)
        try:
            connection.request(method, path, data or None, dict(headers or {}))
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read()
        finally:
            connection.close()

    def rest(self, timeout_s: float = 10.0) -> None:
        """Wait until it computes no more: a server that goes on for callers who have left would do so in the next one's turn."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            before = cpu_of_tree(self.pid)
            time.sleep(0.1)
            if cpu_of_tree(self.pid) - before <= 0.02:
                return

    def stop(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(15)
            except subprocess.TimeoutExpired:
                self.process.kill()
                self.process.wait()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Hone(ServerUnderTest):
    """`hone serve` as users start it: every feature on unless `environment` says otherwise."""

    def __init__(self, repository: Path, state: Path, environment: Mapping[str, str] | None = None) -> None:
        port = free_port()
        self.state = state
        command = [sys.executable, "-m", "app.cli", "serve", "--repository", str(repository), "--state", str(state), "--port", str(port)]
        super().__init__(command, port, state.parent / f"{state.name}.log", environment)

    def wait_ready(self, model: str = "", timeout_s: float = 120.0) -> float:
        return self.wait(f"/v2/models/{model}/ready" if model else "/v2/health/ready", timeout_s)

    def admin(self, method: str, path: str, content: Any = None, timeout_s: float = 300.0) -> Any:
        """The answer of the admin side as JSON. Raises RuntimeError with its words where it refuses."""
        token = (self.state / "admin-token").read_text().strip()
        headers = {"Authorization": f"Bearer {token}", "Content-Type": "application/json"}
        status, _, body = self.ask(method, f"/admin{path}", b"" if content is None else json.dumps(content).encode(), headers, timeout_s)
        if status >= 300:
            raise RuntimeError(f"{method} /admin{path}: {status} {body.decode(errors='replace')[:500]}")
        return json.loads(body)

    def settle(self, models: int, timeout_s: float = 120.0) -> None:
        """Wait, bounded, until each model's reference is frozen: background work of the first minutes that no measurement is about."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            events = self.admin("GET", "/timeline?limit=1000")["events"]
            if len({event["model"] for event in events if event["kind"] == "reference.frozen"}) >= models:
                return
            time.sleep(0.2)

    def runners(self) -> list[int]:
        """Pids of the runner processes (children of the fork server)."""
        return [pid for pid in descendants(self.pid) if _comm(pid) == "hone-runner"]


class HoneWorker(ServerUnderTest):
    def __init__(self, repository: Path, state: Path, environment: Mapping[str, str] | None = None) -> None:
        command = [sys.executable, "-m", "app.cli", "worker", "--repository", str(repository), "--state", str(state)]
        super().__init__(command, 0, state.parent / f"{state.name}-worker.log", environment)


class Control(ServerUnderTest):
    def __init__(self, model: Path, folder: Path) -> None:
        port = free_port()
        super().__init__([sys.executable, "-m", "benchmarks.control", str(model), str(port)], port, folder / "control.log")


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind((HOST, 0))
        return int(probe.getsockname()[1])


def _comm(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/comm").read_text().strip()
    except OSError:
        return ""
