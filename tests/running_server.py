"""Real processes for end-to-end tests: `hone serve` and `hone worker` on free ports with folders of their own, ended whatever happens."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import httpx

ROOT = Path(__file__).parent.parent
DEMO = ROOT / "app" / "demo_models"
START_S = 60.0


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@dataclass
class Running:
    """A server (and perhaps a worker) of this test."""

    folder: Path
    port: int
    process: subprocess.Popen[bytes]
    environment: dict[str, str]
    others: list[subprocess.Popen[bytes]] = field(default_factory=list)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    @property
    def token(self) -> str:
        return (self.folder / "state" / "admin-token").read_text().strip()

    @property
    def log(self) -> str:
        return (self.folder / "serve.log").read_text()

    def call(self, method: str, path: str, **options: Any) -> httpx.Response:
        return httpx.request(method, self.url + path, timeout=120.0, **options)

    def admin(self, method: str, path: str, status: int | None = None, **options: Any) -> Any:
        """The JSON answer of an admin call; `status` is asserted where given."""
        response = self.call(method, path, headers={"Authorization": f"Bearer {self.token}"}, **options)
        if status is not None:
            assert response.status_code == status, response.text
        return response.json()

    def until(self, reached: Callable[[], Any], seconds: float = 60.0) -> Any:
        """Ask until `reached()` is true; its value. Fails with the server's log after `seconds`."""
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            with contextlib.suppress(httpx.HTTPError):
                if value := reached():
                    return value
            assert self.process.poll() is None, f"the server ended with {self.process.returncode}\n{self.log}"
            time.sleep(0.05)
        raise AssertionError(f"not reached within {seconds} s\n{self.log[-4000:]}")

    def ready(self, *models: str) -> Running:
        for path in ["/v2/health/ready", *(f"/v2/models/{model}/ready" for model in models)]:
            self.until(partial(self.answers, path), START_S)
        return self

    def answers(self, path: str) -> bool:
        return self.call("GET", path).status_code == 200

    def job_done(self, identity: str, seconds: float = 300.0) -> Any:
        """The finished job."""

        def finished() -> Any:
            job = self.admin("GET", f"/admin/jobs/{identity}")
            return job if job["state"] == "finished" else None

        return self.until(finished, seconds)

    def worker(self) -> subprocess.Popen[bytes]:
        """Start a worker beside the server."""
        process = start("worker", self.folder, self.environment)
        self.others.append(process)
        return process

    def restart(self, kill: bool = False) -> Running:
        """End the server (by SIGTERM, or by SIGKILL) and start it again on the same port and folders."""
        self.process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        self.process.wait(60)
        self.process = start("serve", self.folder, self.environment)
        return self

    def end(self) -> None:
        for process in [*self.others, self.process]:
            if process.poll() is None:
                process.terminate()
        for process in [*self.others, self.process]:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(30)
            if process.poll() is None:
                process.kill()
                process.wait()


def start(command: str, folder: Path, environment: dict[str, str]) -> subprocess.Popen[bytes]:
    with (folder / f"{command}.log").open("ab") as log:
        return subprocess.Popen([sys.executable, "-m", "app.cli", command], cwd=ROOT, env=environment, stdout=log, stderr=log)


@contextlib.contextmanager
def server(folder: Path, *, demo: bool = False, **settings: str) -> Iterator[Running]:
    """`hone serve` on FOLDER/models and FOLDER/state; with `demo` the digits model is there. `settings` are HONE_ variables by short name."""
    (folder / "models").mkdir(parents=True, exist_ok=True)
    if demo and not (folder / "models" / "digits").exists():
        shutil.copytree(DEMO / "repository" / "digits", folder / "models" / "digits")
    port = free_port()
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HONE_")},
        "PYTHONPATH": str(ROOT),
        "HONE_REPOSITORY": str(folder / "models"),
        "HONE_STATE": str(folder / "state"),
        "HONE_PORT": str(port),
        "HONE_FACTORIES": str(DEMO / "factories"),
        "HONE_POLL_S": "0.5",
        "HONE_PROOF_SECONDS": "15",
        **{f"HONE_{name.upper()}": value for name, value in settings.items()},
    }
    running = Running(folder, port, start("serve", folder, environment), environment)
    try:
        yield running
    finally:
        running.end()
