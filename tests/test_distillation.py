"""Losses against values worked out by hand, and students that learn what golden knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers import Budget, NotApplicable
from optimizers.distill import DistillConfig
from tests import torch_models

pytestmark = pytest.mark.needs("torch")


def by_hand(teacher: Any, student: Any, temperature: float) -> Any:
    """T² Σ p log(p / q) per position, in float64."""

    def soft(x: Any) -> Any:
        e = np.exp(x / temperature - (x / temperature).max(-1, keepdims=True))
        return e / e.sum(-1, keepdims=True)

    p, q = soft(teacher), soft(student)
    return temperature**2 * (p * np.log(p / q)).sum(-1)


def test_the_soft_loss_is_that_of_the_paper_whatever_the_batch_and_length() -> None:
    import torch

    from optimizers.losses import soft_labels

    two = soft_labels(torch.tensor([[0.0, 0.0]]), torch.tensor([[np.log(9.0) * 2, 0.0]], dtype=torch.float64), 2.0)
    assert float(two) == pytest.approx(4 * (0.9 * np.log(1.8) + 0.1 * np.log(0.2)), abs=1e-6)
    random = np.random.default_rng(0)
    teacher, student = random.normal(size=(4, 6, 10)), random.normal(size=(4, 6, 10))
    t, s = torch.from_numpy(teacher), torch.from_numpy(student)
    expected = by_hand(teacher, student, 2.0)
    assert float(soft_labels(s, t, 2.0)) == pytest.approx(expected.mean(), abs=1e-6)
    assert float(soft_labels(s[:, 0], t[:, 0], 2.0)) == pytest.approx(expected[:, 0].mean(), abs=1e-6)
    assert float(soft_labels(s.repeat(3, 2, 1), t.repeat(3, 2, 1), 2.0)) == pytest.approx(expected.mean(), abs=1e-6)
    mask = torch.from_numpy(random.random((4, 6)) < 0.5)
    poisoned = torch.where(mask[..., None], s, torch.full_like(s, float("inf")))
    assert float(soft_labels(s, t, 2.0, mask)) == pytest.approx(expected[mask.numpy()].mean(), abs=1e-6)
    assert float(soft_labels(poisoned, t, 2.0, mask)) == pytest.approx(expected[mask.numpy()].mean(), abs=1e-6), (
        "masked positions count nothing"
    )
    assert float(soft_labels(t, s, 2.0)) != pytest.approx(expected.mean(), abs=1e-3), "teacher and student are not exchangeable"


def test_attention_maps_and_features_by_hand() -> None:
    import torch

    from optimizers.losses import as_logits, attention, attention_map, features, hard_labels

    a = torch.tensor([[[[1.0, 2.0]], [[1.0, 0.0]]]])  # two channels, 1×2: mean squares 1 and 2
    assert attention_map(a).tolist()[0] == pytest.approx([1 / 5**0.5, 2 / 5**0.5])
    b = torch.tensor([[[[3.0, 0.0]]]])
    assert float(attention(a, b)) == pytest.approx((1 - 1 / 5**0.5) ** 2 + 4 / 5)
    assert float(attention(a, 7 * a)) == pytest.approx(0, abs=1e-12), "scale does not matter, place does"
    tokens = torch.tensor([[[1.0, 1.0], [2.0, 0.0]]])  # [N, L, D]
    assert attention_map(tokens).tolist()[0] == pytest.approx([1 / 5**0.5, 2 / 5**0.5])
    assert float(features(a, 2 * a)) == pytest.approx(0.25) and float(features(a, 2 * a, "cosine")) == pytest.approx(0, abs=1e-6)
    assert float(hard_labels(torch.tensor([[0.0, 0.0]]), torch.tensor([1]))) == pytest.approx(np.log(2))
    p = torch.tensor([[0.9, 0.1]])
    assert torch.allclose(as_logits(p).softmax(-1), p) and as_logits(torch.tensor([[3.0, -1.0]])).tolist() == [[3.0, -1.0]]


def agreement(first: Path, second: Path, rows: Any) -> float:
    import onnxruntime as ort

    answers = [ort.InferenceSession(str(path)).run(None, rows.inputs)[0].argmax(-1) for path in (first, second)]
    return float((answers[0] == answers[1]).mean())


def test_a_student_learns_from_golden_alone_and_looks_where_it_looks(tmp_path: Path) -> None:
    from optimizers import optimize

    golden = torch_models.artifact(tmp_path, "cnn")
    fast: dict[str, Any] = {"student": "factories.py:small", "epochs": 12, "batch": 16, "rate": 5e-3, "augment": False, "temperature": 4.0}
    unlabelled = torch_models.rows("cnn", 96, labels=False)
    config = DistillConfig(**fast, attention=1.0, features=0.1)
    made = optimize(golden, config, unlabelled, Budget(scratch=str(tmp_path / "s")))
    facts = made.facts[-1]
    assert facts["pairs"] == ["block1", "block2"] and facts["adapters"] == 2 and facts["training"]["labels"] is False
    assert (
        facts["after"]["parameters"] < 0.4 * facts["before"]["parameters"]
        and facts["before"]["multiply_adds"] > 2 * facts["after"]["multiply_adds"]
    )
    fresh = torch_models.rows("cnn", 200, seed=9)
    assert agreement(golden.path, made.path, fresh) > 0.8
    assert made.golden == golden.path and made.source is not None and made.source.factory.endswith(":small")


def test_attention_weight_is_what_draws_the_maps_together(tmp_path: Path) -> None:
    """Without the term (weight 0) the maps stay apart: removing it fails this test."""
    import torch

    from optimizers.distillation import Pupil, _inside
    from optimizers.losses import attention
    from optimizers.torch_source import make, open_source
    from optimizers.training import Plan, Watch, train
    from optimizers.workshop import Workshop

    golden = torch_models.artifact(tmp_path, "cnn")
    data = torch_models.rows("cnn", 64, labels=False)

    def distance(weight: float) -> float:
        torch.manual_seed(0)
        config = DistillConfig(attention=weight, augment=False)
        work = Workshop.open(golden, config, data, Budget(scratch=str(tmp_path / "s")))
        pupil = Pupil(make(torch_models.factory(tmp_path, "small")))
        inside = _inside(pupil, golden, replace(config, attention=weight or 1.0), work.opened)
        lesson = work.lesson(inside.term if weight else None)
        train(pupil, lesson, Plan(6, 16, 5e-3, form="float32", patience=99), Watch(Budget(), "distill"))
        pupil(*lesson.held)
        taught = open_source(golden, data, "distill").module
        with torch.no_grad():
            maps = [taught.block1(torch.relu(taught.stem(*lesson.held)))]  # type: ignore[operator]
            return float(attention(inside.seen["block1"], maps[0]))

    assert distance(10.0) < 0.7 * distance(0.0)


def test_students_and_layers_that_do_not_fit_are_named(tmp_path: Path) -> None:
    from optimizers import optimize

    golden = torch_models.artifact(tmp_path, "mlp", steps=2)
    data = torch_models.rows("mlp")
    for config, text in (
        (DistillConfig(student="../evil.py:f"), r"student '../evil.py:f' names no factory beside factories.py"),
        (DistillConfig(student="factories.py:cnn"), "the student does not take the model's inputs"),
        (DistillConfig(attention=1.0), "share no layer whose output has places to look at"),
        (DistillConfig(attention=1.0, layers=("9",)), "layer '9' is not run by both"),
    ):
        with pytest.raises(NotApplicable, match=text):
            optimize(golden, config, data, Budget(scratch=str(tmp_path / "s")))
    with pytest.raises(NotApplicable, match="whose PyTorch source is not known"):
        _blind(golden, data, tmp_path)
    for wrong in ({"epochs": 0}, {"alpha": 2.0}, {"feature_form": "l9"}, {"attention": -1.0}):
        with pytest.raises(ValueError):
            DistillConfig(**wrong)


def _blind(golden: Any, data: Any, folder: Path) -> None:
    """Golden is another file than the parent, and nobody handed on its source."""
    import shutil

    from optimizers import optimize

    other = folder / "other.onnx"
    shutil.copyfile(golden.path, other)
    optimize(replace(golden, golden=other), DistillConfig(attention=1.0), data, Budget(scratch=str(folder / "s")))
