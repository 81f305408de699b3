"""`python -m benchmarks.repair [--runs N] [--candidates N] [--kept FILE] [--docs]`: how long until all is well again, and what bad candidates get to answer.

Times: faults put into a running demo (as benchmarks.diagnosis does), from the injection to the remedy and to verified recovery.
Candidates: this process builds for the server's jobs, badly (benchmarks.bad_candidates), as a broken builder that shares the store would. Real
digits are sent all the while; from the moment that a candidate is tried on live requests, some carry the mark that it is bad for.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import numpy as np

from app.catalog.card_facts import BuiltCard
from app.catalog.cards import Cards
from app.catalog.state_folder import StateFolder
from app.domain import Event
from app.settings import Settings
from app.store.base import Journal
from app.store.open import open_journal
from app.traffic import MODEL, Traffic
from benchmarks import models, report
from benchmarks.bad_candidates import KINDS, Kind, marked, spoil
from benchmarks.diagnosis import run_missing
from benchmarks.kept import Kept, head
from benchmarks.servers import HOST, Hone, HoneWorker

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "loop.md"
REPAIRED: Final[Mapping[str, str]] = {
    "process": "restart the runner", "wrong": "back to the version before", "settings": "settings as before",
    "larger": "settings measured anew", "version": "build int8, prove it, swap it in",
}  # fmt: skip
RATE: Final = 200.0
MARKED: Final = 0.3
JOB_S: Final = 420.0


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.repair", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--runs", type=int, default=10, help="of each cause (10); 0: none")
    parser.add_argument("--causes", nargs="*", metavar="CAUSE", default=list(REPAIRED), help=f"default: {', '.join(REPAIRED)}")
    parser.add_argument("--candidates", type=int, default=100, help="bad candidates (100); 0: none")
    parser.add_argument("--kinds", default="", metavar="TEXT", help="only bad candidates whose kind holds this; default: all kinds in turn")
    parser.add_argument(
        "--kept",
        type=Path,
        metavar="FILE",
        help="keep each run here as a line of JSON (benchmarks.kept; benchmarks.diagnosis may share it); what is in it already is not run again",
    )
    parser.add_argument("--limit", type=float, default=240.0, help="seconds of one run after the injection (240)")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/loop.md")
    arguments = parser.parse_args(argv)
    kinds = [kind for kind in KINDS if arguments.kinds in kind.name]
    if not kinds:
        parser.error(f"no kind holds {arguments.kinds!r}; there are {'; '.join(kind.name for kind in KINDS)}")
    if arguments.runs:
        _publish("repair", _times(arguments), arguments.docs)
    if arguments.candidates:
        kept = Kept(arguments.kept)
        if len(kept.of("candidate")) < arguments.candidates:
            with tempfile.TemporaryDirectory(prefix="hone-candidates-") as name:
                _candidates(Path(name), arguments.candidates, kinds, kept)
        tried = kept.of("candidate")
        only = f" --kinds '{arguments.kinds}'" if arguments.kinds else ""
        _publish(
            "candidates", _told(tried, f"python -m benchmarks.repair --runs 0 --candidates {arguments.candidates}{only}"), arguments.docs
        )
        return 1 if any(one["promoted"] or one["failed"] for one in tried) else 0
    return 0


def _publish(mark: str, text: str, docs: bool) -> None:
    print(text, flush=True)
    if docs:
        DOCUMENT.write_text(report.replaced(DOCUMENT.read_text(), mark, lambda: text))


# ---- times


def _times(arguments: argparse.Namespace) -> str:
    kept = Kept(arguments.kept)
    run_missing(arguments.causes, arguments.runs, kept, arguments.limit)
    rows: list[list[object]] = []
    every = [run for cause in arguments.causes for run in kept.of(cause)]
    for cause in arguments.causes:
        runs = kept.of(cause)
        plans = ", ".join(dict.fromkeys(plan for run in runs for plan in run["plans"]))
        failed = f"{sum(run['failed'] for run in runs)} of {sum(run['sent'] for run in runs)}"
        rows.append(
            [cause, len(runs), REPAIRED.get(cause, ""), plans, *(_spread(runs, name) for name in ("acted_s", "recovered_s")), failed]
        )
    columns = [
        "injected", "runs", "what mends it", "plans", "taken into use after, s (p50, p95)", "verified after, s (p50, p95)", "failed requests",
    ]  # fmt: skip
    command = f"python -m benchmarks.repair --runs {arguments.runs} --candidates 0"
    return f"{head(every, command)}\n\n{report.table(columns, rows)}"


def _spread(runs: Sequence[Mapping[str, Any]], name: str) -> str:
    times = [float(run[name]) for run in runs if run[name]]
    if not times:
        return "–"
    p50, p95 = np.quantile(times, [0.5, 0.95], method="higher")
    missing = f" ({len(times)} of {len(runs)})" if len(times) < len(runs) else ""
    return f"{p50:.0f}, {p95:.0f}{missing}"


# ---- bad candidates


def _candidates(folder: Path, count: int, kinds: Sequence[Kind], kept: Kept) -> None:
    repository, state = folder / "repository", folder / "state"
    model = models.demo(repository)
    config = repository / MODEL / "model.yaml"
    config.write_text(config.read_text() + "capture: off\n")  # else the marked images of one candidate would judge the next offline
    with np.load(repository / MODEL / "samples" / "judging.npz") as samples:
        images = samples["image"]
    with Hone(repository, state) as hone:
        hone.wait_ready(model.name)
        hone.settle(1)
        with HoneWorker(repository, state):
            good = _good(hone)
        journal = open_journal(Settings.from_env({}, repository=repository, state=state).journal)
        builder = _Builder(journal, Cards(StateFolder(state)), good, folder)
        with Traffic(HOST, hone.port, images, RATE, callers=16) as traffic:
            for number in range(len(kept.of("candidate")), count):
                tried = kept.add("candidate", _try(hone, builder, traffic, kinds[number % len(kinds)], number))
                print(f"candidate {number + 1} of {count}: {tried}", flush=True)
        journal.close()


def _good(hone: Hone) -> str:
    """An int8 version that passes, for others to be spoiled from; it is not promoted."""
    job = hone.admin("POST", f"/models/{MODEL}/optimize", {"recipe": ["int8-static"], "promote": "manual"})
    ended = _ended(hone, job["id"])
    if not ended["candidates"]:
        raise RuntimeError(f"nothing was built: {ended['report']}")
    return str(ended["candidates"][-1])


def _ended(hone: Hone, identity: str) -> dict[str, Any]:
    until = time.monotonic() + JOB_S
    while time.monotonic() < until:
        job: dict[str, Any] = hone.admin("GET", f"/jobs/{identity}")
        if job["state"] == "finished":
            return job
        time.sleep(0.3)
    raise RuntimeError(f"job {identity} did not end in {JOB_S:.0f} s")


class _Builder:
    """Claims a job and publishes what it likes for it."""

    def __init__(self, journal: Journal, cards: Cards, good: str, folder: Path) -> None:
        card = cards.card(MODEL, good)
        assert isinstance(card, BuiltCard)
        self._journal, self._cards, self._card, self._folder = journal, cards, card, folder
        self._source = folder / "good.onnx"
        self._source.write_bytes(cards.path(card).read_bytes())

    def build(self, identity: str, kind: Kind, number: int) -> str:
        key = f"job:{identity}"
        if not self._journal.acquire(key, "bad builder", 60.0):
            raise RuntimeError(f"{key} is another's")
        self._say("job.claimed", "", identity, worker="bad builder", attempt=1)
        folder = self._folder / f"built-{number}"
        folder.mkdir()
        spoil(self._source, folder / "model.onnx", kind, number)
        draft = replace(self._card.draft, job=identity, try_index=0)
        taken = [one.version for one in self._journal.state().models[MODEL].built]
        card = self._cards.publish(MODEL, folder, draft, taken)
        said = {"parent": draft.parent, "golden_sha256": draft.golden_sha256, "recipe": [dict(step) for step in draft.recipe]}
        self._say("version.published", card.version, identity, version=card.version, sha256=card.sha256, bytes=card.bytes, **said)
        self._say("job.built", "", identity, attempt=1, candidates=[card.version], report={})
        self._journal.release(key, "bad builder")
        return card.version

    def _say(self, kind: str, of: str, identity: str, **data: Any) -> None:
        self._journal.append(Event(kind, MODEL, of, identity, "bad builder", data))


def _try(hone: Hone, builder: _Builder, traffic: Traffic, kind: Kind, number: int) -> dict[str, Any]:
    """One candidate from its job's request to its end and ten seconds more. `share` is of the answers since it first took live requests."""
    traffic.change = lambda images: images
    failed, seen = traffic.failed, hone.admin("GET", f"/timeline?model={MODEL}&limit=1")["events"][-1]["seq"]
    began = time.monotonic()
    request = {"recipe": ["int8-static"], "promote": "auto", "reason": f"bad candidate {number}: {kind.name}"}
    identity = hone.admin("POST", f"/models/{MODEL}/optimize", request)["id"]
    version = builder.build(identity, kind, number)
    before: dict[str, int] | None = None
    allowed = 0.0
    stages: list[str] = []
    promoted = False
    ended_at = 0.0
    outcome, why = "", ""
    while not ended_at or time.monotonic() < ended_at + 10.0:
        for event in hone.admin("GET", f"/timeline?model={MODEL}&after={seen}&limit=500")["events"]:
            seen = event["seq"]
            data = event.get("data") or {}
            if event["kind"] == "traffic.split" and data.get("version") == version:
                stages.append(f"{data['stage']} {data['share']:.0%}")
                allowed = max(allowed, float(data["share"]))
                traffic.change = _some_marked
                before = before or dict(traffic.answered)
            promoted = promoted or (event["kind"] == "desired.changed" and event["version"] == version)
            if event["kind"] == "job.finished" and event["job"] == identity:
                outcome = str(data["outcome"])
                why = str(data["report"].get("reason") or data["report"].get("waits") or data["report"].get("summary") or "")
                ended_at = time.monotonic()
        if time.monotonic() > began + JOB_S:
            raise RuntimeError(f"the job of candidate {number} did not end in {JOB_S:.0f} s")
        time.sleep(0.2)
    if promoted and hone.admin("GET", f"/models/{MODEL}")["desired"] == version:  # else the loop has gone back already
        hone.admin("POST", f"/models/{MODEL}/rollback", {"reason": "benchmark"})
    since = {name: count - (before or {}).get(name, 0) for name, count in traffic.answered.items()}
    answered = traffic.answered[version]
    return {
        "kind": kind.name, "version": version, "outcome": outcome, "stages": list(dict.fromkeys(stages)), "allowed": allowed, "answered": answered,
        "share": round(answered / max(1, sum(since.values())), 4) if before is not None else 0.0, "promoted": promoted,
        "failed": traffic.failed - failed, "took_s": round(ended_at - began, 1), "why": why[:200],
    }  # fmt: skip


def _some_marked(images: Any) -> Any:
    return marked(images) if random.random() < MARKED else images


def _told(tried: Sequence[Mapping[str, Any]], command: str) -> str:
    rows: list[list[object]] = []
    for kind in dict.fromkeys(one["kind"] for one in tried):
        of = [one for one in tried if one["kind"] == kind]
        outcomes = [one["outcome"] for one in of]
        ends = ", ".join(f"{name} ({outcomes.count(name)})" for name in dict.fromkeys(outcomes))
        where = ", ".join(dict.fromkeys(one["stages"][-1] if one["stages"] else "offline" for one in of))
        share = max(one["share"] for one in of)
        rows.append([
            kind, len(of), ends, where, sum(one["answered"] for one in of), f"{share:.1%} (≤ {max(one['allowed'] for one in of):.0%})",
            sum(one["promoted"] for one in of), sum(one["failed"] for one in of), of[0]["why"],
        ])  # fmt: skip
    columns = [
        "bad how", "candidates", "outcome of the job", "stopped at", "answers it gave", "largest share of the answers (its canary's)", "promoted",
        "failed requests", "why (of the first)",
    ]  # fmt: skip
    total = f"{len(tried)} candidates at {RATE:.0f} requests/s: {sum(one['promoted'] for one in tried)} promoted, {sum(one['failed'] for one in tried)} requests failed."
    return f"{head(tried, command)}\n\n{report.table(columns, rows)}\n\n{total}"


if __name__ == "__main__":
    sys.exit(main())
