"""Variants of one model tried on the same few rows: their outputs, and how far those are from the model's own. A first look, not the judgement."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import cycle
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto, TensorProto, ValueInfoProto

from optimizers.base import NotApplicable
from optimizers.difference import root_mean_square
from optimizers.onnx_graph import initializers, save
from optimizers.running import ORT_ERRORS, brief, raise_if_memory, runner
from optimizers.samples import Samples
from optimizers.session import Feeds, Settings, open_session

NUMPY: Final = {
    getattr(TensorProto, name): dtype
    for name, dtype in {"FLOAT": "float32", "DOUBLE": "float64", "FLOAT16": "float16", "BOOL": "bool"}.items()
} | {getattr(TensorProto, f"{sign}INT{bits}"): f"{sign.lower()}int{bits}" for sign in ("", "U") for bits in (8, 16, 32, 64)}
"""Datatypes of ONNX that ONNX Runtime takes in one numpy dtype alone."""
LOOKED_AT: Final = 32
HOPELESS: Final = 0.5
"""Relative root-mean-square error of the outputs beyond which a result is no candidate."""


@dataclass(frozen=True)
class Trial:
    """The rows, and what the model itself answers to them (not optimized by the runtime)."""

    feeds: Feeds
    reference: list[Any]
    folder: Path
    threads: int

    @classmethod
    def of(cls, model: ModelProto, samples: Samples, folder: Path, threads: int) -> Trial:
        """Over the first LOOKED_AT samples."""
        return cls.many(model, [rows_of(samples, 0)], folder, threads)[0]

    @classmethod
    def many(cls, model: ModelProto, feeds: Sequence[Feeds], folder: Path, threads: int) -> list[Trial]:
        """A trial for each of `feeds`."""
        answers = outputs(model, feeds, folder, threads, "basic")
        return [cls(each, answer, folder, threads) for each, answer in zip(feeds, answers, strict=True)]

    def error(self, model: ModelProto) -> float:
        """Relative root-mean-square error of the outputs; infinite where other outputs are finite. Raises NotApplicable as `comparable` does."""
        seen = outputs(model, [self.feeds], self.folder, self.threads)[0]
        comparable(model, self.reference, seen)
        return root_mean_square(self.reference, seen)

    def checked_error(self, model: ModelProto, remedy: str) -> float:
        """The error of the result. Raises NotApplicable where it is hopeless."""
        error = self.error(model)
        if error > HOPELESS:
            raise NotApplicable(f"{change(error)}: {remedy}")
        return error


def change(error: float) -> str:
    return (
        f"the outputs change by {error:.0%} (root mean square)" if np.isfinite(error) else "other outputs than before are NaN or infinite"
    )


def comparable(model: ModelProto, expected: Sequence[Any], seen: Sequence[Any]) -> None:
    """Outputs of one call, or of several in a row. Raises NotApplicable where one has another shape than the model's own: it hangs on the
    numbers, as after a threshold."""
    for value, a, b in zip(cycle(model.graph.output), expected, seen, strict=False):
        if np.shape(a) != np.shape(b):
            raise NotApplicable(
                f"the shape of output {value.name!r} hangs on the numbers ({list(np.shape(b))} where the model itself gives {list(np.shape(a))}), "
                "so that the two cannot be compared"
            )


def rows_of(samples: Samples, start: int) -> Feeds:
    """One call with LOOKED_AT samples from `start` on; with one, where samples are whole calls."""
    return {name: values[start : start + LOOKED_AT] if samples.stacked else values[start] for name, values in samples.inputs.items()}


def outputs(model: ModelProto, feeds: Sequence[Feeds], folder: Path, threads: int, level: str = "all") -> list[list[Any]]:
    """What `model` answers to each of `feeds`. Raises NotApplicable where it does not load or run."""
    path = save(model, folder / "variant.onnx")
    try:
        run = runner(open_session(path, Settings(intra_op_threads=threads, graph_level=level)))
        return [run(each) for each in feeds]
    except ORT_ERRORS as error:
        raise_if_memory(error)
        raise NotApplicable(f"the rewritten model does not work: {brief(error)}") from None


def matching(samples: Samples, model: ModelProto, count: int, method: str) -> Samples:
    """`count` of the samples, evenly spread, with the inputs that the model takes. Raises NotApplicable where there are none."""
    if not len(samples):
        raise NotApplicable(
            f"{method} needs calibration inputs, and there are none: name some in model.yaml (samples: calibration), or capture live ones"
        )
    names = fitting(samples, model)
    taken = samples.rows(sorted({int(i) for i in np.linspace(0, len(samples) - 1, min(count, len(samples)))}))
    return Samples({name: taken.inputs[name] for name in names}, taken.labels, taken.origin, taken.stacked)


def fitting(samples: Samples, model: ModelProto) -> list[str]:
    """The model's inputs by name. Raises NotApplicable where the samples lack one, or hold another datatype or shape than it takes."""
    weights = initializers(model.graph)
    values = [value for value in model.graph.input if value.name not in weights]
    for value in values:
        if value.name not in samples.inputs:
            raise NotApplicable(f"the samples lack the input {value.name!r}; they have {', '.join(samples.inputs)}")
        array = samples.inputs[value.name]
        if not _fits(value, array, samples.stacked):
            given = f"{array.dtype} {list(array.shape)}"
            raise NotApplicable(f"the samples of {value.name!r} are {given}, one row each; the model takes {_wanted(value)}")
    return [value.name for value in values]


def _fits(value: ValueInfoProto, array: NDArray[Any], stacked: bool) -> bool:
    tensor = value.type.tensor_type
    wanted = NUMPY.get(tensor.elem_type)
    if wanted is not None and array.dtype != wanted:
        return False
    dims, shape = tensor.shape.dim, array.shape if stacked else array.shape[1:]
    if not tensor.HasField("shape"):
        return True
    fixed = [dim.dim_value if dim.HasField("dim_value") else size for dim, size in zip(dims, shape, strict=False)]
    return len(dims) == len(shape) and fixed[int(stacked) :] == [*shape][int(stacked) :]


def _wanted(value: ValueInfoProto) -> str:
    tensor = value.type.tensor_type
    shape = [str(dim.dim_value) if dim.HasField("dim_value") else dim.dim_param or "?" for dim in tensor.shape.dim]
    return f"{NUMPY.get(tensor.elem_type) or TensorProto.DataType.Name(tensor.elem_type)} [{', '.join(shape)}]"
