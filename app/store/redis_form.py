"""How a state lies in Redis' hashes and an event in its stream, and what its INFO gives cause to warn of. Pure; no driver."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from app.domain import JSON, Event, ModelState, State
from app.store.codec import Unreadable, dumps, event_from_json, job_from_json, loads, model_from_json, state_from_json


def change(before: State, after: State) -> JSON:
    """Which hashes must be written to go from one state to the other."""
    return {
        "whole": False,
        "models": {name: _fields_of(model) for name, model in after.models.items() if model is not before.models.get(name)},
        "gone": [name for name in before.models if name not in after.models],
        "jobs": {identity: dumps(job) for identity, job in after.jobs.items() if job is not before.jobs.get(identity)},
        "forgotten": [identity for identity in before.jobs if identity not in after.jobs],
    }


def state_of(rest: str, models: Sequence[str], jobs: Sequence[str]) -> State:
    """The state that lies in the hashes. Raises Unreadable."""
    try:
        state = state_from_json(loads(rest)) if rest else State()
        found = [model_from_json(loads(text)) for text in models]
        asked = sorted((job_from_json(loads(text)) for text in jobs), key=lambda job: (job.requested_at, job.id))
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(str(error)) from error
    return replace(state, models={model.name: model for model in found}, jobs={job.id: job for job in asked})


def uid_of(entry: list[Any]) -> str:
    """Of an entry of the stream as a script returns it: [id, [name, value, …]]."""
    return _values(entry)["uid"]


def event_of(entry: list[Any]) -> Event:
    return event_from_json(loads(_values(entry)["event"]))


def warnings(info: JSON) -> list[str]:
    found = []
    policy = str(info.get("maxmemory_policy", "noeviction"))
    if policy != "noeviction" and int(info.get("maxmemory", 0)) > 0:
        found.append(f"maxmemory-policy is {policy}: it may evict the journal or its leases; set it to noeviction")
    if info.get("role") != "master":
        found.append("it is a replica: reading works, every change is refused; point HONE_STORE at the primary")
    if not int(info.get("aof_enabled", 0)):
        found.append("appendonly is off: decisions of the last minutes are lost when it restarts; set appendonly to yes")
    return found


def _fields_of(model: ModelState) -> dict[str, str]:
    """`state` is what Hone reads, the others are for people with redis-cli."""
    return {
        "golden": model.golden,
        "desired": model.desired,
        "previous": model.previous,
        "generation": f"{model.generation.epoch}.{model.generation.n}",
        "state": dumps(model),
    }


def _values(entry: list[Any]) -> dict[str, str]:
    flat = entry[1]
    return dict(zip(flat[::2], flat[1::2], strict=True))
