"""`python -m benchmarks.slower [--runs N] [--kept FILE] [--docs]`: a slower file deployed into a running server, and how long until it is blamed.

Each run starts `hone serve` anew with real digits, and beside neighbours (real processes) a person deploys the same model with convolutions
more, or a mere copy of it, which nobody may blame. Nothing is promised, so that only the swap itself asks for a look; the model is in
`mode: observe`: what the loop says counts here, and nothing is built.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from app.traffic import MODEL, Traffic
from benchmarks import models, report
from benchmarks.kept import Kept, head
from benchmarks.neighbours import NONE, neighbours
from benchmarks.planted import LEVELS, one_row_feeds, slower_files
from benchmarks.servers import HOST, Hone

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "loop-detection.md"
BESIDE: Final = (NONE, "cpu4")
WARM_S: Final = 25.0
LIMIT_S: Final = 90.0
COPY: Final = 0
FALSE: Final = ("version", "process", "input", "settings")


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.slower", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=3, help="of each file beside each neighbour (3)")
    parser.add_argument(
        "--levels", type=int, nargs="*", default=[COPY, *LEVELS], metavar="PERCENT", help="slower by so much; 0: a copy (all)"
    )
    parser.add_argument("--beside", nargs="*", default=list(BESIDE), metavar="NAME", help=f"neighbours; default: {', '.join(BESIDE)}")
    parser.add_argument(
        "--kept", type=Path, metavar="FILE", help="keep each run here as a line of JSON; what is in it already is not run again"
    )
    parser.add_argument("--docs", action="store_true", help="write the table into docs/loop-detection.md")
    arguments = parser.parse_args(argv)
    kept = Kept(arguments.kept)
    if missing := _missing(arguments, kept):
        with tempfile.TemporaryDirectory(prefix="hone-slower-") as folder:
            _run(Path(folder), missing, kept)
    found = kept.of("deployed")
    text = told(found, f"python -m benchmarks.slower --runs {arguments.runs}")
    print(text)
    if arguments.docs:
        DOCUMENT.write_text(report.replaced(DOCUMENT.read_text(), "slower", lambda: text))
    return 1 if any(_falsely(run) for run in found) else 0


def _missing(arguments: argparse.Namespace, kept: Kept) -> list[tuple[int, str]]:
    """(percent, neighbours) of the runs to come; in turns, so that what is there at any moment is of all cases."""
    done = Counter((run["planted"], run["beside"]) for run in kept.of("deployed"))
    cases = list(itertools.product(arguments.levels, arguments.beside))
    return [case for number in range(arguments.runs) for case in cases if done[case] <= number]


def _run(folder: Path, missing: Sequence[tuple[int, str]], kept: Kept) -> None:
    model = models.demo(folder)
    with np.load(folder / MODEL / "samples" / "judging.npz") as samples:
        images = samples["image"]
    levels = sorted({level for level, _ in missing} - {COPY})
    files, measured = slower_files(model.path, one_row_feeds({model.input: images}), folder, lambda text: print(text, flush=True), levels)
    for level, beside in missing:
        with tempfile.TemporaryDirectory(prefix="hone-slower-", dir=folder) as own:
            run = _deployed(Path(own), files[level], images, beside)
        print(kept.add("deployed", {"planted": level, "really": measured[level], "beside": beside} | run), flush=True)


def _deployed(folder: Path, file: Path, images: Any, beside: str) -> dict[str, Any]:
    """What the loop said within LIMIT_S from the moment that the new file served. Raises RuntimeError where it never did."""
    repository, state = folder / "repository", folder / "state"
    demo = models.demo(repository)
    config = repository / MODEL / "model.yaml"
    config.write_text(
        "".join(f"{line}\n" for line in config.read_text().splitlines() if not line.startswith("objective:")) + "mode: observe\n"
    )
    with Hone(repository, state) as hone, Traffic(HOST, hone.port, images) as traffic:
        hone.wait_ready(demo.name)
        hone.settle(1)
        time.sleep(WARM_S)
        newest = hone.admin("GET", "/timeline?limit=1")["events"][-1]["seq"]
        sent, failed = traffic.sent, traffic.failed
        with neighbours(beside):
            (repository / MODEL / "2").mkdir()
            shutil.copyfile(file, repository / MODEL / "2" / "model.part")
            os.replace(repository / MODEL / "2" / "model.part", repository / MODEL / "2" / "model.onnx")
            began = _serves(hone, "2")
            said, blamed_s = _said(hone, began, newest)
    return {"said": said, "blamed_s": blamed_s, "sent": traffic.sent - sent, "failed": traffic.failed - failed}


def _serves(hone: Hone, version: str, timeout_s: float = 60.0) -> float:
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        if hone.admin("GET", f"/models/{MODEL}")["active"] == version:
            return time.monotonic()
        time.sleep(0.1)
    raise RuntimeError(f"version {version} did not come to serve in {timeout_s:.0f} s; the end of its log:\n{hone.log.read_text()[-2000:]}")


def _said(hone: Hone, began: float, after: int) -> tuple[list[str], float | None]:
    """The causes named until a version was, and the seconds until then."""
    said: list[str] = []
    while time.monotonic() - began < LIMIT_S:
        for event in hone.admin("GET", f"/timeline?after={after}&limit=1000")["events"]:
            after = event["seq"]
            if event["kind"] == "diagnosis.made":
                said.append(event["data"]["cause"])
                if said[-1] == "version":
                    return said, round(time.monotonic() - began, 1)
        time.sleep(0.2)
    return said, None


def told(runs: Sequence[Mapping[str, Any]], command: str) -> str:
    """The table, as Markdown."""
    rows: list[list[object]] = []
    for level, beside in sorted({(run["planted"], run["beside"]) for run in runs}, key=lambda key: (key[0], key[1] != NONE, key[1])):
        of = [run for run in runs if (run["planted"], run["beside"]) == (level, beside)]
        really = statistics.median(run["really"] for run in of) - 1
        after = [run["blamed_s"] for run in of if run["blamed_s"] is not None]
        others = Counter(cause for run in of for cause in run["said"] if cause != "version")
        rows.append(
            [f"{level:+d} % (really {really:+.0%})" if level else "a copy", beside, len(of), f"{len(after)} of {len(of)}",
             f"{statistics.median(after):.0f}, {max(after):.0f}" if after else "–",
             ", ".join(f"{cause} ({count})" for cause, count in others.most_common()) or "nothing", sum(map(_falsely, of)),
             f"{sum(run['failed'] for run in of)} of {sum(run['sent'] for run in of)}"]
        )  # fmt: skip
    columns = [
        "deployed", "beside", "runs", "version blamed", "after, s (median, most)", "else said", "false blames", "failed requests",
    ]  # fmt: skip
    return f"{head(runs, command)}\n\n{report.table(columns, rows)}"


def _falsely(run: Mapping[str, Any]) -> int:
    """Blames on what is not at fault: the host and load may be named, a version only where it is slower."""
    return sum(cause in FALSE and (cause != "version" or run["planted"] == COPY) for cause in run["said"])


if __name__ == "__main__":
    sys.exit(main())
