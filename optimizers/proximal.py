"""L1 sparsity's work: a proximal step over whole channels while training, then removal of those that are exactly zero.

Network slimming (Liu et al. 2017, arXiv:1708.06519) with a group lasso over what layers share, so that removal changes no answer.
"""

from __future__ import annotations

import copy
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.channels import LAYERS, changed_widths, dependency_graph, groups_with_layers, widths
from optimizers.samples import Samples
from optimizers.sparsity import L1SparsityConfig
from optimizers.torch_source import Opened, outputs_of, quiet, tensors_of, torch_for
from optimizers.workshop import Workshop

NORMS = nn.modules.batchnorm._BatchNorm


@dataclass(frozen=True)
class Unit:
    """Channels that stand or fall together: the layer that names them and the gates that make channel c zero when row c of each is."""

    root: str
    gates: tuple[str, ...]


def build(artifact: Artifact, config: L1SparsityConfig, samples: Samples, budget: Budget) -> Artifact:
    """The artifact without its zero channels. Raises NotApplicable where no channel became zero."""
    started = time.monotonic()
    with torch_for(budget):
        work = Workshop.open(artifact, config, samples, budget)
        lesson, module = work.lesson(), work.opened.module
        before = widths(module)
        units = units_of(work.opened, module)

        def shrink(trained: nn.Module, rate: float) -> None:
            for unit in units:
                shrunk(trained, unit, rate * config.strength, config.most)

        sparse = work.fine_tune(module, lesson, "sparsifying", 1 - config.recover, span=(0.1, 0.6), after_step=shrink)
        small, removed, error = without_zeros(work.opened, module, units)
        trained = work.fine_tune(small, lesson, "fine-tuning", config.recover, span=(0.6, 0.9))
        facts = {
            "strength": config.strength, "zero_channels": removed, "removal_error": error, "channels": changed_widths(before, small),
            "sparsifying": sparse.facts() if sparse else None, "seconds": time.monotonic() - started,
        }  # fmt: skip
        return work.deliver(small, lesson, facts, trained)


def units_of(opened: Opened, module: nn.Module) -> list[Unit]:
    """The groups of channels that may go. Gates are the BatchNorms of a group, and those of its layers that no BatchNorm follows."""
    units, normed = [], followed_by_norms(opened, module)
    for root, layers in groups_with_layers(opened, module):
        gates = tuple(name for name in layers if isinstance(module.get_submodule(name), (*LAYERS, NORMS)) and name not in normed)
        if all(len(_rows(module, gate)) == len(_rows(module, root)) for gate in gates):
            units.append(Unit(root, gates))
    if not units:
        raise NotApplicable("no layer can lose channels: all are outputs, tied or inside attention")
    return units


@torch.no_grad()
def followed_by_norms(opened: Opened, module: nn.Module) -> set[str]:
    """Layers whose output is just what a BatchNorm takes."""
    made: dict[int, str] = {}
    alive: list[Tensor] = []  # so that no two tensors have the same id
    found: set[str] = set()

    def hook(name: str) -> Any:
        def look(layer: nn.Module, inputs: tuple[Tensor, ...], out: Tensor) -> None:
            if isinstance(layer, NORMS):
                found.update({made[id(inputs[0])]} if id(inputs[0]) in made else ())
            else:
                made[id(out)] = name
                alive.append(out)

        return look

    layers = [(name, layer) for name, layer in module.named_modules() if isinstance(layer, (*LAYERS, NORMS))]
    handles = [layer.register_forward_hook(hook(name)) for name, layer in layers]
    try:
        module.eval()(*tensors_of(opened.rows.rows(slice(0, 1)), opened.signature))
    finally:
        for handle in handles:
            handle.remove()
    return found


@torch.no_grad()
def shrunk(module: nn.Module, unit: Unit, amount: float, most: float) -> None:
    """The proximal step of amount · Σ_c ‖v_c‖: every channel's vector v_c is shortened by amount · √(its gates), and never turns over.

    The longest channels, those beyond `most` of them, are at most halved, and nothing is done where `most` is zero already.
    """
    rows = [_rows(module, gate) for gate in unit.gates]
    length = torch.stack([row.pow(2).mean(1) for row in rows]).sum(0).sqrt()
    kept = max(1, len(length) - int(most * len(length)))
    if int((length > 0).sum()) <= kept:
        return
    factor = (1 - amount * len(rows) ** 0.5 / length.clamp_min(1e-12)).clamp_min(0)
    longest = length.topk(kept).indices
    factor[longest] = factor[longest].clamp_min(0.5)
    for gate in unit.gates:
        layer = module.get_submodule(gate)
        for parameter in (layer.weight, layer.bias):
            if isinstance(parameter, Tensor):
                parameter.mul_(factor.view(-1, *[1] * (parameter.ndim - 1)))


def _rows(module: nn.Module, name: str) -> Tensor:
    """[channels, numbers]: γ and β, or filter and bias, of each output channel."""
    layer = module.get_submodule(name)
    parts = [p.detach().flatten(1) if p.ndim > 1 else p.detach()[:, None] for p in (layer.weight, layer.bias) if isinstance(p, Tensor)]
    return torch.cat(parts, 1)


def zero_channels(module: nn.Module, unit: Unit) -> list[int]:
    zero = torch.stack([(_rows(module, gate) == 0).all(1) for gate in unit.gates]).all(0)
    found = [int(i) for i in zero.nonzero().flatten()]
    return found[1:] if len(found) == len(zero) else found  # a layer keeps at least one channel


def without_zeros(opened: Opened, module: nn.Module, units: list[Unit]) -> tuple[nn.Module, dict[str, int], float]:
    """A copy without its zero channels, how many went by layer, and how far its outputs are from those before (relative)."""
    import torch_pruning as tp

    twin = copy.deepcopy(module).eval()
    example = tensors_of(opened.rows, opened.signature)
    with torch.no_grad():
        expected = outputs_of(twin(*example), opened.signature.outputs)
    removed: dict[str, int] = {}
    for unit in units:
        zeros = zero_channels(twin, unit)
        if not zeros:
            continue
        layer = twin.get_submodule(unit.root)
        with quiet(), torch.enable_grad():
            handler = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
            group = dependency_graph(opened, twin).get_pruning_group(layer, handler, idxs=zeros)
            group.prune()
        removed[unit.root] = len(zeros)
    if not removed:
        raise NotApplicable("no channel became zero in training: raise strength (λ), or give it more epochs")
    with torch.no_grad():
        found = outputs_of(twin(*example), opened.signature.outputs)
    error = max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in zip(found, expected, strict=True))
    return twin, removed, error
