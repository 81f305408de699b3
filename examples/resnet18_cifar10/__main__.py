"""python -m examples.resnet18_cifar10 --data FOLDER [--checkpoint FILE] [--rows a,b] [--minutes 20] [--test 10000] [--quick] [--docs]

Serves ResNet-18 for CIFAR-10 with Hone, has each row of the table in docs/optimizers.md built by a running server and worker, then measures
the built files by itself: accuracy, size, multiply-adds, and time beside ONNX Runtime's float32 and PyTorch eager.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from app.client import ClientError
from app.errors import HoneError
from examples.resnet18_cifar10 import images, records, repository, rows, table
from optimizers.artifact import Source
from optimizers.base import NotApplicable
from optimizers.host import cpu_budget

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "optimizers.md"
STAGES: Final = ("all", "build", "measure")


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    if arguments.data is None:
        print(images.HOW_TO_GET, file=sys.stderr)
        return 2
    if arguments.quick:
        arguments.minutes, arguments.test, arguments.seconds = min(arguments.minutes, 2.0), min(arguments.test, 1000), 3.0
    try:
        chosen = rows.chosen(arguments.rows or (",".join(rows.QUICK) if arguments.quick else ""))
        test = images.load(arguments.data, "test")
        onnx = _prepared(arguments, test)
        found = records.Records.open(arguments.state / "rows.json")
        if arguments.stage != "measure":
            _build(arguments, chosen, found)
        if arguments.stage != "build":
            _measure(arguments, chosen, found, onnx, test[: arguments.test])
    except (images.NoImages, rows.UnknownRow, HoneError, ClientError, NotApplicable) as error:
        print(error, file=sys.stderr)
        return 1
    _say("\n" + table.markdown(found))
    if arguments.docs:
        table.write(DOCUMENT, found)
    return 0


def _prepared(arguments: argparse.Namespace, test: images.Images) -> Path:
    """The repository's ONNX file. Trains a checkpoint where none is given or left by an earlier run."""
    train = images.load(arguments.data, "train", None if arguments.checkpoint is None else repository.CALIBRATION + arguments.train)
    checkpoint = arguments.checkpoint or arguments.state / "trained.safetensors"
    if arguments.checkpoint is None and not checkpoint.is_file():
        from examples.resnet18_cifar10.training import train_checkpoint

        _say(f"no --checkpoint: training one on {len(train)} images for {arguments.epochs} epochs")
        train_checkpoint(train, test[:1000], checkpoint, arguments.epochs, arguments.device, _say)
    return repository.prepare(arguments.state / "repository", checkpoint, train, test, arguments.train)


def _build(arguments: argparse.Namespace, chosen: list[rows.Row], found: records.Records) -> None:
    from examples.resnet18_cifar10.service import build_rows, running
    from optimizers.training import device_of, named

    where = "" if arguments.device == "cpu" else f" on {named(device_of(arguments.device))}"
    with running(arguments.state, arguments.threads, _say, device=arguments.device) as service:
        given = f"{where}, {arguments.train} images"
        build_rows(service, chosen, found, arguments.state, arguments.minutes, given, arguments.device)


def _measure(arguments: argparse.Namespace, chosen: list[rows.Row], found: records.Records, onnx: Path, test: images.Images) -> None:
    from examples.resnet18_cifar10.measuring import Bench, measure_rows

    source = Source(f"{repository.FACTORIES}/{repository.FACTORY}", onnx.with_name("model.safetensors"))
    with Bench.open(onnx, test, arguments.threads, arguments.seconds, _say, source, repository.INPUT) as bench:
        measure_rows(bench, chosen, found, arguments.state, onnx)


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.resnet18_cifar10", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add: Any = parser.add_argument
    add("--data", type=Path, help="folder with CIFAR-10; without it, this says how to get one")
    add("--checkpoint", type=Path, help="trained weights (.safetensors, torchvision's ResNet-18 names; default: trains its own)")
    add("--epochs", type=int, default=12, help="of its own training (12: 18 hours on two busy AVX2 cores)")
    add("--device", choices=tuple(rows.TRAIN), default="cpu", help="where rows and its own checkpoint train (cpu)")
    add("--state", type=Path, default=Path(".hone/cifar10"), help="folder of repository, server state, built files and results")
    add("--rows", default="", help=f"comma-separated; default: all of {', '.join(rows.ROWS)}")
    add("--minutes", type=float, default=20.0, help="training time of each row that trains (20)")
    add("--train", type=int, default=49_488, help="images that such a row learns from (49488: all but the 512 that calibrate)")
    add("--test", type=int, default=10_000, help="test images that judge (all 10,000)")
    add("--threads", type=int, default=cpu_budget().cores, help="threads of a job and of the accuracy runs (all cores)")
    add("--seconds", type=float, default=12.0, help="of each comparison of times (12)")
    add("--stage", choices=STAGES, default="all", help="build the rows, measure rows built before, or both (all)")
    add("--quick", action="store_true", help=f"{', '.join(rows.QUICK)}; 2 minutes, 1,000 test images, noisy ratios")
    add("--docs", action="store_true", help="write the table into docs/optimizers.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
