"""Which recipes a planner may choose, and in which order: by what the methods themselves declare. It names none of them."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Final

from app.catalog.model_config import ModelConfig
from app.domain import JSON
from optimizers.base import Gain, Need
from optimizers.catalogue import Entry, catalogue

Recipe = tuple[str, ...]
Group = tuple[Recipe, ...]
"""Alternatives that are built together; the best that passes is taken."""

QUICK_S: Final = 60.0
"""CPU seconds up to which a method is tried at once where nobody says which."""


def builds(wanted: Gain, trainable: bool, torch: bool = False) -> list[Group]:
    """What may give `wanted`, the quick ones that compute in bytes together first, then one by one by expected gain ÷ cost; what trains comes last.

    `torch`: golden is a PyTorch model. Its export alone is built with the quick ones, and is the first step of all others.
    """
    groups = _builds(wanted, trainable)
    if not torch:
        return groups
    first = exports()
    together, rest = (groups[0], groups[1:]) if groups and len(groups[0]) > 1 else ((), groups)
    return [(first, *(first + recipe for recipe in together)), *(tuple(first + recipe for recipe in group) for group in rest)]


def _builds(wanted: Gain, trainable: bool) -> list[Group]:
    light, heavy = _entries(wanted)
    together = sorted((one for one in light if one.outlook.int8 and one.outlook.cpu_s <= QUICK_S), key=lambda one: -one.outlook.gain)
    rest = [one for one in light if one not in together]
    found = [tuple((one.method,) for one in together)] if together else []
    found += [((one.method,),) for one in _ranked(rest)]
    return found + ([((one.method, *one.then),) for one in _ranked(heavy)] if trainable else [])


def quick_tries(config: ModelConfig, torch: bool = False) -> list[list[str | JSON]]:
    """Alternatives that model.yaml allows and that take no long time, the one with the largest expected gain first; settings last.

    `torch`: golden is a PyTorch model, whose export alone comes first, and whose settings are not measured.
    """
    quick = [one for one in catalogue() if Gain.FASTER in one.gives and one.outlook.cpu_s <= QUICK_S]
    quick = [one for one in quick if (Need.HERE not in one.needs if torch else Need.PYTORCH not in one.needs)]
    quick.sort(key=lambda one: (Need.HERE in one.needs, Need.PYTORCH not in one.needs, -one.outlook.gain))
    return [[one.method] for one in quick if config.allow is None or one.method in config.allow]


@functools.cache
def exports() -> Recipe:
    """What makes an ONNX file of a PyTorch golden."""
    return tuple(one.method for one in catalogue() if Need.PYTORCH in one.needs)


@functools.cache
def recalibrations() -> list[Recipe]:
    """Quick methods whose result rests on the inputs that calibrated it."""
    light, _ = _entries(Gain.FASTER)
    return [(one.method,) for one in light if Need.CALIBRATION in one.needs and one.outlook.int8 and one.outlook.cpu_s <= QUICK_S]


def promises_no_time(methods: Sequence[str]) -> bool:
    """Whether what a recipe is for is bytes alone (codebooks, 4-bit weights): a gain in time is not what it is to be judged by."""
    gives = [set(one.gives) for one in catalogue() if one.method in methods]
    return bool(gives) and not any({Gain.FASTER, Gain.FEWER_OPERATIONS} & each for each in gives)


@functools.cache
def settings() -> list[Recipe]:
    """What measures settings on the host that serves."""
    return [(one.method,) for one in catalogue() if Need.HERE in one.needs and Gain.FASTER in one.gives]


@functools.cache
def _entries(wanted: Gain) -> tuple[list[Entry], list[Entry]]:
    """Without training, and with; those that gain nothing by themselves (a file on disk, a student that is the module itself) are left out."""
    able = [
        one
        for one in catalogue()
        if not {Need.HERE, Need.PYTORCH} & set(one.needs) and (wanted in one.gives if wanted is not Gain.FASTER else _speeds_up(one))
    ]
    light = [one for one in able if set(one.needs) <= {Need.ONNX, Need.CALIBRATION}]
    return light, [one for one in able if one not in light]


def _speeds_up(one: Entry) -> bool:
    return bool({Gain.FASTER, Gain.FEWER_OPERATIONS} & set(one.gives)) and one.outlook.gain > 1


def _ranked(entries: list[Entry]) -> list[Entry]:
    return sorted(entries, key=lambda one: (-(one.outlook.gain - 1) / one.outlook.cpu_s, one.method))
