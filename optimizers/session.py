"""How an ONNX file becomes a session for judging: the same settings as when it is served, by the same names. It times nothing.

`Settings` has the fields of the server's RuntimeSettings that matter to a session; this library cannot import those.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Feeds = dict[str, NDArray[Any]]
GRAPH_LEVELS: Final = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "layout": ort.GraphOptimizationLevel.ORT_ENABLE_LAYOUT,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
PRECISE_INT8: Final = ("session.x64quantprecision", "1")
"""Session option with which x86 without VNNI multiplies u8 × u8 instead of u8 × s8: no saturation, a third slower (ONNX Runtime's header)."""
_ERRORS_ONLY: Final = 3


@dataclass(frozen=True)
class Settings:
    """How a version is run. Defaults are one quiet thread: what CPU time can be compared by."""

    intra_op_threads: int = 1
    instances: int = 1
    batch_limit: int = 8
    spin_duration_us: int = 0
    graph_level: str = "all"
    session_options: tuple[tuple[str, str], ...] = ()

    @classmethod
    def from_json(cls, data: Mapping[str, Any] | None) -> Settings:
        """From a dict with any of the fields; others (queue_limit) are the server's alone and are ignored."""
        known = {name: value for name, value in (data or {}).items() if name in cls.__dataclass_fields__}
        options = known.get("session_options", ())
        pairs = options.items() if isinstance(options, Mapping) else options
        return cls(**{**known, "session_options": tuple((str(key), str(value)) for key, value in pairs)})

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "session_options": [list(pair) for pair in self.session_options]}

    def one_quiet_thread(self) -> Settings:
        """The same graph, run so that its CPU time means something: one thread, no spinning, one instance."""
        return replace(self, intra_op_threads=1, instances=1, spin_duration_us=0)

    def unoptimized(self) -> Settings:
        """How golden judges: one quiet thread and no graph optimization."""
        return replace(self.one_quiet_thread(), graph_level="none")


@dataclass(frozen=True)
class TensorInfo:
    """Name, ONNX Runtime type (`tensor(float)`) and shape of an input or output; a dimension is a number, a symbol or None."""

    name: str
    type: str
    shape: tuple[int | str | None, ...]

    def describe(self) -> str:
        return f"{self.name} {self.type.removeprefix('tensor(').removesuffix(')')}{list(self.shape)}"


def open_session(path: str | Path, settings: Settings) -> ort.InferenceSession:
    """Open `path` on the CPU. Raises what ONNX Runtime raises, and ValueError for an unknown graph level."""
    if settings.graph_level not in GRAPH_LEVELS:
        raise ValueError(f"graph level {settings.graph_level!r} is unknown; name one of {', '.join(GRAPH_LEVELS)}")
    options = ort.SessionOptions()
    options.intra_op_num_threads = settings.intra_op_threads
    options.inter_op_num_threads = 1
    options.graph_optimization_level = GRAPH_LEVELS[settings.graph_level]
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spin_duration_us else "0")
    if settings.spin_duration_us:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(settings.spin_duration_us))
    for key, value in settings.session_options:
        options.add_session_config_entry(key, value)
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def tensors(nodes: list[Any]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(node.name, node.type, tuple(node.shape)) for node in nodes)


def runnable(feeds: Feeds) -> Feeds:
    """Arrays as ONNX Runtime takes them: contiguous, and strings as objects."""
    return {name: value.astype(object) if value.dtype.kind in "US" else np.ascontiguousarray(value) for name, value in feeds.items()}
