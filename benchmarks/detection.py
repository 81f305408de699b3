"""`python -m benchmarks.detection`: who cries wolf, who is late, and whom the paired replay blames, beside real neighbours.

Suspicions on traces that were recorded (`--traces FILE.npz`) or are recorded now (`--record MINUTES`), rule by rule; and with
`--blame ROUNDS` what the task `blame` finds for files that are really slower, and for ones that are not. `--docs` writes the tables.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks import machine, traces
from benchmarks.detectors import Rule, plain_rules, river_rules
from benchmarks.neighbours import NONE, neighbours
from benchmarks.planted import Suite, prepare
from benchmarks.report import replaced, table
from benchmarks.traces import Trace
from optimizers.task import TaskFailed, TaskLimits, run_task_sync

DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "loop-detection.md"
BLAMES: Final = frozenset({"version_slower", "input_costlier"})
BLAMED_BESIDE: Final = (NONE, "cpu1", "cpu2", "cpu4", "mem2")


@dataclass(frozen=True)
class Score:
    """One rule on one trace. `delays`: planted percent -> seconds to the first suspicion of each phase (None: there was none)."""

    rule: str
    signal: str
    false_quiet: int
    false_beside: int
    delays: Mapping[int, tuple[float | None, ...]]


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    results: dict[str, Any] = {
        "machine": machine.description() | {"command": "python -m benchmarks.detection " + " ".join(argv or sys.argv[1:])}
    }
    quiet, began = machine.Quiet(), time.monotonic()
    found = [traces.read(path) for path in arguments.traces]
    with tempfile.TemporaryDirectory(prefix="hone-detection-") as name:
        if arguments.record or arguments.blame:
            suite = prepare(Path(name), _say)
            results["planted"] = suite.measured
            if arguments.record:
                save = arguments.save or Path(name) / "recorded.npz"
                found.append(traces.record(suite.slower, suite.feeds, arguments.record, save, _say))
            if arguments.blame:
                results["blame"] = blamed(suite, arguments.blame, arguments.nice)
    results["suspicions"] = {trace.name: scored(trace) for trace in found}
    results["river"] = bool(river_rules())
    results["minutes"] = round((time.monotonic() - began) / 60, 1)
    results["quiet"] = quiet.report()
    text = markdown(results)
    print("\n" + text)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.docs:
        DOCUMENT.write_text(replaced(DOCUMENT.read_text(), "detection", lambda: text))
    return 0


def scored(trace: Trace) -> dict[str, Any]:
    """Every rule on every phase but the baseline."""
    phases = trace.phases[1:]
    hours = {
        beside: sum(p.seconds for p in phases if not p.planted and (p.beside == NONE) == (beside == NONE)) / 3600
        for beside in (NONE, "beside")
    }
    planted = sorted({p.planted for p in phases if p.planted})
    scores = [score(rule, trace) for rule in (*plain_rules(), *river_rules())]
    return {
        "hours": hours, "planted": {level: round(trace.planted_ratio(level), 3) for level in planted},
        "rules": [
            {"rule": s.rule, "signal": s.signal, "false_quiet": s.false_quiet, "false_beside": s.false_beside, "delays": dict(s.delays)}
            for s in scores
        ],
    }  # fmt: skip


def score(rule: Rule, trace: Trace) -> Score:
    false = {True: 0, False: 0}
    delays: dict[int, list[float | None]] = {}
    for phase in trace.phases[1:]:
        suspicions = rule.suspicions(trace.baseline, phase)
        if phase.planted:
            delays.setdefault(phase.planted, []).append(suspicions[0] if suspicions else None)
        else:
            false[phase.beside == NONE] += len(suspicions)
    return Score(rule.name, rule.signal, false[True], false[False], {level: tuple(found) for level, found in sorted(delays.items())})


def blamed(suite: Suite, rounds: int, nice: int) -> list[dict[str, Any]]:
    """Findings of `rounds` paired replays for each case beside each neighbour, each in a task child as the server runs it."""
    rows = []
    for beside in BLAMED_BESIDE:
        with neighbours(beside):
            for case in suite.cases:
                found = []
                for _ in range(rounds):
                    found.append(_replayed(case.request, nice))
                    _say(f"{case.name} beside {beside}: {found[-1]['text']} ({found[-1]['seconds']:.0f} s)")
                rows.append(_row(case.name, case.guilty, beside, found))
    return rows


def _replayed(request: Mapping[str, Any], nice: int) -> dict[str, Any]:
    limits = TaskLimits(seconds=30, nice=nice)
    began = time.monotonic()
    try:
        report = run_task_sync("blame", request, limits)
    except TaskFailed as failure:
        report = {"findings": ["failed"], "text": failure.text, "version_over_proof": None, "quiet": {}}
    return report | {"seconds": time.monotonic() - began}


def _row(name: str, guilty: str, beside: str, found: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    counts: dict[str, int] = {}
    for report in found:
        for finding in report["findings"]:
            counts[finding] = counts.get(finding, 0) + 1
    ratios = [(report.get("version_over_proof") or {}).get("estimate") for report in found]
    known = [ratio for ratio in ratios if ratio is not None]
    seconds = [report["seconds"] for report in found]
    return {
        "case": name, "guilty": guilty, "beside": beside, "runs": len(found), "findings": counts,
        "ratio": [min(known), statistics.median(known), max(known)] if known else None,
        "waiting": max((report["quiet"].get("waiting_ratio", 0.0) for report in found), default=0.0),
        "seconds": [round(statistics.median(seconds), 1), round(max(seconds), 1)],
    }  # fmt: skip


def markdown(results: Mapping[str, Any]) -> str:
    about = results["machine"]
    noise = ", ".join(f"{name} {share:.0%}" for name, share in results["quiet"].items())
    parts = [
        f"{about['date']} · {about['cpu']}, {about['cores']} cores · host class `{about['host_class']}` · Python {about['python']}, ONNX Runtime "
        f"{about['onnxruntime']} · `{about['command']}` · {results['minutes']} minutes · share of all cores' time while it ran (neighbours are its own): {noise}"
    ]
    parts += [_suspicions(name, found) for name, found in results["suspicions"].items()]
    if results["suspicions"] and not results["river"]:
        parts.append("River is not installed: its ADWIN and Page–Hinkley were left out.")
    if "blame" in results:
        parts.append(_blame(results))
    return "\n\n".join(parts)


def _suspicions(name: str, found: Mapping[str, Any]) -> str:
    hours = found["hours"]
    levels = list(found["planted"])
    head = ["rule", "on", f"false an hour, quiet ({hours[NONE]:.2f} h)", f"false an hour, beside neighbours ({hours['beside']:.2f} h)"]
    head += [f"{level:+d} % (really {found['planted'][level] - 1:+.0%}): found, delay" for level in levels]
    rows = [
        [row["rule"], f"{row['signal']} time", _rate(row["false_quiet"], hours[NONE]), _rate(row["false_beside"], hours["beside"])]
        + [_delay(row["delays"][level]) for level in levels]
        for row in found["rules"]
    ]
    return f"Suspicions on `{name}`, each phase after the quiet baseline; the delay is the median of those found:\n\n" + table(head, rows)


def _rate(count: int, hours: float) -> str:
    return f"{count / hours:.0f} ({count})" if hours else "–"


def _delay(delays: Sequence[float | None]) -> str:
    found = [delay for delay in delays if delay is not None]
    return f"{len(found)} of {len(delays)}" + (f", {statistics.median(found):.0f} s" if found else "")


def _blame(results: Mapping[str, Any]) -> str:
    rows = []
    for row in results["blame"]:
        ratio = row["ratio"]
        said = ", ".join(f"{finding} {count}" for finding, count in sorted(row["findings"].items()))
        rows.append(
            [row["case"], row["beside"], row["runs"], said, "–" if ratio is None else f"{ratio[1]:.2f} ({ratio[0]:.2f}–{ratio[2]:.2f})",
             f"{row['waiting']:.0%}", f"{row['seconds'][0]} / {row['seconds'][1]}"]
        )  # fmt: skip
    return (
        f"The paired replay. Blamed wrongly: {sum(map(_wrongly, results['blame']))} times in {sum(row['runs'] for row in results['blame'])} "
        f"replays, {sum(row['runs'] for row in results['blame'] if not row['guilty'])} of them with nothing wrong; {_rightly(results['blame'])}.\n\n"
        + table(["case", "beside", "runs", "findings", "live over other ÷ proof", "waiting", "seconds, median / most"], rows)
    )


def _wrongly(row: Mapping[str, Any]) -> int:
    return sum(count for finding, count in row["findings"].items() if finding in BLAMES and finding != row["guilty"])


def _rightly(rows: Sequence[Mapping[str, Any]]) -> str:
    cases = dict.fromkeys(row["case"] for row in rows if row["guilty"])
    said = []
    for case in cases:
        mine = [row for row in rows if row["case"] == case]
        said.append(f"{case} blamed in {sum(row['findings'].get(row['guilty'], 0) for row in mine)} of {sum(row['runs'] for row in mine)}")
    return "; ".join(said)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.detection", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--traces", type=Path, nargs="*", default=[], help="recorded traces (.npz, see benchmarks/traces.py)")
    parser.add_argument("--record", type=float, default=0.0, metavar="MINUTES", help="record a trace of the demo model for so long")
    parser.add_argument("--save", type=Path, help="keep the recorded trace here")
    parser.add_argument("--blame", type=int, default=0, metavar="ROUNDS", help="so many paired replays of each case beside each neighbour")
    parser.add_argument("--nice", type=int, default=5, help="niceness of the replays")
    parser.add_argument("--json", type=Path, help="write all numbers here")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/loop-detection.md")
    return parser


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


if __name__ == "__main__":
    sys.exit(main())
