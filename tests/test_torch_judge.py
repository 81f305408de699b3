"""PyTorch goldens as the yardstick: what ONNX Runtime answers is held to what torch answers, in answers, in time and by interface."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers.arm import Opened, _declared
from optimizers.base import Budget, Rejected
from optimizers.golden import golden_outputs, quick_check
from optimizers.judge import run
from optimizers.sameness import interface_objections
from optimizers.samples import Samples, read_npz
from optimizers.session import TensorInfo
from optimizers.torch_module import TorchSource
from tests.judged_models import mlp, mlp_weights, noisy, samples

pytestmark = pytest.mark.needs("torch")
SIZES = (16, 32, 5)
FACTORY = """
import torch
from torch import nn


def build():
    return nn.Sequential(nn.Linear(16, 32, bias=False), nn.ReLU(), nn.Linear(32, 5, bias=False))


class Moody(nn.Module):
    def forward(self, x):
        return torch.rand(len(x), 5)


def moody():
    return Moody()
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    import torch
    from safetensors.torch import save_file

    made = tmp_path_factory.mktemp("torch-judge")
    (made / "net.py").write_text(FACTORY)
    first, second = (torch.from_numpy(weights.T.copy()) for weights in mlp_weights(SIZES))
    save_file({"0.weight": first, "2.weight": second}, str(made / "golden.safetensors"))
    save_file({}, str(made / "moody.safetensors"))
    samples(made / "reference.npz")
    return made


def source(folder: Path, function: str = "build") -> dict[str, Any]:
    return {"factory": f"{folder / 'net.py'}:{function}", "inputs": [["x", "FP32", [-1, 16]]], "outputs": [["y", "FP32", [-1, 5]]]}


def verify(folder: Path, candidate: Path, **more: Any) -> dict[str, Any]:
    golden = str(folder / "golden.safetensors")
    request = {
        "golden": golden, "candidate": str(candidate), "incumbent": golden, "parent": golden, "sources": {golden: source(folder)},
        "sets": {"reference": {"path": str(folder / "reference.npz")}}, "task": "classification", "timed": False,
    }  # fmt: skip
    answer = run({**request, **more}, Budget(seconds=200))
    json.dumps(answer, allow_nan=False)
    return answer


def test_an_onnx_file_is_bit_close_to_torch_and_faster_than_the_torch_incumbent(folder: Path, tmp_path: Path) -> None:
    report = verify(folder, mlp(tmp_path / "same.onnx", SIZES), timed=True, seconds=20.0, lossless=True)
    assert report["verdict"] == "passed" and report["bit_close"], report["reasons"]
    assert report["latency"]["rows_ratio"]["high"] < 0.95 and report["fidelity"]["reference"]["samples"] == 400


def test_what_answers_otherwise_than_torch_fails(folder: Path, tmp_path: Path) -> None:
    far = verify(folder, mlp(tmp_path / "far.onnx", weights=noisy(mlp_weights(SIZES), 0.5)))
    assert far["verdict"] == "failed" and "agree" in far["summary"]


def test_a_session_is_held_to_what_is_declared_of_a_module() -> None:
    declared = TorchSource.from_json({"factory": "net.py:build", "inputs": [["x", "FP32", [-1, 16]]], "outputs": [["y", "INT64", [-1]]]})
    assert declared is not None
    inputs, outputs = _declared(declared.inputs, declared.input_shapes), _declared(declared.outputs, declared.output_shapes)
    golden = Opened(inputs, outputs, 0.0)
    inputs, outputs = (TensorInfo("x", "tensor(float)", ("n", 16)),), (TensorInfo("y", "tensor(int64)", ("n",)),)
    assert interface_objections(golden, Opened(inputs, outputs, 0.0)) == []
    frozen = Opened((TensorInfo("x", "tensor(float)", (1, 15)),), (TensorInfo("y", "tensor(int32)", ("n",)),), 0.0)
    found = interface_objections(golden, frozen)
    assert [one.partition(":")[0] for one in found] == [
        "the batch is frozen",
        "input 'x' has size 15 on axis 1, golden's is 16",
        "output 'y' is tensor(int32), golden's is tensor(int64)",
    ]


def test_golden_itself_is_proven_and_weights_alone_are_no_model(folder: Path) -> None:
    golden = folder / "golden.safetensors"
    report = verify(folder, golden, purpose="proof")
    assert report["verdict"] == "passed" and report["bit_close"] and report["rows"]["independent"], report["reasons"]
    with pytest.raises(Rejected, match=r"golden\.safetensors holds PyTorch weights; name what runs them in sources"):
        verify(folder, golden, sources={})
    with pytest.raises(Rejected, match="verify: 'outputs'"):
        verify(folder, golden, sources={str(golden): {"factory": "net.py:build", "inputs": []}})


def test_goldens_answers_are_torchs_and_a_version_is_checked_against_them(folder: Path, tmp_path: Path) -> None:
    given = {"samples": str(folder / "reference.npz"), "task": "classification"}
    torch = {**given, "path": str(folder / "golden.safetensors"), "source": source(folder)}
    found = golden_outputs({**torch, "outputs": str(tmp_path / "outputs.npz")}, Budget(seconds=60))
    assert found["right"] and found["as_asked"] and len(found["tries"]) == 1
    first, second = mlp_weights(SIZES)
    inputs = Samples.load(folder / "reference.npz").inputs["x"].astype(np.float32)
    np.testing.assert_allclose(read_npz(tmp_path / "outputs.npz")["y"], np.maximum(inputs @ first, 0) @ second, atol=1e-4)
    known = {"golden_outputs": str(tmp_path / "outputs.npz")}
    assert quick_check({**given, **known, "path": str(mlp(tmp_path / "same.onnx", SIZES))}, Budget(seconds=60))["right"]
    moody = {**torch, "path": str(folder / "moody.safetensors"), "source": source(folder, "moody")}
    assert not golden_outputs({**moody, "outputs": ""}, Budget(seconds=60))["right"]
