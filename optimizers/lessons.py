"""The objective that pruning's fine-tuning and distillation share: golden's answers and true labels on rows, seen anew each time.

The teacher is golden's ONNX file, run on the very rows that the student sees (Beyer et al. 2022, arXiv:2106.05237), so unlabelled inputs do.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn

from optimizers.artifact import Source
from optimizers.base import NotApplicable
from optimizers.losses import as_logits, hard_labels, relative_error, soft_labels
from optimizers.pruning import TrainingConfig
from optimizers.running import ORT_ERRORS, RunRefused, brief, raise_if_memory, runner
from optimizers.samples import Samples
from optimizers.session import Settings, open_session
from optimizers.torch_source import SAME, Outputs, Signature, difference, load_module, outputs_of, tensors_of
from optimizers.training import Score, place_of

HELD_OUT: Final = 0.15
MOST_HELD_OUT: Final = 2048
"""Rows that are scored after each epoch: so many tell shares to a point, and more would take the time of training."""
SHIFT: Final = 1 / 12
NOISE: Final = 0.05
CHUNK: Final = 64
Extra = Callable[[Outputs], Tensor]


@dataclass(frozen=True)
class Terms:
    """L = α · T² · KL(golden ‖ student) + (1 − α) · cross entropy with true labels; α counts as 1 where there are no labels.

    `augment`: images are moved and made a little noisy; `mirror`: every other one is mirrored as well.
    """

    temperature: float = 2.0
    alpha: float = 0.7
    augment: bool = True
    mirror: bool = False

    @classmethod
    def of(cls, config: TrainingConfig) -> Terms:
        return cls(config.temperature, config.alpha, config.augment, config.mirror)


class Teacher:
    """Golden's answers, by ONNX Runtime: it teaches each row that the student sees, so as fast as it goes (golden judges unoptimized).

    Where the student trains on a GPU, golden's PyTorch `source` answers there, if it is known and answers `rows` as the file does.
    """

    def __init__(self, path: Path, signature: Signature, threads: int, source: Source | None = None, rows: Samples | None = None) -> None:
        try:
            session = open_session(path, Settings(intra_op_threads=threads, graph_level="all"))
        except ORT_ERRORS:
            session = open_session(path, Settings(intra_op_threads=threads, graph_level="basic"))
        self._run = runner(session)
        self._path, self._signature, self._source, self._rows = path, signature, source, rows
        self._twin: nn.Module | None = None

    def __call__(self, inputs: Outputs) -> Outputs:
        """Raises NotApplicable where golden refuses the rows."""
        device = inputs[0].device
        if device.type != "cpu" and (twin := self._twin_on(device)) is not None:
            with torch.no_grad(), torch.autocast(device.type, enabled=False):
                return outputs_of(twin(*inputs), self._signature.outputs)
        try:
            answers = self._run({name: value.cpu().numpy() for name, value in zip(self._signature.inputs, inputs, strict=True)})
        except (*ORT_ERRORS, RunRefused) as error:
            raise_if_memory(error)
            raise NotApplicable(f"golden refuses the training inputs: {brief(error)}") from None
        return tuple(torch.from_numpy(np.ascontiguousarray(answer)).to(device) for answer in answers)

    def _twin_on(self, device: torch.device) -> nn.Module | None:
        if self._twin is None and self._source is not None and self._rows is not None:
            twin, self._source = load_module(self._source), None
            if difference(twin, self._path, self._signature, self._rows) <= SAME:
                self._twin = twin.to(device).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        return self._twin

    def all(self, inputs: Outputs) -> Outputs:
        pieces = [self(tuple(value[at : at + CHUNK] for value in inputs)) for at in range(0, len(inputs[0]), CHUNK)]
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))


class Lesson:
    """An Objective (optimizers.training): the student answers as golden does. Rows held out are never trained on.

    `extra` adds a term that looks inside student and teacher (optimizers.distillation); it gets the inputs of the step.
    """

    def __init__(
        self, signature: Signature, samples: Samples, teacher: Teacher, task: str, terms: Terms, seed: int = 0, extra: Extra | None = None
    ) -> None:
        train, held = samples.split(1 - min(HELD_OUT, MOST_HELD_OUT / max(1, len(samples))), seed)
        if len(held) < 2 or len(train) < 2:
            raise NotApplicable(f"{len(samples)} different rows are too few to train on and to hold some out; about 100 are a beginning")
        self.signature, self.teacher, self.terms, self.extra = signature, teacher, terms, extra
        self.inputs, self.held = tensors_of(train, signature), tensors_of(held, signature)
        self.classes = task == "classification"
        self.labels = torch.from_numpy(train.labels) if self.classes and train.labels is not None else None
        self.held_answers = teacher.all(self.held)
        self._known = tuple(torch.empty((self.rows, *answer.shape[1:]), dtype=answer.dtype) for answer in self.held_answers)
        self._asked = torch.zeros(self.rows, dtype=torch.bool)
        self.float_outputs = [i for i, answer in enumerate(self.held_answers) if answer.is_floating_point() and answer.ndim > 1]
        if not self.float_outputs:
            raise NotApplicable("no output is a tensor of floats with a batch axis, so there is nothing to train for")
        if self.labels is not None and int(self.labels.max()) >= (classes := self.held_answers[self.float_outputs[0]].shape[-1]):
            raise NotApplicable(f"a label is {int(self.labels.max())}, but the model has {classes} classes")

    @property
    def rows(self) -> int:
        return len(self.inputs[0])

    def known(self, index: Tensor) -> Outputs:
        """Golden's answers to rows of the training set, asked for when first needed."""
        self._follow(index.device)
        new = index[~self._asked[index]]
        if len(new):
            for kept, answer in zip(self._known, self.teacher.all(tuple(value[new] for value in self.inputs)), strict=True):
                kept[new] = answer
            self._asked[new] = True
        return tuple(kept[index] for kept in self._known)

    def loss(self, module: nn.Module, index: Tensor, random: torch.Generator) -> Tensor:
        self._follow(index.device)
        inputs = tuple(value[index] for value in self.inputs)
        if (self.terms.augment or self.terms.mirror) and any(_is_image(value) for value in inputs):
            inputs = tuple(self._augmented(value, random) if _is_image(value) else value for value in inputs)
            ask = lambda: self.teacher(inputs)
        else:
            ask = lambda: self.known(index)
        given = outputs_of(module(*inputs), self.signature.outputs)
        total = self._weighed(given, ask, index)
        return total + self.extra(inputs) if self.extra is not None else total

    def _weighed(self, given: Outputs, ask: Callable[[], Outputs], index: Tensor) -> Tensor:
        """α · distance from golden + (1 − α) · cross entropy. With α 0 golden, which costs as much as a small student, is not asked."""
        if self.labels is None:
            return self._distance(given, ask())
        hard = hard_labels(as_logits(given[self.float_outputs[0]]).float(), self.labels[index])
        alpha = self.terms.alpha
        return alpha * self._distance(given, ask()) + (1 - alpha) * hard if alpha else hard

    def steepness(self, module: nn.Module, index: Tensor) -> Tensor:
        """A loss whose gradient says what matters even where the module is golden itself, whose distance from golden is flat.

        Cross entropy with true labels, else with the classes that golden chose; the outputs' power where they are no classes.
        """
        self._follow(index.device)
        given = outputs_of(module(*(value[index] for value in self.inputs)), self.signature.outputs)
        if not self.classes:
            return torch.stack([given[i].float().pow(2).mean() for i in self.float_outputs]).mean()
        chosen = self.labels[index] if self.labels is not None else self.known(index)[self.float_outputs[0]].argmax(-1)
        return hard_labels(as_logits(given[self.float_outputs[0]]).float(), chosen)

    def score(self, module: nn.Module) -> Score:
        """Agreement with golden on the rows held out (classes), or minus the loss; ties by minus the loss."""
        self._follow(place_of(module))
        given = self._answers(module)
        loss = float(self._distance(given, self.held_answers))
        if not self.classes:
            return (-loss, -loss)
        same = [given[i].argmax(-1) == self.held_answers[i].argmax(-1) for i in self.float_outputs]
        return (min(float(each.float().mean()) for each in same), -loss)

    def _answers(self, module: nn.Module) -> Outputs:
        pieces = [
            outputs_of(module(*(value[at : at + CHUNK] for value in self.held)), self.signature.outputs)
            for at in range(0, len(self.held[0]), CHUNK)
        ]
        return tuple(torch.cat(parts) for parts in zip(*pieces, strict=True))

    def _augmented(self, images: Tensor, random: torch.Generator) -> Tensor:
        if self.terms.mirror:
            images = mirrored(images, random)
        return augmented(images, random) if self.terms.augment else images

    def _follow(self, device: torch.device) -> None:
        """All rows where the module is: a GPU that had them brought batch by batch would mostly wait."""
        for name in ("inputs", "held", "held_answers", "_known"):
            values: Outputs = getattr(self, name)
            if values[0].device != device:
                setattr(self, name, tuple(value.to(device) for value in values))
        self._asked = self._asked.to(device)
        self.labels = None if self.labels is None else self.labels.to(device)

    def _distance(self, given: Sequence[Tensor], golden: Sequence[Tensor]) -> Tensor:
        pairs = [(given[i].float(), golden[i].float()) for i in self.float_outputs]
        if not self.classes:
            return torch.stack([relative_error(student, teacher) for student, teacher in pairs]).mean()
        return torch.stack([soft_labels(as_logits(s), as_logits(t), self.terms.temperature) for s, t in pairs]).mean()


def augmented(images: Tensor, random: torch.Generator) -> Tensor:
    """Images moved by up to a twelfth of their side (edges repeated) with a little noise; golden says what they are now."""
    height, width = images.shape[-2:]
    reach = max(1, round(min(height, width) * SHIFT))
    padded, place = nn.functional.pad(images, [reach] * 4, mode="replicate"), images.device
    down, right = (torch.randint(2 * reach + 1, (len(images), 1), generator=random, device=place) for _ in range(2))
    lines, columns = down + torch.arange(height, device=place), right + torch.arange(width, device=place)
    each = torch.arange(len(images), device=place)[:, None, None]
    moved = padded.movedim(1, -1)[each, lines[:, :, None], columns[:, None, :]].movedim(-1, 1).contiguous()
    noise = torch.randn(moved.shape, generator=random, device=place)
    noise *= torch.rand(len(images), 1, 1, 1, generator=random, device=place) * NOISE
    return moved + noise * images.std().clamp_min(1e-6)


def mirrored(images: Tensor, random: torch.Generator) -> Tensor:
    """Every other image with left and right exchanged, for images that mean the same in a mirror."""
    chosen = torch.rand(len(images), 1, 1, 1, generator=random, device=images.device) < 0.5
    return torch.where(chosen, images.flip(-1), images)


def _is_image(value: Tensor) -> bool:
    return value.ndim == 4 and value.dtype == torch.float32 and min(value.shape[-2:]) >= 8


def facts_of(lesson: Lesson, samples: Samples) -> dict[str, Any]:
    return {
        "rows": lesson.rows, "held_out": len(lesson.held[0]), "labels": lesson.labels is not None, "origin": samples.origin,
        "temperature": lesson.terms.temperature, "alpha": lesson.terms.alpha if lesson.labels is not None else 1.0, "augmented": lesson.terms.augment, "mirrored": lesson.terms.mirror,
    }  # fmt: skip
