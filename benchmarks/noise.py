"""`python -m benchmarks.noise [--minutes N] [--servers N] [--kept FILE] [--docs]`: a healthy server on a noisy machine, for hours; whom it blames, what it changes.

`hone serve` and `hone worker` with the loop on; real digits by an open loop, and a second model whose weights do not fit the cache. Neighbours
(real processes, or a quota) and the load change each minute, nothing is ever wrong with a model. So each blame on a version, a process, inputs or
settings is a false one, and so is each change that the loop makes.
"""

from __future__ import annotations

import argparse
import itertools
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np

from app.control_group import check_quota_possible, quota_of
from app.errors import HoneError
from app.serving import procfs
from app.traffic import MODEL, RATE, Traffic
from benchmarks import models, report
from benchmarks.kept import Kept, head
from benchmarks.neighbours import NONE, neighbours
from benchmarks.servers import HOST, Hone, HoneWorker

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "loop-detection.md"
QUOTA: Final = "quota"
QUOTA_CORES: Final = 1.0
"""What all servers together may take of the cores in that minute, by a control group: nobody beside, and half a machine of two cores."""
BESIDE: Final = (NONE, "cpu1", "cpu2", "cpu4", "mem2", "burst2", QUOTA)
PHASE_S: Final = 60.0
STEADY, RAMP = "steady", "ramp"
LEARNT_S: Final = 30.0
"""What is normal is learned of quiet blocks, before the first minute."""
PEAK: Final = 400.0
"""Requests a second at the top of a ramp: half of what the demo's model can answer on two cores, more than is left beside neighbours."""
LARGE: Final = "large"
LARGE_RATES: Final = (10.0, 1.0)
"""Of the second model, by server in turns: one request a second is too few for a block to tell anything, and finds caches that are others' by then."""
LARGE_MB: Final = 48
FALSE: Final = ("version", "process", "input", "settings")
CHANGES: Final = ("desired.changed", "settings.changed", "runner.restarted", "job.requested", "ladder.stepped")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.noise", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--minutes", type=float, default=480.0, help="how long, beside what is kept already (480)")
    parser.add_argument("--servers", type=int, default=1, metavar="N", help="so many at the same time, each beside the others (1)")
    parser.add_argument(
        "--kept", type=Path, metavar="FILE", help="keep each server's minute here as a line of JSON; the table counts all of them"
    )
    parser.add_argument("--docs", action="store_true", help="write the table into docs/loop-detection.md")
    arguments = parser.parse_args(argv)
    kept = Kept(arguments.kept)
    kinds = _kinds()
    with tempfile.TemporaryDirectory(prefix="hone-noise-") as name, ExitStack() as stack:
        rates = itertools.cycle(LARGE_RATES)
        servers = [
            stack.enter_context(_served(Path(name) / str(number), rate))
            for number, rate in zip(range(arguments.servers), rates, strict=False)
        ]
        time.sleep(LEARNT_S)
        for phase in _phases(servers, kinds, arguments.minutes * 60, len(kept.of("minute"))):
            print(kept.add("minute", phase), flush=True)
    minutes = kept.of("minute")
    text = told(minutes)
    print(text)
    if arguments.docs:
        DOCUMENT.write_text(report.replaced(DOCUMENT.read_text(), "noise", lambda: text))
    return 1 if any(phase["changes"] or set(phase["blamed"]) & set(FALSE) for phase in minutes) else 0


@dataclass
class _Server:
    """A running server, what is asked of it, and what was read of its timeline."""

    hone: Hone
    digits: Traffic
    rows: Traffic
    newest: int = 0
    sent: int = 0
    failed: int = 0

    def news(self) -> dict[str, Any]:
        """What was told, sent and failed since it was asked last."""
        events = self.hone.admin("GET", f"/timeline?after={self.newest}&limit=1000")["events"]
        self.newest = events[-1]["seq"] if events else self.newest
        sent, failed = self.digits.sent + self.rows.sent, self.digits.failed + self.rows.failed
        before, self.sent, self.failed = (self.sent, self.failed), sent, failed
        return {**counted(events), "sent": sent - before[0], "failed": failed - before[1]}


@contextmanager
def _served(folder: Path, large_rate: float) -> Iterator[_Server]:
    repository, state = folder / "repository", folder / "state"
    demo = models.demo(repository)
    large = models.heavy(repository, LARGE, LARGE_MB)
    with np.load(repository / MODEL / "samples" / "judging.npz") as samples:
        images = samples["image"]
    with (
        Hone(repository, state) as hone,
        HoneWorker(repository, state),
        Traffic(HOST, hone.port, images, RATE, callers=16) as digits,
        Traffic(HOST, hone.port, large.rows(64), large_rate, model=LARGE, input=large.input) as rows,
    ):
        for model in (demo, large):
            hone.wait_ready(model.name)
        hone.settle(2)
        yield _Server(hone, digits, rows)


def _kinds() -> list[tuple[str, str]]:
    """Kinds of minutes, as (beside, load). Where no quota can be set there is none under one, which is said."""
    try:
        check_quota_possible()
        beside: Sequence[str] = BESIDE
    except HoneError as error:
        print(f"no minute under a quota: {error}", file=sys.stderr)
        beside = [name for name in BESIDE if name != QUOTA]
    return list(itertools.product(beside, (STEADY, RAMP)))


def _phases(servers: Sequence[_Server], kinds: Sequence[tuple[str, str]], seconds: float, number: int) -> Iterator[dict[str, Any]]:
    """What the timeline of each server says of each minute; they go on where those that are kept ended."""
    for server in servers:
        server.news()  # starts, deploys and what was sent before
    ended = time.monotonic() + seconds
    while time.monotonic() < ended:
        beside, load = kinds[number % len(kinds)]
        with _beside(beside, servers):
            _drive([server.digits for server in servers], load)
        for server in servers:
            yield {
                "beside": beside,
                "load": load,
                "servers": len(servers),
                "large_rps": server.rows.rate,
                "seconds": PHASE_S,
                **server.news(),
            }
        number += 1


def _beside(name: str, servers: Sequence[_Server]) -> AbstractContextManager[None]:
    """What makes the noise of one phase."""
    if name != QUOTA:
        return neighbours(name)
    return quota_of([pid for server in servers for pid in procfs.descendants(server.hone.pid)], QUOTA_CORES)


def _drive(traffics: Sequence[Traffic], load: str) -> None:
    """One phase: as ever, or up to the peak, which several servers share, and down again."""
    began = time.monotonic()
    while (at := (time.monotonic() - began) / PHASE_S) < 1.0:
        if load == RAMP:
            for traffic in traffics:
                traffic.raise_to(RATE + (PEAK / len(traffics) - RATE) * (1 - abs(2 * at - 1)), traffic.rows, traffic.callers)
        time.sleep(1.0)
    for traffic in traffics:
        traffic.raise_to(RATE, traffic.rows, traffic.callers)


def counted(events: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Suspicions by kind, blames and plans as they were told, and what was changed."""
    of = {kind: [event for event in events if event["kind"] == kind] for kind in ("suspicion.raised", "diagnosis.made", "plan.made")}
    return {
        "suspicions": [kind for event in of["suspicion.raised"] for kind in event["data"]["kinds"]],
        "blamed": [event["data"]["cause"] for event in of["diagnosis.made"]],
        "plans": [event["data"]["action"] for event in of["plan.made"]],
        "changes": [f"{event['model']}: {event['kind']}" for event in events if event["kind"] in CHANGES],
        "story": [f"{event['model']}: {event['data']['summary']}" for kind in of for event in of[kind]],
    }


def told(kept: Sequence[Mapping[str, Any]]) -> str:
    """The table, as Markdown."""
    rows: list[list[object]] = []
    for beside, load in itertools.product(BESIDE, (STEADY, RAMP)):
        of = [phase for phase in kept if (phase["beside"], phase["load"]) == (beside, load)]
        if of:
            rows.append([beside, load, *_sums(of)])
    rows.append(["all", "", *_sums(kept)])
    columns = [
        "beside", "load", "servers at once", "minutes of a server", "suspicions", "blamed on", "false blames", "false changes", "failed requests",
    ]  # fmt: skip
    return f"{head(kept, 'python -m benchmarks.noise --kept benchmarks/results/noise.jsonl')}\n\n{report.table(columns, rows)}"


def _sums(phases: Sequence[Mapping[str, Any]]) -> list[object]:
    suspicions, blamed, changes = (
        Counter(name for phase in phases for name in phase[part]) for part in ("suspicions", "blamed", "changes")
    )
    return [
        ", ".join(map(str, sorted({phase.get("servers", 1) for phase in phases}))), f"{sum(phase['seconds'] for phase in phases) / 60:.0f}",
        _listed(suspicions), _listed(blamed), sum(blamed[cause] for cause in FALSE), _listed(changes),
        f"{sum(phase['failed'] for phase in phases)} of {sum(phase['sent'] for phase in phases)}",
    ]  # fmt: skip


def _listed(counted: Counter[str]) -> str:
    return ", ".join(f"{name} ({count})" for name, count in counted.most_common()) or "none"


if __name__ == "__main__":
    sys.exit(main())
