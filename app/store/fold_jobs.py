"""The part of the fold that moves jobs: requested → building → built → verifying → finished, in log order.

The first claim of an attempt wins, later ones change nothing; what a worker says about an attempt that is no longer the job's
is passed over. A job that nobody works on ends as soon as it is cancelled. It knows nothing of leases or processes.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Final

from app.domain import Event, Job, JobState, State
from app.store.transient import with_job

KEPT_FINISHED_JOBS: Final = 200
"""Finished jobs that stay in memory, per model; their events stay in the journal."""
LOOK_EVERY: Final = 64


def is_finished(state: State, identity: str) -> bool:
    job = state.jobs.get(identity)
    return job is not None and job.state is JobState.FINISHED


def requested(state: State, event: Event) -> State:
    if event.job in state.jobs:
        return state
    data = event.data
    job = Job(
        id=event.job,
        model=event.model,
        golden=data["golden"],
        golden_sha256=data["golden_sha256"],
        tries=tuple(tuple(dict(step) for step in steps) for steps in data["tries"]),
        reason=str(data.get("reason") or ""),
        promote=str(data.get("promote") or "manual"),
        actor=event.actor,
        state=JobState.REQUESTED,
        requested_at=event.at,
        rank=float(data.get("rank", 1.0)),
    )
    model = state.models.get(event.model)
    if model is None:
        return _cancelled(state, event, job, f"there is no model {event.model!r}")
    if model.golden_sha256 != job.golden_sha256:
        return _cancelled(state, event, job, f"golden {job.golden} had been replaced by {model.golden} before the job was asked for")
    return bounded(_put(state, job))


def claimed(state: State, event: Event) -> State:
    job = state.jobs.get(event.job)
    if job is None or job.state not in (JobState.REQUESTED, JobState.BUILDING) or event.data["attempt"] != job.attempt + 1:
        return state
    if job.cancel_asked:
        return _cancelled(state, event, job, "cancelled")
    worker, machine, attempt = event.data["worker"], str(event.data.get("machine", "")), event.data["attempt"]
    return _put(state, replace(job, state=JobState.BUILDING, worker=worker, machine=machine, attempt=attempt, candidates=()))


def built(state: State, event: Event) -> State:
    job = _of_attempt(state, event)
    if job is None or job.state is not JobState.BUILDING:
        return state
    if job.cancel_asked:
        return _cancelled(state, event, job, "cancelled")
    report = dict(event.data.get("report") or {})
    return _put(state, replace(job, state=JobState.BUILT, candidates=tuple(event.data.get("candidates", ())), report=report))


def verifying(state: State, event: Event) -> State:
    """It begins, or begins anew: `judging` then says for which time."""
    job = _of_attempt(state, event)
    if job is None or job.state not in (JobState.BUILDING, JobState.BUILT, JobState.VERIFYING):
        return state
    return _put(state, replace(job, state=JobState.VERIFYING, judgings=max(job.judgings, event.data.get("judging", 1))))


def cancel_asked(state: State, event: Event) -> State:
    job = state.jobs.get(event.job)
    if job is None or job.state is JobState.FINISHED:
        return state
    asked = replace(job, cancel_asked=True)
    if job.state in (JobState.REQUESTED, JobState.BUILT):
        return _cancelled(state, event, asked, f"cancelled by {event.actor} while nobody worked on it")
    return _put(state, asked)


def finished(state: State, event: Event) -> State:
    job = _of_attempt(state, event)
    if job is None or job.state is JobState.FINISHED:
        return state
    report, candidate = dict(event.data.get("report") or {}), str(event.data.get("candidate") or "")
    return _finish(state, event, replace(job, outcome=event.data["outcome"], report=report, candidate=candidate))


def cancel_of_model(state: State, event: Event, golden_sha256: str | None, why: str) -> State:
    """End every open job of the event's model that was not asked for this golden (of all, where there is none)."""
    for job in list(state.jobs.values()):
        if job.model == event.model and job.state is not JobState.FINISHED and job.golden_sha256 != golden_sha256:
            state = _cancelled(state, event, job, why)
    return state


def bounded(state: State) -> State:
    """The state without the oldest finished jobs of each model beyond what is kept. Looks only now and then: it reads all jobs."""
    if len(state.jobs) % LOOK_EVERY:
        return state
    return replace(state, jobs=type(state.jobs)(without_oldest(state.jobs)))


def without_oldest(jobs: dict[str, Job]) -> dict[str, Job]:
    kept: dict[str, Job] = {}
    done: Counter[str] = Counter()
    for identity, job in reversed(jobs.items()):
        done[job.model] += job.state is JobState.FINISHED
        if job.state is not JobState.FINISHED or done[job.model] <= KEPT_FINISHED_JOBS:
            kept[identity] = job
    return dict(reversed(kept.items()))


def _of_attempt(state: State, event: Event) -> Job | None:
    """The event's job, unless the event speaks of an attempt that is not the job's own."""
    job = state.jobs.get(event.job)
    if job is None or event.data.get("attempt", job.attempt) != job.attempt:
        return None
    return job


def _cancelled(state: State, event: Event, job: Job, why: str) -> State:
    return _finish(state, event, replace(job, outcome="cancelled", report={"reason": why}))


def _finish(state: State, event: Event, job: Job) -> State:
    done = replace(job, state=JobState.FINISHED, finished_at=event.at)
    return _put(state, done)


def _put(state: State, job: Job) -> State:
    return with_job(state, job)
