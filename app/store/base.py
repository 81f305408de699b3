"""What a journal must do, whoever keeps it. State is a fold (app.store.fold); this knows nothing of serving or HTTP."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from app.domain import JSON, Event, Generation, State


class Journal(Protocol):
    """Append-only events, leases and a disposable board. Methods block (call them off the event loop) and are thread-safe.

    All raise `StoreUnavailable` when the store is away; nothing is half written.
    """

    def append(self, event: Event, expect: Generation | None = None) -> Event:
        """Store `event`, giving it seq and time. With `expect`, raise Conflict unless the model's generation is still that."""

    def read(self, after: int = 0, limit: int = 1000, model: str = "", newest_first: bool = False) -> Sequence[Event]: ...

    def state(self) -> State:
        """The fold over all events; incremental, so calling it often is cheap."""

    def wait(self, after: int, timeout_s: float) -> bool:
        """Block until an event later than `after` exists or the time is over; True if one does."""

    def acquire(self, lease: str, holder: str, ttl_s: float) -> bool:
        """Take or renew a lease by name; False while another holder's is alive."""

    def release(self, lease: str, holder: str) -> None: ...

    def post(self, key: str, value: JSON, ttl_s: float) -> None:
        """Put a latest value on the board; it disappears after ttl_s."""

    def board(self, prefix: str = "") -> dict[str, JSON]: ...

    def close(self) -> None: ...


class StoreUnavailable(Exception):
    """The store does not answer: serving goes on, change pauses."""
