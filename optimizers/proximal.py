"""L1 sparsity's work: a proximal step over whole channels while training, then removal of those that are exactly zero; or over single weights.

Network slimming (Liu et al. 2017, arXiv:1708.06519) with a group lasso over what layers share, so that removal changes no answer.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.channels import LAYERS, changed_widths, dependency_graph, groups_with_layers, widths
from optimizers.lessons import Lesson
from optimizers.packed import pack
from optimizers.running import brief, raise_if_memory
from optimizers.samples import Samples
from optimizers.sparsity import L1SparsityConfig
from optimizers.torch_source import Opened, Outputs, outputs_of, quiet, tensors_of, torch_for
from optimizers.training import place_of
from optimizers.workshop import Workshop

NORMS = nn.modules.batchnorm._BatchNorm
TRANSPOSED = nn.modules.conv._ConvTransposeNd
NOTHING = 1e-3
"""How far outputs may move, as a share of the largest, when channels that are zero are removed."""
DOUBLED = 0.03
"""Share of the sparsifying part in which λ doubles while too few channels are zero, and is halved while there are enough, down to what it was."""
REACHED = 0.7
"""Share of the sparsifying part at which `ratio` is to be reached; what is left trains beside the zeros."""
SPARED = 0.9
"""What a step makes of the length of a channel that would go before the schedule wants it to: λ may have been doubled too often."""
SMALLEST = 0.1
"""Lengths below this share of their group's mean count as it where channels are weighted."""


@dataclass(frozen=True)
class Unit:
    """Channels that stand or fall together: the layer that names them and the gates that make channel c zero when row c of each is."""

    root: str
    gates: tuple[str, ...]

    @property
    def parts(self) -> int:
        """What the norm of one of them is a sum over."""
        return len(self.gates)

    def lengths(self, module: nn.Module) -> Tensor:
        """The root of the summed mean squares of each channel's gates."""
        return torch.stack([_rows(module, gate).pow(2).mean(1) for gate in self.gates]).sum(0).sqrt()

    def scale(self, module: nn.Module, factor: Tensor) -> None:
        for gate in self.gates:
            layer = module.get_submodule(gate)
            for parameter in (layer.weight, layer.bias):
                if isinstance(parameter, Tensor):
                    _by_channel(layer, parameter).mul_(factor.view(-1, *[1] * (parameter.ndim - 1)))


@dataclass(frozen=True)
class Weights:
    """The single weights of a layer, each of which stands or falls alone."""

    layer: str
    parts: int = 1

    def lengths(self, module: nn.Module) -> Tensor:
        return self._of(module).detach().abs().flatten()

    def scale(self, module: nn.Module, factor: Tensor) -> None:
        weight = self._of(module)
        weight.mul_(factor.view_as(weight))

    def _of(self, module: nn.Module) -> Tensor:
        found = module.get_submodule(self.layer).weight
        assert isinstance(found, Tensor)
        return found


def build(artifact: Artifact, config: L1SparsityConfig, samples: Samples, budget: Budget) -> Artifact:
    """The artifact without its zero channels, or with zero weights. Raises NotApplicable where nothing became zero."""
    started = time.monotonic()
    with torch_for(budget):
        work = Workshop.open(artifact, config, samples, budget)
        lesson, module = work.lesson(), work.opened.module
        if config.on == "weights":
            return _thinned(work, lesson, config, started)
        before = widths(module)
        units, refused = units_of(work.opened, module)
        pressure, channels = Pressure(units, config), sum(len(unit.lengths(module)) for unit in units)
        sparse = work.fine_tune(module, lesson, "sparsifying", 1 - config.recover, span=(0.1, 0.6), after_step=pressure)
        small, removed, error = without_zeros(work.opened, module, units)
        trained = work.fine_tune(small, lesson, "fine-tuning", config.recover, span=(0.6, 0.9))
        facts = {
            "strength": config.strength, "strength_at_most": pressure.highest, "zero_channels": removed, "zero_share": sum(removed.values()) / channels, "removal_error": error, "channels": changed_widths(before, small),
            "left_alone": refused, "sparsifying": sparse.facts() if sparse else None, "seconds": time.monotonic() - started,
        }  # fmt: skip
        return work.deliver(small, lesson, facts, trained)


def _thinned(work: Workshop, lesson: Lesson, config: L1SparsityConfig, started: float) -> Artifact:
    """Zero weights where they are: what gets smaller is the packed file."""
    module = work.opened.module
    layers = [Weights(name) for name, layer in module.named_modules() if isinstance(layer, LAYERS)]
    pressure = Pressure(layers, config)
    sparse = work.fine_tune(module, lesson, "sparsifying", 1 - config.recover, span=(0.1, 0.6), after_step=pressure)
    zeros = pressure.hold(module)
    if not zeros:
        raise NotApplicable("no weight became zero in training: raise strength (λ), or give it more epochs or minutes")
    trained = work.fine_tune(module, lesson, "fine-tuning", config.recover, span=(0.6, 0.9), after_step=pressure)
    facts = {
        "strength": config.strength, "strength_at_most": pressure.highest, "zero_weights": zeros,
        "zero_share": zeros / sum(len(layer.lengths(module)) for layer in layers), "sparsifying": sparse.facts() if sparse else None,
    }  # fmt: skip
    made = work.deliver(module, lesson, facts, trained)
    more = {"bytes_packed": pack(made.path, work.folder / "model.packed").bytes, "seconds": time.monotonic() - started}
    return replace(made, facts=(*made.facts[:-1], made.facts[-1] | more))


@dataclass
class Pressure:
    """The L1 term over a training: λ follows a schedule of zeros, and where `ratio` of all channels (or weights) are zero they are held there."""

    units: Sequence[Unit | Weights]
    config: L1SparsityConfig
    seen: float = 0.0
    """The progress of the step before."""
    strength: float = field(init=False)
    highest: float = field(init=False)
    held: list[Tensor] = field(default_factory=list)
    """Once the ratio is reached: which of each unit are zero."""

    def __post_init__(self) -> None:
        self.strength = self.highest = self.config.strength

    def state(self) -> dict[str, Any]:
        return {"strength": self.strength, "highest": self.highest, "seen": self.seen, "held": self.held}

    def restore(self, state: dict[str, Any]) -> None:
        self.strength, self.highest, self.seen, self.held = (state[name] for name in ("strength", "highest", "seen", "held"))

    @torch.no_grad()
    def __call__(self, module: nn.Module, rate: float, progress: float) -> None:
        if self.held:
            for unit, zero in zip(self.units, self.held, strict=True):
                unit.scale(module, (~zero).float().to(place_of(module)))  # they may have been found on cores
            return
        due = self.config.ratio * min(1.0, progress / REACHED)
        lengths = [unit.lengths(module) for unit in self.units]
        factors = [
            shrinkage(length, unit.parts, rate * self.strength, self.config.most, self.config.reweighted)
            for unit, length in zip(self.units, lengths, strict=True)
        ]
        for unit, factor in zip(self.units, spared(lengths, factors, due), strict=True):
            unit.scale(module, factor)
        zeros = [unit.lengths(module) == 0 for unit in self.units]
        share = sum(int(zero.sum()) for zero in zeros) / sum(len(zero) for zero in zeros)
        if share >= self.config.ratio:
            self.held = zeros
        change = 2 ** ((progress - self.seen) / DOUBLED)
        behind, self.seen = share < due, progress
        self.strength = self.strength * change if behind else max(self.config.strength, self.strength / change)
        self.highest = max(self.highest, self.strength)

    def hold(self, module: nn.Module) -> int:
        """From here on what is zero stays zero, and nothing is shrunk; how many there are."""
        self.held = self.held or [unit.lengths(module) == 0 for unit in self.units]
        return sum(int(zero.sum()) for zero in self.held)


def units_of(opened: Opened, module: nn.Module) -> tuple[list[Unit], dict[str, str]]:
    """The groups of channels that may go, and why others may not. Gates are the BatchNorms of a group, and its layers that no BatchNorm follows."""
    units, refused, normed = [], dict[str, str](), followed_by_norms(opened, module)
    for root, layers in groups_with_layers(opened, module):
        gates = tuple(name for name in layers if isinstance(module.get_submodule(name), (*LAYERS, NORMS)) and name not in normed)
        unit = Unit(root, gates)
        if why := _unfit(opened, module, unit):
            refused[root] = why
        else:
            units.append(unit)
    if not units:
        raise NotApplicable("no layer can lose channels: " + (_told(refused) or "all are outputs, tied or inside attention"))
    return units, refused


def _told(refused: dict[str, str]) -> str:
    return "; ".join(f"{root}: {why}" for root, why in list(refused.items())[:5])


def _unfit(opened: Opened, module: nn.Module, unit: Unit) -> str:
    """Why the unit's channels must stay, or "": with every second one zero, removing those is tried."""
    channels = widths(module)[unit.root]
    try:
        if channels < 2 or any(len(_rows(module, gate)) != channels for gate in unit.gates):
            return "its layers do not have a channel each for one of its own"
        twin = copy.deepcopy(module).eval()
        with torch.no_grad():
            unit.scale(twin, torch.arange(channels).remainder(2).float())
        example = tensors_of(opened.rows, opened.signature)
        before = _answers(opened, twin, example)
        for layer in remove(opened, twin, unit.root, list(range(0, channels, 2))):
            if isinstance(layer, nn.modules.conv._ConvNd) and 1 < layer.groups != layer.out_channels:
                return "a convolution with groups takes part, whose groups must lose the same channels"
        apart = _apart(_answers(opened, twin, example), before)
    except NotApplicable as reason:
        return str(reason)
    return f"channels that are zero still count: without them outputs move by {apart:.2g} of the largest" if apart > NOTHING else ""


def remove(opened: Opened, module: nn.Module, root: str, channels: list[int]) -> list[nn.Module]:
    """Take output channels of the layer `root`, and all that hangs on them, out of `module`; the layers that were cut."""
    import torch_pruning as tp

    layer = module.get_submodule(root)
    handler = tp.prune_linear_out_channels if isinstance(layer, nn.Linear) else tp.prune_conv_out_channels
    graph = dependency_graph(opened, module)
    try:
        with quiet(), torch.enable_grad():
            group = graph.get_pruning_group(layer, handler, idxs=channels)
            group.prune()
    except Exception as error:
        raise_if_memory(error)
        raise NotApplicable(f"{root} does not bear pruning: {type(error).__name__}: {brief(error)}") from error
    return [dep.target.module for dep, _ in group]


@torch.no_grad()
def _answers(opened: Opened, module: nn.Module, example: Outputs) -> Outputs:
    try:
        return outputs_of(module(*example), opened.signature.outputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise_if_memory(error)
        raise NotApplicable(f"the module does not run without some channels: {brief(error)}") from error


def _apart(found: Outputs, expected: Outputs) -> float:
    return max(float((a - b).abs().max() / b.abs().max().clamp_min(1e-6)) for a, b in zip(found, expected, strict=True))


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


def shrinkage(length: Tensor, parts: int, amount: float, most: float, reweighted: bool = False) -> Tensor:
    """What the proximal step of amount · Σ_c a_c ‖v_c‖ multiplies each channel's vector v_c with: it is shortened by amount · a_c · √parts, and
    never turns over. For single weights it is the soft threshold.

    a_c is 1, or mean length / length (at most 1 / SMALLEST). The longest, those beyond `most` of them, are at most halved, and nothing is done
    where `most` is zero already.
    """
    kept = max(1, len(length) - int(most * len(length)))
    if int((length > 0).sum()) <= kept:
        return torch.ones_like(length)
    mean = length[length > 0].mean()
    weight = mean / torch.maximum(length, SMALLEST * mean) if reweighted else torch.ones_like(length)
    factor: Tensor = (1 - amount * weight * parts**0.5 / length.clamp_min(1e-12)).clamp_min(0)
    longest = length >= length.kthvalue(len(length) - kept + 1).values
    factor[longest] = factor[longest].clamp_min(0.5)
    return factor


def spared(lengths: list[Tensor], factors: list[Tensor], share: float) -> list[Tensor]:
    """`factors`, by which no more than `share` of all become zero (one more, where none is yet): of those that would, the shortest do.

    Lengths are compared relative to their group's mean.
    """
    length, factor = torch.cat(lengths), torch.cat(factors)
    relative = torch.cat([each / each[each > 0].mean() if bool((each > 0).any()) else each for each in lengths])
    already = int((length == 0).sum())
    going = ((factor == 0) & (length > 0)).nonzero().flatten()
    allowed = max(0 if already else 1, math.ceil(share * len(length)) - already)
    if len(going) > allowed:
        last = relative[going].kthvalue(allowed).values if allowed else -1.0
        factor[going[relative[going] > last]] = SPARED
    return list(torch.split(factor, [len(each) for each in factors]))


def _rows(module: nn.Module, name: str) -> Tensor:
    """[channels, numbers]: γ and β, or filter and bias, of each output channel."""
    layer = module.get_submodule(name)
    given = [_by_channel(layer, p.detach()) for p in (layer.weight, layer.bias) if isinstance(p, Tensor)]
    return torch.cat([p.flatten(1) if p.ndim > 1 else p[:, None] for p in given], 1)


def _by_channel(layer: nn.Module, parameter: Tensor) -> Tensor:
    """A view of a weight or bias with the output channels first, where those of a transposed convolution are not."""
    return parameter.transpose(0, 1) if isinstance(layer, TRANSPOSED) and layer.groups == 1 and parameter.ndim > 1 else parameter


def zero_channels(module: nn.Module, unit: Unit) -> list[int]:
    zero = torch.stack([(_rows(module, gate) == 0).all(1) for gate in unit.gates]).all(0)
    found = [int(i) for i in zero.nonzero().flatten()]
    return found[1:] if len(found) == len(zero) else found  # a layer keeps at least one channel


def without_zeros(opened: Opened, module: nn.Module, units: list[Unit]) -> tuple[nn.Module, dict[str, int], float]:
    """A copy without its zero channels, how many went by layer, and how far its outputs are from those before (relative)."""
    twin = copy.deepcopy(module).eval()
    example = tensors_of(opened.rows, opened.signature)
    expected = _answers(opened, twin, example)
    removed: dict[str, int] = {}
    for unit in units:
        if zeros := zero_channels(twin, unit):
            remove(opened, twin, unit.root, zeros)
            removed[unit.root] = len(zeros)
    if not removed:
        raise NotApplicable("no channel became zero in training: raise strength (λ), or give it more epochs or minutes")
    error = _apart(_answers(opened, twin, example), expected)
    if error > NOTHING:
        raise NotApplicable(f"removing channels that are zero moved the outputs by {error:.2g} of the largest (at most {NOTHING:g} may be)")
    return twin, removed, error
