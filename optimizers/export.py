"""A PyTorch golden as an ONNX file: exported with its declared names and free axes, and held to the module's own answers. Comes first in a recipe.

Importable without torch, since the server reads the catalogue: the work is in optimizers.export_onnx.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from optimizers.artifact import Artifact
from optimizers.base import Budget, Config, Gain, Need, NotApplicable, Outlook, method
from optimizers.samples import Samples


@dataclass(frozen=True)
class ExportConfig(Config):
    """No options: what it is called, takes and gives is as declared (`Source.inputs`, `Source.outputs`)."""

    method: ClassVar[str] = "export"
    summary: ClassVar[str] = (
        "a PyTorch golden as an ONNX file with the same answers, for ONNX Runtime to run and other methods to start from"
    )
    needs: ClassVar[frozenset[Need]] = frozenset({Need.PYTORCH})
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.FASTER, Gain.LESS_MEMORY})
    lossless: ClassVar[bool] = True
    outlook: ClassVar[Outlook] = Outlook(1.4, 30.0)
    extra: ClassVar[str] = "optimize"


@method(ExportConfig)
def export(artifact: Artifact, config: ExportConfig, samples: Samples, budget: Budget) -> Artifact:
    """The ONNX file of `artifact.source`, which is golden for the steps that follow; tried on `samples` (rows, or whole calls).

    Raises NotApplicable: it is ONNX already, nothing declares what the module takes, PyTorch cannot export it, or its answers change.
    """
    if not artifact.is_torch:
        raise NotApplicable(f"export makes an ONNX file of a PyTorch model, and {artifact.path.name} is one already")
    from optimizers.export_onnx import build

    return build(artifact, config, samples, budget)
