"""What a student is trained by: golden's soft answers, true labels, features and attention maps of paired layers. Pure functions of tensors.

Every loss is a mean over positions, so its size depends neither on the batch nor on the length of the rows.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

PROBABILITY_SLACK = 1e-3


def soft_labels(student: Tensor, teacher: Tensor, temperature: float = 1.0, mask: Tensor | None = None) -> Tensor:
    """T² · KL(softmax(teacher / T) ‖ softmax(student / T)), logits [..., C]; summed over classes, a mean over unmasked positions.

    Hinton et al. 2015 (arXiv:1503.02531): T² keeps the gradient's size when T grows. `mask` [...]: true where a position counts.
    """
    target = functional.log_softmax(teacher / temperature, -1)
    given = functional.log_softmax(student / temperature, -1)
    return temperature**2 * _mean((target.exp() * (target - given)).sum(-1), mask)


def hard_labels(student: Tensor, labels: Tensor, mask: Tensor | None = None) -> Tensor:
    """Cross entropy with true classes, a mean over positions."""
    return _mean(-functional.log_softmax(student, -1).gather(-1, labels[..., None]).squeeze(-1), mask)


def relative_error(student: Tensor, teacher: Tensor) -> Tensor:
    """Mean squared error as a share of the teacher's own spread: the loss of outputs that are no classes."""
    return functional.mse_loss(student, teacher) / teacher.var(correction=0).clamp_min(1e-12)


def features(student: Tensor, teacher: Tensor, form: str = "mse") -> Tensor:
    """Distance of two feature tensors of one shape (FitNets, arXiv:1412.6550): 'mse' relative to the teacher's power, or 'cosine' per row."""
    if form == "cosine":
        return 1 - functional.cosine_similarity(student.flatten(1), teacher.flatten(1), 1).mean()
    return functional.mse_loss(student, teacher) / teacher.pow(2).mean().clamp_min(1e-12)


def attention_map(activation: Tensor) -> Tensor:
    """Where a layer looks: mean of squares over channels ([N, C, H, W]) or width ([N, L, D]), each row scaled to length 1.

    Zagoruyko and Komodakis 2017 (arXiv:1612.03928). Needs no adapter: channels are gone.
    """
    power = activation.pow(2).mean(1 if activation.ndim == 4 else -1).flatten(1)
    return functional.normalize(power, dim=1)


def attention(student: Tensor, teacher: Tensor) -> Tensor:
    """Σ over the map of the squared differences of two attention maps, a mean over rows."""
    return (attention_map(student) - attention_map(teacher)).pow(2).sum(1).mean()


def attention_matrices(student: Tensor, teacher: Tensor, form: str = "kl") -> Tensor:
    """Distance of two attention matrices [N, H, L, S]: KL(teacher ‖ student) of each row, or 'mse' relative to the teacher's power.

    Where the numbers of heads differ, their means over the heads are compared.
    """
    if student.shape[1] != teacher.shape[1]:
        student, teacher = student.mean(1, keepdim=True), teacher.mean(1, keepdim=True)
    if form == "mse":
        return features(student, teacher)
    least = torch.finfo(student.dtype).tiny
    return (teacher * (teacher.clamp_min(least).log() - student.clamp_min(least).log())).sum(-1).mean()


def as_logits(answers: Tensor) -> Tensor:
    """Class scores as logits: outputs that are probabilities already (a Softmax in the graph) become their logarithms."""
    sums = answers.sum(-1)
    if bool((answers >= 0).all()) and bool(((sums - 1).abs() < PROBABILITY_SLACK).all()):
        return answers.clamp_min(torch.finfo(answers.dtype).tiny).log()
    return answers


def _mean(values: Tensor, mask: Tensor | None) -> Tensor:
    if mask is None:
        return values.mean()
    counts = mask.to(values.dtype)
    return (torch.where(mask.bool(), values, torch.zeros_like(values)) * counts).sum() / counts.sum().clamp_min(1)
