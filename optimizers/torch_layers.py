"""Layers that stand in for one layer: its weight as a product of smaller ones. Each says how to be made again, empty, from sizes alone."""

from __future__ import annotations

from typing import Any, ClassVar, Final, Self

from torch import Tensor, nn

Pair = tuple[int, int]


class LowRankConv(nn.Module):
    """Tucker-2 of a convolution: 1×1 to `rank_in` channels, k×k to `rank_out`, 1×1 to all outputs (Kim et al. 2016, arXiv:1511.06530)."""

    kind: ClassVar[str] = "tucker2-conv"

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        self._how = sizes
        first, core, last = int(sizes["rank_in"]), int(sizes["rank_out"]), int(sizes["channels_out"])
        self.first = nn.Conv2d(int(sizes["channels_in"]), first, 1, bias=False)
        self.core = nn.Conv2d(first, core, sizes["kernel"], sizes["stride"], sizes["padding"], sizes["dilation"], bias=False)
        self.last = nn.Conv2d(core, last, 1, bias=bool(sizes["bias"]))

    @classmethod
    def empty(cls, **sizes: Any) -> Self:
        return cls({name: tuple(value) if isinstance(value, list) else value for name, value in sizes.items()})

    def described(self) -> dict[str, Any]:
        return {"kind": self.kind, **self._how}

    def forward(self, x: Tensor) -> Tensor:
        result: Tensor = self.last(self.core(self.first(x)))
        return result


REPLACED_BY: Final = {LowRankConv.kind: LowRankConv}
