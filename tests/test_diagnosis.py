"""Whom the loop blames: tables of findings in, causes out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from app.catalog.model_config import ModelConfig
from app.control.diagnosis import Cause, diagnose, needs_probe, needs_replay
from app.control.findings import FreshRunner, Replay
from app.control.normal import Normal
from app.control.patient import Incident, Patient
from app.control.planner import Action, in_brackets, plan
from app.control.suspicion import Kind, Suspicion
from app.telemetry.block import Block
from app.telemetry.hostfacts import HostFacts
from tests.blocks import GOLDEN, QUIET, block, findings, normal


def cause(kinds: list[Kind], seen: Block | None = None, **more: Any) -> Cause:
    return diagnose(findings(kinds, seen, **more)).cause


SLOWER = Replay((1.5, 1.4, 1.6), None, ("version_slower",), "1")
COSTLIER = Replay((1.0, 0.99, 1.01), (1.4, 1.3, 1.5), ("input_costlier",), "1")
AS_PROVEN = Replay((1.0, 0.98, 1.02), (1.0, 0.99, 1.01), ("as_proven",), "1")
FULL: dict[str, Any] = {"queue_s": 200 * 0.003, "refused": 30}


@pytest.mark.parametrize(
    ("expected", "kinds", "seen", "more"),
    [
        (Cause.LOAD, [Kind.REFUSALS], block(**FULL), {"host": replace(QUIET, busy_ratio=0.99)}),
        (Cause.LOAD, [Kind.LATENCY], block(**FULL), {"host": replace(QUIET, busy_ratio=0.99)}),
        (Cause.HOST, [Kind.LATENCY], block(edge_s=0.6), {"host": replace(QUIET, others_ratio=0.9, server_waiting_ratio=0.5)}),
        (Cause.UNKNOWN, [Kind.LATENCY], block(edge_s=0.6), {"host": replace(QUIET, others_ratio=0.9, server_waiting_ratio=0.1)}),
        (Cause.LOAD, [Kind.LATENCY], block(calls=40, total_s=0.02), {"host": replace(QUIET, busy_ratio=0.99)}),
        (Cause.HOST, [Kind.LATENCY], block(wait_s=0.3), {"host": replace(QUIET, others_ratio=0.6)}),
        (Cause.HOST, [Kind.LATENCY], None, {"host": replace(QUIET, throttled_ratio=0.4)}),
        (Cause.HOST, [Kind.LATENCY], None, {"host": replace(QUIET, steal_ratio=0.3)}),
        (Cause.HOST, [Kind.COST], None, {"others": 2, "models": 3}),
        (Cause.UNKNOWN, [Kind.COST], None, {"others": 1, "models": 4}),
        (Cause.VERSION, [Kind.COST], None, {"others": 2, "models": 3, "replay": SLOWER}),
        (Cause.UNKNOWN, [Kind.LATENCY], block(edge_s=0.6), {"replay": AS_PROVEN}),
        (Cause.HOST, [Kind.DEATHS], None, {"host": replace(QUIET, memory_pressure=0.5)}),
        (Cause.PROCESS, [Kind.COST], None, {"fresh": FreshRunner((1.5, 1.4, 1.6), (1.5, 1.4, 1.6))}),
        (Cause.PROCESS, [Kind.LATENCY], block(wait_s=0.3), {"fresh": FreshRunner((1.0, 0.9, 1.1), (2.2, 1.9, 2.5))}),
        (Cause.PROCESS, [Kind.MEMORY], None, {}),
        (Cause.VERSION, [Kind.COST], None, {"replay": SLOWER}),
        (Cause.VERSION, [Kind.LATENCY], block(wait_s=0.3), {"replay": SLOWER, "host": replace(QUIET, others_ratio=0.6)}),
        (Cause.VERSION, [Kind.NON_FINITE], None, {"began_with_version": True}),
        (Cause.VERSION, [Kind.DEATHS], None, {}),
        (Cause.VERSION, [Kind.LATENCY], None, {"replay": AS_PROVEN}),
        (Cause.INPUT, [Kind.COST], None, {"replay": COSTLIER}),
        (Cause.INPUT, [Kind.FIDELITY], None, {"drift": 0.8}),
        (Cause.VERSION, [Kind.FIDELITY], None, {"began_with_version": True}),
        (Cause.INPUT, [Kind.CONFIDENCE], None, {"drift": 0.8}),
        (Cause.UNKNOWN, [Kind.CONFIDENCE], None, {}),
        (Cause.SETTINGS, [Kind.LATENCY], block(queue_s=200 * 0.003), {"instances": 1}),
        (Cause.UNKNOWN, [Kind.COST], None, {"replay": AS_PROVEN}),
    ],
)
def test_causes(expected: Cause, kinds: list[Kind], seen: Block | None, more: dict[str, Any]) -> None:
    assert cause(kinds, seen, **more) is expected


@pytest.mark.parametrize(("usual_mb", "blocks", "expected"), [(30, 3, Cause.PROCESS), (80, 3, Cause.VERSION), (0, 0, Cause.PROCESS)])
def test_memory_beyond_the_objective_from_the_start_is_the_versions(usual_mb: int, blocks: int, expected: Cause) -> None:
    found = findings([Kind.MEMORY], normal=replace(normal(), memory_bytes=usual_mb << 20, blocks=blocks))
    over = Suspicion(Kind.MEMORY, "its runner holds 90 MiB, the objective is 64", {"bytes": 90 << 20, "limit_mb": 64})
    assert diagnose(replace(found, suspicions=[over])).cause is expected


def test_what_no_rule_explains_says_what_was_ruled_out_and_why_a_replay_could_not_tell() -> None:
    fresh = FreshRunner((1.01, 0.98, 1.04), (1.0, 0.9, 1.1))
    proven = diagnose(findings([Kind.COST], replay=AS_PROVEN, fresh=fresh))
    assert proven.text == "no rule explains it" and [text.split(":")[0] for text in proven.rules_out] == ["process", "version, input"]
    loud = Replay(findings=("inconclusive",), report={"text": "inconclusive: the host was too busy to measure"})
    found = diagnose(findings([Kind.COST], replay=loud))
    assert found.cause is Cause.UNKNOWN and found.text.endswith("the paired replay: inconclusive: the host was too busy to measure")


def test_what_agreed_until_a_moment_ago_did_not_fall_by_itself_however_young_it_is() -> None:
    found = diagnose(findings([Kind.FIDELITY], None, began_with_version=True, agreed_before=(99, 100)))
    assert found.cause is Cause.INPUT and "99 of the 100 before" in found.text
    for before in ((20, 20), (90, 100), (0, 0)):
        assert cause([Kind.FIDELITY], None, began_with_version=True, agreed_before=before) is Cause.VERSION


def test_an_experiment_is_made_where_numbers_alone_cannot_tell() -> None:
    assert needs_replay(findings([Kind.COST]))
    assert needs_replay(findings([Kind.LATENCY]))
    assert not needs_replay(findings([Kind.ERRORS]))
    assert not needs_replay(findings([Kind.LATENCY], host=replace(QUIET, throttled_ratio=0.5)))
    assert needs_replay(findings([Kind.LATENCY], host=replace(QUIET, throttled_ratio=0.5), event="swap"))


def test_a_fresh_runner_is_tried_even_where_the_host_is_busy_but_not_for_load_or_faults() -> None:
    busy = replace(QUIET, others_ratio=0.6, busy_ratio=0.99)
    assert needs_probe(findings([Kind.LATENCY], block(wait_s=0.3), host=busy))
    assert needs_probe(findings([Kind.COST]))
    assert not needs_probe(findings([Kind.LATENCY], block(**FULL), host=replace(QUIET, busy_ratio=0.99)))
    assert not needs_probe(findings([Kind.ERRORS]))
    assert not needs_probe(findings([Kind.EVENT]))


def test_settings_that_were_just_changed_and_leave_cores_idle_need_no_experiment() -> None:
    waits, seen = [Kind.LATENCY, Kind.REFUSALS], block(**FULL)
    changed = findings(waits, seen, instances=1, event="settings")
    assert not needs_probe(changed) and not needs_replay(changed) and diagnose(changed).cause is Cause.SETTINGS
    for other in (
        findings(waits, seen, instances=1, event="swap"), findings(waits, instances=1, event="settings"),
        findings([*waits, Kind.COST], seen, instances=1, event="settings"),
    ):  # fmt: skip
        assert needs_probe(other) and needs_replay(other), other


def test_a_queue_that_was_made_too_short_is_the_settings_doing_whoever_else_is_busy() -> None:
    busy: dict[str, Any] = {"host": replace(QUIET, others_ratio=0.8, busy_ratio=1.0), "event": "settings"}
    short = findings([Kind.REFUSALS], block(refused=40, wait_s=0.3), **busy)
    assert not needs_replay(short) and diagnose(short).cause is Cause.SETTINGS and "its queue is too short" in diagnose(short).text
    long = findings([Kind.REFUSALS], block(refused=40, queue_s=200 * 0.0036, wait_s=0.3), **busy)
    assert diagnose(long).cause is Cause.HOST, "a queue of any length would be full"
    assert diagnose(replace(short, event="swap")).cause is Cause.HOST


def test_evidence_that_blames_nobody_is_told_beside() -> None:
    found = diagnose(findings([Kind.LATENCY], block(edge_s=0.5), replay=AS_PROVEN, host=replace(QUIET, loop_lag_s=0.3)))
    assert any("binary protocol" in text for text in found.beside) and any("event loop" in text for text in found.beside)
    assert not any("killed" in text or "NaN" in text for text in found.beside)
    poisoned = diagnose(findings([Kind.ERRORS], block(poisoned=3), killers=2))
    assert any("3 of 200 requests held NaN" in text for text in poisoned.beside)
    assert any("2 different inputs killed its runner" in text for text in poisoned.beside)


def test_what_reading_and_writing_takes_is_not_the_versions_fault_and_the_plan_says_what_helps() -> None:
    found = diagnose(findings([Kind.LATENCY], block(edge_s=0.68), replay=AS_PROVEN))
    decided = plan(found, GOLDEN, ModelConfig())
    assert decided.action is Action.NOTHING and any("binary protocol" in text for text in decided.advice)


def test_what_only_was_seen_is_not_told_as_advice() -> None:
    busy = diagnose(findings([Kind.LATENCY], block(wait_s=0.3), host=replace(QUIET, others_ratio=0.6)))
    told = in_brackets(plan(busy, GOLDEN, ModelConfig()), busy)
    assert told.startswith(" (you could: move the neighbour") and ", beside it: other programs use 60%" in told
    unknown = diagnose(findings([Kind.COST], host=replace(QUIET, loop_lag_s=0.3)))
    assert in_brackets(plan(unknown, GOLDEN, ModelConfig()), unknown) == " (beside it: the server's event loop ran 300 ms late)"


def test_only_models_that_are_out_of_the_ordinary_now_and_likewise_count_beside_one() -> None:
    slow, large = Suspicion(Kind.LATENCY, "slow"), Suspicion(Kind.MEMORY, "large")
    incident = Incident(100.0, [slow, large], seen_at={Kind.LATENCY: 200.0, Kind.MEMORY: 300.0})
    patient = Patient(incident=incident, suspected_at={Kind.LATENCY: 200.0, Kind.MEMORY: 300.0})
    assert Patient(suspected_at={Kind.LATENCY: 200.0}).suspected_of({Kind.LATENCY}, 195.0), "also while it waits to be looked into"
    assert patient.suspected_of({Kind.LATENCY, Kind.COST}, 195.0)
    assert not patient.suspected_of({Kind.LATENCY}, 201.0), "it stands, for its memory, and is not slow any more"
    assert not patient.suspected_of({Kind.ERRORS}, 195.0) and not Patient().suspected_of({Kind.LATENCY}, 0.0)
    incident.diagnosis = diagnose(findings([Kind.LATENCY], replay=AS_PROVEN))
    assert incident.diagnosis.cause is Cause.VERSION
    assert not patient.suspected_of({Kind.LATENCY}, 195.0), "an objective that it never met says nothing of the host"
    incident.diagnosis = None
    patient.see([slow], 400.0)
    assert patient.suspected_of({Kind.LATENCY}, 395.0) and incident.suspected_at == 400.0


def test_what_was_killed_from_outside_is_no_fault_of_the_version_though_requests_failed_meanwhile() -> None:
    """One kill of a runner that takes seconds to load failed those who waited, and the version was rolled back and barred for it."""
    failed = Suspicion(Kind.ERRORS, "5 of 100 requests failed", {"failures": 5, "answered": 100, "limit": 0.01})
    assert diagnose(replace(findings([Kind.ERRORS]), suspicions=[failed], kills=1)).cause is Cause.HOST
    assert diagnose(replace(findings([Kind.ERRORS]), suspicions=[failed], kills=1, own_deaths=1)).cause is Cause.VERSION
    assert diagnose(replace(findings([Kind.ERRORS]), suspicions=[failed])).cause is Cause.VERSION


def test_a_host_short_of_memory_answers_for_deaths_and_never_for_wrong_answers() -> None:
    short = HostFacts(memory_pressure=0.5)
    nan = Suspicion(Kind.NON_FINITE, "9 answers held NaN", {"non_finite": 9})
    deaths = Suspicion(Kind.DEATHS, "its runner ended 3 times", {"deaths": 3, "from_outside": 0})
    assert diagnose(replace(findings([Kind.NON_FINITE]), suspicions=[nan], host=short)).cause is Cause.VERSION
    assert diagnose(replace(findings([Kind.DEATHS]), suspicions=[deaths], host=short)).cause is Cause.HOST
    assert diagnose(replace(findings([Kind.DEATHS]), suspicions=[deaths], host=short, began_with_version=True)).cause is Cause.VERSION


def test_a_leak_of_a_quiet_model_is_growth_as_long_as_nobody_knows_what_it_needs() -> None:
    over = Suspicion(Kind.MEMORY, "its runner holds 90 MiB, the objective is 64", {"bytes": 90 << 20, "limit_mb": 64})
    quiet = replace(findings([Kind.MEMORY]), suspicions=[over], normal=Normal())
    assert diagnose(quiet).cause is Cause.PROCESS and diagnose(replace(quiet, first_memory=40 << 20)).cause is Cause.PROCESS
    assert diagnose(replace(quiet, first_memory=80 << 20)).cause is Cause.VERSION, "a fresh runner would hold as much"


@pytest.mark.parametrize("standing", [Kind.MEMORY, Kind.CONFIDENCE, Kind.LABELS])
def test_what_stands_for_days_does_not_hide_what_slows_it_today(standing: Kind) -> None:
    def found(**more: Any) -> Any:
        both = findings([standing, Kind.LATENCY], **more)
        return replace(both, suspicions=[replace(both.suspicions[0], numbers={"limit_mb": 1.0}), both.suspicions[1]])

    assert needs_probe(found()) and needs_replay(found())
    assert diagnose(found(fresh=FreshRunner((1.5, 1.4, 1.6), (1.5, 1.4, 1.6)))).cause is Cause.PROCESS
    assert diagnose(found(replay=SLOWER)).cause is Cause.VERSION and "file takes" in diagnose(found(replay=SLOWER)).text
    busy = diagnose(found(seen=block(wait_s=0.3), host=replace(QUIET, others_ratio=0.6)))
    assert "wait for a core" in " ".join((busy.text, *busy.beside)), "who is on call reads both"
    assert busy.cause is (Cause.VERSION if standing is Kind.MEMORY else Cause.HOST), (
        "for memory something can be built, whoever else is busy"
    )


def test_a_process_that_grew_is_not_probed_for_being_slow_too() -> None:
    grew = findings([Kind.MEMORY, Kind.LATENCY])
    assert not needs_probe(grew) and not needs_replay(grew) and diagnose(grew).cause is Cause.PROCESS
