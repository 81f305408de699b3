"""Sensitivity pruning's work: each group of layers cut alone and judged, ratios allotted greedily, the allotted form built and fine-tuned.

Ablation curves as in Li et al. 2017 (arXiv:1608.08710); the first-order estimate beside them is Molchanov et al. 2019 (arXiv:1906.10771).
"""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from typing import Any, Final

import torch
from torch import Tensor, nn

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.channels import LAYERS, accumulate_gradients, changed_widths, groups_of, pruned, widths
from optimizers.lessons import Lesson
from optimizers.samples import Samples
from optimizers.sparsity import SensitivityPruningConfig
from optimizers.torch_source import Outputs, tensors_of, torch_for
from optimizers.workshop import Workshop

CORRECTIONS: Final = 5
CLOSE: Final = 1.03


@dataclass(frozen=True)
class Cut:
    """One group cut alone at one ratio. `loss` on the rows held out (0 is golden's answers), `saved` multiply-adds of one row."""

    layer: str
    ratio: float
    loss: float
    agreement: float
    saved: int
    taylor: float


def build(artifact: Artifact, config: SensitivityPruningConfig, samples: Samples, budget: Budget) -> Artifact:
    started = time.monotonic()
    with torch_for(budget):
        work = Workshop.open(artifact, config, samples, budget)
        lesson = work.lesson()
        module = work.opened.module
        example = tensors_of(work.opened.rows.rows(slice(0, 1)), work.opened.signature)
        before, whole = widths(module), multiply_adds(module, example)
        accumulate_gradients(module, lesson)
        cuts = _curves(work, module, lesson, example, whole)
        ratios, small = _allotted(work, module, cuts, example, whole)
        trained = work.fine_tune(small, lesson, span=(0.5, 0.9))
        facts = {
            "ratio": config.ratio, "importance": config.importance, "curves": [vars(cut) for cut in cuts], "allotted": ratios,
            "channels": changed_widths(before, small), "seconds": time.monotonic() - started,
        }  # fmt: skip
        return work.deliver(small, lesson, facts, trained)


def _curves(work: Workshop, module: nn.Module, lesson: Lesson, example: Outputs, whole: int) -> list[Cut]:
    config, judge = _config(work), quick_judge(lesson, _config(work).rows)
    layers = groups_of(work.opened, module, config.keep)
    taylor = {name: _taylor(module.get_submodule(name)) for name in layers}
    cuts: list[Cut] = []
    for at, name in enumerate(layers):
        for level in config.levels:
            work.budget.tick(config.method, f"cutting {name}", 0.1 + 0.35 * at / len(layers))
            try:
                twin = pruned(work.opened, module, replace(config, round_to=1), 0.0, {name: level})
            except NotApplicable:
                continue  # too narrow to lose anything at this level
            agreement, minus_loss = judge(twin)
            first = taylor[name].sort().values[: round(level * len(taylor[name]))]
            cuts.append(Cut(name, level, -minus_loss, agreement, whole - multiply_adds(twin, example), float(first.sum())))
    if not cuts:
        raise NotApplicable("no layer can lose channels: all are outputs, tied or inside attention")
    return cuts


def _allotted(work: Workshop, module: nn.Module, cuts: list[Cut], example: Outputs, whole: int) -> tuple[dict[str, float], nn.Module]:
    """Ratios and the module built with them; savings overlap where layers meet, so the target is corrected by what was really saved."""
    config = _config(work)
    target = wanted = config.ratio * whole
    best: tuple[dict[str, float], nn.Module] | None = None
    for _ in range(CORRECTIONS):
        ratios = allot(cuts, wanted)
        if not ratios:
            break
        small = pruned(work.opened, module, config, 0.0, ratios)
        saved = whole - multiply_adds(small, example)
        best = (ratios, small)
        if saved * CLOSE >= target:
            break
        wanted *= min(1.5, max(1.05, target / max(saved, 1)))
    if best is None:
        raise NotApplicable(f"no cut saves anything towards {config.ratio:.0%} of the multiply-adds")
    return best


def allot(cuts: list[Cut], wanted: float) -> dict[str, float]:
    """Layer to ratio, such that `wanted` multiply-adds are saved: again and again the step that costs the least loss for what it saves."""
    curves: dict[str, list[Cut]] = {}
    for cut in cuts:
        curves.setdefault(cut.layer, []).append(cut)
    at = dict.fromkeys(curves, -1)
    saved = 0.0

    def step(layer: str) -> tuple[float, float]:
        """Price and saving of cutting `layer` one level further."""
        index, curve = at[layer], curves[layer]
        now = curve[index] if index >= 0 else Cut(layer, 0.0, 0.0, 1.0, 0, 0.0)
        gained = max(curve[index + 1].saved - now.saved, 1)
        return max(curve[index + 1].loss - now.loss, 0.0) / gained, gained

    while saved < wanted and (open_ := [layer for layer in curves if at[layer] + 1 < len(curves[layer])]):
        layer = min(open_, key=lambda name: step(name)[0])
        saved += step(layer)[1]
        at[layer] += 1
    return {layer: curves[layer][index].ratio for layer, index in at.items() if index >= 0}


def multiply_adds(module: nn.Module, example: Outputs) -> int:
    """Of convolutions and linear layers, for one row."""
    return sum(layer_multiply_adds(module, example).values())


def layer_multiply_adds(module: nn.Module, example: Outputs) -> dict[str, int]:
    """Layer to its multiply-adds on `example`, which has one row."""
    found: dict[str, int] = {}

    def counting(name: str) -> Any:
        def count(layer: nn.Module, _: Any, out: Tensor) -> None:
            weight: Tensor = layer.weight  # type: ignore[assignment]
            found[name] = found.get(name, 0) + out.numel() * weight[0].numel()

        return count

    handles = [layer.register_forward_hook(counting(name)) for name, layer in module.named_modules() if isinstance(layer, LAYERS)]
    try:
        with torch.no_grad():
            module.eval()(*example)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _taylor(layer: nn.Module) -> Tensor:
    """|Σ w · ∂L/∂w| of each output channel: the first-order change of the loss when it goes."""
    weight: Tensor = layer.weight  # type: ignore[assignment]
    assert weight.grad is not None
    return (weight * weight.grad).detach().flatten(1).sum(1).abs()


def quick_judge(lesson: Lesson, rows: int) -> Any:
    """The lesson's score on the first `rows` rows held out."""

    def judge(module: nn.Module) -> tuple[float, float]:
        held, answers = lesson.held, lesson.held_answers
        lesson.held, lesson.held_answers = tuple(v[:rows] for v in held), tuple(v[:rows] for v in answers)
        try:
            with torch.no_grad():
                return lesson.score(module.eval())
        finally:
            lesson.held, lesson.held_answers = held, answers

    return judge


def _config(work: Workshop) -> SensitivityPruningConfig:
    assert isinstance(work.config, SensitivityPruningConfig)
    return work.config
