"""Optimizers: a library about models that stands on its own. It imports nothing of `app`.

The names below are loaded when first used, so that the server process can read `optimizers.host` without numpy.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from optimizers.artifact import Artifact, Source
    from optimizers.base import Budget, Cancelled, Config, Gain, Need, NotApplicable, Progress, Rejected, optimize
    from optimizers.samples import Samples

__all__ = [
    "Artifact",
    "Budget",
    "Cancelled",
    "Config",
    "Gain",
    "Need",
    "NotApplicable",
    "Progress",
    "Rejected",
    "Samples",
    "Source",
    "optimize",
]

_homes = {"Artifact": "artifact", "Source": "artifact", "Samples": "samples"}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'optimizers' has no attribute {name!r}")
    return getattr(importlib.import_module(f"optimizers.{_homes.get(name, 'base')}"), name)
