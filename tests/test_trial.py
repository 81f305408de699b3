"""Samples are held to what the model takes before anything runs, by every method that looks at them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from optimizers import Artifact, Budget, NotApplicable, Samples, optimize
from optimizers.catalogue import parse_step
from optimizers.trial import fitting
from tests import torch_models
from tests.models import identity, resnetish_cnn
from tests.onnx_models import mlp


@pytest.mark.parametrize("method", ["int8-static", "int8-aware", "mixed-precision", "codebook"])
@pytest.mark.parametrize(
    ("rows", "told"),
    [
        (np.zeros((8, 3, 16, 32), np.float32), r"float32 \[8, 3, 16, 32\], one row each; the model takes float32 \[N, 3, 32, 32\]"),
        (np.zeros((8, 3, 32, 32)), r"float64 \[8, 3, 32, 32\]"),
        (np.zeros((8, 3, 32), np.float32), r"float32 \[8, 3, 32\]"),
    ],
    ids=["shape", "datatype", "axes"],
)
def test_samples_that_do_not_fit_are_no_error_of_the_runtime(tmp_path: Path, method: str, rows: np.ndarray, told: str) -> None:
    model = Artifact(resnetish_cnn(tmp_path / "model.onnx"), "classification")
    with pytest.raises(NotApplicable, match=f"the samples of 'x' are {told}"):
        optimize(model, parse_step(method), Samples({"x": rows}), Budget(scratch=str(tmp_path)))


@pytest.mark.needs("torch")
def test_methods_that_train_tell_it_too(tmp_path: Path) -> None:
    model = torch_models.artifact(tmp_path, "mlp")
    wide = Samples({name: np.zeros((8, 99), np.float32) for name in ("x", "image", "input")})
    with pytest.raises(NotApplicable, match="one row each; the model takes float32"):
        optimize(model, parse_step("qat"), wide, Budget(scratch=str(tmp_path)))


def test_whole_calls_and_free_axes_fit() -> None:
    assert fitting(Samples({"x": np.zeros((3, 16), np.float32)}), mlp((16, 5))) == ["x"]
    assert fitting(Samples({"x": np.zeros((3, 7, 16), np.float32)}, stacked=False), mlp((16, 5))) == ["x"]


@pytest.mark.parametrize("datatype", ["BF16", "BYTES"])
def test_what_numpy_says_otherwise_is_left_to_the_runtime(tmp_path: Path, datatype: str) -> None:
    from optimizers.onnx_file import read

    kind = np.float32 if datatype == "BF16" else np.str_
    assert fitting(Samples({"x": np.zeros((3, 2), kind)}), read(identity(tmp_path / "m.onnx", datatype)).model) == ["x"]


def test_a_device_that_is_none_is_refused_where_it_is_named() -> None:
    with pytest.raises(ValueError, match="device 'gpu' is none of auto, cpu, cuda"):
        Budget(device="gpu")
