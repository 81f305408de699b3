"""A server and a worker on 127.0.0.1 as child processes, and one job for each row, asked for as `hone optimize --with` does."""

from __future__ import annotations

import shutil
import socket
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from app import tables
from app.arguments import steps_of
from app.client import Address, Client, ClientError
from app.demo import Children, child_environment
from app.settings import Settings
from benchmarks.machine import Quiet
from examples.resnet18_cifar10.records import Records
from examples.resnet18_cifar10.repository import FACTORIES, MODEL
from examples.resnet18_cifar10.rows import Row

START_S: Final = 180.0
POLL_S: Final = 0.5
JOB_BYTES: Final = {"cpu": 8 << 30, "cuda": 24 << 30}
"""Of a job: 50,000 images are 0.6 GB, and DARTS holds every choice of every layer at once; CUDA's libraries map much that they never touch."""


@dataclass(frozen=True)
class Built:
    """What became of a job. `file` is None where nothing was built; `text` is the service's own report."""

    file: Path | None
    outcome: str
    text: str
    seconds: float


@dataclass(frozen=True)
class Service:
    """The running processes, and their client."""

    state: Path
    children: Children
    client: Client
    say: Callable[[str], None]
    model: str

    def build(self, recipe: str, keep: Path) -> Built:
        """Have `recipe` built and judged; the built file is copied to `keep`, since the server removes what it refuses."""
        began = time.monotonic()
        job = self.client.optimize(self.model, [steps_of(recipe)], "a row of the table", "manual")
        shown, copied, seconds = "", False, 0.0
        while job["state"] != "finished":
            time.sleep(POLL_S)
            self.children.check()
            job = self.client.job(job["id"])
            if (line := tables.progress(job)) != shown:
                self.say(f"{tables.clock(time.time())}  {line}")
                shown = line
            if not copied and job.get("candidates"):
                seconds = time.monotonic() - began
                copied = self._copied(str(job["candidates"][0]), keep)
        return Built(keep if copied else None, str(job["outcome"]), report_of(job), round(seconds or time.monotonic() - began, 1))

    def _copied(self, version: str, keep: Path) -> bool:
        source = self.state / "models" / self.model / version / "model.onnx"
        keep.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(source, keep)
        return True


def build_rows(
    service: Service, chosen: Iterable[Row], found: Records, folder: Path, minutes: float, given: str = "", device: str = "cpu"
) -> None:
    """Have each row built into FOLDER/built and note what became of it. `given`: what the rows that train had beside their minutes."""
    for row in chosen:
        recipe = row.asked(minutes, device)
        service.say(f"\n{row.name}: hone optimize {service.model} --with '{recipe}' --promote manual --wait")
        quiet = Quiet()
        built = service.build(recipe, folder / "built" / f"{row.name}.onnx")
        service.say(f"{row.name}: {built.outcome}: {built.text}")
        found.put_build(row.name, recipe, built, f"{minutes:g} min{given}" if row.trains else "", quiet.report())


def report_of(job: Any) -> str:
    """Why a step was left out, or what the judge said, on one line."""
    report = job.get("report") or {}
    said = [str(one.get("reason", "")) for one in report.get("skipped") or ()]
    said += [str(one.get("summary", "")) for one in report.get("verdicts") or ()]
    return "; ".join(part for part in said if part) or str(report.get("reason") or "")


@contextmanager
def running(
    folder: Path, threads: int, say: Callable[[str], None], model: str = MODEL, factories: Path = FACTORIES, device: str = "cpu"
) -> Iterator[Service]:  # fmt: skip
    """`hone serve` and `hone worker` on FOLDER/repository and FOLDER/state, until the block is left. Raises HoneError and ClientError."""
    settings = Settings(state=folder / "state", port=_free_port(), factories=(factories,))
    environment = child_environment(settings, folder / "repository") | {
        "HONE_JOB_THREADS": str(threads), "HONE_JOB_MEMORY_BYTES": str(JOB_BYTES[device]), "HONE_JOB_DEVICE": device, "HONE_STORE": "",
    }  # fmt: skip
    with Children(settings, environment) as children:
        children.start("serve")
        _until_ready(settings, children, model)
        children.start("worker")
        with Client(_address(settings)) as client:
            yield Service(settings.state, children, client, say, model)


def _until_ready(settings: Settings, children: Children, model: str) -> None:
    deadline = time.monotonic() + START_S
    with Client(_address(settings), timeout_s=10.0) as client:
        while True:
            children.check()
            try:
                if client.model_ready(model):
                    return
            except ClientError:
                pass  # it does not listen yet
            if time.monotonic() > deadline:
                raise ClientError(f"the model did not answer within {START_S:.0f} s; see {children.logs}")
            time.sleep(POLL_S)


def _address(settings: Settings) -> Address:
    return Address.from_env({}, url=f"http://{settings.host}:{settings.port}", state=str(settings.state))


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
