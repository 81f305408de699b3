"""Blame by a paired replay beside live traffic. Runs without other tests: on a loud host the replay rightly tells nothing."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import numpy as np
import pytest

from app.faulty_models import free_size, slower_twin
from app.injection import Traffic
from tests.loop_scene import deploy, running, told, traffic
from tests.running_server import DEMO, Running, server

__all__ = ["running", "traffic"]  # fixtures


def test_a_slower_model_is_blamed_by_replay_and_a_better_one_asked_for(running: Running, traffic: Traffic) -> None:
    config = running.folder / "models" / "digits" / "model.yaml"
    promised = config.read_text().replace("objective: {p99_ms: 50}", "objective: {p95_ms: 1}")
    assert promised != config.read_text()
    deploy(running, lambda source, target: slower_twin(source, target, 3))
    running.until(lambda: running.admin("GET", "/admin/models/digits")["active"] == "2", 30)
    config.write_text(promised)
    assert told(running, "diagnosis.made", seconds=240, cause="version")["evidence"]["replay"]["version"][1] > 1.5
    assert "× as fast for" in told(running, "plan.made", action="optimize")["summary"]
    job = running.until(lambda: running.admin("GET", "/admin/jobs")["jobs"], 20)[0]
    assert job["actor"] == "hone" and job["tries"][0][0]["method"] == "int8-static" and job["rank"] > 0


def test_larger_images_are_blamed_though_most_of_what_was_captured_is_small(running: Running, traffic: Traffic) -> None:
    deploy(running, free_size)
    running.until(lambda: running.admin("GET", "/admin/models/digits")["active"] == "2", 30)
    traffic.raise_to(rate=80.0, rows=1, callers=8)
    running.until(lambda: _knows_its_normal(running), 90)
    traffic.change = lambda images: images.repeat(2, -1).repeat(2, -2)
    found = told(running, "diagnosis.made", seconds=240, cause="input")  # a loud host is told first, and asked again after a minute
    assert found["evidence"]["replay"]["recent"][1] > 1.5 and "earlier ones" in found["summary"]
    assert told(running, "plan.made", action="tune")
    assert traffic.failed == 0


FACTORIES = """
import importlib.util
from pathlib import Path


def once():
    spec = importlib.util.spec_from_file_location("digits_resnet", Path(__file__).with_name("digits_resnet.py"))
    whole = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(whole)
    return whole.build()


def thrice():
    module = once()
    forward = module.forward
    module.forward = lambda x: sum(forward(x * (1 + i * 1e-6)) for i in range(3)) / 3
    return module
"""
TORCH = """
platform: torch
task: classification
source:
  factory: net.py:once
  inputs: [{name: image, datatype: FP32, shape: [-1, 1, 32, 32]}]
  outputs: [{name: logits, datatype: FP32, shape: [-1, 10]}]
batching: {rows: independent}
"""


@pytest.mark.needs("torch")
def test_a_slower_pytorch_version_is_blamed_by_replay_and_no_job_is_begun_that_only_onnx_can_have(tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    weights = DEMO / "repository" / "digits" / "1" / "model.safetensors"
    shutil.copytree(DEMO / "factories", tmp_path / "factories")
    (tmp_path / "factories" / "net.py").write_text(FACTORIES)
    model = tmp_path / "models" / "digits"
    (model / "1").mkdir(parents=True)
    shutil.copyfile(weights, model / "1" / "model.safetensors")
    (model / "model.yaml").write_text(TORCH)
    with np.load(DEMO / "repository" / "digits" / "samples" / "judging.npz") as samples:
        images = samples["image"]
    with server(tmp_path, block_s="1.5", factories=str(tmp_path / "factories")) as running:
        running.ready("digits")
        with Traffic("127.0.0.1", running.port, images, rate=15.0, callers=4) as traffic:
            running.until(lambda: traffic.sent > 150, 60)
            (model / "model.yaml").write_text(TORCH.replace("net.py:once", "net.py:thrice"))
            (model / ".2").mkdir()
            save_file(load_file(weights), model / ".2" / "model.safetensors", {"is": "another file"})
            os.replace(model / ".2", model / "2")
            running.until(lambda: running.admin("GET", "/admin/models/digits")["active"] == "2", 60)
            blamed = told(running, "diagnosis.made", seconds=240, cause="version")
            assert blamed["evidence"]["replay"]["version"][1] > 2 and "version 1 and its proof" in blamed["summary"]
            assert "export version 2 to ONNX" in told(running, "plan.made", action="nothing")["summary"]
            assert not running.admin("GET", "/admin/jobs")["jobs"] and not traffic.failed


def _knows_its_normal(running: Running) -> bool:
    told = running.admin("GET", "/admin/models/digits")["loop"]
    return bool(told["condition"] == "steady" and told.get("shape_shift") is not None and told.get("cost_ratio"))
