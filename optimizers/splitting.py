"""Convolutions of a PyTorch module split into smaller ones, each where that saves multiply-adds, then fine-tuned. Ranks are chosen here.

Knows no decomposition: a Form says what ranks mean, what they cost and how the layer is made.
"""

from __future__ import annotations

import copy
import math
import time
from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.channels import tied_layers
from optimizers.lessons import Lesson
from optimizers.low_rank import SplitConfig
from optimizers.running import raise_if_memory
from optimizers.samples import Samples
from optimizers.sensitivity import Cut, allot, multiply_adds, quick_judge
from optimizers.torch_layers import Pair, StandIn
from optimizers.torch_source import Outputs, tensors_of, torch_for
from optimizers.torch_structure import replace_layer
from optimizers.workshop import Workshop

Ranks = tuple[int, ...]
LEVELS: Final = (0.25, 0.5, 0.75)
"""Shares of the full rank that are taken away where ranks are chosen by sensitivity."""


class Form(ABC):
    """One way to split a convolution of weight [out, in, ky, kx]."""

    def unfit(self, layer: nn.Conv2d) -> str:
        """Why `layer` cannot be split so; '' where it can."""
        if layer.groups != 1:
            return "grouped"
        if math.prod(layer.kernel_size) == 1:
            return "1×1"
        if layer.padding_mode != "zeros":
            return f"padding {layer.padding_mode}"
        if not bool(layer.weight.any()):
            return "all zero"
        return "" if padding_of(layer) else "uneven padding"

    @abstractmethod
    def full(self, layer: nn.Conv2d) -> Ranks:
        """The largest ranks that mean anything."""

    @abstractmethod
    def by_energy(self, layer: nn.Conv2d, energy: float) -> Ranks: ...

    @abstractmethod
    def by_vbmf(self, layer: nn.Conv2d) -> Ranks:
        """Ranks of 0 where nothing stands above the noise."""

    @abstractmethod
    def cost(self, layer: nn.Conv2d, ranks: Ranks) -> float:
        """Multiply-adds of the parts, for one place of the output."""

    @abstractmethod
    def made(self, layer: nn.Conv2d, ranks: Ranks) -> StandIn: ...

    def saved(self, layer: nn.Conv2d, ranks: Ranks) -> float:
        """Share of the layer's multiply-adds that its parts save."""
        return 1 - self.cost(layer, ranks) / layer.weight.numel()

    def level(self, layer: nn.Conv2d, taken: float) -> Ranks:
        """The full ranks without the share `taken`."""
        return tuple(max(1, math.ceil(rank * (1 - taken))) for rank in self.full(layer))


@dataclass
class Split:
    """What became of the convolutions: `split` names to facts, `left` names to reasons."""

    split: dict[str, dict[str, Any]]
    left: dict[str, str]


def build(artifact: Artifact, config: SplitConfig, form: Form, samples: Samples, budget: Budget) -> Artifact:
    """The artifact with layers split. Raises NotApplicable where none is better off split."""
    started = time.monotonic()
    with torch_for(budget):
        work = Workshop.open(artifact, config, samples, budget)
        lesson = work.lesson()
        module = copy.deepcopy(work.opened.module)
        found = Split({}, {})
        layers = _layers(work, module, form, config, found)
        cuts = _curves(work, config, form, module, layers, lesson) if config.rank == "sensitivity" else []
        chosen = _allotted(work, config, form, module, layers, cuts) if config.rank == "sensitivity" else None
        for at, (name, layer) in enumerate(layers.items()):
            budget.tick(config.method, f"decomposing {name}", 0.2 + 0.1 * at / len(layers))
            ranks = _ranks(form, layer, config) if chosen is None else chosen.get(name)
            _put(module, name, layer, form, ranks, config.least_saved, found)
        if not found.split:
            raise NotApplicable(
                f"no {'layer' if config.linear else 'convolution'} is better off split: "
                f"{'; '.join(f'{n}: {why}' for n, why in list(found.left.items())[:8]) or 'there is none'}"
            )
        trained = work.fine_tune(module, lesson, span=(0.3, 0.9))
        facts = {
            "rank": config.rank, "energy": config.energy if config.rank == "energy" else None, "split": found.split, "left": found.left,
            "curves": [vars(cut) for cut in cuts], "seconds": time.monotonic() - started,
        }  # fmt: skip
        return work.deliver(module, lesson, facts, trained)


def conv_sizes(layer: nn.Conv2d) -> dict[str, Any]:
    """What every stand-in of a convolution takes over from it."""
    return {
        "channels_in": layer.in_channels, "channels_out": layer.out_channels, "kernel": layer.kernel_size, "stride": layer.stride,
        "padding": padding_of(layer), "dilation": layer.dilation, "bias": layer.bias is not None,
    }  # fmt: skip


def filled(made: StandIn, layer: nn.Conv2d | nn.Linear, parts: dict[str, Tensor]) -> StandIn:
    """`made` with these weights (by the name of its part), and the layer's bias in its last part."""
    for name, value in parts.items():
        part: Any = made.get_submodule(name)
        part.weight.data.copy_(value)
    last: Any = list(made.children())[-1]
    if layer.bias is not None:
        last.bias.data.copy_(layer.bias.data)
    return made.train(layer.training)


def padding_of(layer: nn.Conv2d) -> Pair | None:
    """Rows and columns of zeros on either side; None where one side has more than the other."""
    if not isinstance(layer.padding, str):
        return layer.padding[0], layer.padding[1]
    if layer.padding == "valid":
        return 0, 0
    down, right = (step * (size - 1) for step, size in zip(layer.dilation, layer.kernel_size, strict=True))
    return None if down % 2 or right % 2 else (down // 2, right // 2)


def _layers(work: Workshop, module: nn.Module, form: Form, config: SplitConfig, found: Split) -> dict[str, Any]:
    """Convolutions, and where the config says so linear layers, that can be split."""
    layers: dict[str, Any] = {}
    tied, example = tied_layers(module), tensors_of(work.opened.rows.rows(slice(0, 1)), work.opened.signature)
    for name, part in list(module.named_modules()):
        if not isinstance(part, (nn.Conv2d, nn.Linear) if config.linear else nn.Conv2d):
            continue
        layer: Any = part
        reason = "excluded" if name in config.exclude else "tied" if layer in tied else form.unfit(layer)
        if not reason and isinstance(part, nn.Linear) and not _bears(module, name, form.made(layer, form.full(layer)), part, example):
            reason = "what it is part of reads its weight"
        if reason:
            found.left[name] = reason
        else:
            layers[name] = layer
    return layers


@torch.no_grad()
def _bears(module: nn.Module, name: str, made: StandIn, layer: nn.Module, example: Outputs) -> bool:
    """Whether `module` runs with `made` in the place of `layer`, which is put back."""
    replace_layer(module, name, made)
    try:
        module.eval()(*example)
    except (AttributeError, TypeError, RuntimeError) as error:
        raise_if_memory(error)
        return False
    finally:
        replace_layer(module, name, layer)
    return True


def _ranks(form: Form, layer: Any, config: SplitConfig) -> Ranks:
    return form.by_energy(layer, config.energy) if config.rank == "energy" else form.by_vbmf(layer)


def _put(module: nn.Module, name: str, layer: Any, form: Form, ranks: Ranks | None, least_saved: float, found: Split) -> None:
    """Split one layer where enough is saved, and note what was done."""
    if ranks is None:
        found.left[name] = "others cost less loss for what they save"
        return
    if not all(ranks):
        found.left[name] = "nothing in its kernel stands above the noise"
        return
    saved = form.saved(layer, ranks)
    if saved < least_saved:
        found.left[name] = f"ranks {list(ranks)} would save {saved:.0%}"
        return
    replace_layer(module, name, form.made(layer, ranks))
    found.split[name] = {
        "ranks": list(ranks),
        "channels": [getattr(layer, "out_channels", layer.weight.shape[0]), getattr(layer, "in_channels", layer.weight.shape[1])],
        "saved": saved,
    }


# ---- ranks by measured sensitivity
def _curves(work: Workshop, config: SplitConfig, form: Form, module: nn.Module, layers: dict[str, Any], lesson: Lesson) -> list[Cut]:
    """Each layer split alone at each level, and judged."""
    judge, example = quick_judge(lesson, config.rows), tensors_of(work.opened.rows.rows(slice(0, 1)), work.opened.signature)
    whole = multiply_adds(module, example)
    cuts = []
    for at, (name, layer) in enumerate(layers.items()):
        for level in LEVELS:
            work.budget.tick(config.method, f"trying {name}", 0.1 + 0.1 * at / len(layers))
            if form.saved(layer, form.level(layer, level)) < config.least_saved:
                continue
            replace_layer(module, name, form.made(layer, form.level(layer, level)))
            agreement, minus_loss = judge(module)
            cuts.append(Cut(name, level, -minus_loss, agreement, whole - multiply_adds(module, example), 0.0))
            replace_layer(module, name, layer)
    return cuts


def _allotted(
    work: Workshop, config: SplitConfig, form: Form, module: nn.Module, layers: dict[str, Any], cuts: list[Cut]
) -> dict[str, Ranks]:
    """Layer to ranks, such that `ratio` of all multiply-adds goes; savings of layers do not overlap here."""
    example = tensors_of(work.opened.rows.rows(slice(0, 1)), work.opened.signature)
    levels = allot(cuts, config.ratio * multiply_adds(module, example))
    return {name: form.level(layers[name], level) for name, level in levels.items()}
