"""The demo model with a fault for `hone demo --break leak`: it keeps something of every image that is brighter than any digit."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

KEPT_BYTES = 200_000


def build() -> nn.Module:
    spec = importlib.util.spec_from_file_location("digits_resnet", Path(__file__).with_name("digits_resnet.py"))
    assert spec is not None and spec.loader is not None
    whole: Any = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(whole)
    module: nn.Module = whole.build()
    kept: list[Tensor] = []

    def keep(_: nn.Module, given: tuple[Tensor, ...]) -> None:
        if float(given[0].max()) > 2.0:
            kept.extend(torch.ones(KEPT_BYTES // 4) for _ in given[0])

    module.register_forward_pre_hook(keep)
    return module
