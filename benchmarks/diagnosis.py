"""`python -m benchmarks.diagnosis [CAUSE ...] [--runs N] [--kept FILE] [--docs]`: real faults put into a running demo, whom it blames, what it does, how long it takes.

Each run starts `hone serve` and `hone worker` anew, sends real digits, injects one cause (app.scenes) and reads the public timeline until
the loop says that all is well or that nothing is to be done.
"""

from __future__ import annotations

import argparse
import os
import socket
import statistics
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from app.client import Client
from app.demo import Children, Stop, child_environment, copy_repository, own_address, wait_for_model
from app.injection import run_break
from app.scenes import CAUSES
from app.settings import Settings
from benchmarks import report
from benchmarks.kept import Kept, head

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "loop.md"
RIGHT: Final[Mapping[str, str]] = {
    "load": "load", "host": "host", "quota": "host", "process": "process", "settings": "settings", "version": "version", "wrong": "version", "input": "input",
    "larger": "input", "leak": "process", "crash": "host",
}  # fmt: skip
"""Injected fault to the cause that ought to be named; `wrong` is a version that answers NaN, `crash` a runner killed from outside."""
BUILDS: Final = frozenset({"optimize", "recalibrate"})
NOT_SHOWN: Final = "stolen time"


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.diagnosis", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("causes", nargs="*", metavar="CAUSE", help=f"{', '.join(CAUSES)}; default: all")
    parser.add_argument("--runs", type=int, default=3, help="of each cause (3)")
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of one run after the injection (240)")
    parser.add_argument(
        "--kept",
        type=Path,
        metavar="FILE",
        help="keep each run here as a line of JSON; what is in it already is not run again (also benchmarks.repair's)",
    )
    parser.add_argument("--docs", action="store_true", help="write the table into docs/loop.md")
    arguments = parser.parse_args(argv)
    causes = arguments.causes or list(CAUSES)
    kept = Kept(arguments.kept)
    run_missing(causes, arguments.runs, kept, arguments.limit)
    found = [run for cause in causes for run in kept.of(cause)]
    text = table(found, " ".join(["python -m benchmarks.diagnosis", *arguments.causes, f"--runs {arguments.runs}"]))
    print(text)
    if arguments.docs:
        DOCUMENT.write_text(report.replaced(DOCUMENT.read_text(), "diagnosis", lambda: text))
    return 0 if not any(set(run["plans"]) & BUILDS and run["injected"] in ("load", "host", "quota", "crash") for run in found) else 1


def run_missing(causes: Sequence[str], runs: int, kept: Kept, limit_s: float) -> None:
    """Each cause until there are so many runs of it; in turns, so that what is there at any moment is of all causes."""
    for number in range(runs):
        for cause in causes:
            if len(kept.of(cause)) > number:
                continue
            print(f"--- {cause}, run {number + 1} of {runs}", flush=True)
            with tempfile.TemporaryDirectory(prefix="hone-fault-") as folder:
                print(kept.add(cause, broken(cause, Path(folder), limit_s)), flush=True)


def broken(cause: str, folder: Path, limit_s: float) -> dict[str, Any]:
    """What run_break found on a demo of its own."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    settings = Settings.from_env({}, state=folder / "state", port=port)
    repository = copy_repository(settings.state)
    stop = Stop()
    with Children(settings, {**child_environment(settings, repository), "HONE_PORT": str(port)}) as children:
        children.start("serve")
        children.start("worker")
        if not wait_for_model(settings, children, stop):
            raise RuntimeError("stopped")
        with Client(own_address(settings, os.environ), timeout_s=30.0) as client:
            return run_break(cause, client, settings.state, lambda text: print(text[:220], flush=True), limit_s)


def table(found: Sequence[Mapping[str, Any]], command: str) -> str:
    """The confusion matrix and the times, as Markdown."""
    columns = [
        "injected", "runs", "blamed on (the diagnosis that was acted on; else the last)", "right", "plans", "mended after, s (median, most)",
        "verified after, s", "failed requests",
    ]  # fmt: skip
    rows: list[list[object]] = []
    right = 0
    for cause in dict.fromkeys(run["injected"] for run in found):
        runs = [run for run in found if run["injected"] == cause]
        said = [verdict(run) for run in runs]
        hits = said.count(RIGHT[cause])
        right += hits
        mended, took = (_median_and_most(runs, name) for name in ("acted_s", "recovered_s"))
        plans = ", ".join(dict.fromkeys(plan for run in runs for plan in run["plans"]))
        counted = ", ".join(f"{name} ({said.count(name)})" for name in dict.fromkeys(said))
        failed = sum(run["failed"] for run in runs)
        sent = sum(run["sent"] for run in runs)
        rows.append([cause, len(runs), counted, f"{hits} of {len(runs)}", plans, mended, took, f"{failed} of {sent}"])
    return "\n\n".join([head(found, command), report.table(columns, rows), f"Right: {right} of {len(found)}. Not shown: {NOT_SHOWN}."])


def verdict(run: Mapping[str, Any]) -> str:
    """The cause that was first acted on; where nothing was done, the last that was named. What is left after a remedy may be another fault."""
    told = list(zip(run["blamed"], run["plans"], strict=False))
    return next((cause for cause, action in told if action != "nothing"), run["blamed"][-1] if run["blamed"] else "nothing")


def _median_and_most(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    times = [float(run[name]) for run in runs if run[name]]
    return f"{statistics.median(times):.0f}, {max(times):.0f}" if times else "–"


if __name__ == "__main__":
    sys.exit(main())
