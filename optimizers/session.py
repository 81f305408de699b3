"""How an ONNX file becomes a session for judging: the same settings as when it is served, by the same names. It times nothing.

`Settings` has the fields of the server's RuntimeSettings that matter to a session; this library cannot import those.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import onnxruntime as ort
from numpy.typing import NDArray

Feeds = dict[str, NDArray[Any]]
DATATYPES: Final[dict[str, str]] = {
    "tensor(bool)": "BOOL", "tensor(uint8)": "UINT8", "tensor(uint16)": "UINT16", "tensor(uint32)": "UINT32", "tensor(uint64)": "UINT64",
    "tensor(int8)": "INT8", "tensor(int16)": "INT16", "tensor(int32)": "INT32", "tensor(int64)": "INT64",
    "tensor(float16)": "FP16", "tensor(bfloat16)": "BF16", "tensor(float)": "FP32", "tensor(double)": "FP64", "tensor(string)": "BYTES",
}  # fmt: skip
"""ONNX Runtime's type of a tensor, and its name in the Open Inference Protocol."""
TYPES: Final = {datatype: name for name, datatype in DATATYPES.items()}
GRAPH_LEVELS: Final = {
    "none": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
    "basic": ort.GraphOptimizationLevel.ORT_ENABLE_BASIC,
    "extended": ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED,
    "all": ort.GraphOptimizationLevel.ORT_ENABLE_ALL,
}
PRECISE_INT8: Final = ("session.x64quantprecision", "1")
"""Session option with which x86 without VNNI multiplies u8 × u8 instead of u8 × s8: no saturation, a third slower (ONNX Runtime's header)."""
_ERRORS_ONLY: Final = 3
_BFLOAT16: Final = "tensor(bfloat16)"
_BFLOAT16_ONNX: Final = 16


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
    options = _options(settings)
    session = ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    if all(isinstance(size, int) for node in session.get_inputs() for size in node.shape[1:]):
        return session
    # Of many shapes, the arena and its patterns would keep the largest of everything they ever saw: a runner serves without them, too.
    options.enable_mem_pattern = False
    options.enable_cpu_mem_arena = False
    return ort.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])


def _options(settings: Settings) -> ort.SessionOptions:
    options = ort.SessionOptions()
    options.intra_op_num_threads = max(1, settings.intra_op_threads)
    options.inter_op_num_threads = 1
    options.graph_optimization_level = GRAPH_LEVELS[settings.graph_level]
    options.log_severity_level = _ERRORS_ONLY
    options.add_session_config_entry("session.intra_op.allow_spinning", "1" if settings.spin_duration_us else "0")
    if settings.spin_duration_us:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(settings.spin_duration_us))
    options.add_session_config_entry("session.use_device_allocator_for_initializers", "1")
    for key, value in settings.session_options:
        options.add_session_config_entry(key, value)
    return options


def call(session: ort.InferenceSession, feeds: Feeds) -> list[NDArray[Any]]:
    """All outputs of one call. bfloat16, which numpy lacks, goes in and comes out as float32."""
    if not has_bfloat16(session):
        return list(session.run(None, feeds))
    half = {node.name for node in session.get_inputs() if node.type == _BFLOAT16}
    given = {
        name: ort.OrtValue.ortvalue_from_numpy_with_onnx_type(to_bfloat16(value), _BFLOAT16_ONNX)
        if name in half
        else ort.OrtValue.ortvalue_from_numpy(value)
        for name, value in feeds.items()
    }
    names = [node.name for node in session.get_outputs()]
    return [_array(value) for value in session.run_with_ort_values(names, given)]


def has_bfloat16(session: ort.InferenceSession) -> bool:
    return any(node.type == _BFLOAT16 for node in (*session.get_inputs(), *session.get_outputs()))


def to_bfloat16(values: NDArray[Any]) -> NDArray[np.uint16]:
    """The upper halves of float32, rounded to nearest even; NaN stays NaN. What already is uint16 is taken as bfloat16."""
    if values.dtype == np.uint16:
        return values
    bits = np.ascontiguousarray(values, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(values), np.uint16(0x7FC0), rounded).astype(np.uint16).reshape(np.shape(values))


def _array(value: ort.OrtValue) -> NDArray[Any]:
    if value.element_type() != _BFLOAT16_ONNX:
        return np.asarray(value.numpy())
    size = value.tensor_size_in_bytes()
    return from_bfloat16(np.frombuffer(ctypes.string_at(value.data_ptr(), size) if size else b"", np.uint16).reshape(value.shape()))


def from_bfloat16(values: NDArray[np.uint16]) -> NDArray[np.float32]:
    """The float32 values whose upper halves `values` are."""
    return (values.astype(np.uint32) << 16).view(np.float32)


def tensors(nodes: list[Any]) -> tuple[TensorInfo, ...]:
    return tuple(TensorInfo(node.name, node.type, tuple(node.shape)) for node in nodes)


def runnable(feeds: Feeds) -> Feeds:
    """Arrays as ONNX Runtime takes them: contiguous, of the rank that they have (np.ascontiguousarray gives a scalar an axis), strings as objects."""
    return {name: value.astype(object) if value.dtype.kind in "US" else np.asarray(value, order="C") for name, value in feeds.items()}
