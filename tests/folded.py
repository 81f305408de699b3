"""Settings of stories, and the model that a folded story is of."""

from __future__ import annotations

from app.domain import ModelState, State

SLOW = {"intra_op_threads": 1, "batch_limit": 4}
FAST = {"intra_op_threads": 2, "batch_limit": 16, "session_options": {"a": "1"}}


def model_of(state: State, name: str = "m") -> ModelState:
    return state.models[name]
