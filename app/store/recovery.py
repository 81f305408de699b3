"""The one question a process asks at its start and after a loss: which state is it to go by, the store's or the one it remembers?"""

from __future__ import annotations

from app.domain import State
from app.store import merge
from app.store.base import Journal, StoreWentBack


def catch_up(journal: Journal, known: State | None) -> State:
    """The store's state, after putting back what it lost of `known` (epoch + 1, loop frozen).

    Raises StoreUnavailable where the store does not answer: then go by `known` and change nothing. Raises StoreWentBack where
    something is lost and nothing is remembered.
    """
    try:
        state = journal.state()
    except StoreWentBack:
        if known is None:
            raise
        return journal.recover(known)
    if known is not None and merge.behind(state, known):
        return journal.recover(known)
    return state
