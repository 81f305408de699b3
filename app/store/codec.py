"""State and events as JSON and back, for snapshots, Redis hashes, backups and last-state files.

Fields that are missing get their defaults and unknown ones are passed over, so that neighbouring releases read each other.
It knows nothing of where the text is kept.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import MISSING, asdict, fields
from enum import StrEnum
from typing import Any, TypeVar

from app.domain import JSON, BuiltVersion, Event, Generation, Job, JobState, Mode, ModelState, RemovedModel, RuntimeSettings, State, Verdict

EVENT_LIMIT_BYTES = 4 << 20
E = TypeVar("E", bound=StrEnum)


class Unreadable(ValueError):
    """A stored text does not say what it should; the text names the field."""


def dumps(value: object) -> str:
    """Compact JSON; numbers that are not finite become null, because no reader of JSON agrees on them."""
    try:
        return json.dumps(value, separators=(",", ":"), allow_nan=False)
    except ValueError:
        return json.dumps(_finite(value), separators=(",", ":"), allow_nan=False)


def data_text(event: Event) -> str:
    """The data of an event as it will be stored. Raises ValueError for what is no JSON or too large for a journal."""
    try:
        text = dumps(event.data)
    except (TypeError, RecursionError) as error:
        raise ValueError(f"event {event.kind} of model {event.model!r}: its data is not JSON ({error}); give plain values only") from error
    if len(text) > EVENT_LIMIT_BYTES and not event.kind.startswith("journal."):
        raise ValueError(
            f"event {event.kind} of model {event.model!r} has {len(text)} bytes of data, the limit is {EVENT_LIMIT_BYTES}: "
            "keep the bulk in a file and its path in the event"
        )
    return text


def event_to_json(event: Event) -> JSON:
    return {field.name: getattr(event, field.name) for field in fields(event)}


def event_from_json(value: Any) -> Event:
    given = _mapping(value, "event")
    known = {field.name: given[field.name] for field in fields(Event) if field.name in given}
    if not isinstance(known.get("kind"), str) or not isinstance(known.get("data", {}), dict):
        raise Unreadable(f"an event needs a kind and an object as data, got kind={known.get('kind')!r}")
    return Event(**known)


def settings_to_json(settings: RuntimeSettings) -> JSON:
    return {**asdict(settings), "session_options": [list(pair) for pair in settings.session_options]}


def settings_from_json(value: Any) -> RuntimeSettings:
    """Settings from an event or a file; `session_options` may be an object or a list of pairs."""
    given = _mapping(value, "settings")
    options = given.get("session_options") or ()
    pairs = options.items() if isinstance(options, Mapping) else options
    try:
        known: dict[str, Any] = {"session_options": tuple((str(key), str(setting)) for key, setting in pairs)}
    except (TypeError, ValueError) as error:
        raise Unreadable(f"settings.session_options={options!r}: must be pairs of texts") from error
    for field in fields(RuntimeSettings):
        if field.name == "session_options" or field.name not in given:
            continue
        expected = type(field.default)
        if type(given[field.name]) is not expected:
            raise Unreadable(f"settings.{field.name}={given[field.name]!r}: must be {expected.__name__}")
        known[field.name] = given[field.name]
    return RuntimeSettings(**known)


def state_to_json(state: State) -> JSON:
    return {
        "seq": state.seq,
        "epoch": state.epoch,
        "frozen": state.frozen,
        "frozen_because": state.frozen_because,
        "left_at": {str(epoch): seq for epoch, seq in state.left_at.items()},
        "models": {name: model_to_json(model) for name, model in state.models.items()},
        "jobs": {identity: job_to_json(job) for identity, job in state.jobs.items()},
        "removed": {name: {"n": gone.n, "stamp": list(gone.stamp)} for name, gone in state.removed.items()},
    }


def state_from_json(value: Any) -> State:
    """The state that `state_to_json` wrote. Raises Unreadable."""
    given = _mapping(value, "state")
    try:
        return State(
            seq=int(given["seq"]),
            epoch=int(given["epoch"]),
            frozen=bool(given.get("frozen", False)),
            frozen_because=str(given.get("frozen_because", "")),
            left_at={int(epoch): int(seq) for epoch, seq in _mapping(given.get("left_at", {}), "left_at").items()},
            models={name: model_from_json(model) for name, model in _mapping(given.get("models", {}), "models").items()},
            jobs={identity: job_from_json(job) for identity, job in _mapping(given.get("jobs", {}), "jobs").items()},
            removed={name: removed_from_json(gone) for name, gone in _mapping(given.get("removed", {}), "removed").items()},
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"state: {error!r}") from error


def model_to_json(model: ModelState) -> JSON:
    plain = {field.name: getattr(model, field.name) for field in fields(model)}
    return {
        **plain,
        "generation": [model.generation.epoch, model.generation.n],
        "settings": {version: settings_to_json(settings) for version, settings in model.settings},
        "previous_settings": {version: settings_to_json(settings) for version, settings in model.previous_settings},
        "built": [{**_plain(built), "verdicts": dict(built.verdicts)} for built in model.built],
        "stamp": list(model.stamp),
    }


def model_from_json(value: Any) -> ModelState:
    given = _known(ModelState, value)
    given["generation"] = Generation(*given["generation"])
    given["settings"] = _settings_by_version(given.get("settings", {}))
    given["previous_settings"] = _settings_by_version(given.get("previous_settings", {}))
    given["built"] = tuple(_built_from_json(built) for built in given.get("built", ()))
    given["mode"] = enum_or_none(Mode, given.get("mode"))
    given["stamp"] = _pair(given.get("stamp", (0, 0)))
    return ModelState(**given)


def job_to_json(job: Job) -> JSON:
    return {**_plain(job), "tries": [list(steps) for steps in job.tries], "candidates": list(job.candidates)}


def job_from_json(value: Any) -> Job:
    given = _known(Job, value)
    given["state"] = JobState(given["state"])
    given["tries"] = tuple(tuple(steps) for steps in given["tries"])
    given["candidates"] = tuple(given.get("candidates", ()))
    return Job(**given)


def removed_from_json(value: Any) -> RemovedModel:
    given = _mapping(value, "removed")
    return RemovedModel(int(given["n"]), _pair(given["stamp"]))


def enum_or_none(kind: type[E], value: Any) -> E | None:
    return kind(value) if isinstance(value, str) and value in set(kind) else None


def _built_from_json(value: Any) -> BuiltVersion:
    given = _known(BuiltVersion, value)
    verdicts = _mapping(given.get("verdicts", {}), "verdicts")
    given["recipe"] = tuple(given["recipe"])
    given["verdicts"] = tuple((host_class, Verdict(verdict)) for host_class, verdict in verdicts.items())
    return BuiltVersion(**given)


def _settings_by_version(value: Any) -> tuple[tuple[str, RuntimeSettings], ...]:
    return tuple((version, settings_from_json(settings)) for version, settings in _mapping(value, "settings").items())


def _plain(record: BuiltVersion | Job) -> JSON:
    return {field.name: getattr(record, field.name) for field in fields(record)}


def _known(kind: type[ModelState] | type[Job] | type[BuiltVersion], value: Any) -> dict[str, Any]:
    given = _mapping(value, kind.__name__)
    needed = [field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING]
    missing = [name for name in needed if name not in given]
    if missing:
        raise Unreadable(f"{kind.__name__} lacks {', '.join(missing)}")
    return {field.name: given[field.name] for field in fields(kind) if field.name in given}


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise Unreadable(f"{what} must be an object, got {type(value).__name__}")
    return value


def _pair(value: Any) -> tuple[int, int]:
    first, second = value
    return int(first), int(second)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value
