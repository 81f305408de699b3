"""Trains the demo model and writes its weights, samples and picture: python examples/digits/train.py [--epochs 40] [--out FOLDER]

Data: scikit-learn's digits (UCI optical digits, 1,797 images of 8×8), enlarged to 32×32; three disjoint parts. About five minutes on two
cores. Seeds, thread count and algorithms are fixed: the same torch on the same kind of CPU writes the same bytes; another kind of CPU
sums in another order, and writes weights that differ but judge as well.
"""

from __future__ import annotations

import argparse
import hashlib
import importlib.util
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from numpy.typing import NDArray
from PIL import Image
from safetensors.torch import save_file
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import affine_grid, cross_entropy, grid_sample
from torch.nn.utils.fusion import fuse_conv_bn_eval

DEMO = Path(__file__).resolve().parents[2] / "app" / "demo_models"
SIDE, SEED, BATCH, THREADS = 32, 20, 64, 2
PARTS = {"train": 850, "calibration": 200, "judging": 747}
OPSET = 18

Images = NDArray[np.float32]
Labels = NDArray[np.int64]


def load_factory() -> Any:
    """The model's factory file, loaded by path as the server does it."""
    spec = importlib.util.spec_from_file_location("digits_resnet", DEMO / "factories" / "digits_resnet.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def enlarged(image: NDArray[np.float64]) -> NDArray[np.uint8]:
    """8×8 with values 0..16 to 32×32 grey levels: what a PNG of the digit holds."""
    small = Image.fromarray((image * 255 / 16).round().astype(np.uint8))
    return np.asarray(small.resize((SIDE, SIDE), Image.Resampling.BILINEAR))


def parts() -> dict[str, tuple[Images, Labels]]:
    """Disjoint parts, images float32 [n, 1, 32, 32] from 0 to 1. Equal images fall into the same part or are dropped."""
    digits = load_digits()
    pixels = np.stack([enlarged(image) for image in digits.images])
    _, first = np.unique(pixels.reshape(len(pixels), -1), axis=0, return_index=True)
    order = np.random.default_rng(SEED).permutation(np.sort(first))
    images = (pixels.astype(np.float32) / np.float32(255))[:, None]
    cuts = np.split(order, np.cumsum(list(PARTS.values()))[:-1])
    return {name: (images[index], digits.target[index].astype(np.int64)) for name, index in zip(PARTS, cuts, strict=True)}


def augmented(images: Tensor, random: torch.Generator) -> Tensor:
    """Turned by up to 12 degrees, scaled by 0.85 to 1.15, moved by up to 3 pixels, with other contrast and a little noise."""
    n = len(images)

    def uniform(low: float, high: float) -> Tensor:
        return torch.rand(n, generator=random) * (high - low) + low

    angle, scale = torch.deg2rad(uniform(-12, 12)), uniform(0.85, 1.15)
    move_x, move_y = uniform(-3, 3) * 2 / SIDE, uniform(-3, 3) * 2 / SIDE
    rows = [torch.cos(angle) / scale, -torch.sin(angle) / scale, move_x, torch.sin(angle) / scale, torch.cos(angle) / scale, move_y]
    moved = grid_sample(
        images, affine_grid(torch.stack(rows, 1).view(n, 2, 3), list(images.shape), align_corners=False), align_corners=False
    )
    noise = torch.randn(images.shape, generator=random) * 0.03
    return (moved * uniform(0.7, 1.0).view(n, 1, 1, 1) + noise).clamp(0, 1)


def train(model: nn.Module, images: Tensor, labels: Tensor, epochs: int) -> None:
    random = torch.Generator().manual_seed(SEED)
    steps = len(images) // BATCH
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, nesterov=True, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=epochs * steps)
    model.train()
    for epoch in range(epochs):
        order = torch.randperm(len(images), generator=random)
        total = 0.0
        for step in range(steps):
            index = order[step * BATCH : (step + 1) * BATCH]
            loss = cross_entropy(model(augmented(images[index], random)), labels[index], label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            schedule.step()
            total += loss.item()
        print(f"epoch {epoch + 1:3d}/{epochs}  loss {total / steps:.3f}", flush=True)
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, images: Tensor, labels: Tensor) -> float:
    return float((model(images).argmax(1) == labels).float().mean())


def folded(model: Any) -> nn.Module:
    """The same function with each batch normalization folded into its convolution, as it is served."""
    model.conv1, model.bn1 = fuse_conv_bn_eval(model.conv1, model.bn1), nn.Identity()
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        for block in stage:
            block.conv1, block.bn1 = fuse_conv_bn_eval(block.conv1, block.bn1), nn.Identity()
            block.conv2, block.bn2 = fuse_conv_bn_eval(block.conv2, block.bn2), nn.Identity()
            if block.downsample is not None:
                block.downsample = fuse_conv_bn_eval(*block.downsample)
    return model  # type: ignore[no-any-return]


def export(model: nn.Module, path: Path) -> None:
    """ONNX with a free batch axis, weights inside, nothing in it that names this machine."""
    batch = torch.export.Dim("batch")
    program = torch.onnx.export(
        model, (torch.zeros(2, 1, SIDE, SIDE),), dynamo=True, input_names=["image"], output_names=["logits"],
        dynamic_shapes=({0: batch},), opset_version=OPSET, external_data=False, verbose=False,
    )  # fmt: skip
    assert program is not None
    proto = program.model_proto
    for node in proto.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*proto.graph.input, *proto.graph.output, *proto.graph.value_info):
        del value.metadata_props[:]
    del proto.metadata_props[:], proto.graph.metadata_props[:]
    proto.producer_name, proto.producer_version = "hone digits example", ""
    onnx.checker.check_model(proto, full_check=True)
    path.write_bytes(proto.SerializeToString(deterministic=True))


def save_samples(path: Path, images: Images, labels: Labels) -> None:
    np.savez_compressed(path, allow_pickle=False, image=images, labels=labels)


def save_picture(path: Path, image: Images) -> None:
    """One digit as a picture that a person can look at; the server makes it 32×32 again."""
    grey = Image.fromarray((image[0] * 255).round().astype(np.uint8))
    grey.resize((SIDE * 8, SIDE * 8), Image.Resampling.BICUBIC).save(path, optimize=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--out", type=Path, default=DEMO, help="folder that gets repository/digits/… and digit.png")
    options = parser.parse_args()
    folder = options.out / "repository" / "digits"
    for sub in ("1", "samples"):
        (folder / sub).mkdir(parents=True, exist_ok=True)

    torch.manual_seed(SEED)
    torch.set_num_threads(THREADS)
    torch.use_deterministic_algorithms(True)
    data = parts()
    model = load_factory().build()
    train(model, torch.from_numpy(data["train"][0]), torch.from_numpy(data["train"][1]), options.epochs)
    for name, (images, labels) in data.items():
        print(f"{name}: {len(images)} images, accuracy {accuracy(model, torch.from_numpy(images), torch.from_numpy(labels)):.4f}")
        save_samples(folder / "samples" / f"{name}.npz", images, labels)
    weights = folder / "1" / "model.safetensors"
    save_file(model.state_dict(), weights)
    weights.chmod(0o644)
    images, labels = data["judging"]
    save_picture(options.out / "digit.png", images[int(np.flatnonzero(labels == 6)[0])])
    export(folded(model), folder / "1" / "model.onnx")
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        print(f"{path.stat().st_size:9,d} bytes  {hashlib.sha256(path.read_bytes()).hexdigest()[:16]}  {path.relative_to(options.out)}")


if __name__ == "__main__":
    main()
