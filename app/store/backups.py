"""A backup of a journal as one text file that either store can restore: a header with the state, then one event a line.

It knows nothing of SQLite or Redis. Cards and weights are files of their own and not in it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.domain import Event, State
from app.errors import InvalidRequest
from app.store.codec import Unreadable, dumps, event_from_json, loads, state_from_json
from app.store.durable import write_durably

FORMAT: Final = 1


@dataclass(frozen=True, slots=True)
class Backup:
    state: State
    events: tuple[Event, ...]


def write(path: Path, state: State, events: Iterable[Event]) -> None:
    """Raises OSError and then leaves no half-written file."""
    write_durably(path, _lines(state, events))


def read(path: Path) -> Backup:
    """Raises InvalidRequest for what is no whole backup."""
    try:
        with open(path, encoding="utf-8") as file:
            header = loads(next(file, ""))
            if header.get("hone_backup") != FORMAT:
                raise Unreadable(f"its format is {header.get('hone_backup')!r}, this version reads {FORMAT}")
            return Backup(state_from_json(header["state"]), tuple(_events(file)))
    except OSError as error:
        raise InvalidRequest(f"cannot read the backup {path}: {error.strerror or error}") from error
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InvalidRequest(f"{path} is not a whole backup ({error}); make one with: hone backup FILE") from error


def _events(lines: Iterable[str]) -> Iterator[Event]:
    for count, line in enumerate(lines):
        value = loads(line)
        if "end" in value:
            if value["end"] != count:
                raise Unreadable(f"it has {count} events instead of {value['end']}")
            return
        yield event_from_json(value)
    raise Unreadable("it ends too early")


def _lines(state: State, events: Iterable[Event]) -> Iterator[str]:
    yield dumps({"hone_backup": FORMAT, "state": state}) + "\n"
    count = 0
    for event in events:
        count += 1
        yield dumps(event) + "\n"
    yield dumps({"end": count}) + "\n"
