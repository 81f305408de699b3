"""What of a look at this server's repository is news for the journal: golden versions that came, changed or went. Pure.

Several servers may each have a repository of their own, which new files reach one after the other. So a server tells what changed in its
own, and once at a start what is there, never that the journal wants another: two that differ would put each other's version back for ever.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from typing import TypeAlias

from app.domain import ModelState, State

Golden: TypeAlias = tuple[str, str]
"""A golden version and its hash."""


class OwnRepository:
    """One per server. At its first look everything is new; a journal that was rebuilt is told again only what it wanted before and lost."""

    def __init__(self) -> None:
        self._held: dict[str, Golden] = {}
        self._stood: set[str] = set()
        """Models of which the journal wanted what is here, at the last look."""
        self._shaken: set[str] = set()
        """Those of them that the rebuilt journal was not asked about yet."""
        self._epoch, self._first = 0, True

    def begin(self, epoch: int) -> None:
        if epoch != self._epoch:
            self._shaken, self._epoch = self._shaken | self._stood, epoch

    def is_news(self, model: str, own: Golden, state: State) -> bool:
        """Whether `own` is to be deployed."""
        wanted = state.models.get(model)
        if wanted is None and model not in state.removed:
            return True  # the journal never heard of it
        if wants(wanted, own):
            return False
        return self._held.get(model) != own or (model in self._shaken and not _newer(wanted, own))

    def holds(self, model: str, own: Golden, stands: bool) -> None:
        """It is here, and the journal was told what there is to tell; `stands`: it is what the journal wants."""
        self._held[model] = own
        self._shaken.discard(model)
        (self._stood.add if stands else self._stood.discard)(model)

    def lost(self, model: str, served_here: Callable[[str], bool]) -> bool:
        """Whether a model of the journal that is not here was here before: by the state folder, where it went while no server ran."""
        return model in self._held or (self._first and served_here(model))

    def end(self, found: Container[str], untold: Container[str]) -> None:
        """The look is over; what went is forgotten, but for what the journal did not take."""
        self._held = {name: own for name, own in self._held.items() if name in found or name in untold}
        self._stood &= self._held.keys()
        self._first = False


def wants(wanted: ModelState | None, own: Golden) -> bool:
    return wanted is not None and own == (wanted.golden, wanted.golden_sha256)


def _newer(wanted: ModelState | None, own: Golden) -> bool:
    """True where the rebuilt journal wants a later version than `own`: of another server, whose files come here later."""
    return wanted is not None and wanted.golden.isdecimal() and own[0].isdecimal() and int(wanted.golden) > int(own[0])
