"""Asks the blame task about one model: its live file beside golden's or the golden's before it, and on the inputs that come now. It judges nothing."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any, Final

from app.catalog.reservoir import captured_before
from app.control.bench import Bench, Workpiece
from app.control.findings import Replay
from app.domain import JSON, ModelState, RuntimeSettings
from app.errors import HoneError, NotFound
from optimizers.artifact import WEIGHTS_SUFFIX
from optimizers.samples import Samples
from optimizers.task import TaskFailed, TaskLimits, run_task

log = logging.getLogger("hone.control")
REPLAY_S: Final = 24.0
NICE: Final = 5
"""As the runners: beside a busy model it takes no more than its turn."""
OTHERS_HOLD: Final = 0.5
"""Where other programs hold so much of the cores it takes its share from them: at the runners' priority four of them left it 5 to 20 % of a core,
too little for an answer in its time."""
LEAST_INPUTS: Final = 8
MOST_INPUTS: Final = 24


async def replay(
    bench: Bench, want: ModelState, version: str, settings: RuntimeSettings, memory_bytes: int, newest: Sequence[Samples], before: float,
    others_ratio: float,
) -> Replay:  # fmt: skip
    """The findings of a paired replay; `not_possible`, and why, where there is nothing to replay or it failed.

    `newest` are inputs that come now. They are held against captured ones from before `before` (unix seconds), else against frozen ones.
    `others_ratio` is the share of all cores that other programs use now.
    """
    try:
        piece = await asyncio.to_thread(bench.workpiece, want.name, want.golden, want.golden_sha256)
        with bench.scratch() as folder:
            request, held_to = await asyncio.to_thread(_question, bench, piece, want, version, settings, newest, before, folder)
            # Importing torch takes seconds of CPU time, which beside a busy model would never come together of what others leave.
            scheduler = "other" if request["live_source"] or request.get("other_source") else "spare"
            nice = NICE if others_ratio < OTHERS_HOLD else 0
            limits = TaskLimits(REPLAY_S + 10, threads=1, memory_bytes=memory_bytes, nice=nice, scheduler=scheduler, scratch=str(folder))
            report = await run_task("blame", request, limits)
    except TaskFailed as failure:
        return _not_possible(want, failure.text)
    except (HoneError, OSError) as error:
        return _not_possible(want, str(error))
    log.info("model %s: paired replay of version %s, %.1f s: %s", want.name, version, report["seconds"], report["text"])
    return _findings(report, held_to)


def _not_possible(want: ModelState, why: str) -> Replay:
    log.warning("model %s: no paired replay: %s", want.name, why)
    return Replay(findings=("not_possible",), why=why)


def _question(
    bench: Bench, piece: Workpiece, want: ModelState, version: str, settings: RuntimeSettings, newest: Sequence[Samples], before: float,
    folder: Path,
) -> tuple[JSON, str]:  # fmt: skip
    """The request, and the version that the live one is held to. Raises HoneError where the live file cannot be run, or on nothing."""
    paths = piece.samples.save(folder)
    base = next((name for name in ("reference", "labelled", "calibration") if name in paths), "")
    if not base:
        raise NotFound(f"there are no samples to run {want.name} on: name some in model.yaml, or let live inputs be captured")
    frozen = getattr(piece.samples, base)
    held_to = _held_to(want, version)
    request: JSON = {
        **_arm(bench, piece, version, "live"),
        "reference": {"path": paths[base], "origin": frozen.origin, "stacked": frozen.stacked},
        "settings": {key: value for key, value in asdict(settings).items() if key in ("graph_level", "session_options")},
        "seconds": REPLAY_S,
    }
    with suppress(HoneError):  # a version that is gone is nothing to be held to; what comes now is looked at all the same
        request |= _arm(bench, piece, held_to, "other", as_deployed=held_to != want.golden) if held_to else {}
    if _enough(newest):
        usual = captured_before(bench.state.captured(want.name), before, MOST_INPUTS)
        request["recent"] = _saved(newest, folder, "recent")
        request["usual"] = _saved(usual, folder, "usual") if _enough(usual) else []
    return request, held_to if "other" in request else ""


def _arm(bench: Bench, piece: Workpiece, version: str, name: str, as_deployed: bool = False) -> JSON:
    """The model file of any version that is there (golden, an earlier golden, or a built one), with what a PyTorch one needs. Raises HoneError."""
    path = bench.model_path(piece, version)
    source = bench.torch_source(piece, version, as_deployed) if path.suffix == WEIGHTS_SUFFIX else None
    return {name: str(path), f"{name}_source": source}


def _enough(inputs: Sequence[Samples]) -> bool:
    return sum(map(len, inputs)) >= LEAST_INPUTS


def _saved(inputs: Sequence[Samples], folder: Path, name: str) -> list[JSON]:
    for number, samples in enumerate(inputs):
        samples.save(folder / f"{name}-{number}.npz")
    return [
        {"path": str(folder / f"{name}-{number}.npz"), "origin": samples.origin, "stacked": samples.stacked}
        for number, samples in enumerate(inputs)
    ]


def _held_to(want: ModelState, version: str) -> str:
    """What must not be faster: golden, where Hone built the version; for a golden the one that served before it.

    An earlier golden, which a person went back to, is held to nothing: nobody says that it must be as fast as what came after it.
    """
    before = want.previous if want.previous.isdigit() and version == want.golden else ""  # what Hone built is faster on purpose
    other = before if version.isdigit() else want.golden
    return other if other != version else ""


def _findings(report: Mapping[str, Any], held_to: str) -> Replay:
    version = [one["ratio"] for one in report.get("version") or ()]
    recent = (report.get("input") or {}).get("ratio")
    return Replay(
        _interval(version[-1]) if version else None,
        _interval(recent),
        tuple(report.get("findings") or ()),
        held_to,
        report["usual"],
        report,
        report.get("impossible") or "",
    )


def _interval(ratio: Mapping[str, Any] | None) -> tuple[float, float, float] | None:
    if ratio is None or any(ratio.get(name) is None for name in ("estimate", "low", "high")):
        return None
    return float(ratio["estimate"]), float(ratio["low"]), float(ratio["high"])
