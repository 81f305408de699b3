"""The model as `hone serve` takes it: ONNX file, weights, model.yaml and samples in parts that share no image. Needs torch to export.

What judges (reference, validation) are test images, which no method learns from or is calibrated on: the training images are known to the
network by heart, so they would tell little.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path
from typing import Any, Final

from examples.resnet18_cifar10.images import LABELS, MEAN, SIDE, STD, Images
from optimizers.samples import Samples

MODEL: Final = "resnet18"
FACTORIES: Final = Path(__file__).parent / "factories"
FACTORY: Final = "cifar_resnet18.py:build"
INPUT, OUTPUT = "image", "logits"
CALIBRATION, REFERENCE, VALIDATION = 512, 500, 1000

_YAML: Final = f"""# ResNet-18 on CIFAR-10, written by examples/resnet18_cifar10.
description: What is on this picture, one of ten kinds of things?
task: classification
preprocess:
  image: {{size: {SIDE}, divide_by: 255, mean: {list(MEAN)}, std: {list(STD)}}}
postprocess:
  labels: {json.dumps(list(LABELS))}
  top_k: 3
source: {{factory: "{FACTORY}", weights: model.safetensors}}
samples:
  reference: samples/reference.npz
  validation: samples/validation.npz
  calibration: samples/calibration.npz
  train: samples/train.npz
quality: {{metric: accuracy, floor: 0.98}}
mode: observe
capture: {{mode: "off"}}
"""


def prepare(folder: Path, checkpoint: Path, train: Images, test: Images, rows: int) -> Path:
    """Write FOLDER/resnet18 unless the same inputs wrote it already; the path of its ONNX file. `rows`: how many images may train."""
    model = folder / MODEL
    stamp, made_of = model / ".made-of", _digest(checkpoint, train, test, rows)
    onnx = model / "1" / "model.onnx"
    if stamp.is_file() and stamp.read_text() == made_of:
        return onnx
    for sub in ("1", "samples"):
        (model / sub).mkdir(parents=True, exist_ok=True)
    for name, part in parts(train, test, rows).items():
        save_samples(model / "samples" / f"{name}.npz", part)
    weights = model / "1" / "model.safetensors"
    shutil.copyfile(checkpoint, weights)
    export(weights, onnx, test[:8])
    (model / "model.yaml").write_text(_YAML)
    stamp.write_text(made_of)
    return onnx


def parts(train: Images, test: Images, rows: int) -> dict[str, Images]:
    """Disjoint parts: calibration and training from the training images, the two that judge from the test images."""
    return {
        "calibration": train[:CALIBRATION],
        "train": train[CALIBRATION : CALIBRATION + rows],
        "reference": test[:REFERENCE],
        "validation": test[REFERENCE : REFERENCE + VALIDATION],
    }


def save_samples(path: Path, images: Images) -> None:
    Samples({INPUT: images.inputs()}, images.labels).save(path)


def export(weights: Path, onnx: Path, images: Images) -> None:
    """Batch normalization folded, batch axis free; run against the module at several batch sizes. Raises NotApplicable where they differ."""
    from optimizers.torch_source import Signature
    from optimizers.torch_source import export as exported

    exported(module(weights), Signature((INPUT,), (OUTPUT,), {INPUT: (0,)}), Samples({INPUT: images.inputs()}), onnx)


def module(weights: Path) -> Any:
    """The PyTorch form, in eval mode."""
    from optimizers.artifact import Source
    from optimizers.torch_source import load_module

    return load_module(Source(f"{FACTORIES}/{FACTORY}", weights))


def _digest(checkpoint: Path, train: Images, test: Images, rows: int) -> str:
    digest = hashlib.sha256(checkpoint.read_bytes())
    for part in (train, test):
        digest.update(part.pixels[: CALIBRATION + rows].tobytes())
    digest.update(f"{rows} {_YAML}".encode())
    return digest.hexdigest()
