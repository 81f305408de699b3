"""Moments of what a layer sees, and codes that make up for each other's errors."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optimizers.clustering import kmeans
from optimizers.feedback import as_matrix, assign, from_matrix, gram, suits
from optimizers.layers import weighted_layers
from optimizers.samples import Samples
from tests.families import answers
from tests.onnx_models import F, depthwise, encoder, model, node, normal, value, weights, write


@pytest.mark.parametrize("strides", [1, 2])
@pytest.mark.parametrize("pads", [[0, 0, 0, 0], [1, 2, 0, 1]])
def test_moments_of_patches_are_those_of_the_outputs(strides: int, pads: list[int], tmp_path: Path) -> None:
    """E[y yᵀ] = W E[x xᵀ] Wᵀ, with the outputs as the runtime computes them."""
    w, x = normal(0, 5, 3, 3, 2), normal(1, 6, 3, 7, 8)
    conv = node("Conv", ["x", "w"], ["y"], "conv", strides=[strides] * 2, pads=pads)
    source = model([conv], [value("x", F, ["N", 3, 7, 8])], [value("y", F, ["N", 5, "H", "W"])], weights(w=w))
    (layer,) = weighted_layers(source)
    moments = gram(source, layer, Samples({"x": x}), tmp_path, 1)
    y = answers(write(source, tmp_path / "m.onnx"), {"x": x})[0].transpose(1, 0, 2, 3).reshape(5, -1)
    matrix = as_matrix(layer, w)
    assert np.allclose(matrix @ moments @ matrix.T, y @ y.T / y.shape[1], atol=1e-4)
    assert np.array_equal(from_matrix(layer, matrix), w)


def test_errors_make_up_for_each_other() -> None:
    """Inputs that go together: what one weight lacks the next can give. Without correlation nothing is to be had."""
    rng = np.random.default_rng(0)
    w = rng.normal(size=(16, 200))
    levels = kmeans(w.ravel(), 4)
    none = np.zeros(w.shape, bool)
    together = rng.normal(size=(2000, 8)) @ rng.normal(size=(8, 200)) + 0.3 * rng.normal(size=(2000, 200)) + 1
    for x, most in ((together, 0.2), (rng.normal(size=(10_000, 200)), 1.1)):
        codes = assign(w, x.T @ x / len(x), levels.codes, lambda found: levels.centres[found], none)
        lost, plain = (np.mean(((values - w) @ x.T) ** 2) for values in (levels.centres[codes], levels.centres[levels.codes(w)]))
        assert lost < most * plain


def test_zeros_are_made_up_for_too() -> None:
    rng = np.random.default_rng(1)
    w, x = rng.normal(size=(4, 40)), rng.normal(size=(500, 40)) + 2
    zero = np.abs(w) < 0.3
    levels = kmeans(w.ravel(), 64)
    codes = assign(w, x.T @ x / len(x), levels.codes, lambda found: levels.centres[found], zero)
    lost, plain = (np.mean(((np.where(zero, 0, levels.centres[c]) - w) @ x.T) ** 2) for c in (codes, levels.codes(w)))
    assert lost < 0.3 * plain


def test_what_is_no_plain_product_is_left_to_the_nearest_level() -> None:
    source = depthwise()
    assert [layer.name for layer in weighted_layers(source) if suits(source, layer)] == ["stem", "pw", "fc"]
    source = encoder()
    assert {layer.kind for layer in weighted_layers(source) if suits(source, layer)} == {"MatMul"}
