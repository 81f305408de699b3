"""Which events there are and what each must carry: checked when one is appended, so that a journal holds what a fold can read.

Unknown kinds are welcome (a neighbouring release may write them); a known kind without what it needs is not.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Final

from app.domain import Event, Mode, Verdict
from app.store.codec import Unreadable, settings_from_json, state_from_json

SCHEMA: Final = 1
"""Events of a later schema are kept and ignored."""

Check = Callable[[Event], str]


def version_of(event: Event) -> str:
    """The version that an event is about; its data may name it as well."""
    named = event.data.get("version") or event.version
    return named if isinstance(named, str) else ""


def problem(event: Event) -> str:
    """What is wrong with an event of a known kind; '' where nothing is."""
    for check in _CHECKS.get(event.kind, ()):
        wrong = check(event)
        if wrong:
            return f"event {event.kind}: {wrong}"
    return ""


def checked(event: Event) -> Event:
    """The event itself. Raises ValueError for one that no fold could read."""
    if not event.kind or not isinstance(event.data, dict):
        raise ValueError(f"an event needs a kind and an object as data, got kind={event.kind!r}, data={type(event.data).__name__}")
    wrong = problem(event)
    if wrong:
        raise ValueError(wrong)
    return event


def _model(event: Event) -> str:
    return "" if event.model else "needs the name of its model"


def _version(event: Event) -> str:
    return "" if version_of(event) else "needs its version"


def _job(event: Event) -> str:
    return "" if event.job else "needs the id of its job"


def _text(*names: str) -> Check:
    def check(event: Event) -> str:
        for name in names:
            if not isinstance(event.data.get(name), str):
                return f"data.{name}={event.data.get(name)!r}: must be a text"
        return ""

    return check


def _texts(name: str) -> Check:
    def check(event: Event) -> str:
        values = event.data.get(name, [])
        if isinstance(values, (list, tuple)) and all(isinstance(value, str) for value in values):
            return ""
        return f"data.{name}={values!r}: must be a list of texts"

    return check


def _count(name: str, least: int, needed: bool = True) -> Check:
    def check(event: Event) -> str:
        value = event.data.get(name)
        if value is None and not needed:
            return ""
        if type(value) is int and value >= least:
            return ""
        return f"data.{name}={value!r}: must be a whole number of at least {least}"

    return check


def _settings(name: str, needed: bool) -> Check:
    def check(event: Event) -> str:
        if event.data.get(name) is None:
            return f"needs data.{name}; null goes back to the settings of the proof" if needed and name not in event.data else ""
        try:
            settings_from_json(event.data[name])
        except Unreadable as error:
            return str(error)
        return ""

    return check


def _one_of(name: str, allowed: set[str], optional: bool = False) -> Check:
    def check(event: Event) -> str:
        value: Any = event.data.get(name)
        if (value is None and optional) or (isinstance(value, str) and value in allowed):
            return ""
        return f"data.{name}={value!r}: must be one of {', '.join(sorted(allowed))}"

    return check


def _share(name: str) -> Check:
    def check(event: Event) -> str:
        value = event.data.get(name)
        if isinstance(value, (int, float)) and not isinstance(value, bool) and 0 <= value < 1:
            return ""
        return f"data.{name}={value!r}: must be a share, at least 0 and below 1"

    return check


def _rank(event: Event) -> str:
    value = event.data.get("rank", 0.0)
    if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < math.inf:
        return ""
    return f"data.rank={value!r}: must be a number of at least 0"


def _steps(name: str, depth: int) -> Check:
    def check(event: Event) -> str:
        return "" if _nested(event.data.get(name), depth) else f"data.{name}: must be {'lists of ' * depth}steps, each an object"

    return check


def _nested(value: Any, depth: int) -> bool:
    if depth == 0:
        return isinstance(value, dict)
    return isinstance(value, (list, tuple)) and all(_nested(item, depth - 1) for item in value)


def _state(event: Event) -> str:
    try:
        state_from_json(event.data.get("state"))
    except Unreadable as error:
        return f"data.{error}"
    return ""


def _report(event: Event) -> str:
    report = event.data.get("report", {})
    return "" if isinstance(report, dict) else f"data.report is {type(report).__name__}: must be an object"


_ATTEMPT = _count("attempt", 1, needed=False)

_CHECKS: Final[dict[str, tuple[Check, ...]]] = {
    "model.deployed": (_model, _text("golden", "sha256")),
    "model.removed": (_model,),
    "model.loaded": (_model,),
    "model.unloaded": (_model,),
    "version.published": (
        _model,
        _version,
        _text("parent", "golden_sha256", "sha256"),
        _steps("recipe", 1),
        _count("bytes", 0, needed=False),
    ),
    "version.removed": (_model, _version),
    "version.verified": (_model, _version, _text("host_class"), _one_of("verdict", set(Verdict))),
    "desired.changed": (_model, _version, _settings("settings", needed=False)),
    "settings.changed": (_model, _version, _settings("settings", needed=True), _settings("from", needed=False)),
    "traffic.split": (_model, _text("version", "stage"), _share("share")),
    "ladder.set": (_model, _texts("rungs")),
    "mode.changed": (_model, _one_of("mode", set(Mode), optional=True)),
    "job.requested": (_model, _job, _text("golden", "golden_sha256"), _steps("tries", 2), _rank),
    "job.claimed": (_job, _text("worker"), _count("attempt", 1)),
    "job.built": (_job, _texts("candidates"), _ATTEMPT),
    "job.verifying": (_job, _ATTEMPT, _count("judging", 1, needed=False)),
    "job.cancel_asked": (_job,),
    "job.finished": (_job, _text("outcome"), _report, _ATTEMPT),
    "journal.recovered": (_state,),
    "journal.restored": (_state,),
}
