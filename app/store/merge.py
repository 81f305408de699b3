"""What was lost and how it comes back: compares a store's state with one that a process remembers, and joins the two.

Each model is compared by epoch, generation and seq of the last event that changed it: so the order in which several processes
bring back what they know does not matter, and a stranger that began the emptied store anew does not win. It knows nothing of stores: states in, states out.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Final

from app.domain import Generation, Job, JobState, ModelState, RemovedModel, State
from app.store.fold_jobs import without_oldest

EVERYTHING: Final = 2**62
"""As the seq with which an epoch was left: nothing of that epoch counts any more."""

_PROGRESS: Final = {state: place for place, state in enumerate(JobState)}


def behind(store: State, known: State) -> bool:
    """True where the store lacks something that `known` has seen: emptied, damaged, or an older copy of itself."""
    if known.epoch != store.epoch:
        return known.epoch > store.epoch or known.seq > store.left_at.get(known.epoch, 0)
    return known.seq > store.seq or any(_rank(known, name) > _rank(store, name) for name in {*known.models, *known.removed})


def later(known: State, seen: State | None) -> State:
    """Of what a process was told and what it saw itself: the latter, unless it lacks something of the former."""
    return known if seen is None or behind(seen, known) else seen


def in_epoch(state: State, epoch: int) -> State:
    """The same state in another epoch: every generation from before is fenced off."""
    models = {name: replace(model, generation=Generation(epoch, model.generation.n)) for name, model in state.models.items()}
    return replace(state, epoch=epoch, models=models)


def recovered(store: State, known: State, why: str) -> State:
    """Both joined, the later of each model winning, in a new epoch and frozen."""
    models, removed = dict(store.models), dict(store.removed)
    for name in {**known.models, **known.removed}:
        if _rank(known, name) > _rank(store, name):
            _take(known, name, models, removed)
    left_at = _left(store, known)
    left_at[store.epoch] = max(left_at.get(store.epoch, 0), store.seq)
    left_at[known.epoch] = max(left_at.get(known.epoch, 0), known.seq)
    jobs = {identity: _held_to_golden(job, models) for identity, job in _jobs(store, known).items()}
    joined = replace(store, models=models, removed=removed, jobs=jobs, left_at=left_at, frozen=True, frozen_because=why)
    return in_epoch(joined, max(store.epoch, known.epoch) + 1)


def restored(store: State, backup: State, seq: int, why: str) -> State:
    """The backup's state as it is, in a new epoch and frozen. Nothing that anybody remembers from before outranks it."""
    epoch = max(store.epoch, backup.epoch) + 1
    models = {name: replace(model, stamp=(epoch, seq)) for name, model in backup.models.items()}
    left_at = dict.fromkeys(range(1, epoch), EVERYTHING)
    return in_epoch(replace(backup, models=models, left_at=left_at, frozen=True, frozen_because=why), epoch)


def _rank(state: State, name: str) -> tuple[int, int, int]:
    if name in state.models:
        model = state.models[name]
        return model.stamp[0], model.generation.n, model.stamp[1]
    if name in state.removed:
        gone = state.removed[name]
        return gone.stamp[0], gone.n, gone.stamp[1]
    return 0, 0, 0


def _take(known: State, name: str, models: dict[str, ModelState], removed: dict[str, RemovedModel]) -> None:
    models.pop(name, None)
    removed.pop(name, None)
    if name in known.models:
        models[name] = known.models[name]
    else:
        removed[name] = known.removed[name]


def _left(store: State, known: State) -> dict[int, int]:
    epochs = {*store.left_at, *known.left_at}
    return {epoch: max(store.left_at.get(epoch, 0), known.left_at.get(epoch, 0)) for epoch in sorted(epochs)}


def _jobs(store: State, known: State) -> dict[str, Job]:
    """The further of each job; what was finished anywhere stays finished."""
    jobs = {**known.jobs, **store.jobs}
    for identity, job in known.jobs.items():
        if _place(job) > _place(jobs[identity]):
            jobs[identity] = job
    return without_oldest(jobs)


def _held_to_golden(job: Job, models: dict[str, ModelState]) -> Job:
    model = models.get(job.model)
    if job.state is JobState.FINISHED or (model is not None and model.golden_sha256 == job.golden_sha256):
        return job
    why = f"golden {job.golden} of {job.model!r} was replaced or removed while the journal was away"
    return replace(job, state=JobState.FINISHED, outcome="cancelled", report={"reason": why})


def _place(job: Job) -> tuple[bool, int, int]:
    return job.state is JobState.FINISHED, job.attempt, _PROGRESS[job.state]
