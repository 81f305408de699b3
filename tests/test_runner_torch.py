"""PyTorch models in a runner: what their module answers, ties restored, and factories that fail."""

from __future__ import annotations

import asyncio
import subprocess
import sys
import textwrap
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain import TensorSpec
from app.errors import ModelRejected
from tests.engines import Start, anyio_backend, forkserver, request, start, values
from tests.runner_children import ROOT

__all__ = ["anyio_backend", "forkserver", "start"]
pytestmark = pytest.mark.anyio


FACTORY = '''
import torch
from torch import nn


class Tied(nn.Module):
    """Embedding and head share one table (case 45)."""

    def __init__(self):
        super().__init__()
        self.emb = nn.Embedding(50, 8)
        self.norm = nn.Dropout(0.5)
        self.head = nn.Linear(8, 50, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, tokens):
        return self.head(self.norm(self.emb(tokens).mean(1)))


def tied():
    return Tied()


def broken():
    raise RuntimeError("no such thing")
'''


def torch_model(folder: Path, drop: str = "") -> tuple[Path, Path, Any]:
    torch = import_module("torch")
    save_file = import_module("safetensors.torch").save_file
    factory = folder / "factory.py"
    factory.write_text(FACTORY)
    torch.manual_seed(0)
    scope: dict[str, Any] = {}
    exec(FACTORY, scope)
    module = scope["tied"]().eval()
    state = {name: value.clone() for name, value in module.state_dict().items() if name not in (drop, "head.weight")}
    if drop == "emb.weight":
        state = {"other.weight": torch.zeros(1)}
    save_file(state, str(folder / "model.safetensors"))
    return folder / "model.safetensors", factory, module


def torch_signature() -> Any:
    from app.domain import Signature

    return Signature((TensorSpec("tokens", "INT64", (-1, 3)),), (TensorSpec("logits", "FP32", (-1, 50)),), batchable=True)


@pytest.mark.needs("torch")
async def test_a_torch_model_answers_as_its_module_does_with_the_tie_restored(start: Start, tmp_path: Path) -> None:
    torch = import_module("torch")
    weights, factory, module = torch_model(tmp_path)
    spec = {"kind": "torch", "factory": f"{factory}:tied"}
    engine = await start(weights, signature=torch_signature(), spec=spec, batch_limit=4)
    rows = [torch.randint(0, 50, (1, 3)) for _ in range(4)]
    answers = await asyncio.gather(*(engine.infer(request(tokens=row.numpy())) for row in rows))
    with torch.inference_mode():
        for row, answer in zip(rows, answers, strict=True):
            assert np.allclose(values(answer), module(row).numpy(), atol=1e-6)


@pytest.mark.needs("torch")
async def test_a_weight_that_is_missing_and_not_tied_is_an_error_that_lists_it(start: Start, tmp_path: Path) -> None:
    weights, factory, _ = torch_model(tmp_path, drop="emb.weight")
    with pytest.raises(ModelRejected, match=r"misses emb\.weight, head\.weight and it has other\.weight, unknown"):
        await start(weights, signature=torch_signature(), spec={"kind": "torch", "factory": f"{factory}:tied"})


@pytest.mark.needs("torch")
@pytest.mark.parametrize(("function", "message"), [("broken", "no such thing"), ("absent", "no attribute 'absent'")])
async def test_a_factory_that_fails_is_refused_with_its_words(function: str, message: str, start: Start, tmp_path: Path) -> None:
    weights, factory, _ = torch_model(tmp_path)
    with pytest.raises(ModelRejected, match=message):
        await start(weights, signature=torch_signature(), spec={"kind": "torch", "factory": f"{factory}:{function}"})


@pytest.mark.needs("torch")
@pytest.mark.parametrize(
    ("outputs", "message"),
    [
        ([("logits", "INT64", [-1, 50])], "output 'logits' is FP32, but declared as INT64"),
        ([("logits", "FP32", [-1, 49])], r"output 'logits' has shape \[1, 50\], but is declared as \[-1, 49\]"),
        ([("logits", "FP32", [-1])], r"has shape \[1, 50\], but is declared as \[-1\]"),
        ([("logits", "FP32", [-1, 50]), ("more", "FP32", [-1])], "forward\\(\\) returns 1 outputs, of which 2 are declared"),
    ],
)
def test_outputs_of_a_torch_model_that_are_not_as_declared_are_refused(
    outputs: list[tuple[str, str, list[int]]], message: str, tmp_path: Path
) -> None:
    """Their bytes would be read as something that they are not."""
    from app.serving.runner_torch import TorchModel

    weights, factory, _ = torch_model(tmp_path)
    signature = {
        "inputs": [{"name": "tokens", "datatype": "INT64", "shape": [-1, 3]}],
        "outputs": [dict(zip(("name", "datatype", "shape"), one, strict=True)) for one in outputs],
    }
    model = TorchModel({"signature": signature, "factory": f"{factory}:tied", "path": str(weights), "settings": {"intra_op_threads": 1}})
    with pytest.raises(ModelRejected, match=f"{message}.*; correct source.outputs"):
        model.run(None, {"tokens": np.zeros((1, 3), np.int64)})


def test_without_torch_the_remedy_is_named(tmp_path: Path) -> None:
    """In an interpreter that cannot find torch, the runner's own opening says what to install."""
    code = textwrap.dedent("""
        import sys
        sys.modules["torch"] = None
        from app.errors import Unsupported
        from app.serving.runner_torch import TorchModel
        try:
            TorchModel({"signature": {"inputs": [], "outputs": []}, "factory": "f.py:f", "path": "w", "settings": {"intra_op_threads": 1}})
        except Unsupported as error:
            print(error)
    """)
    found = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert "pip install hone-server[optimize]" in found.stdout
