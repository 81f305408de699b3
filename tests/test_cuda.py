"""Training on a GPU: the same methods, the same files afterwards. Left out where PyTorch finds none; what a host without one does is tested there."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers import Budget, NotApplicable, Progress
from optimizers.base import optimize
from optimizers.catalogue import parse_recipe
from tests import torch_models

pytestmark = pytest.mark.needs("torch")


def has_gpu() -> bool:
    if importlib.util.find_spec("torch") is None:
        return False
    import torch

    return torch.cuda.is_available()


on_gpu = pytest.mark.skipif(not has_gpu(), reason="PyTorch finds no GPU here")
without_gpu = pytest.mark.skipif(has_gpu(), reason="PyTorch finds a GPU here")


@without_gpu
def test_a_gpu_that_is_not_there_is_refused_and_auto_does_without(tmp_path: Path) -> None:
    from optimizers.training import device_of

    assert device_of("auto").type == device_of("cpu").type == "cpu"
    golden, data = torch_models.artifact(tmp_path, "cnn"), torch_models.rows("cnn", 64)
    step = parse_recipe([{"method": "distill", "epochs": 1}])[0]
    with pytest.raises(NotApplicable, match=r"device cuda was asked for, and PyTorch .* finds none here: use auto or cpu"):
        optimize(golden, step, data, Budget(scratch=str(tmp_path / "s"), device="cuda"))


RECIPES: dict[str, tuple[str, dict[str, Any]]] = {
    "structured-pruning": ("cnn", {"ratio": 0.5, "epochs": 6}),
    "sensitivity-pruning": ("cnn", {"ratio": 0.3, "epochs": 3}),
    "l1-sparsity": ("cnn", {"epochs": 20, "batch": 16, "rate": 5e-3}),
    "distill": ("cnn", {"epochs": 3, "attention": 1.0, "features": 0.1, "mirror": True}),
    "tucker": ("cnn", {"epochs": 3, "energy": 0.8}),
    "qat": ("cnn", {"epochs": 3, "learn_steps": True}),
    "trained-codebook": ("cnn", {"epochs": 3}),
    "architecture-search": ("cnn", {"strategy": "evolution", "trials": 2, "trial_rows": 64, "epochs": 2}),
    "head-pruning": ("transformer", {"ratio": 0.5, "epochs": 2}),
}


@on_gpu
@pytest.mark.parametrize("method", RECIPES)
def test_a_method_that_trains_does_so_on_the_gpu_and_delivers_a_file_for_cores(method: str, tmp_path: Path) -> None:
    family, options = RECIPES[method]
    golden, data = torch_models.artifact(tmp_path, family), torch_models.rows(family, 256)
    seen: list[Progress] = []
    budget = Budget(scratch=str(tmp_path / "s"), keep=str(tmp_path / "k"), device="auto", on_progress=seen.append)
    made = optimize(golden, parse_recipe([{"method": method, "minutes": 1, **options}])[0], data, budget)
    told = made.facts[-1]["training"]
    assert told["epochs"] >= 1 and told["device"] not in {"cpu", ""}
    assert "bfloat16" in told["timed_ms"] or told["form"] == "float32"
    assert made.path.is_file() and any("loss" in one.detail for one in seen)


@on_gpu
def test_golden_itself_teaches_on_the_gpu_where_its_source_answers_as_its_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from optimizers.distill import DistillConfig
    from optimizers.lessons import Teacher
    from optimizers.workshop import Workshop

    golden, data = torch_models.artifact(tmp_path, "cnn"), torch_models.rows("cnn", 64)
    work = Workshop.open(golden, DistillConfig(), data, Budget(scratch=str(tmp_path / "s")))
    inputs = (torch.from_numpy(np.ascontiguousarray(data.inputs["x"])).cuda(),)
    by_file = Teacher(golden.path, work.opened.signature, 1)(inputs)[0]
    asked: list[Any] = []
    monkeypatch.setattr(work.teacher, "_run", lambda feeds: asked.append(feeds))
    by_source = work.teacher(inputs)[0]
    assert by_file.is_cuda and by_source.is_cuda and not asked
    assert float((by_file - by_source).abs().max() / by_file.abs().max()) < 5e-3, "TF32 keeps ten bits"
    other = torch_models.artifact(tmp_path / "other", "cnn", seed=5)
    teacher = Teacher(golden.path, work.opened.signature, 1, other.source, work.opened.rows)
    assert torch.equal(teacher(inputs)[0], by_file), "a source that is another model's does not teach"


@on_gpu
def test_a_training_taken_up_again_ends_as_one_that_was_not_interrupted(tmp_path: Path) -> None:
    import torch

    from optimizers.training import Plan, Watch, train
    from tests.test_training import Line

    class Placed(Line):
        def loss(self, module: Any, index: Any, random: Any) -> Any:
            self.x = self.x.to(index.device)
            return super().loss(module, index, random)

        def score(self, module: Any) -> tuple[float, float]:
            self.x = self.x.to(next(module.parameters()).device)
            return super().score(module)

    class Killed(Exception):
        pass

    def run(keep: Path, stop: bool) -> tuple[Any, Any]:
        def slowly(progress: Progress) -> None:
            if stop and progress.detail.get("epoch", 0) > 4:
                raise Killed

        torch.manual_seed(0)
        module = torch.nn.Linear(1, 1)
        plan = Plan(epochs=12, batch=16, rate=0.1, form="float32")
        return module, train(module, Placed(), plan, Watch(Budget(device="cuda", on_progress=slowly), "test", checkpoint=keep))

    with pytest.raises(Killed):
        run(tmp_path / "a", True)
    resumed, told = run(tmp_path / "a", False)
    through, _ = run(tmp_path / "b", False)
    assert told.resumed_at == 4 and not resumed.weight.is_cuda
    assert float(resumed.weight.detach()) == pytest.approx(float(through.weight.detach()), rel=1e-5)
