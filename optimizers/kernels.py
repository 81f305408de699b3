"""Convolutions as columns and rows, as CP, as depthwise and pointwise ones: how ranks are chosen, what they cost, and the layers themselves."""

from __future__ import annotations

import math
from typing import Final

import torch
from torch import Tensor, nn

from optimizers.splitting import Form, Ranks, conv_sizes, filled
from optimizers.torch_layers import CpConv, DepthwiseConv, SpatialConv, StandIn
from optimizers.tucker import rank_of
from optimizers.vbmf import rank_of as vbmf_rank

SWEEPS: Final = 60
"""Alternating least squares goes on for so many sweeps at most, or until one lowers the relative error by less than the least gain."""
LEAST_GAIN: Final = 1e-6
RIDGE: Final = 1e-9
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


def cp_factors(kernel: Tensor, rank: int, seed: int = 0) -> list[Tensor]:
    """Factors [o, r], [i, r], [y, r] and [x, r] of a kernel [o, i, y, x] by alternating least squares (Harshman 1970; Kolda and Bader 2009).

    Channels are summed over first, by one product each way in a sweep: tensorly's Khatri-Rao product of the other three axes takes gigabytes
    where there are 512 channels on both sides.
    """
    random = torch.Generator().manual_seed(seed)
    out, into, column, row = (torch.rand(size, rank, generator=random, dtype=kernel.dtype) for size in kernel.shape)
    power, before = float(kernel.pow(2).sum()), math.inf
    by_input, by_output = kernel.permute(0, 2, 3, 1).contiguous(), kernel.permute(1, 2, 3, 0).contiguous()
    for _ in range(SWEEPS):
        part = by_input @ into  # [o, y, x, r]
        out = _unit(_solved(torch.einsum("oyxr,yr,xr->or", part, column, row), into, column, row))
        column = _unit(_solved(torch.einsum("oyxr,or,xr->yr", part, out, row), into, out, row))
        row = _unit(_solved(torch.einsum("oyxr,or,yr->xr", part, out, column), into, out, column))
        sums = torch.einsum("iyxr,yr,xr->ir", by_output @ out, column, row)
        into = _solved(sums, out, column, row)
        squared = power + float(_gram(out, into, column, row).sum()) - 2 * float((sums * into).sum())
        error = math.sqrt(max(0.0, squared) / power)
        if before - error < LEAST_GAIN:
            break
        before = error
    return [out, into, column, row]


def _gram(*factors: Tensor) -> Tensor:
    """[r, r]: products of all columns with all, over all axes."""
    return torch.stack([factor.T @ factor for factor in factors]).prod(0)


def _solved(sums: Tensor, *others: Tensor) -> Tensor:
    """The least squares factor of one axis, given the others'; a little ridge, since columns may be alike."""
    gram = _gram(*others)
    ridge = RIDGE * float(gram.diagonal().mean()) * torch.eye(len(gram), dtype=gram.dtype)
    solution: Tensor = torch.linalg.solve(gram + ridge, sums.T).T
    return solution


def _unit(factor: Tensor) -> Tensor:
    lengths: Tensor = factor.norm(dim=0).clamp_min(1e-30)
    return factor / lengths


class Cp(Form):
    """Lebedev et al. 2015 (arXiv:1412.6553): W ≈ Σ_r out_r ∘ in_r ∘ column_r ∘ row_r by alternating least squares."""

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
        factors = cp_factors(layer.weight.detach().double(), rank, self._seed)
        lengths = torch.stack([factor.norm(dim=0).clamp_min(1e-30) for factor in factors])
        even = lengths.prod(0) ** (1 / len(factors))
        return tuple(factor / length * even for factor, length in zip(factors, lengths, strict=True))
