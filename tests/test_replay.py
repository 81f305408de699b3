"""What the paired replay is asked of a PyTorch model: which files, by which factories, and when it is not possible."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from app.catalog.card_facts import GoldenCard, RowsProof
from app.catalog.cards import Cards
from app.catalog.repository import Repository
from app.catalog.state_folder import StateFolder
from app.control.bench import Bench
from app.control.findings import Replay
from app.control.replay import _question, replay
from app.control.verification import question
from app.domain import Generation, ModelState, RuntimeSettings, Signature, TensorSpec
from optimizers.samples import Samples
from optimizers.task import TaskLimits, run_task
from optimizers.torch_module import TorchSource

CONFIG = """
platform: torch
source:
  factory: net.py:slow
  inputs: [{name: x, datatype: FP32, shape: [-1, 4]}]
  outputs: [{name: y, datatype: FP32, shape: [-1, 4]}]
batching: {rows: independent}
samples: {reference: named.npz, calibration: named.npz}
"""
SIGNATURE = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("y", "FP32", (-1, 4)),))
SETTINGS = RuntimeSettings(1, 1, 1, 16)


def scene(folder: Path, factories: list[Path] | None = None) -> tuple[Bench, ModelState]:
    """Version 1 came with the factory `fast`; 2, which serves, with `slow`."""
    model = folder / "models" / "net"
    state = StateFolder(folder / "state").prepare()
    (folder / "factories").mkdir(exist_ok=True)
    (folder / "factories" / "net.py").write_text("")
    for number in ("1", "2"):
        (model / number).mkdir(parents=True, exist_ok=True)
        save_file({"w": np.full(1, int(number), np.float32)}, model / number / "model.safetensors")
    (model / "model.yaml").write_text(CONFIG)
    Samples({"x": np.zeros((40, 4), np.float32)}).save(model / "named.npz")
    allowed = Repository(folder / "models", factories=[folder / "factories"])
    cards = Cards(state)
    for version, factory in zip(allowed.find("net").versions, ("net.py:fast", "net.py:slow"), strict=True):
        facts = {"serving": {}, "factory": factory}
        cards.write_golden(
            GoldenCard("net", version.number, allowed.sha256(version), (), SIGNATURE, RowsProof(False, ""), "torch", facts=facts)
        )
    golden = cards.golden("net", "2")
    assert golden is not None
    repository = allowed if factories is None else Repository(folder / "models", factories=factories)
    return Bench(repository, state, cards), ModelState("net", "2", golden.sha256, "2", "1", Generation(1, 2))


def asked(bench: Bench, want: ModelState, version: str, folder: Path) -> tuple[dict[str, Any], str]:
    piece = bench.workpiece("net", want.golden, want.golden_sha256)
    return _question(bench, piece, want, version, SETTINGS, [], 0.0, folder)


def test_a_proof_names_what_runs_each_pytorch_version_and_the_layout_that_it_is_served_in(tmp_path: Path) -> None:
    """Golden may be proven itself, beside an earlier golden that a person went back to."""
    bench, want = scene(tmp_path)
    piece = bench.workpiece("net", want.golden, want.golden_sha256)
    back = replace(want, desired="1")
    request = question(bench, piece, back, "2", "here", RuntimeSettings(4, 1, 16, 512), tmp_path, 60.0, proof_only=True, lossless=False)
    models, factory = tmp_path / "models" / "net", f"{tmp_path / 'factories' / 'net.py'}:"
    assert request["golden"] == request["candidate"] == str(models / "2" / "model.safetensors")
    assert request["incumbent"] == str(models / "1" / "model.safetensors")
    sources = {path: TorchSource.from_json(source) for path, source in request["sources"].items()}
    assert {path: source.factory for path, source in sources.items() if source} == {
        request["golden"]: f"{factory}slow", request["incumbent"]: f"{factory}fast",
    }  # fmt: skip
    assert all(source and source.input_shapes == ((-1, 4),) for source in sources.values())
    assert request["batchable"], "by the owner's word"
    served = request["incumbent_settings"]
    assert (served["intra_op_threads"], served["instances"]) == (1, 4), "as the server runs what nobody measured"


def test_each_version_is_made_by_the_factory_that_it_came_with(tmp_path: Path) -> None:
    bench, want = scene(tmp_path)
    request, held_to = asked(bench, want, "2", tmp_path)
    models, factories = tmp_path / "models" / "net", tmp_path / "factories"
    assert held_to == "1" and request["live"] == str(models / "2" / "model.safetensors")
    wire = {"inputs": [["x", "FP32", [-1, 4]]], "outputs": [["y", "FP32", [-1, 4]]]}
    assert request["live_source"] == {"factory": f"{factories / 'net.py'}:slow", **wire}
    assert request["other_source"] == {"factory": f"{factories / 'net.py'}:fast", **wire}
    assert request["reference"]["stacked"], "rows are independent by the owner's word, so that each is a sample"
    (tmp_path / "models" / "net" / "1" / "model.safetensors").unlink()
    request, held_to = asked(bench, want, "2", tmp_path)
    assert held_to == "" and "other" not in request, "a version that is gone is nothing to be held to"


def test_a_first_factory_that_lies_elsewhere_now_gives_way_to_the_one_in_model_yaml(tmp_path: Path) -> None:
    bench, want = scene(tmp_path)
    elsewhere = tmp_path / "elsewhere.py"
    elsewhere.write_text("")
    (tmp_path / "factories" / "net.py").rename(tmp_path / "factories" / "other.py")
    (tmp_path / "factories" / "net.py").symlink_to(elsewhere)
    (tmp_path / "models" / "net" / "model.yaml").write_text(CONFIG.replace("net.py:slow", "other.py:slow"))
    request, _ = asked(bench, want, "2", tmp_path)
    assert request["other_source"]["factory"] == f"{tmp_path / 'factories' / 'other.py'}:slow"


@pytest.mark.parametrize(("allowed", "text"), [([], "switched off"), ([Path("/nowhere")], "no such file in HONE_FACTORIES")])
def test_a_factory_that_the_operator_does_not_allow_is_not_run_and_the_replay_says_so(
    allowed: list[Path], text: str, tmp_path: Path
) -> None:
    bench, want = scene(tmp_path, allowed)
    found = asyncio.run(replay(bench, want, "2", SETTINGS, 0, [], 0.0, 0.0))
    assert found == Replay(findings=("not_possible",), why=found.why) and text in found.why


@pytest.mark.parametrize(("others", "nice"), [(0.2, 5), (0.9, 0)])
def test_what_the_task_refuses_is_not_possible_and_beside_other_programs_it_runs_as_one_of_them(
    others: float, nice: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked_with: list[TaskLimits] = []

    async def noted(kind: str, request: dict[str, Any], limits: TaskLimits) -> dict[str, Any]:
        asked_with.append(limits)
        return await run_task(kind, request, limits)

    monkeypatch.setattr("app.control.replay.run_task", noted)
    bench, want = scene(tmp_path)
    found = asyncio.run(replay(bench, want, "2", SETTINGS, 0, [], 0.0, others))
    assert found.findings == ("not_possible",) and ("no attribute 'slow'" in found.why or "torch is not installed" in found.why)
    assert [limits.nice for limits in asked_with] == [nice]
