"""Judges a canary against the incumbent that serves beside it, at the same time: pure, from facts about both to a verdict. It acts on nothing.

CPU time blames, wall time alone never does: neighbours move it. Too little data is a verdict of its own. Intervals, effects and least counts
follow Kayenta's judge (98 % Mann–Whitney) and what its users complained of: few points, zeros, ties, values that are no numbers.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Final

from app.domain import JSON, Verdict
from optimizers.stats import Interval
from optimizers.two_samples import finite, mean_ratio, ratio, share, share_difference

LEAST_FAULTS: Final = 3
"""Errors, or answers that differ from golden's, below which their share is an accident and not a rate."""


@dataclass(frozen=True, slots=True)
class ArmFacts:
    """What one version did while both served.

    `errors` are those of the model or the server. `cpu_s_per_row` and `latencies_s` are samples of calls that cost alike on both sides (the
    same bucket of batch and shape: a row in a batch of four costs a fifth less than alone). `non_finite` counts answers with NaN or infinity
    where golden has none, or none is expected; `agreements` of `compared` answers were golden's (of several rows the share
    that was), and `class_below_floor` says on which class too few were.
    """

    requests: int = 0
    errors: int = 0
    deaths: int = 0
    latencies_s: tuple[float, ...] = ()
    cpu_s_per_row: tuple[float, ...] = ()
    non_finite: int = 0
    agreements: float = 0.0
    compared: int = 0
    class_below_floor: str = ""
    memory_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Policy:
    """What is held against a candidate. `effect`: a cost is worse from 1 + effect on. No floor, and a limit of 0, are not judged."""

    least_samples: int = 50
    effect: float = 0.10
    confidence: float = 0.98
    fatal_deaths: int = 3
    error_margin: float = 0.005
    fidelity_floor: float | None = None
    least_compared: int = 0
    """With a floor, so many of the candidate's answers must have been held to golden's; not asked for where none could be."""
    memory_limit_bytes: int = 0


@dataclass(frozen=True, slots=True)
class Judgement:
    """`text` is the line for the timeline; `numbers` are JSON."""

    verdict: Verdict
    text: str
    numbers: JSON


@dataclass(frozen=True, slots=True)
class _Intervals:
    """The candidate relative to the incumbent; nan where there is nothing to compare."""

    errors: Interval
    non_finite: Interval
    cpu: Interval
    mean_cpu: Interval
    latency: Interval
    fidelity: Interval


def judge(incumbent: ArmFacts, candidate: ArmFacts, policy: Policy = Policy()) -> Judgement:
    """Only PASSED promotes. What is plainly broken fails at once; everything else waits for `least_samples` on both sides."""
    found = _compare(incumbent, candidate, policy.confidence)
    numbers = _numbers(incumbent, candidate, found)
    if harms := _harms(incumbent, candidate, found, policy):
        return Judgement(Verdict.FAILED, "; ".join(harms), numbers)
    if not incumbent.requests or not candidate.requests:
        idle = "the candidate" if not candidate.requests else "the incumbent"
        return Judgement(Verdict.NO_DATA, f"no request went to {idle}", numbers)
    if doubts := (_shortages(incumbent, candidate, policy) or _doubts(candidate, found, policy)):
        return Judgement(Verdict.INCONCLUSIVE, "; ".join(doubts), numbers)
    return Judgement(Verdict.PASSED, "; ".join(_merits(candidate, found, policy)), numbers)


def _compare(incumbent: ArmFacts, candidate: ArmFacts, confidence: float) -> _Intervals:
    return _Intervals(
        share_difference((incumbent.errors, incumbent.requests), (candidate.errors, candidate.requests), confidence),
        share_difference((incumbent.non_finite, incumbent.requests), (candidate.non_finite, candidate.requests), confidence),
        ratio(incumbent.cpu_s_per_row, candidate.cpu_s_per_row, confidence),
        mean_ratio(incumbent.cpu_s_per_row, candidate.cpu_s_per_row, confidence),
        ratio(incumbent.latencies_s, candidate.latencies_s, confidence),
        share(candidate.agreements, candidate.compared, confidence),
    )


def _harms(incumbent: ArmFacts, candidate: ArmFacts, found: _Intervals, policy: Policy) -> list[str]:
    """What is proven, each in words."""
    harms = []
    if candidate.deaths >= policy.fatal_deaths:
        harms.append(f"its process died {candidate.deaths} times")
    if candidate.errors >= LEAST_FAULTS and found.errors.low > 0:
        harms.append(f"it fails {_counts(candidate.errors, candidate)} requests, the incumbent {_counts(incumbent.errors, incumbent)}")
    if candidate.non_finite and (not incumbent.non_finite or found.non_finite.low > 0):
        mine, others = _counts(candidate.non_finite, candidate), _counts(incumbent.non_finite, incumbent)
        harms.append(f"{mine} of its answers hold NaN or infinity, of the incumbent's {others}")
    misses = candidate.compared - candidate.agreements
    if policy.fidelity_floor is not None and misses >= LEAST_FAULTS and found.fidelity.high < policy.fidelity_floor:
        harms.append(f"it agrees with golden on {_share(found.fidelity)}, the floor is {policy.fidelity_floor:.1%}")
    if candidate.class_below_floor:
        harms.append(f"it {candidate.class_below_floor}")
    if policy.memory_limit_bytes and candidate.memory_bytes > max(policy.memory_limit_bytes, incumbent.memory_bytes):
        harms.append(f"it takes {_mib(candidate.memory_bytes)} of memory, the objective is {_mib(policy.memory_limit_bytes)}")
    enough = not _shortages(incumbent, candidate, policy)
    if enough and found.cpu.low > 1 + policy.effect and found.latency.low > 1 + policy.effect:
        harms.append(f"it is slower: CPU time per row {change(found.cpu)}, latency {change(found.latency)}")
    elif enough and found.cpu.low <= 1 + policy.effect < found.mean_cpu.low:
        harms.append(f"some of its calls cost far more: mean CPU time per row {change(found.mean_cpu)}, the middle {change(found.cpu)}")
    return harms


def _shortages(incumbent: ArmFacts, candidate: ArmFacts, policy: Policy) -> list[str]:
    short = []
    for side, facts in (("incumbent", incumbent), ("candidate", candidate)):
        counts = {
            "requests": facts.requests,
            "CPU times": len(finite(facts.cpu_s_per_row)),
            "latencies": len(finite(facts.latencies_s)),
        }
        short += [f"{n} {what} of the {side}, {policy.least_samples} are needed" for what, n in counts.items() if n < policy.least_samples]
    if policy.fidelity_floor is not None and 0 < candidate.compared < policy.least_compared:
        short.append(f"{candidate.compared} of its answers were held to golden's, {policy.least_compared} are needed")
    return short


def _doubts(candidate: ArmFacts, found: _Intervals, policy: Policy) -> list[str]:
    """What is neither shown nor ruled out, although there are samples enough to judge at all."""
    doubts = []
    bound = 1 + policy.effect
    if found.cpu.low > bound:
        doubts.append(f"CPU time per row {change(found.cpu)}, but latency {change(found.latency)} does not show it")
    elif found.cpu.high > bound:
        doubts.append(f"CPU time per row {change(found.cpu)} is not told from {policy.effect:+.0%}")
    elif found.mean_cpu.estimate > bound:
        doubts.append(f"mean CPU time per row {change(found.mean_cpu)}: some of its calls cost far more, too few to be sure")
    if candidate.errors and found.errors.estimate > policy.error_margin:
        doubts.append(
            f"{_counts(candidate.errors, candidate)} requests failed, a larger share than the incumbent's, but too few to be sure"
        )
    floor = policy.fidelity_floor
    if floor is not None and candidate.compared and found.fidelity.estimate < floor:
        doubts.append(f"it agrees with golden on {_share(found.fidelity)}, not told from the floor {floor:.1%}")
    return doubts


def _merits(candidate: ArmFacts, found: _Intervals, policy: Policy) -> list[str]:
    said = [
        f"CPU time per row {change(found.cpu)}",
        f"latency {change(found.latency)}",
        f"{_counts(candidate.errors, candidate)} requests failed",
    ]
    if found.latency.low > 1 + policy.effect:
        said.append("wall time alone is no fault of a version: its queue, its threads or neighbours")
    if candidate.compared:
        said.append(f"agrees with golden on {_share(found.fidelity)}")
    return said


def change(found: Interval) -> str:
    """A ratio as people say it: −61 % [−63, −58]."""
    if not (math.isfinite(found.low) and math.isfinite(found.high)):
        return "unknown"
    return f"{found.estimate - 1:+.0%} [{found.low - 1:+.0%}, {found.high - 1:+.0%}]"


def _counts(hits: int, facts: ArmFacts) -> str:
    return f"{hits} of {facts.requests}"


def _share(found: Interval) -> str:
    return f"{found.estimate:.1%} [{found.low:.1%}, {found.high:.1%}]"


def _mib(size: int) -> str:
    return f"{size / 2**20:.0f} MiB"


def _numbers(incumbent: ArmFacts, candidate: ArmFacts, found: _Intervals) -> JSON:
    sides = {"incumbent": incumbent, "candidate": candidate}
    counts: JSON = {
        side: {
            "requests": facts.requests, "errors": facts.errors, "deaths": facts.deaths, "non_finite": facts.non_finite,
            "cpu_samples": len(finite(facts.cpu_s_per_row)), "latency_samples": len(finite(facts.latencies_s)),
            "agreements": facts.agreements, "compared": facts.compared, "memory_bytes": facts.memory_bytes,
        }
        for side, facts in sides.items()
    }  # fmt: skip
    intervals = {
        "error_difference": found.errors, "cpu_ratio": found.cpu, "mean_cpu_ratio": found.mean_cpu, "latency_ratio": found.latency, "fidelity": found.fidelity,
    }  # fmt: skip
    return counts | {name: _json(interval) for name, interval in intervals.items()}


def _json(interval: Interval) -> JSON:
    """JSON has neither nan nor infinity: what the data cannot give is null."""
    parts = {"estimate": interval.estimate, "low": interval.low, "high": interval.high}
    return {name: value if math.isfinite(value) else None for name, value in parts.items()}
