"""Recipes step by step: each step on the last one's result, the right samples to each, one checked file at the end."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import onnx
import pytest

from optimizers import Artifact, Budget, Config, Need, NotApplicable, Progress, Rejected, Samples, Source, base, catalogue
from optimizers.artifact import sha256_of
from optimizers.graph import GraphConfig
from optimizers.int8 import Int8StaticConfig
from optimizers.onnx_graph import load, save
from optimizers.recipe import Order, build, run_steps, samples_for
from optimizers.task import Failure, TaskFailed, TaskLimits, run_task_sync
from tests import models
from tests.onnx_models import mlp, normal, resnet, write


@dataclass(frozen=True)
class HalveConfig(Config):
    """Halves the last bias; external weights come with it."""

    method: ClassVar[str] = "halve"
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ONNX, Need.LABELLED})
    source: bool = False


def halve(artifact: Artifact, config: HalveConfig, samples: Samples, budget: Budget) -> Artifact:
    model = load(artifact.path)
    tensor = model.graph.initializer[-1]
    tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor) / 2, tensor.name))
    folder = budget.folder("halve")
    (folder / "leftover.data").write_bytes(b"x")
    made = save(model, folder / "halved.onnx")
    budget.tick("halve", "half", 0.5)
    if config.source:
        (folder / "w.bin").write_bytes(b"weights")
        return artifact.derived(made, config.to_json(), {"rows": len(samples)}, Source("f.py:make", folder / "w.bin"))
    return artifact.derived(made, config.to_json(), {"rows": len(samples)})


@pytest.fixture(autouse=True)
def halving(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue.config_types()
    monkeypatch.setitem(base._methods, HalveConfig, halve)


def labelled(count: int = 16) -> Samples:
    return Samples({"x": normal(0, count, 16)}, np.zeros(count, np.int64))


def last_bias(path: Path) -> Any:
    return onnx.numpy_helper.to_array(onnx.load(path).graph.initializer[-1])


def test_steps_build_on_each_other_and_report_their_place(tmp_path: Path) -> None:
    path = write(mlp(), tmp_path / "model.onnx")
    labelled().save(tmp_path / "train.npz")
    seen: list[Progress] = []
    order = Order(
        str(path), ("halve", {"method": "halve", "source": True}), str(tmp_path / "job"), samples={"train": str(tmp_path / "train.npz")}
    )
    built = build(order, Budget(scratch=str(tmp_path / "scratch"), on_progress=seen.append))
    out = tmp_path / "job" / "built"
    assert Path(built.path) == out / "model.onnx" and built.files == ("model.onnx",)
    assert sorted(p.name for p in out.iterdir()) == ["model.onnx", "weights.safetensors"]
    assert np.allclose(last_bias(out / "model.onnx"), last_bias(path) / 4)
    assert built.source == {"factory": "f.py:make", "weights": str(out / "weights.safetensors")}
    assert [step["method"] for step in built.recipe] == ["halve", "halve"]
    assert [fact["rows"] for fact in built.facts] == [16, 16] and built.facts[0]["lossless"] is False
    assert built.sha256 == sha256_of(out / "model.onnx")
    assert built.inspection["batchable"] is True and built.inspection["inputs"][0]["name"] == "x"
    halves = [(p.share, p.detail["step_number"], p.detail["steps"]) for p in seen if p.step == "half"]
    assert halves == [(0.25, 1, 2), (0.75, 2, 2)]
    assert list((tmp_path / "scratch").iterdir()) == [], "nothing is left in scratch"


def test_a_step_that_does_not_apply_is_named(tmp_path: Path) -> None:
    path = write(mlp(), tmp_path / "model.onnx")
    sets = {"calibration": Samples({"x": normal(0, 16, 16)})}
    configs = (Int8StaticConfig(), Int8StaticConfig())
    with pytest.raises(NotApplicable, match=r"step 2 \(int8-static\): already quantized"):
        run_steps(Artifact(path), configs, sets, Budget(scratch=str(tmp_path / "s")))


@pytest.mark.parametrize("name", ["int8-static", "int8-aware", "int8-dynamic", "mixed-precision", "int4-linear", "codebook", "low-rank"])
def test_weights_that_a_method_does_not_reach_are_told_of(tmp_path: Path, name: str) -> None:
    """A model full of matrices is told what is the matter with them, rather than that it has none."""
    half = mlp((16, 64, 64))
    for tensor in half.graph.initializer:
        tensor.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(tensor).astype(np.float16), tensor.name))
    for value in (*half.graph.input, *half.graph.output):
        value.type.tensor_type.elem_type = onnx.TensorProto.FLOAT16
    config = catalogue.parse_step(name)
    for path, dtype, said in (
        (save(half, tmp_path / "half.onnx"), np.float16, "its weights are float16"),
        (branches(tmp_path / "branches.onnx"), np.float32, "in the bodies of If"),
    ):
        samples = Samples({"x": normal(0, 64, 16).astype(dtype)})
        with pytest.raises(NotApplicable, match=said):
            base.optimize(Artifact(path), config, samples, Budget(scratch=str(tmp_path / "scratch")))


def branches(path: Path) -> Path:
    """Multiplies by one of two matrices, by the sign of the sum of all inputs."""
    bodies = []
    for at in range(2):
        weight = onnx.numpy_helper.from_array(normal(at, 16, 64), f"w{at}")
        out = models.value(f"y{at}", "FP32", ["N", 64])
        bodies.append(
            onnx.helper.make_graph([onnx.helper.make_node("MatMul", ["x", f"w{at}"], [f"y{at}"])], f"body{at}", [], [out], [weight])
        )
    nodes = [
        onnx.helper.make_node("ReduceSum", ["x"], ["sum"], keepdims=0),
        onnx.helper.make_node("Cast", ["sum"], ["flag"], to=onnx.TensorProto.BOOL),
        onnx.helper.make_node("If", ["flag"], ["y"], then_branch=bodies[0], else_branch=bodies[1]),
    ]
    return models.save(path, nodes, [models.value("x", "FP32", ["N", 16])], [models.value("y", "FP32", ["N", 64])])


def test_each_step_gets_samples_by_its_needs() -> None:
    inputs: dict[str, Any] = {"x": normal(0, 4, 16)}
    calibration, train = Samples(inputs), Samples(inputs, np.zeros(4, np.int64))
    assert samples_for(Int8StaticConfig(), {"train": train, "calibration": calibration}) is calibration
    assert samples_for(Int8StaticConfig(), {"train": train}) is train
    assert samples_for(HalveConfig(), {"train": train, "calibration": calibration}) is train
    assert len(samples_for(GraphConfig(), {})) == 0
    with pytest.raises(NotApplicable, match="halve needs labelled training data"):
        samples_for(HalveConfig(), {"train": calibration})
    with pytest.raises(NotApplicable, match="int8-static needs calibration inputs"):
        samples_for(Int8StaticConfig(), {})


def test_sets_that_judge_are_never_read(tmp_path: Path) -> None:
    path = write(mlp(), tmp_path / "model.onnx")
    judging = dict.fromkeys(("reference", "live", "labelled"), str(tmp_path / "missing.npz"))
    with pytest.raises(NotApplicable, match="needs calibration inputs"):
        build(Order(str(path), ("int8-static",), str(tmp_path), samples=judging), Budget(scratch=str(tmp_path / "s")))


def test_a_step_may_carry_the_target() -> None:
    order = Order.from_json({"path": "p", "recipe": ["graph", {"method": "int8-static", "target": "avx2"}], "scratch": "s"})
    assert order.target == "avx2" and order.recipe == ("graph", {"method": "int8-static"})
    with pytest.raises(Rejected, match="unexpected keyword argument 'pth'"):
        Order.from_json({"pth": "p"})


def test_a_job_runs_as_a_task_child(tmp_path: Path) -> None:
    path = write(resnet(), tmp_path / "model.onnx")
    Samples({"image": normal(0, 32, 3, 8, 8)}).save(tmp_path / "c.npz")
    order = {
        "path": str(path),
        "recipe": ["int8-static"],
        "samples": {"calibration": str(tmp_path / "c.npz")},
        "origins": {"calibration": "captured"},
        "scratch": str(tmp_path / "job"),
    }
    built = run_task_sync("optimize", order, TaskLimits(scratch=str(tmp_path)))
    assert json.loads(json.dumps(built)) == built
    assert Path(built["path"]).exists() and built["facts"][0]["calibration_origin"] == "captured"
    assert built["inspection"]["quantized"] == "QDQ" and built["bytes"] == Path(built["path"]).stat().st_size
    for recipe, failure, text in (
        (["int8-statik"], Failure.REJECTED, "did you mean 'int8-static'"),
        ([], Failure.REJECTED, "at least one step"),
    ):
        with pytest.raises(TaskFailed, match=text) as caught:
            run_task_sync("optimize", {**order, "recipe": recipe}, TaskLimits(scratch=str(tmp_path)))
        assert caught.value.kind is failure
