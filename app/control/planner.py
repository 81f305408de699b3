"""What to try when nobody says what: recipes by what the model is and what model.yaml allows. Pure; it measures and decides no swap."""

from __future__ import annotations

from app.catalog.model_config import ModelConfig
from app.domain import JSON

PLANNED: tuple[tuple[str, ...], ...] = (("int8-static",), ("int8-dynamic",), ("graph",), ("tune",))
"""Alternatives; each says for itself where it does not apply, and the best that passes is taken."""


def default_tries(config: ModelConfig) -> list[list[str | JSON]]:
    """Alternatives that model.yaml allows, the one with the largest expected gain first."""
    allowed = config.allow
    return [list(recipe) for recipe in PLANNED if allowed is None or all(method in allowed for method in recipe)]
