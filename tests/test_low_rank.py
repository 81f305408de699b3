"""Layers split in two or three: on the ONNX graph without torch, and in PyTorch; only where it pays."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest

from optimizers import Artifact, Budget, NotApplicable, Samples, optimize
from optimizers.factors import Layer
from optimizers.low_rank import LowRankConfig, TuckerConfig
from optimizers.onnx_graph import set_constant
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
    return Samples({"x": normal(0, 8, 64)})


def test_rank_is_the_least_that_keeps_the_energy() -> None:
    weight = np.diag([3.0, 2.0, 1.0, 1.0]).astype(np.float32)  # energies 9, 4, 1, 1 of 15
    layer = Layer("w", weight)
    ranks = {energy: layer.rank_of(energy) for energy in (0.5, 0.6, 0.7, 0.86, 0.9, 0.95)}
    assert ranks == {0.5: 1, 0.6: 1, 0.7: 2, 0.86: 2, 0.9: 3, 0.95: 4}
    a, b = layer.factors(2)
    assert layer.kept[1] == pytest.approx(13 / 15) and float(((a @ b - weight) ** 2).sum()) == pytest.approx(2.0, rel=1e-5)


def convolutions(path: Path, rank: int) -> Path:
    """Two convolutions with all that a convolution may have, the first of this rank as a matrix, and a grouped one."""
    helper, value = onnx.helper, onnx.helper.make_tensor_value_info
    nodes = [
        helper.make_node(
            "Conv", ["x", "w0", "b0"], ["h0"], name="wide", kernel_shape=[3, 3], strides=[2, 1], pads=[1, 2, 0, 1], dilations=[1, 2]
        ),
        helper.make_node("Relu", ["h0"], ["h1"], name="relu"),
        helper.make_node("Conv", ["h1", "w1"], ["h2"], name="grouped", group=4, kernel_shape=[1, 1]),
        helper.make_node("Conv", ["h2", "w2"], ["y"], name="point"),
    ]
    weights = {
        "w0": thin(3, 24, 8 * 9, rank).reshape(24, 8, 3, 3), "b0": normal(1, 24), "w1": normal(2, 24, 6, 1, 1), "w2": normal(4, 16, 24, 1, 1),
    }  # fmt: skip
    graph = helper.make_graph(
        nodes, "g", [value("x", 1, ["n", 8, 12, 12])], [value("y", 1, ["n", 16, None, None])],
        [onnx.numpy_helper.from_array(array.astype(np.float32), name) for name, array in weights.items()],
    )  # fmt: skip
    return write(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=10), path)


def test_a_convolution_of_low_rank_is_split_without_loss_whatever_its_strides(tmp_path: Path) -> None:
    path, x = convolutions(tmp_path / "m.onnx", 5), normal(9, 3, 8, 12, 12)
    samples = Samples({"x": x})
    made = optimize(Artifact(path), LowRankConfig(energy=0.999999, split="fewer"), samples, Budget(scratch=str(tmp_path / "s")))
    facts = made.facts[-1]
    assert [(s["layer"], s["shape"], s["rank"]) for s in facts["split"]] == [("wide", (72, 24), 5)]
    assert [s["layer"] for s in facts["left"]] == ["point"], "the grouped one is none of these layers"
    assert np.allclose(run(made.path, x), run(path, x), atol=1e-3)
    assert facts["after"]["multiply_adds"] < facts["before"]["multiply_adds"]


def test_images_have_the_size_of_the_samples_rows_or_whole_calls(tmp_path: Path) -> None:
    path, x = convolutions(tmp_path / "m.onnx", 5), normal(9, 3, 8, 12, 12)
    free = onnx.load(path)
    for axis in (2, 3):
        free.graph.input[0].type.tensor_type.shape.dim[axis].dim_param = f"free{axis}"
    write(free, path)
    before = []
    for samples in (Samples({"x": x}), Samples({"x": x[:, None]}, stacked=False)):
        budget = Budget(scratch=str(tmp_path / "s"))
        before.append(optimize(Artifact(path), LowRankConfig(energy=0.999999, split="fewer"), samples, budget).facts[-1]["before"])
    assert before[0] == before[1] and before[0]["multiply_adds"] > 100_000


def test_a_rank_for_a_speed_is_the_largest_that_reaches_it(tmp_path: Path) -> None:
    path = model_of_rank(tmp_path / "m.onnx", (1024, 1024, 4), 8)
    ranks = {}
    for speed in (1.5, 4.0):
        budget = Budget(scratch=str(tmp_path / f"s{speed}"))
        facts = optimize(Artifact(path), LowRankConfig(rank="speed", speed=speed, rows=64), torch_free(), budget).facts[-1]
        [found] = [s for s in facts["split"] if s["layer"] == "gemm0"]
        assert found["ratio"] < 1.25 / speed, "timed anew, give or take"
        ranks[speed] = found["rank"]
    assert ranks[1.5] > ranks[4.0] >= 64
    with pytest.raises(NotApplicable, match=r"no layer is better off split at 500 × the speed: gemm0 \[16, 32\]"):
        config = LowRankConfig(rank="speed", speed=500)
        optimize(Artifact(write(mlp(), tmp_path / "full.onnx")), config, torch_free().rows([]), Budget(scratch=str(tmp_path / "f")))


def test_by_sensitivity_operations_go_where_the_outputs_change_least(tmp_path: Path) -> None:
    path = model_of_rank(tmp_path / "m.onnx", (64, 256, 256), 4)  # the first matrix loses nothing at rank 16, the second much
    config = LowRankConfig(rank="sensitivity", ratio=0.14, split="fewer")
    facts = optimize(Artifact(path), config, torch_free(), Budget(scratch=str(tmp_path / "s"))).facts[-1]
    assert [s["layer"] for s in facts["split"]] == ["gemm0"] and facts["split"][0]["loss"] < 1e-6
    losses = {(c["layer"], c["rank"]): c["loss"] for c in facts["curves"]}
    assert len(losses) == 6 and min(loss for (layer, _), loss in losses.items() if layer == "gemm1") > 1e-3
    with pytest.raises(NotApplicable, match=r"there are none: name samples\.calibration"):
        optimize(Artifact(path), config, torch_free().rows([]), Budget(scratch=str(tmp_path / "none")))
    with pytest.raises(NotApplicable, match=r"99% of the multiply-adds cannot go"):
        optimize(Artifact(path), LowRankConfig(rank="sensitivity", ratio=0.99), torch_free(), Budget(scratch=str(tmp_path / "much")))


def test_layers_are_split_only_where_that_is_faster_here(tmp_path: Path) -> None:
    budget = Budget(scratch=str(tmp_path / "s"))
    large = model_of_rank(tmp_path / "large.onnx", (1024, 1024, 4), 8)
    made = optimize(Artifact(large), LowRankConfig(energy=0.999), torch_free().rows([]), budget)
    assert [s["layer"] for s in made.facts[-1]["split"]] == ["gemm0"] and made.facts[-1]["split"][0]["ratio"] < 0.95
    with pytest.raises(
        NotApplicable, match=r"no layer is better off split at 100% of its energy: gemm0 \[16, 32\] rank 16, more operations"
    ):
        optimize(Artifact(write(mlp(), tmp_path / "full.onnx")), LowRankConfig(energy=0.99999), torch_free(), budget)
    for wrong in ({"energy": 1.0}, {"split": "never"}, {"rows": 0}, {"rank": "guess"}, {"speed": 1.0}, {"ratio": 0.0}):
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
