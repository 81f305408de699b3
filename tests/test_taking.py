"""How the job keeper lets a proven version or measured settings take over, and what holds it back at the last moment: a real journal, real cards."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from app.catalog.cards import BuiltCard, CardFile, Cards, Draft, GoldenCard, RowsProof
from app.catalog.model_config import ModelConfig
from app.catalog.repository import Repository
from app.catalog.state_folder import StateFolder
from app.control.commands import Commands
from app.control.keeper import MOST_JUDGINGS, JobKeeper
from app.control.rollout import End
from app.control.tally import JobTally
from app.control.verification import Judged, best, may_promote_alone
from app.domain import Event, Mode, RuntimeSettings, Signature, TensorSpec, Verdict
from app.errors import Conflict
from app.settings import Settings
from app.store.base import Journal, StoreUnavailable
from app.store.open import open_journal
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window
from optimizers.host import MemoryBudget
from optimizers.task import TaskFailed, TaskLimits
from tests.journal_story import SHA, claimed, deployed, desired, job_event, published, requested

HERE = "x86_64-test"
SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 2)),), True)
GOLDEN = GoldenCard("m", "1", SHA, (CardFile("model.onnx", 3, "bb"),), SIGNATURE, RowsProof(True, "rows alone = rows together"))
WINNER = Judged("1.1", Verdict.PASSED, "twice as fast", 2.0, True, "live", False, {})


def test_of_those_that_passed_one_that_needs_no_person_goes_before_a_quicker_one_that_does() -> None:
    lossless = replace(WINNER, gain=0.4)
    lossy = replace(WINNER, version="1.2", gain=0.7, lossless=False, evidence="synthetic")
    failed = replace(WINNER, version="1.3", gain=0.9, verdict=Verdict.FAILED)
    assert best([lossless, lossy, failed]) is lossy and best([lossless, lossy, failed], alone=True) is lossless
    assert best([lossy], alone=True) is lossy and best([failed], alone=True) is None
    captured = replace(lossy, evidence="captured")
    assert "made-up inputs" in may_promote_alone(lossy) and "samples.reference" in may_promote_alone(captured)
    assert not may_promote_alone(replace(captured, owner_named=True)) and not may_promote_alone(replace(captured, lossless=True))


@dataclass
class Trial:
    """A rollout that passes its largest share while something happens, as `during` says; its end leaves the split in place, as the real one's does."""

    journal: Journal
    during: Event | None = None
    verdict: Verdict = Verdict.PASSED

    async def run(self, model: str, version: str, config: ModelConfig, job: str, stop: Any) -> End:
        self.journal.append(Event("traffic.split", model, version, job, data={"version": version, "share": 0.25, "stage": "canary"}))
        if self.during is not None:
            self.journal.append(self.during)
        return End(self.verdict, "good")

    async def clear(self, model: str, version: str, job: str) -> None:
        self.journal.append(Event("traffic.split", model, "", job, data={"version": "", "share": 0.0, "stage": "canary"}))


@dataclass
class Bed:
    """A keeper on a journal with a proven version 1.1 of job j."""

    journal: Journal
    keeper: Any
    trial: Trial
    metrics: Metrics
    cards: Cards

    def take(self) -> tuple[str, str, Any]:
        job = self.journal.state().jobs["j"]
        piece = SimpleNamespace(config=ModelConfig(), golden=GOLDEN)
        taken: tuple[str, str, Any] = asyncio.run(self.keeper._taking.take(job, piece, WINNER, None, {}, asyncio.Event()))
        return taken


@pytest.fixture
def bed(tmp_path: Path) -> Iterator[Bed]:
    settings = Settings(repository=tmp_path / "models", state=tmp_path / "state")
    settings.repository.mkdir()
    folder = StateFolder(settings.state).prepare()
    cards, journal, metrics = Cards(folder), open_journal(str(tmp_path / "journal.db")), Metrics()
    cards.write_golden(GOLDEN)
    scratch = folder.scratch / "job"
    scratch.mkdir()
    (scratch / "model.onnx").write_bytes(b"weights")
    steps = ({"method": "graph"},)
    card: BuiltCard = cards.publish("m", scratch, Draft("j", 0, "1", SHA, "1", steps, SIGNATURE, RowsProof(True, ""), "test"))
    automatic = requested("j")
    automatic.data["promote"] = "auto"
    verified = Event("version.verified", "m", "1.1", data={"version": "1.1", "host_class": HERE, "verdict": "passed"})
    for event in (
        deployed(),
        automatic,
        claimed("j"),
        published(card.version, job="j"),
        job_event("built", "j", candidates=["1.1"], report={}),
    ):
        journal.append(event)
    journal.append(verified)
    trial: Any = Trial(journal)
    plane: Any = None
    keeper: Any = JobKeeper(
        journal, Commands(journal, HERE), Repository(settings.repository), folder, cards, HERE, 2, settings, metrics, Window(), trial, plane, "r",
    )  # fmt: skip

    async def taken(job: Any, version: str, since: int, report: Any) -> Any:
        return "promoted", version, report  # no data plane is here to say that it serves

    keeper._taking._taken = taken
    yield Bed(journal, keeper, trial, metrics, cards)
    journal.close()


def test_what_passed_its_trial_is_promoted(bed: Bed) -> None:
    assert bed.take()[0] == "promoted" and bed.journal.state().models["m"].desired == "1.1"


@pytest.mark.parametrize("verdict", [Verdict.PASSED, Verdict.INCONCLUSIVE])
def test_what_a_person_promotes_in_its_canary_waits_for_nobody(bed: Bed, verdict: Verdict) -> None:
    bed.trial.during, bed.trial.verdict = desired("1.1"), verdict
    outcome, version, report = bed.take()
    assert (outcome, version) == ("promoted", "1.1") and "somebody promoted it" in report["reason"] and "waits" not in report


def test_what_another_server_says_of_the_promoted_version_is_no_answer(bed: Bed) -> None:
    """One that shares the journal and lacks the files tells at once that it cannot load them; here it serves a moment later."""
    for kind, replica in (("version.failed", "elsewhere"), ("version.activated", "r")):
        bed.journal.append(Event(kind, "m", "1.1", data={"version": "1.1", "replica": replica}))
    assert asyncio.run(bed.keeper._taking._activated("m", "1.1", 0))
    bed.journal.append(Event("version.failed", "m", "1.1", data={"version": "1.1", "replica": "r"}))
    assert not asyncio.run(bed.keeper._taking._activated("m", "1.1", bed.journal.state().seq - 1))


@pytest.mark.parametrize(
    ("during", "why"),
    [
        (Event("loop.frozen"), "frozen"),
        (Event("mode.changed", "m", data={"mode": Mode.APPROVE.value}), "mode is approve"),
        (Event("mode.changed", "m", data={"mode": Mode.OBSERVE.value}), "mode is observe"),
    ],
)
def test_a_freeze_or_another_mode_holds_back_what_is_under_way(bed: Bed, during: Event, why: str) -> None:
    """In the midst of the canary: it ends on the incumbent; before: there is none."""
    bed.trial.during = during
    outcome, version, report = bed.take()
    assert (outcome, version) == ("kept", "1.1") and why in report["waits"]
    model = bed.journal.state().models["m"]
    assert model.desired == "1" and model.split is None
    splits = len([event for event in bed.journal.read() if event.kind == "traffic.split"])
    assert bed.take()[0] == "kept"
    assert len([event for event in bed.journal.read() if event.kind == "traffic.split"]) == splits


@pytest.mark.parametrize("gone", [deployed("m", "2", "c" * 64), Event("model.removed", "m", data={"reason": "gone"}), None])
def test_what_ended_a_job_in_its_canary_is_said(bed: Bed, gone: Event | None) -> None:
    """A new golden is no wish of anybody to cancel it."""
    job, stop, said = bed.journal.state().jobs["j"], asyncio.Event(), []

    async def run(model: str, version: str, config: ModelConfig, job: str, stopped: Any) -> End:
        if gone is not None:
            bed.journal.append(gone)
        bed.keeper._taking.seen = bed.journal.state()
        stop.set()
        said.append(stopped())
        return End(Verdict.INCONCLUSIVE, said[0])

    bed.keeper._taking._rollout.run = run
    with pytest.raises(TaskFailed, match="cancelled during its canary"):
        asyncio.run(bed.keeper._taking.take(job, SimpleNamespace(config=ModelConfig(), golden=GOLDEN), WINNER, None, {}, stop))
    expected = {"model.deployed": "golden changed from 1", "model.removed": "the model was removed"}
    assert expected.get(gone.kind if gone is not None else "", "the job was cancelled") in said[0]


def test_measured_settings_are_not_taken_while_frozen_or_for_another_version(bed: Bed) -> None:
    meanwhile: list[Event] = []

    async def tuned(*_: Any) -> Any:
        for event in meanwhile:
            bed.journal.append(event)
        return RuntimeSettings(2, 1, 16), {"summary": "faster"}

    keeper, job = bed.keeper, bed.journal.append(requested("t")).job
    keeper._tune, keeper._bench = tuned, SimpleNamespace(settings=lambda *_: RuntimeSettings(1, 1, 8))
    asked = SimpleNamespace(id=job, model="m", golden_sha256=SHA, promote="auto", tries=(({"method": "tune"},),))
    piece = SimpleNamespace(config=ModelConfig(), golden=GOLDEN)

    def tune() -> tuple[str, str, Any]:
        found: tuple[str, str, Any] = asyncio.run(keeper._tune_active(asked, piece, asyncio.Event(), {}))
        return found

    meanwhile[:] = [Event("loop.frozen")]
    outcome, _, report = tune()
    assert outcome == "kept" and "frozen" in report["waits"] and bed.journal.state().models["m"].settings == ()
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("app.control.taking.held_back", lambda *_: "")  # frozen between the look and the change
        outcome, _, report = tune()
    assert outcome == "kept" and "frozen" in report["waits"] and bed.journal.state().models["m"].settings == ()
    meanwhile[:] = [Event("loop.unfrozen"), desired("1.1")]
    outcome, _, report = tune()
    assert outcome == "kept" and "replaced" in report["waits"]
    meanwhile.clear()
    assert tune()[0] == "promoted"
    assert bed.journal.state().models["m"].settings_of("1.1") == RuntimeSettings(2, 1, 16)


def test_settings_of_a_job_that_was_cancelled_while_they_were_measured_are_not_taken(bed: Bed) -> None:
    """Runners that are compared beside the traffic are compared to the end: nobody looked whether the result was still wanted."""
    job, stop = bed.journal.append(requested("t")).job, asyncio.Event()

    async def tune(*_: Any) -> Any:
        stop.set()
        return RuntimeSettings(2, 1, 16), {"summary": "faster"}

    keeper = bed.keeper
    keeper._tuning, keeper._bench = SimpleNamespace(tune=tune), SimpleNamespace(settings=lambda *_: RuntimeSettings(1, 1, 8))
    asked = SimpleNamespace(id=job, model="m", golden_sha256=SHA, promote="auto", tries=(({"method": "tune"},),))
    with pytest.raises(TaskFailed, match="cancelled while its settings"):
        asyncio.run(keeper._tune_active(asked, SimpleNamespace(config=ModelConfig(), golden=GOLDEN), stop, {}))
    assert bed.journal.state().models["m"].settings == ()


@pytest.mark.parametrize("servers", [MOST_JUDGINGS - 1, MOST_JUDGINGS])
def test_what_takes_the_server_down_is_not_proven_at_each_start_for_good(bed: Bed, servers: int) -> None:
    """A store that is away for a while is no end of a server, and counts once."""
    for number in range(1, servers + 1):
        bed.journal.append(job_event("verifying", "j", **({"judging": number} if number > 1 else {})))
    proven = []

    async def verify(*_: Any, **__: Any) -> Judged:
        proven.append(bed.journal.state().jobs["j"].judgings)
        if len(proven) < 3:
            raise StoreUnavailable("gone")
        return replace(WINNER, verdict=Verdict.FAILED)

    keeper = bed.keeper
    keeper._verify, keeper._bench = verify, SimpleNamespace(workpiece=lambda *_: None)
    for _ in range(3):
        with suppress(StoreUnavailable):
            asyncio.run(keeper._conclude(bed.journal.state().jobs["j"]))
    job = bed.journal.state().jobs["j"]
    if servers < MOST_JUDGINGS:
        assert job.outcome == "refused" and proven == [MOST_JUDGINGS] * 3
    else:
        assert job.outcome == "failed" and "5 times the server ended" in job.report["reason"] and not proven


def test_a_proof_takes_no_more_memory_than_the_container_has_left(bed: Bed, monkeypatch: pytest.MonkeyPatch) -> None:
    bounds = []

    async def run_task(kind: str, request: Any, limits: TaskLimits, *_: Any) -> Any:
        bounds.append(limits.memory_bytes)

    monkeypatch.setattr("app.control.keeper.run_task", run_task)
    monkeypatch.setattr("optimizers.host.memory_budget", lambda *_: MemoryBudget(2 << 30, 1 << 30))
    asyncio.run(bed.keeper._task("verify", {}, 60.0, bed.journal.state().jobs["j"], asyncio.Event()))
    assert bounds == [1 << 30]


def test_a_candidate_keeps_no_share_while_nobody_judges_it(bed: Bed) -> None:
    """After a crash in mid-canary the job is proven again for minutes; and no job ends and leaves its candidate a share."""
    canary = Event("traffic.split", "m", "1.1", "j", data={"version": "1.1", "share": 0.25, "stage": "canary"})
    for event in (job_event("verifying", "j"), canary):
        bed.journal.append(event)
    shared = []

    async def judge(*_: Any) -> Any:
        shared.append(bed.journal.state().models["m"].split)
        bed.journal.append(canary)
        return "kept", "1.1", {}

    bed.keeper._judge = judge
    asyncio.run(bed.keeper._conclude(bed.journal.state().jobs["j"]))
    kinds = [event.kind for event in bed.journal.read()]
    assert shared == [None] and bed.journal.state().models["m"].split is None
    assert kinds[-1] == "job.finished" and kinds[-2] == "traffic.split"


def test_a_job_of_a_server_that_died_right_after_its_claim_goes_on(bed: Bed) -> None:
    bed.journal.append(requested("t"))
    bed.journal.append(claimed("t", "server gone"))
    asyncio.run(bed.keeper._advance(bed.journal.state().jobs["t"]))
    assert bed.journal.state().jobs["t"].state.value == "built"


def test_weights_of_a_version_that_was_promoted_at_the_same_moment_stay(bed: Bed) -> None:
    """What was decided by a state of before is not done: the journal ignores the removal of what is desired."""
    [card] = bed.cards.built("m")
    weights = bed.cards.path(card)
    commands = bed.keeper._commands
    bed.journal.append(desired("1.1"))
    with pytest.raises(Conflict, match="promoted"):
        commands.let_go("m", "1.1", "hone", "not needed")
    bed.journal.append(desired("1"))
    bed.journal.append(job_event("finished", "j", outcome="refused", report={}))
    bed.journal.append(Event("version.verified", "m", "1.1", data={"version": "1.1", "host_class": HERE, "verdict": "failed"}))
    bed.journal.append(Event("desired.changed", "m", "1", data={"version": "1", "from": "", "reason": ""}))
    asyncio.run(bed.keeper._remove_unneeded("m"))
    assert weights.exists(), "the previous version"
    commands.let_go("m", "1.1", "ann", "asked for")
    assert bed.journal.state().models["m"].built[0].removed


def test_weights_that_nobody_needs_go_but_not_while_all_is_frozen(bed: Bed) -> None:
    [card] = bed.cards.built("m")
    weights = bed.cards.path(card)
    bed.journal.append(job_event("finished", "j", outcome="refused", report={}))
    bed.journal.append(Event("version.verified", "m", "1.1", data={"version": "1.1", "host_class": HERE, "verdict": "failed"}))
    bed.journal.append(Event("loop.frozen", actor="ann"))
    asyncio.run(bed.keeper._remove_unneeded("m"))
    assert weights.exists()
    bed.journal.append(Event("loop.unfrozen", actor="ann"))
    asyncio.run(bed.keeper._remove_unneeded("m"))
    assert not weights.exists()


def test_jobs_are_counted_once_by_the_recipe_that_came_out(bed: Bed) -> None:
    tally = JobTally(bed.metrics)
    tally.count(bed.journal.state())
    counted = bed.metrics.counters["hone_jobs"]
    assert counted[("graph", "promoted")] == 0 and ("graph | int8", "failed") in counted, "shown from 0 on, while they are open"
    bed.journal.append(job_event("finished", "j", outcome="promoted", candidate="1.1", report={}))
    bed.journal.append(requested("k"))
    bed.journal.append(job_event("finished", "k", outcome="failed", report={}))
    tally.count(bed.journal.state())
    tally.count(bed.journal.state())
    assert counted[("graph", "promoted")] == 1 and counted[("graph | int8", "failed")] == 1
    for identity in ("elsewhere", "here"):
        bed.journal.append(requested(identity))
        bed.journal.append(job_event("finished", identity, outcome="failed", report={}))
    tally.lapsed()
    tally.ended("here")
    tally.count(bed.journal.state())
    assert counted[("graph | int8", "failed")] == 2, "another server counted the other, while it held the lease"
