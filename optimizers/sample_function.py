"""Samples from an owner's Python function (task `samples`): {path, function, out} -> {count}; the arrays are written to `out` as .npz.

The function runs in the task's child alone: whatever it imports, holds or breaks ends with it.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from optimizers.base import Budget, Rejected
from optimizers.samples import Samples


def run(request: dict[str, Any], budget: Budget) -> dict[str, int]:
    """Raises Rejected with the function's own error, or with what it returned instead of arrays."""
    samples = called(Path(request["path"]), str(request["function"]))
    samples.save(Path(request["out"]))
    return {"count": len(samples)}


def called(path: Path, function: str) -> Samples:
    """What `function` of the file `path` makes: Samples, a mapping of arrays, or (mapping, labels)."""
    spec = importlib.util.spec_from_file_location(f"hone_samples_{path.stem}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        made = getattr(module, function)()
    except Exception as error:
        raise Rejected(f"failed: {type(error).__name__}: {error}") from error
    if isinstance(made, Samples):
        return made
    inputs, labels = made if isinstance(made, tuple) and len(made) == 2 else (made, None)
    if not isinstance(inputs, Mapping):
        raise Rejected(f"returned {type(made).__name__}; return a mapping from input names to arrays, or (mapping, labels)")
    arrays = {str(name): np.asarray(values) for name, values in inputs.items()}
    if len({len(values) for values in arrays.values()} | ({len(labels)} if labels is not None else set())) > 1:
        raise Rejected("returned arrays of different length; their first axis is the samples")
    return Samples(arrays, None if labels is None else np.asarray(labels, dtype=np.int64))
