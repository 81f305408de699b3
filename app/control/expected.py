"""What a build is expected to bring, to cost and to risk (past jobs, else rules of thumb), and which of several goes first. Pure."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Any, Final

from app.control.choices import Recipe, settings
from app.control.suspicion import Kind, Suspicion
from app.domain import JSON, Job, JobState
from optimizers.catalogue import config_types

FAST_INT8: Final = ("vnni", "amx", "asimddp", "i8mm")
"""Instruction sets whose products of bytes are faster than those of floats."""
ASKED: Final = 1.0
"""Rank of what a person asked for: a request a second out of order, repaired by a minute of work."""
AGEING_S: Final = 300.0
"""So long a wait counts as much as ASKED."""
UNMEASURED: Final = 0.1
"""Share of the requests that a suspicion concerns which counts none."""


@dataclass(frozen=True, slots=True)
class Expected:
    """`gain`: times as fast. `cpu_s`: of all that is built and proven. `risk`: what it may cost in quality, '' for nothing. `origin`: what says so."""

    gain: float
    cpu_s: float
    risk: str
    origin: str

    @property
    def text(self) -> str:
        risk = f"; {self.risk}" if self.risk else ", and no answer changes"
        return f"expected {self.gain:.1f} × as fast for {self.cpu_s:.0f} s of CPU time ({self.origin}){risk}"

    def to_json(self) -> JSON:
        return {"gain": round(self.gain, 3), "cpu_s": round(self.cpu_s, 1), "risk": self.risk, "origin": self.origin}


def expected(tries: Sequence[Recipe], jobs: Iterable[Job], model: str, host_class: str) -> Expected:
    """Of the best of `tries`, which are alternatives that are all built. Jobs on this model count, else those on others, else rules of thumb."""
    past = [job for job in jobs if job.state is JobState.FINISHED]
    found = [_of_one(recipe, past, model, host_class) for recipe in tries]
    origins = list(dict.fromkeys(origin for _, _, origin in found))
    lossy = any(not config_types()[method].lossless for recipe in tries for method in recipe)
    risk = "it may change answers: judged by the floor before it serves" if lossy else ""
    return Expected(max(gain for gain, _, _ in found), sum(cpu for _, cpu, _ in found), risk, ", ".join(origins))


def harm_of(found: Sequence[Suspicion], requests_per_s: float) -> float:
    """Requests a second that are not as they should be."""
    return requests_per_s * max((_share(one) for one in found), default=0.0)


def rank_of(harm: float, outlook: Expected) -> float:
    """harm × gain ÷ cost: requests a second that may be in order again, for each minute of CPU time. Repairs of quality have no gain in speed."""
    helped = max(1 - 1 / outlook.gain, UNMEASURED) if outlook.gain > 1 else UNMEASURED
    return harm * helped / max(outlook.cpu_s / 60, 1 / 60)


def in_order(jobs: Iterable[Job], now: float) -> list[Job]:
    """The one to do first comes first: by rank, and what waits gains on the others with time, so that everything has its turn."""
    return sorted(jobs, key=lambda job: (-(job.rank + max(0.0, now - job.requested_at) / AGEING_S), job.requested_at))


def _of_one(recipe: Recipe, past: Sequence[Job], model: str, host_class: str) -> tuple[float, float, str]:
    gain, cpu_s = _thumb(recipe, host_class)
    for origin, jobs in (("jobs on it", [job for job in past if job.model == model]), ("jobs on other models", past)):
        gains = [one for job in jobs for one in _gains(job, recipe)]
        if gains:
            costs = [float(job.report["cpu_s"]) / len(job.tries) for job in jobs if job.report.get("cpu_s") and recipe in _recipes(job)]
            return median(gains), median(costs) if costs else cpu_s, origin
    return gain, cpu_s, "a rule of thumb"


def _thumb(recipe: Recipe, host_class: str) -> tuple[float, float]:
    """By what the methods say of themselves."""
    gain, cpu_s = 1.0, 0.0
    for method in recipe:
        outlook = config_types()[method].outlook
        gain *= 2 * outlook.gain if outlook.int8 and any(name in host_class for name in FAST_INT8) else outlook.gain
        cpu_s += outlook.cpu_s
    return gain, cpu_s


def _recipes(job: Job) -> list[Recipe]:
    return [tuple(str(step["method"]) for step in recipe) for recipe in job.tries]


def _gains(job: Job, recipe: Recipe) -> Iterator[float]:
    """How many times as fast as what served then each build of `recipe` was measured to be."""
    tuned = job.report.get("tune")
    if recipe in settings() and isinstance(tuned, dict) and isinstance(tuned.get("gain"), dict):
        yield float(tuned["gain"]["estimate"])
    versions = {one.get("version") for one in _list(job, "built") if tuple(one.get("try") or ()) == recipe}
    for verdict in _list(job, "verdicts"):
        saved = verdict.get("gain")
        if verdict.get("version") in versions and isinstance(saved, int | float) and saved and saved < 1:
            yield 1 / (1 - saved)


def _list(job: Job, key: str) -> list[dict[str, Any]]:
    return [one for one in job.report.get(key) or () if isinstance(one, dict)]


def _share(one: Suspicion) -> float:
    """Of the requests, how many `one` says are out of order."""
    numbers = one.numbers

    def of(part: str, whole: str) -> float:
        return float(numbers[part]) / max(1.0, float(numbers[whole]))

    match one.kind:
        case Kind.LATENCY if "missed" in numbers:
            return float(numbers["missed"])
        case Kind.LATENCY if "normal_s" in numbers:
            return 1 - float(numbers["normal_s"]) / float(numbers["p95_s"])
        case Kind.COST if "ratio" in numbers:
            return 1 - 1 / max(1.0, float(numbers["ratio"]))
        case Kind.REFUSALS if "offered" in numbers and "refused" in numbers:
            return of("refused", "offered") + of("expired", "offered")
        case Kind.ERRORS if "failures" in numbers:
            return of("failures", "answered")
        case Kind.FIDELITY if "agreed" in numbers:
            return 1 - of("agreed", "compared")
    return UNMEASURED
