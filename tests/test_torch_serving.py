"""A PyTorch model from end to end: a factory that the operator allowed, weights as safetensors, served by a torch runner."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.running_server import server

FACTORY = """
import torch

def build():
    return torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
"""
CONFIG = """
platform: torch
source:
  factory: net.py:build
  weights: model.safetensors
  inputs: [{name: x, datatype: FP32, shape: [-1, 3]}]
  outputs: [{name: y, datatype: FP32, shape: [-1, 2]}]
"""


@pytest.mark.needs("torch")
def test_a_pytorch_model_is_served_as_model_yaml_declares_it_also_when_that_changes(tmp_path: Path) -> None:
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(0)
    module = torch.nn.Sequential(torch.nn.Linear(3, 8), torch.nn.ReLU(), torch.nn.Linear(8, 2))
    (tmp_path / "factories").mkdir()
    (tmp_path / "factories" / "net.py").write_text(FACTORY)
    for name, config in (("net", CONFIG), ("mute", CONFIG.partition("  inputs")[0])):
        folder = tmp_path / "models" / name / "1"
        folder.mkdir(parents=True)
        save_file(module.state_dict(), folder / "model.safetensors")
        (folder.parent / "model.yaml").write_text(config)
    rows = [[1.0, -2.0, 0.5], [0.0, 0.25, 4.0]]
    with server(tmp_path, factories=str(tmp_path / "factories")) as running:
        running.ready("net")
        body = {"inputs": [{"name": "x", "shape": [2, 3], "datatype": "FP32", "data": rows}]}
        answer = running.call("POST", "/v2/models/net/infer", json=body).json()
        expected = module(torch.tensor(rows)).flatten().tolist()
        assert answer["outputs"][0]["data"] == pytest.approx(expected, abs=1e-5)
        meta = running.call("GET", "/v2/models/net").json()
        assert meta["platform"].startswith("pytorch") and meta["inputs"][0]["name"] == "x"
        refused = running.call("POST", "/v2/models/mute/infer", json=body)
        assert refused.status_code == 503 and "declare source.inputs and source.outputs" in refused.json()["error"]
        renamed = [{**body["inputs"][0], "name": "features"}]
        declared = tmp_path / "models" / "net" / "model.yaml"
        declared.write_text(CONFIG.replace("name: x", "name: features"))
        running.until(lambda: running.call("POST", "/v2/models/net/infer", json={"inputs": renamed}).status_code == 200)
        assert running.call("GET", "/v2/models/net").json()["inputs"][0]["name"] == "features"
        (tmp_path / "factories" / "net.py").write_text(FACTORY.replace("Linear(8, 2)", "Linear(8, 2), torch.nn.Tanh()"))

        def squashed() -> bool:
            answer = running.call("POST", "/v2/models/net/infer", json={"inputs": renamed}).json()
            return bool(answer["outputs"][0]["data"] == pytest.approx(torch.tanh(torch.tensor(expected)).tolist(), abs=1e-5))

        running.until(squashed, 60)
        kinds = [event["kind"] for event in running.admin("GET", "/admin/timeline?model=net")["events"]]
        assert kinds.count("model.deployed") == 2, "other code beside the same weights is another model; other names are not"
