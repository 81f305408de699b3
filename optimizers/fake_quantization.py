"""Rounding simulated inside a PyTorch module: layers whose weights and inputs go through a grid with learned steps, put in and taken out.

Knows no training and no ONNX. What is simulated: the input and the weight of each Conv1d, Conv2d and Linear that the forward pass calls.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Final

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize
from torch.nn.utils.fusion import fuse_conv_bn_eval, fuse_linear_bn_eval

from optimizers.base import NotApplicable
from optimizers.torch_source import Outputs

LAYERS: Final = (nn.Conv1d, nn.Conv2d, nn.Linear)
NORMALIZATIONS: Final = (nn.BatchNorm1d, nn.BatchNorm2d)
LEVELS: Final = 255
"""Of an activation: unsigned, 8 bits."""
SAME: Final = 1e-3
"""How far a folded module's outputs may be from the module's own, as a share of the largest."""
_INPUT: Final = "input_grid"


class Grid(nn.Module):
    """x̂ = (clamp(round(x/s) + z, low, high) − z)·s with s = s₀·exp(t); `step` is s₀, one number or one for each output channel.

    The gradient of round is 1 (straight through), that of t follows from the formula and is scaled by 1/√(values per step · high) (LSQ).
    """

    first: Tensor
    zero: Tensor

    def __init__(self, step: Tensor, zero: Tensor, low: int, high: int, learn: bool) -> None:
        super().__init__()
        self.register_buffer("first", step)
        self.register_buffer("zero", zero)
        self.t = nn.Parameter(torch.zeros_like(step).reshape(-1), requires_grad=learn)
        self.low, self.high = low, high

    @property
    def step(self) -> Tensor:
        return self.first * self.t.exp().view_as(self.first)

    @property
    def range(self) -> tuple[float, float]:
        """The values that the ends of the grid stand for."""
        step, zero = float(self.step.detach()), float(self.zero)
        return (self.low - zero) * step, (self.high - zero) * step

    def forward(self, x: Tensor) -> Tensor:
        step = self.step
        if step.requires_grad:
            step = _scaled_gradient(step, 1 / math.sqrt(x.numel() / step.numel() * self.high))
        level = torch.clamp(x / step + self.zero, self.low, self.high)
        return (level + (level.round() - level).detach() - self.zero) * step


def _scaled_gradient(value: Tensor, scale: float) -> Tensor:
    return (value - value * scale).detach() + value * scale


def weight_grid(weight: Tensor, levels: int, per_channel: bool, learn: bool) -> Grid:
    """Symmetric, from −`levels` to `levels`, as wide as the weight."""
    wide = weight.detach().abs()
    peak = wide.amax(dim=tuple(range(1, wide.ndim)), keepdim=True) if per_channel else wide.max().reshape([1] * wide.ndim)
    return Grid(peak.clamp_min(1e-12) / levels, torch.zeros(()), -levels, levels, learn)


def input_grid(low: float, high: float, learn: bool) -> Grid:
    """Affine, over [min(low, 0), max(high, 0)]."""
    low, high = min(low, 0.0), max(high, 0.0)
    step = max((high - low) / LEVELS, 1e-12)
    return Grid(torch.tensor(step), torch.tensor(float(round(-low / step))), 0, LEVELS, learn)


# ---- what the forward pass calls


@dataclass
class Seen:
    """One layer in a forward pass: which activation it read, and between which values that lay."""

    source: int = 0
    low: float = math.inf
    high: float = -math.inf


@dataclass
class _Pass:
    """Hooks that note what goes into which layer, and which normalization reads what a layer made. Tensors are held, so that ids stay theirs."""

    seen: dict[str, Seen] = field(default_factory=dict)
    made: dict[int, str] = field(default_factory=dict)
    follows: dict[str, str] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)
    held: list[Any] = field(default_factory=list)

    def watch(self, module: nn.Module) -> list[Any]:
        return [
            part.register_forward_hook(
                lambda _, given, named, result, name=name, part=part: self._note(name, part, _entered(given, named), result),
                with_kwargs=True,
            )
            for name, part in module.named_modules()
            if isinstance(part, (*LAYERS, *NORMALIZATIONS))
        ]

    def _note(self, name: str, part: nn.Module, entered: Any, result: Any) -> None:
        self.held += [entered, result]
        self.calls[name] = self.calls.get(name, 0) + 1
        if isinstance(part, NORMALIZATIONS):
            if id(entered) in self.made:
                self.follows[name] = self.made[id(entered)]
            return
        self.made[id(result)] = name
        seen = self.seen.setdefault(name, Seen(source=id(entered)))
        seen.low, seen.high = min(seen.low, float(entered.min())), max(seen.high, float(entered.max()))


def _entered(given: tuple[Any, ...], named: dict[str, Any]) -> Any:
    """What a layer was given, which may be by keyword: all of these call it input."""
    return given[0] if given else named["input"]


def _watched(module: nn.Module, batches: Iterable[Outputs]) -> _Pass:
    """Run `module` on each batch. Layers that read one activation are told by the first batch."""
    whole: _Pass | None = None
    module.eval()
    for batch in batches:
        seen = _Pass()
        hooks = seen.watch(module)
        try:
            with torch.no_grad():
                module(*batch)
        finally:
            for hook in hooks:
                hook.remove()
        if whole is None:
            whole = seen
        for name, one in seen.seen.items():
            known = whole.seen.setdefault(name, one)
            known.low, known.high = min(known.low, one.low), max(known.high, one.high)
        if seen is not whole:
            seen.held.clear()
    return whole or _Pass()


def folded(module: nn.Module, rows: Outputs) -> nn.Module:
    """A copy with each BatchNorm that follows a layer folded into it. Raises NotApplicable where the answers would not stay the same."""
    twin = copy.deepcopy(module).eval()
    seen = _watched(twin, [rows])
    for name, layer in seen.follows.items():
        if seen.calls[name] != 1 or seen.calls[layer] != 1:
            continue
        normalization, part = twin.get_submodule(name), twin.get_submodule(layer)
        fuse: Any = fuse_linear_bn_eval if isinstance(part, nn.Linear) else fuse_conv_bn_eval
        _replace(twin, layer, fuse(part, normalization))
        _replace(twin, name, nn.Identity())
    with torch.no_grad():
        before, after = _first(module.eval()(*rows)), _first(twin(*rows))
    if before.shape != after.shape or float((before - after).abs().max()) > SAME * max(1e-6, float(before.abs().max())):
        raise NotApplicable("a normalization cannot be folded into the layer before it: something else reads that layer's output")
    return twin


def _first(result: Any) -> Tensor:
    value = next(iter(result.values())) if isinstance(result, dict) else result[0] if isinstance(result, tuple | list) else result
    if not isinstance(value, Tensor):
        raise NotApplicable(f"the module returns a {type(value).__name__}, not a tensor")
    return value.float()


def _replace(module: nn.Module, name: str, part: nn.Module) -> None:
    parent, _, own = name.rpartition(".")
    setattr(module.get_submodule(parent), own, part)


# ---- putting grids in, and taking them out


@dataclass
class Simulation:
    """The layers of `module` that now go through grids, by name."""

    module: nn.Module
    layers: dict[str, Any] = field(default_factory=dict)

    @torch.no_grad()
    def settle(self) -> dict[str, Learned]:
        """Take the grids out, and leave weights that lie within them, so that a quantizer which spans a weight finds the learned step."""
        learned = {name: _settled(self.module.get_submodule(name)) for name in self.layers}
        for name, hook in self.layers.items():
            hook.remove()
            delattr(self.module.get_submodule(name), _INPUT)
        self.layers.clear()
        return learned


@dataclass(frozen=True)
class Learned:
    """What one layer learned: its weight (clipped to its grid), the range of its input, how its input's step changed, and what was clipped."""

    weight: Tensor
    range: tuple[float, float]
    factor: float
    clipped: float


def simulate(module: nn.Module, batches: Iterable[Outputs], levels: int, per_channel: bool, learn: bool) -> Simulation:
    """Let the weight and the input of each layer go through a grid. Layers that read one activation share its grid.

    A weight that two parts of the module share stays as it is, and so does a layer whose input is not finite.
    """
    owners: dict[int, int] = {}
    for part in module.modules():
        for own in part.parameters(recurse=False):
            owners[own.data_ptr()] = owners.get(own.data_ptr(), 0) + 1
    grids: dict[int, Grid] = {}
    made = Simulation(module)
    for name, seen in _watched(module, batches).seen.items():
        layer = module.get_submodule(name)
        weight: Any = layer.weight
        if owners[weight.data_ptr()] > 1 or not math.isfinite(seen.low + seen.high):
            continue
        grid = grids.setdefault(seen.source, input_grid(seen.low, seen.high, learn))
        layer.add_module(_INPUT, grid)
        parametrize.register_parametrization(layer, "weight", weight_grid(weight, levels, per_channel, learn))
        made.layers[name] = layer.register_forward_pre_hook(_through_grid, with_kwargs=True)
    return made


def _through_grid(layer: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    entered = layer.get_submodule(_INPUT)(_entered(given, named))
    return ((entered, *given[1:]), named) if given else ((), {**named, "input": entered})


def _settled(layer: nn.Module) -> Learned:
    own: Any = layer.parametrizations
    grid, weight = own.weight[0], own.weight.original.detach().clone()
    entered: Any = layer.get_submodule(_INPUT)
    edge = (grid.step * grid.high).expand_as(weight)
    clipped = float((weight.abs() > edge).float().mean())
    parametrize.remove_parametrizations(layer, "weight", leave_parametrized=False)
    weight = torch.maximum(torch.minimum(weight, edge), -edge)
    layer.weight = nn.Parameter(weight)
    return Learned(weight, entered.range, float(entered.t.exp()), clipped)
