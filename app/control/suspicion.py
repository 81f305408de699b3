"""When to look: coarse rules over what each version did lately, against what is normal for it. Pure; a suspicion is no verdict.

Events come first (a file does not slow down by itself); between them two blocks in a row must be out of the ordinary. What a false
suspicion costs is one paired replay of some seconds, so the limits are set for a few a day and host, not for none.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Final

from app.catalog.model_config import ModelConfig, Promise
from app.control.normal import BASE_LABELS, LEAST_CALLS, REFUSED_LIMIT, Normal, cost_ratio
from app.control.objectives import Burn
from app.control.quality import sureness_shift, worst_class
from app.domain import JSON, short
from app.telemetry.block import Block
from app.telemetry.hostfacts import HostFacts
from optimizers.stats import wilson

COST_LIMIT: Final = 1.15
"""CPU time per row against the bucket's normal. Neighbours move it by up to 8 % (docs/loop.md); two blocks in a row beyond 15 % are rare."""
LEAP_LIMIT: Final = 1.5
"""One block, and be it the open one, is enough where the middle call costs so much more. Neighbours come near that only for models that live off memory (docs/loop-detection.md)."""
LEAP_CALLS: Final = 40
LEAP_MISSED: Final = 0.25
"""Share of 40 answers that are late from which a leap of their time is looked into at once, where LEAP_ALONE holds as well."""
LEAP_ALONE: Final = 2.0
"""The middle call's wall time over its CPU time, against its normal and against what the server's own main thread has to wait. Neighbours hold up
both: at most 1.2 was measured beside them, 3 and more where the runner alone was held up (docs/loop.md)."""
HELD_BACK: Final = 0.05
"""Share of the time that a quota or the hypervisor takes, from which the host is what makes calls longer."""
SLOW_LIMIT: Final = 2.0
"""p95 against its normal, where nothing is promised. Wall time doubles beside neighbours: it only asks for a look."""
ERRORS_LIMIT: Final = 0.01
LEAST_ERRORS: Final = 3
DEATHS: Final = 3
MEMORY_LIMIT: Final = 1.5
MEMORY_SLACK: Final = 64 << 20
LABELS_MARGIN: Final = 0.02


class Kind(StrEnum):
    EVENT = "event"
    LATENCY = "latency"
    COST = "cost"
    REFUSALS = "refusals"
    ERRORS = "errors"
    DEATHS = "deaths"
    NON_FINITE = "non_finite"
    MEMORY = "memory"
    FIDELITY = "fidelity"
    CONFIDENCE = "confidence"
    LABELS = "labels"


@dataclass(frozen=True, slots=True)
class Suspicion:
    """What looks wrong with a version, in words and numbers."""

    kind: Kind
    text: str
    numbers: JSON = field(default_factory=dict)


def faulty(found: Sequence[Suspicion]) -> bool:
    """Wrong or missing answers, not slow ones: leaving such a version needs neither budget nor agreement, and it is not gone back to."""
    return any(one.kind in (Kind.ERRORS, Kind.DEATHS, Kind.NON_FINITE, Kind.FIDELITY) for one in found)


@dataclass(frozen=True, slots=True)
class Seen:
    """The newest closed blocks of the active version, the oldest first, and a longer stretch for what is rare."""

    blocks: Sequence[Block]
    lately: Block
    memory_bytes: int
    recent_deaths: int
    recent_kills: int = 0
    gathered: Sequence[Block] | None = None
    """Of little traffic several blocks in one (Window.gathered), where that was looked for: what requests cost is told by these."""


def suspicions(seen: Seen, normal: Normal, config: ModelConfig, burning: Burn | None) -> list[Suspicion]:
    """Everything that asks for a look now, the gravest first."""
    quiet = [block for block in (seen.blocks if seen.gathered is None else seen.gathered)[-2:] if not block.disturbed]
    found = [
        *_broken(seen, config),
        *_refusals(seen.blocks[-1:]),
        *_unavailable(seen, config.objective.availability),
        *_too_few(seen.blocks[-2:], config.objective.throughput_rps),
        *_slow(seen, normal, config.objective.promises, burning),
        *_cost(quiet, normal),
        *_dear(quiet, config.objective.cpu_s_per_request),
        *_memory(seen, normal, config),
        *_fidelity(seen.lately, config),
        *_confidence(seen.lately, normal),
        *_labels(seen.lately, normal),
    ]
    return [one for one in found if one is not None]


def _broken(seen: Seen, config: ModelConfig) -> list[Suspicion | None]:
    found: list[Suspicion | None] = []
    last = seen.blocks[-1:] and seen.blocks[-1]
    outside, own = seen.recent_kills, seen.recent_deaths - seen.recent_kills
    if max(own, outside) >= DEATHS:
        how = f"ended {own}" if own >= DEATHS else f"was killed or stopped from outside {outside}"
        found.append(Suspicion(Kind.DEATHS, f"its runner {how} times in five minutes", {"deaths": own, "from_outside": outside}))
    if not last:
        return found
    lately, quiet = seen.lately, last.requests + last.failures + last.failed_calls < LEAST_CALLS
    of = lately if quiet and last.failures else last  # of few requests a block tells nothing, and five minutes do
    answered = of.requests + of.failures
    limit = config.objective.error_rate if config.objective.error_rate is not None else ERRORS_LIMIT
    if of.failures >= LEAST_ERRORS and of.failures > limit * answered:
        text = f"{of.failures} of {answered} requests failed by the server's or the model's fault (limit {limit:.1%})"
        found.append(Suspicion(Kind.ERRORS, text, {"failures": of.failures, "answered": answered, "limit": limit}))
    of = lately if quiet else last
    mostly = last.failed_calls > last.requests and lately.failed_calls > lately.requests
    if mostly and of.failed_calls + of.requests >= LEAST_CALLS:
        text = f"the model failed on {of.failed_calls} of {of.failed_calls + of.requests} requests that it should have answered"
        found.append(Suspicion(Kind.ERRORS, text, {"failed_calls": of.failed_calls, "answered": of.requests}))
    if last.non_finite:
        found.append(Suspicion(Kind.NON_FINITE, f"{last.non_finite} answers held NaN or infinity", {"non_finite": last.non_finite}))
    return found


def _refusals(blocks: Sequence[Block]) -> list[Suspicion | None]:
    if not blocks or blocks[-1].refused + blocks[-1].expired <= REFUSED_LIMIT * blocks[-1].offered:
        return []
    last = blocks[-1]
    refused = [f"{last.refused} of {last.offered} requests were refused: its queue is full"] if last.refused else []
    expired = [f"{last.expired} of {last.offered} requests expired: their own deadlines are shorter than the wait"] if last.expired else []
    text = "; ".join([*refused, *expired])
    return [Suspicion(Kind.REFUSALS, text, {"refused": last.refused, "expired": last.expired, "offered": last.offered})]


def _unavailable(seen: Seen, least: float | None) -> list[Suspicion | None]:
    """The upper confidence bound of the share that was answered lies below the objective, and it goes on."""
    lately = seen.lately
    if least is None or lately.offered < LEAST_CALLS or not seen.blocks or seen.blocks[-1].requests == seen.blocks[-1].offered:
        return []
    _, high = wilson(lately.requests, lately.offered)
    if high >= least:
        return []
    kind = Kind.ERRORS if lately.failures >= lately.refused + lately.expired else Kind.REFUSALS
    text = f"{lately.requests} of {lately.offered} requests were answered (objective {least:.2%})"
    return [Suspicion(kind, text, {"answered": lately.requests, "offered": lately.offered, "objective": least})]


def _too_few(blocks: Sequence[Block], least: float | None) -> list[Suspicion | None]:
    """As many came as it must be able to serve, two blocks in a row, and fewer were answered."""
    if least is None or len(blocks) < 2 or not all(block.offered >= least * block.seconds > block.requests for block in blocks):
        return []
    answered = blocks[-1].requests / blocks[-1].seconds
    text = f"answers {short(answered)} requests/s of {short(blocks[-1].offered / blocks[-1].seconds)} that come; the objective is {least:g}"
    return [Suspicion(Kind.REFUSALS, text, {"answered_per_s": round(answered, 3), "objective": least})]


def _slow(seen: Seen, normal: Normal, promises: Sequence[Promise], burning: Burn | None) -> list[Suspicion | None]:
    """Burn rates, of the first promise, stand on windows of their own, so that they also tell of a model with few requests; all else needs answers
    enough in both blocks."""
    blocks = [block for block in seen.blocks[-2:] if block.requests]
    enough = len(blocks) == 2 and all(block.requests >= LEAST_CALLS for block in blocks)
    if not blocks or not (enough or (burning is not None and seen.lately.requests >= LEAST_CALLS)):
        return []
    p95 = blocks[-1].total.quantile(0.95) or 0.0
    for promise in promises:
        first = promise is promises[0]
        misses = [1 - block.within / block.requests if first else block.total.share_above(promise.threshold_s) for block in blocks]
        burns = first and burning is not None and burning.fires and min(misses) > 1 - promise.share  # what is over needs no look
        if burns or (enough and all(missed > promise.most_missed for missed in misses)):
            at = blocks[-1].total.quantile(promise.share) or 0.0
            text = f"p{promise.share * 100:g} {_ms(at)} > {_ms(promise.threshold_s)}"
            return [Suspicion(Kind.LATENCY, text, {"missed": round(misses[-1], 4), "quantile_s": at, "threshold_s": promise.threshold_s})]
    if (
        not promises
        and enough
        and normal.known
        and all((block.total.quantile(0.95) or 0.0) > SLOW_LIMIT * normal.p95_s for block in blocks)
    ):
        text = f"p95 {_ms(p95)}, {p95 / normal.p95_s:.1f} × its normal {_ms(normal.p95_s)}"
        return [Suspicion(Kind.LATENCY, text, {"p95_s": p95, "normal_s": normal.p95_s})]
    return []


def leap_of_latency(block: Block, normal: Normal, promise: Promise | None, host: HostFacts) -> Suspicion | None:
    """Many answers of this one block are late, since the calls themselves wait, and far more than the server does beside them on the same host.

    The server's main thread is the witness: neighbours, load and quotas hold up both. What holds up the runner alone (its cores, its priority, its
    memory) a fresh one may not have. Time in the queue is none of it.
    """
    stretch, usual = block.stretch.quantile(0.5), normal.stretch
    if not normal.known or not usual or stretch is None or block.disturbed:
        return None
    if block.requests < LEAP_CALLS or block.stretch.count < LEAST_CALLS or _held_back(host):
        return None
    late, limit_s = _late(block, normal, promise)
    alone = stretch / usual / _server_stretch(block, host)
    if late <= (LEAP_MISSED if promise is None else max(LEAP_MISSED, promise.most_missed)) or alone <= LEAP_ALONE:
        return None
    text = f"{late:.0%} of {block.requests} answers took more than {_ms(limit_s)}: calls wait {alone:.1f} × as long as they did and as the server does"
    return Suspicion(Kind.LATENCY, text, {"missed": round(late, 4), "alone": round(alone, 2), "leapt": True})


def _late(block: Block, normal: Normal, promise: Promise | None) -> tuple[float, float]:
    """Share of the answers that came later than promised, or than twice their normal p95 where nothing is, and that limit."""
    if promise is not None:
        return 1 - block.within / block.requests, promise.threshold_s
    limit_s = SLOW_LIMIT * normal.p95_s
    return block.total.share_above(limit_s), limit_s


def _server_stretch(block: Block, host: HostFacts) -> float:
    """How much longer the server's own main thread takes for having to wait for a core; where that is not known, the runner's waiting is the host's."""
    waiting = block.waiting_ratio if host.server_waiting_ratio is None else host.server_waiting_ratio
    return 1 / max(0.01, 1 - waiting)


def _held_back(host: HostFacts) -> bool:
    return max(host.throttled_ratio or 0.0, host.steal_ratio or 0.0) > HELD_BACK


def _cost(quiet: Sequence[Block], normal: Normal) -> list[Suspicion | None]:
    ratios = [cost_ratio(block, normal) or 0.0 for block in quiet]
    if not normal.known or not ratios:
        return []
    leapt = ratios[-1] > LEAP_LIMIT and quiet[-1].calls >= LEAP_CALLS
    if not leapt and (len(ratios) < 2 or min(ratios) <= COST_LIMIT):
        return []
    how_long = f"over {quiet[-1].calls} calls" if leapt else "two blocks in a row"
    text = f"CPU time per row {ratios[-1]:.2f} × its normal, {how_long}"
    return [Suspicion(Kind.COST, text, {"ratio": round(ratios[-1], 4), "leapt": leapt})]


def _dear(quiet: Sequence[Block], most_s: float | None) -> list[Suspicion | None]:
    """A request takes more CPU time than the objective allows, two blocks in a row."""
    if most_s is None or len(quiet) < 2 or any(block.requests < LEAST_CALLS for block in quiet):
        return []
    takes_s = [block.cpu_s / block.requests for block in quiet]
    if min(takes_s) <= most_s:
        return []
    text = f"a request takes {_ms(takes_s[-1])} of CPU time, the objective is {_ms(most_s)}"
    return [Suspicion(Kind.COST, text, {"cpu_s": takes_s[-1], "objective_s": most_s})]


def _memory(seen: Seen, normal: Normal, config: ModelConfig) -> list[Suspicion | None]:
    limit = config.objective.memory_mb
    if limit is not None and seen.memory_bytes > limit * (1 << 20):
        text = f"its runner holds {seen.memory_bytes >> 20} MiB, the objective is {limit:g}"
        return [Suspicion(Kind.MEMORY, text, {"bytes": seen.memory_bytes, "limit_mb": limit})]
    if normal.known and seen.memory_bytes > MEMORY_LIMIT * normal.memory_bytes + MEMORY_SLACK:
        text = f"its runner holds {seen.memory_bytes >> 20} MiB, {normal.memory_bytes >> 20} when all was well"
        return [Suspicion(Kind.MEMORY, text, {"bytes": seen.memory_bytes, "normal_bytes": normal.memory_bytes})]
    return []


def _fidelity(lately: Block, config: ModelConfig) -> list[Suspicion | None]:
    """The upper confidence bound of the agreement lies below the floor: that it is met can be ruled out."""
    metric, floor = config.quality.resolved(config.task)
    least = config.objective.fidelity if config.objective.fidelity is not None else (floor if metric in ("agreement", "accuracy") else 0.99)
    if lately.compared < LEAST_CALLS:
        return []
    _, high = wilson(lately.agreed, lately.compared)
    if high >= least:
        worst = worst_class(lately.likeness, config)
        numbers: JSON = {"class": worst.group, "agreed": worst.agreed, "compared": worst.compared, "floor": worst.floor} if worst else {}
        return [Suspicion(Kind.FIDELITY, worst.text, numbers)] if worst else []
    share = lately.agreed / lately.compared
    text = f"agrees with golden on {share:.1%} of {lately.compared} live requests (floor {least:.1%})"
    return [Suspicion(Kind.FIDELITY, text, {"agreed": lately.agreed, "compared": lately.compared, "floor": least})]


def _confidence(lately: Block, normal: Normal) -> list[Suspicion | None]:
    """It is less sure than golden on the same requests, or surer, and was not when it was new."""
    shift = sureness_shift(lately.likeness, normal.likeness)
    if shift is None:
        return []
    entropy, margin = shift
    word = "less sure" if entropy - margin > 0 else "surer"
    text = f"{word} than golden on the same requests: entropy {entropy:+.2f}, margin {margin:+.2f} standard deviations since it was new"
    return [Suspicion(Kind.CONFIDENCE, text, {"entropy_shift": round(entropy, 3), "margin_shift": round(margin, 3)})]


def _labels(lately: Block, normal: Normal) -> list[Suspicion | None]:
    """Labels that came back are right less often than they were: a suspicion, and no more, since anybody with the token may send them."""
    if lately.labelled < LEAST_CALLS or normal.labelled < BASE_LABELS:
        return []
    usual, (_, high) = normal.right / normal.labelled, wilson(lately.right, lately.labelled)
    if high >= usual - LABELS_MARGIN:
        return []
    text = f"right on {lately.right} of {lately.labelled} labelled answers, on {usual:.1%} when all was well"
    return [Suspicion(Kind.LABELS, text, {"right": lately.right, "labelled": lately.labelled, "usual": round(usual, 4)})]


def _ms(seconds: float) -> str:
    return f"{short(seconds * 1e3)} ms"
