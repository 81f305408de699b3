"""A small vision transformer for scikit-learn's digits: 16 patches of 2×2 pixels in, 10 classes out. Self-contained: the server loads it by path."""

from __future__ import annotations

import torch
from torch import Tensor, nn

TOKENS, PIXELS, CLASSES = 16, 4, 10


class Attention(nn.Module):
    """x [N, L, D] to [N, L, D]."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads, self.scale = heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        n, length, _ = x.shape
        q, k, v = self.qkv(x).reshape(n, length, 3, self.heads, -1).permute(2, 0, 3, 1, 4).unbind(0)
        weights = (q @ k.transpose(-2, -1) * self.scale).softmax(-1)
        mixed: Tensor = self.proj((weights @ v).transpose(1, 2).reshape(n, length, -1))
        return mixed


class Layer(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        changed: Tensor = x + self.down(torch.relu(self.up(self.norm2(x))))
        return changed


class Transformer(nn.Module):
    """patches [N, 16, 4] from 0 to 1; logits [N, 10]."""

    def __init__(self, width: int, heads: int, depth: int) -> None:
        super().__init__()
        self.embed = nn.Linear(PIXELS, width)
        self.place = nn.Parameter(torch.randn(1, TOKENS, width) * 0.5)
        self.layers = nn.ModuleList(Layer(width, heads) for _ in range(depth))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, CLASSES)

    def forward(self, patches: Tensor) -> Tensor:
        x = self.embed(patches) + self.place
        for layer in self.layers:
            x = layer(x)
        logits: Tensor = self.head(self.norm(x).mean(1))
        return logits


def build() -> nn.Module:
    return Transformer(width=192, heads=6, depth=4)


def shallow() -> nn.Module:
    """A student: half as deep, as wide, so that its attention matrices pair with the teacher's."""
    return Transformer(width=192, heads=6, depth=2)
