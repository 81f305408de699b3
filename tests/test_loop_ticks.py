"""Ticks of the loop on a real journal, with a clock that is moved by hand and a data plane that only says what it is told to."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

import pytest

from app.catalog.cards import Cards
from app.catalog.model_config import ModelConfig, Objective
from app.catalog.state_folder import StateFolder
from app.control.diagnosis import Cause, Diagnosis
from app.control.patient import Incident, Looks, Patient
from app.control.suspicion import Kind, Suspicion
from app.domain import Event, ModelState, ModelView, Observation
from app.store.open import open_journal
from tests.journal_story import OTHER_SHA, claimed, deployed, desired, job_event, published, requested
from tests.loop_ward import Ward

pytestmark = pytest.mark.anyio


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


@pytest.fixture
def ward(tmp_path: Path) -> Iterator[Ward]:
    journal = open_journal(str(tmp_path / "journal.db"))
    journal.append(deployed())
    yield Ward(journal, Cards(StateFolder(tmp_path / "state")))
    journal.close()


async def fall(ward: Ward, golden: str, sha256: str) -> None:
    """A golden is deployed that answers NaN."""
    ward.deploys(golden, sha256)
    ward.answers(golden, nan=5)
    await ward.tick()


async def test_a_rollback_that_the_store_refused_is_tried_again(ward: Ward) -> None:
    await ward.tick()
    ward.commands.gone = True
    await fall(ward, "2", OTHER_SHA)
    assert ward.state.desired == "2" and not ward.patient.incident.tried
    assert not ward.patient.looks.due(frozenset({Kind.NON_FINITE}), 0.0), "not in every tick"
    ward.commands.gone, ward.patient.looks = False, Looks()
    await ward.tick()
    assert ward.state.desired == "1" and len(ward.patient.incident.tried) == 1


async def test_time_in_which_answers_are_held_to_goldens_is_counted_as_ours(ward: Ward) -> None:
    await ward.tick()
    assert not ward.loop._metrics.counters["hone_background_seconds"]
    ward.plane.compared = ("an answer",)
    await ward.tick()
    await asyncio.sleep(0)
    assert ward.loop._metrics.counters["hone_background_seconds"][("compare",)] > 0


async def test_a_second_bad_golden_is_rolled_back_though_the_first_is_not_forgotten_yet(ward: Ward) -> None:
    await ward.tick()
    await fall(ward, "2", OTHER_SHA)
    ward.serves("1")
    await ward.tick()
    assert ward.state.desired == "1" and ward.patient.incident is not None and ward.patient.incident.tried
    await fall(ward, "3", "f" * 64)
    assert ward.state.desired == "1"


async def test_a_start_on_another_class_of_hosts_is_an_event_that_is_looked_into(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    """Cost and settings are proven for a class; a mere start changes neither."""
    for moved_from, looks in (("x86_64-avx2-ort1.31.0-cpu", [[Kind.EVENT]]), ("", [])):
        one = Ward(ward.journal, Cards(StateFolder(Path("unused"))), moved_from)
        looked: list[list[Kind]] = []

        async def blame(*given: Any, into: list[list[Kind]] = looked, **more: Any) -> Diagnosis:
            into.append([suspicion.kind for suspicion in given[3]])
            return Diagnosis(Cause.HOST, 0.9, "the host changed", {})

        monkeypatch.setattr(one.loop._experiments, "blame", blame)
        await one.tick()
        one.answers("1")
        await one.tick()
        await one.tick()
        assert looked == looks and one.patient.incident is None
        assert one.patient.event == ("host class" if moved_from else "start")


async def test_a_freeze_that_comes_while_it_looks_holds(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    await ward.tick()
    look = ward.loop._experiments.blame

    async def slowly(*given: Any) -> Any:
        await asyncio.to_thread(ward.commands.freeze, True, "ann")
        return await look(*given)

    monkeypatch.setattr(ward.loop._experiments, "blame", slowly)
    await fall(ward, "2", OTHER_SHA)
    assert ward.state.desired == "2" and "frozen" in ward.told("plan.made")[0].data["waits"]


async def test_no_rungs_are_set_while_a_version_is_on_trial(ward: Ward) -> None:
    ward.journal.append(published("1.1"))
    ward.journal.append(Event("ladder.set", "m", data={"rungs": ["1.1"]}))  # nothing was proven here: it would be taken back
    ward.journal.append(published("1.2"))
    ward.journal.append(Event("traffic.split", "m", "1.2", data={"version": "1.2", "share": 0.05, "stage": "canary"}))
    await ward.tick()
    assert ward.state.rungs == ("1.1",)
    ward.journal.append(Event("traffic.split", "m", "", data={"version": "", "share": 0.0, "stage": "canary"}))
    await ward.tick()
    assert not ward.state.rungs


def story(ward: Ward) -> None:
    ward.journal.append(published("1.1"))
    ward.journal.append(desired("1.1", watch_share=0.05))
    ward.serves("1.1")


async def test_a_watch_is_as_long_as_it_was_seen_and_not_by_the_wall_clock(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    story(ward)
    await ward.tick()
    long_s = ward.plane.kept.rollout.watch_s
    monkeypatch.setattr("time.time", lambda: 4e9)
    ward.now += long_s - 10
    await ward.tick()
    ward.plane.view = replace(ward.plane.view, rung="1.2")
    ward.now += 100
    await ward.tick()
    assert ward.state.split is not None, "who answers meanwhile is neither of the two"
    ward.plane.view = replace(ward.plane.view, rung="")
    ward.commands.freeze(True, "ann")
    ward.now += 100
    await ward.tick()
    assert ward.state.split is not None, "all change is frozen"
    ward.commands.freeze(False, "ann")
    await ward.tick()
    assert ward.state.split is None and ward.told("version.confirmed")


async def test_a_long_stay_of_the_server_elsewhere_confirms_nothing(ward: Ward) -> None:
    story(ward)
    ward.journal.append(Event("traffic.split", "m", "1", data={"version": "1", "share": 0.05, "stage": "watch"}, at=5.0))
    await ward.tick()
    assert ward.state.split is not None and not ward.told("version.confirmed")


async def test_a_version_on_trial_without_a_job_loses_its_share_a_minute_after_it_was_seen_so(ward: Ward) -> None:
    for event in (published("1.1"), requested("j"), claimed("j"), job_event("built", "j", candidates=["1.2"])):  # the job of another
        ward.journal.append(event)
    ward.journal.append(Event("traffic.split", "m", "1.1", data={"version": "1.1", "share": 0.05, "stage": "canary"}, at=5.0))
    await ward.tick()
    assert ward.state.split is not None, "it may be of another clock"
    ward.now += 61
    await ward.tick()
    assert ward.state.split is None


async def test_a_rollback_is_verified_once_the_version_before_answers_well(ward: Ward) -> None:
    await ward.tick()
    await fall(ward, "2", OTHER_SHA)
    ward.serves("1")
    await ward.tick()
    ward.patient.incident.acted_at -= 100.0
    ward.patient.incident.diagnosis = Diagnosis(Cause.HOST, 0.9, "its threads wait for a core", {})  # a neighbour began meanwhile
    for _ in range(8):
        ward.answers("1")
        ward.now += 5.0
        await ward.tick()
    [verified] = ward.told("recovery.verified")
    assert verified.data["cause"] == "version" and "after the repair" in verified.data["summary"]


async def test_slowness_is_over_when_the_promise_is_kept_and_not_when_it_is_no_longer_clearly_broken(ward: Ward) -> None:
    """One answer in twenty may be late, and the next look begins at two."""
    ward.plane.kept = ModelConfig(objective=Objective(p95_ms=20))
    await ward.tick()
    felt = Suspicion(Kind.LATENCY, "p95 100 ms > 20 ms")
    host = Diagnosis(Cause.HOST, 0.9, "its threads wait for a core", {})
    ward.patient.incident = Incident(time.monotonic(), [felt], host, seen_at={Kind.LATENCY: time.monotonic()})

    async def blocks(late: int) -> None:
        for _ in range(4):
            ward.answers("1", late=late)
            ward.now += 5.0
            await ward.tick()

    await blocks(late=3)
    assert ward.patient.incident is not None and not ward.told("recovery.verified")
    await blocks(late=1)
    [verified] = ward.told("recovery.verified")
    assert "p95 10 ms" in verified.data["summary"]


async def test_what_a_person_did_about_it_is_not_told_as_the_loops_repair(ward: Ward) -> None:
    ward.journal.append(Event("mode.changed", "m", data={"mode": "observe"}))
    await ward.tick()
    await fall(ward, "2", OTHER_SHA)
    ward.journal.append(desired("1"))
    ward.serves("1")
    await ward.tick()
    ward.patient.incident.acted_at -= 100.0
    for _ in range(8):
        ward.answers("1")
        ward.now += 5.0
        await ward.tick()
    [verified] = ward.told("recovery.verified")
    assert "well again after another change" in verified.data["summary"]


LARGE: Final = 1 << 16


class Looked:
    """Stands in for the experiments, which need a model: what they would find, and how often they were asked."""

    def __init__(self, ward: Ward, monkeypatch: pytest.MonkeyPatch, *findings: str, cause: Cause = Cause.HOST) -> None:
        self.asked: list[str] = []

        async def blame(view: ModelView, patient: Patient, want: ModelState, found: Sequence[Suspicion], *rest: Any) -> Diagnosis:
            self.asked.append(", ".join(one.text for one in found))
            return Diagnosis(cause, 0.8, "busy", {"replay": {"findings": list(findings)}})

        monkeypatch.setattr(ward.loop._experiments, "blame", blame)


def later(monkeypatch: pytest.MonkeyPatch) -> Callable[[float], None]:
    """Moves the clock by which the loop waits."""
    moved = [0.0]
    for module in ("loop", "glance"):
        monkeypatch.setattr(f"app.control.{module}.monotonic", lambda: time.monotonic() + moved[0])
    return lambda seconds: moved.__setitem__(0, moved[0] + seconds)


async def test_an_event_is_looked_into_again_where_the_host_was_too_busy_to_tell(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    wait, looked = later(monkeypatch), Looked(ward, monkeypatch, "inconclusive")
    await ward.tick()
    ward.deploys("2", OTHER_SHA)
    ward.answers("2")
    for _ in range(3):
        await ward.tick()
    assert len(looked.asked) == 1 and ward.patient.incident is None
    wait(61)
    ward.answers("2")
    for _ in range(3):
        await ward.tick()
    assert len(looked.asked) == 2
    wait(400)
    await ward.tick()
    wait(400)
    await ward.tick()
    assert len(looked.asked) == 3, "by then what happened so long ago explains nothing"


async def test_each_suspicion_that_is_told_is_answered_though_the_cause_is_the_same(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    """Who follows the story would wait for the end of it."""
    wait, looked = later(monkeypatch), Looked(ward, monkeypatch)
    await ward.tick()
    for nan in (5, 0):
        ward.answers("1", nan=nan)
        await ward.tick()
        for _ in range(20 if not nan else 0):
            ward.window.observe(Observation("m", "1", 500, 0.01, 0.0, 0.001, 0.005, 0.0, 1, 1, 0.001, 0.0))
        await ward.tick()
    kinds = [event.data["kinds"] for event in ward.told("suspicion.raised")]
    assert len(kinds) == 2 and "errors" in kinds[1] and "errors" not in kinds[0]
    assert [len(ward.told(kind)) for kind in ("diagnosis.made", "plan.made")] == [2, 2]
    wait(61)
    await ward.tick()
    assert len(looked.asked) == 3 and len(ward.told("diagnosis.made")) == 2, "nothing new, nothing told"


async def test_slowness_that_was_blamed_before_it_was_felt_is_told_and_not_looked_into_beside_its_repair(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A second replay ran beside the proof, and counted the repair under way as one that came to nothing."""
    looked = Looked(ward, monkeypatch, "version_slower", cause=Cause.VERSION)
    ward.plane.kept = ModelConfig.model_validate({"objective": {"p95_ms": 5}})
    ward.window.objective("m", 0.005)
    await ward.tick()
    ward.deploys("2", OTHER_SHA)
    ward.answers("2")
    for _ in range(3):
        await ward.tick()
    [job] = ward.journal.state().jobs.values()
    for _ in range(4):
        ward.answers("2")
        ward.now += 5.0
        await ward.tick()
    assert len(looked.asked) == 1 and [event.data["kinds"] for event in ward.told("suspicion.raised")] == [["latency"]]
    assert not ward.patient.failures
    ward.journal.append(job_event("finished", job.id, outcome="refused", report={}))
    ward.patient.incident.acted_at -= 100.0
    ward.answers("2")
    await ward.tick()
    assert len(looked.asked) == 2


async def test_other_shapes_are_an_event_while_it_is_slow_already_but_not_at_each_to_and_fro(
    ward: Ward, monkeypatch: pytest.MonkeyPatch
) -> None:
    wait, looked = later(monkeypatch), Looked(ward, monkeypatch)
    await ward.tick()

    async def come(size: int, slow: float = 1.0) -> None:
        for _ in range(3):
            ward.now += ward.window.block_s
            for _ in range(150):
                ward.window.observe(Observation("m", "1", 200, 0.01 * slow, 0.0, 0.001, 0.005, 0.0, 1, 1, 0.001, 0.0))
                ward.window.called("m", "1", 1, size, 0.001, 0.001, 0.0)
            await ward.tick()

    for _ in range(4):
        await come(1024)
    assert ward.patient.normal.known and not looked.asked
    await come(1024, slow=30.0)
    assert looked.asked and "shapes" not in looked.asked[-1]
    await come(LARGE, slow=30.0)
    assert "shapes" in looked.asked[-1]
    asked = len(looked.asked)
    await come(1024)
    await come(LARGE)
    assert len(looked.asked) == asked
    wait(61)
    await come(1024)
    assert "shapes" in looked.asked[-1]


async def test_a_quiet_model_that_takes_more_is_looked_into_and_is_well_again(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    """One request a second: no block of five seconds tells anything."""
    wait, looked = later(monkeypatch), Looked(ward, monkeypatch)
    await ward.tick()

    async def come(seconds: int, cpu_s: float) -> None:
        for _ in range(seconds):
            ward.answers("1", 1)
            ward.window.called("m", "1", 1, 1024, cpu_s, cpu_s, 0.0)
            ward.now += 1.0
            wait(1)
            await ward.tick()

    await come(90, 0.001)
    assert ward.patient.normal.known and not looked.asked
    await come(60, 0.0013)
    assert looked.asked == ["CPU time per row 1.30 × its normal, two blocks in a row"]
    await come(60, 0.001)
    assert ward.patient.incident is None and len(ward.told("recovery.verified")) == 1 and len(looked.asked) == 1


@pytest.mark.parametrize(("nan", "stays"), [(5, "2"), (15, "1")])
async def test_what_the_version_before_answered_is_no_fault_of_the_next(ward: Ward, nan: int, stays: str) -> None:
    await ward.tick()
    for _ in range(3):
        ward.now += ward.window.block_s
        ward.answers("1", 40, nan=10)
        await ward.tick()
    ward.deploys("2", OTHER_SHA)
    ward.answers("2", 15, nan=nan)
    await ward.tick()
    assert ward.state.desired == stays


async def test_requests_are_answered_between_two_models(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    """A hundred busy models take a tick of a tenth of a second."""
    turns, seen = 0, []

    async def others() -> None:
        nonlocal turns
        while True:
            turns += 1
            await asyncio.sleep(0)

    def config(name: str) -> ModelConfig:
        seen.append((name, turns))
        return ModelConfig()

    monkeypatch.setattr(ward.plane, "models", lambda: [replace(ward.plane.view, name=f"m{number}") for number in range(4)])
    monkeypatch.setattr(ward.plane, "config", config)
    running = asyncio.create_task(others())
    await ward.tick()
    running.cancel()
    first = dict(reversed(seen))
    assert len(first) == len({*first.values()}) == 4


async def test_who_decides_no_more_ends_what_it_had_begun_and_shows_no_old_trouble(ward: Ward, monkeypatch: pytest.MonkeyPatch) -> None:
    Looked(ward, monkeypatch)
    await ward.tick()
    ward.answers("1", nan=5)
    await ward.tick()
    await ward.tick()
    assert ward.loop.told("m")["suspicions"]
    ward.leads = False
    await ward.tick()
    assert ward.patient.incident is not None, "the lease may be late after an absence of the store"
    for _ in range(5):
        await ward.tick()
    assert ward.patient.incident is None and ward.loop.told("m")["condition"] == "steady" and not ward.loop.told("m")["suspicions"]
