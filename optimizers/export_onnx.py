"""The export of a PyTorch golden: its module, what is declared of it, rows to try it on, and how far the file's answers are from the module's.

Imports torch, so optimizers.export imports it inside its function.
"""

from __future__ import annotations

import time
from dataclasses import replace

from optimizers.artifact import Artifact, Source
from optimizers.base import Budget, NotApplicable
from optimizers.export import ExportConfig
from optimizers.samples import Samples
from optimizers.torch_source import OPSET, Signature, counted, difference, export, load_module, torch_for

BIT_CLOSE = 1e-4
"""How far outputs may be from the module's, as a share of the largest: rounding in another order, no more (as for `graph`)."""
MOST_ROWS = 64
NOT_IN_NUMPY = frozenset({"BF16"})


def build(artifact: Artifact, config: ExportConfig, samples: Samples, budget: Budget) -> Artifact:
    """The exported file as an artifact that is golden from here on. Raises NotApplicable with the reason."""
    started = time.monotonic()
    source = artifact.source
    if source is None or not source.inputs or not source.outputs:
        raise NotApplicable(
            f"nothing says what {artifact.path.name} takes and gives: declare source.inputs and source.outputs in model.yaml "
            "(a library call: Source(factory, weights, inputs, outputs))"
        )
    signature, rows = _signature(source), _rows(source, samples)
    with torch_for(budget):
        module = load_module(source)
        budget.tick(config.method, "exporting", 0.1)
        path = export(module, signature, rows, budget.folder(config.method) / "model.onnx")
        budget.tick(config.method, "held to the module", 0.8)
        error = max(difference(module, path, signature, part) for part in _parts(rows))
    if error > BIT_CLOSE:
        raise NotApplicable(
            f"the exported file changes the outputs by {error:.2g} of the largest (bit-close is {BIT_CLOSE:g}); a model whose answers rest on "
            "random numbers, or on precision that ONNX Runtime lacks, stays with PyTorch"
        )
    facts = {
        "method": config.method, "factory": source.factory.rpartition("/")[2], "weights": source.weights.name, "opset": OPSET,
        "output_error": error, "tried": min(len(rows), MOST_ROWS), "dynamic": {name: list(axes) for name, axes in signature.free.items() if axes},
        "custom_domains": [], "bytes_before": source.weights.stat().st_size, "bytes": path.stat().st_size,
        "counted": counted(path, rows) if rows.stacked else {}, "seconds": time.monotonic() - started,
    }  # fmt: skip
    made = artifact.derived(path, config.to_json(), facts, Source(source.factory, source.weights))
    budget.tick(config.method, "done", 1.0)
    return replace(made, golden=path)


def _signature(source: Source) -> Signature:
    for name, datatype, _ in (*source.inputs, *source.outputs):
        if datatype in NOT_IN_NUMPY:
            raise NotApplicable(f"{name!r} is declared {datatype}, which is not exported: let the module take and give FP32")
    free = {name: tuple(axis for axis, size in enumerate(shape) if size < 0) for name, _, shape in source.inputs}
    return Signature(tuple(name for name, _, _ in source.inputs), tuple(name for name, _, _ in source.outputs), free)


def _rows(source: Source, samples: Samples) -> Samples:
    """What the file is tried on. Whole calls whose first axis is free, as long as the others' of the call, are rows too."""
    if missing := [name for name, _, _ in source.inputs if name not in samples.inputs]:
        raise NotApplicable(
            f"export needs some inputs to try the file on, and there are none for {missing[0]!r}: name samples in model.yaml"
        )
    inputs = {name: samples.inputs[name] for name, _, _ in source.inputs}
    if samples.stacked:
        return replace(samples, inputs=inputs, labels=None).rows(slice(0, MOST_ROWS))
    calls = {name: values[:MOST_ROWS] for name, values in inputs.items()}
    free = all(shape and shape[0] < 0 for _, _, shape in source.inputs)
    if free and len({values.shape[1] for values in calls.values()}) == 1:
        return Samples({name: values.reshape(-1, *values.shape[2:]) for name, values in calls.items()}).rows(slice(0, MOST_ROWS))
    return Samples(calls, stacked=False)


def _parts(rows: Samples) -> list[Samples]:
    """Batches of rows, or each whole call as it is."""
    if rows.stacked:
        return [rows.rows(slice(at, at + 16)) for at in range(0, len(rows), 16)]
    return [Samples({name: values[at] for name, values in rows.inputs.items()}) for at in range(len(rows))]
