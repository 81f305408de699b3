"""scikit-learn's digits as sequences of patches, in parts that share no image; the transformer trained on them; the folder that `hone serve` takes."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from optimizers.samples import Samples

MODEL: Final = "digits-transformer"
FACTORIES: Final = Path(__file__).parent / "factories"
FACTORY: Final = "digits_transformer.py:build"
INPUT, OUTPUT = "patches", "logits"
PARTS: Final = {"train": 850, "calibration": 200, "judging": 747}
SEED, BATCH, RATE = 20, 50, 1e-3

_YAML: Final = f"""# A transformer on scikit-learn's digits, written by examples/digits_transformer.
description: Which digit do these patches show?
task: classification
source: {{factory: "{FACTORY}", weights: model.safetensors}}
samples:
  reference: samples/judging.npz
  validation: samples/judging.npz
  calibration: samples/calibration.npz
  train: samples/train.npz
quality: {{metric: accuracy, floor: 0.97}}
mode: observe
capture: {{mode: "off"}}
"""


@dataclass(frozen=True)
class Digits:
    """`patches` float32 [n, 16, 4] from 0 to 1, `labels` int64 [n]."""

    patches: NDArray[np.float32]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, part: slice) -> Digits:
        return Digits(self.patches[part], self.labels[part])

    def inputs(self) -> NDArray[np.float32]:
        return self.patches


def parts() -> dict[str, Digits]:
    """Disjoint parts; of equal images only the first is taken."""
    from sklearn.datasets import load_digits

    digits = load_digits()
    _, first = np.unique(digits.data, axis=0, return_index=True)
    order = np.random.default_rng(SEED).permutation(np.sort(first))
    cuts = np.split(order, np.cumsum(list(PARTS.values()))[:-1])
    return {
        name: Digits(patches(digits.images[index]), digits.target[index].astype(np.int64))
        for name, index in zip(PARTS, cuts, strict=True)
    }  # fmt: skip


def patches(images: NDArray[np.float64]) -> NDArray[np.float32]:
    """[n, 8, 8] from 0 to 16, cut into 2×2: [n, 16, 4] from 0 to 1."""
    cut = (images / 16).astype(np.float32).reshape(-1, 4, 2, 4, 2)
    return np.ascontiguousarray(cut.transpose(0, 1, 3, 2, 4).reshape(-1, 16, 4))


def prepare(folder: Path, epochs: int, say: Callable[[str], None]) -> tuple[Path, Digits]:
    """FOLDER/digits-transformer, trained unless it is there; its ONNX file and the part that judges."""
    model, data = folder / MODEL, parts()
    onnx = model / "1" / "model.onnx"
    if onnx.is_file() and (model / "model.yaml").is_file():
        return onnx, data["judging"]
    for sub in ("1", "samples"):
        (model / sub).mkdir(parents=True, exist_ok=True)
    for name, part in data.items():
        Samples({INPUT: part.patches}, part.labels).save(model / "samples" / f"{name}.npz")
    module = trained(data["train"], epochs, say)
    from safetensors.torch import save_file

    from optimizers.torch_source import Signature, export

    save_file(module.state_dict(), model / "1" / "model.safetensors")
    export(module, Signature((INPUT,), (OUTPUT,), {INPUT: (0,)}), Samples({INPUT: data["judging"][:8].patches}), onnx)
    (model / "model.yaml").write_text(_YAML)
    return onnx, data["judging"]


def trained(data: Digits, epochs: int, say: Callable[[str], None]) -> Any:
    """AdamW, one cycle of the rate, digits moved by a pixel at most and noisy."""
    import torch
    from torch.nn.functional import cross_entropy

    from optimizers.torch_source import make

    torch.manual_seed(SEED)
    module = make(f"{FACTORIES}/{FACTORY}")
    labels = torch.from_numpy(data.labels)
    images = data.patches.reshape(-1, 4, 4, 2, 2).transpose(0, 1, 3, 2, 4).reshape(-1, 8, 8)
    steps = len(data) // BATCH
    optimizer = torch.optim.AdamW(module.parameters(), RATE, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=epochs * steps)
    random = np.random.default_rng(SEED)
    for epoch in range(epochs):
        total = 0.0
        for index in np.split(random.permutation(len(data))[: steps * BATCH], steps):
            moved = np.stack([_moved(image, *random.integers(-1, 2, 2)) for image in images[index]])
            noisy = np.clip(moved + random.normal(0, 0.05, moved.shape), 0, 1) * 16
            loss = cross_entropy(module(torch.from_numpy(patches(noisy))), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += float(loss.detach())
        if epoch % 10 == 9:
            say(f"epoch {epoch + 1}/{epochs}  loss {total / steps:.3f}")
    return module.eval()


def _moved(image: NDArray[np.float32], down: int, right: int) -> NDArray[np.float32]:
    padded = np.pad(image, 1)
    return padded[1 + down : 9 + down, 1 + right : 9 + right]
