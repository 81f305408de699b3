"""Layers that stand in for one layer: a cheaper form of it, or nothing. Each says how to be made again, empty, from sizes alone."""

from __future__ import annotations

import math
from typing import Any, ClassVar, Final, Self

import torch
from torch import Tensor, nn

Pair = tuple[int, int]


class StandIn(nn.Module):
    """Base of all: `sizes` is what the weights file keeps, as JSON, so that the same layer can be made again."""

    kind: ClassVar[str] = ""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self._how = sizes

    @classmethod
    def empty(cls, **sizes: Any) -> Self:
        return cls({name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()})

    def described(self) -> dict[str, Any]:
        return {"kind": self.kind, **self._how}


class LowRankConv(StandIn):
    """Tucker-2 of a convolution: 1×1 to `rank_in` channels, k×k to `rank_out`, 1×1 to all outputs (Kim et al. 2016, arXiv:1511.06530)."""

    kind: ClassVar[str] = "tucker2-conv"

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__(sizes)
        first, core, last = int(sizes["rank_in"]), int(sizes["rank_out"]), int(sizes["channels_out"])
        self.first = nn.Conv2d(int(sizes["channels_in"]), first, 1, bias=False)
        self.core = nn.Conv2d(first, core, sizes["kernel"], sizes["stride"], sizes["padding"], sizes["dilation"], bias=False)
        self.last = nn.Conv2d(core, last, 1, bias=bool(sizes["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.core(self.first(x)))
        return result


class SpatialConv(StandIn):
    """A k×k convolution as k×1 to `rank` channels and 1×k to all outputs (Jaderberg et al. 2014, arXiv:1405.3866)."""

    kind: ClassVar[str] = "spatial-conv"

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__(sizes)
        rank = int(sizes["rank"])
        (ky, kx), (sy, sx), (py, px), (dy, dx) = (sizes[name] for name in ("kernel", "stride", "padding", "dilation"))
        self.vertical = nn.Conv2d(int(sizes["channels_in"]), rank, (ky, 1), (sy, 1), (py, 0), (dy, 1), bias=False)
        self.horizontal = nn.Conv2d(rank, int(sizes["channels_out"]), (1, kx), (1, sx), (0, px), (1, dx), bias=bool(sizes["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.horizontal(self.vertical(x))
        return result


class CpConv(StandIn):
    """CP of a convolution: 1×1 to `rank` channels, k×1 and 1×k of each channel alone, 1×1 to all outputs (Lebedev et al. 2015, arXiv:1412.6553)."""

    kind: ClassVar[str] = "cp-conv"

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__(sizes)
        rank = int(sizes["rank"])
        (ky, kx), (sy, sx), (py, px), (dy, dx) = (sizes[name] for name in ("kernel", "stride", "padding", "dilation"))
        self.first = nn.Conv2d(int(sizes["channels_in"]), rank, 1, bias=False)
        self.vertical = nn.Conv2d(rank, rank, (ky, 1), (sy, 1), (py, 0), (dy, 1), rank, bias=False)
        self.horizontal = nn.Conv2d(rank, rank, (1, kx), (1, sx), (0, px), (1, dx), rank, bias=False)
        self.last = nn.Conv2d(rank, int(sizes["channels_out"]), 1, bias=bool(sizes["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.horizontal(self.vertical(self.first(x))))
        return result


class DepthwiseConv(StandIn):
    """`terms` k×k filters for each channel alone, then 1×1 over all of them: Σ depthwise + pointwise (Guo et al. 2018, arXiv:1808.05517)."""

    kind: ClassVar[str] = "depthwise-conv"

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__(sizes)
        into, wide = int(sizes["channels_in"]), int(sizes["channels_in"]) * int(sizes["terms"])
        self.depthwise = nn.Conv2d(into, wide, sizes["kernel"], sizes["stride"], sizes["padding"], sizes["dilation"], into, bias=False)
        self.pointwise = nn.Conv2d(wide, int(sizes["channels_out"]), 1, bias=bool(sizes["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.pointwise(self.depthwise(x))
        return result


class LowRankLinear(StandIn):
    """A linear layer as two, to `rank` numbers and on to all outputs (truncated SVD)."""

    kind: ClassVar[str] = "low-rank-linear"

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__(sizes)
        self.first = nn.Linear(int(sizes["width_in"]), int(sizes["rank"]), bias=False)
        self.last = nn.Linear(int(sizes["rank"]), int(sizes["width_out"]), bias=bool(sizes["bias"]))

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.first(x))
        return result


class Skip(StandIn):
    """Nothing in the place of a residual block: its first input comes out."""

    kind: ClassVar[str] = "skip"

    def forward(self, x: Tensor, *_: Any, **__: Any) -> Tensor:
        return x


class HeadsAttention(StandIn):
    """nn.MultiheadAttention whose heads need not fill its width, so that some can be removed. Called as that is.

    The attributes below `in_proj_bias` are those that nn.TransformerEncoder reads; they keep it off the fused path, which knows no fewer heads.
    """

    kind: ClassVar[str] = "multi-head-attention"
    in_proj_bias: ClassVar[None] = None
    _qkv_same_embed_dim: ClassVar[bool] = False

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__(sizes)
        self.heads, self.batch_first = int(sizes["heads"]), bool(sizes["batch_first"])
        inner, width, bias = int(sizes["heads"]) * int(sizes["head_size"]), int(sizes["width"]), bool(sizes["bias"])
        self.query = nn.Linear(width, inner, bias)
        self.key = nn.Linear(int(sizes["width_of_keys"]), inner, bias)
        self.value = nn.Linear(int(sizes["width_of_values"]), inner, bias)
        self.output = nn.Linear(inner, width, bias)

    @property
    def num_heads(self) -> int:
        return self.heads

    def forward(
        self, query: Tensor, key: Tensor, value: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = True,
        attn_mask: Tensor | None = None, average_attn_weights: bool = True, is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:  # fmt: skip
        if not self.batch_first:
            query, key, value = (x.transpose(0, 1) for x in (query, key, value))
        q, k, v = self._heads(self.query(query)), self._heads(self.key(key)), self._heads(self.value(value))
        scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])
        if attn_mask is not None:
            scores = scores + _additive(
                attn_mask.reshape(-1, self.heads, *attn_mask.shape[1:]) if attn_mask.ndim == 3 else attn_mask, scores
            )
        if key_padding_mask is not None:
            scores = scores + _additive(key_padding_mask[:, None, None, :], scores)
        weights = scores.softmax(-1)
        result: Tensor = self.output((weights @ v).transpose(1, 2).flatten(2))
        result = result if self.batch_first else result.transpose(0, 1)
        return result, (weights.mean(1) if average_attn_weights else weights) if need_weights else None

    def _heads(self, x: Tensor) -> Tensor:
        return x.reshape(x.shape[0], x.shape[1], self.heads, -1).transpose(1, 2)


def _additive(mask: Tensor, scores: Tensor) -> Tensor:
    """A mask as something to add: true means that a place is not looked at."""
    return torch.zeros_like(mask, dtype=scores.dtype).masked_fill(mask, -math.inf) if mask.dtype == torch.bool else mask


REPLACED_BY: Final = {kind.kind: kind for kind in (LowRankConv, SpatialConv, CpConv, DepthwiseConv, LowRankLinear, Skip, HeadsAttention)}
