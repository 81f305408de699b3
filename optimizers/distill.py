"""Distillation: a student trained to answer as golden does, and, where wanted, to look where golden looks. Config; the work is elsewhere.

Importable without torch, since the server reads the catalogue.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from optimizers.artifact import Artifact
from optimizers.base import Budget, Gain, Outlook, method
from optimizers.pruning import TrainingConfig
from optimizers.samples import Samples


@dataclass(frozen=True)
class DistillConfig(TrainingConfig):
    """L = α · T² · KL(p_golden ‖ p_student) + (1 − α) · cross entropy + `features` · Σ distance(f_g, A f_s) + `attention` · Σ ‖a_g − a_s‖²
    + `attention_matrices` · Σ KL(m_g ‖ m_s), or mean squared errors (`matrix_form` mse).

    `student`: '' for the module as it is (pruned by the step before), or FILE.py:FUNCTION beside the model's factory, which starts untrained.
    The three are weights, 0 for none; all look inside golden, and so need its PyTorch source; `layers`: module names to pair for the first
    two, () to choose. A is a learned 1×1 adapter where widths differ; m are the attention matrices of transformers, in the order in which
    they are made. Without the three golden's ONNX file suffices.
    """

    method: ClassVar[str] = "distill"
    summary: ClassVar[str] = "The module trained on golden's soft answers, and on its features, attention maps and matrices where asked for"
    outlook: ClassVar[Outlook] = Outlook(1.0, 1800.0)
    gives: ClassVar[frozenset[Gain]] = frozenset({Gain.SMALLER, Gain.FEWER_OPERATIONS})
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {
        "temperature": (1.0, 2.0, 4.0), "alpha": (0.5, 0.7, 0.9, 1.0), "attention": (0.0, 1.0, 10.0), "features": (0.0, 0.1, 1.0),
        "attention_matrices": (0.0, 1.0),
    }  # fmt: skip

    student: str = ""
    features: float = 0.0
    feature_form: Literal["mse", "cosine"] = "mse"
    attention: float = 0.0
    attention_matrices: float = 0.0
    matrix_form: Literal["kl", "mse"] = "kl"
    layers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epochs < 1:
            raise ValueError("epochs must be at least 1: distillation is training")
        if self.feature_form not in {"mse", "cosine"}:
            raise ValueError(f"feature_form must be mse or cosine, not {self.feature_form!r}")
        if self.matrix_form not in {"kl", "mse"}:
            raise ValueError(f"matrix_form must be kl or mse, not {self.matrix_form!r}")
        if min(self.features, self.attention, self.attention_matrices) < 0:
            raise ValueError(
                "features, attention and attention_matrices are weights of at least 0, "
                f"not {self.features}, {self.attention} and {self.attention_matrices}"
            )


@method(DistillConfig)
def distill(artifact: Artifact, config: DistillConfig, samples: Samples, budget: Budget) -> Artifact:
    """The student with what it learned. Raises NotApplicable: no source, no pairs of layers, or a student that gives other outputs."""
    from optimizers.distillation import build

    return build(artifact, config, samples, budget)
