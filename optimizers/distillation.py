"""Distillation's work: who the student is, which layers of golden and student are paired, and the term that looks inside both.

The soft labels themselves are optimizers.lessons', which every method that fine-tunes has.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Final

import torch
from torch import Tensor, nn

from optimizers import losses
from optimizers.artifact import Artifact, Source
from optimizers.attention_matrices import MatrixWatch, paired
from optimizers.base import Budget, NotApplicable
from optimizers.distill import DistillConfig
from optimizers.samples import Samples
from optimizers.torch_source import Opened, Outputs, golden_source, load_module, make, outputs_of, tensors_of, torch_for, trainable
from optimizers.workshop import Workshop

MOST_PAIRS: Final = 4


def build(artifact: Artifact, config: DistillConfig, samples: Samples, budget: Budget) -> Artifact:
    """The trained student as an artifact."""
    started = time.monotonic()
    with torch_for(budget):
        work = Workshop.open(artifact, config, samples, budget)
        assert artifact.source is not None
        factory = _beside(artifact.source, config.student) if config.student else artifact.source.factory
        student = trainable(make(factory)) if config.student else work.opened.module
        _require_outputs(student, work.opened)
        pupil = Pupil(student)
        looks = config.features or config.attention or config.attention_matrices
        inside = _inside(pupil, artifact, config, work.opened) if looks else None
        lesson = work.lesson(inside.term if inside else None)
        trained = work.fine_tune(pupil, lesson, "distilling")
        facts = {
            "student": config.student or "the parent's module", "features": config.features, "feature_form": config.feature_form if config.features else "",
            "attention": config.attention, "attention_matrices": config.attention_matrices, "matrices": inside.matrices if inside else 0, "pairs": list(inside.names) if inside else [], "adapters": len(pupil.adapters),
            "seconds": time.monotonic() - started,
        }  # fmt: skip
        return work.deliver(pupil.student, lesson, facts, trained, factory)


class Pupil(nn.Module):
    """The student with the adapters that are trained beside it and dropped afterwards."""

    def __init__(self, student: nn.Module) -> None:
        super().__init__()
        self.student = student
        self.adapters = nn.ModuleDict()
        self.note: Callable[[list[Tensor]], None] | None = None
        """Told of the attention matrices of each run, where somebody wants to know."""

    def forward(self, *inputs: Tensor) -> Any:
        if self.note is None:
            return self.student(*inputs)
        with MatrixWatch() as watch:
            answers = self.student(*inputs)
        self.note(watch.seen)
        return answers


class Inside:
    """Paired layers of golden and student, listened to while both run. `names` are modules that both have; `matrices` so many of attention."""

    def __init__(self, pupil: Pupil, golden: nn.Module, names: Sequence[str], config: DistillConfig) -> None:
        self.pupil, self.golden, self.names, self.config = pupil, golden.eval().requires_grad_(False), tuple(names), config
        self.seen: dict[str, Tensor] = {}
        self.own_matrices: list[Tensor] = []
        self.matrices = 0
        if config.attention_matrices:
            pupil.note = lambda seen: self.own_matrices.__setitem__(slice(None), seen)
        for name in names:
            pupil.student.get_submodule(name).register_forward_hook(lambda _, __, out, name=name: self.seen.__setitem__(name, out))

    def term(self, inputs: Outputs) -> Tensor:
        """features · Σ distance + attention · Σ ‖difference of maps‖² + attention_matrices · Σ KL; the student ran on these inputs just before."""
        with torch.no_grad(), listening(self.golden.to(inputs[0].device), self.names) as taught, MatrixWatch() as watch:
            self.golden(*inputs)
        total = torch.zeros(())
        if self.config.attention_matrices:
            pairs = paired(self.own_matrices, watch.seen)
            self.matrices = len(pairs)
            distances = [losses.attention_matrices(own.float(), theirs, self.config.matrix_form) for own, theirs in pairs]
            total = total + self.config.attention_matrices * torch.stack(distances).sum()
        for name in self.names:
            own, theirs = self.seen[name].float(), taught[name]
            if self.config.attention:
                total = total + self.config.attention * losses.attention(own, theirs)
            if self.config.features:
                total = total + self.config.features * losses.features(self._adapted(name, own), theirs, self.config.feature_form)
        return total

    def _adapted(self, name: str, own: Tensor) -> Tensor:
        key = name.replace(".", "_")
        return self.pupil.adapters[key](own) if key in self.pupil.adapters else own


def _inside(pupil: Pupil, artifact: Artifact, config: DistillConfig, opened: Opened) -> Inside:
    source = golden_source(artifact)
    if source is None:
        raise NotApplicable(
            "features, attention and attention_matrices look inside golden, whose PyTorch source is not known here; soft labels alone need no source"
        )
    golden = load_module(source)
    if not config.features and not config.attention:
        return Inside(pupil, golden, (), config)
    example = tensors_of(opened.rows.rows(slice(0, 2)), opened.signature)
    own, theirs = shapes_inside(pupil.student, example), shapes_inside(golden, example)
    names = list(config.layers) or chosen(own, theirs)
    for name in names:
        if name not in own or name not in theirs:
            raise NotApplicable(
                f"layer {name!r} is not run by both golden and the student; both run {', '.join(sorted(own.keys() & theirs.keys())[:20])}"
            )
        if own[name][2:] != theirs[name][2:] if len(own[name]) == 4 else own[name][1] != theirs[name][1]:
            raise NotApplicable(
                f"layer {name!r} makes {list(own[name])} in the student and {list(theirs[name])} in golden: other places, not only other widths"
            )
    if not names:
        raise NotApplicable("golden and the student share no layer whose output has places to look at ([N, C, H, W] or [N, L, D])")
    if config.features:
        pupil.adapters.update({n.replace(".", "_"): a for n in names if (a := adapter(own[n], theirs[n])) is not None})
    return Inside(pupil, golden, names, config)


def chosen(own: dict[str, tuple[int, ...]], theirs: dict[str, tuple[int, ...]]) -> list[str]:
    """The last module that both run for each size of image (a stage), or evenly chosen ones of those with [N, L, D]."""
    both = [name for name in own if name in theirs and len(own[name]) == len(theirs[name])]
    stages = {own[n][2:]: n for n in both if len(own[n]) == 4 and own[n][2:] == theirs[n][2:] and max(own[n][2:]) > 1}
    if stages:
        return list(stages.values())[-MOST_PAIRS:]
    rows = [name for name in both if len(own[name]) == 3 and own[name][1] == theirs[name][1]]
    return rows[-1 :: -max(1, len(rows) // MOST_PAIRS)][:MOST_PAIRS][::-1]


def adapter(own: tuple[int, ...], theirs: tuple[int, ...]) -> nn.Module | None:
    """A learned 1×1 map from the student's width to golden's; None where they are equal."""
    axis = 1 if len(own) == 4 else -1
    if own[axis] == theirs[axis]:
        return None
    return nn.Conv2d(own[1], theirs[1], 1, bias=False) if axis == 1 else nn.Linear(own[-1], theirs[-1], bias=False)


@torch.no_grad()
def shapes_inside(module: nn.Module, example: Outputs) -> dict[str, tuple[int, ...]]:
    """Module to the shape of its output, in the order in which they end."""
    names = [name for name, _ in module.named_modules() if name]
    with listening(module.eval(), names) as seen:
        module(*example)
    return {name: tuple(value.shape) for name, value in seen.items()}


@contextlib.contextmanager
def listening(module: nn.Module, names: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """The outputs of modules by name, of those that are one float tensor."""
    seen: dict[str, Tensor] = {}

    def hook(name: str) -> Any:
        def keep(_: nn.Module, __: Any, out: Any) -> None:
            if isinstance(out, Tensor) and out.is_floating_point() and out.ndim in {3, 4}:
                seen.pop(name, None)
                seen[name] = out

        return keep

    handles = [module.get_submodule(name).register_forward_hook(hook(name)) for name in names]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _beside(source: Source, student: str) -> str:
    """The student's factory, which must lie in the folder of the model's own: the operator's, not the caller's, code runs."""
    file, _, function = student.rpartition(":")
    folder = Path(source.factory.rpartition(":")[0]).resolve().parent
    path = (folder / file).resolve()
    if not file or not function or not path.is_relative_to(folder) or not path.is_file():
        raise NotApplicable(
            f"student {student!r} names no factory beside {Path(source.factory).name}: write it as FILE.py:FUNCTION, in the same folder"
        )
    return f"{path}:{function}"


@torch.no_grad()
def _require_outputs(student: nn.Module, opened: Opened) -> None:
    example = tensors_of(opened.rows.rows(slice(0, 2)), opened.signature)
    try:
        found = [tuple(v.shape) for v in outputs_of(student.eval()(*example), opened.signature.outputs)]
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise NotApplicable(f"the student does not take the model's inputs: {error}") from None
    wanted = [tuple(v.shape) for v in outputs_of(opened.module(*example), opened.signature.outputs)]
    if found != wanted:
        raise NotApplicable(f"the student gives outputs of shapes {found}, golden {wanted}")
