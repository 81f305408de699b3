"""Results that add up over runs and machines: a line of JSON each, with where and when it was measured. `benchmarks/results/` holds those that are published.

An experiment of hours may be cut and gone on with, also elsewhere; the head of its table names all hosts that it ran on.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks import machine

_PLACE: Final = ("date", "cpu", "cores", "host_class")


class Kept:
    """The lines of a file, and those that come; of this process alone where `path` is None."""

    def __init__(self, path: Path | None) -> None:
        self._path = path
        self._lines: list[dict[str, Any]] = []
        if path is not None and path.exists():
            self._lines = [json.loads(line) for line in path.read_text().splitlines()]

    def of(self, what: str) -> list[dict[str, Any]]:
        return [line for line in self._lines if line["what"] == what]

    def add(self, what: str, result: Mapping[str, Any]) -> dict[str, Any]:
        """Keep one result, and say where it is from; its line comes back."""
        about = machine.description()
        line = {"what": what, **result, "on": {key: about[key] for key in _PLACE}}
        self._lines.append(line)
        if self._path is not None:
            self._path.parent.mkdir(parents=True, exist_ok=True)
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")
        return line


def head(lines: Sequence[Mapping[str, Any]], command: str) -> str:
    """The head of a table of `lines`: from when to when, on which hosts (how many lines each), by which command."""
    places = [line["on"] for line in lines]
    hosts = Counter(f"{place['cpu']}, {place['cores']} cores, host class `{place['host_class']}`" for place in places)
    dates = sorted(place["date"] for place in places)
    when = dates[0] if dates[0] == dates[-1] else f"{dates[0]} to {dates[-1]}"
    named = [host if len(hosts) == 1 else f"{host} ({count} of {len(places)})" for host, count in hosts.most_common()]
    return " · ".join([when, *named, f"`{command}`"])
