"""Rewrites before int8: the float answers stay, ranges become even, and int8 loses less; each is off where it is not asked for."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import ModelProto, numpy_helper

from optimizers import Samples
from optimizers.codebook import CodebookConfig
from optimizers.difference import root_mean_square
from optimizers.equalize import cross_layer, smooth
from optimizers.int8 import Int8StaticConfig
from optimizers.layers import Inputs, input_statistics, weighted_layers
from optimizers.onnx_graph import set_constant
from optimizers.prepare import prepared
from tests.families import FAMILIES, answers, built, error_of, keeps_the_contract, samples_of
from tests.onnx_models import F, depthwise, encoder, mlp, model, node, normal, resnet, value, weights, write


def tensor(source: ModelProto, name: str) -> NDArray[Any]:
    return next(numpy_helper.to_array(t) for t in source.graph.initializer if t.name == name)


def uneven() -> ModelProto:
    """The same function as the depthwise network's, its middle channels scaled apart: what equalization undoes."""
    source = depthwise(32)
    scale = np.exp(np.random.default_rng(0).uniform(-3, 3, 32)).astype(np.float32)
    for name, factor in (("dw.w", 1 / scale.reshape(-1, 1, 1, 1)), ("dw.b", 1 / scale), ("pw.w", scale.reshape(1, -1, 1, 1))):
        set_constant(source.graph, name, tensor(source, name) * factor)
    return source


def same_answers(before: ModelProto, after: ModelProto, folder: Path) -> None:
    feeds = samples_of(before, 8).inputs
    paths = [write(each, folder / f"{index}.onnx") for index, each in enumerate((before, after))]
    assert root_mean_square(*(answers(path, feeds) for path in paths)) < 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_answers_stay_and_ranges_meet(family: str, tmp_path: Path) -> None:
    ready = prepared(onnx.ModelProto.FromString(FAMILIES[family].SerializeToString()), tmp_path).model
    pairs = cross_layer(ready)
    same_answers(FAMILIES[family], ready, tmp_path)
    assert len(pairs) == {"resnet": 2, "depthwise": 2, "mlp": 2, "encoder": 0, "recurrent": 1}[family]
    layers = {each.name: each for each in weighted_layers(ready)}
    for one, two in pairs[:1]:
        first, second = (tensor(ready, layers[name].tensor) for name in (one, two))
        if first.ndim == 2:
            assert np.abs(first).max(axis=0) == pytest.approx(np.abs(second).max(axis=1), rel=0.05)


def test_equalized_channels_survive_a_grid_per_tensor(tmp_path: Path) -> None:
    errors = {}
    for equalize in (False, True):
        config = Int8StaticConfig(per_channel=False, equalize=equalize, reduce_range="on")
        artifact = built(uneven(), config, tmp_path / str(equalize))
        rescue, errors[equalize] = keeps_the_contract(artifact, config)["rescue"], error_of(uneven(), artifact)
        assert rescue == ({"equalized": [("dw", "pw"), ("pw", "fc")]} if equalize else {})
    assert errors[True] < 0.5 * errors[False]


def test_biases_take_back_the_mean_error(tmp_path: Path) -> None:
    """Inputs of mean 1 and one weight that makes the grid coarse: rounding shifts every output."""
    w = normal(0, 64, 32, scale=0.05)
    w[0, 0] = 8
    nodes = [node("Gemm", ["x", "w", "b"], ["h"], "first"), node("Relu", ["h"], ["r"]), node("Gemm", ["r", "v"], ["y"], "second")]
    source = model(nodes, [value("x", F, ["N", 64])], [value("y", F, ["N", 8])], weights(w=w, b=normal(1, 32), v=normal(2, 32, 8)))
    x = np.random.default_rng(3).normal(1, 0.1, (128, 64)).astype(np.float32)
    errors = {}
    for correct in (False, True):
        artifact = built(
            source, Int8StaticConfig(per_channel=False, bias_correction=correct), tmp_path / str(correct), Samples({"x": x[:64]})
        )
        errors[correct] = root_mean_square(
            answers(tmp_path / str(correct) / "model.onnx", {"x": x[64:]}), answers(artifact.path, {"x": x[64:]})
        )
    assert artifact.facts[-1]["rescue"] == {"biases_corrected": ["first", "second"]}
    assert errors[True] < 0.5 * errors[False]


def test_a_product_takes_its_factors_into_account(tmp_path: Path) -> None:
    """α scales what the bias takes back; with a β the product stays float, since the quantizer forgets that."""
    w = normal(0, 64, 32, scale=0.05)
    w[0, 0] = 8
    x = Samples({"x": np.random.default_rng(3).normal(1, 0.1, (128, 64)).astype(np.float32)})
    nodes = [node("Gemm", ["x", "w", "b"], ["h"], "scaled", alpha=0.1), node("Gemm", ["h", "v", "c"], ["y"], "weighed", beta=3.0)]
    source = model(
        nodes, [value("x", F, ["N", 64])], [value("h", F, ["N", 32]), value("y", F, ["N", 8])],
        weights(w=w, b=normal(1, 32, scale=0.1), v=normal(2, 32, 8), c=normal(3, 8)),
    )  # fmt: skip
    made = {how: built(source, Int8StaticConfig(per_channel=False, bias_correction=how), tmp_path / str(how), x) for how in (False, True)}
    facts = made[True].facts[-1]
    assert facts["rescue"] == {"biases_corrected": ["scaled"]} and facts["kept_float"] == ["weighed"]
    wanted = answers(tmp_path / "True" / "model.onnx", x.inputs)
    errors = {how: root_mean_square(wanted, answers(artifact.path, x.inputs)) for how, artifact in made.items()}
    assert errors[True] < 0.5 * errors[False] < 0.1


def test_inputs_that_are_fed_whole_are_told_by_channel(tmp_path: Path) -> None:
    """A first axis that the model fixes is part of the input, and no row of samples."""
    source = resnet(4)
    source.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 2
    source.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 2
    whole = Samples({"image": np.random.default_rng(0).standard_normal((6, 2, 3, 8, 8)).astype(np.float32)}, stacked=False)
    artifact = built(source, Int8StaticConfig(bias_correction=True), tmp_path, whole)
    assert "fc" in artifact.facts[-1]["rescue"]["biases_corrected"] and len(artifact.facts[-1]["rescue"]["biases_corrected"]) == 6
    assert built(source, CodebookConfig(levels="perceptual"), tmp_path / "codes", whole).facts[-1]["bytes_before"]


@pytest.mark.parametrize("family", ["resnet", "depthwise", "mlp"])
def test_all_together_keep_the_contract(family: str, tmp_path: Path) -> None:
    config = Int8StaticConfig(equalize=True, bias_correction=True, smooth=0.5)
    artifact = built(FAMILIES[family], config, tmp_path)
    assert set(keeps_the_contract(artifact, config)["rescue"]) == {"equalized", "smoothed", "biases_corrected"}
    assert error_of(FAMILIES[family], artifact) < 0.08


# ---- SmoothQuant
def outlying() -> ModelProto:
    """An encoder whose normalization makes a few channels large before the products, as those of large language models do."""
    source = encoder(32)
    gamma, beta = tensor(source, "gamma").copy(), tensor(source, "beta").copy()
    gamma[[3, 17]] = 60
    up, table = tensor(source, "up").copy(), tensor(source, "table")
    up[[3, 17]] /= 60
    for name, values in (("gamma", gamma), ("beta", beta), ("up", up), ("table", table)):
        set_constant(source.graph, name, values)
    for each in source.graph.node:
        if each.name == "down_proj":
            continue
        for index, name in enumerate(each.input):
            if name == "x1" and each.op_type == "Add":
                each.input[index] = "x0"  # the residual goes around the normalization, so that only the product reads it
    return source


def test_smoothing_keeps_the_answers_and_saves_the_small_channels(tmp_path: Path) -> None:
    source, errors = outlying(), {}
    for alpha in (0.0, 0.5):
        config = Int8StaticConfig(smooth=alpha)
        artifact = built(source, config, tmp_path / str(alpha))
        keeps_the_contract(artifact, config)
        errors[alpha] = error_of(source, artifact)
    assert "up_proj" in artifact.facts[-1]["rescue"]["smoothed"]
    assert errors[0.5] < 0.6 * errors[0.0]


@pytest.mark.parametrize("source", [outlying(), encoder(), mlp((16, 64, 10))], ids=["outlying", "encoder", "mlp"])
def test_smoothed_float_answers_are_the_same(source: ModelProto, tmp_path: Path) -> None:
    ready = prepared(onnx.ModelProto.FromString(source.SerializeToString()), tmp_path).model
    layers = weighted_layers(ready, {"MatMul", "Gemm"})
    inputs = input_statistics(ready, layers, samples_of(source), tmp_path, lambda share: None)
    assert len(smooth(ready, inputs, 0.5)) == len(layers)
    same_answers(source, ready, tmp_path)
    after = input_statistics(ready, weighted_layers(ready, {"MatMul", "Gemm"}), samples_of(source), tmp_path, lambda share: None)
    for layer in weighted_layers(ready, {"MatMul", "Gemm"}):
        if layer.name in inputs and len([each for each in layers if each.source == layer.source]) == 1 and layer.name in after:
            weight = np.abs(tensor(ready, layer.tensor)).max(axis=layer.output_axis)
            live = after[layer.name].peak > 0
            assert after[layer.name].peak[live] == pytest.approx(weight[live], rel=1e-3), "at α = ½ both sides have one range"


def test_statistics_are_those_of_all_rows_together() -> None:
    values = np.random.default_rng(0).normal(2, 3, (4, 100))
    kept = Inputs.none_yet(4)
    for piece in (values[:, :7], values[:, 7:60], values[:, 60:]):
        kept.extend(piece)
    assert kept.mean == pytest.approx(values.mean(axis=1)) and kept.second == pytest.approx((values**2).mean(axis=1))
    assert kept.peak == pytest.approx(np.abs(values).max(axis=1)) and kept.count == 100


def test_a_wrong_share_is_refused() -> None:
    with pytest.raises(ValueError, match=r"smooth must be from 0 to 1, not 1\.5"):
        Int8StaticConfig(smooth=1.5)
