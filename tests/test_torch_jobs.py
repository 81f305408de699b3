"""A PyTorch golden through the public interface: its reference is frozen, a job builds it for ONNX Runtime, proves it against torch, and swaps it in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.catalog.model_config import ModelConfig
from app.control.choices import quick_tries
from app.control.steps import parse_tries
from tests.running_server import Running, server

FACTORY = """
import torch
from torch import nn


def build():
    layers = [part for _ in range(6) for part in (nn.Linear(32, 32), nn.Tanh())]
    return nn.Sequential(*layers, nn.Linear(32, 5))
"""
CONFIG = """
task: classification
batching: {rows: independent}
source:
  factory: net.py:build
  inputs: [{name: x, datatype: FP32, shape: [-1, 32]}]
  outputs: [{name: scores, datatype: FP32, shape: [-1, 5]}]
samples: {reference: reference.npz}
capture: {mode: "off"}
"""


def deployed(folder: Path) -> None:
    import torch
    from safetensors.torch import save_file

    (folder / "factories").mkdir()
    (folder / "factories" / "net.py").write_text(FACTORY)
    version = folder / "models" / "net" / "1"
    version.mkdir(parents=True)
    torch.manual_seed(0)
    layers = [part for _ in range(6) for part in (torch.nn.Linear(32, 32), torch.nn.Tanh())]
    save_file(torch.nn.Sequential(*layers, torch.nn.Linear(32, 5)).state_dict(), version / "model.safetensors")
    (version.parent / "model.yaml").write_text(CONFIG)
    values = np.random.default_rng(0).standard_normal((600, 32)).astype(np.float32)
    np.savez(version.parent / "reference.npz", x=values)


def told(running: Running, kind: str) -> list[dict[str, Any]]:
    return [one for one in running.admin("GET", "/admin/timeline?model=net&limit=500")["events"] if one["kind"] == kind]


def answer(running: Running) -> list[float]:
    data = np.linspace(-1, 1, 64, dtype=np.float32).tolist()
    body = {"inputs": [{"name": "x", "shape": [2, 32], "datatype": "FP32", "data": data}]}
    found: list[float] = running.call("POST", "/v2/models/net/infer", json=body).json()["outputs"][0]["data"]
    return found


@pytest.mark.needs("torch")
def test_a_pytorch_golden_is_built_for_onnx_runtime_proven_against_torch_promoted_and_rolled_back(tmp_path: Path) -> None:
    deployed(tmp_path)
    with server(tmp_path, factories=str(tmp_path / "factories")) as running:
        running.ready("net")
        running.worker()
        before = answer(running)
        frozen = running.until(lambda: told(running, "reference.frozen"))
        assert frozen[0]["data"]["origin"] == "owner"
        asked = running.admin("POST", "/admin/models/net/optimize", 202, json={"recipe": ["export"]})
        job = running.job_done(asked["id"])
        assert (job["outcome"], job["candidate"]) == ("promoted", "1.1"), (job["report"], running.log)
        assert answer(running) == pytest.approx(before, abs=1e-5)
        golden, built = running.admin("GET", "/admin/models/net/versions")["versions"]
        assert golden["golden"] and (built["parent"], built["recipe"], built["active"]) == ("1", ["export"], True)
        proof = built["proof"]
        assert proof["fidelity"]["reference"]["bit_close"] and proof["latency"]["rows_ratio"]["high"] < 1
        assert running.call("GET", "/v2/models/net").json()["platform"].startswith("onnx")
        assert running.admin("GET", "/admin/models/net/explain")["lineage"][0]["recipe"] == ["export"]
        assert told(running, "version.published")[0]["data"]["recipe"][0]["method"] == "export"
        running.admin("POST", "/admin/models/net/rollback", 200)
        assert running.admin("GET", "/admin/models/net")["active"] == "1"
        assert answer(running) == pytest.approx(before, abs=1e-6)
        version = tmp_path / "state" / "models" / "net" / "1.1"
        assert (version / "model.onnx").is_file() and not list(version.glob("*.safetensors")), "golden has its weights already"
        tuned = running.job_done(running.admin("POST", "/admin/models/net/optimize", 202, json={"recipe": ["tune"]})["id"])
        assert tuned["outcome"] == "failed" and "--with export,tune" in tuned["report"]["reason"]


def test_a_recipe_from_a_pytorch_golden_begins_with_its_export_allowed_or_not() -> None:
    def parsed(*methods: str, torch: bool = True) -> list[str]:
        return [str(step["method"]) for step in parse_tries([list(methods)], ("int8-static", "tune", "export"), "net", torch=torch)[0]]

    assert parsed("int8-static") == ["export", "int8-static"]
    assert parsed("export", "int8-static") == ["export", "int8-static"]
    assert parsed("int8-static", "tune") == ["export", "int8-static", "tune"]
    assert parsed("tune") == ["tune"], "that is about the version that serves"
    assert parsed("int8-static", torch=False) == ["int8-static"]
    assert [step["method"] for step in parse_tries([["graph"]], ("graph",), "net", torch=True)[0]] == ["export", "graph"]
    assert parse_tries([["graph"]], None, "net", target="avx2", torch=True)[0][0]["target"] == "avx2"
    from_torch = quick_tries(ModelConfig(), torch=True)
    assert from_torch[0] == ["export"] and ["int8-static"] in from_torch and ["tune"] not in from_torch
    assert ["export"] not in quick_tries(ModelConfig())
