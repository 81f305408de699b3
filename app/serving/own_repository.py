"""What of a look at this server's repository is news for the journal: golden versions that came, changed or went. Pure.

Several servers may each have a repository of their own, which new files reach one after the other. So a server tells what changed in its
own, and once at a start what is there, never that the journal wants another: two that differ would put each other's version back for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TypeAlias

from app.domain import State

Golden: TypeAlias = tuple[str, str]
"""A golden version and its hash."""


class OwnRepository:
    """One per server. At its first look, and at the first after the journal was rebuilt, everything is new."""

    def __init__(self) -> None:
        self._held: dict[str, Golden] = {}
        self._epoch, self._first = 0, True

    def begin(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._held, self._epoch, self._first = {}, epoch, True

    def is_news(self, model: str, own: Golden, state: State) -> bool:
        """Whether `own` is to be deployed."""
        wanted = state.models.get(model)
        if wanted is None and model not in state.removed:
            return True  # the journal never heard of it
        return self._held.get(model) != own and (wanted is None or own != (wanted.golden, wanted.golden_sha256))

    def holds(self, model: str, own: Golden) -> None:
        """It is here, and the journal was told what there is to tell."""
        self._held[model] = own

    def lost(self, model: str, served_here: Callable[[str], bool]) -> bool:
        """Whether a model of the journal that is not here was here before: by the state folder, where it went while no server ran."""
        return model in self._held or (self._first and served_here(model))

    def end(self, found: Container[str], untold: Container[str]) -> None:
        """The look is over; what went is forgotten, but for what the journal did not take."""
        self._held = {name: own for name, own in self._held.items() if name in found or name in untold}
        self._first = False
