"""What `hone demo --break CAUSE` does to a running server: one real fault each, put back at the end.

Nothing is simulated: neighbours are processes, a slow version is a slower network, a decayed process is one that must share its core. They use
the public API and the demo's own folders alone.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from http.client import HTTPConnection
from pathlib import Path
from typing import Any, Final

from app.client import Client, ClientError
from app.control_group import ancestor_with, quota_of
from app.domain import JSON, short
from app.errors import HoneError
from app.faulty_models import free_size, not_a_number, slower_twin
from app.serving import procfs
from app.traffic import MODEL, Traffic

LEAKY: Final = "leaky-digits"  # a second model, of PyTorch, for the scene that needs one
WARM_S: Final = 25.0
"""Traffic before anything is broken: the loop learns what is normal from some blocks of it."""


@dataclass
class Scene:
    """What an injection may use. `began` and `after`: when the fault itself was put in, and the newest event before it; `name`: whose."""

    client: Client
    traffic: Traffic
    repository: Path
    say: Callable[[str], None]
    name: str = MODEL
    began: float = 0.0
    after: int = 0
    made: list[Path] = field(default_factory=list)
    """What it put into the repository, and nobody else did."""
    config: str | None = None
    """The demo's model.yaml as it was before it was changed here."""

    def deploy(self, make: Callable[[Path, Path], None]) -> str:
        """A version of its own, made of version 1, under a number that no other has: there may be others that a person deployed. Returns it."""
        model = self.repository / MODEL
        number = str(1 + max(int(path.name) for path in model.iterdir() if path.name.isdecimal()))
        folder = model / number
        folder.mkdir()
        self.made.append(folder)
        make(model / "1" / "model.onnx", folder / "model.part")
        os.replace(folder / "model.part", folder / "model.onnx")
        return number

    def put_back(self) -> None:
        """The repository without what was put there, and with the model.yaml that was there before; what a person did to it stays."""
        for folder in self.made:
            shutil.rmtree(folder, ignore_errors=True)
        if self.config is not None:
            (self.repository / MODEL / "model.yaml").write_text(self.config)

    def begin(self) -> None:
        """From here on what the loop says is about the fault."""
        self.after, self.began = newest(self.client, self.name), time.monotonic()

    def as_much_as_it_can(self, rate: float, rows: int, callers: int) -> None:
        """Raise the traffic to `rate`, or to what is answered without a growing queue, and wait until the loop has taken it for normal."""
        for _ in range(10):
            self.traffic.raise_to(rate, rows, callers)
            time.sleep(3.0)
            if self.traffic.behind_s < 0.05:
                break
            rate *= 0.8
        wait(
            lambda: self.model()["loop"]["condition"] == "steady",
            120.0,
            "the loop did not come to rest under the traffic that the scene needs",
        )

    def need_a_third_of_a_core(self) -> None:
        """Traffic that takes so much, learned as normal, and a promise that it keeps."""
        self.traffic.raise_to(rate=min(400.0, 0.33 / self.row_cost_s()), rows=1, callers=16)
        self.say(f"{self.traffic.rate:.0f} requests a second from now on")
        time.sleep(16.0)
        self.promise(2.5)

    def model(self) -> JSON:
        return dict(self.client.model(self.name))

    def runner(self) -> int:
        """Process id of the active version's runner."""
        model = self.model()
        return next(int(one["pid"]) for one in model["loaded"] if one["version"] == model["active"])

    def row_cost_s(self, seconds: float = 5.0) -> float:
        """CPU seconds of the runner for one row, over the next `seconds` of the traffic."""
        before = self._spent()
        time.sleep(seconds)
        after = self._spent()
        rows = (after[1] - before[1]) * self.traffic.rows
        return max(1e-4, (after[0] - before[0]) / max(1.0, rows))

    def cores_used(self, server: int, seconds: float = 3.0) -> float:
        """Cores that the server and its processes use, over the next `seconds`."""
        before = _cpu_s(procfs.descendants(server))
        time.sleep(seconds)
        return max(0.05, (_cpu_s(procfs.descendants(server)) - before) / seconds)

    def _spent(self) -> tuple[float, float]:
        """(CPU seconds of the runners, requests answered), as the metrics have them."""
        found = {"hone_model_cpu_seconds_total{": 0.0, "hone_requests_total{": 0.0}
        with contextlib.closing(HTTPConnection(self.traffic.host, self.traffic.port, timeout=30)) as connection:
            connection.request("GET", "/metrics")
            text = connection.getresponse().read().decode()
        for line in text.splitlines():
            for name in found:
                if line.startswith(name) and f'model="{MODEL}"' in line:
                    found[name] += float(line.rpartition(" ")[2])
        cpu_s, requests = found.values()
        return cpu_s, requests

    def promise(self, factor: float) -> None:
        """Hold the model to `factor` times what the server takes now: the demo's own objective is one that it would not miss."""
        takes_ms = float((self.model()["loop"].get("p95_s") or 0.005) * 1e3)
        milliseconds = max(2.0, round(takes_ms * factor, 1))
        self.set_objective(milliseconds)
        self.say(f"objective from now on: p95 ≤ {milliseconds:g} ms (it takes {short(takes_ms)} ms)")
        time.sleep(4.0)

    def set_objective(self, milliseconds: float) -> None:
        path = self.repository / MODEL / "model.yaml"
        text = path.read_text()
        self.config = text if self.config is None else self.config
        lines = [line for line in text.splitlines() if not line.startswith("objective:")]
        path.write_text("\n".join([*lines, f"objective: {{p95_ms: {milliseconds:g}}}"]) + "\n")


Injection = Callable[[Scene], contextlib.AbstractContextManager[None]]


@contextmanager
def load(scene: Scene) -> Iterator[None]:
    """More requests than the cores can answer."""
    scene.promise(4.0)
    scene.begin()
    scene.traffic.raise_to(rate=2000.0, rows=8, callers=48)
    scene.say("48 callers now send 8 rows at a time, as fast as they are answered")
    yield


@contextmanager
def host(scene: Scene) -> Iterator[None]:
    """Neighbours that want all cores, four for each, beside traffic that needs a third of one."""
    cores = len(os.sched_getaffinity(0))
    scene.need_a_third_of_a_core()
    count = 4 * cores
    scene.begin()
    with programs(count):
        scene.say(f"{count} other programs compute now")
        yield


@contextmanager
def quota(scene: Scene) -> Iterator[None]:
    """The server is held to less of the cores than it needs, as by a container's CPU limit."""
    scene.need_a_third_of_a_core()
    server = ancestor_with(scene.runner(), "serve")
    cores = round(0.7 * scene.cores_used(server), 2)
    scene.begin()
    with quota_of(procfs.descendants(server), cores):
        scene.say(f"the server (pid {server}) and its processes may take {cores:g} cores from now on, which is less than they need")
        yield


@contextmanager
def process(scene: Scene) -> Iterator[None]:
    """The runner's process is held to one core, and other programs compute there; a fresh one could go elsewhere."""
    scene.promise(3.0)
    scene.begin()
    core, pid = max(os.sched_getaffinity(0)), scene.runner()
    count = 6
    with held_to(core, pid), programs(count, core):
        scene.say(f"the runner (pid {pid}) may only use core {core}, and {count} programs compute there")
        yield


@contextmanager
def crash(scene: Scene) -> Iterator[None]:
    """The runner is killed three times."""
    scene.begin()
    for _ in range(3):
        pid = scene.runner()
        os.kill(pid, signal.SIGKILL)
        scene.say(f"killed the runner (pid {pid})")
        time.sleep(2.0)
    yield


@contextmanager
def settings(scene: Scene) -> Iterator[None]:
    """One thread, one call at a time, no batches: settings for another traffic than comes."""
    rows = 8
    scene.traffic.raise_to(rate=40.0, rows=rows, callers=32)
    time.sleep(3.0)
    scene.as_much_as_it_can(rate=1.5 / scene.row_cost_s() / rows, rows=rows, callers=32)
    scene.say(
        f"{scene.traffic.rate:.0f} requests of {rows} rows a second from now on: less than these cores can answer, more than one can row by row"
    )
    time.sleep(16.0)
    scene.promise(3.0)
    scene.begin()
    names = ("intra_op_threads", "instances", "batch_limit", "lone_threads")
    before = {name: scene.model()["settings"][name] for name in names}
    scene.client.change_settings(MODEL, dict(zip(names, (1, 1, 1, 0), strict=True)))
    scene.say("one core, one call at a time, one row a call")
    try:
        yield
    finally:
        scene.client.change_settings(MODEL, before)


@contextmanager
def version(scene: Scene) -> Iterator[None]:
    """A new model that is right but twice as slow is deployed beside an objective that it misses."""
    scene.promise(1.6)
    scene.begin()
    number = scene.deploy(partial(slower_twin, times=3))
    scene.say(f"deployed version {number}: the same network, computed three times over")
    yield


@contextmanager
def wrong(scene: Scene) -> Iterator[None]:
    """A new model that answers NaN is deployed."""
    scene.begin()
    number = scene.deploy(not_a_number)
    scene.say(f"deployed version {number}: it answers NaN where a digit is bright")
    yield


@contextmanager
def inputs(scene: Scene) -> Iterator[None]:
    """An int8 version serves, and the images change: dim and noisy ones, unlike those it was calibrated with."""
    if "." not in scene.model()["active"]:
        scene.say("building an int8 version first …")
        job = scene.client.optimize(MODEL, [["int8-static"]], "for --break input", "auto")["id"]
        wait(lambda: scene.client.job(job)["state"] == "finished", 180.0, f"no int8 version was built in 180 s: see hone jobs {job}")
        if "." not in scene.model()["active"]:
            raise HoneError(f"no int8 version took over: {scene.client.job(job)['report'].get('summary')}")
    scene.say("waiting until it is confirmed beside the version before …")
    wait(lambda: scene.model()["split"] is None, 330.0, "the watch over the int8 version did not end")
    if "." not in scene.model()["active"]:
        raise HoneError("the int8 version did not outlive its watch; look at hone timeline, and try again")
    time.sleep(16.0)
    scene.begin()
    scene.traffic.change = brighter
    scene.say("from now on images are inverted and eight times as bright as any that it was calibrated with")
    yield
    scene.traffic.change = lambda images: images


@contextmanager
def larger(scene: Scene) -> Iterator[None]:
    """A version that takes images of any size serves, and images of twice the side come."""
    number = scene.deploy(free_size)
    scene.say(f"deployed version {number}: the same network for images of any size; waiting until it serves and is known …")
    wait(lambda: scene.model()["active"] == number and scene.model()["split"] is None, 330.0, f"version {number} did not take over")
    time.sleep(WARM_S)
    wait(lambda: scene.model()["loop"]["condition"] == "steady", 120.0, f"the loop did not come to rest under version {number}")
    scene.promise(2.5)
    scene.begin()
    scene.traffic.change = lambda images: images.repeat(2, -1).repeat(2, -2)
    scene.say("from now on images have twice the side")
    yield
    scene.traffic.change = lambda images: images


@contextmanager
def leak(scene: Scene) -> Iterator[None]:
    """A PyTorch model whose code keeps something of every very bright image, and such images come: 8 MB a second are never given back."""
    source, made, target = scene.repository / MODEL, scene.repository / f".{LEAKY}", scene.repository / LEAKY
    if target.exists():
        raise HoneError(f"{target} is there already, and this scene deploys a model of that name: hone remove {LEAKY}, and try again")
    scene.made += [made, target]
    (made / "1").mkdir(parents=True, exist_ok=True)
    shutil.copyfile(source / "1" / "model.safetensors", made / "1" / "model.safetensors")
    (made / "model.yaml").write_text(_LEAKY_YAML)
    os.replace(made, target)
    scene.say(f"deployed {LEAKY}: the same network, run by PyTorch; waiting until it serves …")
    wait(lambda: scene.client.model_ready(LEAKY), 120.0, f"{LEAKY} did not come to serve; see hone timeline")
    scene.name = scene.traffic.model = LEAKY
    time.sleep(WARM_S + 10.0)
    scene.begin()
    scene.traffic.change = brighter
    scene.say("from now on images are very bright, and its code keeps something of each")
    yield
    scene.traffic.change, scene.traffic.model = lambda images: images, MODEL


_LEAKY_YAML: Final = """platform: torch
task: classification
source:
  factory: leaky_digits.py:build
  weights: model.safetensors
  inputs: [{name: image, datatype: FP32, shape: [-1, 1, 32, 32]}]
  outputs: [{name: logits, datatype: FP32, shape: [-1, 10]}]
"""


CAUSES: Final[dict[str, Injection]] = {
    "load": load, "host": host, "quota": quota, "process": process, "settings": settings, "version": version, "wrong": wrong, "input": inputs, "larger": larger,
    "leak": leak, "crash": crash,
}  # fmt: skip


def wait(reached: Callable[[], bool], seconds: float, otherwise: str) -> None:
    until = time.monotonic() + seconds
    while time.monotonic() < until:
        with contextlib.suppress(ClientError):
            if reached():
                return
        time.sleep(0.5)
    raise HoneError(otherwise)


@contextmanager
def held_to(core: int, pid: int) -> Iterator[None]:
    """All threads of a process on one core; afterwards each may go where it could before, and one that came meanwhile where the process could."""
    before: dict[int, set[int]] = {}
    try:
        for thread in _threads(pid):
            with contextlib.suppress(ProcessLookupError):  # it ended just now
                before[thread] = os.sched_getaffinity(thread)
                os.sched_setaffinity(thread, {core})
        yield
    finally:
        for thread in _threads(pid):
            with contextlib.suppress(OSError):
                os.sched_setaffinity(thread, before.get(thread) or before.get(pid) or os.sched_getaffinity(0))


def _threads(pid: int) -> list[int]:
    """None where the process has ended."""
    with contextlib.suppress(OSError):
        return [int(thread) for thread in os.listdir(f"/proc/{pid}/task")]
    return []


@contextmanager
def programs(count: int, core: int | None = None) -> Iterator[None]:
    """So many programs that compute, on one core or wherever they like."""
    neighbours = [busy(core) for _ in range(count)]
    try:
        yield
    finally:
        for neighbour in neighbours:
            neighbour.kill()
            neighbour.wait()


def busy(core: int | None = None) -> subprocess.Popen[bytes]:
    """A program that computes without end, and ends with us; in a session of its own, as the kernel shares cores by session (sched(7))."""
    where = "" if core is None else f"os.sched_setaffinity(0, {{{core}}})"
    code = f"import os\nparent = os.getppid()\n{where}\nwhile os.getppid() == parent:\n    sum(range(200000))"
    return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.DEVNULL, start_new_session=True)


def brighter(images: Any) -> Any:
    return (1.0 - images) * 8.0


def newest(client: Client, name: str) -> int:
    events = client.timeline(model=name, limit=1)["events"]
    return int(events[-1]["seq"]) if events else 0


def _cpu_s(pids: list[int]) -> float:
    return sum(found.cpu_s for pid in pids if (found := procfs.facts(pid)) is not None)
