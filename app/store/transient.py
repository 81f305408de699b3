"""Lets a fold of many events update its maps in place instead of copying them each time; outside it, states stay immutable.

Only `fold_all` makes such maps, from copies of its own, and it hands out plain ones.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TypeVar

from app.domain import Job, ModelState, State

V = TypeVar("V")


class Scratch(dict[str, V]):
    """A map that only one running fold holds."""


def put(entries: dict[str, V], key: str, value: V) -> dict[str, V]:
    if isinstance(entries, Scratch):
        entries[key] = value
        return entries
    return {**entries, key: value}


def drop(entries: dict[str, V], key: str) -> dict[str, V]:
    if isinstance(entries, Scratch):
        entries.pop(key, None)
        return entries
    return {name: value for name, value in entries.items() if name != key}


def with_model(state: State, model: ModelState) -> State:
    models = put(state.models, model.name, model)
    return state if models is state.models else replace(state, models=models)


def with_job(state: State, job: Job) -> State:
    jobs = put(state.jobs, job.id, job)
    return state if jobs is state.jobs else replace(state, jobs=jobs)


def opened(state: State) -> State:
    return replace(state, models=Scratch(state.models), jobs=Scratch(state.jobs))


def closed(state: State) -> State:
    return replace(state, models=dict(state.models), jobs=dict(state.jobs))
