"""Linear layers of a PyTorch module split in two by truncated SVD, beside convolutions that another form splits."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from optimizers.splitting import Form, Ranks, filled
from optimizers.torch_layers import LowRankLinear, StandIn
from optimizers.tucker import rank_of
from optimizers.vbmf import rank_of as vbmf_rank


class Matrix(Form):
    """A linear layer W ≈ (U_r √Σ_r) (√Σ_r V_rᵀ), which is what Tucker is to a kernel of one place (Eckart and Young 1936)."""

    def unfit(self, layer: Any) -> str:
        return "all zero" if not bool(layer.weight.any()) else ""

    def full(self, layer: Any) -> Ranks:
        return (min(layer.weight.shape),)

    def by_energy(self, layer: Any, energy: float) -> Ranks:
        return (rank_of(layer.weight.detach(), energy),)

    def by_vbmf(self, layer: Any) -> Ranks:
        return (vbmf_rank(layer.weight.detach().double().numpy()),)

    def cost(self, layer: Any, ranks: Ranks) -> float:
        return float(ranks[0] * sum(layer.weight.shape))

    def made(self, layer: Any, ranks: Ranks) -> StandIn:
        u, s, v = torch.linalg.svd(layer.weight.detach().double(), full_matrices=False)
        root = s[: ranks[0]].sqrt()
        sizes = {"width_in": layer.in_features, "width_out": layer.out_features, "bias": layer.bias is not None, "rank": ranks[0]}
        parts = {"first": root[:, None] * v[: ranks[0]], "last": u[:, : ranks[0]] * root}
        return filled(LowRankLinear.empty(**sizes), layer, parts)


class Either(Form):
    """`convolutions` for those, Matrix for linear layers."""

    def __init__(self, convolutions: Form) -> None:
        self._convolutions, self._matrix = convolutions, Matrix()

    def _of(self, layer: nn.Module) -> Form:
        return self._matrix if isinstance(layer, nn.Linear) else self._convolutions

    def unfit(self, layer: Any) -> str:
        return self._of(layer).unfit(layer)

    def full(self, layer: Any) -> Ranks:
        return self._of(layer).full(layer)

    def by_energy(self, layer: Any, energy: float) -> Ranks:
        return self._of(layer).by_energy(layer, energy)

    def by_vbmf(self, layer: Any) -> Ranks:
        return self._of(layer).by_vbmf(layer)

    def cost(self, layer: Any, ranks: Ranks) -> float:
        return self._of(layer).cost(layer, ranks)

    def made(self, layer: Any, ranks: Ranks) -> StandIn:
        return self._of(layer).made(layer, ranks)
