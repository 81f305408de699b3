"""What the check of a file finds and refuses: on real files, each with its right value. Most run in this process; two in a real task child."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

import optimizers.inspect
from optimizers.base import Budget, Cancelled, Rejected
from optimizers.host import host_class
from optimizers.inspect import Report, Request, inspect
from optimizers.samples import Samples
from optimizers.task import Failure, TaskFailed, TaskLimits, run_task_sync
from tests.onnx_models import I64, F, encoder, mlp, model, node, normal, resnet, value, weights, write


def check(built: onnx.ModelProto, folder: Path, **request: Any) -> Report:
    return inspect(Request(str(write(built, folder / "model.onnx")), **request), Budget())


def external(folder: Path) -> Path:
    path = folder / "model.onnx"
    onnx.save_model(mlp((64, 64, 4)), str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    return path


def test_a_good_model_is_described_whole(tmp_path: Path) -> None:
    report = check(resnet(), tmp_path)
    assert [(t.name, t.datatype, t.shape) for t in report.inputs] == [("image", "FP32", (-1, 3, 8, 8))]
    assert [(t.name, t.datatype, t.shape) for t in report.outputs] == [("logits", "FP32", (-1, 4))]
    assert report.batchable and report.rows.batches == (1, 2, 3, 5, 17)
    assert report.serving.graph_level == "all" and report.serving.reference_level == "none"
    assert report.quantized == "" and report.custom_domains == () and report.opsets == {"": 17}
    convolutions = 8 * 8 * 9 * (8 * 3 + 4 * 8 * 8)
    assert report.census.multiply_adds == convolutions + 8 * 4
    assert report.census.parameters == 9 * (8 * 3 + 4 * 8 * 8) + 5 * 4 * 8 + 8 * 4 + 4


@pytest.mark.parametrize(("built", "sizes"), [(mlp(), (16,)), (encoder(), (16,))])
def test_rows_of_ordinary_models_are_proven(built: onnx.ModelProto, sizes: tuple[int, ...], tmp_path: Path) -> None:
    report = check(built, tmp_path)
    assert report.batchable, report.rows.reason
    assert next(iter(report.row_shapes.values())) == (1, *sizes)


def test_made_up_integers_are_such_as_the_model_takes(tmp_path: Path) -> None:
    """x / d fails where d is 0: what is made up must hold no zero, neither in the one row nor in a batch."""
    inputs = [value("x", I64, ["N"]), value("d", I64, ["N"])]
    report = check(model([node("Div", ["x", "d"], ["y"])], inputs, [value("y", I64, ["N"])]), tmp_path)
    assert report.batchable, report.rows.reason
    assert report.integers == (1, 2)


TIME_FIRST = model([node("CumSum", ["x", "axis"], ["y"])], [value("x", F, ["T", 4])], [value("y", F, ["T", 4])], weights(axis=np.int64(0)))
OVER_BATCH = model(
    [node("ReduceMean", ["x"], ["m"], axes=[0]), node("Sub", ["x", "m"], ["y"])], [value("x", F, ["N", 4])], [value("y", F, ["N", 4])]
)
HARD_ONE = model(
    [node("Squeeze", ["x", "axes"], ["f"]), node("Mul", ["x", "f"], ["y"])],
    [value("x", F, ["N", 4])],
    [value("y", F, ["N", 4])],
    weights(axes=np.array([0])),
)
FIXED = model([node("Relu", ["x"], ["y"])], [value("x", F, [1, 4])], [value("y", F, [1, 4])])
SCALAR = model([node("Mul", ["x", "s"], ["y"])], [value("x", F, ["N"]), value("s", F, [])], [value("y", F, ["N"])])
FIRST_ROW = model(
    [node("Gather", ["x", "zero"], ["f"]), node("Mul", ["x", "f"], ["y"])],
    [value("x", F, ["N", 4])],
    [value("y", F, ["N", 4])],
    weights(zero=np.int64(0)),
)
FLATTENED = model(
    [node("Reshape", ["x", "shape"], ["y"])], [value("x", F, ["N", 4])], [value("y", F, ["M"])], weights(shape=np.array([-1]))
)
RANDOM = model(
    [node("RandomNormalLike", ["x"], ["r"]), node("Add", ["x", "r"], ["y"])], [value("x", F, ["N", 4])], [value("y", F, ["N", 4])]
)
OUTLIER = model([node("ReduceMax", ["x"], ["m"], keepdims=0), node("Greater", ["m", "big"], ["b"]), node("Cast", ["b"], ["c"], to=F), node("Add", ["x", "c"], ["y"])], [value("x", F, ["N", 4])], [value("y", F, ["N", 4])], weights(big=np.float32(100)))  # fmt: skip
DYNAMIC = model(
    [node("DynamicQuantizeLinear", ["x"], ["q", "s", "z"]), node("DequantizeLinear", ["q", "s", "z"], ["y"])],
    [value("x", F, ["N", 4])],
    [value("y", F, ["N", 4])],
)


@pytest.mark.parametrize(
    ("built", "reason"),
    [
        (TIME_FIRST, "differs by .* position"),
        (OVER_BATCH, "differs by .* position 0 of 2 rows"),
        (FIRST_ROW, "differs by"),
        (OUTLIER, "1,000 times larger"),
        (HARD_ONE, "batch of 2 fails"),
        (FIXED, "'x' has its first axis fixed to 1"),
        (SCALAR, "'s' is a scalar"),
        (FLATTENED, "first axis is not the batch"),
        (RANDOM, "is random"),
        (DYNAMIC, "whole batch"),
    ],
    ids=[
        "time first",
        "over the batch",
        "first row",
        "outlier",
        "hard-coded one",
        "fixed",
        "scalar",
        "flattened",
        "random",
        "dynamic int8",
    ],
)
def test_rows_that_are_not_independent_are_found(built: onnx.ModelProto, reason: str, tmp_path: Path) -> None:
    report = check(built, tmp_path)
    assert not report.batchable
    assert re.search(reason, report.rows.reason), report.rows.reason


def test_a_heavy_model_is_proven_on_fewer_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optimizers.inspect, "SLOW_ROW_S", 0.0)
    report = check(resnet(), tmp_path / "a")
    assert report.batchable and report.rows.batches == (1, 2, 3)
    assert not check(OVER_BATCH, tmp_path / "b").batchable and not check(OUTLIER, tmp_path / "c").batchable


def test_the_owner_may_state_rows_but_not_against_the_shapes(tmp_path: Path) -> None:
    stated = check(OVER_BATCH, tmp_path / "a", rows="independent")
    assert stated.batchable and stated.rows.stated and any("seen here" in n for n in stated.notes)
    assert not check(mlp(), tmp_path / "b", rows="dependent").batchable
    assert not check(FIXED, tmp_path / "c", rows="independent").batchable


def test_a_weight_listed_as_input_is_a_weight_or_optional(tmp_path: Path) -> None:
    w = normal(0, 4, 3)
    built = model(
        [node("MatMul", ["x", "w"], ["y"])], [value("x", F, ["N", 4]), value("w", F, [4, 3])], [value("y", F, ["N", 3])], weights(w=w)
    )
    report = check(built, tmp_path / "a")
    assert [t.name for t in report.inputs] == ["x"] and any("(w)" in n for n in report.notes)
    kept = check(built, tmp_path / "b", initializer_inputs="optional")
    assert [(t.name, t.optional) for t in kept.inputs] == [("x", False), ("w", True)]


def test_owners_samples_give_sizes_and_values(tmp_path: Path) -> None:
    built = model(
        [node("Gather", ["t", "i"], ["e"]), node("ReduceSum", ["e", "axes"], ["y"], keepdims=0)], [value("i", I64, ["N", "L"])], [value("y", F, ["N", 2])],
        weights(t=normal(0, 9, 2), axes=np.array([1])),
    )  # fmt: skip
    Samples({"i": np.arange(30).reshape(6, 5) % 9}).save(tmp_path / "samples.npz")
    report = check(built, tmp_path, samples=str(tmp_path / "samples.npz"))
    assert report.batchable and report.row_shapes == {"i": (1, 5)}


def test_a_missing_data_file_is_named_with_the_remedy(tmp_path: Path) -> None:
    path = external(tmp_path)
    assert inspect(Request(str(path)), Budget()).files == ("model.onnx", "model.onnx.data")
    data = tmp_path / "model.onnx.data"
    whole = data.read_bytes()
    data.write_bytes(whole[:-8])
    with pytest.raises(Rejected, match=r"'model.onnx.data' has \d+ bytes.*cut short"):
        inspect(Request(str(path)), Budget())
    data.unlink()
    with pytest.raises(Rejected, match=r"'model.onnx.data', which is missing: .*both"):
        inspect(Request(str(path)), Budget())


def test_a_linked_data_file_must_end_inside_an_allowed_root(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    path = external(tmp_path / "model")
    elsewhere = tmp_path / "blobs" / "d"
    elsewhere.parent.mkdir()
    os.replace(path.parent / "model.onnx.data", elsewhere)
    (path.parent / "model.onnx.data").symlink_to(elsewhere)
    with pytest.raises(Rejected, match="is a link"):
        inspect(Request(str(path)), Budget())
    with pytest.raises(Rejected, match="is a link"):
        inspect(Request(str(path), link_roots=(str(path.parent),)), Budget())
    with pytest.raises(Rejected, match="links out of the model's folder"):
        inspect(Request(str(path), link_roots=(str(elsewhere.parent),)), Budget())


@pytest.mark.parametrize(
    ("location", "rule"),
    [("/etc/passwd", "absolute"), ("../secret", "own folder"), ("a/../../b", "own folder"), ("sub/data", "own folder"), ("C:\\x", "absolute"), ("*/_ORT_MEM_ADDR_/*", "own folder"), ("", "no file name")],
)  # fmt: skip
def test_external_data_stays_in_the_models_folder(location: str, rule: str, tmp_path: Path) -> None:
    built = mlp()
    tensor = built.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    tensor.external_data.add(key="location", value=location)
    with pytest.raises(Rejected, match=rule):
        check(built, tmp_path)


def test_external_data_hidden_in_a_subgraph_or_attribute_is_found(tmp_path: Path) -> None:
    tensor = TensorProto(name="t", data_type=F, dims=[4], data_location=TensorProto.EXTERNAL)
    tensor.external_data.add(key="location", value="../secret")
    body = helper.make_graph([helper.make_node("Constant", [], ["c"], value=tensor)], "b", [], [value("c", F, [4])])
    built = model([node("If", ["b"], ["y"], then_branch=body, else_branch=body)], [value("b", TensorProto.BOOL, [])], [value("y", F, [4])])
    with pytest.raises(Rejected, match="own folder"):
        check(built, tmp_path)


@pytest.mark.parametrize("content", [b"", b"not a model", b"\x08\x08", b"\0" * 1000, b"<html>404</html>", b"\x3a\xff\xff\xff\xff\x0f"])
def test_what_is_no_model_is_refused(content: bytes, tmp_path: Path) -> None:
    (tmp_path / "model.onnx").write_bytes(content)
    with pytest.raises(Rejected, match=r"model\.onnx"):
        inspect(Request(str(tmp_path / "model.onnx")), Budget())


def test_cut_and_flipped_files_never_pass_the_check_by_crashing(tmp_path: Path) -> None:
    """Every answer to a damaged file is a Rejected, or a report of what can still be served."""
    whole = resnet().SerializeToString()
    rng = np.random.default_rng(0)
    refused = 0
    for i in range(40):
        damaged = bytearray(whole[: int(rng.integers(1, len(whole)))] if i % 2 else whole)
        for at in rng.integers(0, min(len(damaged), 1500), 3):
            damaged[at] ^= 1 << int(rng.integers(0, 8))
        path = tmp_path / "model.onnx"
        path.write_bytes(bytes(damaged))
        try:
            run_task_sync("inspect", {"path": str(path)}, TaskLimits(seconds=60)) if i < 3 else inspect(Request(str(path)), Budget())
        except (Rejected, TaskFailed) as error:
            refused += 1
            assert not isinstance(error, TaskFailed) or error.kind in {Failure.REJECTED, Failure.DIED}, error
    assert refused > 20


def test_a_broken_half_conversion_names_the_node(tmp_path: Path) -> None:
    nodes = [node("Cast", ["i"], ["c"], "cast_left", to=F), node("Mul", ["c", "w"], ["y"], "mul")]
    built = model(nodes, [value("i", I64, ["N"])], [value("y", TensorProto.FLOAT16, ["N"])], weights(w=np.float16(2)))
    built.graph.value_info.append(value("c", TensorProto.FLOAT16, ["N"]))
    with pytest.raises(Rejected, match="cast_left") as caught:
        check(built, tmp_path)
    assert str(tmp_path) not in str(caught.value), "a message to a caller tells no paths"


def test_an_input_without_any_shape_is_refused_with_the_remedy(tmp_path: Path) -> None:
    bare = model([node("Identity", ["x"], ["y"])], [helper.make_tensor_value_info("x", F, None)], [value("y", F, None)])
    with pytest.raises(Rejected, match="input 'x' has no shape"):
        check(bare, tmp_path)
    assert check(model([node("Abs", ["x"], ["y"])], [value("x", F, [])], [value("y", F, [])]), tmp_path).inputs[0].shape == ()


def test_what_is_made_up_for_many_free_axes_stays_small(tmp_path: Path) -> None:
    axes = [f"a{axis}" for axis in range(10)]
    report = check(model([node("Identity", ["x"], ["y"])], [value("x", F, axes)], [value("y", F, axes)]), tmp_path)
    assert report.batchable and np.prod(report.row_shapes["x"]) < 1 << 22


def test_unknown_operators_and_types_are_refused_with_the_reason(tmp_path: Path) -> None:
    custom = model([node("Frobnicate", ["x"], ["y"], domain="acme.ops")], [value("x", F, ["N"])], [value("y", F, ["N"])])
    with pytest.raises(Rejected, match=r"acme\.ops"):
        check(custom, tmp_path / "a")
    sequence = helper.make_tensor_sequence_value_info("y", F, None)
    built = model([node("SequenceConstruct", ["x"], ["y"])], [value("x", F, ["N"])], [sequence])
    with pytest.raises(Rejected, match=r"'y' is a seq.*tensors only"):
        check(built, tmp_path / "b")


@pytest.mark.parametrize(
    "kind", [TensorProto.STRING, TensorProto.BFLOAT16, TensorProto.BOOL, TensorProto.UINT64, TensorProto.FLOAT16, TensorProto.DOUBLE]
)
def test_every_datatype_of_the_protocol_passes(kind: int, tmp_path: Path) -> None:
    report = check(model([node("Identity", ["x"], ["y"])], [value("x", kind, ["N", 3])], [value("y", kind, ["N", 3])]), tmp_path)
    assert report.batchable, report.rows.reason


def test_a_model_that_agrees_at_no_level_but_none_is_served_so(tmp_path: Path) -> None:
    """An int8 layer of extreme weights: without VNNI the fused kernel saturates, and the precise one or no fusion must be chosen."""
    q = np.full((64, 8), 127, np.int8)
    nodes = [
        node("QuantizeLinear", ["x", "s", "zx"], ["xq"]), node("DequantizeLinear", ["xq", "s", "zx"], ["xd"]),
        node("DequantizeLinear", ["wq", "s", "zw"], ["wd"]), node("MatMul", ["xd", "wd"], ["m"], "saturates"),
        node("QuantizeLinear", ["m", "so", "zx"], ["mq"]), node("DequantizeLinear", ["mq", "so", "zx"], ["y"]),
    ]  # fmt: skip
    tensors = weights(s=np.float32(0.01), so=np.float32(1.0), zx=np.uint8(0), zw=np.int8(0), wq=q)
    built = model(nodes, [value("x", F, ["N", 64])], [value("y", F, ["N", 8])], tensors)
    Samples({"x": np.full((8, 64), 2.5, np.float32)}).save(tmp_path / "s.npz")
    report = check(built, tmp_path, samples=str(tmp_path / "s.npz"))
    assert report.quantized == "QDQ" and report.serving.error <= 0.05
    if host_class().int8_saturates:
        assert report.serving.session_options == (("session.x64quantprecision", "1"),), report.serving.reason
    else:
        assert report.serving.session_options == ()


@pytest.mark.parametrize("shape", [[1 << 40, 1 << 20], [1 << 62, 1 << 62, 1 << 62]])
def test_an_input_that_no_memory_holds_is_told_as_such(tmp_path: Path, shape: list[int]) -> None:
    path = write(model([node("Relu", ["x"], ["y"])], [value("x", F, shape)], [value("y", F, shape)]), tmp_path / "model.onnx")
    with pytest.raises(TaskFailed, match="needs more memory than its bound") as caught:
        run_task_sync("inspect", {"path": str(path)}, TaskLimits(memory_bytes=1 << 30))
    assert caught.value.kind is Failure.OUT_OF_MEMORY


def test_memory_is_bounded_at_the_first_run(tmp_path: Path) -> None:
    nodes = [node("ConstantOfShape", ["n"], ["big"]), node("ReduceSum", ["big"], ["s"], keepdims=0), node("Mul", ["x", "s"], ["y"])]
    path = write(model(nodes, [value("x", F, ["N"])], [value("y", F, ["N"])], weights(n=np.array([1 << 30]))), tmp_path / "model.onnx")
    with pytest.raises(TaskFailed, match="1024 MiB") as caught:
        run_task_sync("inspect", {"path": str(path)}, TaskLimits(memory_bytes=1 << 30))
    assert caught.value.kind is Failure.OUT_OF_MEMORY
    good = run_task_sync("inspect", {"path": str(write(mlp(), tmp_path / "good.onnx"))}, TaskLimits(memory_bytes=1 << 30))
    assert good["batchable"] is True and good["inputs"] == [{"name": "x", "datatype": "FP32", "shape": [-1, 16], "optional": False}]


def test_cancelling_is_obeyed(tmp_path: Path) -> None:
    path = write(mlp(), tmp_path / "model.onnx")
    with pytest.raises(Cancelled):
        inspect(Request(str(path)), Budget(cancelled=lambda: True))
