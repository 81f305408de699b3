"""State and events as JSON and back, for snapshots, Redis hashes, backups and last-state files.

Writing is orjson's own form of our dataclasses. Reading gives missing fields their defaults and passes over unknown ones, so
that neighbouring releases read each other. It knows nothing of where the text is kept.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import MISSING, fields
from enum import StrEnum
from typing import Any, Final, TypeVar

import orjson

from app.domain import (
    BuiltVersion,
    Event,
    Generation,
    Job,
    JobState,
    Mode,
    ModelState,
    RemovedModel,
    RuntimeSettings,
    Split,
    State,
    Verdict,
)
from app.errors import InvalidRequest

EVENT_LIMIT_BYTES: Final = 4 << 20
E = TypeVar("E", bound=StrEnum)
R = TypeVar("R", BuiltVersion, Event, Job, ModelState)


class Unreadable(ValueError):
    """A stored text does not say what it should; the text names the field."""


def dumps(value: object) -> str:
    """Compact JSON of plain values and of our dataclasses. What is not finite becomes null: no two readers of JSON agree on it."""
    return orjson.dumps(value, option=orjson.OPT_NON_STR_KEYS).decode()


def loads(text: str | bytes) -> Any:
    """Raises Unreadable."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError as error:
        raise Unreadable(f"not JSON: {error}") from error


class Unstorable(InvalidRequest, ValueError):
    """An event's data is no JSON, or too large for a journal; where a caller gave it, it is the caller's to mend."""


def data_text(event: Event) -> str:
    """The data of an event as it will be stored. Raises Unstorable."""
    try:
        text = dumps(event.data)
    except TypeError as error:
        raise Unstorable(f"event {event.kind} of model {event.model!r}: its data is not JSON ({error}); give plain values only") from error
    if len(text) > EVENT_LIMIT_BYTES and not event.kind.startswith("journal."):
        raise Unstorable(
            f"event {event.kind} of model {event.model!r} has {len(text)} characters of data, the limit is {EVENT_LIMIT_BYTES}: "
            "keep the bulk in a file and its path in the event"
        )
    return text


def event_from_json(value: Any) -> Event:
    given = _known(Event, value)
    if not isinstance(given["kind"], str) or not isinstance(given.get("data", {}), dict):
        raise Unreadable(f"an event needs a kind and an object as data, got kind={given['kind']!r}")
    return Event(**given)


def settings_from_json(value: Any) -> RuntimeSettings:
    """Settings from an event or a file; `session_options` may be an object or a list of pairs."""
    given = _mapping(value, "settings")
    known: dict[str, Any] = {"session_options": _session_options(given.get("session_options") or ())}
    for name, expected in _SETTINGS.items():
        if name in given and type(given[name]) is not expected:
            raise Unreadable(f"settings.{name}={given[name]!r}: must be {expected.__name__}")
        if name in given:
            known[name] = given[name]
    return RuntimeSettings(**known)


def state_from_json(value: Any) -> State:
    """The state that `dumps` wrote. Raises Unreadable."""
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
            removed={name: _removed(gone) for name, gone in _mapping(given.get("removed", {}), "removed").items()},
            last=str(given.get("last", "")),
        )
    except (KeyError, TypeError, ValueError) as error:
        raise Unreadable(f"state: {error!r}") from error


def model_from_json(value: Any) -> ModelState:
    given = _known(ModelState, value)
    given["generation"] = Generation(int(given["generation"]["epoch"]), int(given["generation"]["n"]))
    given["settings"] = _settings_by_version(given.get("settings", ()))
    given["previous_settings"] = _settings_by_version(given.get("previous_settings", ()))
    given["built"] = tuple(_built(built) for built in given.get("built", ()))
    given["mode"] = enum_or_none(Mode, given.get("mode"))
    given["stamp"] = _stamp(given.get("stamp", (0, 0)))
    given["split"] = _split(given.get("split"))
    given["left"] = tuple(str(version) for version in given.get("left", ()))
    given["rungs"] = tuple(str(version) for version in given.get("rungs", ()))
    return ModelState(**given)


def job_from_json(value: Any) -> Job:
    given = _known(Job, value)
    given["state"] = JobState(given["state"])
    given["tries"] = tuple([tuple(steps) for steps in given["tries"]])
    given["candidates"] = tuple(given.get("candidates", ()))
    return Job(**given)


def enum_or_none(kind: type[E], value: Any) -> E | None:
    return kind(value) if isinstance(value, str) and value in set(kind) else None


def _built(value: Any) -> BuiltVersion:
    given = _known(BuiltVersion, value)
    given["recipe"] = tuple(given["recipe"])
    given["verdicts"] = tuple([(host_class, Verdict(verdict)) for host_class, verdict in given.get("verdicts", ())])
    return BuiltVersion(**given)


def _split(value: Any) -> Split | None:
    if value is None:
        return None
    given = _mapping(value, "split")
    return Split(str(given["version"]), float(given["share"]), str(given["stage"]), float(given.get("since", 0.0)))


def _removed(value: Any) -> RemovedModel:
    given = _mapping(value, "removed")
    return RemovedModel(int(given["n"]), _stamp(given["stamp"]))


def _settings_by_version(value: Any) -> tuple[tuple[str, RuntimeSettings], ...]:
    return tuple((str(version), settings_from_json(settings)) for version, settings in value)


def _session_options(options: Any) -> tuple[tuple[str, str], ...]:
    pairs = options.items() if isinstance(options, Mapping) else options
    try:
        return tuple((str(name), str(setting)) for name, setting in pairs)
    except (TypeError, ValueError) as error:
        raise Unreadable(f"settings.session_options={options!r}: must be pairs of texts") from error


def _known(kind: type[R], value: Any) -> dict[str, Any]:
    given = _mapping(value, kind.__name__)
    missing = [name for name in _NEEDED[kind] if name not in given]
    if missing:
        raise Unreadable(f"{kind.__name__} lacks {', '.join(missing)}")
    return {name: given[name] for name in _FIELDS[kind] if name in given}


def _mapping(value: Any, what: str) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise Unreadable(f"{what} must be an object, got {type(value).__name__}")
    return value


def _stamp(value: Any) -> tuple[int, int]:
    epoch, seq = value
    return int(epoch), int(seq)


_RECORDS: Final[tuple[type[Any], ...]] = (BuiltVersion, Event, Job, ModelState)
_FIELDS: Final = {kind: tuple(field.name for field in fields(kind)) for kind in _RECORDS}
_NEEDED: Final = {
    kind: tuple(field.name for field in fields(kind) if field.default is MISSING and field.default_factory is MISSING) for kind in _RECORDS
}
_SETTINGS: Final = {field.name: type(field.default) for field in fields(RuntimeSettings) if field.name != "session_options"}
