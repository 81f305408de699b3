"""Short ways to write the events of a journal, for the tests of fold and stores."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from app.domain import Event, State
from app.store.fold import fold

SHA = "a" * 64
OTHER_SHA = "b" * 64


def deployed(model: str = "m", golden: str = "1", sha256: str = SHA) -> Event:
    return Event("model.deployed", model, golden, data={"golden": golden, "sha256": sha256, "replaces": ""})


def published(version: str, model: str = "m", golden_sha256: str = SHA, job: str = "") -> Event:
    recipe = [{"method": "graph"}]
    data = {"version": version, "parent": "1", "golden_sha256": golden_sha256, "recipe": recipe, "sha256": "c" * 64, "bytes": 7}
    return Event("version.published", model, version, job, data=data)


def desired(version: str, model: str = "m", **data: Any) -> Event:
    return Event("desired.changed", model, version, data={"version": version, "from": "", "reason": "test", **data})


def settings(version: str, value: dict[str, Any] | None, model: str = "m", stood: dict[str, Any] | None = None) -> Event:
    return Event("settings.changed", model, version, data={"version": version, "settings": value, "from": stood, "reason": "test"})


def requested(job: str, model: str = "m", golden_sha256: str = SHA) -> Event:
    data = {"tries": [[{"method": "graph"}], [{"method": "int8"}]], "reason": "test", "promote": "auto", "golden": "1"}
    return Event("job.requested", model, "1", job, "ann", {**data, "golden_sha256": golden_sha256})


def job_event(kind: str, job: str, **data: Any) -> Event:
    return Event(f"job.{kind}", "m", "", job, data=data)


def claimed(job: str, worker: str = "w1", attempt: int = 1) -> Event:
    return job_event("claimed", job, worker=worker, attempt=attempt)


def told(*events: Event, state: State | None = None) -> State:
    """The fold over a story, numbered and dated as a store would."""
    now = state or State()
    for event in events:
        now = fold(now, replace(event, seq=now.seq + 1, at=1000.0 + now.seq + 1))
    return now
