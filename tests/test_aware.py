"""Accuracy-aware int8: as few float layers as the floor needs, judged on rows that calibrated nothing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import ModelProto, numpy_helper

from optimizers import NotApplicable, Samples
from optimizers.aware import Int8AwareConfig
from optimizers.aware_search import same, search
from optimizers.codebook import CodebookConfig
from optimizers.int8 import Int8StaticConfig
from optimizers.low_rank import LowRankConfig
from optimizers.onnx_graph import set_constant
from tests.families import FAMILIES, answers, built, error_of, keeps_the_contract, samples_of
from tests.onnx_models import mlp, resnet


def spoiled() -> ModelProto:
    """A residual network whose head adds a huge number to all classes alike: no answer hangs on it, but it takes the grid for itself."""
    source = resnet()
    weight = next(numpy_helper.to_array(t).copy() for t in source.graph.initializer if t.name == "fc.w")
    weight[0] = 500.0
    set_constant(source.graph, "fc.w", weight)
    return source


def test_the_layer_that_spoils_it_stays_float(tmp_path: Path) -> None:
    samples = samples_of(spoiled(), 160)
    config = Int8AwareConfig(floor=0.97, per_channel=False)
    artifact = built(spoiled(), config, tmp_path, samples)
    facts = keeps_the_contract(artifact, config)
    assert facts["kept_float"] == ["fc"] and facts["agreement"] >= 0.97 > facts["tried"][0][1]
    assert "fc.w" in {t.name for t in onnx.load(artifact.path).graph.initializer}
    plain = built(spoiled(), Int8StaticConfig(per_channel=False), tmp_path / "plain", samples)
    fresh = samples_of(spoiled(), 64, seed=6).inputs
    expected, kept, lost = (answers(path, fresh)[0] for path in (tmp_path / "model.onnx", artifact.path, plain.path))
    assert same(expected, kept).mean() > 0.9 and same(expected, lost).mean() < 0.3
    with pytest.raises(NotApplicable, match=r"agreement reaches [\d.]+% with 0 layers in float \(none\), and the floor is 97.0%"):
        built(spoiled(), Int8AwareConfig(floor=0.97, per_channel=False, most=0), tmp_path, samples)


def test_outputs_whose_shape_hangs_on_the_numbers_are_told_of(tmp_path: Path) -> None:
    """What passes a threshold is counted anew in int8: there is no closeness to be had, and no error of numpy's either."""
    source = mlp((16, 64, 10))
    source.graph.node[-1].output[0] = "scores"
    source.graph.node.append(onnx.helper.make_node("NonZero", ["kept"], ["found"], "found"))
    source.graph.node.insert(len(source.graph.node) - 1, onnx.helper.make_node("Relu", ["scores"], ["kept"], "kept"))
    source.graph.output[0].CopyFrom(onnx.helper.make_tensor_value_info("found", onnx.TensorProto.INT64, [2, "K"]))
    for config in (Int8AwareConfig(), CodebookConfig(bits=2), LowRankConfig(rank="sensitivity")):
        with pytest.raises(NotApplicable, match="shape of output 'found' hangs on the numbers"):
            built(source, config, tmp_path)


def test_numbers_are_held_to_their_values_and_not_to_the_largest_of_them() -> None:
    """A regression has no best class: of two outputs that are nearly alike either may be the larger one."""
    expected, seen = np.array([[1.0, 0.999], [5.0, 4.999]]), np.array([[0.999, 1.0], [4.999, 5.0]])
    assert same(expected, seen).mean() == 0 and same(expected, seen, numbers=True).min() > 0.99
    wrong = same(expected, seen + 2.5, numbers=True)
    assert wrong.max() < 0.6


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_contract(family: str, tmp_path: Path) -> None:
    config = Int8AwareConfig(floor=0.9)
    artifact = built(FAMILIES[family], config, tmp_path)
    facts = keeps_the_contract(artifact, config)
    assert facts["kept_float"] == [] and len(facts["tried"]) == 1, "where nothing must stay float nothing does"
    assert error_of(FAMILIES[family], artifact) < 0.08
    assert facts["held_out"] + facts["calibration_samples"] == 64 == len(set(facts["calibration_hashes"]))


def test_layers_that_need_not_stay_float_go_back() -> None:
    """The worst alone does not help; the second does, without the worst."""
    asked: list[tuple[str, ...]] = []

    def agreement(kept: tuple[str, ...]) -> float:
        asked.append(kept)
        return 0.99 if "b" in kept else 0.9

    found = search(lambda: ["a", "b", "c"], agreement, 0.95, 3)
    assert found.kept == ("b",) and found.agreement == 0.99
    assert asked == [(), ("a",), ("a", "b"), ("b",)]
    assert search(lambda: ["a"], lambda kept: 1.0, 0.95, 3).kept == ()
    with pytest.raises(NotApplicable, match=r"reaches 90.0% with 0 layers in float \(none\), and the floor is 95.0%"):
        search(lambda: ["a", "b"], agreement, 0.95, 1)


def test_agreement_by_hand() -> None:
    scores = np.array([[0.1, 0.9], [0.8, 0.2], [0.3, 0.7]], np.float32)
    assert same(scores, scores[:, ::-1]).tolist() == [0, 0, 0] and same(scores, scores * 2).tolist() == [1, 1, 1]
    images = np.zeros((2, 3, 2, 2), np.float32)
    other = images.copy()
    other[0, 1, 0, 0] = 1
    assert same(images, other).tolist() == [0.75, 1]
    assert same(np.array([[2.0], [4.0]]), np.array([[2.0], [3.0]])).tolist() == [1, 0.75]
    assert same(np.array([[1, 2], [3, 4]]), np.array([[1, 0], [3, 4]])).tolist() == [0.5, 1]


def test_where_it_does_not_apply(tmp_path: Path) -> None:
    with pytest.raises(NotApplicable, match=r"\d+ of 20 samples are held out, and at least 16 are needed"):
        built(resnet(), Int8AwareConfig(), tmp_path, samples_of(resnet(), 20))
    with pytest.raises(NotApplicable, match="int8-aware needs calibration inputs"):
        built(resnet(), Int8AwareConfig(), tmp_path, Samples({}))
    wrong: list[dict[str, Any]] = [{"floor": 0.0}, {"most": -1}, {"held_out": 1.0}, {"calibration": "mean"}]
    for each in wrong:
        with pytest.raises(ValueError, match="must be"):
            Int8AwareConfig(**each)
