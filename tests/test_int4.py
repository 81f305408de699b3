"""4-bit linear layers: the codes are those of the formula, the runtime multiplies by them rightly, and small layers stay."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import numpy as np
import onnx
import pytest
from onnx import helper

from optimizers import NotApplicable, Samples
from optimizers.census import multiply_adds, quantization_of
from optimizers.int4 import Int4LinearConfig
from optimizers.int4_graph import blockwise
from optimizers.onnx_graph import set_constant
from tests.families import FAMILIES, answers, built, error_of, keeps_the_contract
from tests.onnx_models import F, mlp, model, node, normal, resnet, value, weights


def dequantized(weight: Any, block: int, symmetric: bool) -> Any:
    codes, scale, zero = blockwise(weight, block, symmetric)
    values = (codes.astype(float) - zero[..., None]) * scale[..., None]
    return values.reshape(weight.shape[1], -1)[:, : weight.shape[0]].T


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("inputs", [64, 80])
def test_codes_are_within_half_a_step(symmetric: bool, inputs: int) -> None:
    weight = normal(0, inputs, 7) + (0 if symmetric else 0.5)
    codes, scale, _ = blockwise(weight, 32, symmetric)
    assert codes.shape == (7, -(-inputs // 32), 32) and codes.max() <= 15
    error = np.abs(dequantized(weight, 32, symmetric) - weight)
    steps = np.repeat(scale, 32, axis=1)[:, :inputs].T
    assert (error <= steps * (0.5 if symmetric else 1.0) + 1e-6).all()
    assert not dequantized(np.zeros((32, 2), np.float32), 32, symmetric).any()


@pytest.mark.parametrize("compute", ["float", "int8"])
@pytest.mark.parametrize("symmetric", [True, False])
def test_the_runtime_multiplies_by_the_same_numbers(symmetric: bool, compute: Literal["float", "int8"], tmp_path: Path) -> None:
    """A product, a Gemm with bias and one with a transposed weight, of 80 inputs: the last block is not full."""
    w, v = normal(1, 80, 64), normal(2, 64, 80)
    nodes = [
        node("MatMul", ["x", "w"], ["p"], "plain"), node("Gemm", ["x", "v", "b"], ["q"], "turned", transB=1), node("Sub", ["p", "q"], ["y"], "sub"),
    ]  # fmt: skip
    source = model(nodes, [value("x", F, ["N", 80])], [value("y", F, ["N", 64])], weights(w=w, v=v, b=normal(3, 64)))
    x = normal(4, 5, 80)
    artifact = built(source, Int4LinearConfig(symmetric=symmetric, compute=compute, least=64), tmp_path, Samples({"x": x}))
    expected = x @ dequantized(w, 32, symmetric) - (x @ dequantized(v.T, 32, symmetric) + normal(3, 64))
    seen = answers(artifact.path, {"x": x})[0]
    assert np.abs(seen - expected).max() / np.abs(expected).max() < (1e-5 if compute == "float" else 0.02)


@pytest.mark.parametrize("family", ["mlp", "encoder"])
@pytest.mark.parametrize("compute", ["float", "int8"])
def test_families_with_linear_layers_keep_their_contract(family: str, compute: Literal["float", "int8"], tmp_path: Path) -> None:
    config = Int4LinearConfig(block=16, least=256, compute=compute)
    artifact = built(FAMILIES[family], config, tmp_path)
    facts = keeps_the_contract(artifact, config, standard=False)
    products = [n for n in onnx.load(artifact.path).graph.node if n.op_type == "MatMulNBits"]
    assert len(products) == len(facts["layers"]) >= 3
    assert {helper.get_node_attr_value(n, "bits") for n in products} == {4} and facts["domains"] == ["com.microsoft"]
    assert error_of(FAMILIES[family], artifact) < 0.25 and facts["output_error"] < 0.25
    row = {"ids": (1, 6)} if family == "encoder" else None
    as_before = multiply_adds(FAMILIES[family], row)
    assert as_before and multiply_adds(onnx.load(artifact.path), row) == as_before, "they can still be counted"


def test_the_file_is_six_times_smaller(tmp_path: Path) -> None:
    source = mlp((256, 512, 256, 10))
    artifact = built(source, Int4LinearConfig(block=64), tmp_path)
    assert artifact.facts[-1]["bytes"] < artifact.facts[-1]["bytes_before"] / 6
    assert quantization_of(onnx.load(artifact.path)) == "weights only"


def test_small_blocks_keep_outliers_to_themselves(tmp_path: Path) -> None:
    source = mlp((256, 64, 10))
    weight = normal(0, 256, 64, scale=1 / 16)
    weight[::128] *= 30
    set_constant(source.graph, "w0", weight)
    errors = [error_of(source, built(source, Int4LinearConfig(block=block), tmp_path / str(block))) for block in (16, 256)]
    assert errors[0] < 0.5 * errors[1]


def test_where_it_does_not_apply(tmp_path: Path) -> None:
    with pytest.raises(
        NotApplicable, match="no MatMul or Gemm multiplies by a constant float matrix of at least 4096 weights and 32 inputs"
    ):
        built(resnet(), Int4LinearConfig(), tmp_path)
    source = mlp((64, 128, 10))
    with pytest.raises(NotApplicable, match="no MatMul or Gemm"):
        built(source, Int4LinearConfig(exclude=("gemm0",)), tmp_path)
    once = built(source, Int4LinearConfig(), tmp_path, Samples({}))
    assert once.facts[-1]["layers"] == ["gemm0"] and once.facts[-1]["output_error"] is None
    with pytest.raises(NotApplicable, match=r"already quantized \(weights only\)"):
        built(onnx.load(once.path), Int4LinearConfig(), tmp_path)
    for wrong in ({"block": 48}, {"compute": "int4"}, {"least": 0}):
        with pytest.raises(ValueError, match="must be"):
            Int4LinearConfig(**wrong)
