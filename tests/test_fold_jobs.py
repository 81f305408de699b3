"""What the journal's events mean for jobs: claims, losses, cancellations and races."""

from __future__ import annotations

import pytest

from app.domain import Event, Job, JobState, State
from app.store.fold_jobs import KEPT_FINISHED_JOBS, LOOK_EVERY
from tests.journal_story import OTHER_SHA, SHA, claimed, deployed, job_event, requested, told


def job_of(state: State, identity: str = "j1") -> Job:
    return state.jobs[identity]


def test_the_life_of_a_job() -> None:
    state = told(deployed(), requested("j1"))
    assert job_of(state) == Job(
        "j1", "m", "1", SHA, (({"method": "graph"},), ({"method": "int8"},)), "test", "auto", "ann", JobState.REQUESTED, 1002.0
    )
    state = told(claimed("j1"), state=state)
    assert (job_of(state).state, job_of(state).worker, job_of(state).attempt) == (JobState.BUILDING, "w1", 1)
    state = told(job_event("built", "j1", candidates=["1.1", "1.2"], attempt=1), state=state)
    assert (job_of(state).state, job_of(state).candidates) == (JobState.BUILT, ("1.1", "1.2"))
    state = told(job_event("verifying", "j1"), state=state)
    assert job_of(state).state is JobState.VERIFYING
    state = told(job_event("finished", "j1", outcome="promoted", report={"gain": 0.5}, candidate="1.2"), state=state)
    done = job_of(state)
    assert (done.state, done.outcome, done.report, done.candidate, done.finished_at) == (
        JobState.FINISHED,
        "promoted",
        {"gain": 0.5},
        "1.2",
        1006.0,
    )


def test_how_often_judging_was_begun_is_counted() -> None:
    state = told(deployed(), requested("j1"), claimed("j1"), job_event("built", "j1", candidates=["1.1"]), job_event("verifying", "j1"))
    assert job_of(state).judgings == 1
    twice = [job_event("verifying", "j1", judging=number) for number in (2, 3, 3)]  # of two servers at the same time, say
    state = told(*twice, state=state)
    assert (job_of(state).state, job_of(state).judgings) == (JobState.VERIFYING, 3)
    assert job_of(told(job_event("verifying", "j1"), state=state)).judgings == 3


def test_the_first_claim_of_an_attempt_wins() -> None:
    state = told(deployed(), requested("j1"), claimed("j1", "w1"), claimed("j1", "w2"))
    assert job_of(state).worker == "w1"


def test_a_lost_job_is_claimed_by_the_next_attempt_and_the_former_worker_is_not_heard() -> None:
    state = told(deployed(), requested("j1"), claimed("j1", "w1"), claimed("j1", "w2", 2))
    assert (job_of(state).worker, job_of(state).attempt) == ("w2", 2)
    late = told(job_event("built", "j1", candidates=["1.1"], attempt=1), state=state)
    late = told(job_event("finished", "j1", outcome="failed", attempt=1), state=late)
    assert job_of(late).state is JobState.BUILDING
    assert job_of(told(claimed("j1", "w3", 4), state=state)).worker == "w2"


def test_the_same_job_is_requested_once() -> None:
    state = told(deployed(), requested("j1"), claimed("j1"), requested("j1"))
    assert job_of(state).state is JobState.BUILDING


def test_a_job_that_nobody_works_on_ends_with_its_cancellation() -> None:
    waiting = told(deployed(), requested("j1"), job_event("cancel_asked", "j1"))
    assert (job_of(waiting).state, job_of(waiting).outcome) == (JobState.FINISHED, "cancelled")
    built = told(deployed(), requested("j1"), claimed("j1"), job_event("built", "j1", candidates=[]), job_event("cancel_asked", "j1"))
    assert job_of(built).outcome == "cancelled"


def test_a_running_job_is_asked_to_end_and_never_begun_again() -> None:
    state = told(deployed(), requested("j1"), claimed("j1"), job_event("cancel_asked", "j1"))
    assert (job_of(state).state, job_of(state).cancel_asked) == (JobState.BUILDING, True)
    assert job_of(told(claimed("j1", "w2", 2), state=state)).outcome == "cancelled"
    assert job_of(told(job_event("built", "j1", candidates=["1.1"]), state=state)).outcome == "cancelled"


def test_finished_is_final() -> None:
    state = told(deployed(), requested("j1"), claimed("j1"), job_event("finished", "j1", outcome="failed"))
    for late in (claimed("j1", "w2", 2), job_event("built", "j1", candidates=[]), job_event("finished", "j1", outcome="promoted")):
        assert job_of(told(late, state=state)).outcome == "failed"


@pytest.mark.parametrize("end", [deployed("m", "2", OTHER_SHA), Event("model.removed", "m")])
def test_jobs_end_with_the_golden_they_were_asked_for(end: Event) -> None:
    state = told(deployed(), deployed("other"), requested("j1"), requested("j2"), claimed("j2"), requested("j3", "other"), end)
    assert (job_of(state, "j1").outcome, job_of(state, "j2").outcome) == ("cancelled", "cancelled")
    assert job_of(state, "j3").state is JobState.REQUESTED
    assert job_of(state, "j2").report["reason"]


def test_a_job_for_a_golden_that_is_gone_never_opens() -> None:
    assert job_of(told(deployed(), requested("j1", golden_sha256=OTHER_SHA))).outcome == "cancelled"
    assert job_of(told(requested("j1"))).outcome == "cancelled"


def test_finished_jobs_are_kept_up_to_a_bound_and_open_ones_always() -> None:
    state = told(deployed(), requested("open"))
    for number in range(KEPT_FINISHED_JOBS + 2 * LOOK_EVERY):
        state = told(requested(f"j{number}"), job_event("cancel_asked", f"j{number}"), state=state)
    assert KEPT_FINISHED_JOBS <= len(state.jobs) <= KEPT_FINISHED_JOBS + LOOK_EVERY + 1
    assert "open" in state.jobs
    assert list(state.jobs)[-1] == f"j{KEPT_FINISHED_JOBS + 2 * LOOK_EVERY - 1}"
