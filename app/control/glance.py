"""What looks wrong with the version that answers now, by the blocks that closed and the one that is open. It blames nobody."""

from __future__ import annotations

from time import monotonic

from app.catalog.model_config import ModelConfig
from app.control.normal import LEAST_CALLS, other_shapes
from app.control.objectives import burn
from app.control.patient import EVENT_S, SETTLE_BLOCKS, SHAPES, Patient
from app.control.standing import LATELY_S
from app.control.suspicion import LEAP_CALLS, Kind, Seen, Suspicion, leap_of_latency, suspicions
from app.domain import ModelView
from app.telemetry.block import Block
from app.telemetry.hostfacts import HostFacts
from app.telemetry.window import Window
from optimizers.two_samples import share_difference


def glance(
    window: Window, view: ModelView, gathered: list[Block], patient: Patient, config: ModelConfig, host: HostFacts, host_at: float
) -> list[Suspicion]:  # fmt: skip
    """What looks wrong now; `gathered` are the newest blocks that hold enough requests (Window.gathered).

    Faults count from the open block on, a due event asks for a look once there is traffic to look at. Leaps of the cost and of the latency do not wait
    either, nor do other shapes, which are an event. The rest is judged when a block closes, and stands until the next one does.
    """
    now = window.now()
    blocks = [block for block in window.closed(view.name, view.active, SETTLE_BLOCKS) if block.began >= view.active_since]
    judged = blocks[-1].ended if blocks else 0.0
    if judged != patient.judged_until or view.recent_deaths != patient.judged_deaths:
        patient.judged_until, patient.judged_deaths = judged, view.recent_deaths
        lately = window.since(view.name, view.active, max(view.active_since, now - LATELY_S), sketches=False)
        patient.requests, patient.non_finite = lately.requests, (lately.non_finite, lately.requests)
        promise = config.objective.promise
        burning = burn(promise.share, lambda seconds: window.good_and_bad(view.name, seconds)) if promise is not None else None
        seen = Seen(blocks, lately, view.memory_bytes, view.recent_deaths, view.recent_kills, gathered)
        patient.found = suspicions(seen, patient.normal, config, burning) if blocks or view.recent_deaths else []
    found = list(patient.found)
    opened = window.since(view.name, view.active, max(view.active_since, now - window.block_s))
    urgent = suspicions(Seen([opened], Block(now, now), view.memory_bytes, 0), patient.normal, config, None)
    urgent = [one for one in urgent if one.kind in (Kind.ERRORS, Kind.NON_FINITE, Kind.COST)]
    urgent += _leap(window, opened, blocks, patient, config, host, host_at)
    kinds = {one.kind for one in found}
    found += [one for one in urgent if one.kind not in kinds]
    if _as_before(patient, opened):
        found = [one for one in found if one.kind is not Kind.NON_FINITE]
    if patient.again_at and monotonic() >= patient.again_at:
        patient.due, patient.again_at = True, 0.0
    slow = {one.kind for one in found} <= {Kind.LATENCY, Kind.COST, Kind.REFUSALS}
    swapped = patient.event == "swap" and monotonic() - patient.event_at < EVENT_S
    if not view.rung and not patient.due and (not found or (slow and not swapped)):
        notice_shapes(patient, opened)
    if patient.due and max(patient.requests, opened.requests) >= LEAST_CALLS:
        found.append(Suspicion(Kind.EVENT, f"{patient.event}: is it what it was proven to be?", {"event": patient.event}))
    return found


def _as_before(patient: Patient, opened: Block) -> bool:
    """Whether NaN and infinity are among its answers as they were among those of the version before: they are what is asked for, then."""
    before, stretches = patient.non_finite_before, ((opened.non_finite, opened.requests), patient.non_finite)
    return bool(before[0]) and not any(share_difference(before, now).low > 0 for now in stretches)


def _leap(
    window: Window, opened: Block, blocks: list[Block], patient: Patient, config: ModelConfig, host: HostFacts, host_at: float
) -> list[Suspicion]:  # fmt: skip
    """A leap of latency that two readings of the host in a row leave unexplained, seen in the newest block that has answers enough."""
    latest = [block for block in blocks[-1:] if block.ended > window.now() - window.block_s]
    block = opened if opened.requests >= LEAP_CALLS or not latest else latest[0]
    leap = leap_of_latency(block, patient.normal, config.objective.promise, host)
    stands = patient.leap_stands(leap is not None, monotonic(), host_at)
    return [leap] if leap is not None and stands else []


def notice_shapes(patient: Patient, block: Block) -> None:
    """Rows of other sizes than before are an event, and the new normal; also while it is slow already, which they may explain."""
    changed = other_shapes(patient.normal, block) if monotonic() >= patient.shapes_after else None
    if changed is not None:
        patient.normal, patient.event, patient.event_at, patient.due = changed, SHAPES, monotonic(), True
