"""Small PyTorch models for the tests of methods that train: a factory file, its weights and its ONNX file, made where the test says."""

from __future__ import annotations

import atexit
import shutil
import tempfile
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from optimizers.artifact import Artifact, Source
from optimizers.samples import Samples

FACTORIES = '''
import torch
from torch import nn


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)
        self.conv2, self.bn2 = nn.Conv2d(width, width, 3, padding=1, bias=False), nn.BatchNorm2d(width)

    def forward(self, x):
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Cnn(nn.Module):
    """Residual, with a pooling between two stages and the head after a mean: [N, 1, 8, 8] to [N, 4]."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, padding=1)
        self.block1, self.block2 = Block(width), Block(width)
        self.head = nn.Linear(width, 4)

    def forward(self, x):
        x = self.block1(torch.relu(self.stem(x)))
        x = self.block2(nn.functional.max_pool2d(x, 2))
        return self.head(x.mean((2, 3)))


class Attention(nn.Module):
    def __init__(self, how, width=32, heads=4):
        super().__init__()
        self.how, self.heads, self.scale = how, heads, (width // heads) ** -0.5
        self.qkv, self.proj = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x):
        b, n, _ = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, -1).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0) if self.how == "unbind" else (qkv[0], qkv[1], qkv[2])
        if self.how == "sdpa":
            o = nn.functional.scaled_dot_product_attention(q, k, v)
        else:
            o = (q @ k.transpose(-2, -1) * self.scale).softmax(-1) @ v
        return self.proj(o.transpose(1, 2).reshape(b, n, -1))


class Encoder(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.attention = Attention(how)
        self.norm = nn.LayerNorm(32)
        self.up, self.down = nn.Linear(32, 64), nn.Linear(64, 32)
        self.head = nn.Linear(32, 3)

    def forward(self, x):
        x = self.norm(x + self.attention(x))
        return self.head((x + self.down(torch.relu(self.up(x)))).mean(1))


class Transformer(nn.Module):
    """Two layers of PyTorch's own encoder: [N, 5, 32] to [N, 3]."""

    def __init__(self, depth=2):
        super().__init__()
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder, self.head = nn.TransformerEncoder(layer, depth, enable_nested_tensor=False), nn.Linear(32, 3)

    def forward(self, x):
        return self.head(self.encoder(x).mean(1))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.emb, self.head = nn.Embedding(50, 8), nn.Linear(8, 50, bias=False)
        self.head.weight = self.emb.weight

    def forward(self, ids):
        return self.head(self.emb(ids).mean(1))


def cnn():
    return Cnn()


def small():
    return Cnn(8)


def mlp():
    return nn.Sequential(nn.Linear(16, 64), nn.ReLU(), nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 4))


def depthwise():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.BatchNorm2d(16), nn.ReLU(),
        nn.Conv2d(16, 32, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )


def grouped():
    """Channels in four groups: 64 of them, then 16 that become 32, so that groups differ in width on both sides."""
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1, groups=4), nn.ReLU(), nn.Conv2d(64, 16, 1), nn.ReLU(),
        nn.Conv2d(16, 32, 3, padding=1, groups=4), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )


def finely_grouped():
    return nn.Sequential(
        nn.Conv2d(1, 64, 3, padding=1), nn.ReLU(), nn.Conv2d(64, 64, 3, padding=1, groups=16), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(64, 4),
    )


class Last(nn.Module):
    def forward(self, given):
        return given[0][:, -1]


def recurrent(kind):
    return nn.Sequential(nn.Linear(8, 16), nn.ReLU(), kind(16, 16, batch_first=True), Last(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 4))


def lstm():
    return recurrent(nn.LSTM)


def gru():
    return recurrent(nn.GRU)


def convolutions(first, second, *between):
    return nn.Sequential(first, *between, second, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(second.out_channels, 4))


def transposed():
    return convolutions(nn.ConvTranspose2d(1, 32, 3), nn.ConvTranspose2d(32, 16, 3), nn.ReLU())


def transposed_square():
    return convolutions(nn.Conv2d(1, 32, 3), nn.ConvTranspose2d(32, 32, 3), nn.ReLU())


def sigmoid():
    return convolutions(nn.Conv2d(1, 32, 3), nn.Conv2d(32, 16, 1), nn.BatchNorm2d(32), nn.Sigmoid())


def partly_grouped():
    return nn.Sequential(
        nn.Conv2d(1, 16, 3), nn.ReLU(), nn.Conv2d(16, 32, 3, groups=4), nn.ReLU(), nn.Conv2d(32, 24, 1), nn.ReLU(), nn.Conv2d(24, 32, 1), nn.ReLU(),
        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 4),
    )


class ByKeyword(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.norm, self.second = nn.Linear(16, 64), nn.BatchNorm1d(64), nn.Linear(64, 4)

    def forward(self, x):
        return self.second(input=torch.relu(self.norm(input=self.first(input=x))))


def by_keyword():
    return ByKeyword()


def frozen():
    """Weights that no training is to change, as a published backbone's come."""
    return mlp().requires_grad_(False)


def unbind():
    return Encoder("unbind")


def index():
    return Encoder("index")


def sdpa():
    return Encoder("sdpa")


def transformer():
    return Transformer()


def shallow():
    return Transformer(1)


def tied():
    return Tied()


def bare_linear():
    return nn.Sequential(nn.Linear(16, 4))
'''
SHAPES: dict[str, tuple[int, ...]] = {
    "cnn": (1, 8, 8), "small": (1, 8, 8), "depthwise": (1, 8, 8), "grouped": (1, 8, 8), "transposed": (1, 8, 8), "transposed_square": (1, 8, 8), "sigmoid": (1, 8, 8), "lstm": (5, 8), "gru": (5, 8),
    "frozen": (16,), "by_keyword": (16,), "partly_grouped": (1, 8, 8), "finely_grouped": (1, 8, 8), "mlp": (16,), "bare_linear": (16,),
    "unbind": (5, 32), "index": (5, 32), "sdpa": (5, 32),
    "transformer": (5, 32), "shallow": (5, 32),
}  # fmt: skip


def factory(folder: Path, name: str) -> str:
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "factories.py"
    if not file.exists():
        file.write_text(FACTORIES)
    return f"{file}:{name}"


def artifact(folder: Path, name: str, seed: int = 0, steps: int = 60) -> Artifact:
    """The model called `name`, trained a little on `rows`, with its source and its ONNX file; made once in a process, and copied into `folder`."""
    made = _made(name, seed, steps)
    shutil.copytree(made, folder, dirs_exist_ok=True, ignore=shutil.ignore_patterns("factories.py"))
    return Artifact(folder / name / "model.onnx", "classification", source=Source(factory(folder, name), folder / f"{name}.safetensors"))


@cache
def _made(name: str, seed: int, steps: int) -> Path:
    folder = Path(tempfile.mkdtemp(prefix="hone-test-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    _make(folder, name, seed, steps)
    return folder


def _make(folder: Path, name: str, seed: int, steps: int) -> None:
    import torch
    from safetensors.torch import save_model

    from optimizers.torch_source import Signature, export, make

    torch.manual_seed(seed)
    torch.set_num_threads(1)
    module = make(factory(folder, name))
    data = rows(name, 64)
    inputs, labels = torch.from_numpy(data.inputs["x"]), torch.from_numpy(data.labels)
    optimizer = torch.optim.AdamW(module.parameters(), 5e-3)
    for _ in range(steps):
        loss = torch.nn.functional.cross_entropy(module(inputs), labels)
        if not loss.requires_grad:
            break
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    save_model(module.eval(), str(folder / f"{name}.safetensors"))
    export(module, Signature(("x",), ("y",), {"x": (0,)}), data, folder / name / "model.onnx")


def rows(name: str, count: int = 64, seed: int = 1, labels: bool = True) -> Samples:
    """Noise around one of a few patterns; which one is the label."""
    random = np.random.default_rng(seed)
    classes = 3 if SHAPES[name] == (5, 32) else 4
    shape = SHAPES[name]
    patterns = np.random.default_rng(7).standard_normal((classes, *shape))
    truth = random.integers(classes, size=count)
    values: Any = (patterns[truth] + 0.7 * random.standard_normal((count, *shape))).astype(np.float32)
    return Samples({"x": values}, truth.astype(np.int64) if labels else None)
