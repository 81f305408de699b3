"""The loop's pure middle: when it looks, whom it blames, what it plans. Tables of facts in, decisions out; no clock, no process."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import pytest

from app.catalog.model_config import ModelConfig
from app.control.choices import builds, quick_tries
from app.control.diagnosis import Cause, Diagnosis, diagnose, needs_probe, needs_replay
from app.control.findings import Findings, FreshRunner, Replay
from app.control.normal import Normal, learned
from app.control.objectives import Burn, burn
from app.control.patient import Incident, Looks, Patient
from app.control.planner import Action, Situation, plan, wait_after
from app.control.replay import _held_to
from app.control.situation import situation_of
from app.control.suspicion import Kind, Seen, Suspicion, leap_of_latency, suspicions
from app.domain import BuiltVersion, Generation, Job, JobState, Mode, ModelState, ModelView, RuntimeSettings, State, Verdict
from app.telemetry.hostfacts import HostFacts
from app.telemetry.window import Block, Cost
from optimizers.base import Gain
from optimizers.catalogue import catalogue, config_types, parse_recipe

QUIET = HostFacts(busy_ratio=0.4, others_ratio=0.02, steal_ratio=0.0, throttled_ratio=0.0, memory_pressure=0.0)
BUCKET = (0, 13)


def block(cpu_s: float = 0.001, requests: int = 200, total_s: float = 0.004, stretch: float = 1.0, **more: Any) -> Block:
    """Ten seconds of `requests` answers that took `total_s` and cost `cpu_s` a row, in calls of `stretch` × their CPU time."""
    found = Block(0.0, 10.0, requests=requests, rows=requests, calls=requests, called_rows=requests, total_s=requests * total_s)
    found.cpu_s, found.within = requests * cpu_s, requests
    cost = found.costs[BUCKET] = Cost(requests, requests, requests * cpu_s)
    for number in range(requests):
        cost.cpu.add(cpu_s * (1 + 0.02 * (number % 3 - 1)))
        found.stretch.add(stretch)
        found.total.add(total_s * (1 + 0.1 * (number % 10) / 10))
    for name, value in more.items():
        setattr(found, name, value)
    return found


def normal(**more: Any) -> Normal:
    found = Normal()
    for _ in range(3):
        found = learned(found, block(), 30 << 20)
    assert found.known
    return replace(found, **more)


def look(
    blocks: list[Block], config: ModelConfig | None = None, lately: Block | None = None, memory: int = 30 << 20, burning: Burn | None = None
) -> list[Kind]:
    config = config or ModelConfig()
    seen = Seen(blocks, lately or Block(0.0, 300.0), memory, 0)
    return [one.kind for one in suspicions(seen, normal(), config, config.objective.promise, burning)]


# When to look


def test_nothing_is_suspected_while_all_is_as_ever_or_neighbours_move_cost_a_little() -> None:
    assert look([block(), block()]) == []
    assert look([block(0.00108), block(0.00108)]) == []


def test_cost_is_suspected_only_when_two_undisturbed_blocks_agree() -> None:
    assert look([block(0.0012), block(0.0012)]) == [Kind.COST]
    assert look([block(0.0012), block()]) == []
    assert look([block(), block(0.0012)]) == []
    assert look([block(0.0012), block(0.0012, disturbed=True)]) == []


def test_cost_that_leaps_is_suspected_in_the_first_block_that_shows_it() -> None:
    assert look([block(0.0016)]) == [Kind.COST]
    assert look([block(), block(0.0016)]) == [Kind.COST]
    assert look([block(0.0016, requests=30)]) == [], "too few calls"
    assert look([block(0.0016, disturbed=True)]) == []
    assert look([block(0.0016), block()]) == [], "it is over"


def leaps(seen: Block, host: HostFacts = QUIET, usual: Normal | None = None) -> bool:
    promised = ModelConfig.model_validate({"objective": {"p95_ms": 10}})
    found = leap_of_latency(seen, usual or normal(), promised.objective.promise, host)
    assert found is None or (found.kind is Kind.LATENCY and "threshold_s" not in found.numbers), (
        "no such thing as a version too slow as ever"
    )
    return found is not None


def test_time_that_leaps_for_the_runner_alone_is_suspected_in_the_first_block_that_shows_it() -> None:
    assert leaps(block(stretch=6.0, within=120))
    assert not leaps(block(stretch=6.0, within=160)), "too few are late"
    assert not leaps(block(stretch=6.0, within=10, requests=30)), "too few answers"
    assert not leaps(block(stretch=6.0, within=120, disturbed=True))
    assert not leaps(block(stretch=6.0, within=120), usual=Normal()), "nothing is known of it"
    unpromised = block(stretch=6.0, total_s=0.012)
    assert leap_of_latency(unpromised, normal(), None, QUIET) is not None
    assert leap_of_latency(block(stretch=6.0, total_s=0.006), normal(), None, QUIET) is None


def test_time_that_leaps_for_the_server_as_well_or_in_the_queue_is_left_to_the_second_block() -> None:
    late = block(stretch=6.0, within=120)
    assert leaps(late, replace(QUIET, server_waiting_ratio=0.4)), "it waits by far more than the server"
    assert not leaps(late, replace(QUIET, server_waiting_ratio=0.8)), "neighbours hold up both"
    assert not leaps(late, replace(QUIET, throttled_ratio=0.2)) and not leaps(late, replace(QUIET, steal_ratio=0.2))
    assert not leaps(block(stretch=1.2, within=0, queue_s=200 * 0.1)), "load alone: the calls are as quick as ever"
    unknown = replace(QUIET, server_waiting_ratio=None)
    assert not leaps(block(stretch=6.0, within=120, wait_s=200 * 0.005), unknown), "no witness: its waiting is the host's"
    assert leaps(late, unknown), "it neither works nor waits for a core"
    assert not leaps(late, usual=normal(stretch=4.0)), "it always took so long for its CPU time"


def test_a_leap_of_time_stands_once_the_host_was_read_again_and_is_forgotten_when_it_is_over() -> None:
    patient = Patient()
    assert not patient.leap_stands(True, 100.0, 99.0), "what was read before it began knows nothing of it"
    assert not patient.leap_stands(True, 101.0, 99.0) and patient.leap_stands(True, 101.5, 101.2)
    assert not patient.leap_stands(False, 102.0, 101.2) and not patient.leap_stands(True, 103.0, 101.2)


def test_wall_time_is_held_to_the_promise_and_without_one_to_twice_its_normal() -> None:
    promised = ModelConfig.model_validate({"objective": {"p95_ms": 3}})
    assert look([block(within=150), block(within=150)], promised) == [Kind.LATENCY]
    assert look([block(within=195), block(within=150)], promised) == []
    burning = Burn({}, True)
    assert look([block(within=185), block(within=185)], promised, burning=burning) == [Kind.LATENCY]
    assert look([block(within=199), block(within=199)], promised, burning=burning) == [], "what is over needs no look"
    assert look([block(within=120), block(within=199)], promised, burning=burning) == [], "nor is what the newest block no longer shows"
    assert look([block(total_s=0.012), block(total_s=0.012)]) == [Kind.LATENCY]
    assert look([block(total_s=0.006), block(total_s=0.006)]) == []
    assert look([block(requests=5, total_s=0.1), block(requests=5, total_s=0.1)]) == []


def test_a_median_that_is_promised_can_be_missed_as_well() -> None:
    promised = ModelConfig.model_validate({"objective": {"p50_ms": 3}})
    assert look([block(within=40), block(within=40)], promised) == [Kind.LATENCY]
    assert look([block(within=60), block(within=60)], promised) == []
    assert burn(0.5, lambda seconds: (20, 80)).fires and not burn(0.5, lambda seconds: (30, 70)).fires
    assert burn(0.95, lambda seconds: (27, 73)).fires
    assert leap_of_latency(block(stretch=6.0, within=40), normal(), promised.objective.promise, QUIET) is not None


def test_with_few_requests_burn_rates_tell_and_the_last_two_blocks_alone_do_not() -> None:
    promised, few, lately = (
        ModelConfig.model_validate({"objective": {"p95_ms": 3}}),
        block(requests=8, within=0),
        Block(0.0, 300.0, requests=300),
    )
    assert look([few, few], promised, lately, burning=Burn({}, True)) == [Kind.LATENCY]
    assert look([few, few], promised, lately, burning=Burn({}, False)) == []
    assert look([few, block(requests=8, within=8)], promised, lately, burning=Burn({}, True)) == [], "it is over"
    assert look([few, few], promised, Block(0.0, 300.0, requests=10), burning=Burn({}, True)) == [], "no data"


def test_every_objective_is_held() -> None:
    def held(objective: dict[str, float], seen: list[Block], lately: Block | None = None) -> list[Kind]:
        return look(seen, ModelConfig.model_validate({"objective": objective}), lately)

    assert block(0.001).cpu_s == pytest.approx(0.2, rel=0.1), "1 ms for each of 200 requests"
    assert held({"cpu_s_per_request": 0.0008}, [block(), block()]) == [Kind.COST]
    assert held({"cpu_s_per_request": 0.0012}, [block(), block()]) == []
    assert held({"cpu_s_per_request": 0.0008}, [block(), block(0.0005)]) == []
    assert held({"throughput_rps": 21}, [block(refused=20), block(refused=20)]) == [Kind.REFUSALS, Kind.REFUSALS], "20 of 22 a second"
    assert held({"throughput_rps": 21}, [block(), block()]) == [], "as many do not come"
    assert held({"throughput_rps": 19}, [block(refused=3), block(refused=3)]) == []
    bad = Block(0.0, 300.0, requests=900, refused=100)
    assert held({"availability": 0.99}, [block(refused=1)], bad) == [Kind.REFUSALS]
    assert held({"availability": 0.99}, [block(failures=1)], Block(0.0, 300.0, requests=900, failures=100)) == [Kind.ERRORS]
    assert held({"availability": 0.99}, [block()], bad) == [], "what is over needs no look"
    assert held({"availability": 0.85}, [block(refused=1)], bad) == []


def test_faults_refusals_memory_and_fidelity_are_seen_at_once() -> None:
    assert look([block(failures=10)]) == [Kind.ERRORS]
    assert look([block(failures=2)]) == []
    assert look([block(non_finite=1)]) == [Kind.NON_FINITE]
    assert look([block(refused=20)]) == [Kind.REFUSALS]
    assert look([block()], memory=500 << 20) == [Kind.MEMORY]
    classifier = ModelConfig.model_validate({"task": "classification"})
    assert look([block()], classifier, Block(0.0, 300.0, compared=300, agreed=280)) == [Kind.FIDELITY]
    assert look([block()], classifier, Block(0.0, 300.0, compared=300, agreed=299)) == []
    assert look([block()], classifier, Block(0.0, 300.0, compared=10, agreed=5)) == []


def test_requests_that_expire_are_a_sign_of_load_and_never_the_versions_fault() -> None:
    late = block(expired=60, queue_s=200 * 0.003)
    assert look([late, late]) == [Kind.REFUSALS] and look([block(expired=3)]) == []
    available = ModelConfig.model_validate({"objective": {"availability": 0.99}})
    assert set(look([late], available, Block(0.0, 300.0, requests=900, expired=100))) == {Kind.REFUSALS}
    found = diagnose(findings([Kind.REFUSALS], late, host=replace(QUIET, busy_ratio=0.99)))
    assert found.cause is Cause.LOAD and "60 expired" in found.text
    assert learned(Normal(), late, 1) == Normal() and learned(Normal(), block(expired=1), 1) != Normal()


def test_a_model_that_fails_on_most_requests_is_suspected_and_blamed_only_where_it_is_new() -> None:
    failing, lately = block(requests=10, failed_calls=40), Block(0.0, 300.0, requests=10, failed_calls=40)
    assert look([failing], lately=lately) == [Kind.ERRORS]
    assert look([failing], lately=Block(0.0, 300.0, requests=900, failed_calls=40)) == [], "it answered others until a moment ago"
    assert look([block(requests=2, failed_calls=9)], lately=lately) == [], "too few"
    (found,) = suspicions(Seen([failing], lately, 0, 0), normal(), ModelConfig(), None, None)
    for new, of in ((True, Cause.VERSION), (False, Cause.UNKNOWN)):
        assert diagnose(replace(findings([]), suspicions=[found], began_with_version=new)).cause is of


def test_what_is_normal_is_learned_from_quiet_blocks_alone() -> None:
    for odd in (block(disturbed=True), block(requests=5), block(failures=1), block(refused=1)):
        assert learned(Normal(), odd, 1) == Normal()
    assert not learned(Normal(), block(), 1).known


def test_two_windows_must_burn_and_few_answers_are_no_data() -> None:
    assert burn(0.95, lambda seconds: (5, 5)).rates[300.0] is None
    fast = burn(0.99, lambda seconds: (700, 300))
    assert fast.fires and fast.rates[300.0] == pytest.approx(30.0)
    short_only = burn(0.99, lambda seconds: (70, 30) if seconds <= 300 else (100_000, 30))
    assert not short_only.fires


def test_looks_in_vain_wait_ever_longer_but_not_for_what_is_new() -> None:
    looks, slow = Looks(), frozenset({Kind.LATENCY})
    assert looks.due(slow, 0.0)
    looks.in_vain(slow, 100.0, 2.0, 2)
    assert not looks.due(slow, 159.0) and looks.due(slow, 160.0)
    assert looks.due(frozenset({Kind.LATENCY, Kind.ERRORS}), 101.0), "errors were not looked into"
    looks.in_vain(slow, 160.0, 2.0, 2)
    assert not looks.due(slow, 279.0) and looks.due(slow, 280.0)
    looks.in_vain(slow, 280.0, 60.0, 2)
    assert not looks.due(slow, 579.0) and looks.due(slow, 581.0), "experiments take a tenth of the cores' time at most"
    looks.in_vain(slow, 10_000.0, 2.0, 2)
    assert looks.due(slow, 10_061.0), "an hour later it is another matter"
    dear = frozenset({Kind.COST})
    looks.in_vain(dear, 10_001.0, 2.0, 2)
    assert not looks.due(dear, 10_050.0) and not looks.due(slow, 10_050.0), "two kinds in turns wait as well"
    for _ in range(20):
        looks.in_vain(slow, looks.not_before, 2.0, 2)
    assert looks.count == 21


# Whom to blame


def findings(kinds: list[Kind], seen: Block | None = None, **more: Any) -> Findings:
    said = {"threshold_s": 0.003} if Kind.LATENCY in kinds else {}
    numbers: dict[Kind, dict[str, Any]] = {Kind.LATENCY: said, Kind.DEATHS: {"deaths": 3, "from_outside": 0}}
    found = [Suspicion(kind, kind.value, numbers.get(kind, {})) for kind in kinds]
    given = {"host": QUIET, "cores": 2, "instances": 2, "threads": 1, "normal": normal(), **more}
    return Findings(found, seen or block(), **given)


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


@pytest.mark.parametrize(("usual_mb", "blocks", "expected"), [(30, 3, Cause.PROCESS), (80, 3, Cause.VERSION), (0, 0, Cause.VERSION)])
def test_memory_beyond_the_objective_from_the_start_is_the_versions(usual_mb: int, blocks: int, expected: Cause) -> None:
    found = findings([Kind.MEMORY], normal=replace(normal(), memory_bytes=usual_mb << 20, blocks=blocks))
    over = Suspicion(Kind.MEMORY, "its runner holds 90 MiB, the objective is 64", {"bytes": 90 << 20, "limit_mb": 64})
    assert diagnose(replace(found, suspicions=[over])).cause is expected


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


def test_evidence_that_blames_nobody_is_told_beside() -> None:
    found = diagnose(findings([Kind.LATENCY], block(edge_s=0.5), replay=AS_PROVEN, host=replace(QUIET, loop_lag_s=0.3)))
    assert any("binary protocol" in text for text in found.beside) and any("event loop" in text for text in found.beside)


def test_what_reading_and_writing_takes_is_not_the_versions_fault_and_the_plan_says_what_helps() -> None:
    found = diagnose(findings([Kind.LATENCY], block(edge_s=0.68), replay=AS_PROVEN))
    decided = plan(found, GOLDEN, ModelConfig())
    assert decided.action is Action.NOTHING and any("binary protocol" in text for text in decided.advice)


def test_only_models_that_are_out_of_the_ordinary_now_and_likewise_count_beside_one() -> None:
    slow = Suspicion(Kind.LATENCY, "slow")
    patient = Patient(incident=Incident(100.0, [slow], suspected_at=200.0))
    assert patient.suspected_of({Kind.LATENCY, Kind.COST}, 195.0)
    assert not patient.suspected_of({Kind.LATENCY}, 201.0), "it stands, and nothing is wrong any more"
    assert not patient.suspected_of({Kind.ERRORS}, 195.0) and not Patient().suspected_of({Kind.LATENCY}, 0.0)


# What to do


def decide(of: Cause, now: Situation, evidence: dict[str, Any] | None = None) -> Action:
    return plan(Diagnosis(of, 0.9, "because", evidence or {}), now, ModelConfig()).action


HERE = Situation("1.1", "1", "1", ("1.2",))
GOLDEN = Situation("1", "1")
FELL = Diagnosis(Cause.INPUT, 0.8, "", {"suspicions": ["fidelity"]})


def test_the_cheapest_remedy_that_fits_comes_first() -> None:
    assert decide(Cause.HOST, HERE) is Action.NOTHING
    assert decide(Cause.LOAD, HERE) is Action.NOTHING
    assert decide(Cause.LOAD, replace(HERE, rungs=("1.2",))) is Action.STEP_DOWN
    assert decide(Cause.PROCESS, HERE) is Action.RESTART
    assert decide(Cause.SETTINGS, HERE) is Action.TUNE
    assert decide(Cause.SETTINGS, replace(HERE, settings_before=True), {"event": "settings"}) is Action.UNDO_SETTINGS
    assert decide(Cause.SETTINGS, replace(HERE, settings_before=True), {"event": "swap"}) is Action.TUNE
    assert decide(Cause.VERSION, HERE) is Action.ROLL_BACK
    assert decide(Cause.VERSION, replace(HERE, tried_actions=frozenset({(Action.ROLL_BACK, (), "1")}))) is Action.SWITCH
    assert decide(Cause.VERSION, GOLDEN) is Action.OPTIMIZE
    assert decide(Cause.INPUT, HERE) is Action.TUNE
    assert decide(Cause.INPUT, HERE, {"suspicions": ["fidelity"]}) is Action.SWITCH
    switched = replace(HERE, tried_actions=frozenset({plan(FELL, HERE, ModelConfig()).remedy}))
    assert decide(Cause.INPUT, switched, {"suspicions": ["fidelity"]}) is Action.RECALIBRATE
    assert decide(Cause.INPUT, HERE, {"suspicions": ["confidence"]}) is Action.RECALIBRATE
    assert decide(Cause.UNKNOWN, HERE) is Action.NOTHING


def test_golden_answers_at_once_where_inputs_changed_and_the_rest_is_built_where_there_is_budget() -> None:
    decided = plan(FELL, HERE, ModelConfig())
    assert (decided.version, decided.tries) == ("1", (("int8-static",),)) and "meanwhile" in decided.text
    for spent in ({"builds_left": 0}, {"cpu_s_left": 0.0}, {"jobs_open": 1}):
        decided = plan(FELL, replace(HERE, faults=True, **spent), ModelConfig())
        assert (decided.action, decided.version, decided.tries) == (Action.SWITCH, "1", ())


def test_never_a_build_for_the_hosts_fault_or_for_load_or_for_faults() -> None:
    for of in (Cause.HOST, Cause.LOAD, Cause.PROCESS, Cause.UNKNOWN):
        assert decide(of, GOLDEN) not in (Action.OPTIMIZE, Action.RECALIBRATE)
    assert decide(Cause.VERSION, replace(GOLDEN, faults=True)) is Action.NOTHING


def test_a_slower_version_that_the_user_deployed_is_not_taken_back_but_a_broken_one_is() -> None:
    deployed = Situation("2", "2", "1")
    assert decide(Cause.VERSION, deployed) is Action.OPTIMIZE
    assert decide(Cause.VERSION, replace(deployed, faults=True)) is Action.ROLL_BACK


SLOW_AS_PROVEN = {"suspicions": ["latency"], "replay": {"findings": ["as_proven"]}}


def test_a_built_version_that_is_quicker_than_the_one_before_but_not_enough_is_not_taken_back() -> None:
    here = Situation("2.1", "2", "2", ("2.2",), tried=frozenset({("int8-static",)}))
    diagnosis = Diagnosis(Cause.VERSION, 0.7, "slower than its objective", SLOW_AS_PROVEN)
    decided = plan(diagnosis, here, ModelConfig())
    assert decided.action is Action.OPTIMIZE and ("int8-static",) not in decided.tries, "the next recipe, while the better one serves"
    assert decide(Cause.VERSION, replace(here, proven=("2",)), SLOW_AS_PROVEN) is Action.OPTIMIZE
    assert plan(diagnosis, replace(here, rungs=("2.2",)), ModelConfig()).version == "2.2", "known to cost less still"
    assert decide(Cause.VERSION, here, {"replay": {"findings": ["version_slower"]}}) is Action.ROLL_BACK
    assert decide(Cause.VERSION, replace(here, faults=True), SLOW_AS_PROVEN) is Action.ROLL_BACK
    assert decide(Cause.VERSION, Situation("2", "2", "1", ("2.1",)), SLOW_AS_PROVEN) is Action.SWITCH, "golden may make way for it"


def test_what_the_loop_built_to_take_less_memory_is_not_left_for_what_takes_more() -> None:
    grown = {"suspicions": ["memory"]}
    assert decide(Cause.VERSION, HERE, grown) is Action.ROLL_BACK
    assert decide(Cause.VERSION, replace(HERE, proven=(), mends=True), grown) is Action.OPTIMIZE


def test_a_remedy_is_of_one_version_so_that_a_second_bad_golden_is_left_as_well() -> None:
    first, second = Situation("2", "2", "1", faults=True), Situation("3", "3", "1.1", faults=True)
    tried = frozenset({plan(Diagnosis(Cause.VERSION, 0.9, ""), first, ModelConfig()).remedy})
    assert decide(Cause.VERSION, replace(first, tried_actions=tried)) is Action.NOTHING
    assert decide(Cause.VERSION, replace(second, tried_actions=tried)) is Action.ROLL_BACK


def test_an_earlier_golden_that_a_person_went_back_to_is_left_only_for_faults_and_held_to_nothing() -> None:
    back = Situation("1", "2", "2", ("2.1",))
    assert decide(Cause.VERSION, back) is Action.NOTHING
    assert decide(Cause.VERSION, replace(back, faults=True)) is Action.ROLL_BACK
    want = ModelState("m", "2", "sha", "1", "2", Generation(1, 3))
    assert _held_to(want, "1") == ""


def test_nothing_is_built_or_tuned_for_a_pytorch_version_and_the_plan_says_what_a_person_could_do() -> None:
    for cause in (Cause.VERSION, Cause.INPUT, Cause.SETTINGS):
        found = plan(Diagnosis(cause, 0.9, ""), Situation("2", "2", "1", onnx=False), ModelConfig())
        assert found.action is Action.NOTHING and found.advice == ("export version 2 to ONNX and deploy that",)
    assert decide(Cause.PROCESS, Situation("2", "2", "1", onnx=False)) is Action.RESTART
    assert decide(Cause.VERSION, Situation("2", "2", "1", onnx=False, faults=True)) is Action.ROLL_BACK


def test_a_replay_that_was_not_possible_blames_nobody_and_says_why() -> None:
    found = diagnose(findings([Kind.EVENT], replay=Replay(findings=("not_possible",), why="torch is not installed: pip install …")))
    assert found.cause is Cause.UNKNOWN and not found.inconclusive
    assert found.beside == ("no paired replay: torch is not installed: pip install …",)
    assert found.evidence["replay"]["findings"] == ["not_possible"]


def test_modes_budgets_and_a_freeze_hold_it_back_but_never_a_way_out_of_faults() -> None:
    for held in (
        {"mode": Mode.OBSERVE}, {"frozen": True}, {"builds_left": 0}, {"cpu_s_left": 0.0}, {"jobs_open": 1}, {"wait_s": 60.0},
    ):  # fmt: skip
        assert decide(Cause.VERSION, replace(GOLDEN, **held)) is Action.NOTHING, held
    broken = replace(HERE, faults=True, swaps_left=0, wait_s=60.0, mode=Mode.APPROVE)
    assert decide(Cause.VERSION, broken) is Action.ROLL_BACK


def test_what_was_tried_is_not_tried_again() -> None:
    light = frozenset(recipe for group in builds(Gain.FASTER, False) for recipe in group)
    assert {("int8-static",), ("low-rank",), ("graph",)} < light
    tried = light
    assert decide(Cause.VERSION, replace(GOLDEN, tried=tried)) is Action.TUNE
    assert decide(Cause.VERSION, replace(GOLDEN, tried=tried | {("tune",)})) is Action.NOTHING


def test_what_gains_most_is_built_alone_and_the_next_where_it_came_to_nothing() -> None:
    slow, config = Diagnosis(Cause.VERSION, 0.9, ""), ModelConfig()
    first = plan(slow, GOLDEN, config)
    assert first.tries == (("int8-static",), ("int8-dynamic",)), "callers wait: the little that graph gains is not waited for"
    refused = replace(GOLDEN, tried=frozenset(first.tries), tried_actions=frozenset({first.remedy}))
    waiting = replace(GOLDEN, tried_actions=frozenset({first.remedy}))  # for a person's agreement
    assert plan(slow, refused, config).tries == plan(slow, waiting, config).tries == (("int8-aware",),)
    assert plan(slow, replace(GOLDEN, tried=frozenset({("int8-static",)})), config).tries == (("int8-dynamic",),)


def test_every_method_that_may_help_is_chosen_some_day_by_what_it_says_of_itself() -> None:
    """Only what makes nothing but a smaller file on disk, and a student that is the module itself, has no objective to serve."""
    chosen = {recipe[0] for wanted in (Gain.FASTER, Gain.LESS_MEMORY) for group in builds(wanted, True) for recipe in group}
    others = {entry.method for entry in catalogue()} - chosen
    assert others == {"codebook", "trained-codebook", "distill", "tune"} and quick_tries(ModelConfig())[0] == ["int8-static"]
    for wanted in (Gain.FASTER, Gain.LESS_MEMORY):
        groups = builds(wanted, True)
        trains = [any(config_types()[method].extra for method in recipe) for group in groups for recipe in group]
        assert trains == sorted(trains), "what trains comes last"
        assert all(parse_recipe(recipe) for group in groups for recipe in group)
    assert builds(Gain.FASTER, False) == [
        group for group in builds(Gain.FASTER, True) if not any(config_types()[r[0]].extra for r in group)
    ]


def test_memory_beyond_the_objective_asks_for_what_takes_less() -> None:
    large = Diagnosis(Cause.VERSION, 0.8, "", {"suspicions": ["memory"]})
    tried = frozenset(recipe for group in builds(Gain.FASTER, False) for recipe in group)
    assert plan(large, replace(GOLDEN, tried=tried), ModelConfig()).tries == (("int4-linear",),)
    assert plan(large, replace(GOLDEN, tried=tried | {("int4-linear",)}), ModelConfig()).action is Action.NOTHING, "tune saves none"


def test_only_what_the_owner_allows_is_built() -> None:
    config = ModelConfig.model_validate({"allow": ["graph"]})
    assert plan(Diagnosis(Cause.VERSION, 0.9, ""), GOLDEN, config).tries == (("graph",),)
    for of in (Cause.SETTINGS, Cause.INPUT):
        assert plan(Diagnosis(of, 0.9, ""), GOLDEN, config).action is Action.NOTHING, "tune is not allowed"


def test_the_same_cause_without_a_gain_waits_exponentially_longer() -> None:
    assert [wait_after(count) for count in range(5)] == [0.0, 0.0, 60.0, 120.0, 240.0]
    assert wait_after(50) == 6 * 3600.0


def test_the_planner_knows_what_was_tried_left_and_spent() -> None:
    def job(identity: str, method: str, outcome: str, **more: Any) -> Job:
        state = JobState.FINISHED if outcome else JobState.BUILDING
        given = {"actor": "hone", "requested_at": time.time() - 100, "finished_at": time.time() - 40, **more}
        return Job(identity, "m", "1", "sha", (({"method": method},),), "", "auto", state=state, outcome=outcome, **given)

    passed = (("here", Verdict.PASSED),)
    built = tuple(BuiltVersion(name, "1", "sha", "j", (), "", verdicts=passed) for name in ("1.1", "1.2", "1.3"))
    want = ModelState("m", "1", "sha", "1.1", "1.3", Generation(1, 3), built=built, left=("1.3",))
    view = ModelView("m", "1.1", 3, RuntimeSettings(), True, 0, 0, ("1", "1.1"), 0.0)
    jobs = [
        job("a", "graph", "refused", candidates=("1.2",), report={"cpu_s": 80.0}), job("b", "int8-static", "failed", report={"cpu_s": 40.0}),
        job("c", "tune", "", actor="ann", report={"cpu_s": 900.0}),
    ]  # fmt: skip

    def situation(*jobs: Job, of: Cause = Cause.VERSION, model: ModelState = want) -> Situation:
        state = State(models={"m": model}, jobs={one.id: one for one in jobs})
        return situation_of(state, model, view, ModelConfig(), of, "here", {(Action.OPTIMIZE, (), "")}, 7.0)

    now = situation(*jobs)
    assert (now.previous, now.proven, now.tried) == ("", ["1.2"], frozenset({("graph",)})), "1.3 was left for faults"
    assert (now.jobs_open, now.builds_left, now.wait_s, now.tried_actions) == (1, 23, 7.0, frozenset({(Action.OPTIMIZE, (), "")}))
    assert now.cpu_s_left == 14_400 - 120, "what a person asked for does not count"
    assert situation(*jobs, of=Cause.INPUT).tried == frozenset(), "with other inputs the same recipe is another"
    assert situation(*jobs, model=replace(want, left=("1.3", "1"))).proven == [], "what was built from a version that was left"
    patient, swaps = Patient(switched_at=[50.0, 150.0, 160.0]), ModelConfig().budget.swaps
    state = State(models={"m": want}, jobs={"p": job("p", "tune", "promoted")})
    spent = situation_of(state, want, view, ModelConfig(), Cause.VERSION, "here", (), 0.0, patient.switched(100.0))
    assert spent.swaps_left == swaps - 3, "one by a job, two by the loop itself"
    assert situation(job("d", "int8-static", "inconclusive")).tried_actions == frozenset(), "a loud host left it open"
    assert situation(*jobs, model=replace(want, left=("1",))).builds_left == 0, "nothing is built from a golden that was left"
