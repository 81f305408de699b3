"""One small model of each family, and what every method that rewrites the ONNX file owes them: its contract."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
from numpy.typing import NDArray
from onnx import ModelProto

from optimizers import Artifact, Budget, Samples, optimize
from optimizers.base import Config
from optimizers.difference import root_mean_square
from optimizers.onnx_file import checker_complaint
from tests.onnx_models import I64, depthwise, encoder, mlp, recurrent, resnet, write

FAMILIES = {"resnet": resnet(16), "depthwise": depthwise(32), "mlp": mlp((16, 64, 64, 10)), "encoder": encoder(), "recurrent": recurrent()}


def samples_of(built: ModelProto, count: int = 64, seed: int = 5) -> Samples:
    rng = np.random.default_rng(seed)
    arrays: dict[str, NDArray[Any]] = {}
    for entry in built.graph.input:
        shape = [count, *(dim.dim_value or 8 for dim in entry.type.tensor_type.shape.dim[1:])]
        integers = entry.type.tensor_type.elem_type == I64
        arrays[entry.name] = rng.integers(0, 50, shape) if integers else rng.standard_normal(shape).astype(np.float32)
    return Samples(arrays)


def built(source: ModelProto, config: Config, folder: Path, samples: Samples | None = None) -> Artifact:
    path = write(source, folder / "model.onnx")
    return optimize(Artifact(path), config, samples_of(source) if samples is None else samples, Budget(scratch=str(folder / "scratch")))


def answers(path: Path, feeds: dict[str, Any]) -> list[Any]:
    return list(ort.InferenceSession(str(path)).run(None, feeds))


def error_of(source: ModelProto, artifact: Artifact) -> float:
    """Relative root-mean-square error of the outputs, on rows that the method has not seen."""
    assert artifact.golden is not None
    feeds = samples_of(source, 64, seed=6).inputs
    return root_mean_square(answers(artifact.golden, feeds), answers(artifact.path, feeds))


def keeps_the_contract(artifact: Artifact, config: Config, standard: bool = True) -> dict[str, Any]:
    """The file is valid, its names, types and shapes are the parent's, any batch goes in, and the facts are there. Returns the facts."""
    assert artifact.golden is not None
    session, parent = ort.InferenceSession(str(artifact.path)), ort.InferenceSession(str(artifact.golden))
    for side in ("get_inputs", "get_outputs"):
        assert [(v.name, v.type) for v in getattr(session, side)()] == [(v.name, v.type) for v in getattr(parent, side)()]
    assert [v.shape for v in session.get_inputs()] == [v.shape for v in parent.get_inputs()]
    feeds = samples_of(onnx.load(artifact.golden), 3).inputs
    for rows in (1, 3):
        few: dict[str, Any] = {name: values[:rows] for name, values in feeds.items()}
        assert [a.shape for a in session.run(None, few)] == [a.shape for a in parent.run(None, few)]
    if standard:
        assert checker_complaint(artifact.path) == ""
    facts = artifact.facts[-1]
    assert artifact.recipe == (config.to_json(),)
    assert facts["bytes"] == artifact.path.stat().st_size < facts["bytes_before"] == artifact.golden.stat().st_size
    return facts
