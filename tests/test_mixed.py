"""Mixed precision: the bits that each form promises stand in the graph, budgets are kept, and what is sensitive gets more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, TensorProto, numpy_helper

from optimizers import Artifact, Budget, NotApplicable, Samples, optimize
from optimizers.host import host_class
from optimizers.layer_times import seconds_of
from optimizers.layers import weighted_layers
from optimizers.mixed import Allotment, MixedPrecisionConfig
from optimizers.onnx_graph import set_constant
from tests.families import FAMILIES, built, error_of, keeps_the_contract, samples_of
from tests.onnx_models import I64, mlp, node, normal, resnet, value, weights, write

RECURRENT = ("w", "r")
"""Weights of the recurrent layer, which stays float."""
WIDE = {TensorProto.UINT16, TensorProto.INT16}


def kinds(path: Path) -> dict[str, int]:
    """Type of each weight as stored, by the name of the float weight it stands for."""
    found = {}
    for tensor in onnx.load(path).graph.initializer:
        if len(tensor.dims) > 1:
            found[tensor.name.removesuffix("_quantized").removesuffix(".float16").removesuffix(".int4")] = tensor.data_type
    return found


def activation_types(path: Path) -> set[int]:
    """Zero points' types of every QuantizeLinear."""
    graph = onnx.load(path).graph
    types = {tensor.name: tensor.data_type for tensor in graph.initializer}
    return {types[each.input[2]] for each in graph.node if each.op_type == "QuantizeLinear"}


@pytest.mark.parametrize("family", FAMILIES)
def test_eight_bit_weights_with_sixteen_bit_activations(family: str, tmp_path: Path) -> None:
    config = MixedPrecisionConfig(form="w8a16")
    artifact = built(FAMILIES[family], config, tmp_path)
    facts = keeps_the_contract(artifact, config)
    assert activation_types(artifact.path) <= WIDE and facts["activation_bits"] == 16
    stored = kinds(artifact.path)
    assert all(stored.pop(name, TensorProto.FLOAT) == TensorProto.FLOAT for name in RECURRENT)
    assert set(stored.values()) == {TensorProto.INT8} or (stored.pop("table") in WIDE and set(stored.values()) == {TensorProto.INT8})
    assert error_of(FAMILIES[family], artifact) < 0.02, "beyond the weights' 8 bits next to nothing is lost"


@pytest.mark.parametrize("family", ["resnet", "depthwise"])
def test_int8_convolutions_and_float16_linear_layers(family: str, tmp_path: Path) -> None:
    config = MixedPrecisionConfig(form="conv8-linear16")
    artifact = built(FAMILIES[family], config, tmp_path)
    facts = keeps_the_contract(artifact, config)
    stored = kinds(artifact.path)
    assert stored.pop("fc.w") == TensorProto.FLOAT16 and set(stored.values()) == {TensorProto.INT8} and len(stored) >= 3
    assert facts["precisions"]["fc"] == "float16" and not activation_types(artifact.path) & WIDE
    assert error_of(FAMILIES[family], artifact) < 0.06


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("allot", ["greedy", "exact"])
def test_precision_by_sensitivity_keeps_the_budget(family: str, allot: Allotment, tmp_path: Path) -> None:
    config = MixedPrecisionConfig(share=0.25 if family == "mlp" else 0.3, allot=allot, samples=32)
    artifact = built(FAMILIES[family], config, tmp_path)
    facts = keeps_the_contract(artifact, config)
    graph = onnx.load(artifact.path).graph
    stored = sum(len(t.raw_data) for t in graph.initializer if len(t.dims) > 1 and t.name not in RECURRENT)
    whole = sum(t.ByteSize() for t in FAMILIES[family].graph.initializer if len(t.dims) > 1 and t.name not in RECURRENT)
    assert stored <= config.share * whole
    assert len(set(facts["precisions"].values())) > 1 and set(facts["measured"]) == set(facts["precisions"])
    assert error_of(FAMILIES[family], artifact) < 0.12


def test_a_table_beside_convolutions_is_said_to_stay_float(tmp_path: Path) -> None:
    source = resnet(16)
    source.graph.initializer.extend(weights(table=normal(3, 50, 4)))
    source.graph.input.append(value("row", I64, ["N"]))
    source.graph.node[-1].output[0] = "plain"
    source.graph.node.extend([node("Gather", ["table", "row"], ["picked"], "lookup"), node("Add", ["plain", "picked"], ["logits"], "sum")])
    artifact = built(source, MixedPrecisionConfig(form="conv8-linear16"), tmp_path)
    precisions = artifact.facts[-1]["precisions"]
    assert kinds(artifact.path)["table"] == TensorProto.FLOAT and precisions["lookup"] == "float32" and precisions["fc"] == "float16"


def spoiled() -> ModelProto:
    """An MLP whose middle layer has large weights for an input that is always 0: no answer hangs on them, but they take the grids."""
    source = mlp((32, 64, 64, 10))
    first, bias, weight = (numpy_helper.to_array(t).copy() for t in source.graph.initializer[:3])
    first[:, 0] = bias[0] = 0
    weight[0] = 3
    for name, values in (("w0", first), ("b0", bias), ("w1", weight)):
        set_constant(source.graph, name, values)
    return source


def test_the_sensitive_layer_gets_more_bits(tmp_path: Path) -> None:
    config = MixedPrecisionConfig(precisions=("int4", "float16"), share=0.37)
    artifact = built(spoiled(), config, tmp_path / "a")
    precisions = artifact.facts[-1]["precisions"]
    assert precisions["gemm1"] == "float16" and precisions["gemm0"] == "int4"
    assert kinds(artifact.path)["w1"] == TensorProto.FLOAT16 and kinds(artifact.path)["w0"] == TensorProto.INT4
    assert error_of(spoiled(), artifact) < 0.25
    with pytest.raises(NotApplicable, match=r"outputs change by \d+%.*take a larger share"):
        built(spoiled(), MixedPrecisionConfig(precisions=("int4",), share=0.37), tmp_path / "b")


def test_a_budget_of_operations_asks_for_int8(tmp_path: Path) -> None:
    config = MixedPrecisionConfig(precisions=("int8", "float32"), share=0.5, count="operations")
    precisions = built(resnet(), config, tmp_path).facts[-1]["precisions"]
    assert set(precisions.values()) == {"int8", "float32"}
    all_float = built(resnet(), MixedPrecisionConfig(precisions=("float16", "float32"), share=0.9), tmp_path / "b")
    assert "QuantizeLinear" not in {n.op_type for n in onnx.load(all_float.path).graph.node}, "no activation is quantized for nothing"


def test_a_budget_of_time_goes_by_what_each_layer_takes_here(tmp_path: Path) -> None:
    source, config = resnet(32), MixedPrecisionConfig(precisions=("int8", "float32"), share=0.9, count="time", samples=32)
    try:
        facts = built(source, config, tmp_path).facts[-1]
    except NotApplicable as error:  # a host where int8 gains nothing
        assert "of float32 time is too small" in str(error)
        return
    seconds, precisions = facts["layer_seconds"], facts["precisions"]
    assert set(seconds) == set(precisions) and all(min(both) > 0 for both in seconds.values())
    taken = sum(seconds[layer][precision == "int8"] for layer, precision in precisions.items())
    assert taken <= 0.9 * sum(plain for plain, _ in seconds.values())
    assert all(seconds[layer][1] < seconds[layer][0] for layer, precision in precisions.items() if precision == "int8"), (
        "slower is never worth it"
    )


def test_layers_are_timed_one_by_one_and_those_alike_once(tmp_path: Path) -> None:
    source = resnet(32, size=16)
    layers = weighted_layers(source)
    seconds = seconds_of(source, layers, {"image": (1, 3, 16, 16)}, False, tmp_path, 1)
    assert set(seconds) == {layer.name for layer in layers} and all(min(both) > 0 for both in seconds.values())
    assert seconds["fc"][0] < min(plain for name, (plain, _) in seconds.items() if name != "fc"), "a small layer takes little"
    free = resnet(32)
    for axis in free.graph.input[0].type.tensor_type.shape.dim[2:]:
        axis.Clear()
        axis.dim_param = "any"
    with pytest.raises(NotApplicable, match="count=operations does not"):
        seconds_of(free, layers, None, False, tmp_path, 1)
    path = write(resnet(32), tmp_path / "model.onnx")
    budget = Budget(scratch=str(tmp_path / "scratch"), target="avx2" if "vnni" in host_class().key else "avx512_vnni")
    with pytest.raises(NotApplicable, match="measures on this host"):
        optimize(Artifact(path), MixedPrecisionConfig(count="time", samples=32), samples_of(resnet(32)), budget)


def test_where_it_does_not_apply(tmp_path: Path) -> None:
    with pytest.raises(NotApplicable, match="for models with convolutions and linear layers"):
        built(mlp(), MixedPrecisionConfig(form="conv8-linear16"), tmp_path)
    with pytest.raises(NotApplicable, match=r"a share of 0.05 of float32 bytes is too small: the cheapest choices cost \d+"):
        built(mlp(), MixedPrecisionConfig(share=0.05), tmp_path)
    with pytest.raises(NotApplicable, match="mixed-precision needs calibration inputs"):
        built(mlp(), MixedPrecisionConfig(), tmp_path, Samples({}))
    once = built(mlp(), MixedPrecisionConfig(form="w8a16"), tmp_path)
    with pytest.raises(NotApplicable, match=r"already quantized \(QDQ\)"):
        built(onnx.load(once.path), MixedPrecisionConfig(), tmp_path)
    rows = Samples({"x": normal(0, 32, 16)})
    assert built(mlp(), MixedPrecisionConfig(exclude=("gemm0",)), tmp_path, rows).facts[-1]["precisions"].keys() == {"gemm1"}
    assert np.isfinite(once.facts[-1]["output_error"])


@pytest.mark.parametrize(
    "wrong",
    [
        {"form": "w8a16", "calibration": "entropy"},
        {"form": "w8a16", "calibration": "mse"},
        {"form": "w4a4"},
        {"precisions": ()},
        {"precisions": ("int2",)},
        {"share": 0.0},
        {"allot": "best"},
        {"count": "energy"},
    ],
)
def test_wrong_configs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be|which w8a16 has not"):
        MixedPrecisionConfig(**wrong)
