"""The graph toolkit: what it rewrites answers as before, what it counts is right, and the same in gives the same out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto, TensorProto
from onnx.reference import ReferenceEvaluator

from optimizers import onnx_graph, prepare
from optimizers.base import NotApplicable
from optimizers.census import census, layer_costs, multiply_adds, quantization_of
from optimizers.onnx_file import checker_complaint, in_order
from tests.onnx_models import I64, F, encoder, mlp, model, node, normal, resnet, value, weights, write


def answers(built: ModelProto, **feeds: Any) -> list[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    return list(ort.InferenceSession(built.SerializeToString(), options).run(None, feeds))


def copy(built: ModelProto) -> ModelProto:
    twin = ModelProto()
    twin.CopyFrom(built)
    return twin


def test_batchnorm_is_folded_into_convolutions() -> None:
    built, x = resnet(), normal(1, 2, 3, 8, 8)
    folded = copy(built)
    assert onnx_graph.fold_batchnorm(folded) == 5
    assert "BatchNormalization" not in {n.op_type for n in folded.graph.node}
    assert np.allclose(answers(built, image=x)[0], answers(folded, image=x)[0], atol=1e-5)
    assert len(folded.graph.initializer) == 2 * 5 + 2, "the statistics are gone"


@pytest.mark.parametrize(
    ("layer", "shape", "weight"),
    [
        (node("ConvTranspose", ["x", "w", "b"], ["c"], group=2), (2, 4, 5, 5), (4, 3, 3, 3)),
        (node("Gemm", ["x", "w", "b"], ["c"], transB=1), (2, 4), (6, 4)),
        (node("Gemm", ["x", "w", "b"], ["c"]), (2, 4), (4, 6)),
    ],
)
def test_batchnorm_is_folded_into_other_layers(layer: onnx.NodeProto, shape: tuple[int, ...], weight: tuple[int, ...]) -> None:
    stats = {"g": [1, 2, 3, 4, 5, 6], "s": [0, 1, 0, 1, 0, 1], "m": [1, 0, 2, 0, 3, 0], "v": [1, 2, 1, 2, 1, 2]}
    tensors = weights(w=normal(0, *weight), b=normal(1, 6), **{k: np.array(v, "f4") for k, v in stats.items()})
    rank = len(shape)
    built = model(
        [layer, node("BatchNormalization", ["c", "g", "s", "m", "v"], ["y"])],
        [value("x", F, [None] * rank)],
        [value("y", F, [None] * rank)],
        tensors,
    )
    folded, x = copy(built), normal(2, *shape)
    assert onnx_graph.fold_batchnorm(folded) == 1
    assert np.allclose(answers(built, x=x)[0], answers(folded, x=x)[0], atol=1e-4)


def test_a_batchnorm_that_others_need_stays() -> None:
    nodes = [node("Conv", ["x", "w"], ["c"]), node("BatchNormalization", ["c", "g", "g", "g", "g"], ["n"]), node("Add", ["c", "n"], ["y"])]
    built = model(nodes, [value("x", F, ["N", 2, 3, 3])], [value("y", F, None)], weights(w=normal(0, 2, 2, 1, 1), g=np.ones(2, "f4")))
    assert onnx_graph.fold_batchnorm(built) == 0


def test_a_weight_shared_by_two_convolutions_is_folded_apart() -> None:
    nodes = [node("Conv", ["x", "w"], ["a"]), node("BatchNormalization", ["a", "g", "g", "g", "g"], ["b"]), node("Conv", ["b", "w"], ["y"])]
    built = model(nodes, [value("x", F, ["N", 2, 3, 3])], [value("y", F, None)], weights(w=normal(0, 2, 2, 1, 1), g=np.array([1, 2], "f4")))
    folded, x = copy(built), normal(1, 1, 2, 3, 3)
    assert onnx_graph.fold_batchnorm(folded) == 1
    assert np.allclose(answers(built, x=x)[0], answers(folded, x=x)[0], atol=1e-5)


def test_prepared_answers_as_before_and_shows_its_weights(tmp_path: Path) -> None:
    cases: list[tuple[ModelProto, dict[str, Any]]] = [
        (resnet(), {"image": normal(1, 2, 3, 8, 8)}),
        (encoder(), {"ids": np.arange(10).reshape(2, 5)}),
        (mlp(opset=9), {"x": normal(3, 2, 16)}),
    ]
    for index, (built, feeds) in enumerate(cases):
        (tmp_path / str(index)).mkdir()
        ready = prepare.prepared(copy(built), tmp_path / str(index)).model
        assert np.allclose(answers(built, **feeds)[0], answers(ready, **feeds)[0], atol=1e-5)
        assert onnx_graph.opset(ready) >= 13
        assert {entry.domain for entry in ready.opset_import} == {""}
        assert len({n.name for n in ready.graph.node}) == len(ready.graph.node)
        assert not {"Constant", "BatchNormalization"} & {n.op_type for n in ready.graph.node}


def test_an_initializer_that_is_an_input_becomes_a_weight(tmp_path: Path) -> None:
    built = model(
        [node("MatMul", ["x", "w"], ["y"])],
        [value("x", F, ["N", 4]), value("w", F, [4, 3])],
        [value("y", F, ["N", 3])],
        weights(w=normal(0, 4, 3)),
    )
    built.ir_version = 3
    ready = prepare.prepared(built, tmp_path)
    assert [v.name for v in ready.model.graph.input] == ["x"] and ready.facts["inputs_made_weights"] == ["w"]


def test_computing_constants_must_not_copy_a_shared_table(tmp_path: Path) -> None:
    nodes = [
        node("Gather", ["e", "ids"], ["t"]), node("ReduceMean", ["t"], ["u"], axes=[1], keepdims=0), node("Transpose", ["e"], ["et"], perm=[1, 0]),
        node("MatMul", ["u", "et"], ["y"]),
    ]  # fmt: skip
    built = model(nodes, [value("ids", I64, ["N", "L"])], [value("y", F, ["N", 500])], weights(e=normal(0, 500, 32)))
    ready = prepare.prepared(copy(built), tmp_path).model
    assert onnx_graph.weight_bytes(ready) < 1.1 * onnx_graph.weight_bytes(built)


@pytest.mark.parametrize("axes_as_input", [True, False])
def test_a_mean_over_the_image_is_a_pool(axes_as_input: bool) -> None:
    mean = node("ReduceMean", ["x", "axes"], ["y"]) if axes_as_input else node("ReduceMean", ["x"], ["y"], axes=[-1, -2])
    built = model(
        [mean],
        [value("x", F, ["N", 2, 4, 4])],
        [value("y", F, ["N", 2, 1, 1])],
        weights(axes=np.array([2, 3])),
        18 if axes_as_input else 17,
    )
    pooled, x = copy(built), normal(0, 3, 2, 4, 4)
    assert prepare.means_to_pools(pooled) == ["y"]
    assert np.allclose(answers(built, x=x)[0], answers(pooled, x=x)[0], atol=1e-6)
    other = model([node("ReduceMean", ["x"], ["y"], axes=[1, 2])], [value("x", F, ["N", 2, 4, 4])], [value("y", F, None)])
    assert prepare.means_to_pools(other) == []


def test_saving_is_deterministic_and_large_models_keep_their_weights_outside(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    built, x = mlp((64, 64, 4)), normal(0, 2, 64)
    first, second = (
        onnx_graph.save(built, tmp_path / "a" / "model.onnx"),
        onnx_graph.save(onnx_graph.load(tmp_path / "a" / "model.onnx"), tmp_path / "b.onnx"),
    )
    assert first.read_bytes() == second.read_bytes()
    monkeypatch.setattr(onnx_graph, "EXTERNAL_ABOVE", 1000)
    large = onnx_graph.save(copy(built), tmp_path / "c" / "model.onnx")
    assert sorted(p.name for p in large.parent.iterdir()) == ["model.onnx", "model.onnx.data"]
    assert np.array_equal(answers(built, x=x)[0], ort.InferenceSession(str(large)).run(None, {"x": x})[0])
    assert census(onnx_graph.load(large)).parameters == census(built).parameters


def test_nodes_are_sorted_for_readers_that_insist(tmp_path: Path) -> None:
    built = resnet()
    nodes = list(built.graph.node)[::-1]
    shuffled = copy(built)
    del shuffled.graph.node[:]
    shuffled.graph.node.extend(nodes)
    assert checker_complaint(write(shuffled, tmp_path / "m.onnx"))
    onnx_graph.sort_nodes(shuffled)
    assert checker_complaint(write(shuffled, tmp_path / "m.onnx")) == ""
    assert [n.name for n in in_order(built.graph)] == [n.name for n in built.graph.node], "what is in order stays as it is"


def test_multiply_adds_by_hand() -> None:
    layers = {n.name: cost for n, cost in layer_costs(resnet(), {"image": (1, 3, 8, 8)})}
    assert layers["stem.conv"] == 8 * 8 * 8 * 3 * 9
    assert layers["fc"] == 8 * 4
    assert multiply_adds(mlp((16, 32, 10))) == 16 * 32 + 32 * 10
    length, width = 7, 16
    expected = length * width * width * 4 + 2 * length * length * width + 2 * length * width * 2 * width + width * 3
    assert multiply_adds(encoder(), {"ids": (1, length)}) == expected
    grouped = model(
        [node("Conv", ["x", "w"], ["y"], group=4, strides=[2, 2])],
        [value("x", F, ["N", 8, 9, 9])],
        [value("y", F, None)],
        weights(w=normal(0, 8, 2, 3, 3)),
    )
    assert multiply_adds(grouped) == 8 * 4 * 4 * 2 * 9
    unknown = model([node("NonZero", ["x"], ["n"]), node("Cast", ["n"], ["f"], to=F), node("MatMul", ["f", "w"], ["y"])], [value("x", F, ["N", 4])], [value("y", F, None)], weights(w=normal(0, 4, 4)))  # fmt: skip
    assert multiply_adds(unknown) is None


def test_parameters_and_nonzeros_of_float_and_quantized_weights() -> None:
    w = normal(0, 4, 4)
    w[0] = 0
    counted = census(
        model([node("MatMul", ["x", "w"], ["y"])], [value("x", F, ["N", 4])], [value("y", F, None)], weights(w=w, shape=np.array([1, 2])))
    )
    assert (counted.parameters, counted.nonzeros, counted.weight_bytes) == (16, 12, 64)
    q = np.full((4, 4), 128, np.uint8)
    q[1] = 7
    nodes = [node("DequantizeLinear", ["q", "s", "z"], ["w"]), node("MatMul", ["x", "w"], ["y"])]
    quantized = model(nodes, [value("x", F, ["N", 4])], [value("y", F, None)], weights(q=q, s=np.float32(1), z=np.uint8(128)))
    counted = census(quantized)
    assert (counted.parameters, counted.nonzeros, counted.weight_bytes) == (16, 4, 16)
    assert quantization_of(quantized) == "weights only"


@pytest.mark.parametrize(
    ("op_type", "domain", "how"),
    [("QuantizeLinear", "", "QDQ"), ("QLinearConv", "", "integer operators"), ("DynamicQuantizeLinear", "", "dynamic"), ("MatMulNBits", "com.microsoft", "weights only"), ("Relu", "", "")],
)  # fmt: skip
def test_quantized_models_are_known_by_their_operators(op_type: str, domain: str, how: str) -> None:
    assert quantization_of(model([node(op_type, ["x"], ["y"], domain=domain)], [value("x", F, [1])], [value("y", F, [1])])) == how


def test_an_opset_that_cannot_be_raised_is_not_applicable() -> None:
    norm = node("BatchNormalization", ["x", "g", "g", "g", "g"], ["y"], spatial=0)
    built = model([norm], [value("x", F, ["N", 4])], [value("y", F, None)], weights(g=np.ones(4, "f4")), 8)
    with pytest.raises(NotApplicable, match="operator set 8"):
        onnx_graph.upgrade_opset(built)


def test_biases_of_one_element_are_written_out() -> None:
    built = model(
        [node("Gemm", ["x", "w", "b"], ["y"], transB=1)],
        [value("x", F, ["N", 4])],
        [value("y", F, ["N", 3])],
        weights(w=normal(0, 3, 4), b=np.array([0.25], "f4")),
    )
    widened, x = copy(built), normal(1, 2, 4)
    assert prepare.widen_biases(widened) == ["y.bias"]
    assert np.allclose(next(iter(ReferenceEvaluator(built).run(None, {"x": x}))), answers(widened, x=x)[0], atol=1e-6)
    assert onnx_graph.initializers(widened.graph)["y.bias"].data_type == TensorProto.FLOAT
