"""What a journal must do, whoever keeps it. State is a fold (app.store.fold); this knows nothing of serving or HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

from app.domain import JSON, Event, Generation, State
from app.errors import HoneError


class Journal(Protocol):
    """Append-only events, leases and a disposable board. Methods block (call them off the event loop) and are thread-safe.

    All raise `StoreUnavailable` when the store is away; nothing is half written. `StoreWentBack`, a kind of it, says that the
    store answers but has lost what this process saw: change pauses until somebody calls `recover` with the last known state.
    """

    def append(self, event: Event, expect: Generation | None = None) -> Event:
        """Store `event`, giving it seq and time. With `expect`, raise Conflict unless the model's generation is still that."""

    def read(self, after: int = 0, limit: int = 1000, model: str = "", newest_first: bool = False) -> Sequence[Event]: ...

    def state(self) -> State:
        """The fold over all events; incremental, so calling it often is cheap."""

    def wait(self, after: int, timeout_s: float) -> bool:
        """Block until an event later than `after` exists or the time is over; True if one does."""

    def recover(self, known: State) -> State:
        """Put back what `known` (or what this journal saw itself, if later) has and the store lost: one event, epoch + 1, loop frozen.

        Nothing is done where nothing is lost.
        """

    def acquire(self, lease: str, holder: str, ttl_s: float) -> bool:
        """Take or renew a lease by name; False while another holder's is alive."""

    def release(self, lease: str, holder: str) -> None: ...

    def post(self, key: str, value: JSON, ttl_s: float) -> None:
        """Put a latest value on the board; it disappears after ttl_s."""

    def board(self, prefix: str = "") -> dict[str, JSON]: ...

    def backup(self, path: Path) -> None:
        """Write state and events to one file that either store can restore."""

    def restore(self, path: Path) -> State:
        """Make the state of a backup the state from now on, as one event: epoch + 1, loop frozen."""

    def warnings(self) -> list[str]:
        """What a person should change about this store; empty where all is well."""

    def close(self) -> None: ...


class StoreUnavailable(Exception):
    """The store does not answer: serving goes on, change pauses."""


class StoreWentBack(StoreUnavailable):
    """The store answers, but is emptier or older than this process has seen it. Remedy: `recover` with the last known state."""


class StoreRefused(HoneError):
    """This place or server cannot hold a journal safely; the text says why and what to use."""
