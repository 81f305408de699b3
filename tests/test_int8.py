"""int8, static and dynamic: right answers in the host's form, bounded calibration, reasons where a method does not apply."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from optimizers import Artifact, Budget, Cancelled, NotApplicable, Progress, Samples, optimize
from optimizers.base import Config
from optimizers.calibration import BINS, Calibration, Statistics, calibrate, choose_range
from optimizers.difference import root_mean_square
from optimizers.host import host_class
from optimizers.int8 import Calibrator, Int8DynamicConfig, Int8StaticConfig, Switch, form_for
from optimizers.onnx_file import checker_complaint
from optimizers.task import Failure, TaskFailed, TaskLimits, run_task_sync
from optimizers.uniform import affine_grid
from tests.onnx_models import I64, F, encoder, mlp, model, node, normal, recurrent, resnet, value, weights, write


def samples_of(built: ModelProto, count: int = 64) -> Samples:
    rng = np.random.default_rng(5)
    arrays: dict[str, NDArray[Any]] = {}
    for entry in built.graph.input:
        shape = [count, *(dim.dim_value or 8 for dim in entry.type.tensor_type.shape.dim[1:])]
        integers = entry.type.tensor_type.elem_type == I64
        arrays[entry.name] = rng.integers(0, 50, shape) if integers else rng.standard_normal(shape).astype(np.float32)
    return Samples(arrays)


def answers(path: Path, feeds: dict[str, NDArray[Any]], precise: bool = False) -> list[Any]:
    options = ort.SessionOptions()
    if precise:
        options.add_session_config_entry("session.x64quantprecision", "1")
    return list(ort.InferenceSession(str(path), options).run(None, feeds))


def built(source: ModelProto, config: Config, folder: Path, samples: Samples | None = None, **budget: Any) -> Artifact:
    path = write(source, folder / "model.onnx")
    return optimize(
        Artifact(path), config, samples_of(source) if samples is None else samples, Budget(scratch=str(folder / "scratch"), **budget)
    )


def error_of(source: ModelProto, artifact: Artifact, precise: bool = False) -> float:
    assert artifact.golden is not None
    feeds = samples_of(source, 96).rows(slice(64, 96)).inputs
    return root_mean_square(answers(artifact.golden, feeds), answers(artifact.path, feeds, precise))


@pytest.mark.parametrize("source", [resnet(), mlp((16, 64, 64, 10)), encoder()], ids=["resnet", "mlp", "encoder"])
@pytest.mark.parametrize("per_channel", [True, False])
def test_static_answers_nearly_as_the_parent(source: ModelProto, per_channel: bool, tmp_path: Path) -> None:
    artifact = built(source, Int8StaticConfig(per_channel=per_channel), tmp_path)
    assert error_of(source, artifact) < 0.06
    kinds = [n.op_type for n in onnx.load(artifact.path).graph.node]
    assert "QuantizeLinear" in kinds and "BatchNormalization" not in kinds
    assert checker_complaint(artifact.path) == ""
    facts = artifact.facts[-1]
    assert facts["quantized_layers"] > 0 and facts["calibration_samples"] == 64 and facts["output_error"] < 0.06
    assert artifact.recipe == (Int8StaticConfig(per_channel=per_channel).to_json(),)
    session, parent = ort.InferenceSession(str(artifact.path)), ort.InferenceSession(str(artifact.golden))
    assert [(i.name, i.shape, i.type) for i in session.get_inputs()] == [(i.name, i.shape, i.type) for i in parent.get_inputs()]
    assert [o.name for o in session.get_outputs()] == [o.name for o in parent.get_outputs()]


def test_weights_are_8_bits_and_the_file_is_four_times_smaller(tmp_path: Path) -> None:
    source = mlp((128, 256, 256, 10))
    artifact = built(source, Int8StaticConfig(), tmp_path)
    assert artifact.path.stat().st_size < 0.3 * (tmp_path / "model.onnx").stat().st_size
    floats = [t for t in onnx.load(artifact.path).graph.initializer if t.data_type == F and np.prod(t.dims) > 256]
    assert floats == []


@pytest.mark.parametrize("calibration", ["minmax", "moving_average", "percentile", "entropy", "mse"])
def test_every_calibration_builds_a_good_model(calibration: Calibrator, tmp_path: Path) -> None:
    source = resnet()
    assert error_of(source, built(source, Int8StaticConfig(calibration=calibration), tmp_path)) < 0.15


def test_reduced_range_is_seven_bits_and_follows_the_target(tmp_path: Path) -> None:
    source = mlp((16, 64, 10))
    assert form_for("", "auto").reduce_range == host_class().int8_saturates
    assert form_for("avx2", "auto").reduce_range and not form_for("vnni", "auto").reduce_range
    assert form_for("asimddp", "auto").signed_activations and not form_for("avx2", "on").signed_activations
    for target, most in (("avx2", 64), ("vnni", 127)):
        artifact = built(source, Int8StaticConfig(), tmp_path / target, target=target)
        largest = max(
            int(np.abs(numpy_helper.to_array(t)).max())
            for t in onnx.load(artifact.path).graph.initializer
            if t.name.endswith("_quantized") and t.name.startswith("w")
        )
        assert largest in {most, most - 1, most + 1}
        assert artifact.facts[-1]["proven_here"] == (form_for(target, "auto").target.split("-ort")[0] == host_class().key.split("-ort")[0])


def test_the_form_for_this_host_does_not_saturate(tmp_path: Path) -> None:
    """Large weights and activations of one sign: the usual form clips on x86 without VNNI; the chosen one must not, anywhere."""
    w = np.full((64, 8), 1.0, np.float32) + normal(0, 64, 8, scale=0.01)
    source = model(
        [node("MatMul", ["x", "w"], ["m"]), node("Relu", ["m"], ["y"])], [value("x", F, ["N", 64])], [value("y", F, ["N", 8])], weights(w=w)
    )
    x = np.random.default_rng(0).uniform(0.9, 1.0, (64, 64)).astype(np.float32)
    artifact = built(source, Int8StaticConfig(), tmp_path, Samples({"x": x}))
    expected, seen = answers(tmp_path / "model.onnx", {"x": x})[0], answers(artifact.path, {"x": x})[0]
    assert np.abs(seen - expected).max() / expected.max() < 0.02


def test_sensitive_layers_stay_float_when_asked(tmp_path: Path) -> None:
    source = resnet()
    for tensor in source.graph.initializer:
        if tensor.name == "fc.w":  # one huge weight per tensor ruins a per-tensor grid
            spoiled = numpy_helper.to_array(tensor).copy()
            spoiled[0, 0] = 500.0
            tensor.CopyFrom(numpy_helper.from_array(spoiled, "fc.w"))
    artifact = built(source, Int8StaticConfig(per_channel=False, keep_float=1), tmp_path / "kept")
    facts = artifact.facts[-1]
    assert facts["kept_float"] == ["fc"] and next(iter(facts["sensitivity"])) == "fc"
    assert len(facts["sensitivity"]) == 6 and facts["quantized_layers"] == 5
    plain = built(source, Int8StaticConfig(per_channel=False), tmp_path / "plain")
    assert error_of(source, artifact) < error_of(source, plain)


def test_one_layer_is_quantized_however_many_are_to_stay_float(tmp_path: Path) -> None:
    artifact = built(mlp((16, 64, 64, 10)), Int8StaticConfig(keep_float=4), tmp_path)
    assert artifact.facts[-1]["quantized_layers"] == 1 and len(artifact.facts[-1]["kept_float"]) == 2
    assert any(each.op_type == "DequantizeLinear" for each in onnx.load(artifact.path).graph.node)


@pytest.mark.parametrize(("kind", "layers"), [("LSTM", 4), ("GRU", 3)])
def test_dynamic_takes_an_lstm_and_leaves_a_gru_float(kind: str, layers: int, tmp_path: Path) -> None:
    source = recurrent(kind)
    artifact = built(source, Int8DynamicConfig(), tmp_path)
    operators = [each.op_type for each in onnx.load(artifact.path).graph.node]
    assert artifact.facts[-1]["quantized_layers"] == layers == operators.count("MatMulInteger") + operators.count("DynamicQuantizeLSTM")
    assert artifact.path.stat().st_size < artifact.facts[-1]["bytes_before"] and error_of(source, artifact) < 0.05


@pytest.mark.parametrize("config", [Int8StaticConfig(), Int8DynamicConfig()], ids=lambda config: config.method)
def test_a_recurrent_layer_that_stays_float_is_no_smaller_file(config: Config, tmp_path: Path) -> None:
    nodes = [node("GRU", ["x", "w", "r"], ["", "h"], "gru", hidden_size=32), node("Squeeze", ["h", "first"], ["s"], "squeeze")]
    nodes.append(node("Gemm", ["s", "head"], ["y"], "head"))
    tensors = weights(w=normal(0, 1, 96, 16, scale=0.2), r=normal(1, 1, 96, 32, scale=0.2), first=np.array([0]), head=normal(2, 32, 4))
    source = model(nodes, [value("x", F, [5, "N", 16])], [value("y", F, ["N", 4])], tensors)
    whole = Samples({"x": normal(3, 8, 5, 1, 16)}, stacked=False)
    with pytest.raises(NotApplicable, match=r"the file would not shrink: .* the largest of them r \[1, 96, 32\]"):
        built(source, config, tmp_path, whole)


def test_a_model_counts_with_the_data_that_lies_beside_it(tmp_path: Path) -> None:
    """Newer exporters write the weights of any model into a file of their own: what is left beside is no size to be smaller than."""
    nodes = [node("GRU", ["x", "w", "r"], ["", "h"], "gru", hidden_size=32), node("Squeeze", ["h", "first"], ["s"], "squeeze")]
    nodes.append(node("Gemm", ["s", "head"], ["y"], "head"))
    tensors = weights(w=normal(0, 1, 96, 16, scale=0.2), r=normal(1, 1, 96, 32, scale=0.2), first=np.array([0]), head=normal(2, 32, 128))
    source = model(nodes, [value("x", F, [5, "N", 16])], [value("y", F, ["N", 128])], tensors)
    whole = Samples({"x": normal(3, 8, 5, 1, 16)}, stacked=False)
    inside = built(source, Int8StaticConfig(), tmp_path / "inside", whole).facts[-1]
    path = tmp_path / "beside" / "model.onnx"
    path.parent.mkdir()
    onnx.save_model(source, str(path), save_as_external_data=True, location="model.onnx.data", size_threshold=0)
    beside = optimize(Artifact(path), Int8StaticConfig(), whole, Budget(scratch=str(tmp_path / "scratch"))).facts[-1]
    assert beside["bytes_before"] > 30_000 > path.stat().st_size
    assert beside["float_left"] == inside["float_left"] == [] and beside["quantized_layers"] == inside["quantized_layers"] == 1


@pytest.mark.parametrize("reduce_range", ["off", "on"])
def test_a_table_that_is_the_heads_weight_too_has_one_scale_and_one_copy(reduce_range: Switch, tmp_path: Path) -> None:
    """As PyTorch exports an embedding tied to its head: the channels of the head may not scale the rows of the table."""
    nodes = [
        node("Gather", ["table", "ids"], ["e"], "gather"), node("ReduceMean", ["e"], ["m"], "mean", axes=[1], keepdims=0),
        node("Gemm", ["m", "table"], ["y"], "head", transB=1),
    ]  # fmt: skip
    source = model(nodes, [value("ids", I64, ["N", 6])], [value("y", F, ["N", 400])], weights(table=normal(0, 400, 32)))
    artifact = built(source, Int8StaticConfig(reduce_range=reduce_range), tmp_path)
    assert artifact.facts[-1]["quantized_layers"] == 2 and error_of(source, artifact) < 0.03
    large = [t for t in onnx.load(artifact.path).graph.initializer if len(t.dims) == 2]
    assert [(t.data_type, list(t.dims)) for t in large] == [(onnx.TensorProto.INT8, [400, 32])]


def test_excluded_nodes_stay_float(tmp_path: Path) -> None:
    artifact = built(mlp((16, 32, 32, 4)), Int8StaticConfig(exclude=("gemm1",)), tmp_path)
    assert "w1" in {t.name for t in onnx.load(artifact.path).graph.initializer}
    assert artifact.facts[-1]["kept_float"] == ["gemm1"]


def test_tiny_weights_and_a_bias_of_one_element(tmp_path: Path) -> None:
    rng = np.random.default_rng(29)
    nodes = [
        node("Conv", ["x", "w", "b"], ["c"], "conv"),
        node("Flatten", ["c"], ["f"], "flat"),
        node("Gemm", ["f", "g", "one"], ["y"], "gemm", transB=1),
    ]
    w, g = (rng.normal(size=(2, 2, 1, 1)) * 1e-8).astype("f4"), rng.normal(size=(3, 32)).astype("f4")
    tensors = weights(w=w, b=np.array([5, -4.5], "f4"), g=g, one=np.array([0.25], "f4"))
    source = model(nodes, [value("x", F, ["N", 2, 4, 4])], [value("y", F, ["N", 3])], tensors)
    for per_channel in (True, False):
        artifact = built(source, Int8StaticConfig(per_channel=per_channel), tmp_path / str(per_channel))
        feeds = samples_of(source, 8).inputs
        expected, seen = answers(tmp_path / str(per_channel) / "model.onnx", feeds)[0], answers(artifact.path, feeds)[0]
        assert np.abs(seen - expected).max() / np.abs(expected).max() < 0.02


@pytest.mark.parametrize("config", [Int8StaticConfig(), Int8DynamicConfig()])
def test_what_is_quantized_already_is_left_alone(config: Config, tmp_path: Path) -> None:
    source = mlp()
    for index, how in enumerate((Int8StaticConfig(), Int8DynamicConfig())):
        once = built(source, how, tmp_path / str(index))
        with pytest.raises(NotApplicable, match="already quantized"):
            optimize(once, config, samples_of(source), Budget(scratch=str(tmp_path)))


def test_an_initializer_that_is_an_input_is_quantized_and_said_so(tmp_path: Path) -> None:
    source = model(
        [node("MatMul", ["x", "w"], ["y"])],
        [value("x", F, ["N", 4]), value("w", F, [4, 3])],
        [value("y", F, ["N", 3])],
        weights(w=normal(0, 4, 3)),
    )
    artifact = built(source, Int8StaticConfig(), tmp_path, Samples({"x": normal(1, 64, 4)}))
    assert artifact.facts[-1]["prepared"]["inputs_made_weights"] == ["w"]
    assert [i.name for i in ort.InferenceSession(str(artifact.path)).get_inputs()] == ["x"]


def test_static_says_why_it_does_not_apply(tmp_path: Path) -> None:
    source = mlp()
    with pytest.raises(NotApplicable, match="needs calibration inputs"):
        built(source, Int8StaticConfig(), tmp_path / "a", Samples({}))
    with pytest.raises(NotApplicable, match="lack the input 'x'; they have z"):
        built(source, Int8StaticConfig(), tmp_path / "b", Samples({"z": normal(0, 8, 16)}))
    empty = model([node("Relu", ["x"], ["y"])], [value("x", F, ["N", 4])], [value("y", F, ["N", 4])])
    with pytest.raises(NotApplicable, match="no convolution, matrix product"):
        built(empty, Int8StaticConfig(), tmp_path / "c")
    overflowing = model(
        [node("Exp", ["x"], ["e"]), node("MatMul", ["e", "w"], ["y"])],
        [value("x", F, ["N", 4])],
        [value("y", F, ["N", 2])],
        weights(w=normal(0, 4, 2)),
    )
    with pytest.raises(NotApplicable, match="activations of 'e' are not finite"):
        built(overflowing, Int8StaticConfig(), tmp_path / "d", Samples({"x": np.full((8, 4), 1000, "f4")}))


def test_a_hopeless_result_names_the_layer(tmp_path: Path) -> None:
    """A difference of nearly equal numbers is lost in 8 bits."""
    nodes = [node("MatMul", ["x", "a"], ["p"], "first"), node("MatMul", ["x", "b"], ["q"], "second"), node("Sub", ["p", "q"], ["y"])]
    a = normal(0, 8, 4)
    source = model(nodes, [value("x", F, ["N", 8])], [value("y", F, ["N", 4])], weights(a=a, b=a + normal(1, 8, 4, scale=1e-4)))
    with pytest.raises(NotApplicable, match=r"worst layer is '(first|second)'"):
        built(source, Int8StaticConfig(), tmp_path)


def test_dynamic_is_for_linear_models(tmp_path: Path) -> None:
    source = mlp((32, 64, 8))
    artifact = built(source, Int8DynamicConfig(), tmp_path / "a")
    assert error_of(source, artifact) < 0.05
    assert artifact.facts[-1]["rows"].startswith("dependent") and artifact.facts[-1]["quantized_layers"] == 2
    assert artifact.path.stat().st_size < 0.6 * (tmp_path / "a" / "model.onnx").stat().st_size
    with pytest.raises(NotApplicable, match=r"\d+% of its work is in convolutions.*int8-static"):
        built(resnet(), Int8DynamicConfig(), tmp_path / "b")
    with pytest.raises(NotApplicable, match="nothing to quantize"):
        built(
            model([node("Relu", ["x"], ["y"])], [value("x", F, ["N", 4])], [value("y", F, ["N", 4])]), Int8DynamicConfig(), tmp_path / "c"
        )


def test_a_tied_table_shrinks_the_file(tmp_path: Path) -> None:
    nodes = [
        node("Gather", ["e", "ids"], ["t"], "gather"), node("ReduceMean", ["t"], ["u"], "mean", axes=[1], keepdims=0),
        node("Transpose", ["e"], ["et"], "tr", perm=[1, 0]), node("MatMul", ["u", "et"], ["y"], "head"),
    ]  # fmt: skip
    source = model(nodes, [value("ids", I64, ["N", "L"])], [value("y", F, ["N", 500])], weights(e=normal(0, 500, 64)))
    for config in (Int8DynamicConfig(), Int8StaticConfig()):
        artifact = built(source, config, tmp_path / config.method)
        assert artifact.path.stat().st_size < 0.6 * (tmp_path / config.method / "model.onnx").stat().st_size
        assert error_of(source, artifact) < 0.05


def test_the_same_inputs_give_the_same_file(tmp_path: Path) -> None:
    for config in (Int8StaticConfig(calibration="entropy"), Int8DynamicConfig()):
        files = [built(mlp(), config, tmp_path / f"{config.method}{i}").path.read_bytes() for i in range(2)]
        assert files[0] == files[1]


def test_calibration_is_streamed_within_a_memory_bound(tmp_path: Path) -> None:
    """56 samples of 16 MB of activations, 900 MB in all, with 700 MB for everything; held at once they do not fit (the control)."""
    nodes, tensors, name = [], [], "x"
    for i in range(8):
        tensors += weights(**{f"w{i}": normal(i, 16, 16 if i else 3, 1, 1, scale=0.3)})
        nodes += [node("Conv", [name, f"w{i}"], [f"c{i}"], f"conv{i}"), node("Relu", [f"c{i}"], [f"r{i}"])]
        name = f"r{i}"
    nodes.append(node("GlobalAveragePool", [name], ["y"], "gap"))
    path = write(model(nodes, [value("x", F, ["N", 3, 128, 128])], [value("y", F, ["N", 16, 1, 1])], tensors), tmp_path / "model.onnx")
    Samples({"x": normal(0, 56, 3, 128, 128)}).save(tmp_path / "calibration.npz")
    order = {
        "path": str(path),
        "recipe": [{"method": "int8-static", "calibration": "entropy"}],
        "samples": {"calibration": str(tmp_path / "calibration.npz")},
        "scratch": str(tmp_path),
    }
    limits = TaskLimits(seconds=300, memory_bytes=700 << 20)
    seen: list[Progress] = []
    result = run_task_sync("optimize", order, limits, seen.append)
    assert result["facts"][0]["calibration_samples"] == 56
    assert {"ranges", "histograms"} & {p.step for p in seen}
    with pytest.raises(TaskFailed) as caught:
        run_task_sync("tests.task_kinds:takes_memory", {"bytes": 56 * 16 << 20}, limits)
    assert caught.value.kind is Failure.OUT_OF_MEMORY


def test_cancelling_and_time_are_obeyed_in_calibration(tmp_path: Path) -> None:
    source = resnet()
    steps: list[str] = []

    def cancelled() -> bool:
        return "ranges" in steps

    with pytest.raises(Cancelled, match="during ranges"):
        built(source, Int8StaticConfig(), tmp_path, on_progress=lambda p: steps.append(p.step), cancelled=cancelled)


# ---- calibration itself
def statistics_of(values: NDArray[Any], averaging: float = 0.05) -> Statistics:
    kept = Statistics()
    kept.extend(values, averaging)
    kept.count(values, 1 << 20)
    return kept


def test_streamed_ranges_are_those_of_all_values_together(tmp_path: Path) -> None:
    source = mlp((16, 32, 4))
    samples = samples_of(source, 100)
    ranges = calibrate(source, ["x", "h0", "r0", "y"], samples, Calibration(), tmp_path, lambda step, share: None)
    hidden = samples.inputs["x"] @ numpy_helper.to_array(source.graph.initializer[0]) + numpy_helper.to_array(source.graph.initializer[1])
    assert ranges["h0"] == pytest.approx((hidden.min(), hidden.max()), rel=1e-5)
    assert ranges["r0"] == pytest.approx((0.0, hidden.max()), rel=1e-5)
    assert ranges["x"] == pytest.approx((samples.inputs["x"].min(), samples.inputs["x"].max()))


def test_moving_average_by_hand() -> None:
    kept = Statistics()
    kept.extend(np.array([[0.0, 10.0], [-2.0, 20.0]]), 0.5)
    assert choose_range(kept, Calibration("moving_average")) == (-1.0, 15.0)
    kept.extend(np.array([[-4.0, 5.0]]), 0.5)
    assert choose_range(kept, Calibration("moving_average")) == (-2.5, 10.0)
    assert choose_range(kept, Calibration("minmax")) == (-4.0, 20.0)


def test_percentile_cuts_the_tails_and_only_those_there_are() -> None:
    rng = np.random.default_rng(0)
    both = statistics_of(rng.standard_normal((1, 100_000)))
    low, high = choose_range(both, Calibration("percentile", 99.0))
    step = (both.high - both.low) / BINS
    assert low == pytest.approx(-2.576, abs=0.1 + step) and high == pytest.approx(2.576, abs=0.1 + step)
    positive = statistics_of(np.abs(rng.standard_normal((1, 100_000))))
    low, high = choose_range(positive, Calibration("percentile", 99.0))
    assert low == pytest.approx(positive.low) and high == pytest.approx(2.576, abs=0.15)
    assert choose_range(both, Calibration("percentile", 100.0)) == pytest.approx((both.low, both.high))


@pytest.mark.parametrize("method", ["entropy", "percentile"])
def test_one_outlier_does_not_take_the_range(method: str) -> None:
    values = np.random.default_rng(0).standard_normal((1, 200_000))
    values[0, 0] = 60.0
    low, high = choose_range(statistics_of(values), Calibration(method))
    assert 2.5 < high < 20 and -6 < low < -2.5


def test_mse_is_no_worse_than_any_range_it_could_have_chosen() -> None:
    values = np.random.default_rng(1).laplace(size=(1, 50_000))
    kept = statistics_of(values)
    low, high = choose_range(kept, Calibration("mse"))

    def error(bottom: float, top: float) -> float:
        grid = affine_grid(bottom, top, 8)
        codes = np.clip(np.rint(values / grid.scale) + grid.zero_point, 0, 255)
        return float(np.mean((values - (codes - grid.zero_point) * grid.scale) ** 2))

    assert error(low, high) < error(kept.low, kept.high)
    assert error(low, high) < 1.05 * min(error(low * t, high * t) for t in (0.7, 0.8, 0.9, 1.1, 1.2))


def test_many_zeros_do_not_narrow_the_range() -> None:
    values = np.maximum(np.random.default_rng(0).standard_normal((1, 400_000)), 0)
    assert choose_range(statistics_of(values), Calibration("entropy"))[1] > 2.5
    assert choose_range(statistics_of(values), Calibration("percentile", 99.0))[1] == pytest.approx(2.326, abs=0.15), "zeros are values too"


def test_a_constant_tensor_has_its_own_value_as_range() -> None:
    for method in ("minmax", "percentile", "entropy", "mse"):
        assert choose_range(statistics_of(np.full((2, 8), 3.0)), Calibration(method)) == (3.0, 3.0)
