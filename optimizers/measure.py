"""Paired measurement: two or more arms take turns, so that what the machine does to one it does to the other.

Each arm is a session in a fresh process (`optimizers.arm`). CPU time beside wall time, and how long threads waited for a core: on a busy
host only CPU time of one quiet thread compares models (shared facts, noise). It judges nothing.
"""

from __future__ import annotations

import contextlib
import math
import os
import select
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from multiprocessing.connection import Connection
from multiprocessing.reduction import send_handle
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Final, Self

import numpy as np

from optimizers.arm import Load, Opened, Slice, scheduling
from optimizers.cores import quietest_core, stolen_s
from optimizers.running import brief
from optimizers.session import Feeds, Settings
from optimizers.stats import Interval, hodges_lehmann, trimmed_mean
from optimizers.torch_module import TorchSource

SLICE_S: Final = 0.012
"""Aimed length of one arm's turn: long enough to be warm, short enough that both arms meet the same machine."""
LOOKS: Final = (12, 24, 48)
"""Rounds after which the interval is looked at. Three looks at 98.33 % are together at least 95 % (Bonferroni)."""
LOOK_CONFIDENCE: Final = 1 - 0.05 / len(LOOKS)
LEAST_ROUNDS: Final = 8
"""Below this the signed-rank interval does not exist at the confidence of a look."""
SLOW_S: Final = 0.05
"""A call that takes this long is a turn by itself: what it fetches back into the cache is little beside it."""
LOUD: Final = 0.95
"""Share of time spent waiting for a core above which even CPU time is not believed."""
QUIET: Final = 0.25
"""Share of time spent waiting for a core above which wall time, and with it capacity, is not believed."""
_ROOT: Final = Path(__file__).resolve().parent.parent


class ArmFailed(Exception):
    """An arm could not do what it was told. `how` is error (the runtime refused), died or hung; `path` is the model it ran."""

    def __init__(self, how: str, path: Path, text: str) -> None:
        super().__init__(f"{path.name}: {text}")
        self.how, self.path = how, path


@dataclass(frozen=True)
class Quietness:
    """How far the host left the measurement alone: shares of the time in which threads waited for a core, and in which the core was stolen."""

    waiting_ratio: float
    steal_ratio: float

    @property
    def label(self) -> str:
        return "quiet" if self.waiting_ratio <= 0.05 else "busy" if self.waiting_ratio <= QUIET else "loud"

    @property
    def wall_counts(self) -> bool:
        return self.waiting_ratio <= QUIET and self.steal_ratio <= QUIET

    @property
    def cpu_counts(self) -> bool:
        return self.waiting_ratio <= LOUD and self.steal_ratio <= QUIET

    def to_json(self) -> dict[str, Any]:
        return {"label": self.label, "waiting_ratio": round(self.waiting_ratio, 4), "steal_ratio": round(self.steal_ratio, 4)}


class _Forked:
    """A process that another arm's forked, which alone may ask how it ended."""

    def __init__(self, pid: int) -> None:
        self.pid, self._fd = pid, os.pidfd_open(pid)

    def kill(self) -> None:
        with contextlib.suppress(ProcessLookupError):
            signal.pidfd_send_signal(self._fd, signal.SIGKILL)

    def wait(self, timeout: float | None = None) -> None:
        """Until it ended, or not longer than `timeout`."""
        select.select([self._fd], [], [], timeout)

    def __del__(self) -> None:
        os.close(self._fd)


_Place = tuple["subprocess.Popen[bytes] | _Forked", Connection, IO[bytes]]
"""Where an arm lives: its process, the pipe to it, and what it writes to stderr."""


def _started() -> _Place:
    errors = tempfile.TemporaryFile()  # noqa: SIM115  the arm closes it
    ours, theirs = socket.socketpair()
    bootstrap = f"import sys; sys.path.append({str(_ROOT)!r}); from optimizers.arm import main; main()"
    environment = {k: v for k, v in os.environ.items() if k != "ORT_INTRA_OP_NUM_THREADS"}
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", bootstrap, str(theirs.fileno())],
            pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, env=environment,
        )  # fmt: skip
    return process, Connection(ours.detach()), errors


class Arm:
    """The parent's side of one arm: an ONNX file, or with `source` a .safetensors file. A context manager; leaving it ends the process.

    With `opens=False` it waits for `open`.
    Hung is: no CPU progress for `idle_s` while not waiting for a core either, or no answer to one request within `longest_s`.
    """

    def __init__(
        self, path: str | Path, settings: Settings, idle_s: float = 30.0, longest_s: float = 600.0, source: TorchSource | None = None,
        opens: bool = True, place: _Place | None = None,
    ) -> None:  # fmt: skip
        self.path, self.settings, self.idle_s, self.longest_s, self.source = Path(path), settings, idle_s, longest_s, source
        self._process, self._connection, self._errors = place or _started()
        self._keys: dict[int, Feeds] = {}
        if opens:
            self.open()

    def open(self) -> Self:
        """Raises ArmFailed with what went wrong; its process is ended then."""
        try:
            self.opened: Opened = self.ask("open", str(self.path), self.settings, self.source)
        except ArmFailed:
            self.close()
            raise
        return self

    def twin(self, path: str | Path, source: TorchSource) -> Arm:
        """An arm that opens nothing yet, in a process forked from this one's, which opened nothing either: torch, which takes seconds to import,
        is imported once for both. It ends when this one does. Raises ArmFailed.
        """
        ours, theirs = socket.socketpair()
        with theirs, contextlib.suppress(ConnectionError):  # whoever died does not answer either, and that is told
            self._connection.send(("twin", ()))
            send_handle(self._connection, theirs.fileno(), self._process.pid)
        connection = Connection(ours.detach())
        try:
            process = _Forked(self._answer("twin"))
        except ArmFailed:
            connection.close()
            raise
        place = (process, connection, os.fdopen(os.dup(self._errors.fileno()), "r+b"))
        return Arm(path, self.settings, self.idle_s, self.longest_s, source, False, place)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        self._process.kill()
        self._process.wait()
        self._connection.close()
        self._errors.close()

    def ask(self, name: str, *arguments: Any) -> Any:
        """Have the arm do one thing. Raises ArmFailed with what went wrong."""
        with contextlib.suppress(ConnectionError):
            self._connection.send((name, arguments))
        return self._answer(name)

    def _answer(self, name: str) -> Any:
        try:
            self._await_answer(name)
            well, answer = self._connection.recv()
        except (EOFError, ConnectionError):
            raise ArmFailed("died", self.path, f"{self._obituary()} during '{name}'") from None
        if not well:
            raise ArmFailed("error", self.path, brief(answer))
        return answer

    def _await_answer(self, name: str) -> None:
        """Returns when there is something to read, or raises."""
        began = moved = time.monotonic()
        account = scheduling(self._process.pid)
        while not self._connection.poll(min(1.0, self.idle_s)):
            now, latest = time.monotonic(), scheduling(self._process.pid)
            if latest != account:
                account, moved = latest, now
            if now - moved > self.idle_s:
                raise ArmFailed("hung", self.path, f"no answer to '{name}', and no CPU time used for {self.idle_s:.0f} s")
            if now - began > self.longest_s:
                raise ArmFailed("hung", self.path, f"no answer to '{name}' within {self.longest_s:.0f} s")

    def call(self, feeds: Feeds) -> list[Any]:
        """The outputs of one call, in the order of `opened.outputs`."""
        return list(self.ask("call", [feeds])[0])

    def calls(self, batches: Sequence[Feeds]) -> list[list[Any]]:
        return list(self.ask("call", list(batches)))

    def reopen(self) -> None:
        """A new session of the same file in the same process; its memory lies elsewhere."""
        self.opened = self.ask("open", str(self.path), self.settings, self.source)

    def keep(self, feeds: Feeds) -> int:
        """Send inputs for timing once; the key stands for them from then on."""
        for key, kept in self._keys.items():
            if kept is feeds:
                return key
        key = len(self._keys)
        self.ask("keep", key, feeds)
        self._keys[key] = feeds
        return key

    def pin(self, cpus: Sequence[int]) -> None:
        self.ask("pin", tuple(cpus))

    def spread(self, cpus: Sequence[int]) -> None:
        """Each thread of a call on a core of its own, where there are as many; `pin` undoes it."""
        self.ask("spread", tuple(cpus))

    def time(self, key: int, calls: int, warm: int = 1, pause_s: float = 0.0) -> Slice:
        return self.ask("time", key, calls, warm, pause_s)  # type: ignore[no-any-return]

    def saturate(self, key: int, seconds: float) -> Load:
        return self.ask("saturate", key, seconds)  # type: ignore[no-any-return]

    def _obituary(self) -> str:
        try:
            code = self._process.wait(timeout=5)
        except subprocess.TimeoutExpired:
            return "its process closed the pipe"
        self._errors.seek(0)
        said = " ".join(self._errors.read()[-500:].decode(errors="replace").split())
        if code is None:
            return "its process ended" + (f" ({said})" if said else "")
        ended = f"its process was ended by {signal.Signals(-code).name}" if code < 0 else f"its process ended with status {code}"
        return f"{ended} ({said})" if said else ended


@dataclass
class Series:
    """What one arm took over all its turns. Seconds per call."""

    wall_s: list[float] = field(default_factory=list)
    cpu_s: list[float] = field(default_factory=list)
    elapsed_s: float = 0.0
    ran_s: float = 0.0
    waited_s: float = 0.0

    def add(self, piece: Slice) -> None:
        self.wall_s.extend(piece.wall_s)
        self.cpu_s.extend(piece.cpu_s)
        self.elapsed_s += piece.elapsed_s
        self.ran_s += piece.ran_s
        self.waited_s += piece.waited_s

    def to_json(self) -> dict[str, Any]:
        p50, p95 = np.quantile(self.wall_s, [0.5, 0.95])
        return {"calls": len(self.wall_s), "cpu_s": trimmed_mean(self.cpu_s), "wall_p50_s": float(p50), "wall_p95_s": float(p95)}


@dataclass(frozen=True)
class Comparison:
    """The other arm relative to the first: ratios of time per call, below 1 where the other is faster.

    `instructions` is the ratio of those retired, None where they are not counted: it knows neither neighbours nor placements.
    """

    batch: int
    cpu: Interval
    wall: Interval
    rounds: int
    first: Series
    other: Series
    quiet: Quietness
    instructions: Interval | None = None

    def to_json(self) -> dict[str, Any]:
        return {
            "batch": self.batch, "rounds": self.rounds, "cpu_ratio": interval_json(self.cpu), "wall_ratio": interval_json(self.wall),
            "instructions_ratio": self.instructions and interval_json(self.instructions),
            "incumbent": self.first.to_json(), "candidate": self.other.to_json(), "quiet": self.quiet.to_json(),
        }  # fmt: skip


def interval_json(interval: Interval) -> dict[str, float | None]:
    """JSON has no infinity: a bound that the data cannot give is null."""
    low, high = (value if np.isfinite(value) else None for value in (interval.low, interval.high))
    return {"estimate": interval.estimate, "low": low, "high": high}


def narrow(ratio: Interval) -> bool:
    """Stop when the interval of a ratio lies within ± 1.5 % of it."""
    return ratio.high - ratio.low <= 0.03 * ratio.estimate


def compare(
    first: Arm,
    other: Arm,
    feeds: Feeds | Sequence[Feeds],
    batch: int = 1,
    *,
    other_feeds: Feeds | Sequence[Feeds] | None = None,
    seconds: float = 20.0,
    longest: float | None = None,
    decided: Callable[[Interval], bool] = narrow,
    most: int = LOOKS[-1],
    tick: Callable[[], None] = lambda: None,
) -> Comparison:
    """Time both arms on the same inputs in ABBA, BAAB, … order, both on one core, until `decided` by the CPU ratio or after `seconds`.

    Where those gave too few rounds for an interval it goes on until there are enough, for `longest` seconds at most (None: twice `seconds`).
    Each round gives one log ratio, from which a linear drift has cancelled; the ratio is their Hodges–Lehmann estimate.
    The first call of each turn is not counted (unless calls are slow): it fetches the weights back into the cache that the other arm has used.
    Of several inputs each round takes the next, `most` rounds at most. With `other_feeds` the sides differ in their inputs, and both may be the
    same arm.
    """
    core = [quietest_core()]
    arms, series = (first, other), (Series(), Series())
    keys = [_kept(first, feeds), _kept(other, feeds if other_feeds is None else other_feeds)]
    for arm in arms:
        arm.pin(core)
    counts = [_calls_for(arm.time(kept[0], 3, 2), SLICE_S) for arm, kept in zip(arms, keys, strict=True)]
    began, stolen = time.monotonic(), stolen_s()
    logs: list[tuple[float, ...]] = []
    for rounds in range(1, most + 1):
        turns: tuple[list[tuple[float, ...]], list[tuple[float, ...]]] = ([], [])
        for which in (0, 1, 1, 0) if rounds % 2 else (1, 0, 0, 1):
            piece = arms[which].time(keys[which][rounds % len(keys[which])], counts[which], 1 if counts[which] > 1 else 0)
            series[which].add(piece)
            counted = trimmed_mean(piece.instructions) if piece.instructions else math.nan
            turns[which].append((trimmed_mean(piece.cpu_s), trimmed_mean(piece.wall_s), counted))
        logs.append(_log_ratios(turns))
        tick()
        spent = time.monotonic() - began
        late = spent > seconds and (rounds >= LEAST_ROUNDS or spent > (2 * seconds if longest is None else longest))
        if late or (rounds in LOOKS and decided(_ratio(logs, 0))):
            break
    elapsed = time.monotonic() - began
    quiet = quietness(series[0].ran_s + series[1].ran_s, series[0].waited_s + series[1].waited_s, stolen_s() - stolen, elapsed)
    instructions = None if any(math.isnan(each[2]) for each in logs) else _ratio(logs, 2)
    return Comparison(batch, _ratio(logs, 0), _ratio(logs, 1), len(logs), series[0], series[1], quiet, instructions)


def _kept(arm: Arm, feeds: Feeds | Sequence[Feeds]) -> list[int]:
    return [arm.keep(each) for each in ([feeds] if isinstance(feeds, dict) else feeds)]


def quietness(ran_s: float, waited_s: float, stolen: float, elapsed_s: float) -> Quietness:
    share = waited_s / (ran_s + waited_s) if ran_s + waited_s > 0 else 0.0
    return Quietness(share, min(1.0, stolen / elapsed_s / max(1, os.cpu_count() or 1)) if elapsed_s > 0 else 0.0)


def _calls_for(piece: Slice, seconds: float) -> int:
    call_s = min(piece.cpu_s)
    return 1 if call_s > SLOW_S else max(2, min(1000, round(seconds / max(1e-6, call_s))))


def _log_ratios(turns: tuple[list[tuple[float, ...]], list[tuple[float, ...]]]) -> tuple[float, ...]:
    """Mean log ratios of one round: CPU time, wall time, instructions (NaN: not counted). A clock that did not move counts as a microsecond."""
    logs = np.log(np.maximum(np.asarray(turns), 1e-6)).mean(axis=1)
    return tuple(float(ratio) for ratio in logs[1] - logs[0])


def _ratio(logs: Sequence[tuple[float, ...]], which: int) -> Interval:
    return hodges_lehmann([ratios[which] for ratios in logs], LOOK_CONFIDENCE).exp()
