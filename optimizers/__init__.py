"""Optimizers: a library about models that stands on its own. It imports nothing of `app`."""

from optimizers.artifact import Artifact, Source
from optimizers.base import Budget, Cancelled, Config, Gain, Need, NotApplicable, Progress, optimize
from optimizers.samples import Samples

__all__ = ["Artifact", "Budget", "Cancelled", "Config", "Gain", "Need", "NotApplicable", "Progress", "Samples", "Source", "optimize"]
