"""Quantization-aware training: the grid's arithmetic and gradients by hand, and a model that plain int8 spoils and training saves."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers import Artifact, Budget, NotApplicable, Samples, optimize
from optimizers.int8 import Int8StaticConfig
from optimizers.qat import QatConfig
from tests import torch_models
from tests.families import answers
from tests.test_distillation import agreement

pytestmark = pytest.mark.needs("torch")
FAST: dict[str, Any] = {"epochs": 4, "batch": 16, "rate": 1e-3, "augment": False, "minutes": 2.0}


def test_the_grid_rounds_clips_and_passes_gradients_as_in_the_paper() -> None:
    import torch

    from optimizers.fake_quantization import Grid

    grid = Grid(torch.tensor(0.5), torch.tensor(2.0), 0, 7, learn=True)
    x = torch.tensor([-3.0, -0.6, 0.2, 1.3, 9.0], requires_grad=True)
    y = grid(x)
    assert y.tolist() == [-1.0, -0.5, 0.0, 1.5, 2.5] and grid.range == (-1.0, 2.5)
    y.sum().backward()
    assert x.grad is not None and x.grad.tolist() == [0.0, 1.0, 1.0, 1.0, 0.0], "straight through where nothing is clipped"
    by_hand = -2.0 + (-1 + 1.2) + (0 - 0.4) + (3 - 2.6) + 5.0  # low − z, round(x/s) − x/s inside, high − z
    assert grid.t.grad is not None
    assert float(grid.t.grad) == pytest.approx(0.5 * by_hand / (5 * 7) ** 0.5, abs=1e-6), (
        "times s, for s = s₀·exp(t), and scaled as LSQ does"
    )


def test_what_is_folded_answers_as_before_and_what_cannot_be_is_refused() -> None:
    import torch
    from torch import nn

    from optimizers.fake_quantization import folded

    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.bn = nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4)

        def forward(self, x: Any) -> Any:
            made = self.conv(x)
            return self.bn(made) + made

    torch.manual_seed(0)
    rows = (torch.randn(8, 1, 8, 8),)
    plain = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU())
    plain(*rows)  # running statistics that are not the first ones
    twin = folded(plain, rows)
    assert isinstance(twin.get_submodule("1"), nn.Identity) and isinstance(plain.get_submodule("1"), nn.BatchNorm2d)
    assert torch.allclose(twin(*rows), plain.eval()(*rows), atol=1e-5)
    twice = Twice()
    twice(*rows)
    with pytest.raises(NotApplicable, match="cannot be folded"):
        folded(twice, rows)


def lopsided(folder: Path) -> Artifact:
    """The MLP with one hidden neuron 60 times as large, and its outgoing weights as much smaller: the same answers, hard to put on one grid."""
    import torch
    from safetensors.torch import load_file, save_file

    from optimizers.torch_source import Signature, export, load_module

    made = torch_models.artifact(folder, "mlp")
    assert made.source is not None
    values = load_file(made.source.weights)
    values["0.weight"][0] *= 60
    values["0.bias"][0] *= 60
    values["2.weight"][:, 0] /= 60
    save_file(values, made.source.weights)
    with torch.no_grad():
        path = export(load_module(made.source), Signature(("x",), ("y",), {"x": (0,)}), torch_models.rows("mlp"), folder / "lopsided.onnx")
    return replace(made, path=path, task="regression")


def test_training_saves_what_plain_int8_spoils(tmp_path: Path) -> None:
    """Without what is learned (the steps fixed) the answers stay about as far off as int8-static's."""
    golden = lopsided(tmp_path)
    data, fresh = torch_models.rows("mlp", 256), torch_models.rows("mlp", 400, seed=9)

    def off(made: Artifact) -> float:
        given, wanted = (answers(path, fresh.inputs)[0] for path in (made.path, golden.path))
        return float(np.sqrt(((given - wanted) ** 2).mean() / (wanted**2).mean()))

    def trained(**how: Any) -> Artifact:
        config = QatConfig(**FAST | {"epochs": 30, "patience": 30, "rate": 5e-3, "per_channel": False} | how)
        return optimize(golden, config, data, Budget(scratch=str(tmp_path / "s")))

    plain = optimize(golden, Int8StaticConfig(per_channel=False), data, Budget(scratch=str(tmp_path / "s")))
    made = trained()
    facts = made.facts[-1]
    assert facts["simulated_layers"] == facts["learned_ranges"] == facts["quantized_layers"] == 3
    fixed = trained(learn_steps=False)
    assert off(made) < 0.75 * off(plain), (off(made), off(plain))
    assert off(made) < 0.85 * off(fixed), (off(made), off(fixed))
    assert min(facts["step_factors"].values()) < 0.8, "the step of the lopsided activation became smaller"
    assert set(fixed.facts[-1]["step_factors"].values()) == {1.0}


def test_the_file_answers_as_the_module_that_was_trained(tmp_path: Path) -> None:
    import torch

    from optimizers.fake_quantization import simulate
    from optimizers.int8 import form_for
    from optimizers.torch_source import load_module, tensors_of

    golden = torch_models.artifact(tmp_path, "mlp")
    data = torch_models.rows("mlp", 128)
    made = optimize(golden, QatConfig(**FAST | {"epochs": 1, "rate": 1e-12}), data, Budget(scratch=str(tmp_path / "s")))
    assert golden.source is not None
    module = load_module(golden.source)
    inputs = tensors_of(data, _signature())
    levels = 64 if form_for("", "auto").reduce_range else 127
    held = data.split(0.85, 0)[0]
    simulation = simulate(module, [tensors_of(held, _signature())], levels, True, True)
    with torch.no_grad():
        rehearsed = module(*inputs).numpy()
    assert list(simulation.layers) == ["0", "2", "4"]
    served = answers(made.path, data.inputs)[0]
    apart = np.abs(served - rehearsed).max() / np.abs(rehearsed).max()
    assert apart < 0.02, "the same grids: what is left are levels on the edge between two"


def test_layers_called_by_keyword_go_through_their_grids(tmp_path: Path) -> None:
    golden, data = torch_models.artifact(tmp_path, "by_keyword"), torch_models.rows("by_keyword", 96)
    made = optimize(golden, QatConfig(**FAST), data, Budget(scratch=str(tmp_path / "s")))
    assert made.facts[-1]["simulated_layers"] == 2
    assert agreement(golden.path, made.path, torch_models.rows("by_keyword", 200, seed=9)) > 0.9


@pytest.mark.parametrize("name", ["cnn", "depthwise", "mlp", "transformer", "unbind"])
def test_every_family_keeps_the_contract(tmp_path: Path, name: str) -> None:
    golden = torch_models.artifact(tmp_path, name)
    config = QatConfig(**FAST)
    made = optimize(golden, config, torch_models.rows(name, 96), Budget(scratch=str(tmp_path / "s")))
    facts = made.facts[-1]
    assert made.recipe == (config.to_json(),) and made.golden == golden.path and made.source is None
    assert facts["simulated_layers"] >= 3 and facts["learned_ranges"] >= 2, facts
    assert facts["bytes"] == made.path.stat().st_size and facts["before"]["parameters"] > 0 and facts["training"]["history"]
    assert agreement(golden.path, made.path, torch_models.rows(name, 200, seed=9)) > 0.9
    import onnx

    operators = [node.op_type for node in onnx.load(made.path).graph.node]
    assert operators.count("DequantizeLinear") > operators.count("QuantizeLinear") > 0


def _signature() -> Any:
    from optimizers.torch_source import Signature

    return Signature(("x",), ("y",), {"x": (0,)})


def test_what_it_needs_is_said(tmp_path: Path) -> None:
    golden = torch_models.artifact(tmp_path, "mlp")
    with pytest.raises(NotApplicable, match="qat needs the PyTorch source"):
        optimize(replace(golden, source=None), QatConfig(), torch_models.rows("mlp"), Budget())
    with pytest.raises(NotApplicable, match="qat needs inputs"):
        optimize(golden, QatConfig(), Samples({}), Budget())
    with pytest.raises(ValueError, match="epochs must be at least 1"):
        QatConfig(epochs=0)
