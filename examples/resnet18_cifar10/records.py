"""What is known of each row, kept as JSON between runs, so that rows built and measured one by one make one table. It measures nothing."""

from __future__ import annotations

import fcntl
import json
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from benchmarks.machine import description

if TYPE_CHECKING:
    from examples.resnet18_cifar10.measuring import Bench
    from examples.resnet18_cifar10.service import Built

GOLDEN: Final = "golden"
MOST_RUNS: Final = 40
PARTIAL: Final = frozenset({"--rows", "--stage", "--state"})


@dataclass
class Records:
    """`rows`: name to {"recipe", "outcome", "text", "built_s", "given", "others", "measured": {…} or absent}."""

    path: Path
    rows: dict[str, dict[str, Any]] = field(default_factory=dict)
    runs: list[dict[str, Any]] = field(default_factory=list)

    @classmethod
    def open(cls, path: Path) -> Records:
        """What earlier runs left; empty where there were none."""
        kept = json.loads(path.read_text()) if path.is_file() else {}
        return cls(path, kept.get("rows", {}), kept.get("runs", []))

    def put_build(self, name: str, recipe: str, built: Built, given: str, quiet: dict[str, float]) -> None:
        """A new build replaces what was known of the row."""
        with self._changed():
            self.rows[name] = {
                "recipe": recipe, "file": built.file is not None, "outcome": built.outcome, "text": built.text, "built_s": built.seconds,
                "given": given, "others": quiet.get("others"),
            }  # fmt: skip

    def put_measured(self, name: str, path: Path, bench: Bench) -> None:
        """Measure, unless the very file was measured so before."""
        if (self.rows.get(name, {}).get("measured") or {}).get("key") == bench.key(path):
            return
        measured = {"key": bench.key(path), **asdict(bench.measure(path, name))}
        with self._changed():
            self.rows.setdefault(name, {"recipe": "as deployed", "file": True})["measured"] = measured
            self.runs = [*self.runs[-MOST_RUNS:], description() | {"command": command()}]

    def has_file(self, name: str) -> bool:
        return bool(self.rows.get(name, {}).get("file"))

    @contextmanager
    def _changed(self) -> Iterator[None]:
        """What others wrote meanwhile is kept: one run may build while another measures."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            latest = Records.open(self.path)
            self.rows, self.runs = latest.rows, latest.runs
            yield
            partial = self.path.with_suffix(".partial")
            partial.write_text(json.dumps({"rows": self.rows, "runs": self.runs}, indent=1))
            os.replace(partial, self.path)


def command() -> str:
    """How this run was asked for, but for what it did of the table: the folders are the reader's own."""
    hidden = {"--data": "FOLDER", "--checkpoint": "FILE"}
    started = str(getattr(sys.modules["__main__"].__spec__, "parent", ""))
    program = started if started.startswith("examples.") else "examples.resnet18_cifar10"
    said, words = [f"python -m {program}"], iter(sys.argv[1:])
    for word in words:
        if word in PARTIAL:
            next(words, "")
        elif word != "--docs":
            said += [word, hidden[word]] if word in hidden and next(words, "") else [word]
    return " ".join(said)
