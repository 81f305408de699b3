"""`python -m benchmarks.ladder [--quick] [--steady MINUTES] [--docs]`: bursts of real digits at 0.5 to 2 × golden's capacity, answered with the
ladder, and by each version alone; or how often the ladder steps on steady load.

Three versions: golden, int8 that is as right, and one with a quarter of the channels, in int8 too, that is quickest and errs more often. What
counts is *effective accuracy*: the share of all offered requests that were answered rightly and within the objective, from their intended
start. Server, client and model share the cores.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from app.demo import SHIPPED
from benchmarks import machine, models, report
from benchmarks.openloop import Plan, Seen, run_apart
from benchmarks.servers import Hone, HoneWorker

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "loop.md"
ROWS: Final = 4
LOADS: Final = (0.5, 1.0, 1.5, 2.0)
BURSTS: Final = (0.6, 1.4)
"""The load alternates around its mean, burst by burst."""
TURNS: Final = 3
"""So many bursts of each kind."""
STEADY: Final = (0.5, 0.9, 1.2)
PART_S: Final = 60.0
"""A steady load is offered in parts of this length, so that its answers need not all be kept at once."""
INT8: Final[list[dict[str, Any]]] = [{"method": "int8-static"}]
SMALL: Final[list[dict[str, Any]]] = [
    {"method": "structured-pruning", "ratio": 0.75, "epochs": 8, "minutes": 3.0},
    {"method": "int8-static"},
]


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.ladder", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--quick", action="store_true", help="bursts of 3 s instead of 8")
    parser.add_argument(
        "--steady",
        type=float,
        default=0.0,
        metavar="MINUTES",
        help="steps of the ladder in so many minutes of each steady load, in place of bursts",
    )
    parser.add_argument("--docs", action="store_true", help="write the table into docs/loop.md")
    arguments = parser.parse_args(argv)
    with tempfile.TemporaryDirectory(prefix="hone-ladder-") as name:
        if arguments.steady:
            part, text = "steady", _steady(Path(name), arguments.steady * 60)
        else:
            part, text = "ladder", _bursts(Path(name), 3.0 if arguments.quick else 8.0)
    print(text)
    if arguments.docs:
        DOCUMENT.write_text(report.replaced(DOCUMENT.read_text(), part, lambda: text))
    return 0


@dataclass(frozen=True)
class Stage:
    """A running server of the three versions, and what is asked of it. `capacity`: golden's, in requests a second."""

    hone: Hone
    name: str
    int8: str
    small: str
    plan: Plan
    images: NDArray[Any]
    labels: NDArray[Any]
    capacity: float

    def steps(self) -> int:
        events = self.hone.admin("GET", f"/timeline?model={self.name}&limit=1000")["events"]
        return sum(event["kind"] == "ladder.stepped" for event in events)

    def about(self, options: str = "") -> str:
        about = machine.description()
        return (
            f"{about['date']} · {about['cpu']}, {about['cores']} cores · host class `{about['host_class']}` · `python -m benchmarks.ladder{options}` · "
            f"golden's capacity {self.capacity:.0f} requests/s of {ROWS} rows · objective 60 ms"
        )


@contextmanager
def _stage(folder: Path) -> Iterator[Stage]:
    repository, state = folder / "repository", folder / "state"
    model = models.demo(repository)
    with np.load(repository / model.name / "samples" / "judging.npz") as samples:
        images, labels = samples["image"].astype(np.float32), samples["labels"]
    config = repository / model.name / "model.yaml"
    lines = [line for line in config.read_text().splitlines() if not line.startswith("objective:")]
    lines += ["mode: approve", "objective: {p95_ms: 60}", "capture: off", "runtime: {lone_threads: 0, queue_limit: 256}"]
    config.write_text("\n".join([*lines, "quality: {floor: 0.8}"]) + "\n")
    factories = {"HONE_FACTORIES": str(SHIPPED / "factories")}
    with Hone(repository, state, factories) as hone:
        hone.wait_ready(model.name)
        hone.settle(1)
        with HoneWorker(repository, state, factories):
            int8, small = (_built(hone, model.name, recipe) for recipe in (INT8, SMALL))
        bodies = [
            models.binary_body(model, images[at : at + ROWS]).http("127.0.0.1", hone.port) for at in range(0, len(images) - ROWS, ROWS)
        ]
        plan = Plan("127.0.0.1", hone.port, bodies, 1.0, 4.0, connections=600, keep=True, patience_s=10.0)
        yield Stage(hone, model.name, int8, small, plan, images, labels, _capacity(plan))


def _bursts(folder: Path, burst_s: float) -> str:
    with _stage(folder) as stage:
        rows: list[list[object]] = []
        for load in LOADS:
            for who, prepare in _settings(stage.hone, stage.name, stage.int8, stage.small).items():
                prepare()
                seen = [
                    run_apart(replace(stage.plan, rate=stage.capacity * load * share, seconds=burst_s, seed=number))
                    for number, share in enumerate(BURSTS * TURNS)
                ]
                rows.append([f"{load:g} ×", who, *_figures(seen, stage, burst_s * len(seen))])
                print(rows[-1], flush=True)
        head = ["load", "answered by", "requests/s offered", "right and in time", "in time", "refused", "answers by version"]
        return f"{stage.about()} · {stage.steps()} steps of the ladder in all\n\n{report.table(head, rows)}"


def _steady(folder: Path, seconds: float) -> str:
    with _stage(folder) as stage:
        rows: list[list[object]] = []
        for load in STEADY:
            _settings(stage.hone, stage.name, stage.int8, stage.small)["the ladder"]()
            before = stage.steps()
            parts = max(1, round(seconds / PART_S))
            seen = [run_apart(replace(stage.plan, rate=stage.capacity * load, seconds=seconds / parts, seed=part)) for part in range(parts)]
            rows.append([f"{load:g} ×", f"{seconds / 60:g}", stage.steps() - before, *_figures(seen, stage, seconds)])
            print(rows[-1], flush=True)
        head = ["load", "minutes", "steps", "requests/s offered", "right and in time", "in time", "refused", "answers by version"]
        return f"{stage.about(f' --steady {seconds / 60:g}')}\n\n{report.table(head, rows)}"


def _settings(hone: Hone, name: str, int8: str, small: str) -> dict[str, Callable[[], None]]:
    """How each way of answering is set up; every one begins at rest."""

    def serve(version: str, rungs: list[str]) -> None:
        hone.admin("PUT", f"/models/{name}/ladder", {"rungs": []})  # what is desired may not be a rung
        time.sleep(2.0)  # who stood in steps back
        if hone.admin("GET", f"/models/{name}")["desired"] != version:
            hone.admin("POST", f"/models/{name}/promote", {"version": version, "reason": "benchmark", "force": True})
        if rungs:
            hone.admin("PUT", f"/models/{name}/ladder", {"rungs": rungs})
        time.sleep(2.0)

    return {
        "golden (fp32)": lambda: serve("1", []),
        f"{int8} (int8)": lambda: serve(int8, []),
        f"{small} (small)": lambda: serve(small, []),
        "the ladder": lambda: serve("1", [int8, small]),
    }


def _built(hone: Hone, name: str, recipe: list[dict[str, Any]]) -> str:
    """The version that was built by the recipe, proven."""
    identity = hone.admin("POST", f"/models/{name}/optimize", {"recipe": recipe, "promote": "manual"})["id"]
    until = time.monotonic() + 600
    while time.monotonic() < until:
        job = hone.admin("GET", f"/jobs/{identity}")
        if job["state"] == "finished":
            if job["outcome"] not in {"kept", "inconclusive"}:
                raise RuntimeError(f"{job['outcome']}: {job['report']}")
            return str(job["candidates"][-1])
        time.sleep(0.5)
    raise RuntimeError("the job did not end in ten minutes")


def _capacity(plan: Plan) -> float:
    """The most answers a second at any offered rate: rising by a third until a third is not answered, so that no flood of refusals is part of it."""
    best, rate = 0.0, 60.0
    while True:
        seen = run_apart(replace(plan, rate=rate))
        answered = float(np.count_nonzero(seen.status == 200)) / plan.seconds
        best = max(best, answered)
        if answered < rate / 1.5 or rate > 5000:
            return best
        rate *= 1.33


def _figures(seen: list[Seen], stage: Stage, seconds: float) -> list[object]:
    total = sum(len(one.status) for one in seen)
    timely = [(one.status == 200) & (one.latency_s <= 0.060) for one in seen]
    right = sum(_right(one, late, stage.labels) for one, late in zip(seen, timely, strict=True))
    by = np.concatenate([one.version.astype(str)[one.status == 200] for one in seen])
    shares = " + ".join(f"{share:.0%} {version}" for version in sorted(set(by)) if (share := float((by == version).mean())) >= 0.005)
    refused = sum(int(np.count_nonzero(one.status == 429)) for one in seen)
    return [
        f"{total / seconds:.0f}", f"{right / total:.1%}", f"{sum(int(t.sum()) for t in timely) / total:.1%}", f"{refused / total:.1%}", shares,
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
