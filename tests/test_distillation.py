"""Losses against values worked out by hand, and students that learn what golden knows."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers import Artifact, Budget, NotApplicable
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


class Unchanged:
    """An AfterStep that does nothing."""

    def __call__(self, module: Any, rate: float, progress: float) -> None:
        return

    def state(self) -> dict[str, Any]:
        return {}

    def restore(self, state: dict[str, Any]) -> None:
        return


def test_alpha_weighs_golden_against_true_labels(tmp_path: Path) -> None:
    """The loss is α · soft + (1 − α) · hard, and a student follows the one that weighs more where they contradict each other."""
    import torch

    from optimizers.losses import hard_labels, soft_labels
    from optimizers.torch_source import make
    from optimizers.training import Plan, Watch, train
    from optimizers.workshop import Workshop

    golden, data = torch_models.artifact(tmp_path, "cnn"), torch_models.rows("cnn", 64)
    assert data.labels is not None
    moved = replace(data, labels=(data.labels + 1) % 4)  # never what golden says

    def follows_labels(alpha: float) -> float:
        config = DistillConfig(alpha=alpha, augment=False, temperature=1.5)
        work = Workshop.open(golden, config, moved, Budget(scratch=str(tmp_path / "s")))
        torch.manual_seed(0)
        lesson, student = work.lesson(), make(torch_models.factory(tmp_path, "small")).eval()
        index, random = torch.arange(8), torch.Generator()
        assert lesson.labels is not None
        logits, taught, true = student(lesson.inputs[0][index]), lesson.known(index)[0], lesson.labels[index]
        expected = alpha * soft_labels(logits, taught, 1.5) + (1 - alpha) * hard_labels(logits, true)
        assert lesson.loss(student, index, random).item() == pytest.approx(expected.item(), rel=1e-5)
        last = Watch(Budget(), "distill", after_step=Unchanged())  # keeps the last weights, not those nearest to golden
        train(student, lesson, Plan(8, 16, 1e-2, form="float32", patience=99), last)
        with torch.no_grad():
            return float((student(lesson.inputs[0]).argmax(-1) == lesson.labels).float().mean())

    assert follows_labels(0.05) > 0.7 and follows_labels(0.95) < 0.3


def test_golden_is_asked_once_and_only_about_rows_that_are_needed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    from optimizers.lessons import Teacher
    from optimizers.torch_source import make
    from optimizers.workshop import Workshop

    asked: list[int] = []
    answer = Teacher.__call__

    def counted(teacher: Teacher, inputs: Any) -> Any:
        asked.append(len(inputs[0]))
        return answer(teacher, inputs)

    monkeypatch.setattr(Teacher, "__call__", counted)
    monkeypatch.setattr("optimizers.lessons.MOST_HELD_OUT", 10)
    golden, data = torch_models.artifact(tmp_path, "cnn"), torch_models.rows("cnn", 256)
    work = Workshop.open(golden, DistillConfig(augment=False), data, Budget(scratch=str(tmp_path / "s")))
    lesson = work.lesson()
    assert sum(asked) == len(lesson.held[0]) < 30 and lesson.rows + len(lesson.held[0]) == 256
    student, index = make(torch_models.factory(tmp_path, "small")).eval(), torch.arange(8)
    for _ in range(2):
        lesson.loss(student, index, torch.Generator())
        assert sum(asked) == len(lesson.held[0]) + 8
    assert torch.equal(lesson.known(index)[0], lesson.teacher(tuple(value[index] for value in lesson.inputs))[0])
    asked.clear()
    by_labels = replace(work, config=DistillConfig(alpha=0.0)).lesson()
    assert by_labels.labels is not None and sum(asked) == len(by_labels.held[0])
    by_labels.loss(student, index, torch.Generator())
    assert sum(asked) == len(by_labels.held[0]), "labels alone: only the rows that judge are golden's"


def test_images_are_moved_within_their_borders_and_mirrored_where_asked() -> None:
    import torch

    from optimizers.lessons import augmented, mirrored

    images = torch.arange(64.0 * 2 * 12 * 16).reshape(64, 2, 12, 16)
    flipped = mirrored(images, torch.Generator().manual_seed(0))
    turned = [bool(torch.equal(one, other.flip(-1))) for one, other in zip(flipped, images, strict=True)]
    same = [bool(torch.equal(one, other)) for one, other in zip(flipped, images, strict=True)]
    assert all(a != b for a, b in zip(turned, same, strict=True)) and 16 < sum(turned) < 48
    flat = torch.stack([torch.arange(16.0).repeat(12, 1), torch.arange(12.0)[:, None].repeat(1, 16)]).repeat(64, 1, 1, 1)
    moved = augmented(flat, torch.Generator().manual_seed(0))
    across, down = (moved[:, axis].flatten(1).mean(1) - flat[:, axis].flatten(1).mean(1) for axis in (0, 1))
    steps = {round(float(value)) for value in (moved[:, 0, 6, 8] - 8)}
    assert steps == {-1, 0, 1}, "by up to a twelfth of the shorter side"
    assert float(across.abs().max()) < 1.3 and float(down.abs().max()) < 1.3
    assert moved.shape == flat.shape and moved.is_contiguous()


def test_attention_matrices_by_hand_and_whoever_computes_them(tmp_path: Path) -> None:
    import torch

    from optimizers.attention_matrices import MatrixWatch, dot_product_weights
    from optimizers.losses import attention_matrices
    from optimizers.torch_source import make

    t, s = torch.tensor([[[[0.9, 0.1]]]]), torch.tensor([[[[0.5, 0.5]]]])
    assert float(attention_matrices(s, t)) == pytest.approx(0.9 * np.log(1.8) + 0.1 * np.log(0.2))
    assert float(attention_matrices(s, t, "mse")) == pytest.approx(0.16 / (0.5 * (0.81 + 0.01)))
    two_heads = torch.cat([t, s], 1)
    assert float(attention_matrices(t, two_heads)) == pytest.approx(0.7 * np.log(0.7 / 0.9) + 0.3 * np.log(0.3 / 0.1)), "means of heads"
    assert float(attention_matrices(torch.tensor([[[[1.0, 0.0]]]]), torch.tensor([[[[1.0, 0.0]]]]))) == 0.0, "masked places"
    q, k, v = torch.randn(3, 2, 4, 6, 8).unbind(0)
    mask = torch.rand(6, 6) < 0.7
    mask[:, 0] = True
    for how in ({}, {"is_causal": True}, {"attn_mask": mask}, {"scale": 0.3}, {"attn_mask": torch.randn(6, 6)}):
        expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, **how)
        assert torch.allclose(dot_product_weights(q, k, v, **how) @ v, expected, atol=1e-5)
    for name, count in (("transformer", 2), ("unbind", 1), ("index", 1), ("sdpa", 1), ("cnn", 0)):
        module, x = make(torch_models.factory(tmp_path, name)).eval(), torch.randn(3, *torch_models.SHAPES[name])
        with torch.no_grad(), MatrixWatch() as watch:
            watched = module(x)
        assert [tuple(m.shape) for m in watch.seen] == [(3, 4, 5, 5)] * count
        assert torch.allclose(watched, module(x), atol=1e-5) and all(torch.allclose(m.sum(-1), torch.ones(())) for m in watch.seen)


@pytest.fixture(scope="module")
def transformer(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return torch_models.artifact(tmp_path_factory.mktemp("golden"), "transformer")


def test_attention_matrices_are_drawn_to_those_of_golden(transformer: Artifact, tmp_path: Path) -> None:
    """Without the term (weight 0) they stay apart. The student is shallower: its layer is paired with golden's last."""
    import torch

    from optimizers.attention_matrices import MatrixWatch
    from optimizers.distillation import Pupil, _inside
    from optimizers.losses import attention_matrices
    from optimizers.torch_source import make
    from optimizers.training import Plan, Watch, train
    from optimizers.workshop import Workshop

    data = torch_models.rows("transformer", 64, labels=False)

    def distance(weight: float) -> float:
        torch.manual_seed(0)
        config = DistillConfig(attention_matrices=weight)
        work = Workshop.open(transformer, config, data, Budget(scratch=str(tmp_path / "s")))
        pupil = Pupil(make(torch_models.factory(tmp_path, "shallow")))
        inside = _inside(pupil, transformer, config, work.opened)
        lesson = work.lesson(inside.term if weight else None)
        train(pupil, lesson, Plan(8, 16, 5e-3, form="float32", patience=99), Watch(Budget(), "distill"))
        assert inside.matrices == (1 if weight else 0)
        with torch.no_grad(), MatrixWatch() as watch:
            work.opened.module(*lesson.held)
            pupil.student(*lesson.held)
        return float(attention_matrices(watch.seen[-1], watch.seen[-2]))

    assert distance(10.0) < 0.6 * distance(0.0)


def test_attention_matrices_belong_to_transformers(transformer: Artifact, tmp_path: Path) -> None:
    from optimizers import optimize

    data, budget = torch_models.rows("mlp", 64), Budget(scratch=str(tmp_path / "s"))
    with pytest.raises(NotApplicable, match="golden runs no attention: no nn"):
        optimize(torch_models.artifact(tmp_path, "mlp", steps=2), DistillConfig(attention_matrices=1.0, epochs=1), data, budget)
    fast: dict[str, Any] = {"student": "factories.py:shallow", "epochs": 8, "batch": 16, "rate": 5e-3}
    rows = torch_models.rows("transformer", 96, labels=False)
    made = optimize(transformer, DistillConfig(**fast, attention_matrices=1.0, matrix_form="mse"), rows, budget)
    facts = made.facts[-1]
    assert facts["matrices"] == 1 and facts["after"]["multiply_adds"] < 0.7 * facts["before"]["multiply_adds"]
    assert agreement(transformer.path, made.path, torch_models.rows("transformer", 200, seed=9)) > 0.8
    for wrong in ({"matrix_form": "cosine"}, {"attention_matrices": -1.0}):
        with pytest.raises(ValueError):
            DistillConfig(**wrong)


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
