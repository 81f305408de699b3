"""What the loop plans: causes and situations in, the cheapest remedy out."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

from app.catalog.model_config import ModelConfig
from app.control.choices import builds, promises_no_time, quick_tries
from app.control.diagnosis import Cause, Diagnosis, diagnose
from app.control.findings import Replay
from app.control.patient import Patient
from app.control.planner import Action, Situation, plan, wait_after
from app.control.replay import _held_to
from app.control.situation import DAY_S, situation_of
from app.control.suspicion import Kind
from app.domain import BuiltVersion, Generation, Job, JobState, Mode, ModelState, ModelView, RuntimeSettings, State, Verdict
from optimizers.base import Gain
from optimizers.catalogue import catalogue, config_types, parse_recipe
from tests.blocks import GOLDEN, findings


def decide(of: Cause, now: Situation, evidence: dict[str, Any] | None = None) -> Action:
    return plan(Diagnosis(of, 0.9, "because", evidence or {}), now, ModelConfig()).action


HERE = Situation("1.1", "1", "1", ("1.2",))

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


def test_what_a_person_could_do_fits_what_the_host_is_blamed_for() -> None:
    """More cores help nobody whom the kernel kills for his memory."""

    def said(**evidence: Any) -> str:
        return plan(Diagnosis(Cause.HOST, 0.9, "because", evidence), HERE, ModelConfig()).advice[0]

    assert "neighbour" in said() and "neighbour" in said(suspicions=["latency"], host={"throttled_ratio": 0.0, "memory_pressure": None})
    assert "who ends its runner" in said(suspicions=["deaths", "latency"], host={"throttled_ratio": 0.5})
    assert "memory" in said(host={"memory_pressure": 0.2})
    assert "quota" in said(host={"throttled_ratio": 0.2})


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


def test_a_pytorch_golden_is_built_for_onnx_runtime_and_its_settings_are_not_measured() -> None:
    here = Situation("2", "2", "1", onnx=False, torch=True)
    slow = Diagnosis(Cause.VERSION, 0.9, "")
    first = plan(slow, here, ModelConfig())
    assert first.action is Action.OPTIMIZE and first.tries == (("export",), ("export", "int8-static"), ("export", "int8-dynamic"))
    assert plan(slow, replace(here, tried=frozenset(first.tries)), ModelConfig()).tries == (("export", "int8-aware"),)
    memory = Diagnosis(Cause.VERSION, 0.8, "", {"suspicions": ["memory"]})
    assert ("export",) in plan(memory, here, ModelConfig()).tries
    for cause in (Cause.INPUT, Cause.SETTINGS):
        found = plan(Diagnosis(cause, 0.9, ""), here, ModelConfig())
        assert found.action is Action.NOTHING and "settings of a PyTorch version are not measured" in found.text
        assert found.advice[0].endswith("hone optimize MODEL")
    assert decide(Cause.SETTINGS, replace(here, active="2.1", onnx=True)) is Action.TUNE
    drifted = Diagnosis(Cause.INPUT, 0.9, "", {"suspicions": ["confidence"]})
    assert plan(drifted, replace(here, active="2.1", onnx=True), ModelConfig()).tries == (("export", "int8-static"),)
    assert decide(Cause.PROCESS, Situation("2", "2", "1", onnx=False)) is Action.RESTART
    grown = replace(here, tried_actions=frozenset({(Action.RESTART, (), "2")}))
    assert "nothing is left" in plan(Diagnosis(Cause.PROCESS, 0.9, ""), grown, ModelConfig()).text, "of settings nobody spoke"
    assert decide(Cause.VERSION, Situation("2", "2", "1", onnx=False, faults=True)) is Action.ROLL_BACK


def test_a_replay_that_was_not_possible_blames_nobody_and_says_why() -> None:
    found = diagnose(findings([Kind.EVENT], replay=Replay(findings=("not_possible",), why="torch is not installed: pip install …")))
    assert found.cause is Cause.UNKNOWN and not found.inconclusive
    assert found.beside == ("no paired replay: torch is not installed: pip install …",)
    assert found.evidence["replay"]["findings"] == ["not_possible"]


def test_modes_budgets_and_a_freeze_hold_it_back_but_never_a_way_out_of_faults() -> None:
    for held in (
        {"mode": Mode.OBSERVE}, {"frozen": True}, {"builds_left": 0}, {"cpu_s_left": 0.0}, {"jobs_open": 1}, {"wait_s": 60.0}, {"swaps_left": 0}, {"jobs_waiting": 1},
    ):  # fmt: skip
        assert decide(Cause.VERSION, replace(GOLDEN, **held)) is Action.NOTHING, held
    assert "hone worker" in plan(Diagnosis(Cause.VERSION, 0.9, ""), replace(GOLDEN, jobs_waiting=1), ModelConfig()).advice[0]
    assert decide(Cause.SETTINGS, replace(GOLDEN, jobs_waiting=1)) is Action.TUNE, "the server measures by itself"
    assert decide(Cause.PROCESS, replace(HERE, swaps_left=0)) is Action.RESTART, "the version stays"
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
    assert others == {"codebook", "trained-codebook", "distill", "tune", "export"} and quick_tries(ModelConfig())[0] == ["int8-static"]
    for wanted in (Gain.FASTER, Gain.LESS_MEMORY):
        from_torch = [recipe for group in builds(wanted, True, torch=True) for recipe in group]
        assert sorted(from_torch) == sorted([("export",), *(("export", *recipe) for group in builds(wanted, True) for recipe in group)])
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


def test_only_what_promises_bytes_alone_need_not_be_faster() -> None:
    assert all(promises_no_time(methods) for methods in (["codebook"], ["trained-codebook"], ["int4-linear"], ["int4-linear", "codebook"]))
    assert not any(promises_no_time(methods) for methods in ([], ["int8-static"], ["low-rank", "codebook"], ["export", "codebook"]))


def test_only_what_the_owner_allows_is_built() -> None:
    config = ModelConfig.model_validate({"allow": ["graph"]})
    torch = replace(GOLDEN, torch=True, onnx=False)
    assert plan(Diagnosis(Cause.VERSION, 0.9, ""), torch, config).tries == (("export", "graph"),), "what comes first is no choice"
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
        return situation_of(state, model, view, ModelConfig(), of, "here", {(Action.OPTIMIZE, (), "")}, 7.0, workers=["w"])

    now = situation(*jobs)
    assert (now.previous, now.proven, now.tried) == ("", ["1.2"], frozenset({("graph",)})), "1.3 was left for faults"
    assert (now.jobs_open, now.builds_left, now.wait_s, now.tried_actions) == (1, 23, 7.0, frozenset({(Action.OPTIMIZE, (), "")}))
    waiting = situation_of(State(models={"m": want}, jobs={"c": jobs[2]}), want, view, ModelConfig(), Cause.VERSION, "here", (), 0.0)
    assert (waiting.jobs_open, waiting.jobs_waiting) == (0, 1), "no worker is alive"
    kept = job("k", "int8-static", "kept")
    assert situation(replace(kept, candidate="1.2")).proven == [], "it waits for a person"
    used = replace(want, built=tuple(replace(one, served=one.version == "1.2") for one in want.built))
    assert situation(replace(kept, candidate="1.2"), model=used).proven == ["1.2"], "a person took it once"
    assert now.cpu_s_left == 14_400 - 120, "what a person asked for does not count"
    assert situation(*jobs, of=Cause.INPUT).tried == frozenset(), "with other inputs the same recipe is another"
    assert situation(*jobs, model=replace(want, left=("1.3", "1"))).proven == [], "what was built from a version that was left"
    patient, swaps = Patient(switched_at=[50.0, 150.0, 160.0]), ModelConfig().budget.swaps
    state = State(models={"m": want}, jobs={"p": job("p", "tune", "promoted")})
    spent = situation_of(state, want, view, ModelConfig(), Cause.VERSION, "here", (), 0.0, patient.switched(100.0))
    assert spent.swaps_left == swaps - 2, "by the loop itself; settings are no swap"
    state = State(models={"m": want}, jobs={"p": job("p", "int8-static", "promoted")})
    spent = situation_of(state, want, view, ModelConfig(), Cause.VERSION, "here", (), 0.0, patient.switched(100.0))
    assert spent.swaps_left == swaps - 3, "one by a job, two by the loop itself"
    assert situation(job("d", "int8-static", "inconclusive")).tried_actions == frozenset(), "a loud host left it open"
    built_by = [{"version": "1.4", "try": ["int8-static"]}, {"version": "1.5", "try": ["graph"]}]
    said: list[dict[str, Any]] = [{"version": "1.4", "verdict": "failed"}, {"version": "1.5", "verdict": "inconclusive", "too_few": True}]
    undecided = job("e", "int8-static", "inconclusive", report={"built": built_by, "verdicts": said})
    undecided = replace(undecided, finished_at=time.time())
    assert situation(undecided).tried == {("int8-static",), ("graph",)}, (
        "one was refused, for the other the samples are as few as they were"
    )
    assert situation(replace(undecided, finished_at=time.time() - 2 * DAY_S)).tried == {("int8-static",)}, (
        "more may have been captured since"
    )
    loud = replace(undecided, report={"built": built_by, "verdicts": [said[0], said[1] | {"too_few": False}]})
    assert situation(loud).tried == {("int8-static",)}, "the host may be quieter next time"
    assert situation(*jobs, model=replace(want, left=("1",))).builds_left == 0, "nothing is built from a golden that was left"
