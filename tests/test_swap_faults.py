"""The fault table of a swap: each process killed at each step. Afterwards the desired version serves, and no answer was another version's."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any, Final

import httpx
import numpy as np
import pytest
from onnx import helper

from tests.models import save, value
from tests.running_server import Running, server
from tests.test_faults import alive, name_of
from tests.test_swap import children

LONG: Final = 1.0
"""The input that takes `TURNS` turns of a loop, and so does warming up, which is done on ones; all other inputs take one."""
SHORT: Final = 5.0
TURNS: Final = 150_000
"""A tenth of a second, and more."""

STEPS: Final = ("asked", "opening", "draining", "done")
"""The journal wants the new version · its runner opens and warms up · it serves while the old one still answers what it had · the old one is
kept warm."""
TABLE: Final = [
    *[(victim, step) for victim in ("server", "fork server", "old runner") for step in STEPS],
    *[("new runner", step) for step in STEPS[1:]],
]


def dawdling(path: Path, version: int) -> Path:
    """y [N, 1] = version · x, after many turns of a loop where the least value is LONG."""
    body = helper.make_graph(
        [helper.make_node("Add", ["v", "nought"], ["v2"]), helper.make_node("Identity", ["go"], ["go2"])],
        "body",
        [value("turn", "INT64", []), value("go", "BOOL", []), value("v", "FP32", [1])],
        [value("go2", "BOOL", []), value("v2", "FP32", [1])],
    )
    nodes = [
        helper.make_node("ReduceMin", ["x"], ["least"], keepdims=0),
        helper.make_node("Equal", ["least", "long"], ["is_long"]),
        helper.make_node("Where", ["is_long", "many", "few"], ["turns"]),
        helper.make_node("Loop", ["turns", "yes", "start"], ["nothing"], body=body),
        helper.make_node("Add", ["factor", "nothing"], ["scale"]),
        helper.make_node("Mul", ["x", "scale"], ["y"]),
    ]
    weights: dict[str, Any] = {
        "long": np.float32(LONG), "many": np.array(TURNS), "few": np.array(1), "yes": np.array(True), "nought": np.float32(0),
        "start": np.zeros(1, np.float32), "factor": np.float32(version),
    }  # fmt: skip
    return save(path, nodes, [value("x", "FP32", ["N", 1])], [value("y", "FP32", ["N", 1])], weights)


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """Each case puts the next version there."""
    folder = tmp_path_factory.mktemp("swaps")
    dawdling(folder / "models" / "m" / "1" / "model.onnx", 1)
    (folder / "models" / "m" / "model.yaml").write_text('capture: {mode: "off"}\n')
    with server(folder) as running:
        yield running.ready("m")


class Callers:
    """Two that ask what is short and one that asks what is long, without pause: statuses, and answers that do not fit their version."""

    def __init__(self, running: Running) -> None:
        self.statuses: Counter[object] = Counter()
        self.wrong: list[str] = []
        self._running, self._stop = running, threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(x,)) for x in (SHORT, SHORT, LONG)]

    def __enter__(self) -> Callers:
        for thread in self._threads:
            thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join()

    def _call(self, x: float) -> None:
        while not self._stop.wait(0.005):
            try:
                self._ask(x)
            except httpx.HTTPError as error:
                self.statuses[type(error).__name__] += 1

    def _ask(self, x: float) -> None:
        document = {"inputs": [{"name": "x", "shape": [1, 1], "datatype": "FP32", "data": [x]}]}
        answer = httpx.post(f"{self._running.url}/v2/models/m/infer", json=document, timeout=60)
        self.statuses[answer.status_code] += 1
        if answer.status_code == 200:
            said = answer.json()
            if said["outputs"][0]["data"] != [x * int(said["model_version"])]:
                self.wrong.append(answer.text)


@pytest.mark.parametrize(("victim", "step"), TABLE)
def test_a_kill_of_any_process_at_any_step_of_a_swap_is_repaired(running: Running, tmp_path: Path, victim: str, step: str) -> None:
    version = str(int(running.admin("GET", "/admin/models/m")["active"]) + 1)
    old = {one["pid"] for one in loaded(running)}
    with Callers(running) as callers:
        running.until(lambda: callers.statuses[200] > 20)
        dawdling(tmp_path / "made" / "model.onnx", int(version))
        (tmp_path / "made").rename(running.folder / "models" / "m" / version)
        running.until(partial(at, running, step, version, old), 30)
        kill(running, victim, version, old)
        model = running.until(lambda: (now := running.admin("GET", "/admin/models/m")).get("active") == version and now)
        before = callers.statuses[200]
        running.until(lambda: callers.statuses[200] > before + 20)
    assert not callers.wrong, callers.wrong[:2]
    gone = {"ConnectError", "ReadError", "RemoteProtocolError"} if victim == "server" else set()
    assert set(callers.statuses) <= {200, 503} | gone, callers.statuses
    if victim == "fork server":
        assert set(callers.statuses) == {200}, "no request needs the fork server"
    assert (model["desired"], model["golden"], model["failed"]) == (version, version, {})

    def settled() -> bool:
        present = {one["pid"] for one in loaded(running)}
        return all(map(alive, present)) and not any(map(alive, (old | runners(running)) - present))

    running.until(settled, 20)


def at(running: Running, step: str, version: str, old: set[int]) -> bool:
    """Whether the swap to `version` is at `step`, as it shows from outside."""
    model = running.admin("GET", "/admin/models/m")
    match step:
        case "asked":
            return bool(model["desired"] == version)
        case "opening":
            return bool(runners(running) - old)
        case "draining":
            return bool(model["active"] == version)
        case _:
            return bool(model["active"] == version and not sum(one["inflight"] for one in model["loaded"] if one["version"] != version))


def loaded(running: Running) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = running.admin("GET", "/admin/models/m")["loaded"]
    return found


def runners(running: Running) -> set[int]:
    return {pid for pid in children(running.process.pid) if name_of(pid) == "hone-runner"}


def kill(running: Running, victim: str, version: str, old: set[int]) -> None:
    """`old` are the runners of before; of those the one that served last is the victim."""
    if victim == "server":
        running.restart(kill=True)
        return
    before = [one["pid"] for one in loaded(running) if one["version"] == str(int(version) - 1)]
    pids = {
        "fork server": [pid for pid in children(running.process.pid) if name_of(pid) == "hone-forkserver"],
        "old runner": before,
        "new runner": [pid for pid in runners(running) if pid not in old],
    }[victim]
    assert pids, f"there is no {victim} to kill"
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
