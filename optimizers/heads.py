"""Attention heads removed for real: rows of the projections, columns of the output layer and the count of heads, checked by running both.

Importance by the gradient of a gate (Michel et al. 2019, arXiv:1905.10650). A cut counts only if the module answers as it does with those
heads silenced, so nothing is assumed about the owner's forward.
"""

from __future__ import annotations

import contextlib
import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor, nn

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.channels import HEAD_COUNTS, attention_modules
from optimizers.head_pruning import HeadPruningConfig
from optimizers.lessons import Lesson
from optimizers.samples import Samples
from optimizers.torch_layers import HeadsAttention
from optimizers.torch_source import Outputs, tensors_of, torch_for
from optimizers.torch_structure import replace_layer
from optimizers.workshop import Workshop

BATCH: Final = 8
SAME: Final = 1e-4
"""How far two runs may be apart, as a share of the largest output."""
REFUSALS: Final = (RuntimeError, TypeError, ValueError, IndexError, AttributeError)


@dataclass(frozen=True)
class Attention:
    """One module that counts heads: its layers by name. `output` is the layer that runs last and mixes the heads."""

    name: str
    heads: int
    size: int
    projections: tuple[str, ...]
    output: str


Silent = dict[str, list[int]]
"""Attention module to the heads that are silenced or gone."""


def build(artifact: Artifact, config: HeadPruningConfig, samples: Samples, budget: Budget) -> Artifact:
    """The artifact with fewer heads."""
    started = time.monotonic()
    with torch_for(budget):
        work = Workshop.open(artifact, config, samples, budget)
        lesson = work.lesson()
        example = tensors_of(work.opened.rows, work.opened.signature)
        module = with_separate_heads(work.opened.module)
        found, left = attentions(module, example, config.keep)
        if not found:
            raise NotApplicable(f"no attention head can be removed: {_told(left, found)}")
        budget.tick(config.method, "weighing heads", 0.1, modules=len(found))
        weights = importances(module, found, lesson, config.rows)
        silent = least_important(weights, config)
        removed: Silent = {}
        for attention in found:
            budget.tick(config.method, f"removing heads of {attention.name}", 0.15)
            smaller = without(module, attention, silent[attention.name], example) if silent[attention.name] else None
            if smaller is not None:
                module, removed[attention.name] = smaller, silent[attention.name]
            elif silent[attention.name]:
                left[attention.name] = "its forward does not bear fewer heads"
        if not removed:
            raise NotApplicable(f"no attention head can be removed: {_told(left, found)}")
        trained = work.fine_tune(module, lesson, span=(0.2, 0.9))
        facts = {
            "ratio": config.ratio, "left": left, "seconds": time.monotonic() - started,
            "heads": {a.name: {"before": a.heads, "removed": removed.get(a.name, []), "importance": weights[a.name]} for a in found},
        }  # fmt: skip
        return work.deliver(module, lesson, facts, trained)


def with_separate_heads(module: nn.Module) -> nn.Module:
    """A copy whose nn.MultiheadAttention are layers that may have fewer heads."""
    twin = copy.deepcopy(module).eval()
    for name, layer in module.named_modules():
        if isinstance(layer, nn.MultiheadAttention) and layer.bias_k is None and not layer.add_zero_attn:
            replace_layer(twin, name, separated(layer))
    return twin


def separated(layer: nn.MultiheadAttention) -> HeadsAttention:
    made = HeadsAttention.empty(
        width=layer.embed_dim, heads=layer.num_heads, head_size=layer.head_dim, width_of_keys=layer.kdim, width_of_values=layer.vdim,
        bias=layer.in_proj_bias is not None, batch_first=layer.batch_first,
    )  # fmt: skip
    parts = (made.query, made.key, made.value)
    whole = layer.in_proj_weight if layer._qkv_same_embed_dim else None
    matrices = whole.chunk(3) if whole is not None else (layer.q_proj_weight, layer.k_proj_weight, layer.v_proj_weight)
    with torch.no_grad():
        for at, (part, matrix) in enumerate(zip(parts, matrices, strict=True)):
            part.weight.copy_(matrix)
            if layer.in_proj_bias is not None:
                part.bias.copy_(layer.in_proj_bias.chunk(3)[at])
        made.output.load_state_dict(layer.out_proj.state_dict())
    return made.train(layer.training)


def attentions(module: nn.Module, example: Outputs, keep: Sequence[str]) -> tuple[list[Attention], dict[str, str]]:
    """Modules whose heads can be told apart, and why the others' cannot."""
    found, left = [], {}
    order = _order_of_linear_layers(module, example)
    for name, owner in attention_modules(module):
        heads = next(vars(owner)[count] for count in HEAD_COUNTS if isinstance(vars(owner).get(count), int))
        linear = [layer for layer in order if layer.startswith(f"{name}." if name else "")]
        if name in keep:
            left[name] = "kept"
        elif heads < 2:
            left[name] = "one head"
        elif (attention := _attention(module, name, heads, linear)) is None:
            left[name] = "its linear layers are not projections to queries, keys and values of equal width, and an output"
        else:
            found.append(attention)
    return found, left


def importances(module: nn.Module, found: list[Attention], lesson: Lesson, rows: int) -> dict[str, list[float]]:
    """I_h = mean over batches of |∂L / ∂ξ_h|, the gates of each layer scaled to length 1."""
    gates = {attention.name: torch.ones(attention.heads, requires_grad=True) for attention in found}
    totals = {attention.name: torch.zeros(attention.heads) for attention in found}
    order = torch.randperm(lesson.rows, generator=torch.Generator().manual_seed(0))[:rows]
    with gated(module.eval(), found, gates):
        for index in torch.split(order, BATCH):
            slopes = torch.autograd.grad(lesson.steepness(module, index), list(gates.values()))
            for total, slope in zip(totals.values(), slopes, strict=True):
                total += slope.abs()
    return {name: (total / total.norm().clamp_min(1e-30)).tolist() for name, total in totals.items()}


def least_important(weights: dict[str, list[float]], config: HeadPruningConfig) -> Silent:
    """`ratio` of all heads, the least important first, while each layer keeps `least`."""
    silent: Silent = {name: [] for name in weights}
    ranked = sorted((weight, name, head) for name, heads in weights.items() for head, weight in enumerate(heads))
    wanted = round(config.ratio * len(ranked))
    for _, name, head in ranked:
        if sum(map(len, silent.values())) < wanted and len(weights[name]) - len(silent[name]) > config.least:
            silent[name].append(head)
    return {name: sorted(heads) for name, heads in silent.items()}


@torch.no_grad()
def without(module: nn.Module, attention: Attention, silent: list[int], example: Outputs) -> nn.Module | None:
    """A copy without the heads `silent`, which answers as `module` with them silenced; None where no way of cutting does."""
    gates = torch.ones(attention.heads)
    gates[silent] = 0
    with gated(module, [attention], {attention.name: gates}):
        expected = _answers(module, example)
    for by_head in (False, True):
        for resized in (False, True):
            twin = copy.deepcopy(module)
            _cut(twin, attention, [h for h in range(attention.heads) if h not in silent], by_head, resized)
            try:
                if _same(_answers(twin, example), expected):
                    return twin
            except REFUSALS:
                continue  # this layout does not even run
    return None


@contextlib.contextmanager
def gated(module: nn.Module, found: list[Attention], gates: dict[str, Tensor]) -> Iterator[None]:
    """Each head's output times its gate, where the output layer takes it in."""

    def gate(attention: Attention) -> Any:
        return lambda _, inputs: (inputs[0] * gates[attention.name].repeat_interleave(attention.size), *inputs[1:])

    handles = [module.get_submodule(attention.output).register_forward_pre_hook(gate(attention)) for attention in found]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _attention(module: nn.Module, name: str, heads: int, linear: list[str]) -> Attention | None:
    """`linear`: its layers in the order in which they run."""
    if len(linear) < 2:
        return None
    sizes = [module.get_submodule(layer) for layer in linear]
    inner, outs = int(sizes[-1].in_features), [int(layer.out_features) for layer in sizes[:-1]]  # type: ignore[arg-type]
    if inner % heads or sum(outs) != 3 * inner or any(out % inner for out in outs):
        return None
    return Attention(name, heads, inner // heads, tuple(linear[:-1]), linear[-1])


def _cut(module: nn.Module, attention: Attention, kept: list[int], by_head: bool, resized: bool) -> None:
    """Leave the heads `kept`. `by_head`: fused projections hold head after head, not queries, keys and values after each other.

    `resized`: whole numbers of the module that equal the inner width are changed with it.
    """
    owner = module.get_submodule(attention.name)
    inner, size = attention.heads * attention.size, attention.size
    for name in attention.projections:
        layer = module.get_submodule(name)
        assert isinstance(layer, nn.Linear)
        fused = layer.out_features // inner
        places = torch.arange(layer.out_features).reshape((attention.heads, fused, size) if by_head else (fused, attention.heads, size))
        _take(layer, (places[kept] if by_head else places[:, kept]).flatten(), 0)
    output = module.get_submodule(attention.output)
    assert isinstance(output, nn.Linear)
    _take(output, torch.arange(inner).reshape(attention.heads, size)[kept].flatten(), 1)
    for attribute, value in list(vars(owner).items()):
        if attribute in HEAD_COUNTS:
            setattr(owner, attribute, len(kept))
        elif resized and isinstance(value, int) and not isinstance(value, bool) and value == inner:
            setattr(owner, attribute, len(kept) * size)


def _take(layer: nn.Linear, places: Tensor, axis: int) -> None:
    layer.weight = nn.Parameter(layer.weight.detach().index_select(axis, places))
    if axis == 0 and layer.bias is not None:
        layer.bias = nn.Parameter(layer.bias.detach()[places])
    layer.out_features, layer.in_features = layer.weight.shape


def _order_of_linear_layers(module: nn.Module, example: Outputs) -> list[str]:
    order: dict[str, None] = {}
    handles = [
        layer.register_forward_hook(lambda *_, name=name: order.setdefault(name))
        for name, layer in module.named_modules()
        if isinstance(layer, nn.Linear)
    ]
    try:
        _answers(module, example)
    finally:
        for handle in handles:
            handle.remove()
    return list(order)


@torch.no_grad()
def _answers(module: nn.Module, example: Outputs) -> list[Tensor]:
    result = module(*example)
    values = list(result.values()) if isinstance(result, dict) else [result] if isinstance(result, Tensor) else list(result)
    return [value for value in values if isinstance(value, Tensor)]


def _same(first: list[Tensor], second: list[Tensor]) -> bool:
    return all(
        a.shape == b.shape and float((a - b).abs().max()) <= SAME * max(float(b.abs().max()), 1e-6)
        for a, b in zip(first, second, strict=True)
    )


def _told(left: dict[str, str], found: list[Attention]) -> str:
    if left:
        return "; ".join(f"{name or 'the module'}: {why}" for name, why in list(left.items())[:8])
    return f"{found[0].name} has {found[0].heads} heads, too few for this ratio" if found else "no module counts heads"
