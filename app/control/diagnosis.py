"""Whose fault it is, decided by rule from numbers: load, host, process, input, settings, version, or unknown. Pure.

Wall time never blames a model: it is what users feel. A version is blamed only by a paired replay in CPU time, by errors and deaths that
came with it, or by golden's answers; a process only by a fresh one beside it (docs/loop.md has the table of rules).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import StrEnum
from typing import Final

from app.control.findings import (
    AT_THE_EDGE,
    DECAYED_CPU,
    FLAT,
    PRESSED,
    THROTTLED,
    WAITING,
    Findings,
    as_proven,
    decayed,
    host_reasons,
    is_crowded,
    is_host,
    is_load,
    is_settings,
    is_short_of_queue,
    leaves_cores_idle,
    mean_batch,
    numbers,
)
from app.control.normal import cost_ratio
from app.control.suspicion import DEATHS, Kind, Suspicion
from app.domain import JSON, short

SLOW: Final = frozenset({Kind.LATENCY, Kind.COST, Kind.REFUSALS})
DRIFTED: Final = 0.25
"""PSI of the predicted classes from which the traffic is another one."""


class Cause(StrEnum):
    LOAD = "load"
    HOST = "host"
    PROCESS = "process"
    INPUT = "input"
    SETTINGS = "settings"
    VERSION = "version"
    UNKNOWN = "unknown"


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """A cause, how sure (0 to 1), why in words, the numbers, what is ruled out and by what, and what else was seen."""

    cause: Cause
    confidence: float
    text: str
    evidence: JSON = field(default_factory=dict)
    rules_out: tuple[str, ...] = ()
    beside: tuple[str, ...] = ()

    @property
    def inconclusive(self) -> bool:
        """It was replayed, on a host too busy to tell."""
        replayed = self.evidence.get("replay")
        return isinstance(replayed, dict) and "inconclusive" in replayed["findings"]

    @property
    def explains_slowness(self) -> bool:
        """A paired replay showed what makes it slow."""
        replayed = self.evidence.get("replay")
        return isinstance(replayed, dict) and bool({"version_slower", "input_costlier"} & set(replayed["findings"]))


BEFORE_ANSWERS: Final = 40
BEFORE_AGREED: Final = 0.98
"""A version that agreed with golden on so many live requests until a moment ago did not fall by itself."""


def needs_replay(found: Findings) -> bool:
    """Whether only an experiment can tell: where cost rose, or is not known to be what it was, and where time went to the calls themselves."""
    kinds = {one.kind for one in found.suspicions}
    if kinds & {Kind.ERRORS, Kind.DEATHS, Kind.NON_FINITE} or is_settings(found):
        return False
    if kinds & {Kind.COST, Kind.EVENT}:
        return True
    if not kinds & SLOW or Kind.FIDELITY in kinds or _by_growth(found) is not None:
        return False
    ratio = cost_ratio(found.block, found.normal)
    if found.event == "swap" or (ratio is not None and ratio > FLAT):
        return True  # a busy host or a full queue may hide a version that costs more
    return not is_load(found) and not is_host(found)


def needs_probe(found: Findings) -> bool:
    """Whether a fresh runner beside the live one could tell: where calls themselves got slower, whoever else is busy."""
    kinds = {one.kind for one in found.suspicions}
    if kinds & {Kind.ERRORS, Kind.DEATHS, Kind.NON_FINITE, Kind.FIDELITY} or _by_growth(found) is not None:
        return False
    return (
        bool(kinds & {Kind.COST, Kind.LATENCY})
        and not is_load(found)
        and not is_settings(found)
        and (found.host.throttled_ratio or 0.0) <= THROTTLED
    )


def diagnose(found: Findings) -> Diagnosis:
    """The first rule that fits, the surest evidence first."""
    return _with_neighbours(_first((_by_faults, _by_fidelity, _by_growth), found) or _slow_or_standing(found), found)


def _slow_or_standing(found: Findings) -> Diagnosis:
    """What may stand for days (its memory, its labels) hides nothing that slows it today; of the two the one counts for which something can be done."""
    standing = _first((_by_confidence, _by_labels, _by_need), found)
    if standing is not None and not any(one.kind in SLOW for one in found.suspicions):
        return standing
    rules = (_by_short_queue, _by_many, _by_fresh_runner, _by_replay, _by_host, _by_load, _by_settings, _as_ever)
    slow = _first(rules, found) or _unexplained(found)
    if standing is None:
        return slow
    nothing_to_mend = slow.cause in (Cause.HOST, Cause.LOAD, Cause.UNKNOWN)
    if nothing_to_mend and standing.cause is not Cause.UNKNOWN:
        return replace(standing, beside=(*standing.beside, f"slow by {slow.cause}: {slow.text}"))
    return replace(slow, beside=(*slow.beside, standing.text))


def _first(rules: Sequence[Callable[[Findings], Diagnosis | None]], found: Findings) -> Diagnosis | None:
    return next((diagnosis for rule in rules if (diagnosis := rule(found)) is not None), None)


# ---- rules


def _by_faults(found: Findings) -> Diagnosis | None:
    faults = [one for one in found.suspicions if one.kind in (Kind.DEATHS, Kind.NON_FINITE, Kind.ERRORS)]
    if not faults:
        return None
    text = "; ".join(one.text for one in faults)
    wrong = any(one.kind is Kind.NON_FINITE for one in faults)
    if (found.host.memory_pressure or 0.0) > PRESSED and not wrong and not found.began_with_version:
        return Diagnosis(Cause.HOST, 0.6, f"{text}, while the host is short of memory", numbers(found))
    killed = found.kills > 0 and not found.own_deaths and all("failures" in one.numbers or one.kind is Kind.DEATHS for one in faults)
    if killed or all(one.kind is Kind.DEATHS and one.numbers["deaths"] < DEATHS for one in faults):
        return Diagnosis(
            Cause.HOST, 0.8, f"{text}: by a person, a limit or the kernel", numbers(found), ("version: it did not end by itself",)
        )
    if all("failed_calls" in one.numbers for one in faults) and not found.began_with_version:
        return Diagnosis(
            Cause.UNKNOWN, 0.5, f"{text}: it began without a new version, so that the requests may be what is wrong", numbers(found)
        )
    if found.began_with_version:
        return Diagnosis(Cause.VERSION, 0.95, f"{text}: began with this version", numbers(found), ("load: faults are not slowness",))
    return Diagnosis(Cause.VERSION, 0.6, f"{text}: this version's runner or answers, whatever began it", numbers(found))


def _by_fidelity(found: Findings) -> Diagnosis | None:
    fidelity = next((one for one in found.suspicions if one.kind is Kind.FIDELITY), None)
    if fidelity is None:
        return None
    drift = found.drift
    agreed, compared = found.agreed_before
    if compared >= BEFORE_ANSWERS and agreed >= BEFORE_AGREED * compared:
        text = f"{fidelity.text}, and did on {short(agreed, 4)} of the {compared} before: the inputs changed"
        return Diagnosis(Cause.INPUT, 0.8, text, numbers(found), ("version: it agreed on the traffic before",))
    if drift is not None and drift > DRIFTED and not found.began_with_version:
        text = f"{fidelity.text}, and the traffic is another one (PSI of the predicted classes {drift:.2f}): its calibration does not fit any more"
        return Diagnosis(Cause.INPUT, 0.8, text, numbers(found), ("version: it agreed on the traffic it was proven with",))
    if found.began_with_version:
        return Diagnosis(Cause.VERSION, 0.9, f"{fidelity.text}, from this version's first minutes on", numbers(found))
    return Diagnosis(Cause.INPUT, 0.7, f"{fidelity.text}, though it passed on reference samples: the inputs changed", numbers(found))


def _by_confidence(found: Findings) -> Diagnosis | None:
    """Its top answers are golden's still, and it is less or more sure of them: with other traffic, calibration that no longer fits; alone, no verdict."""
    doubt = next((one for one in found.suspicions if one.kind is Kind.CONFIDENCE), None)
    if doubt is None:
        return None
    if found.drift is not None and found.drift > DRIFTED:
        text = f"{doubt.text}, and the traffic is another one (PSI of the predicted classes {found.drift:.2f})"
        return Diagnosis(Cause.INPUT, 0.6, text, numbers(found), ("version: it was as sure as golden when it was new",))
    return Diagnosis(Cause.UNKNOWN, 0.4, f"{doubt.text}; the top answers agree and the predicted classes are as ever", numbers(found))


def _by_labels(found: Findings) -> Diagnosis | None:
    """Labels come from outside: they ask for a look, and blame only what the server sees by itself as well."""
    labels = next((one for one in found.suspicions if one.kind is Kind.LABELS), None)
    if labels is None:
        return None
    if found.drift is not None and found.drift > DRIFTED:
        return Diagnosis(Cause.INPUT, 0.6, f"{labels.text}, and the traffic is another one (PSI {found.drift:.2f})", numbers(found))
    return Diagnosis(Cause.UNKNOWN, 0.4, f"{labels.text}; neither the inputs nor the agreement with golden changed", numbers(found))


def _by_growth(found: Findings) -> Diagnosis | None:
    memory = next((one for one in found.suspicions if one.kind is Kind.MEMORY), None)
    if memory is None or _needs(memory, found):
        return None
    return Diagnosis(Cause.PROCESS, 0.8, f"{memory.text}: this process grew, a fresh one starts small", numbers(found))


def _by_need(found: Findings) -> Diagnosis | None:
    memory = next((one for one in found.suspicions if one.kind is Kind.MEMORY), None)
    if memory is None or not _needs(memory, found):
        return None
    text = f"{memory.text}, and held as much from the start: this version needs it"
    return Diagnosis(Cause.VERSION, 0.8, text, numbers(found), ("process: a fresh one holds as much",))


def _needs(memory: Suspicion, found: Findings) -> bool:
    """Whether it was beyond its objective from the start. Where that is not known a fresh runner tells, which is the cheapest remedy."""
    limit = memory.numbers.get("limit_mb")
    return limit is not None and (found.normal.memory_bytes if found.normal.known else found.first_memory) > limit * (1 << 20)


def _by_short_queue(found: Findings) -> Diagnosis | None:
    if not is_short_of_queue(found):
        return None
    block = found.block
    waits = f"what is taken waits only {block.queue_ratio:.0%} of its time"
    text = f"{block.refused} of {block.offered} requests are refused since other settings are used, and {waits}: its queue is too short"
    return Diagnosis(Cause.SETTINGS, 0.8, text, numbers(found), ("load, host: neither makes a queue shorter",))


def _by_many(found: Findings) -> Diagnosis | None:
    """What happens to more than half of all models at once is no one model's doing, unless an experiment says so."""
    if found.others < 1 or 2 * (found.others + 1) <= found.models or is_load(found):
        return None
    if found.fresh is not None and decayed(found.fresh):
        return None
    if found.replay is not None and "version_slower" in found.replay.findings:
        return None  # both files met the same host, in CPU time
    text = f"{found.others + 1} of {found.models} models are out of the ordinary at the same time"
    return Diagnosis(Cause.HOST, 0.8, text, numbers(found), ("version, settings, input: they belong to one model",))


def _by_fresh_runner(found: Findings) -> Diagnosis | None:
    fresh = found.fresh
    if fresh is None or not decayed(fresh):
        return None
    which, ratio = ("CPU time", fresh.cpu) if fresh.cpu[1] > DECAYED_CPU else ("time", fresh.wall)
    text = f"the live runner takes {_ratio(ratio)} × the {which} of a fresh one beside it: the process decayed, not the model"
    return Diagnosis(
        Cause.PROCESS, 0.95, text, numbers(found), ("version: the fresh runner serves the same file", "host: both met the same")
    )


def _by_replay(found: Findings) -> Diagnosis | None:
    replay = found.replay
    if replay is None:
        return None
    if "version_slower" in replay.findings and replay.version is not None:
        text = f"its file takes {_ratio(replay.version)} × the CPU time that version {replay.held_to} and its proof lead to expect"
        return Diagnosis(Cause.VERSION, 0.95, text, numbers(found), ("host, load: both files took turns on one core in CPU time",))
    if "input_costlier" in replay.findings and replay.recent is not None:
        unit = replay.report.get("input_by", "CPU time")
        text = f"the inputs that come now take {_ratio(replay.recent)} × the {unit} of {replay.usual} ones: the input changed"
        return Diagnosis(Cause.INPUT, 0.9, text, numbers(found), ("version: the same file, on both inputs",))
    return None


def _by_host(found: Findings) -> Diagnosis | None:
    reasons = host_reasons(found)
    if not reasons:
        return None
    ruled = tuple(["version: as proven in the paired replay"] if as_proven(found) else [])
    return Diagnosis(Cause.HOST, 0.9 if ruled else 0.8, "; ".join(reasons), numbers(found), ruled)


def _by_load(found: Findings) -> Diagnosis | None:
    if not is_load(found):
        return None
    block = found.block
    refused = "".join(f", {count} {how}" for count, how in ((block.refused, "refused"), (block.expired, "expired")) if count)
    crowd = f", {mean_batch(block):.1f} rows a call ({found.normal.mean_batch:.1f} when all was well)" if is_crowded(found) else ""
    text = f"queue {block.queue_ratio:.0%} of latency at {short(block.offered / block.seconds)} requests/s{crowd}{refused}, cost as proven"
    return Diagnosis(Cause.LOAD, 0.9, text, numbers(found), ("version, process: a row costs what it always cost",))


def _by_settings(found: Findings) -> Diagnosis | None:
    """Requests wait while cores stand idle, or calls of another size than the settings were measured for."""
    block, used = found.block, found.instances * found.threads
    slow = any(one.kind in (Kind.LATENCY, Kind.EVENT, Kind.REFUSALS) for one in found.suspicions)
    if slow and leaves_cores_idle(found) and (block.queue_ratio > 0.3 or block.refused or found.event == "settings"):
        text = f"requests wait ({block.queue_ratio:.0%} of latency) while {used} of {found.cores} cores may be used: the settings do not fit the traffic"
        return Diagnosis(Cause.SETTINGS, 0.8, text, numbers(found), ("version, process: a row costs what it always cost",))
    before, now = found.normal.mean_batch, mean_batch(block)
    if slow and found.normal.known and before and (now > 2 * before or now < before / 2) and found.event not in ("start", ""):
        text = f"calls have {now:.1f} rows on average, {before:.1f} when its settings were found"
        return Diagnosis(Cause.SETTINGS, 0.6, text, numbers(found))
    return None


def _as_ever(found: Findings) -> Diagnosis | None:
    """Nothing changed, and yet it takes more time than promised: it never was fast enough."""
    missed = next((one for one in found.suspicions if {"threshold_s", "objective_s"} & set(one.numbers)), None)
    if missed is None or not as_proven(found):
        return None
    edge = found.block.edge_ratio
    if edge > AT_THE_EDGE and "threshold_s" in missed.numbers:
        text = f"{missed.text}, of which {edge:.0%} goes into reading and writing the request: the model itself is as quick as ever"
        advice = "tensors by the binary protocol, or smaller requests, would be answered sooner"
        return Diagnosis(Cause.UNKNOWN, 0.6, text, numbers(found), ("version: another one would be read and written alike",), (advice,))
    text = f"{missed.text}, with cost as proven, a quiet host and {found.block.queue_ratio:.0%} of it in the queue: this version is slower than its objective"
    return Diagnosis(Cause.VERSION, 0.7, text, numbers(found), ("host, load, process, input: all as ever",))


def _unexplained(found: Findings) -> Diagnosis:
    """No rule fits: what the experiments ruled out all the same, and what they said where they could not tell."""
    ruled = []
    if found.fresh is not None:
        ruled.append(f"process: the live runner takes {_ratio(found.fresh.cpu)} × the CPU time of a fresh one")
    if as_proven(found):
        ruled.append("version, input: as proven in the paired replay")
    told = str(found.replay.report.get("text", "")) if found.replay is not None and "inconclusive" in found.replay.findings else ""
    return Diagnosis(Cause.UNKNOWN, 0.3, f"no rule explains it{told and f'; the paired replay: {told}'}", numbers(found), tuple(ruled))


def _with_neighbours(diagnosis: Diagnosis, found: Findings) -> Diagnosis:
    """Evidence that blames nobody, but that a person wants to know."""
    block, host = found.block, found.host
    beside = [f"no paired replay: {found.replay.why}"] if found.replay is not None and found.replay.why else []
    if block.edge_ratio > AT_THE_EDGE and (host.server_waiting_ratio or 0.0) <= WAITING:
        beside.append(f"{block.edge_ratio:.0%} of a request goes into reading and writing it: the binary protocol would save most of that")
    if block.poisoned:
        beside.append(f"{block.poisoned} of {block.requests} requests held NaN or infinity themselves, and were answered with it")
    if found.killers:
        beside.append(
            f"{'one input' if found.killers == 1 else f'{found.killers} different inputs'} killed its runner when run alone: refused since"
        )
    if host.loop_lag_s > 0.1:
        beside.append(f"the server's event loop ran {host.loop_lag_s * 1e3:.0f} ms late")
    if host.others_ratio is not None and host.others_ratio > 0.3:
        beside.append(f"other programs use {host.others_ratio:.0%} of all cores")
    if not beside:
        return diagnosis
    return replace(diagnosis, beside=(*diagnosis.beside, *beside))


def _ratio(interval: tuple[float, float, float]) -> str:
    return f"{interval[0]:.2f} [{interval[1]:.2f}, {interval[2]:.2f}]"
