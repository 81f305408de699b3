"""Recipes as people write them, checked against the optimizers' own catalogue before a job is made of them."""

from __future__ import annotations

from collections.abc import Sequence

from app.control.choices import exports
from app.domain import JSON, Job
from app.errors import InvalidRequest, NotAllowed
from optimizers.base import Need
from optimizers.catalogue import InvalidStep, config_types, parse_step
from optimizers.host import parse_target


def parse_tries(
    tries: Sequence[Sequence[str | JSON]], allowed: tuple[str, ...] | None, model: str, target: str = "", recent: bool = False, torch: bool = False
) -> list[list[JSON]]:  # fmt: skip
    """Alternatives with every option spelled out, so that equal recipes compare equal. Raises InvalidRequest or NotAllowed.

    `torch`: golden is a PyTorch model, so that what builds begins with what makes an ONNX file of it, allowed or not.
    The first step of each carries what holds for the whole: the `target` class of hosts, and whether captured inputs calibrate too (`recent`).
    """
    parsed = [[_step(step) for step in recipe] for recipe in tries]
    for step in (step for recipe in parsed for step in recipe):
        if allowed is not None and step["method"] not in allowed:
            raise NotAllowed(f"model.yaml of {model!r} allows {', '.join(allowed)}; {step['method']} is not among them")
    parsed = [_from_torch(recipe) for recipe in parsed] if torch else parsed
    for recipe in parsed:
        if any(step["method"] == "tune" for step in recipe[:-1]):
            raise InvalidRequest("tune comes last in a recipe: it finds settings for what the steps before it built")
        if target:
            recipe[0]["target"] = _known_target(target)
        if recent:
            recipe[0]["recent"] = True
    return parsed


def _from_torch(recipe: list[JSON]) -> list[JSON]:
    """The recipe as one from a PyTorch golden; what only measures on the host that serves is about the version that serves."""
    types = config_types()
    needs = [types[str(step["method"])].needs for step in recipe]
    if Need.PYTORCH in needs[0] or all(Need.HERE in one for one in needs):
        return recipe
    return [*(_step(method) for method in exports()), *recipe]


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
