"""Layers split in two or three: on the ONNX graph without torch, and in PyTorch; only where it pays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from optimizers import Artifact, Budget, NotApplicable, optimize
from optimizers.low_rank import LowRankConfig, TuckerConfig
from optimizers.onnx_graph import set_constant
from optimizers.svd import decomposed
from tests import torch_models
from tests.onnx_models import mlp, normal, write


def thin(seed: int, rows: int, columns: int, rank: int) -> Any:
    return (normal(seed, rows, rank) @ normal(seed + 1, rank, columns) / rank).astype(np.float32)


def model_of_rank(path: Path, sizes: tuple[int, ...], rank: int, transposed: bool = False) -> Path:
    """An MLP whose first matrix has this rank."""
    model = mlp(sizes)
    weight = thin(3, sizes[0], sizes[1], rank)
    set_constant(model.graph, "w0", weight.T if transposed else weight)
    if transposed:
        model.graph.node[0].attribute.append(onnx.helper.make_attribute("transB", 1))
    return write(model, path)


def run(path: Path, x: Any) -> Any:
    return ort.InferenceSession(str(path)).run(None, {"x": x})[0]


@pytest.mark.parametrize("transposed", [False, True])
def test_a_matrix_of_low_rank_is_split_without_loss(tmp_path: Path, transposed: bool) -> None:
    path = model_of_rank(tmp_path / "m.onnx", (64, 96, 10), 5, transposed)
    made = optimize(Artifact(path), LowRankConfig(energy=0.999999, split="fewer"), torch_free(), Budget(scratch=str(tmp_path / "s")))
    facts = made.facts[-1]
    assert [(s["layer"], s["rank"]) for s in facts["split"]] == [("gemm0", 5)] and [s["layer"] for s in facts["left"]] == ["gemm1"]
    x = normal(9, 7, 64)
    assert np.allclose(run(made.path, x), run(path, x), atol=1e-4)
    assert facts["after"]["bytes"] < 0.4 * facts["before"]["bytes"] and facts["after"]["multiply_adds"] < facts["before"]["multiply_adds"]


def torch_free() -> Any:
    from optimizers import Samples

    return Samples({"x": normal(0, 8, 64)})


def test_rank_is_the_least_that_keeps_the_energy() -> None:
    weight = np.diag([3.0, 2.0, 1.0, 1.0]).astype(np.float32)  # energies 9, 4, 1, 1 of 15
    ranks = {energy: decomposed("w", weight, energy)[0].rank for energy in (0.5, 0.6, 0.7, 0.86, 0.9, 0.95)}
    assert ranks == {0.5: 1, 0.6: 1, 0.7: 2, 0.86: 2, 0.9: 3, 0.95: 4}
    split, (a, b) = decomposed("w", weight, 0.86)
    assert split.energy == pytest.approx(13 / 15) and float(((a @ b - weight) ** 2).sum()) == pytest.approx(2.0, rel=1e-5)


def test_layers_are_split_only_where_that_is_faster_here(tmp_path: Path) -> None:
    budget = Budget(scratch=str(tmp_path / "s"))
    large = model_of_rank(tmp_path / "large.onnx", (1024, 1024, 4), 8)
    made = optimize(Artifact(large), LowRankConfig(energy=0.999), torch_free().rows([]), budget)
    assert [s["layer"] for s in made.facts[-1]["split"]] == ["gemm0"] and made.facts[-1]["split"][0]["ratio"] < 0.95
    with pytest.raises(
        NotApplicable, match=r"no layer is better off split at 100% of its energy: gemm0 \[16, 32\] rank 16, more operations"
    ):
        optimize(Artifact(write(mlp(), tmp_path / "full.onnx")), LowRankConfig(energy=0.99999), torch_free(), budget)
    for wrong in ({"energy": 1.0}, {"split": "never"}, {"rows": 0}):
        with pytest.raises(ValueError):
            LowRankConfig(**wrong)


@pytest.mark.needs("torch")
def test_convolutions_are_split_and_the_next_step_opens_them(tmp_path: Path) -> None:
    from optimizers.recipe import run_steps

    golden, data = torch_models.artifact(tmp_path, "cnn"), torch_models.rows("cnn", 96)
    train: dict[str, Any] = {"batch": 16, "rate": 3e-3, "augment": False}
    from optimizers.distill import DistillConfig

    configs = (TuckerConfig(energy=0.6, epochs=0, exclude=("stem",), **train), DistillConfig(epochs=10, **train))
    made = run_steps(golden, configs, {"train": data}, Budget(scratch=str(tmp_path / "s")))
    split = made.facts[0]
    assert set(split["split"]) == {"block1.conv1", "block1.conv2", "block2.conv1", "block2.conv2"} and split["left"] == {"stem": "excluded"}
    assert split["after"]["multiply_adds"] < 0.5 * split["before"]["multiply_adds"]
    assert made.facts[1]["after"]["parameters"] == split["after"]["parameters"], "the split module was opened and trained"
    fresh = torch_models.rows("cnn", 200, seed=9)
    assert (run(made.path, fresh.inputs["x"]).argmax(-1) == run(golden.path, fresh.inputs["x"]).argmax(-1)).mean() > 0.8
    with pytest.raises(NotApplicable, match="no convolution is better off split: there is none"):
        optimize(
            torch_models.artifact(tmp_path, "mlp", steps=2), TuckerConfig(), torch_models.rows("mlp"), Budget(scratch=str(tmp_path / "s"))
        )


@pytest.mark.needs("torch")
def test_tucker_at_full_rank_is_the_layer_itself(tmp_path: Path) -> None:
    import torch

    from optimizers.tucker import Tucker, rank_of

    torch.manual_seed(0)
    layer, form = torch.nn.Conv2d(6, 8, 3, stride=2, padding=1), Tucker()
    x = torch.randn(2, 6, 9, 9)
    assert torch.allclose(form.made(layer, (8, 6))(x), layer(x), atol=1e-5)
    assert not torch.allclose(form.made(layer, (2, 2))(x), layer(x), atol=1e-2)
    assert rank_of(torch.diag(torch.tensor([3.0, 2.0, 1.0, 1.0])), 0.86) == 2
    assert form.saved(layer, (2, 2)) == pytest.approx(1 - (6 * 2 * 4 + 2 * 2 * 9 + 2 * 8) / (6 * 8 * 9))
