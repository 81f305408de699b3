"""Files that are really slower than the demo's model, by a measured share, and the questions that a paired replay is asked about them."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks import models
from optimizers.measure import Arm, compare
from optimizers.samples import Samples
from optimizers.session import Feeds, Settings

LEVELS: Final = (10, 20, 50, 100)
CHANNELS: Final = 8
TRIED: Final = 12
CORRECTIONS: Final = 2


@dataclass(frozen=True)
class Case:
    """One question to the task `blame`, and the finding that would be right beside as_proven and inconclusive ('': none)."""

    name: str
    guilty: str
    request: Mapping[str, Any]


@dataclass(frozen=True)
class Suite:
    """`slower`: percent -> file, 0 is the model itself. `measured`: percent -> CPU time over the model's, measured before."""

    slower: Mapping[int, Path]
    measured: Mapping[int, float]
    feeds: list[Feeds]
    cases: tuple[Case, ...]


def prepare(folder: Path, say: Callable[[str], None]) -> Suite:
    """Build everything in `folder`."""
    model = models.demo(folder)
    samples = Samples.load(models.DEMO / "samples" / "judging.npz")
    inputs = Samples(samples.inputs)
    feeds = one_row_feeds(inputs.inputs)
    paths = {"reference": folder / "reference.npz", "recent": folder / "recent.npz"}
    half = len(inputs) // 2
    inputs.rows(slice(0, half)).save(paths["reference"])
    inputs.rows(slice(half, None)).save(paths["recent"])
    slower, measured = slower_files(model.path, feeds, folder, say)
    cases = [*_demo_cases(slower, paths, folder), *_other_models(model, inputs, feeds, paths, folder, say)]
    return Suite(slower, measured, feeds, tuple(cases))


def one_row_feeds(inputs: Mapping[str, Any]) -> list[Feeds]:
    """The first rows of the only input, one a call."""
    ((name, rows),) = inputs.items()
    return [{name: rows[i : i + 1]} for i in range(8)]


def with_convolutions(source: Path, target: Path, count: int) -> Path:
    """The same answers, and `count` convolutions of the image more, whose sum joins the answer with a factor that leaves it as it is."""
    built = onnx.load(source)
    graph = built.graph
    rng = np.random.default_rng(0)
    (image,), (output,) = graph.input, graph.output
    depth = image.type.tensor_type.shape.dim[1].dim_value
    last = image.name
    for i in range(count):
        kernel = rng.standard_normal((CHANNELS, depth if i == 0 else CHANNELS, 3, 3)).astype(np.float32) / 9
        graph.initializer.append(numpy_helper.from_array(kernel, f"planted.w{i}"))
        graph.node.append(helper.make_node("Conv", [last, f"planted.w{i}"], [f"planted.c{i}"], pads=[1, 1, 1, 1]))
        last = f"planted.c{i}"
    for node in graph.node:
        node.output[:] = [f"{each}.plain" if each == output.name else each for each in node.output]
    graph.initializer.append(numpy_helper.from_array(np.array([1, 2, 3], np.int64), "planted.axes"))
    graph.initializer.append(numpy_helper.from_array(np.array([1], np.int64), "planted.first"))
    graph.initializer.append(numpy_helper.from_array(np.array(1e-30, np.float32), "planted.nothing"))
    graph.node.extend(
        [
            helper.make_node("ReduceMean", [last, "planted.axes"], ["planted.mean"], keepdims=0),
            helper.make_node("Unsqueeze", ["planted.mean", "planted.first"], ["planted.column"]),
            helper.make_node("Mul", ["planted.column", "planted.nothing"], ["planted.zero"]),
            helper.make_node("Add", [f"{output.name}.plain", "planted.zero"], [output.name]),
        ]
    )
    onnx.save(built, target)
    return target


def slower_files(
    path: Path, feeds: list[Feeds], folder: Path, say: Callable[[str], None], levels: Sequence[int] = LEVELS
) -> tuple[dict[int, Path], dict[int, float]]:
    """Files and their CPU time over the model's for each level in percent (0: the model itself). The price of one convolution is measured, then each file is, and once more with as many as were missing."""
    files, measured = {0: path}, {0: 1.0}
    each = (_ratio(path, with_convolutions(path, folder / "tried.onnx", TRIED), feeds) - 1) / TRIED
    for level in levels:
        count = max(1, round(level / 100 / each))
        found: dict[int, float] = {}
        for _ in range(CORRECTIONS + 1):
            found[count] = _ratio(path, with_convolutions(path, folder / f"slower-{level}-{count}.onnx", count), feeds)
            count = max(1, count + round((1 + level / 100 - found[count]) / each))
            if count in found:
                break
        count = min(found, key=lambda tried: abs(found[tried] - 1 - level / 100))
        files[level], measured[level] = folder / f"slower-{level}-{count}.onnx", round(found[count], 3)
        say(f"planted {level:+d} %: {count} convolutions more, measured {measured[level] - 1:+.1%}")
    return files, measured


def _ratio(first: Path, other: Path, feeds: list[Feeds]) -> float:
    with Arm(first, Settings()) as one, Arm(other, Settings()) as two:
        return compare(one, two, feeds, seconds=15).cpu.estimate


def _demo_cases(slower: Mapping[int, Path], paths: Mapping[str, Path], folder: Path) -> list[Case]:
    copy = Path(shutil.copyfile(slower[0], folder / "copy.onnx"))
    given = {name: {"path": str(path)} for name, path in paths.items()}
    cases = [Case("nothing wrong", "", {"live": str(copy), "other": str(slower[0]), **given})]
    return cases + [
        Case(f"file {level:+d} %", "version_slower", {"live": str(slower[level]), "other": str(slower[0]), **given}) for level in LEVELS
    ]


def _other_models(
    model: models.BenchModel, inputs: Samples, feeds: list[Feeds], paths: Mapping[str, Path], folder: Path, say: Callable[[str], None]
) -> list[Case]:
    """Nothing is wrong with them: other kernels than the file that they are held to, and weights that do not fit the cache."""
    given = {name: {"path": str(path)} for name, path in paths.items()}
    int8 = models.quantized(model, folder, next(iter(inputs.inputs.values()))[:64].astype(np.float32)).path
    large = models.heavy(folder, "large", 48).path
    (name,) = (info.name for info in onnx.load(large).graph.input)
    width = onnx.load(large).graph.input[0].type.tensor_type.shape.dim[1].dim_value
    rows = np.random.default_rng(0).standard_normal((64, width)).astype(np.float32)
    Samples({name: rows}).save(folder / "rows.npz")
    copy = Path(shutil.copyfile(large, folder / "large-copy.onnx"))
    proof = {"rows_ratio": _ratio(model.path, int8, feeds)}
    say(f"int8 over fp32, measured {proof['rows_ratio']:.2f}")
    large_given = {"reference": {"path": str(folder / "rows.npz")}, "recent": {"path": str(folder / "rows.npz")}}
    return [
        Case("int8 held to fp32, as proven", "", {"live": str(int8), "other": str(model.path), "proof": proof, **given}),
        Case("48 MB of weights, nothing wrong", "", {"live": str(copy), "other": str(large), **large_given}),
    ]
