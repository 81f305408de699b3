"""Graph optimization: answers stay, the best level is kept by measurement, and where nothing changes or gains it says so."""

from __future__ import annotations

from collections import Counter
from math import inf
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import pytest
from onnx import ModelProto

from optimizers import Artifact, Budget, NotApplicable, Samples, graph_levels, optimize
from optimizers.graph import GraphConfig, Level
from optimizers.graph_levels import Variant, fastest, no_gain, told
from optimizers.inspect import Request, inspect
from optimizers.int8 import Int8StaticConfig
from optimizers.onnx_file import SERVE_AT
from optimizers.stats import Interval
from tests.onnx_models import F, encoder, mlp, model, node, normal, resnet, value, weights, write

NOTHING = Samples({})


@pytest.fixture(autouse=True)
def short_timing(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second for each comparison: levels here differ by a factor, or are not to be told apart."""
    monkeypatch.setattr(graph_levels, "SECONDS_EACH", 1.0)


def optimized(built: ModelProto, config: GraphConfig, folder: Path, samples: Samples = NOTHING, **budget: Any) -> Artifact:
    path = write(built, folder / "model.onnx")
    return optimize(Artifact(path), config, samples, Budget(scratch=str(folder / "scratch"), **budget))


def kinds(path: Path) -> Counter[str]:
    return Counter(n.op_type for n in onnx.load(path).graph.node)


@pytest.mark.parametrize("level", ["basic", "extended", "all"])
def test_a_named_level_is_built_with_the_same_answers(level: Level, tmp_path: Path) -> None:
    artifact = optimized(resnet(), GraphConfig(level=level), tmp_path)
    x = normal(1, 3, 3, 8, 8)
    expected, seen = (ort.InferenceSession(str(p)).run(None, {"image": x})[0] for p in (tmp_path / "model.onnx", artifact.path))
    assert np.allclose(expected, seen, atol=1e-5)
    facts = artifact.facts[-1]
    assert facts["nodes"] < facts["nodes_before"] and "BatchNormalization" not in kinds(artifact.path)
    assert facts["output_error"] <= 1e-4 and level in facts["measured"]
    assert facts["portable"] == (level != "all")
    assert facts["custom_domains"] == {"basic": [], "extended": ["com.microsoft"], "all": ["com.microsoft.nchwc"]}[level]
    assert artifact.extra["settings"]["graph_level"] == "none" and facts["serve"] == {"graph_level": "none"}


def test_a_baked_file_is_inspected_and_served_as_it_stands(tmp_path: Path) -> None:
    artifact = optimized(resnet(), GraphConfig(level="extended"), tmp_path)
    assert {p.key: p.value for p in onnx.load(artifact.path).metadata_props}[SERVE_AT] == "none"
    assert inspect(Request(str(artifact.path)), Budget()).serving.graph_level == "none"


def test_transformer_blocks_are_fused(tmp_path: Path) -> None:
    artifact = optimized(encoder(), GraphConfig(level="basic"), tmp_path, Samples({"ids": np.arange(40).reshape(4, 10)}))
    assert artifact.facts[-1]["fused"] == {"Gelu": 1, "SkipLayerNormalization": 1} or artifact.facts[-1]["level"] == "basic"
    if artifact.facts[-1]["fused"]:
        assert kinds(artifact.path)["SkipLayerNormalization"] == 1
    ids = np.arange(12).reshape(2, 6)
    expected, seen = (ort.InferenceSession(str(p)).run(None, {"ids": ids})[0] for p in (tmp_path / "model.onnx", artifact.path))
    assert np.allclose(expected, seen, atol=1e-5)


def test_a_model_of_whole_calls_is_timed_with_one(tmp_path: Path) -> None:
    """Its first axis is no batch: four images at once are what it takes, and a scalar has no axis at all."""
    whole = resnet()
    whole.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    whole.graph.input.append(value("gain", F, []))
    whole.graph.node.append(node("Mul", ["logits", "gain"], ["scaled"]))
    whole.graph.output[0].name = "scaled"
    samples = Samples({"image": normal(1, 2, 4, 3, 8, 8), "gain": normal(2, 2)}, stacked=False)
    assert "extended" in optimized(whole, GraphConfig(level="extended"), tmp_path, samples).facts[-1]["measured"]


def test_fusions_can_be_left_out(tmp_path: Path) -> None:
    artifact = optimized(encoder(), GraphConfig(level="basic", fusions=False), tmp_path)
    assert artifact.facts[-1]["level"] == "basic" and artifact.facts[-1]["fused"] == {}


def test_no_gain_is_an_ordinary_result_with_its_numbers(tmp_path: Path) -> None:
    """The parent is served with all optimizations already, so baking them in gains nothing; 99 % cannot be gained."""
    with pytest.raises(NotApplicable, match=r"no gain: CPU time relative .* \(level all\): .*extended \d\.\d+ \("):
        optimized(resnet(), GraphConfig(least_gain=0.99), tmp_path)


def test_auto_takes_the_fastest_where_the_parent_is_served_slowly(tmp_path: Path) -> None:
    path = write(resnet(16, 3, 16), tmp_path / "model.onnx")
    parent = Artifact(path, extra={"settings": {"graph_level": "none"}})
    artifact = optimize(parent, GraphConfig(), NOTHING, Budget(scratch=str(tmp_path / "scratch")))
    measured = artifact.facts[-1]["measured"]
    proven = [name for name, ratio in measured.items() if (ratio["high"] or 1.0) < 0.98]  # one may end without bounds on a busy host
    assert artifact.facts[-1]["level"] == min(proven, key=lambda name: measured[name]["estimate"])


def test_a_graph_that_cannot_be_optimized_further_says_so(tmp_path: Path) -> None:
    plain = model([node("Relu", ["x"], ["y"])], [value("x", F, ["N", 4])], [value("y", F, ["N", 4])])
    with pytest.raises(NotApplicable, match="changes nothing; basic: changes nothing; extended: changes nothing"):
        optimized(plain, GraphConfig(), tmp_path)


def test_levels_that_change_the_answers_are_dropped(tmp_path: Path) -> None:
    """Int8 kernels round once where QDQ rounds twice: not bit-close, so levels that fuse them are no lossless change."""
    path = write(resnet(), tmp_path / "model.onnx")
    samples = Samples({"image": normal(0, 32, 3, 8, 8)})
    quantized = optimize(Artifact(path), Int8StaticConfig(), samples, Budget(scratch=str(tmp_path / "a")))
    try:
        artifact = optimize(quantized, GraphConfig(), samples, Budget(scratch=str(tmp_path / "b")))
    except NotApplicable as reason:
        assert "changes the outputs by" in str(reason) or "no gain" in str(reason) or "same as" in str(reason)
    else:
        assert artifact.facts[-1]["output_error"] <= 1e-4


def test_for_another_class_of_host_only_portable_levels_are_built_untimed(tmp_path: Path) -> None:
    artifact = optimized(resnet(), GraphConfig(), tmp_path, target="i8mm")
    facts = artifact.facts[-1]
    assert facts["portable"] and not facts["proven_here"] and facts["measured"] == {} and facts["level"] in {"basic", "extended"}


def test_an_int8_resize_keeps_its_answer(tmp_path: Path) -> None:
    nodes = [
        node("QuantizeLinear", ["x", "s", "z"], ["a"]), node("DequantizeLinear", ["a", "s", "z"], ["b"]),
        node("Resize", ["b", "", "", "sizes"], ["r"], mode="linear", coordinate_transformation_mode="half_pixel"),
        node("QuantizeLinear", ["r", "s", "z"], ["q"]), node("DequantizeLinear", ["q", "s", "z"], ["y"]),
    ]  # fmt: skip
    tensors = weights(sizes=np.array([1, 1, 1, 6]), s=np.float32(1), z=np.int8(0))
    built = model(nodes, [value("x", F, [1, 1, 1, 3])], [value("y", F, [1, 1, 1, 6])], tensors)
    x = np.array([2, 7, 4], "f4").reshape(1, 1, 1, 3)
    try:
        path = optimized(built, GraphConfig(level="all"), tmp_path, Samples({"x": x[None]}, stacked=False)).path
    except NotApplicable as reason:
        assert "changes the outputs" in str(reason) or "changes nothing" in str(reason)
    else:
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        expected, seen = (ort.InferenceSession(str(p), options).run(None, {"x": x})[0] for p in (tmp_path / "model.onnx", path))
        assert np.array_equal(expected, seen)


def test_a_model_that_takes_no_input_we_can_make_up_says_so(tmp_path: Path) -> None:
    nodes = [node("Reshape", ["x", "shape"], ["r"]), node("Relu", ["r"], ["y"])]
    built = model(nodes, [value("x", F, ["N", "M"])], [value("y", F, None)], weights(shape=np.array([-1, 4099])))
    with pytest.raises(NotApplicable, match="no input could be made up"):
        optimized(built, GraphConfig(), tmp_path)


def test_the_small_mlp_is_reported_level_by_level() -> None:
    timed = [Variant("basic", Path("b"), 0.0, {}, Interval(1.5, 1.4, 1.6)), Variant("all", Path("a"), 0.0, {}, Interval(0.7, 0.6, 0.8))]
    assert told(timed) == "basic 1.50 (1.40 to 1.60), all 0.70 (0.60 to 0.80)" and no_gain(timed) == "no gain"
    assert "too busy" in no_gain([*timed, Variant("fused", Path("f"), 0.0, {}, Interval(0.5, 0.0, inf))])
    loud = [
        Variant("extended", Path("e"), 0.0, {}, Interval(0.96, 0.94, 0.97)),
        Variant("all", Path("a"), 0.0, {}, Interval(0.5, 0.0, inf)),
    ]
    assert fastest(loud, 0.02).name == "extended" and fastest(loud, 0.1).name == "all" and not loud[1].gains(0.02)
    assert GraphConfig(level="all") == GraphConfig("all", True, 0.02) and mlp().graph.node
    with pytest.raises(ValueError, match="level must be one of"):
        GraphConfig(level="most")  # type: ignore[arg-type]
