"""ONNX Runtime's own graph optimization, saved as a file instead of done at each load."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import onnxruntime as ort

from optimizers.base import NotApplicable
from optimizers.onnx_graph import EXTERNAL_ABOVE
from optimizers.running import ORT_ERRORS, brief, raise_if_memory
from optimizers.session import GRAPH_LEVELS


def save_optimized(source: Path, target: Path, level: str, skip: Sequence[str] = ()) -> Path:
    """Write `source` optimized at `level` to `target`, leaving out the optimizers named in `skip`.

    Levels above 'extended' choose layouts for the kernels of this very host. Raises NotApplicable where the runtime cannot.
    """
    options = ort.SessionOptions()
    options.graph_optimization_level = GRAPH_LEVELS[level]
    options.optimized_model_filepath = str(target)
    options.intra_op_num_threads = options.inter_op_num_threads = 1
    options.log_severity_level = 3
    if sum(file.stat().st_size for file in source.parent.iterdir() if file.name.startswith(source.name)) > EXTERNAL_ABOVE:
        options.add_session_config_entry("session.optimized_model_external_initializers_file_name", f"{target.name}.data")
        options.add_session_config_entry("session.optimized_model_external_initializers_min_size_in_bytes", "1024")
    try:
        ort.InferenceSession(str(source), options, providers=["CPUExecutionProvider"], disabled_optimizers=list(skip) or None)
    except ORT_ERRORS as error:
        raise_if_memory(error)
        raise NotApplicable(f"ONNX Runtime cannot optimize the graph at level {level}: {brief(error)}") from None
    return target
