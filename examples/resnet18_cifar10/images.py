"""CIFAR-10 (Krizhevsky 2009) from disk, in any of three forms, and as the network takes it. It knows nothing of models.

A folder holds one of: `data_batch_1` … `test_batch` (the data set's own form, perhaps in `cifar-10-batches-py`), `train/LABEL/*.png` and
`test/LABEL/*.png`, or `train.npz` and `test.npz` with JPEG files (`jpeg`: all bytes, `offsets`: n + 1 places, `labels`).
"""

from __future__ import annotations

import io
import pickle
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from PIL import Image

LABELS: Final = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
MEAN: Final = (0.4914, 0.4822, 0.4465)
STD: Final = (0.2470, 0.2435, 0.2616)
SIDE: Final = 32
PARTS: Final = ("train", "test")
PICTURES: Final = frozenset({".png", ".jpg", ".jpeg"})
BATCHES: Final = {"train": tuple(f"data_batch_{i}" for i in range(1, 6)), "test": ("test_batch",)}
SEED: Final = 20
HOW_TO_GET: Final = """CIFAR-10 is not part of this repository (170 MB). Get it from its authors and name the folder:

  curl -O https://www.cs.toronto.edu/~kriz/cifar-10-python.tar.gz && tar xzf cifar-10-python.tar.gz
  python -m examples.resnet18_cifar10 --data cifar-10-batches-py

A folder of pictures does too: train/LABEL/*.png and test/LABEL/*.png, 32×32, with the labels """ + ", ".join(LABELS)


class NoImages(Exception):
    """The folder holds no CIFAR-10, or a damaged one; the text says what was looked for."""


@dataclass(frozen=True)
class Images:
    """`pixels` uint8 [n, 32, 32, 3] RGB; `labels` int64 [n], places in LABELS."""

    pixels: NDArray[np.uint8]
    labels: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: slice) -> Images:
        return Images(self.pixels[index], self.labels[index])

    def inputs(self) -> NDArray[np.float32]:
        """float32 [n, 3, 32, 32], scaled to 0–1, minus MEAN, divided by STD."""
        scaled = (self.pixels / np.float32(255) - np.asarray(MEAN, np.float32)) / np.asarray(STD, np.float32)
        return np.ascontiguousarray(scaled.transpose(0, 3, 1, 2), np.float32)


def load(folder: Path, part: str, most: int | None = None) -> Images:
    """`part` (train or test) of the data set, the first `most` images. Raises NoImages."""
    for root in (folder, folder / "cifar-10-batches-py"):
        if (root / BATCHES[part][0]).is_file():
            return _from_batches([root / name for name in BATCHES[part]])[:most]
    if (folder / f"{part}.npz").is_file():
        return _from_jpegs(folder / f"{part}.npz", most)
    if (folder / part).is_dir():
        return _from_pictures(folder / part, most)
    looked_for = f"{BATCHES[part][0]}, cifar-10-batches-py/{BATCHES[part][0]}, {part}.npz and {part}/LABEL/*.png"
    raise NoImages(f"{folder} holds no CIFAR-10: looked for {looked_for}\n\n{HOW_TO_GET}")


def _from_batches(paths: list[Path]) -> Images:
    pixels, labels = [], []
    for path in paths:
        try:
            with path.open("rb") as file:
                batch = _Unpickler(file, encoding="bytes").load()
            pixels.append(np.asarray(batch[b"data"], np.uint8).reshape(-1, 3, SIDE, SIDE))
            labels.append(np.asarray(batch[b"labels"], np.int64))
        except (OSError, pickle.UnpicklingError, EOFError, KeyError, TypeError, ValueError) as error:
            raise NoImages(f"{path} is no batch of CIFAR-10, or is damaged: {error}; get it again") from None
    return Images(np.ascontiguousarray(np.concatenate(pixels).transpose(0, 2, 3, 1)), np.concatenate(labels))


class _Unpickler(pickle.Unpickler):
    """Arrays and plain values only: a pickle may otherwise call anything."""

    def find_class(self, module: str, name: str) -> Any:
        if module.split(".")[0] == "numpy" and name in {"_reconstruct", "ndarray", "dtype"}:
            return super().find_class(module.replace("numpy.core", "numpy._core"), name)
        raise pickle.UnpicklingError(f"it wants {module}.{name}, which no batch needs")


def _from_jpegs(path: Path, most: int | None) -> Images:
    try:
        with np.load(path, allow_pickle=False) as file:
            data, offsets, labels = file["jpeg"].tobytes(), file["offsets"], file["labels"].astype(np.int64)[:most]
        pixels = [_pixels(io.BytesIO(data[offsets[i] : offsets[i + 1]])) for i in range(len(labels))]
    except (OSError, ValueError, KeyError, IndexError) as error:
        raise NoImages(f"{path} does not hold JPEG files with offsets and labels: {error}") from None
    return Images(np.stack(pixels), labels)


def _from_pictures(folder: Path, most: int | None) -> Images:
    """In an order of their own by SEED, so that the first ones are of all classes."""
    found = [(path, LABELS.index(label)) for label in LABELS for path in sorted((folder / label).glob("*")) if path.suffix in PICTURES]
    if not found:
        raise NoImages(f"{folder} holds no pictures: expected {folder / LABELS[0]}/*.png and so on for {', '.join(LABELS)}")
    chosen = [found[i] for i in np.random.default_rng(SEED).permutation(len(found))[:most]]
    try:
        pixels = np.stack([_pixels(path) for path, _ in chosen])
    except (OSError, ValueError) as error:
        raise NoImages(f"{folder}: {error}") from None
    return Images(pixels, np.array([label for _, label in chosen], np.int64))


def _pixels(source: Path | io.BytesIO) -> NDArray[np.uint8]:
    with Image.open(source) as picture:
        pixels = np.asarray(picture.convert("RGB"))
    if pixels.shape != (SIDE, SIDE, 3):
        raise ValueError(f"a picture is {pixels.shape[1]}×{pixels.shape[0]}; they must be {SIDE}×{SIDE}")
    return pixels
