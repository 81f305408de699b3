"""Channels removed for real: torch-pruning's dependency graph over a copy of the module, which is dropped whole if anything does not fit.

DepGraph: Fang et al. 2023 (arXiv:2301.12900). Knows channels, neurons and their dependencies; heads of attention are optimizers.heads'.
"""

from __future__ import annotations

import copy
import functools
import math
import time
from collections.abc import Callable, Iterable
from typing import Any, Final

import torch
from torch import Tensor, nn

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.lessons import Lesson
from optimizers.pruning import StructuredPruningConfig
from optimizers.running import brief, raise_if_memory
from optimizers.samples import Samples
from optimizers.torch_source import Opened, Outputs, outputs_of, quiet, tensors_of, torch_for
from optimizers.workshop import Workshop

LAYERS: Final = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose2d, nn.Linear)
HEAD_COUNTS: Final = ("heads", "num_heads", "n_heads", "nhead", "num_attention_heads")
GRADIENT_BATCHES: Final = 4


def build(artifact: Artifact, config: StructuredPruningConfig, samples: Samples, budget: Budget) -> Artifact:
    """The artifact with fewer channels. Raises NotApplicable with the reason (and the module)."""
    started = time.monotonic()
    with torch_for(budget):
        work = Workshop.open(artifact, config, samples, budget)
        lesson = work.lesson()
        module, trained = work.opened.module, None
        before = widths(module)
        for step in range(config.steps):
            share = config.ratio if config.steps == 1 else 1 - (1 - config.ratio) ** (1 / config.steps)
            budget.tick(config.method, f"pruning {step + 1} of {config.steps}", 0.1 + 0.8 * step / config.steps)
            if config.importance == "taylor":
                accumulate_gradients(module, lesson)
            module = pruned(work.opened, module, config, share)
            first = 0.1 + 0.8 * step / config.steps
            trained = (
                work.fine_tune(module, lesson, f"fine-tuning {step + 1}", 1 / config.steps, span=(first, first + 0.8 / config.steps))
                or trained
            )
        facts = {
            "ratio": config.ratio, "importance": config.importance, "scope": config.scope,
            "channels": changed_widths(before, module), "seconds": time.monotonic() - started,
        }  # fmt: skip
        return work.deliver(module, lesson, facts, trained)


def pruned(
    opened: Opened, module: nn.Module, config: StructuredPruningConfig, ratio: float, per_layer: dict[str, float] | None = None
) -> nn.Module:
    """A copy of `module` with `ratio` of its channels gone (`per_layer`: module to a ratio of its own). `module` stays as it is."""
    example = tensors_of(opened.rows.rows(slice(0, 2)), opened.signature)
    twin = copy.deepcopy(module).eval()
    _copy_gradients(module, twin)
    expected = _shapes(twin, example, opened)
    modules = dict(twin.named_modules())
    if unknown := [name for name in config.keep if name not in modules]:
        raise NotApplicable(f"keep names {unknown[0]!r}, which is no module; there are {', '.join(list(modules)[1:20])}")
    ignored = [*output_layers(twin, example, opened), *tied_layers(twin), *attention_layers(twin), *(modules[name] for name in config.keep)]
    ratios = {modules[name]: value for name, value in (per_layer or {}).items()}
    parameters = count(twin)
    try:
        with quiet(), torch.enable_grad():
            pruner = _pruner_type()(
                twin, example if len(example) > 1 else example[0], _importance(config.importance), global_pruning=config.scope == "global",
                pruning_ratio=ratio, pruning_ratio_dict=ratios or None, max_pruning_ratio=config.most, ignored_layers=ignored,
                round_to=config.round_to, in_channel_groups={}, out_channel_groups={}, num_heads={},
                forward_fn=lambda m, x: m(*x) if isinstance(x, tuple) else m(x),
            )  # fmt: skip
            pruner.step()
        found = _shapes(twin, example, opened)
    except NotApplicable:
        raise
    except Exception as error:
        raise_if_memory(error)
        raise NotApplicable(f"{_culprit(module)} does not bear pruning: {type(error).__name__}: {brief(error)}") from error
    if found != expected:
        raise NotApplicable(f"pruning changed the outputs' shapes from {expected} to {found}: name the layers that make them under keep")
    if count(twin) == parameters:
        raise NotApplicable(_why_nothing(config, twin))
    return twin.train(module.training)


@functools.cache
def _pruner_type() -> type[Any]:
    """torch-pruning's pruner, but that channels of grouped layers are rounded over all their groups.

    Its own rounds what one group loses as if it were the whole layer's, and then takes that many from each group.
    """
    import torch_pruning as tp

    class Pruner(tp.pruner.BasePruner):  # type: ignore[misc]
        parts = 1

        def _is_atten_group(self, group: Any) -> Any:
            """Asked about each group just before its channels are rounded."""
            self.parts = self._get_channel_groups(group)
            return super()._is_atten_group(group)

        def _round_to(self, n_pruned: int, current_channels: int, round_to: int) -> int:
            """How many each of the parts loses, such that what stays of all is a multiple of `round_to`."""
            stay = current_channels - n_pruned * self.parts
            return n_pruned + stay % math.lcm(round_to, self.parts) // self.parts

    return Pruner


def _why_nothing(config: StructuredPruningConfig, module: nn.Module) -> str:
    if config.importance == "bn-scale" and not any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in module.modules()):
        return "importance bn-scale needs BatchNorm layers, and the module has none: use l2"
    kept = attention_layers(module)
    attention = f"; {_culprit(module)} is left alone (its heads are not channels)" if kept else ""
    return f"nothing can be removed at ratio {config.ratio:g} with channels in multiples of {config.round_to}{attention}"


def _importance(name: str) -> Callable[..., Tensor]:
    import torch_pruning as tp

    made: dict[str, Callable[[], Any]] = {
        "l1": lambda: tp.importance.GroupMagnitudeImportance(p=1),
        "l2": lambda: tp.importance.GroupMagnitudeImportance(p=2),
        "taylor": tp.importance.GroupTaylorImportance,
        "bn-scale": tp.importance.BNScaleImportance,
    }
    importance: Callable[..., Tensor] = made[name]()
    return importance


def accumulate_gradients(module: nn.Module, lesson: Lesson, batches: int = GRADIENT_BATCHES) -> None:
    """∂L/∂w summed over a few batches, in eval mode so that running statistics stay."""
    module.eval().zero_grad()
    random = torch.Generator().manual_seed(0)
    order = torch.randperm(lesson.rows, generator=random)
    for index in torch.split(order[: 64 * batches], 64):
        lesson.steepness(module, index).backward()  # type: ignore[no-untyped-call]
    for parameter in module.parameters():
        if parameter.requires_grad and parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)


def _copy_gradients(module: nn.Module, twin: nn.Module) -> None:
    for own, theirs in zip(module.parameters(), twin.parameters(), strict=True):
        theirs.grad = None if own.grad is None else own.grad.clone()


# ---- groups of layers that lose channels together
def dependency_graph(opened: Opened, module: nn.Module) -> Any:
    """torch-pruning's graph of `module`. Raises NotApplicable where its tracer cannot follow the module."""
    import torch_pruning as tp

    example = tensors_of(opened.rows.rows(slice(0, 2)), opened.signature)
    try:
        with quiet(), torch.enable_grad():
            return tp.DependencyGraph().build_dependency(module.eval(), example, forward_fn=lambda m, x: m(*x))
    except Exception as error:  # whatever the tracer and the owner's forward raise
        raise_if_memory(error)
        raise NotApplicable(f"{_culprit(module)} does not bear pruning: {type(error).__name__}: {brief(error)}") from error


def all_groups(graph: Any, module: nn.Module, ignored: list[nn.Module]) -> list[Any]:
    """Raises NotApplicable where torch-pruning fails on the module."""
    try:
        return list(graph.get_all_groups(ignored_layers=ignored, root_module_types=list(LAYERS)))
    except Exception as error:  # whatever its rules for a layer raise, as those for GRUs do
        raise_if_memory(error)
        raise NotApplicable(f"{_culprit(module)} does not bear pruning: {type(error).__name__}: {brief(error)}") from error


def groups_with_layers(opened: Opened, module: nn.Module, keep: Iterable[str] = ()) -> list[tuple[str, list[str]]]:
    """Groups that may lose channels: the layer that names each, and all modules whose output channels go with it."""
    graph = dependency_graph(opened, module)
    example = tensors_of(opened.rows.rows(slice(0, 2)), opened.signature)
    names = {layer: name for name, layer in module.named_modules()}
    ignored = [*output_layers(module, example, opened), *tied_layers(module), *attention_layers(module), *map(module.get_submodule, keep)]
    found: list[tuple[str, list[str]]] = []
    with quiet(), torch.enable_grad():
        for group in all_groups(graph, module, ignored):
            outward = [dep.target.module for dep, _ in group if graph.is_out_channel_pruning_fn(dep.handler)]
            layers = list(dict.fromkeys(names[layer] for layer in outward if layer in names))
            found.append((names[group[0].dep.target.module], layers))
    return found


def groups_of(opened: Opened, module: nn.Module, keep: Iterable[str] = ()) -> list[str]:
    return [root for root, _ in groups_with_layers(opened, module, keep)]


# ---- layers that must keep their width
def output_layers(module: nn.Module, example: Outputs, opened: Opened) -> list[nn.Module]:
    """The layers whose channels are the model's outputs: from each output back through the graph to the first layers met."""
    made_by: dict[Any, nn.Module] = {}
    hooks = [
        layer.register_forward_hook(lambda layer, _, out: made_by.__setitem__(out.grad_fn, layer))
        for layer in module.modules()
        if isinstance(layer, LAYERS)
    ]
    try:
        with torch.enable_grad():
            outputs = outputs_of(module(*example), opened.signature.outputs)
    finally:
        for hook in hooks:
            hook.remove()
    found: dict[nn.Module, None] = {}
    waiting, seen = [out.grad_fn for out in outputs], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        if node in made_by:
            found[made_by[node]] = None
        else:
            waiting += [parent for parent, _ in node.next_functions]
    return list(found)


def tied_layers(module: nn.Module) -> list[nn.Module]:
    """Layers that share a weight with another: one would be cut without the other."""
    owners: dict[int, list[nn.Module]] = {}
    for layer in module.modules():
        for parameter in layer.parameters(recurse=False):
            owners.setdefault(id(parameter), []).append(layer)
    return [layer for layers in owners.values() if len(layers) > 1 for layer in layers]


def attention_layers(module: nn.Module) -> list[nn.Module]:
    """Layers inside modules that count heads: what leaves them is reshaped by that count."""
    return [layer for _, owner in attention_modules(module) for layer in owner.modules() if isinstance(layer, LAYERS)]


def attention_modules(module: nn.Module) -> list[tuple[str, nn.Module]]:
    return [
        (name, owner)
        for name, owner in module.named_modules()
        if any(isinstance(vars(owner).get(count), int) for count in HEAD_COUNTS) and any(isinstance(m, LAYERS) for m in owner.modules())
    ]


def _culprit(module: nn.Module) -> str:
    attention = attention_modules(module)
    if recurrent := [name for name, layer in module.named_modules() if isinstance(layer, nn.RNNBase)]:
        return f"the recurrent layer {recurrent[0]!r}"
    return (
        f"the attention module {attention[0][0] or type(attention[0][1]).__name__!r}"
        if attention
        else f"the module {type(module).__name__}"
    )


@torch.no_grad()
def _shapes(module: nn.Module, example: Iterable[Tensor], opened: Opened) -> list[tuple[int, ...]]:
    return [tuple(value.shape) for value in outputs_of(module(*example), opened.signature.outputs)]


# ---- what changed
def count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def widths(module: nn.Module) -> dict[str, int]:
    """Output channels of every layer."""
    return {
        name: int(layer.out_features if isinstance(layer, nn.Linear) else layer.out_channels)
        for name, layer in module.named_modules()
        if isinstance(layer, LAYERS)
    }


def changed_widths(before: dict[str, int], module: nn.Module) -> dict[str, list[int]]:
    """Layer to [channels before, now], where they differ."""
    return {name: [before[name], now] for name, now in widths(module).items() if name in before and before[name] != now}
