"""Who builds on this machine, as the journal tells it."""

from __future__ import annotations

import os
from dataclasses import replace

from app.control.builders import builders_here, machine, under_way, worker_name
from app.domain import Event, State
from app.store.fold import fold, fold_all

SHA = "0" * 64
DEPLOYED = Event("model.deployed", "m", data={"golden": "1", "sha256": SHA})


def claimed(job: str, worker: str, **where: str) -> list[Event]:
    asked = {"golden": "1", "golden_sha256": SHA, "tries": [[{"method": "graph"}]], "reason": "", "promote": "manual"}
    return [
        Event("job.requested", "m", "", job, data=asked),
        Event("job.claimed", "m", "", job, data={"worker": worker, **where, "attempt": 1}),
    ]


def test_a_worker_beside_the_server_is_known_by_its_process_and_one_elsewhere_is_none_of_it() -> None:
    """A job on another machine kept every server from looking for as long as it took."""
    events = [
        DEPLOYED,
        *claimed("here", worker_name(), machine=machine()),
        *claimed("container", "5f2c-with-dashes-7-ab12cd", machine=machine()),
        *claimed("old", "elsewhere-8-ab12cd"),
        *claimed("away", "elsewhere-9-ab12cd", machine="another"),
        *claimed("odd", "?", machine=machine()),
    ]
    state = fold_all(State(), (replace(event, seq=number) for number, event in enumerate(events, 1)))
    alive = {job.worker for job in state.jobs.values()}
    assert builders_here(state, alive) == {"here": os.getpid(), "container": 0, "old": 0, "odd": 0}
    assert builders_here(state, alive - {"?"}).keys() == {"here", "container", "old"}, "a worker that ended in mid-build builds nothing"
    done = fold(state, Event("job.built", "m", "", "here", data={"candidates": []}, seq=99))
    assert "here" not in builders_here(done, alive)


def test_a_job_that_waits_for_a_worker_where_none_is_is_not_under_way() -> None:
    """The loop took it for its remedy at work, and looked at nothing else of that model, for good."""
    asked = fold_all(State(), [replace(event, seq=seq, at=1000.0) for seq, event in enumerate([DEPLOYED, *claimed("j", "w")[:1]], 1)])
    assert [job.id for job in under_way(asked, "m", (), 1010.0)] == ["j"], "a worker may be about to take it"
    assert not under_way(asked, "m", (), 1100.0) and not under_way(asked, "other", ("w",), 1100.0)
    assert [job.id for job in under_way(asked, "m", ("w",), 1100.0)] == ["j"]
