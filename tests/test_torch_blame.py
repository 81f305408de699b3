"""The paired replay of PyTorch models: a factory and .safetensors in fresh processes, held to another version of theirs or to ONNX."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers.base import Budget, Rejected
from optimizers.blame import run
from optimizers.measure import Arm, ArmFailed
from optimizers.samples import Samples
from optimizers.session import Settings
from optimizers.torch_module import TorchSource
from tests.judged_models import deep

FACTORY = """
import torch
from torch import nn


class Deep(nn.Module):
    def __init__(self, depth):
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(128, 128) for _ in range(depth))

    def forward(self, x):
        for layer in self.layers:
            x = torch.relu(layer(x))
        return x


def shallow():
    return Deep(20)


def deep():
    return Deep(40)


class Threads(nn.Module):
    def forward(self, x):
        return torch.tensor([float(torch.get_num_threads())])


def greedy():
    torch.set_num_threads(7)
    return Threads()


def no_module():
    return {}
"""
WIRE = (("x", "FP32"),), (("y", "FP32"),)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Weights of two depths, one about twice as slow as the other; samples of 16 rows to a call, and of 160."""
    torch, safe = pytest.importorskip("torch"), pytest.importorskip("safetensors.torch")
    made = tmp_path_factory.mktemp("torch-blame")
    (made / "net.py").write_text(FACTORY)
    for name, depth in (("shallow", 20), ("deep", 40)):
        weights = {
            f"layers.{i}.{part}": torch.randn(shape) / 16
            for i in range(depth)
            for part, shape in (("weight", (128, 128)), ("bias", (128,)))
        }
        safe.save_file(weights, str(made / f"{name}.safetensors"))
    for name, rows in (("reference", 16), ("recent", 16), ("larger", 160)):
        values = np.random.default_rng(len(name)).standard_normal((12, rows, 128)).astype(np.float32)
        Samples({"x": values}, stacked=False).save(made / f"{name}.npz")
    return made


@pytest.fixture
def without_torch(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Processes started from now on find no torch."""
    (tmp_path / "torch.py").write_text("raise ImportError('hidden')\n")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    yield


def source(folder: Path, function: str) -> dict[str, Any]:
    return {"factory": f"{folder / 'net.py'}:{function}", "inputs": WIRE[0], "outputs": WIRE[1]}


def file(folder: Path, side: str, name: str, factory: str = "") -> dict[str, Any]:
    return {side: str(folder / f"{name}.safetensors"), f"{side}_source": source(folder, factory or name)}


def request(folder: Path, live: str, other: str = "", **more: Any) -> dict[str, Any]:
    held_to = file(folder, "other", other) if other else {}
    return {**file(folder, "live", live), **held_to, "reference": samples(folder, "reference"), "seconds": 24, **more}


def samples(folder: Path, name: str) -> dict[str, Any]:
    return {"path": str(folder / f"{name}.npz"), "stacked": False}


@pytest.mark.needs("torch")
def test_a_slower_torch_version_is_blamed_within_its_time(folder: Path) -> None:
    began = time.monotonic()
    found = run(request(folder, "deep", "shallow"), Budget(seconds=30))
    assert found["findings"] == ["version_slower"], found["text"]
    assert all(1.4 < one["ratio"]["low"] < 2.4 for one in found["version"]) and time.monotonic() - began < 30
    json.dumps(found, allow_nan=False)


@pytest.mark.needs("torch")
def test_the_same_torch_file_is_as_proven(folder: Path) -> None:
    found = run(request(folder, "shallow", "shallow", recent=[samples(folder, "recent")], tolerance=0.3), Budget(seconds=30))
    assert found["findings"] == ["as_proven"], found["text"]


@pytest.mark.needs("torch")
def test_larger_inputs_of_a_torch_model_are_blamed_and_the_file_is_not(folder: Path) -> None:
    found = run(request(folder, "shallow", "shallow", recent=[samples(folder, "larger")], tolerance=0.3), Budget(seconds=30))
    assert found["findings"] == ["input_costlier"] and found["input"]["ratio"]["low"] > 1.5, found["text"]


@pytest.mark.needs("torch")
def test_torch_and_onnx_files_are_held_to_each_other(folder: Path) -> None:
    deep(folder / "onnx.onnx", 10)
    onnx = str(folder / "onnx.onnx")
    slower = run({**request(folder, "deep"), "other": onnx}, Budget(seconds=30))
    assert slower["findings"] == ["version_slower"], slower["text"]
    faster = run({**request(folder, "deep"), **file(folder, "other", "deep"), "live": onnx, "live_source": None}, Budget(seconds=30))
    assert faster["findings"] == ["as_proven"] and faster["version"][0]["ratio"]["high"] < 1, faster["text"]


@pytest.mark.needs("torch")
def test_an_other_file_that_does_not_load_is_told_of_and_the_inputs_are_looked_at_all_the_same(folder: Path) -> None:
    broken = file(folder, "other", "shallow", factory="deep")
    found = run({**request(folder, "shallow"), **broken, "recent": [samples(folder, "recent")], "tolerance": 0.3}, Budget(seconds=30))
    assert found["findings"] == ["not_possible"] and "does not fit its factory: it misses layers.20.bias" in found["impossible"]
    assert found["input"]["outcome"] == "within"
    costlier = run({**request(folder, "shallow"), **broken, "recent": [samples(folder, "larger")]}, Budget(seconds=30))
    assert costlier["findings"] == ["input_costlier"] and "does not fit its factory" in costlier["text"]


@pytest.mark.needs("torch")
@pytest.mark.usefixtures("without_torch")
def test_without_torch_it_is_not_possible_and_says_what_to_install(folder: Path) -> None:
    with pytest.raises(Rejected, match=r"torch is not installed: pip install hone-server\[optimize\]"):
        run(request(folder, "shallow"), Budget(seconds=30))
    onnx = deep(folder / "plain.onnx", 10)
    found = run(
        {**request(folder, "shallow"), **file(folder, "other", "shallow"), "live": str(onnx), "live_source": None}, Budget(seconds=30)
    )
    assert found["findings"] == ["not_possible"] and "torch is not installed" in found["text"] and found["fresh"]["cpu_s_per_row"] > 0


@pytest.mark.needs("torch")
def test_only_safetensors_are_read(folder: Path, tmp_path: Path) -> None:
    """Unpickling would run what the file says."""
    import torch

    ran = tmp_path / "ran"
    torch.save(Planted(ran), tmp_path / "model.safetensors")
    weights = {**request(folder, "shallow"), "live": str(tmp_path / "model.safetensors")}
    with pytest.raises(Rejected, match=r"model\.safetensors: .*header"):
        run(weights, Budget(seconds=30))
    assert not ran.exists()


class Planted:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.path,)


@pytest.mark.needs("torch")
def test_an_arm_has_the_threads_that_it_was_told_whatever_the_factory_chose(folder: Path, tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({}, str(tmp_path / "none.safetensors"))
    greedy = TorchSource(f"{folder / 'net.py'}:greedy", *WIRE)
    with Arm(tmp_path / "none.safetensors", Settings(), source=greedy) as arm:
        assert arm.call({"x": np.zeros((1, 1), np.float32)})[0] == [1] and [one.name for one in arm.opened.outputs] == ["y"]
    with pytest.raises(ArmFailed, match=r"net\.py:no_module made a dict, not a torch\.nn\.Module"):
        Arm(tmp_path / "none.safetensors", Settings(), source=TorchSource(f"{folder / 'net.py'}:no_module", *WIRE))


@pytest.mark.needs("torch")
def test_a_twin_is_a_process_of_its_own_that_outlives_nothing(folder: Path) -> None:
    """What happens in one is not seen in the other; the twin ends alone, or with the one it was forked from."""
    source = TorchSource(f"{folder / 'net.py'}:shallow", *WIRE)
    rows = {"x": np.ones((2, 128), np.float32)}
    with Arm(folder / "deep.safetensors", Settings(), source=source, opens=False) as first:
        twin = first.twin(folder / "shallow.safetensors", source)
        with pytest.raises(ArmFailed, match="does not fit its factory"):
            first.open()
        with pytest.raises(ArmFailed, match="its process ended"):
            twin.open()
    with Arm(folder / "shallow.safetensors", Settings(), source=source, opens=False) as first:
        with first.twin(folder / "shallow.safetensors", source) as twin:
            np.testing.assert_array_equal(first.open().call(rows)[0], twin.open().call(rows)[0])
            assert first._process.pid != twin._process.pid
        assert first.call(rows)[0].shape == (2, 128)


def test_a_source_that_is_none_names_what_is_missing() -> None:
    wrongs: tuple[Any, ...] = ({}, {"factory": "net.py:f", "inputs": [["x"]], "outputs": []}, [])
    for wrong in wrongs:
        with pytest.raises(Rejected, match="blame: "):
            run({"live": "a", "reference": {"path": "b"}, "live_source": wrong}, Budget(seconds=30))
