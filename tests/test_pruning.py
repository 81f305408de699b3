"""Pruned for real: fewer channels in the file, the parent's names and shapes, steps that compose, and never half a module."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from onnx.numpy_helper import to_array

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


@pytest.mark.parametrize(
    ("name", "ratio", "left"),
    [
        ("grouped", 0.125, {"0": [64, 56], "2": [64, 56], "4": [16, 8], "6": [32, 24]}),
        ("grouped", 0.3, {"0": [64, 40], "2": [64, 40], "4": [16, 8], "6": [32, 16]}),
        ("grouped", 0.5, {"0": [64, 32], "2": [64, 32], "4": [16, 8], "6": [32, 16]}),
        ("finely_grouped", 0.25, {"0": [64, 48], "2": [64, 48]}),
    ],
)
def test_groups_of_channels_lose_as_many_as_the_ratio_says(tmp_path: Path, name: str, ratio: float, left: dict[str, list[int]]) -> None:
    golden, data = torch_models.artifact(tmp_path, name, steps=1), torch_models.rows(name, 16)
    assert prune(golden, tmp_path, data, ratio=ratio, round_to=8).facts[-1]["channels"] == left


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


def test_a_job_killed_in_its_second_training_goes_on_there(tmp_path: Path) -> None:
    """The first training's result is kept, so that what it decides (here: which channels are zero) is decided as before."""
    from optimizers import Cancelled, Progress, optimize
    from optimizers.sparsity import L1SparsityConfig

    golden, data, seen = torch_models.artifact(tmp_path, "mlp", steps=5), torch_models.rows("mlp", 64), list[Progress]()
    config = L1SparsityConfig(epochs=20, batch=16, rate=5e-3, augment=False, ratio=0.3)
    budget = Budget(scratch=str(tmp_path / "s"), keep=str(tmp_path / "keep"), on_progress=seen.append)
    budget.cancelled = lambda: seen[-1].step == "fine-tuning" and seen[-1].detail["epoch"] > 3
    with pytest.raises(Cancelled):
        optimize(golden, config, data, budget)
    budget.cancelled = lambda: False
    facts = optimize(golden, config, data, budget).facts[-1]
    assert facts["sparsifying"]["resumed_at"] == len(facts["sparsifying"]["history"]) and facts["training"]["resumed_at"] == 3


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
    made = optimize(golden, L1SparsityConfig(**fast, ratio=0.3), data, Budget(scratch=str(tmp_path / "s")))
    facts = made.facts[-1]
    assert sum(facts["zero_channels"].values()) >= 5 and facts["removal_error"] < 1e-5
    assert facts["after"]["multiply_adds"] < 0.7 * facts["before"]["multiply_adds"]
    assert facts["strength_at_most"] > facts["strength"] == 0.01, "λ was raised until enough channels were zero"
    with pytest.raises(NotApplicable, match="no channel became zero in training: raise strength"):
        optimize(golden, L1SparsityConfig(**{**fast, "epochs": 2}, strength=0.0), data, Budget(scratch=str(tmp_path / "s")))


@pytest.mark.parametrize("name", ["transposed", "transposed_square", "partly_grouped", "sigmoid"])
def test_l1_removes_only_what_does_nothing_once_it_is_zero(tmp_path: Path, name: str) -> None:
    """Channels of transposed convolutions lie on the second axis; those that meet a sigmoid, or groups, are left alone."""
    from optimizers import optimize
    from optimizers.sparsity import L1SparsityConfig

    golden, data = torch_models.artifact(tmp_path, name, steps=20), torch_models.rows(name, 64)
    config = L1SparsityConfig(epochs=10, batch=16, rate=5e-3, augment=False, ratio=0.3)
    facts = optimize(golden, config, data, Budget(scratch=str(tmp_path / "s"))).facts[-1]
    assert facts["removal_error"] < 1e-5 and sum(facts["zero_channels"].values()) >= 5
    assert facts["after"]["multiply_adds"] < facts["before"]["multiply_adds"]
    left_alone = {"partly_grouped": "a convolution with groups takes part", "sigmoid": "channels that are zero still count"}
    assert all(left_alone[name] in why for why in facts["left_alone"].values()) and bool(facts["left_alone"]) == (name in left_alone)


@pytest.mark.parametrize("method", ["sensitivity-pruning", "l1-sparsity", "architecture-search"])
def test_a_recurrent_layer_that_cannot_be_followed_is_named(tmp_path: Path, method: str) -> None:
    from optimizers import optimize
    from optimizers.catalogue import parse_step

    golden = torch_models.artifact(tmp_path, "gru", steps=1)
    with pytest.raises(NotApplicable, match=r"recurrent layer '2' does not bear pruning|nothing to decide"):
        optimize(golden, parse_step(method), torch_models.rows("gru", 16), Budget(scratch=str(tmp_path / "s")))


@pytest.mark.parametrize("method", ["sensitivity-pruning", "l1-sparsity", "distill"])
def test_frozen_weights_are_trained_where_training_was_asked_for(tmp_path: Path, method: str) -> None:
    from optimizers import optimize
    from optimizers.catalogue import parse_step

    golden = torch_models.artifact(tmp_path, "frozen", steps=0)
    step = {"method": method, "epochs": 4, "batch": 16, "rate": 5e-3, "augment": False}
    steps = [step, {**step, "student": "factories.py:frozen"}] if method == "distill" else [step]
    for each in steps:
        made = optimize(golden, parse_step(each), torch_models.rows("frozen", 64), Budget(scratch=str(tmp_path / "s")))
        assert made.facts[-1]["training"]["history"]


@pytest.mark.parametrize(("optimizer", "rate", "epochs"), [("adamw", 2e-3, 2), ("adamw", 2e-3, 30), ("sgd", 0.02, 2), ("sgd", 0.02, 30)])
def test_l1_reaches_its_ratio_in_few_steps_and_in_many_by_either_optimizer(
    tmp_path: Path, optimizer: Literal["adamw", "sgd"], rate: float, epochs: int
) -> None:
    from optimizers import optimize
    from optimizers.sparsity import L1SparsityConfig

    golden, data = torch_models.artifact(tmp_path, "cnn"), torch_models.rows("cnn", 128)
    config = L1SparsityConfig(optimizer=optimizer, rate=rate, epochs=epochs, batch=16, augment=False, ratio=0.3)
    facts = optimize(golden, config, data, Budget(scratch=str(tmp_path / "s"))).facts[-1]
    assert 0.25 < facts["zero_share"] < 0.45 and facts["removal_error"] < 1e-5, facts["zero_channels"]


def test_l1_on_single_weights_leaves_zeros_where_they_are_and_the_packed_file_is_smaller(tmp_path: Path) -> None:
    from optimizers import optimize
    from optimizers.onnx_graph import initializers
    from optimizers.packed import pack
    from optimizers.sparsity import L1SparsityConfig

    golden, data = torch_models.artifact(tmp_path, "cnn"), torch_models.rows("cnn", 128)
    fast: dict[str, Any] = {"on": "weights", "epochs": 20, "batch": 16, "rate": 2e-3, "augment": False, "most": 0.9}
    made = optimize(golden, L1SparsityConfig(**fast, ratio=0.6), data, Budget(scratch=str(tmp_path / "s")))
    facts = made.facts[-1]
    assert 0.55 < facts["zero_share"] < 0.7 and facts["after"]["multiply_adds"] == facts["before"]["multiply_adds"]
    zeros = sum(tensor.data_type == 1 and int((to_array(tensor) == 0).sum()) for tensor in initializers(load(made.path).graph).values())
    assert zeros >= facts["zero_weights"], "fine-tuning and export left them zero"
    assert facts["bytes_packed"] < 0.75 * pack(golden.path, tmp_path / "golden.packed").bytes
    with pytest.raises(NotApplicable, match="no weight became zero in training"):
        optimize(golden, L1SparsityConfig(**{**fast, "epochs": 2}, strength=0.0), data, Budget(scratch=str(tmp_path / "s")))
    with pytest.raises(ValueError, match="on must be channels or weights"):
        L1SparsityConfig(**{**fast, "on": "neurons"})


def test_from_the_ratio_on_zeros_are_held_and_nothing_is_shrunk() -> None:
    import torch

    from optimizers.proximal import Pressure, Unit
    from optimizers.sparsity import L1SparsityConfig

    norm = torch.nn.BatchNorm1d(4)
    module = torch.nn.Sequential(norm)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([1.0, 0.01, 0.02, 2.0]))
    pressure = Pressure([Unit("0", ("0",))], L1SparsityConfig(strength=10.0, ratio=0.5))
    pressure(module, 0.01, 0.7)
    assert norm.weight[1:3].tolist() == [0.0, 0.0] and pressure.strength == 10.0, "ahead of the schedule: λ is not raised"
    kept = norm.weight.tolist()
    with torch.no_grad():
        norm.weight.add_(0.5)  # what an optimizer would do
    again = Pressure(pressure.units, pressure.config)
    again.restore(pressure.state())  # after a kill
    again(module, 0.01, 0.8)
    assert norm.weight.tolist() == pytest.approx([kept[0] + 0.5, 0.0, 0.0, kept[3] + 0.5])


def test_the_proximal_step_is_that_of_the_group_lasso(tmp_path: Path) -> None:
    import torch

    from optimizers.proximal import Pressure, Unit, shrinkage, spared, zero_channels
    from optimizers.sparsity import L1SparsityConfig

    norm = torch.nn.BatchNorm1d(4)
    module = torch.nn.Sequential(norm)
    with torch.no_grad():
        norm.weight.copy_(torch.tensor([3.0, 0.1, -0.2, 1.0]))
        norm.bias.copy_(torch.tensor([4.0, 0.1, 0.0, 0.0]))
    units = [Unit("0", ("0",))]
    Pressure(units, L1SparsityConfig(strength=0.5, ratio=0.75, reweighted=False))(module, 1.0, 0.6)
    first = 1 - 0.5 / 12.5**0.5  # the vector (3, 4) has a root mean square of √12.5
    assert norm.weight[:2].tolist() == pytest.approx([3 * first, 0.0]) and norm.bias[:2].tolist() == pytest.approx([4 * first, 0.0])
    assert norm.weight.tolist()[2] == 0.0 and zero_channels(module, units[0]) == [1, 2]
    length = torch.tensor([2.0, 0.4, 1.0, 0.6])  # their mean is 1
    found = shrinkage(length, 1, 0.1, 0.75, reweighted=True) * length
    assert found.tolist() == pytest.approx([2 - 0.1 / 2, 0.4 - 0.1 / 0.4, 1 - 0.1, 0.6 - 0.1 / 0.6])
    gone = [torch.zeros(4), torch.zeros(2)]
    [one, two] = spared([length, torch.tensor([10.0, 30.0])], gone, 0.5)
    assert one.tolist() == pytest.approx([0.9, 0.0, 0.9, 0.0]) and two.tolist() == pytest.approx([0.0, 0.9]), "the shortest of their groups"
