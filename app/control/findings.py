"""What a diagnosis may rest on: blocks, the host, experiments, and what these amount to by themselves. Pure; it blames nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Final

from app.control.normal import REFUSED_LIMIT, Normal, cost_ratio
from app.control.suspicion import Kind, Suspicion
from app.domain import JSON
from app.telemetry.block import Block
from app.telemetry.hostfacts import HostFacts

WAITING: Final = 0.25
"""Share of a runner's time spent waiting for a core from which the host, not the model, makes it slow."""
AT_THE_EDGE: Final = 0.4
"""Share of a request's time, outside queue and runner, from which reading and writing it is what makes it slow."""
PRESSED: Final = 0.10
STOLEN: Final = 0.10
THROTTLED: Final = 0.05
QUEUED: Final = 0.5
SHORT_QUEUE: Final = 0.75
"""Share of their time that answered requests wait while others are refused, below which a longer queue would have held those."""
FLAT: Final = 1.10
CROWDED: Final = 1.5
CORES, HOST_CLASS = "cores", "host class"
HOST_EVENTS: Final = {
    CORES: "it has other cores, or another quota",
    HOST_CLASS: "another class of hosts, or another runtime, since this start",
}
DECAYED_CPU: Final = 1.15
DECAYED_WALL: Final = 1.3


@dataclass(frozen=True, slots=True)
class Replay:
    """What the paired replay found (optimizers.blame): (estimate, low, high) of ratios of CPU time per row."""

    version: tuple[float, float, float] | None = None
    """Live file over the file it is held to, on reference samples, over what the proof says that ratio is."""
    recent: tuple[float, float, float] | None = None
    """Live file, inputs that come now over `usual` ones."""
    findings: tuple[str, ...] = ()
    held_to: str = ""
    usual: str = "frozen"
    """`earlier`: captured before all this began; `frozen`: the reference's."""
    report: Mapping[str, Any] = field(default_factory=dict)
    why: str = ""
    """Why it was not possible, or not with the file that the live one is held to."""


@dataclass(frozen=True, slots=True)
class FreshRunner:
    """The live runner over a fresh one: (estimate, low, high) of the ratios of CPU and of wall time."""

    cpu: tuple[float, float, float]
    wall: tuple[float, float, float]


@dataclass(frozen=True, slots=True)
class Findings:
    """All that a diagnosis may rest on. `others` are models that are suspected of the same at this moment."""

    suspicions: Sequence[Suspicion]
    block: Block
    normal: Normal
    host: HostFacts
    cores: int
    instances: int
    threads: int
    others: int = 0
    models: int = 1
    began_with_version: bool = False
    drift: float | None = None
    agreed_before: tuple[float, int] = (0.0, 0)
    """(agreed with golden, compared) since the version serves, but for the last moments."""
    replay: Replay | None = None
    fresh: FreshRunner | None = None
    killers: int = 0
    """Inputs that killed its runner when run alone."""
    own_deaths: int = 0
    kills: int = 0
    """Unasked ends of its runner in five minutes: by itself, and by somebody outside."""
    first_memory: int = 0
    """Bytes that its runner held soon after it began to answer; 0 where that is not known."""
    event: str = ""
    """What happened shortly before, where something did: start, swap, settings, host class, cores."""


def is_load(found: Findings) -> bool:
    """Queues grow (or refuse) while a row costs what it always did, and the runner gets its cores."""
    block = found.block
    queued = block.refused + block.expired > 0.02 * block.offered or block.queue_ratio > QUEUED or is_crowded(found)
    ratio = cost_ratio(block, found.normal)
    used = min(found.cores, found.instances * found.threads)
    return queued and (ratio is None or ratio < FLAT) and not host_reasons(found) and (used >= found.cores or _saturated(found))


def leaves_cores_idle(found: Findings) -> bool:
    return found.instances * found.threads < found.cores and (found.host.busy_ratio is None or found.host.busy_ratio < 0.85)


def is_settings(found: Findings) -> bool:
    """It began with other settings, and either most of the time goes into waiting while cores stand idle, or the queue is full though hardly
    anything waits: no experiment tells more than to undo them does."""
    others = {one.kind for one in found.suspicions} - {Kind.LATENCY, Kind.REFUSALS, Kind.EVENT}
    idle = found.block.queue_ratio > QUEUED and leaves_cores_idle(found)
    return found.event == "settings" and not others and (idle or is_short_of_queue(found))


def is_short_of_queue(found: Findings) -> bool:
    """Requests were refused since other settings are used, and those taken hardly waited: of a queue as long as it was they would wait most of their time."""
    block = found.block
    return found.event == "settings" and block.refused > REFUSED_LIMIT * block.offered and block.queue_ratio < SHORT_QUEUE


def is_crowded(found: Findings) -> bool:
    """More rows share a call than when all was well, since more come at once: a longer call is what each of them waits for."""
    return found.normal.known and mean_batch(found.block) > CROWDED * max(1.0, found.normal.mean_batch)


def mean_batch(block: Block) -> float:
    return block.called_rows / block.calls if block.calls else 0.0


def _saturated(found: Findings) -> bool:
    """Whether the cores are busy, so that other settings could not use more of them."""
    return found.host.busy_ratio is not None and found.host.busy_ratio >= 0.85


def is_host(found: Findings) -> bool:
    return bool(host_reasons(found))


def host_reasons(found: Findings) -> list[str]:
    host, block = found.host, found.block
    reasons = []
    others = host.others_ratio
    if block.waiting_ratio > WAITING and (others is None or others > 0.15):
        reasons.append(f"its threads wait for a core {block.waiting_ratio:.0%} of the time")
    if found.block.edge_ratio > AT_THE_EDGE and (host.server_waiting_ratio or 0.0) > WAITING and (others or 0.0) > 0.15:
        reasons.append(
            f"the server itself waits for a core {host.server_waiting_ratio:.0%} of the time, while others use {others:.0%} of all cores"
        )
    if host.throttled_ratio is not None and host.throttled_ratio > THROTTLED:
        reasons.append(f"a CPU quota holds it back {host.throttled_ratio:.0%} of the time")
    if host.steal_ratio is not None and host.steal_ratio > STOLEN:
        reasons.append(f"{host.steal_ratio:.0%} of the cores' time is stolen by the hypervisor")
    if host.memory_pressure is not None and host.memory_pressure > PRESSED:
        reasons.append(f"the host is short of memory {host.memory_pressure:.0%} of the time")
    if found.event in HOST_EVENTS:
        reasons.append(f"the host changed: {HOST_EVENTS[found.event]}")
    return reasons


def decayed(fresh: FreshRunner) -> bool:
    return fresh.cpu[1] > DECAYED_CPU or fresh.wall[1] > DECAYED_WALL


def as_proven(found: Findings) -> bool:
    return found.replay is not None and "as_proven" in found.replay.findings


def numbers(found: Findings) -> JSON:
    block = found.block
    ratio = cost_ratio(block, found.normal)
    told: JSON = {
        "suspicions": [one.kind.value for one in found.suspicions],
        "p95_s": block.total.quantile(0.95),
        "requests": block.requests,
        "refused": block.refused,
        "expired": block.expired,
        "queue_ratio": round(block.queue_ratio, 4),
        "waiting_ratio": round(block.waiting_ratio, 4),
        "cost_ratio": round(ratio, 4) if ratio is not None else None,
        "drift": found.drift,
        "host": found.host.to_json(),
        "event": found.event,
    }
    if found.replay is not None:
        told["replay"] = {
            "version": found.replay.version, "recent": found.replay.recent, "findings": list(found.replay.findings), "why": found.replay.why,
        }  # fmt: skip
    if found.fresh is not None:
        told["fresh"] = {"cpu": found.fresh.cpu, "wall": found.fresh.wall}
    return told
