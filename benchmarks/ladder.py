"""`python -m benchmarks.ladder [--quick] [--docs]`: bursts of real digits at 0.5 to 2 × golden's capacity, answered with the ladder, and by each version alone.

What counts is *effective accuracy*: the share of all offered requests that were answered rightly and within the objective, from their intended
start. Server, client and model share the cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from benchmarks import machine, models, report
from benchmarks.openloop import Plan, Seen, run_apart
from benchmarks.servers import Hone, HoneWorker

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "loop.md"
ROWS: Final = 4
LOADS: Final = (0.5, 1.0, 1.5, 2.0)
BURSTS: Final = (0.6, 1.4)
"""The load alternates around its mean, burst by burst."""


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="bursts of 3 s instead of 8")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/loop.md")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="hone-ladder-") as name:
        text = _measure(Path(name), 3.0 if arguments.quick else 8.0)
    print(text)
    if arguments.docs:
        DOCUMENT.write_text(report.replaced(DOCUMENT.read_text(), "ladder", lambda: text))
    return 0


def _measure(folder: Path, burst_s: float) -> str:
    repository, state = folder / "repository", folder / "state"
    model = models.demo(repository)
    with np.load(repository / model.name / "samples" / "judging.npz") as samples:
        images, labels = samples["image"].astype(np.float32), samples["labels"]
    config = repository / model.name / "model.yaml"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("objective:")]
    config.write_text(
        "\n".join([*lines, "mode: approve", "objective: {p95_ms: 60}", "capture: off", "runtime: {lone_threads: 0, queue_limit: 256}"])
        + "\n"
    )
    with Hone(repository, state) as hone, HoneWorker(repository, state):
        hone.wait_ready(model.name)
        hone.settle(1)
        job = hone.admin("POST", f"/models/{model.name}/optimize", {"recipe": ["int8-static"], "promote": "manual"})
        faster = _built(hone, job["id"])
        bodies = [
            models.binary_body(model, images[at : at + ROWS]).http("127.0.0.1", hone.port) for at in range(0, len(images) - ROWS, ROWS)
        ]
        plan = Plan("127.0.0.1", hone.port, bodies, 1.0, burst_s, connections=300, keep=True, patience_s=10.0)
        capacity = _capacity(replace(plan, rate=2000.0, seconds=4.0))
        rows: list[list[object]] = []
        for load in LOADS:
            for who, prepare in _settings(hone, model.name, faster).items():
                prepare()
                rows.append([f"{load:g} ×", who, *_burst(plan, capacity * load, images, labels)])
                print(rows[-1], flush=True)
        steps = [
            event for event in hone.admin("GET", f"/timeline?model={model.name}&limit=1000")["events"] if event["kind"] == "ladder.stepped"
        ]
    about = machine.description()
    head = ["load", "answered by", "requests/s offered", "right and in time", "in time", "refused", "answered by golden"]
    where = (
        f"{about['date']} · {about['cpu']}, {about['cores']} cores · host class `{about['host_class']}` · `python -m benchmarks.ladder` · golden's capacity "
        f"{capacity:.0f} requests/s of {ROWS} rows · objective 60 ms · {len(steps)} steps of the ladder in all"
    )
    return f"{where}\n\n{report.table(head, rows)}"


def _settings(hone: Hone, name: str, faster: str) -> dict[str, Callable[[], None]]:
    """How each way of answering is set up; every one begins at rest."""

    def serve(version: str, rungs: list[str]) -> None:
        hone.admin("PUT", f"/models/{name}/ladder", {"rungs": []})  # what is desired may not be a rung
        if hone.admin("GET", f"/models/{name}")["desired"] != version:
            hone.admin("POST", f"/models/{name}/promote", {"version": version, "reason": "benchmark", "force": True})
        if rungs:
            hone.admin("PUT", f"/models/{name}/ladder", {"rungs": rungs})
        time.sleep(3.0)

    return {
        "golden (fp32)": lambda: serve("1", []),
        f"{faster} (int8)": lambda: serve(faster, []),
        "the ladder": lambda: serve("1", [faster]),
    }


def _built(hone: Hone, identity: str) -> str:
    until = time.monotonic() + 300
    while time.monotonic() < until:
        job = hone.admin("GET", f"/jobs/{identity}")
        if job["state"] == "finished":
            if not job["candidates"]:
                raise RuntimeError(f"nothing was built: {job['report']}")
            return str(job["candidates"][-1])
        time.sleep(0.5)
    raise RuntimeError("the job did not end in five minutes")


def _capacity(plan: Plan) -> float:
    """Answers a second while far more is offered."""
    seen = run_apart(plan)
    return float(np.count_nonzero(seen.status == 200)) / plan.seconds


def _burst(plan: Plan, rate: float, images: NDArray[Any], labels: NDArray[Any]) -> list[object]:
    seen = [run_apart(replace(plan, rate=rate * share, seed=number)) for number, share in enumerate((*BURSTS, *BURSTS))]
    total = sum(len(one.status) for one in seen)
    timely = [(one.status == 200) & (one.latency_s <= 0.060) for one in seen]
    right = sum(_right(one, late, labels) for one, late in zip(seen, timely, strict=True))
    golden = sum(int(np.count_nonzero((one.status == 200) & (one.version.astype(str) == "1"))) for one in seen)
    answered = sum(int(np.count_nonzero(one.status == 200)) for one in seen)
    refused = sum(int(np.count_nonzero(one.status == 429)) for one in seen)
    return [
        f"{rate:.0f}", f"{right / total:.1%}", f"{sum(int(t.sum()) for t in timely) / total:.1%}", f"{refused / total:.1%}", f"{golden / max(1, answered):.0%}",
    ]  # fmt: skip


def _right(seen: Seen, timely: NDArray[np.bool_], labels: NDArray[Any]) -> float:
    """Of the timely answers the sum of the shares of their rows that are right."""
    score = 0.0
    for number in np.flatnonzero(timely):
        scores = np.frombuffer(seen.body[number][-ROWS * 40 :], np.float32).reshape(ROWS, 10)
        at = int(seen.request[number]) * ROWS
        score += float((scores.argmax(1) == labels[at : at + ROWS]).mean())
    return score


if __name__ == "__main__":
    sys.exit(main())
