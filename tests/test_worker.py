"""What a worker does in the moments in which another one works too."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.catalog.cards import Cards, GoldenCard, RowsProof
from app.catalog.model_config import ModelConfig
from app.catalog.repository import Repository
from app.catalog.samples import SampleSets
from app.catalog.state_folder import StateFolder
from app.control.bench import Bench, Workpiece
from app.control.reach import Shown
from app.control.worker import Worker, run_worker
from app.domain import JSON, Event, JobState, Signature
from app.errors import Conflict, NotAllowed
from app.settings import Settings
from app.store.base import Journal, StoreUnavailable
from app.store.open import open_journal
from app.store.sqlite import SqliteJournal
from app.telemetry.metrics import Metrics
from optimizers import Samples
from optimizers.base import Progress
from optimizers.recipe import Order
from tests.journal_story import claimed, deployed, job_event, requested
from tests.models import scaled
from tests.redis_server import RedisServer


class Overtaken(SqliteJournal):
    """A journal in which another worker ends its job between this one's look and its lease."""

    def acquire(self, lease: str, holder: str, ttl_s: float) -> bool:
        self.append(job_event("built", "j", attempt=1, candidates=[], report={}))
        return super().acquire(lease, holder, ttl_s)


def worker_of(tmp_path: Path, journal: Journal) -> tuple[Any, StateFolder]:
    settings = Settings(repository=tmp_path / "models", state=tmp_path / "state")
    settings.repository.mkdir()
    folder = StateFolder(settings.state).prepare()
    return Worker(settings, journal, Bench(Repository(settings.repository), folder, Cards(folder)), Metrics()), folder


def test_a_job_that_another_worker_just_finished_is_not_claimed_again(tmp_path: Path) -> None:
    journal = Overtaken(tmp_path / "journal.sqlite")
    worker, _ = worker_of(tmp_path, journal)
    for event in (deployed(), requested("j"), claimed("j")):
        journal.append(event)
    assert asyncio.run(worker._claim()) is None
    assert [event.kind for event in journal.read()].count("job.claimed") == 1
    assert SqliteJournal.acquire(journal, "job:j", "anybody", 1.0), "the lease was given back"
    journal.close()


class Hanging(SqliteJournal):
    """A journal whose board does not answer until it is let."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.let, self.asked = threading.Event(), 0

    def post(self, key: str, value: JSON, ttl_s: float) -> None:
        self.asked += 1
        assert self.let.wait(30)
        super().post(key, value, ttl_s)


@pytest.mark.anyio
async def test_a_board_that_hangs_holds_one_thread_and_shows_the_newest_in_the_end(tmp_path: Path) -> None:
    with contextlib.closing(Hanging(tmp_path / "journal.sqlite")) as journal:
        shown = Shown(journal, "job:j", 30.0)
        try:
            for step in range(20):
                shown(Progress("m", f"step {step}", step / 20))
                await asyncio.sleep(0.005)
            assert journal.asked == 1
        finally:
            journal.let.set()
        async with asyncio.timeout(20):
            while journal.board().get("job:j", {}).get("step") != "step 19":
                await asyncio.sleep(0.01)
        assert journal.asked == 2


def test_what_repairs_most_for_its_cost_is_built_first(tmp_path: Path) -> None:
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    worker, _ = worker_of(tmp_path, journal)
    journal.append(deployed())
    for job, rank in (("idle", 0.0), ("asked", 1.0), ("urgent", 7.0)):
        journal.append(replace(requested(job), data={**requested(job).data, "rank": rank}))
    for job in ("urgent", "asked", "idle"):
        assert asyncio.run(worker._claim()).id == job
        journal.append(job_event("built", job, attempt=1, candidates=[], report={}))
    with pytest.raises(ValueError, match=r"data\.rank=-1"):
        journal.append(replace(requested("wrong"), data={**requested("wrong").data, "rank": -1}))
    journal.close()


def test_a_worker_in_another_state_folder_than_the_server_is_told_so(tmp_path: Path) -> None:
    with contextlib.closing(SqliteJournal(tmp_path / "journal.sqlite")) as journal:
        worker, _ = worker_of(tmp_path, journal)
        scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
        with pytest.raises(Conflict, match=r"this state folder has no card of golden 1 of 'm'.*HONE_STATE"):
            worker._bench.workpiece("m", "1", "aa")
        with pytest.raises(Conflict, match="changed or is gone"):
            worker._bench.workpiece("m", "2", "aa")


def test_checkpoints_stay_as_long_as_their_job_is_not_built(tmp_path: Path) -> None:
    """A job that is claimed again, since its worker was killed, finds what it had learned; of one that is finished or gone nothing stays."""
    journal = SqliteJournal(tmp_path / "journal.sqlite")
    worker, folder = worker_of(tmp_path, journal)
    for event in (deployed(), requested("j"), claimed("j"), requested("done"), claimed("done")):
        journal.append(event)
    journal.append(job_event("finished", "done", outcome="failed", attempt=1, report={}))
    for job in ("j", "done", "gone"):
        (folder.checkpoints / job / "0").mkdir(parents=True)
    for frozen in (True, False):
        journal.append(Event("loop.frozen" if frozen else "loop.unfrozen"))
        claim = asyncio.run(worker._claim())
        assert (claim is None and len(list(folder.checkpoints.iterdir())) == 3) if frozen else claim.id == "j"
    assert [path.name for path in folder.checkpoints.iterdir()] == ["j"]
    nothing: Any = None
    rows = Samples({"x": np.zeros((4, 16), np.float32)})
    golden = GoldenCard("m", "1", "aa", (), Signature((), ()), RowsProof(False, ""))
    piece = Workpiece(nothing, ModelConfig(), golden, tmp_path / "model.onnx", SampleSets(rows))
    request = worker._request(piece, [], tmp_path, folder.checkpoints / "j" / "0", None)
    assert Order.from_json(request).keep == str(folder.checkpoints / "j" / "0")
    journal.close()


@pytest.mark.needs("redis-server")
def test_what_was_built_is_told_though_the_store_lost_the_claim_meanwhile(tmp_path: Path) -> None:
    """Nobody else knows of it: the worker alone saw the claim. Its hours of work are neither thrown away nor done twice."""
    server = RedisServer(tmp_path).start()
    with contextlib.closing(open_journal(server.url)) as journal:
        worker, _ = worker_of(tmp_path, journal)
        for event in (deployed(), requested("j")):
            journal.append(event)

        async def work() -> None:
            job = await worker._claim()
            server.stop()
            saying = asyncio.create_task(worker._say("job.built", job, candidates=["1.1"], report={}))
            await asyncio.sleep(0.2)
            server.start()  # empty
            await saying

        try:
            asyncio.run(work())
            now = journal.state()
            assert (now.jobs["j"].state, now.jobs["j"].attempt, now.jobs["j"].candidates) == (JobState.BUILT, 1, ("1.1",))
            assert now.frozen and list(now.models) == ["m"]
            worker.stop()
            server.stop()
            with pytest.raises(StoreUnavailable):
                asyncio.run(worker._say("job.built", now.jobs["j"], candidates=[], report={}))
        finally:
            server.stop()


@pytest.mark.anyio
async def test_a_journal_that_is_away_is_told_once_however_often_it_is_asked(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("INFO", "hone")
    with contextlib.closing(SqliteJournal(tmp_path / "journal.db")) as journal:
        worker, _ = worker_of(tmp_path, journal)
        worker._journal = worker._reach.journal = open_journal("redis://127.0.0.1:1/0")
        worker._rest = lambda seconds: asyncio.sleep(0.01)
        running = asyncio.create_task(worker.run())
        await asyncio.sleep(0.5)
        worker._journal = worker._reach.journal = journal
        await asyncio.sleep(0.5)
        worker.stop()
        await running
    told = [record.getMessage() for record in caplog.records if "the journal is" in record.getMessage()]
    assert len(told) == 2 and "away" in told[0] and "back" in told[1]


def test_a_taken_port_of_metrics_is_told_with_the_remedy(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        settings = Settings(state=tmp_path, worker_port=taken.getsockname()[1])
        with pytest.raises(NotAllowed, match=r"cannot listen on .*HONE_WORKER_PORT"):
            run_worker(settings)
