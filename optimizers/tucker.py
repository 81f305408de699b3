"""Tucker-2 of convolutions in a PyTorch module (tensorly): kernels as a small core between two 1×1 convolutions.

Kim et al. 2016 (arXiv:1511.06530).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn

from optimizers.splitting import Form, Ranks, conv_sizes, filled
from optimizers.torch_layers import LowRankConv, StandIn
from optimizers.vbmf import rank_of as vbmf_rank


class Tucker(Form):
    """Ranks are (out, in), each from the kernel unfolded along that axis."""

    def full(self, layer: nn.Conv2d) -> Ranks:
        return layer.out_channels, layer.in_channels

    def by_energy(self, layer: nn.Conv2d, energy: float) -> Ranks:
        return tuple(rank_of(unfolding, energy) for unfolding in self._unfoldings(layer))

    def by_vbmf(self, layer: nn.Conv2d) -> Ranks:
        return tuple(vbmf_rank(unfolding.numpy()) for unfolding in self._unfoldings(layer))

    def cost(self, layer: nn.Conv2d, ranks: Ranks) -> float:
        """The first part works before the stride."""
        rank_out, rank_in = ranks
        first = layer.in_channels * rank_in * math.prod(layer.stride)
        return first + rank_in * rank_out * math.prod(layer.kernel_size) + rank_out * layer.out_channels

    def made(self, layer: nn.Conv2d, ranks: Ranks) -> StandIn:
        """Three layers whose product is the best approximation of the kernel with these ranks that alternating least squares finds."""
        import tensorly
        from tensorly.decomposition import partial_tucker

        weight: Any = layer.weight.detach().double().numpy()
        with tensorly.backend_context("numpy"):
            (core, (out, into)), _ = partial_tucker(weight, rank=list(ranks), modes=[0, 1], init="svd")
        factors = {"first": into.T[:, :, None, None], "core": core, "last": out[:, :, None, None]}
        made = LowRankConv.empty(**conv_sizes(layer), rank_out=ranks[0], rank_in=ranks[1])
        return filled(made, layer, {name: torch.from_numpy(value.copy()) for name, value in factors.items()})

    def _unfoldings(self, layer: nn.Conv2d) -> list[Tensor]:
        return [layer.weight.detach().double().transpose(0, axis).flatten(1) for axis in (0, 1)]


def rank_of(unfolding: Tensor, energy: float) -> int:
    """The least r with Σ_{i≤r} σ_i² ≥ energy · Σ σ_i²."""
    power = torch.linalg.svdvals(unfolding.double()).pow(2)
    return min(int((power.cumsum(0) < energy * power.sum()).sum()) + 1, len(power))
