"""Trained centroids: the gradient of a level by hand, what training saves of a coarse codebook, and the contract of each family."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import numpy_helper

from optimizers import Artifact, Budget, NotApplicable, Samples, optimize
from optimizers.codebook import CodebookConfig, TrainedCodebookConfig
from tests import torch_models
from tests.families import answers
from tests.test_distillation import agreement

pytestmark = pytest.mark.needs("torch")
FAST: dict[str, Any] = {"epochs": 2, "batch": 16, "rate": 1e-3, "augment": False, "minutes": 2.0}


def test_a_level_moves_by_the_sum_of_its_weights_gradients_and_zero_stays() -> None:
    import torch

    from optimizers.centroids import Levels

    weight = torch.tensor([[1.0, 1.0, 3.0, 3.0], [-2.0, -2.0, 0.1, 0.0]])
    grid = Levels(weight, bits=2, sparsity=0.25)
    assert grid.levels.tolist() == [-2.0, 1.0, 3.0]
    looked_up = grid(weight)
    assert looked_up.tolist() == [[1.0, 1.0, 3.0, 3.0], [-2.0, -2.0, 0.0, 0.0]]
    (looked_up * torch.tensor([[1.0, 2.0, 3.0, 4.0], [5.0, 6.0, 7.0, 8.0]])).sum().backward()
    assert grid.levels.grad is not None and grid.levels.grad.tolist() == [11.0, 3.0, 7.0]


def off(golden: Artifact, made: Artifact, fresh: Samples) -> float:
    given, wanted = (answers(path, fresh.inputs)[0] for path in (made.path, golden.path))
    return float(np.sqrt(((given - wanted) ** 2).mean() / (wanted**2).mean()))


def test_training_saves_what_a_coarse_codebook_spoils(tmp_path: Path) -> None:
    """Without the levels' steps (a rate of nothing) the answers stay as far off as the plain codebook's."""
    golden = replace(torch_models.artifact(tmp_path, "mlp"), task="regression")
    data, fresh = torch_models.rows("mlp", 256), torch_models.rows("mlp", 400, seed=9)

    def built(config: Any) -> Artifact:
        return optimize(golden, config, data, Budget(scratch=str(tmp_path / "s")))

    plain = off(golden, built(CodebookConfig(bits=2)), fresh)
    fixed = off(golden, built(TrainedCodebookConfig(**FAST | {"bits": 2, "rate": 1e-12, "epochs": 1})), fresh)
    made = built(TrainedCodebookConfig(**FAST | {"bits": 2, "epochs": 30, "patience": 30, "rate": 5e-3}))
    assert fixed == pytest.approx(plain, rel=0.05)
    assert off(golden, made, fresh) < 0.7 * plain, (off(golden, made, fresh), plain)


@pytest.mark.parametrize("name", ["cnn", "transformer"])
def test_every_family_keeps_the_contract(tmp_path: Path, name: str) -> None:
    golden, config = torch_models.artifact(tmp_path, name), TrainedCodebookConfig(**FAST, bits=5, sparsity=0.1)
    made = optimize(golden, config, torch_models.rows(name, 96), Budget(scratch=str(tmp_path / "s")))
    facts = made.facts[-1]
    assert made.recipe == (config.to_json(),) and made.golden == golden.path and made.source is None
    assert facts["trained_layers"] >= facts["shared_layers"] >= 1 and facts["training"]["history"], facts
    assert facts["bytes"] == made.path.stat().st_size < golden.path.stat().st_size
    assert agreement(golden.path, made.path, torch_models.rows(name, 200, seed=9)) > 0.9
    tables = [numpy_helper.to_array(t) for t in onnx.load(made.path).graph.initializer if t.name.endswith(".levels")]
    assert tables and all(table.size <= 32 for table in tables) and any(0.0 in table for table in tables)


def test_what_it_needs_is_said(tmp_path: Path) -> None:
    golden = torch_models.artifact(tmp_path, "mlp")
    with pytest.raises(NotApplicable, match="trained-codebook needs the PyTorch source"):
        optimize(replace(golden, source=None), TrainedCodebookConfig(), torch_models.rows("mlp"), Budget())
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        TrainedCodebookConfig(epochs=0)
    with pytest.raises(ValueError, match="bits must be from"):
        TrainedCodebookConfig(bits=1)
