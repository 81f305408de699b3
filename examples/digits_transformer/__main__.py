"""python -m examples.digits_transformer [--state FOLDER] [--rows a,b] [--minutes 3] [--docs]

Trains a small transformer on scikit-learn's digits, serves it with Hone, has each row of the table in docs/optimizers.md built by a running
server and worker, then measures the built files by itself: accuracy, size, multiply-adds, time beside ONNX Runtime's float32 and PyTorch eager.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from app.client import ClientError
from app.errors import HoneError
from examples.digits_transformer import digits
from examples.resnet18_cifar10 import records, table
from examples.resnet18_cifar10.rows import Row
from optimizers.artifact import Source
from optimizers.base import NotApplicable
from optimizers.host import cpu_budget

DOCUMENT: Final = Path(__file__).parents[2] / "docs" / "optimizers.md"
PART: Final = "transformer"
ROWS: Final = {
    row.name: row
    for row in (
        Row("int8-dynamic", "int8-dynamic"),
        Row("int8-static", "int8-static"),
        Row("int8-static-smooth", "int8-static(smooth=0.5)"),
        Row("int4-linear", "int4-linear"),
        Row("int4-linear-int8", "int4-linear(compute=int8)"),
        Row("low-rank", "low-rank(energy=0.9)"),
        Row("low-rank-trained", "tucker(linear=true,rank=sensitivity,ratio=0.5,epochs=100,minutes={minutes},augment=false)", trains=True),
        Row("qat", "qat(epochs=100,minutes={minutes},augment=false)", trains=True),
        Row("head-pruning", "head-pruning(ratio=0.5,epochs=100,minutes={minutes},augment=false)", trains=True),
        Row(
            "distill-attention",
            "distill(student=digits_transformer.py:shallow,attention_matrices=1,epochs=200,minutes={minutes},patience=40,augment=false)",
            trains=True,
        ),
        Row(
            "distill-int8",
            "distill(student=digits_transformer.py:shallow,attention_matrices=1,epochs=200,minutes={minutes},patience=40,augment=false),int8-dynamic",
            trains=True,
        ),
    )
}


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    wanted = [name.strip() for name in arguments.rows.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in ROWS]:
        print(f"there is no row {unknown[0]!r}; there are {', '.join(ROWS)}", file=sys.stderr)
        return 1
    chosen = [row for name, row in ROWS.items() if not wanted or name in wanted]
    found = records.Records.open(arguments.state / "rows.json")
    try:
        onnx, judging = digits.prepare(arguments.state / "repository", arguments.epochs, _say)
        _build(arguments, chosen, found)
        _measure(arguments, chosen, found, onnx, judging)
    except (HoneError, ClientError, NotApplicable) as error:
        print(error, file=sys.stderr)
        return 1
    _say("\n" + table.markdown(found, ROWS))
    if arguments.docs:
        table.write(DOCUMENT, found, PART, ROWS)
    return 0


def _build(arguments: argparse.Namespace, chosen: Sequence[Row], found: records.Records) -> None:
    from examples.resnet18_cifar10.service import build_rows, running

    with running(arguments.state, arguments.threads, _say, digits.MODEL, digits.FACTORIES) as service:
        build_rows(service, chosen, found, arguments.state, arguments.minutes)


def _measure(arguments: argparse.Namespace, chosen: Sequence[Row], found: records.Records, onnx: Path, judging: digits.Digits) -> None:
    from examples.resnet18_cifar10.measuring import Bench, measure_rows

    source = Source(f"{digits.FACTORIES}/{digits.FACTORY}", onnx.with_name("model.safetensors"))
    with Bench.open(onnx, judging, arguments.threads, arguments.seconds, _say, source, digits.INPUT) as bench:
        measure_rows(bench, chosen, found, arguments.state, onnx)


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m examples.digits_transformer", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--state", type=Path, default=Path(".hone/transformer"), help="folder of repository, server state, built files, results"
    )
    parser.add_argument("--rows", default="", help=f"comma-separated; default: all of {', '.join(ROWS)}")
    parser.add_argument("--epochs", type=int, default=60, help="of the transformer's own training (60: a minute)")
    parser.add_argument("--minutes", type=float, default=3.0, help="training time of each row that trains (3)")
    parser.add_argument("--threads", type=int, default=cpu_budget().cores, help="threads of a job and of the accuracy runs (all cores)")
    parser.add_argument("--seconds", type=float, default=8.0, help="of each comparison of times (8)")
    parser.add_argument("--docs", action="store_true", help="write the table into docs/optimizers.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
