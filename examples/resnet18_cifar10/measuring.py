"""What the table says of one built ONNX file, found out here and not taken from the service: accuracy, size, multiply-adds, paired times."""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final, Protocol

import numpy as np
import onnx
from numpy.typing import NDArray

from benchmarks.machine import Quiet
from examples.resnet18_cifar10.records import GOLDEN, Records
from examples.resnet18_cifar10.rows import Row
from examples.resnet18_cifar10.table import inverted
from optimizers.artifact import Source, sha256_of
from optimizers.census import census
from optimizers.measure import Arm, compare
from optimizers.packed import pack
from optimizers.session import Feeds, Settings, open_session
from optimizers.torch_module import TorchSource

BATCHES: Final = (1, 8)
CHUNK: Final = 50


class Rows(Protocol):
    """What judges: inputs of the model, with the right classes."""

    @property
    def labels(self) -> NDArray[np.int64]: ...
    def __len__(self) -> int: ...
    def __getitem__(self, part: slice) -> Rows: ...
    def inputs(self) -> NDArray[np.float32]: ...


@dataclass(frozen=True)
class Measured:
    """`right` of `images` test images; `packed` bytes for codebooks and zeros; `faster`: "fp32-1" (beside what, batch) to (ratio of CPU time, low, high).

    `others`: share of all cores' time that nobody of this run used.
    """

    right: int
    images: int
    bytes: int
    packed: int | None
    parameters: int
    multiply_adds: int | None
    faster: dict[str, tuple[float, float, float]] = field(default_factory=dict)
    others: float | None = None


@dataclass(frozen=True)
class Bench:
    """The two yardsticks, opened once: golden on ONNX Runtime in float32 and, where torch is installed, in PyTorch eager."""

    test: Rows
    threads: int
    seconds: float
    yardsticks: dict[str, Arm]
    say: Callable[[str], None]
    entry: str
    """Name of the model's input."""

    @classmethod
    @contextmanager
    def open(
        cls, golden: Path, test: Rows, threads: int, seconds: float, say: Callable[[str], None], source: Source, entry: str
    ) -> Iterator[Bench]:  # fmt: skip
        """Leaving it ends the processes that hold the yardsticks."""
        with ExitStack() as stack:
            yardsticks = {"fp32": stack.enter_context(Arm(golden, Settings()))}
            if importlib.util.find_spec("torch") is not None:
                eager = TorchSource(source.factory, ((entry, "FP32"),), (("logits", "FP32"),))
                yardsticks["eager"] = stack.enter_context(Arm(source.weights, Settings(), source=eager))
            yield cls(test, threads, seconds, yardsticks, say, entry)

    def key(self, path: Path) -> str:
        """Equal where measuring again would measure the same."""
        return f"{sha256_of(path)[:16]} {len(self.test)} {self.seconds:g}"

    def measure(self, path: Path, name: str) -> Measured:
        quiet = Quiet()
        right = self._right(path)
        self.say(f"{name}: {right} of {len(self.test)} right")
        counted = census(onnx.load(path), path.parent, {self.entry: self.test[:1].inputs().shape})
        faster = self._faster(path)
        for key, ratio in faster.items():
            estimate, low, high = inverted(ratio)
            self.say(f"{name}: {key} {estimate:.2f} times faster [{low:.2f}, {high:.2f}]")
        packed = _packed_bytes(path) if name.startswith(("codebook", "l1-weights")) else None
        return Measured(
            right, len(self.test), path.stat().st_size, packed, counted.parameters, counted.multiply_adds, faster, quiet.report().get("others")
        )  # fmt: skip

    def _right(self, path: Path) -> int:
        session = open_session(path, Settings(intra_op_threads=self.threads))
        right = 0
        for at in range(0, len(self.test), CHUNK):
            part = self.test[at : at + CHUNK]
            (logits,) = session.run(None, {self.entry: part.inputs()})
            right += int((np.asarray(logits).argmax(1) == part.labels).sum())
        return right

    def _faster(self, path: Path) -> dict[str, tuple[float, float, float]]:
        found = {}
        with Arm(path, Settings()) as arm:
            for name, yardstick in self.yardsticks.items():
                for batch in BATCHES:
                    ratio = compare(yardstick, arm, self._feeds(batch), batch, seconds=self.seconds).cpu
                    found[f"{name}-{batch}"] = (ratio.estimate, ratio.low, ratio.high)
        return found

    def _feeds(self, batch: int) -> Feeds:
        return {self.entry: self.test[:batch].inputs()}


def measure_rows(bench: Bench, chosen: Iterable[Row], found: Records, folder: Path, golden: Path) -> None:
    """Golden and every row whose file lies in FOLDER/built, unless the very file was measured before."""
    found.put_measured(GOLDEN, golden, bench)
    for row in chosen:
        path = folder / "built" / f"{row.name}.onnx"
        if found.has_file(row.name) and path.is_file():
            found.put_measured(row.name, path, bench)


def _packed_bytes(path: Path) -> int:
    with tempfile.TemporaryDirectory() as folder:
        return pack(path, Path(folder) / "packed").bytes
