"""Pruned for real: fewer channels in the file, the parent's names and shapes, steps that compose, and never half a module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers import Artifact, Budget, NotApplicable, Samples
from optimizers.distill import DistillConfig
from optimizers.int8 import Int8StaticConfig
from optimizers.onnx_graph import load
from optimizers.pruning import StructuredPruningConfig
from optimizers.recipe import run_steps
from tests import torch_models

pytestmark = pytest.mark.needs("torch")
FAST: dict[str, Any] = {"epochs": 0, "round_to": 2, "augment": False}


def run(path: Path, rows: Samples) -> Any:
    import onnxruntime as ort

    return ort.InferenceSession(str(path)).run(None, rows.inputs)[0]


def prune(artifact: Artifact, folder: Path, rows: Samples, **config: Any) -> Artifact:
    from optimizers import optimize

    return optimize(artifact, StructuredPruningConfig(**{**FAST, **config}), rows, Budget(scratch=str(folder / "s")))


@pytest.mark.parametrize("name", ["cnn", "depthwise", "mlp"])
def test_channels_go_and_the_outputs_stay(tmp_path: Path, name: str) -> None:
    golden, data = torch_models.artifact(tmp_path, name, steps=5), torch_models.rows(name)
    made = prune(golden, tmp_path, data, ratio=0.5)
    facts = made.facts[-1]
    assert facts["after"]["multiply_adds"] < 0.55 * facts["before"]["multiply_adds"] and facts["after"]["bytes"] < facts["before"]["bytes"]
    assert facts["channels"] and all(now < before for before, now in facts["channels"].values())
    last = {"cnn": "head", "depthwise": "10", "mlp": "4"}[name]
    assert last not in facts["channels"], "the output layer keeps its width"
    assert run(made.path, data).shape == run(golden.path, data).shape
    model = load(made.path)
    assert [v.name for v in model.graph.input] == ["x"] and [v.name for v in model.graph.output] == ["y"]


@pytest.mark.parametrize("importance", ["l1", "taylor", "bn-scale"])
def test_importance_tells_which_channels_go(tmp_path: Path, importance: str) -> None:
    """Channels whose weights and scales are almost nothing go first, whatever measures them; what is left still answers as golden."""
    import torch
    from safetensors.torch import save_model

    from optimizers.torch_source import export, load_module, open_source

    golden, data = torch_models.artifact(tmp_path, "cnn", steps=20), torch_models.rows("cnn")
    assert golden.source is not None
    opened, module = open_source(golden, data, "test"), load_module(golden.source)
    with torch.no_grad():
        for block in (module.block1, module.block2):
            for layer in (block.conv1, block.bn1):  # type: ignore[union-attr]
                layer.weight[1::2] *= 1e-6  # type: ignore[operator, union-attr, index]
            block.bn1.bias[1::2] = 0.0  # type: ignore[operator, union-attr]
            block.bn1.running_mean[1::2] = 0.0  # type: ignore[operator, union-attr]
            block.conv2.weight[:, 1::2] *= 1e-6  # type: ignore[operator, union-attr, index]
    save_model(module, str(golden.source.weights))
    weak = replace(golden, path=export(module, opened.signature, data, tmp_path / "weak" / "model.onnx"))
    made = prune(weak, tmp_path, data, ratio=0.5, importance=importance, keep=("stem", "block1.conv2", "block2.conv2"))
    assert made.facts[-1]["channels"] == {"block1.conv1": [16, 8], "block2.conv1": [16, 8]}
    assert np.allclose(run(made.path, data), run(weak.path, data), atol=1e-3), "half of the channels did nothing, and those went"


def test_steps_compose_and_fine_tuning_brings_agreement_back(tmp_path: Path) -> None:
    golden, data = torch_models.artifact(tmp_path, "cnn"), torch_models.rows("cnn", 96)
    train: dict[str, Any] = {"epochs": 8, "batch": 16, "rate": 5e-3, "augment": False}
    configs = (
        StructuredPruningConfig(ratio=0.5, steps=2, importance="taylor", scope="global", round_to=2, **train),
        DistillConfig(attention=1.0, **train),
        Int8StaticConfig(samples=64),
    )
    made = run_steps(
        golden, configs, {"train": data, "calibration": data}, Budget(scratch=str(tmp_path / "s"), keep=str(tmp_path / "keep"))
    )
    pruned, distilled, quantized = made.facts
    assert pruned["after"]["parameters"] < 0.6 * pruned["before"]["parameters"]
    assert distilled["before"]["parameters"] == pruned["after"]["parameters"] == distilled["after"]["parameters"], (
        "the pruned module was opened"
    )
    assert distilled["pairs"] == ["block1", "block2"], "golden's own source was handed on"
    assert pruned["training"]["labels"] is True and distilled["training"]["history"] and quantized["quantized_layers"] == 6
    fresh = torch_models.rows("cnn", 200, seed=9)
    kept = (run(made.path, fresh).argmax(-1) == run(golden.path, fresh).argmax(-1)).mean()
    assert kept > 0.8 and [step["method"] for step in made.recipe] == ["structured-pruning", "distill", "int8-static"]
    with pytest.raises(NotApplicable, match="needs the PyTorch source of the model"):
        run_steps(made, configs[:1], {"train": data}, Budget(scratch=str(tmp_path / "t")))


@pytest.mark.parametrize("how", ["unbind", "index", "sdpa"])
def test_attention_is_left_whole(tmp_path: Path, how: str) -> None:
    """Neurons of the feed-forward part go, or the method does not apply and names the module; heads and view sizes agree either way."""
    golden, data = torch_models.artifact(tmp_path, how, steps=2), torch_models.rows(how)
    try:
        made = prune(golden, tmp_path, data, ratio=0.5)
    except NotApplicable as reason:
        assert "attention" in str(reason)
        return
    assert not any("qkv" in name or "proj" in name for name in made.facts[-1]["channels"])
    assert run(made.path, data).shape == (64, 3)


def test_what_cannot_be_pruned_is_said(tmp_path: Path) -> None:
    data = torch_models.rows("mlp")
    golden = torch_models.artifact(tmp_path, "mlp", steps=2)
    for config, text in (
        ({"importance": "bn-scale"}, "needs BatchNorm layers, and the module has none"),
        ({"keep": ("nothing",)}, "keep names 'nothing', which is no module"),
        ({"ratio": 0.1, "round_to": 64}, "nothing can be removed at ratio 0.1 with channels in multiples of 64"),
    ):
        with pytest.raises(NotApplicable, match=text):
            prune(golden, tmp_path, data, **config)
    with pytest.raises(NotApplicable, match="nothing can be removed"):
        prune(torch_models.artifact(tmp_path, "bare_linear", steps=2), tmp_path, data)
    for wrong in ({"ratio": 1.0}, {"importance": "luck"}, {"scope": "all"}, {"steps": 0}):
        with pytest.raises(ValueError):
            StructuredPruningConfig(**wrong)


# ---- sensitivity and L1
def test_ratios_are_allotted_where_cutting_costs_least(tmp_path: Path) -> None:
    from optimizers import optimize
    from optimizers.sparsity import SensitivityPruningConfig

    golden, data = torch_models.artifact(tmp_path, "cnn"), torch_models.rows("cnn", 128)
    made = optimize(golden, SensitivityPruningConfig(**FAST, ratio=0.4), data, Budget(scratch=str(tmp_path / "s")))
    facts = made.facts[-1]
    assert facts["after"]["multiply_adds"] < 0.66 * facts["before"]["multiply_adds"]
    curves: dict[str, list[dict[str, Any]]] = {}
    for cut in facts["curves"]:
        curves.setdefault(cut["layer"], []).append(cut)
    assert all([c["saved"] for c in curve] == sorted(c["saved"] for c in curve) for curve in curves.values())
    price = {layer: curve[0]["loss"] / curve[0]["saved"] for layer, curve in curves.items()}
    assert min(price, key=lambda layer: price[layer]) in facts["allotted"]
    dearest = max(price, key=lambda layer: price[layer])
    assert facts["allotted"].get(dearest, 0.0) <= min(facts["allotted"].values()), "where cutting costs most, least is cut"


def test_allotting_is_by_price_and_stops_at_the_budget() -> None:
    from optimizers.sensitivity import Cut, allot

    cuts = [Cut("a", 0.5, 0.1, 1, 100, 0), Cut("a", 0.8, 5.0, 1, 160, 0), Cut("b", 0.5, 0.5, 1, 100, 0), Cut("c", 0.5, 0.02, 1, 10, 0)]
    assert allot(cuts, 90) == {"a": 0.5}
    assert allot(cuts, 110) == {"a": 0.5, "c": 0.5}
    assert allot(cuts, 200) == {"a": 0.5, "b": 0.5, "c": 0.5}
    assert allot(cuts, 10**6) == {"a": 0.8, "b": 0.5, "c": 0.5}, "all there is, where the budget cannot be met"


def test_l1_makes_channels_exactly_zero_and_their_removal_changes_nothing(tmp_path: Path) -> None:
    from optimizers import optimize
    from optimizers.sparsity import L1SparsityConfig

    golden, data = torch_models.artifact(tmp_path, "cnn"), torch_models.rows("cnn", 128)
    fast: dict[str, Any] = {"epochs": 20, "batch": 16, "rate": 5e-3, "augment": False}
    made = optimize(golden, L1SparsityConfig(**fast, strength=4.0), data, Budget(scratch=str(tmp_path / "s")))
    facts = made.facts[-1]
    assert sum(facts["zero_channels"].values()) >= 5 and facts["removal_error"] < 1e-5
    assert facts["after"]["multiply_adds"] < 0.7 * facts["before"]["multiply_adds"]
    with pytest.raises(NotApplicable, match="no channel became zero in training: raise strength"):
        optimize(golden, L1SparsityConfig(**{**fast, "epochs": 2}, strength=0.0), data, Budget(scratch=str(tmp_path / "s")))


def test_the_proximal_step_is_that_of_the_group_lasso(tmp_path: Path) -> None:
    import torch

    from optimizers.proximal import Unit, shrunk, zero_channels

    norm = torch.nn.BatchNorm1d(4)
    module = torch.nn.Sequential(norm)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([3.0, 0.1, -0.2, 1.0]))
        norm.bias.copy_(torch.tensor([4.0, 0.1, 0.0, 0.0]))
    shrunk(module, Unit("0", ("0",)), 0.5, 0.75)
    first = 1 - 0.5 / 12.5**0.5  # the vector (3, 4) has a root mean square of √12.5
    assert norm.weight[:2].tolist() == pytest.approx([3 * first, 0.0]) and norm.bias[:2].tolist() == pytest.approx([4 * first, 0.0])
    assert norm.weight.tolist()[2] == 0.0 and zero_channels(module, Unit("0", ("0",))) == [1, 2]
