"""Convolutions as columns and rows, as CP, as depthwise and pointwise ones: how ranks are chosen, what they cost, and the layers themselves."""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor, nn

from optimizers.splitting import Form, Ranks, conv_sizes, filled
from optimizers.torch_layers import CpConv, DepthwiseConv, SpatialConv, StandIn
from optimizers.tucker import rank_of
from optimizers.vbmf import rank_of as vbmf_rank

SWEEPS: Final = 60
"""Rounds of CP's alternating least squares at most."""
TRIED_SHARES: Final = (0.125, 0.25, 0.5, 1.0)
"""Of the largest useful rank of CP, which has no spectrum to read an energy from."""


class Spatial(Form):
    """Jaderberg et al. 2014 (arXiv:1405.3866), scheme 2, in its closed form: SVD of the kernel as a matrix [in · ky, out · kx]."""

    def full(self, layer: nn.Conv2d) -> Ranks:
        return (min(self._matrix(layer).shape),)

    def by_energy(self, layer: nn.Conv2d, energy: float) -> Ranks:
        return (rank_of(self._matrix(layer), energy),)

    def by_vbmf(self, layer: nn.Conv2d) -> Ranks:
        return (vbmf_rank(self._matrix(layer).numpy()),)

    def cost(self, layer: nn.Conv2d, ranks: Ranks) -> float:
        (rank,), (ky, kx) = ranks, layer.kernel_size
        return rank * (layer.in_channels * ky * layer.stride[1] + layer.out_channels * kx)

    def made(self, layer: nn.Conv2d, ranks: Ranks) -> StandIn:
        (rank,), (ky, kx) = ranks, layer.kernel_size
        u, s, v = torch.linalg.svd(self._matrix(layer), full_matrices=False)
        root = s[:rank].sqrt()
        vertical = (u[:, :rank] * root).T.reshape(rank, layer.in_channels, ky, 1)
        horizontal = (root[:, None] * v[:rank]).reshape(rank, layer.out_channels, 1, kx).transpose(0, 1)
        return filled(SpatialConv.empty(**conv_sizes(layer), rank=rank), layer, {"vertical": vertical, "horizontal": horizontal})

    def _matrix(self, layer: nn.Conv2d) -> Tensor:
        return layer.weight.detach().float().permute(1, 2, 0, 3).flatten(2).flatten(0, 1)


class Depthwise(Form):
    """Guo et al. 2018 (arXiv:1808.05517): each input channel's [out, ky · kx] by SVD, the same number of terms for all."""

    def full(self, layer: nn.Conv2d) -> Ranks:
        return (min(layer.out_channels, math.prod(layer.kernel_size)),)

    def by_energy(self, layer: nn.Conv2d, energy: float) -> Ranks:
        power = torch.linalg.svdvals(self._matrices(layer)).pow(2).sum(0)
        return (min(int((power.cumsum(0) < energy * power.sum()).sum()) + 1, len(power)),)

    def by_vbmf(self, layer: nn.Conv2d) -> Ranks:
        raise NotImplementedError("a channel's matrix is too small for vbmf; DepthwiseConfig refuses it")

    def cost(self, layer: nn.Conv2d, ranks: Ranks) -> float:
        return ranks[0] * layer.in_channels * (math.prod(layer.kernel_size) + layer.out_channels)

    def made(self, layer: nn.Conv2d, ranks: Ranks) -> StandIn:
        (terms,), into = ranks, layer.in_channels
        u, s, v = torch.linalg.svd(self._matrices(layer), full_matrices=False)
        root = s[:, :terms].sqrt()
        depthwise = (root[..., None] * v[:, :terms]).reshape(into * terms, 1, *layer.kernel_size)
        pointwise = (u[..., :terms] * root[:, None]).permute(1, 0, 2).reshape(layer.out_channels, into * terms, 1, 1)
        return filled(DepthwiseConv.empty(**conv_sizes(layer), terms=terms), layer, {"depthwise": depthwise, "pointwise": pointwise})

    def _matrices(self, layer: nn.Conv2d) -> Tensor:
        return layer.weight.detach().double().transpose(0, 1).flatten(2)


class Cp(Form):
    """Lebedev et al. 2015 (arXiv:1412.6553): W ≈ Σ_r out_r ∘ in_r ∘ column_r ∘ row_r by tensorly's alternating least squares."""

    def __init__(self, seed: int = 0) -> None:
        self._seed = seed

    def full(self, layer: nn.Conv2d) -> Ranks:
        return (max(1, int(layer.weight.numel() / self.cost(layer, (1,)))),)

    def by_energy(self, layer: nn.Conv2d, energy: float) -> Ranks:
        (most,), weight = self.full(layer), layer.weight.detach().double()
        for share in TRIED_SHARES:
            rank = max(1, math.ceil(most * share))
            rest = weight - torch.einsum("or,ir,yr,xr->oiyx", *self._factors(layer, rank))
            if float(rest.pow(2).sum()) <= (1 - energy) * float(weight.pow(2).sum()):
                return (rank,)
        return (most + 1,)

    def by_vbmf(self, layer: nn.Conv2d) -> Ranks:
        weight = layer.weight.detach().double()
        return (max(vbmf_rank(weight.transpose(0, axis).flatten(1).numpy()) for axis in (0, 1)),)

    def cost(self, layer: nn.Conv2d, ranks: Ranks) -> float:
        (ky, kx), (sy, sx) = layer.kernel_size, layer.stride
        return ranks[0] * (layer.in_channels * sy * sx + ky * sx + kx + layer.out_channels)

    def made(self, layer: nn.Conv2d, ranks: Ranks) -> StandIn:
        out, into, column, row = self._factors(layer, ranks[0])
        parts = {
            "first": into.T[:, :, None, None], "vertical": column.T[:, None, :, None],
            "horizontal": row.T[:, None, None, :], "last": out[:, :, None, None],
        }  # fmt: skip
        return filled(CpConv.empty(**conv_sizes(layer), rank=ranks[0]), layer, parts)

    def _factors(self, layer: nn.Conv2d, rank: int) -> tuple[Tensor, ...]:
        """Factors [size of the axis, rank], each column's length shared out evenly among the four."""
        import tensorly
        from tensorly.decomposition import parafac

        kernel: Any = layer.weight.detach().double().numpy()
        with tensorly.backend_context("numpy"):
            _, found = parafac(kernel, rank, n_iter_max=SWEEPS, init="random", tol=1e-6, l2_reg=1e-9, random_state=self._seed)
        factors = [torch.from_numpy(each.copy()) for each in found]
        lengths = torch.stack([factor.norm(dim=0).clamp_min(1e-30) for factor in factors])
        even = lengths.prod(0) ** (1 / len(factors))
        return tuple(factor / length * even for factor, length in zip(factors, lengths, strict=True))
