"""Recipes as people write them, checked against the optimizers' own catalogue before a job is made of them."""

from __future__ import annotations

from collections.abc import Sequence

from app.domain import JSON, Job
from app.errors import InvalidRequest, NotAllowed
from optimizers.catalogue import InvalidStep, parse_step
from optimizers.host import parse_target


def parse_tries(
    tries: Sequence[Sequence[str | JSON]], allowed: tuple[str, ...] | None, model: str, target: str = "", recent: bool = False
) -> list[list[JSON]]:
    """Alternatives with every option spelled out, so that equal recipes compare equal. Raises InvalidRequest or NotAllowed.

    The first step of each carries what holds for the whole: the `target` class of hosts, and whether captured inputs calibrate too (`recent`).
    """
    parsed = [[_step(step) for step in recipe] for recipe in tries]
    for step in (step for recipe in parsed for step in recipe):
        if allowed is not None and step["method"] not in allowed:
            raise NotAllowed(f"model.yaml of {model!r} allows {', '.join(allowed)}; {step['method']} is not among them")
    for recipe in parsed:
        if any(step["method"] == "tune" for step in recipe[:-1]):
            raise InvalidRequest("tune comes last in a recipe: it finds settings for what the steps before it built")
        if target:
            recipe[0]["target"] = _known_target(target)
        if recent:
            recipe[0]["recent"] = True
    return parsed


def target_of(recipe: Sequence[JSON]) -> str:
    """The class of hosts that a recipe builds for; '' for the one it runs on."""
    return next((str(step["target"]) for step in recipe if step.get("target")), "")


def is_recalibration(job: Job) -> bool:
    """Whether it is built anew with captured inputs, since agreement fell with inputs that changed."""
    return any(step.get("recent") for recipe in job.tries for step in recipe)


def _known_target(target: str) -> str:
    try:
        parse_target(target)
    except ValueError as error:
        raise InvalidRequest(str(error)) from None
    return target


def _step(step: str | JSON) -> JSON:
    try:
        return dict(parse_step(step).to_json())
    except InvalidStep as error:
        raise InvalidRequest(str(error)) from None
