"""The trainer and the source: bounded, resumed after a kill, and a module that comes back from its file as it went in."""

from __future__ import annotations

import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from optimizers import Budget, Cancelled, NotApplicable, Progress, Samples, Source
from tests import torch_models

pytestmark = pytest.mark.needs("torch")
ROOT = Path(__file__).resolve().parent.parent


class Line:
    """Fit y = 2x: an objective with a loss that is easy to follow. Scores are minus the loss on all rows."""

    def __init__(self, rows: int = 64, poison: bool = False) -> None:
        import torch

        self.x = torch.linspace(-1, 1, rows)[:, None]
        self.poison = poison

    @property
    def rows(self) -> int:
        return len(self.x)

    def loss(self, module: Any, index: Any, random: Any) -> Any:
        value = (module(self.x[index]) - 2 * self.x[index]).pow(2).mean()
        return value * float("nan") if self.poison else value

    def score(self, module: Any) -> tuple[float, float]:
        value = -float((module(self.x) - 2 * self.x).pow(2).mean().detach())
        return (value, value)


def trained(
    plan: dict[str, Any] | None = None, watch: dict[str, Any] | None = None, budget: Budget | None = None, objective: Any = None
) -> Any:
    import torch

    from optimizers.training import Plan, Watch, train

    torch.manual_seed(0)
    module = torch.nn.Linear(1, 1)
    plan = {"epochs": 12, "batch": 16, "rate": 0.1, "form": "float32", **(plan or {})}
    return module, train(module, objective or Line(), Plan(**plan), Watch(budget or Budget(), "test", **(watch or {})))


def test_training_learns_and_says_how(tmp_path: Path) -> None:
    seen: list[Progress] = []
    module, result = trained(budget=Budget(on_progress=seen.append))
    assert abs(float(module.weight.detach()) - 2) < 0.2 and result.score[0] > -0.05
    assert [entry["epoch"] for entry in result.history] == list(range(1, 13)) and result.stopped == "epochs"
    assert result.history[0]["loss"] > result.history[-1]["loss"]
    shares = [p.share for p in seen]
    assert shares == sorted(shares) and {"epoch", "loss", "eta_s"} <= seen[-1].detail.keys()


def test_the_best_weights_are_kept_and_training_stops_without_gain() -> None:
    module, result = trained({"epochs": 50, "rate": 3.0, "patience": 3, "optimizer": "sgd"})
    assert result.stopped == "no more gain" and result.best_epoch == 0 and len(result.history) == 3
    assert result.score[0] == Line().score(module)[0], "the weights before training were the best"


def test_a_time_limit_ends_training_and_not_the_job() -> None:
    _, result = trained({"epochs": 100_000, "seconds": 0.3, "patience": 100_000})
    assert result.stopped == "time" and 0 < len(result.history) < 100_000


def test_cancellation_ends_at_once() -> None:
    calls = 0

    def cancelled() -> bool:
        nonlocal calls
        calls += 1
        return calls > 3

    with pytest.raises(Cancelled):
        trained(budget=Budget(cancelled=cancelled))
    assert calls == 4


def test_a_loss_that_is_no_number_ends_with_the_reason() -> None:
    with pytest.raises(NotApplicable, match="the loss became nan in training: try a smaller rate"):
        trained(objective=Line(poison=True))


def test_equal_seeds_train_equally_and_the_form_is_timed_here() -> None:
    first, second = (trained({"form": "auto"})[0] for _ in range(2))
    assert float(first.weight.detach()) == float(second.weight.detach())
    _, result = trained({"form": "auto"})
    assert set(result.timed_ms) == {"float32", "bfloat16"} and result.form in result.timed_ms


KILLED = """
import sys
from pathlib import Path
from optimizers import Budget
from tests.test_training import trained
def slowly(progress):
    if int(sys.argv[2]) and progress.detail.get("epoch", 0) > 4:
        print("now", flush=True); sys.stdin.read()
module, result = trained(watch={"checkpoint": Path(sys.argv[1])}, budget=Budget(on_progress=slowly))
print(float(module.weight.detach()), float(module.bias.detach()), result.resumed_at, len(result.history))
"""


def test_a_killed_training_goes_on_where_it_was_and_ends_the_same(tmp_path: Path) -> None:
    def start(path: Path, stop: int) -> subprocess.Popen[str]:
        return subprocess.Popen(
            [sys.executable, "-c", KILLED, str(path), str(stop)], cwd=ROOT, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    process = start(tmp_path / "a.checkpoint", 1)
    assert process.stdout is not None and process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert (tmp_path / "a.checkpoint").exists()
    resumed = start(tmp_path / "a.checkpoint", 0).communicate(timeout=120)[0].split()
    through = start(tmp_path / "b.checkpoint", 0).communicate(timeout=120)[0].split()
    assert resumed[2:] == ["4", "12"] and through[2:] == ["0", "12"]
    assert resumed[:2] == through[:2], "the same weights as without the kill"
    again = start(tmp_path / "a.checkpoint", 0).communicate(timeout=120)[0].split()
    assert again == [*resumed[:2], "12", "12"], "a finished training is not done again"


def test_a_checkpoint_of_another_module_counts_as_none(tmp_path: Path) -> None:
    import torch

    from optimizers.training import Plan, Watch, train

    watch: dict[str, Any] = {"checkpoint": tmp_path / "a.checkpoint"}
    module = torch.nn.Sequential(torch.nn.Linear(1, 2), torch.nn.Linear(2, 1))
    train(module, Line(), Plan(epochs=2, form="float32"), Watch(Budget(), "test", **watch))
    assert trained(watch=watch)[1].resumed_at == 0
    assert trained(watch=watch)[1].resumed_at == 12
    watch["checkpoint"].write_bytes(watch["checkpoint"].read_bytes()[:100])
    assert trained(watch=watch)[1].resumed_at == 0


# ---- the source
def test_a_source_that_is_not_the_models_is_refused(tmp_path: Path) -> None:
    from optimizers.torch_source import open_source

    right = torch_models.artifact(tmp_path / "a", "mlp")
    other = torch_models.artifact(tmp_path / "b", "mlp", seed=5)
    assert other.source is not None
    data = torch_models.rows("mlp")
    assert open_source(right, data, "prune").signature.inputs == ("x",)
    for broken, text in (
        (replace(right, source=other.source), "does not answer as the model it should be the source of"),
        (replace(right, source=None), "needs the PyTorch source of the model"),
        (replace(right, source=Source(f"{tmp_path}/none.py:f", tmp_path)), "names no Python file|cannot be read"),
        (
            replace(right, source=Source(torch_models.factory(tmp_path / "a", "nothing"), other.source.weights)),
            "has no attribute 'nothing'",
        ),
        (
            replace(right, source=Source(torch_models.factory(tmp_path / "a", "cnn"), other.source.weights)),
            "does not fit factories.py:cnn: it misses",
        ),
    ):
        with pytest.raises(NotApplicable, match=text):
            open_source(broken, data, "prune")
    with pytest.raises(NotApplicable, match="lack the input 'x'"):
        open_source(right, Samples({"z": np.zeros((4, 16), np.float32)}), "prune")


def test_tied_weights_come_back_tied_and_missing_ones_are_named(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    from optimizers.torch_source import load_module, make, save_source

    factory = torch_models.factory(tmp_path, "tied")
    module: Any = make(factory)
    source = save_source(module, factory, tmp_path / "w.safetensors")
    again: Any = load_module(source)
    assert again.head.weight.data_ptr() == again.emb.weight.data_ptr() and bool((again.head.weight == module.head.weight).all())
    save_file({"other.weight": module.head.weight.detach().clone()}, str(tmp_path / "lacking.safetensors"))
    with pytest.raises(NotApplicable, match=r"misses emb.weight, head.weight"):
        load_module(Source(factory, tmp_path / "lacking.safetensors"))


def test_an_export_serves_every_batch_size_and_a_frozen_parent_stays_frozen(tmp_path: Path) -> None:
    import onnxruntime as ort

    from optimizers.torch_source import Signature, export, make

    module = make(torch_models.factory(tmp_path, "depthwise"))
    data = torch_models.rows("depthwise")
    path = export(module, Signature(("x",), ("y",), {"x": (0,)}), data, tmp_path / "m.onnx")
    session = ort.InferenceSession(str(path))
    assert [session.run(None, {"x": data.inputs["x"][:n]})[0].shape[0] for n in (1, 2, 7)] == [1, 2, 7]
    kinds = [node.op_type for node in onnx.load(path).graph.node]
    assert "BatchNormalization" not in kinds and not onnx.load(path).graph.node[0].metadata_props
    frozen = export(module, Signature(("x",), ("y",), {"x": ()}), data.rows(slice(0, 2)), tmp_path / "f.onnx")
    assert ort.InferenceSession(str(frozen)).get_inputs()[0].shape == [2, 1, 8, 8]
