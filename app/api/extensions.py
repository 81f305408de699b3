"""Bodies of the protocol's quiet endpoints: metadata, model configuration, statistics, index. Pure; the wire form only."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Final

from app import __version__
from app.domain import Signature, TensorSpec, VersionState
from app.serving.slot import Loaded, Slot
from app.telemetry.metrics import Histogram, VersionRow

EXTENSIONS: Final = [
    "binary_tensor_data",
    "model_repository",
    "model_repository(unload_dependents)",
    "model_configuration",
    "schedule_policy",
    "statistics",
    "parameters",
]
PLATFORMS: Final = {"onnx": "onnx_onnxv1", "torch": "pytorch_safetensors"}
BACKENDS: Final = {"onnx": "onnxruntime", "torch": "pytorch"}


def server_metadata() -> dict[str, Any]:
    return {"name": "hone", "version": __version__, "extensions": EXTENSIONS}


def model_metadata(slot: Slot, loaded: Loaded) -> dict[str, Any]:
    """`properties` tell what OIP has no field for: which version answers, and whether its rows are batched."""
    signature = loaded.admitted.signature
    return {
        "name": slot.name,
        "versions": sorted(slot.versions),
        "platform": PLATFORMS[loaded.admitted.kind],
        "inputs": [_tensor(spec) for spec in signature.inputs],
        "outputs": [_tensor(spec) for spec in signature.outputs],
        "properties": {
            "version": loaded.version,
            "generation": str(loaded.generation),
            "batching": "continuous" if signature.batchable else f"none: {signature.rows_reason}",
            "optional_inputs": ",".join(spec.name for spec in signature.inputs if spec.optional),
        },
    }


def _tensor(spec: TensorSpec) -> dict[str, Any]:
    return {"name": spec.name, "datatype": spec.datatype, "shape": list(spec.shape)}


def model_config(slot: Slot, loaded: Loaded) -> dict[str, Any]:
    """Triton's model configuration, as far as clients (perf_analyzer) read it: dims come without the batch axis."""
    signature = loaded.admitted.signature
    limit = loaded.settings.batch_limit if signature.batchable else 0
    return {
        "name": slot.name,
        "platform": "onnxruntime_onnx" if loaded.admitted.kind == "onnx" else "pytorch_libtorch",
        "backend": BACKENDS[loaded.admitted.kind],
        "version_policy": {"latest": {"num_versions": 1}},
        "max_batch_size": limit,
        "input": [_config_tensor(spec, limit) | {"format": "FORMAT_NONE", "optional": spec.optional} for spec in signature.inputs],
        "output": [_config_tensor(spec, limit) for spec in signature.outputs],
        "instance_group": [{"name": slot.name, "kind": "KIND_CPU", "count": loaded.settings.instances}],
        "dynamic_batching": {"preferred_batch_size": [], "max_queue_delay_microseconds": 0},
        "parameters": {},
    }


def _config_tensor(spec: TensorSpec, limit: int) -> dict[str, Any]:
    datatype = "STRING" if spec.datatype == "BYTES" else spec.datatype
    return {"name": spec.name, "data_type": f"TYPE_{datatype}", "dims": list(spec.shape[1:] if limit else spec.shape)}


def statistics(rows: list[VersionRow], memory: Mapping[tuple[str, ...], float]) -> dict[str, Any]:
    """The statistics extension. `inference_count` counts rows, `execution_count` calls of the model."""
    return {"model_stats": [_version_statistics(row, memory.get((row.model, row.version), 0.0)) for row in rows if row.version]}


def _version_statistics(row: VersionRow, memory_bytes: float) -> dict[str, Any]:
    decode, queue, compute, encode = row.phases
    nothing = {"count": 0, "ns": 0}
    sizes = [
        {
            "batch_size": size,
            "compute_input": nothing,
            "compute_infer": {"count": int(calls), "ns": int(seconds * 1e9)},
            "compute_output": nothing,
        }
        for size, (calls, seconds) in sorted(row.by_size.items())
    ]
    return {
        "name": row.model,
        "version": row.version,
        "last_inference": row.last_ms,
        "inference_count": row.rows,
        "execution_count": row.executions,
        "inference_stats": {
            "success": _spent(row.duration),
            "fail": {"count": row.failures, "ns": int(row.failed_s * 1e9)},
            "queue": _spent(queue),
            "compute_input": _spent(decode),
            "compute_infer": _spent(compute),
            "compute_output": _spent(encode),
            "cache_hit": nothing,
            "cache_miss": nothing,
        },
        "batch_stats": sizes,
        "memory_usage": [{"type": "CPU", "id": 0, "byte_size": int(memory_bytes)}] if memory_bytes else [],
    }


def _spent(histogram: Histogram) -> dict[str, int]:
    return {"count": sum(histogram.counts), "ns": int(histogram.total * 1e9)}


def index(slots: list[Slot], ready_only: bool) -> list[dict[str, str]]:
    """Every version of every model with its state; a model that has none yet is one line of its own."""
    lines = []
    for slot in slots:
        for version in slot.known or ("",):
            state, reason = slot.state_of(version) if version else (VersionState.UNAVAILABLE, slot.reason)
            if state is VersionState.READY or not ready_only:
                lines.append({"name": slot.name, "version": version, "state": state.value, "reason": reason})
    return lines


def rows_of(signature: Signature, shape: tuple[int, ...]) -> int:
    """How many rows a request has: its first axis where rows are batched, else one."""
    return shape[0] if signature.batchable and shape else 1
