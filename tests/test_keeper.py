"""What the job keeper decides without a server: which weights may go, and which job is brought to its end beside which."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.catalog.cards import Cards
from app.catalog.repository import Repository
from app.catalog.state_folder import StateFolder
from app.control.endings import KEPT_PROVEN, unneeded, without_winner
from app.control.keeper import LEASE, JobKeeper
from app.control.verification import Judged
from app.domain import BuiltVersion, Generation, Job, JobState, ModelState, Split, Verdict
from app.settings import Settings
from app.store.sqlite import SqliteJournal
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window
from optimizers.task import TaskFailed
from tests.journal_story import claimed, deployed, job_event, requested

HERE = "x86_64-test"


def built(number: int, verdict: Verdict | None = Verdict.PASSED, job: str = "done") -> BuiltVersion:
    verdicts = ((HERE, verdict),) if verdict is not None else ()
    return BuiltVersion(f"1.{number}", "1", "sha", job, (), "s", verdicts)


def model(*versions: BuiltVersion, desired: str = "1", previous: str = "") -> ModelState:
    return ModelState("m", "1", "sha", desired, previous, Generation(1, 1), built=versions)


def job(**changes: object) -> Job:
    fresh = Job("done", "m", "1", "sha", (), "", "auto", "admin", JobState.FINISHED, 0.0)
    return replace(fresh, **changes)  # type: ignore[arg-type]


def test_refused_versions_go_and_those_in_use_stay() -> None:
    state = model(built(1, Verdict.FAILED), built(2), built(3, Verdict.FAILED), desired="1.3", previous="1.2")
    assert unneeded(state, [job()], HERE) == ["1.1"]


def test_only_the_newest_proven_versions_are_kept() -> None:
    state = model(*(built(number) for number in range(1, KEPT_PROVEN + 3)))
    assert unneeded(state, [job()], HERE) == ["1.1", "1.2"]


def test_what_waits_for_a_person_or_an_open_job_stays() -> None:
    waiting = job(outcome="kept", candidate="1.1")
    running = job(id="open", state=JobState.VERIFYING, candidates=("1.2",))
    state = model(built(1, Verdict.INCONCLUSIVE), built(2, None, "open"), built(3, Verdict.FAILED))
    assert unneeded(state, [waiting, running], HERE) == ["1.3"]


def test_of_what_waits_for_a_person_the_newest_stay() -> None:
    versions = [built(number, Verdict.INCONCLUSIVE) for number in range(1, KEPT_PROVEN + 3)]
    jobs = [job(id=v.version, outcome="inconclusive", candidate=v.version, finished_at=float(at)) for at, v in enumerate(versions)]
    assert unneeded(model(*versions), jobs[::-1], HERE) == ["1.1", "1.2"]


def test_what_is_undecided_stays_whatever_else_its_job_came_to() -> None:
    versions = [built(1, Verdict.FAILED), *(built(number, Verdict.INCONCLUSIVE) for number in range(2, KEPT_PROVEN + 3))]
    assert unneeded(model(*versions), [job(outcome="promoted", candidate="1")], HERE) == ["1.1", "1.2"]


def judged(version: str, verdict: Verdict, gain: float = 0.0, nothing_changed: bool = False) -> Judged:
    return Judged(version, verdict, "s", gain, False, "", nothing_changed, {})


def test_a_job_ends_with_what_a_person_may_still_take() -> None:
    refused, slow, fast = judged("1.1", Verdict.FAILED), judged("1.2", Verdict.INCONCLUSIVE, 0.1), judged("1.3", Verdict.INCONCLUSIVE, 0.56)
    same = judged("1.4", Verdict.INCONCLUSIVE, nothing_changed=True)
    assert without_winner([refused, slow, fast], job()) == ("inconclusive", "1.3")
    assert without_winner([refused], job()) == ("refused", "") and without_winner([same], job()) == ("nothing_changed", "")
    for vain in ("nothing_changed", "inconclusive"):  # of the settings
        assert without_winner([refused, fast], job(), (vain, "1")) == ("inconclusive", "1.3")
        assert without_winner([refused, same], job(), (vain, "1")) == without_winner([], job(), (vain, "1")) == (vain, "1")
    for better in ("promoted", "kept"):
        assert without_winner([refused, fast], job(), (better, "1")) == (better, "1")


def test_what_may_answer_under_load_and_what_is_on_trial_or_watched_stays() -> None:
    state = model(*(built(number) for number in range(1, KEPT_PROVEN + 4)))
    assert unneeded(replace(state, rungs=("1.1",), split=Split("1.3", 0.05, "watch")), [job()], HERE) == ["1.2"]


def test_versions_of_an_earlier_golden_go() -> None:
    old = replace(built(1), golden_sha256="another")
    assert unneeded(model(old, built(2)), [job()], HERE) == ["1.1"]


class Waiting(JobKeeper):
    """Its jobs stay open, as in a canary, until `go` is set."""

    def begin(self) -> None:
        self.begun: list[str] = []
        self.go = asyncio.Event()

    async def _conclude(self, job: Job) -> None:
        self.begun.append(job.id)
        await self.go.wait()
        await self._say("job.finished", job, outcome="kept", report={})


def parts(tmp_path: Path, journal: SqliteJournal, replica: str) -> Any:
    folder, nothing = StateFolder(tmp_path / "state").prepare(), None
    (tmp_path / "models").mkdir(exist_ok=True)
    repository, cards = Repository(tmp_path / "models"), Cards(folder)
    return journal, nothing, repository, folder, cards, HERE, 2, Settings(), Metrics(), Window(), nothing, nothing, replica


def test_a_server_decides_once_its_models_are_loaded_and_leaves_it_to_another_when_it_ends(tmp_path: Path) -> None:
    journal, loaded = SqliteJournal(tmp_path / "journal.sqlite"), list[str]()

    async def main() -> None:
        keeper = JobKeeper(*parts(tmp_path, journal, "first"))
        keeper.may_lead = lambda: bool(loaded)
        running = asyncio.create_task(keeper.run())
        await asyncio.sleep(0.5)
        assert not keeper.leads and journal.acquire(LEASE, "second", 10), "its models are being loaded"
        journal.release(LEASE, "second")
        loaded.append("all")
        async with asyncio.timeout(10):
            while not keeper.leads:
                await asyncio.sleep(0.01)
        assert not journal.acquire(LEASE, "second", 10)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
        assert journal.acquire(LEASE, "second", 10)

    asyncio.run(main())
    journal.close()


def test_a_canary_of_one_model_holds_up_no_other_and_one_model_has_one_job_at_a_time(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    given = parts(tmp_path, journal, "r")
    for event in (deployed("m"), deployed("n")):
        journal.append(event)
    for identity, name in (("first", "m"), ("second", "m"), ("other", "n")):
        for event in (requested(identity, name), claimed(identity), job_event("built", identity, attempt=1, candidates=[], report={})):
            journal.append(replace(event, model=name))

    async def main() -> None:
        keeper = Waiting(*given)
        keeper.begin()
        for _ in range(3):
            await keeper._pass(journal.state())
            await asyncio.sleep(0)
        assert keeper.begun == ["first", "other"]
        keeper.go.set()
        await asyncio.gather(*keeper._concluding.values())
        await keeper._pass(journal.state())
        await asyncio.gather(*keeper._concluding.values())
        assert keeper.begun[2:] == ["second"] and not [job for job in journal.state().jobs.values() if job.state is not JobState.FINISHED]

    asyncio.run(main())
    journal.close()


def test_a_job_that_waits_for_its_turn_to_be_measured_can_be_cancelled(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.sqlite")

    async def main() -> None:
        keeper, stop = JobKeeper(*parts(tmp_path, journal, "r")), asyncio.Event()
        async with keeper._measuring:
            waiting = asyncio.create_task(keeper._task("verify", {}, 60.0, job(), stop))
            await asyncio.sleep(0.05)
            assert not waiting.done()
            stop.set()
            with pytest.raises(TaskFailed, match="waited for its turn"):
                await asyncio.wait_for(waiting, 5)
        async with asyncio.timeout(5), keeper._turn(asyncio.Event()):
            assert keeper._measuring.locked()
        assert not keeper._measuring.locked(), "the turn that nobody took any more is free for the next"

    asyncio.run(main())
    journal.close()
