"""Whether a candidate may stand in for golden, and whether it is anything new."""

from __future__ import annotations

from pathlib import Path

import onnx
import pytest

from optimizers.arm import Opened
from optimizers.sameness import interface_objections, same_model
from optimizers.session import Settings, TensorInfo, open_session, tensors
from tests.judged_models import mlp, mlp_weights, noisy, tokens_model


def opened(path: Path) -> Opened:
    session = open_session(path, Settings())
    return Opened(tensors(session.get_inputs()), tensors(session.get_outputs()), 0.0)


def test_other_names_remarks_and_symbols_make_no_other_model(tmp_path: Path) -> None:
    one, other = mlp(tmp_path / "a.onnx"), mlp(tmp_path / "b.onnx", prefix="renamed/", batch="rows")
    model = onnx.load(other)
    model.producer_name, model.doc_string = "somebody", "built again"
    model.metadata_props.add(key="made", value="today")
    model.graph.initializer[0].float_data.extend(onnx.numpy_helper.to_array(model.graph.initializer[0]).ravel())
    model.graph.initializer[0].ClearField("raw_data")
    onnx.save(model, other)
    assert one.read_bytes() != other.read_bytes()
    assert same_model(one, other)


def test_one_other_weight_or_operator_makes_another_model(tmp_path: Path) -> None:
    weights = mlp_weights((16, 32, 5))
    one = mlp(tmp_path / "a.onnx", weights=weights)
    assert not same_model(one, mlp(tmp_path / "b.onnx", weights=noisy(weights, 1e-6)))
    model = onnx.load(one)
    model.graph.node[1].op_type = "Tanh"
    onnx.save(model, tmp_path / "c.onnx")
    assert not same_model(one, tmp_path / "c.onnx")


def test_a_frozen_batch_is_an_objection_that_says_so(tmp_path: Path) -> None:
    golden, frozen = opened(mlp(tmp_path / "a.onnx")), opened(mlp(tmp_path / "b.onnx", batch=1))
    assert any("the batch is frozen" in text and "dynamic shapes" in text for text in interface_objections(golden, frozen))
    assert interface_objections(frozen, golden) == []


def test_a_frozen_length_is_an_objection(tmp_path: Path) -> None:
    golden, frozen = opened(tokens_model(tmp_path / "a.onnx")), opened(tokens_model(tmp_path / "b.onnx", length=12))
    assert any("axis 1 is frozen" in text for text in interface_objections(golden, frozen))


@pytest.mark.parametrize(
    ("now", "says"),
    [
        (TensorInfo("z", "tensor(float)", ("n", 4)), "'x' of golden is missing"),
        (TensorInfo("x", "tensor(double)", ("n", 4)), "is tensor(double)"),
        (TensorInfo("x", "tensor(float)", ("n", 5)), "has size 5 on axis 1"),
        (TensorInfo("x", "tensor(float)", ("n", 4, 1)), "has shape"),
    ],
)
def test_names_types_and_shapes_are_goldens(now: TensorInfo, says: str) -> None:
    was = Opened((TensorInfo("x", "tensor(float)", ("n", 4)),), (), 0.0)
    assert any(says in text for text in interface_objections(was, Opened((now,), (), 0.0)))
