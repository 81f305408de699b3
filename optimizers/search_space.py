"""What an architecture search may decide about a module, and the module that a choice describes, with the parent's weights in it.

Widths are channels pruned by importance, depth is residual blocks skipped, kernels are convolutions split as optimizers.splitting does.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from optimizers.base import Budget, NotApplicable
from optimizers.channels import LAYERS, all_groups, attention_layers, dependency_graph, output_layers, pruned, tied_layers, widths
from optimizers.kernels import Depthwise, Spatial
from optimizers.pruning import StructuredPruningConfig
from optimizers.search import ArchitectureSearchConfig
from optimizers.splitting import Form
from optimizers.strategies import Choice
from optimizers.torch_layers import Skip
from optimizers.torch_source import Opened, Outputs, outputs_of, quiet, tensors_of
from optimizers.torch_structure import replace_layer
from optimizers.tucker import Tucker

FORMS: Final[dict[str, Form]] = {"spatial": Spatial(), "depthwise": Depthwise(), "tucker": Tucker()}
LEAST_SAVED: Final = 0.1
"""An operation is an option only where this share of the convolution's multiply-adds goes."""


@dataclass(frozen=True)
class Group:
    """Layers that lose channels together: those that make them (`outward`) and those that take them in. `scores`: importance of each channel."""

    root: str
    outward: tuple[str, ...]
    inward: tuple[str, ...]
    scores: Tensor


@dataclass(frozen=True)
class Decision:
    """`kind` width | depth | kernel, of the module `name`. `options` begin with what is there. `kept`: channels that each width leaves."""

    kind: str
    name: str
    options: tuple[str, ...]
    ratios: tuple[float, ...] = ()
    kept: tuple[int, ...] = ()
    group: Group | None = None


class Space:
    """All decisions about one module. Raises NotApplicable where there is none."""

    def __init__(self, opened: Opened, config: ArchitectureSearchConfig, budget: Budget) -> None:
        self.opened, self.config, self.module = opened, config, opened.module
        self.example = tensors_of(opened.rows.rows(slice(0, 1)), opened.signature)
        self._pruning = StructuredPruningConfig(round_to=config.round_to, keep=config.keep)
        self._outputs = self._shapes(self.module)
        self.decisions: list[Decision] = []
        for at, decision in enumerate(self._found(), 1):
            budget.tick(config.method, f"looking at {decision.name}", 0.1 - 0.05 / at, decisions=len(self.decisions))
            if len(decision.options) > 1:
                self.decisions.append(decision)
        if not self.decisions:
            raise NotApplicable(
                "nothing to decide: no channels that can go, no residual block that keeps its shape, no convolution to split"
            )

    @property
    def sizes(self) -> list[int]:
        return [len(decision.options) for decision in self.decisions]

    def told(self, choice: Choice) -> dict[str, str]:
        """What differs from the parent."""
        chosen = zip(self.decisions, choice, strict=True)
        return {f"{decision.kind} {decision.name}": decision.options[taken] for decision, taken in chosen if taken}

    def made(self, choice: Choice) -> nn.Module:
        """A module of its own. Raises NotApplicable where the decisions do not fit together."""
        taken = [(decision, option) for decision, option in zip(self.decisions, choice, strict=True) if option]
        ratios = {decision.name: decision.ratios[option] for decision, option in taken if decision.kind == "width"}
        module = pruned(self.opened, self.module, self._pruning, 0.0, ratios) if ratios else copy.deepcopy(self.module)
        skipped = [decision.name for decision, _ in taken if decision.kind == "depth"]
        for name in skipped:
            replace_layer(module, name, Skip.empty())
        for decision, option in taken:
            if decision.kind == "kernel" and not any(decision.name.startswith(f"{name}.") for name in skipped):
                self._split(module, decision.name, FORMS[decision.options[option]])
        if self._shapes(module) != self._outputs:
            raise NotApplicable("these decisions together change the outputs' shapes")
        return module.eval()

    def operation(self, layer: nn.Conv2d, name: str) -> nn.Module | None:
        """`layer` as the operation called `name`; None where that saves too little."""
        form = FORMS[name]
        ranks = form.by_energy(layer, self.config.energy)
        return form.made(layer, ranks) if form.saved(layer, ranks) >= LEAST_SAVED else None

    def _found(self) -> Iterator[Decision]:
        if self.config.widths:
            for group in self._groups():
                yield self._width(group)
        if self.config.depth:
            for name in residual_blocks(self.module, self.example):
                yield Decision("depth", name, ("keep", "skip") if self._bears_skipping(name) else ("keep",))
        for name, layer in self.module.named_modules():
            if isinstance(layer, nn.Conv2d) and name not in self.config.keep:
                yield Decision("kernel", name, ("conv", *(op for op in self.config.operations if self._worth(layer, FORMS[op]))))

    def _groups(self) -> list[Group]:
        """Groups that may lose channels; none where the tracer cannot follow the module."""
        try:
            return groups(self.opened, self.module, self.config.keep)
        except NotApplicable:
            return []

    def _width(self, group: Group) -> Decision:
        """The ratios at which the group alone can be pruned, and what they leave."""
        before = widths(self.module)[group.root]
        ratios, kept = [0.0], [before]
        for ratio in self.config.widths:
            try:
                left = widths(pruned(self.opened, self.module, self._pruning, 0.0, {group.root: ratio}))[group.root]
            except NotApplicable:
                continue  # too narrow to lose anything at this ratio
            if left not in kept:
                ratios.append(ratio)
                kept.append(left)
        return Decision("width", group.root, tuple(f"{channels} of {before}" for channels in kept), tuple(ratios), tuple(kept), group)

    def _bears_skipping(self, name: str) -> bool:
        module = copy.deepcopy(self.module)
        replace_layer(module, name, Skip.empty())
        try:
            return self._shapes(module) == self._outputs
        except (NotApplicable, AttributeError, RuntimeError, TypeError):  # its owner looks into it
            return False

    def _worth(self, layer: nn.Conv2d, form: Form) -> bool:
        return not form.unfit(layer) and form.saved(layer, form.by_energy(layer, self.config.energy)) >= LEAST_SAVED

    def _split(self, module: nn.Module, name: str, form: Form) -> None:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Conv2d)
        if self._worth(layer, form):
            replace_layer(module, name, form.made(layer, form.by_energy(layer, self.config.energy)))

    @torch.no_grad()
    def _shapes(self, module: nn.Module) -> list[tuple[int, ...]]:
        return [tuple(value.shape) for value in outputs_of(module.eval()(*self.example), self.opened.signature.outputs)]


def groups(opened: Opened, module: nn.Module, keep: tuple[str, ...]) -> list[Group]:
    """torch-pruning's groups of layers whose channels may go, with the importance of each channel as its pruner sees it."""
    import torch_pruning as tp

    if unknown := [name for name in keep if name not in dict(module.named_modules())]:
        raise NotApplicable(f"keep names {unknown[0]!r}, which is no module")
    graph, importance = dependency_graph(opened, module), tp.importance.GroupMagnitudeImportance(p=2)
    example = tensors_of(opened.rows.rows(slice(0, 2)), opened.signature)
    names = {layer: name for name, layer in module.named_modules()}
    ignored = [*output_layers(module, example, opened), *tied_layers(module), *attention_layers(module), *map(module.get_submodule, keep)]
    found = []
    with quiet(), torch.enable_grad():
        for group in all_groups(graph, module, ignored):
            known = [dep for dep, _ in group if dep.target.module in names]
            outward = [names[dep.target.module] for dep in known if graph.is_out_channel_pruning_fn(dep.handler)]
            inward = [names[dep.target.module] for dep in known if graph.is_in_channel_pruning_fn(dep.handler)]
            root = names[group[0].dep.target.module]
            found.append(Group(root, tuple(dict.fromkeys(outward)), tuple(dict.fromkeys(inward)), importance(group).detach()))
    return found


def residual_blocks(module: nn.Module, example: Outputs) -> list[str]:
    """The innermost modules that add something to what they are given: with all weights zero, what comes in still comes out."""
    calls: dict[str, tuple[Any, Any]] = {}

    def listening(name: str) -> Any:
        def keep(_: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
            if args and isinstance(args[0], Tensor) and isinstance(out, Tensor) and args[0].shape == out.shape:
                calls[name] = (args, kwargs)

        return keep

    inner = {name: block for name, block in module.named_modules() if name and list(block.children()) and _has_layers(block)}
    handles = [block.register_forward_hook(listening(name), with_kwargs=True) for name, block in inner.items()]
    try:
        with torch.no_grad():
            module.eval()(*example)
    finally:
        for handle in handles:
            handle.remove()
    found = [name for name, (args, kwargs) in calls.items() if _passes_on(module.get_submodule(name), args, kwargs)]
    order = [name for name, _ in module.named_modules() if name in found]
    return [name for name in order if not any(other.startswith(f"{name}.") for other in order)]


def _has_layers(block: nn.Module) -> bool:
    return any(isinstance(part, LAYERS) for part in block.modules())


@torch.no_grad()
def _passes_on(block: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    """Whether the input still shows in the output when every layer gives zero."""
    twin = copy.deepcopy(block).eval()
    for part in twin.modules():
        if isinstance(part, LAYERS):
            for parameter in part.parameters(recurse=False):
                parameter.zero_()
    other = args[0] + torch.randn(args[0].shape, generator=torch.Generator().manual_seed(0)).abs()
    first, second = twin(*args, **kwargs), twin(other, *args[1:], **kwargs)
    return not torch.allclose(first, second, rtol=1e-3, atol=1e-6)
