"""Tucker-2 of convolutions in a PyTorch module (tensorly): kernels as a small core between two 1×1 convolutions, then fine-tuned.

Kim et al. 2016 (arXiv:1511.06530). Ranks are the least that keep a share of the energy of each unfolding.
"""

from __future__ import annotations

import copy
import math
import time
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.low_rank import TuckerConfig
from optimizers.samples import Samples
from optimizers.torch_layers import LowRankConv
from optimizers.torch_source import torch_for
from optimizers.torch_structure import replace_layer
from optimizers.workshop import Workshop


def build(artifact: Artifact, config: TuckerConfig, samples: Samples, budget: Budget) -> Artifact:
    """The artifact with convolutions split. Raises NotApplicable where none is better off split."""
    started = time.monotonic()
    with torch_for(budget):
        work = Workshop.open(artifact, config, samples, budget)
        lesson = work.lesson()
        module = copy.deepcopy(work.opened.module)
        split: dict[str, Any] = {}
        left: dict[str, str] = {}
        layers = {name: layer for name, layer in module.named_modules() if isinstance(layer, nn.Conv2d)}
        for at, (name, layer) in enumerate(layers.items()):
            budget.tick(config.method, f"decomposing {name}", 0.1 + 0.2 * at / len(layers))
            if reason := _unfit(name, layer, config):
                left[name] = reason
                continue
            ranks = tuple(rank_of(layer.weight.detach().transpose(0, axis).flatten(1), config.energy) for axis in (0, 1))
            saved = saved_share(layer, *ranks)
            if saved < config.least_saved:
                left[name] = f"ranks {list(ranks)} would save {saved:.0%}"
                continue
            replace_layer(module, name, decomposed(layer, *ranks))
            split[name] = {"ranks": list(ranks), "channels": [layer.out_channels, layer.in_channels], "saved": saved}
        if not split:
            raise NotApplicable(
                f"no convolution is better off split: {'; '.join(f'{n}: {why}' for n, why in list(left.items())[:8]) or 'there is none'}"
            )
        trained = work.fine_tune(module, lesson, span=(0.3, 0.9))
        facts = {"energy": config.energy, "split": split, "left": left, "seconds": time.monotonic() - started}
        return work.deliver(module, lesson, facts, trained)


def _unfit(name: str, layer: nn.Conv2d, config: TuckerConfig) -> str:
    if name in config.exclude:
        return "excluded"
    if layer.groups != 1:
        return "grouped"
    if math.prod(layer.kernel_size) == 1:
        return "1×1"
    return f"padding {layer.padding_mode}" if layer.padding_mode != "zeros" else ""


def rank_of(unfolding: Tensor, energy: float) -> int:
    """The least r with Σ_{i≤r} σ_i² ≥ energy · Σ σ_i²."""
    power = torch.linalg.svdvals(unfolding.double()).pow(2)
    return min(int((power.cumsum(0) < energy * power.sum()).sum()) + 1, len(power))


def saved_share(layer: nn.Conv2d, rank_out: int, rank_in: int) -> float:
    """Share of the layer's multiply-adds that its three parts save, at stride 1 (the first part works before the stride)."""
    window, area = math.prod(layer.kernel_size), math.prod(layer.stride)
    whole = layer.in_channels * layer.out_channels * window
    parts = layer.in_channels * rank_in * area + rank_in * rank_out * window + rank_out * layer.out_channels
    return 1 - parts / whole


def decomposed(layer: nn.Conv2d, rank_out: int, rank_in: int) -> LowRankConv:
    """Three layers whose product is the best approximation of the kernel with these ranks that alternating least squares finds."""
    import tensorly
    from tensorly.decomposition import partial_tucker

    weight = layer.weight.detach().double().numpy()
    with tensorly.backend_context("numpy"):
        (core, (out, into)), _ = partial_tucker(weight, rank=[rank_out, rank_in], modes=[0, 1], init="svd")
    made = LowRankConv.empty(
        channels_in=layer.in_channels, channels_out=layer.out_channels, rank_in=rank_in, rank_out=rank_out, kernel=layer.kernel_size,
        stride=layer.stride, padding=layer.padding, dilation=layer.dilation, bias=layer.bias is not None,
    )  # fmt: skip
    with torch.no_grad():
        made.first.weight.copy_(torch.from_numpy(into.T.copy())[:, :, None, None])
        made.core.weight.copy_(torch.from_numpy(core.copy()))
        made.last.weight.copy_(torch.from_numpy(out.copy())[:, :, None, None])
        if layer.bias is not None and made.last.bias is not None:
            made.last.bias.copy_(layer.bias)
    return made.train(layer.training)
