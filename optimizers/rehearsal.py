"""Quantization-aware training: normalizations folded, rounding simulated, the module trained, and its file quantized with what was learned.

The ONNX file is made by the same quantizer as int8-static's; ranges that training did not simulate (sums, poolings) are calibrated.
"""

from __future__ import annotations

import contextlib
import hashlib
import time
from collections.abc import Iterator
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.fake_quantization import Learned, folded, simulate
from optimizers.int8 import Form
from optimizers.layers import weighted_layers
from optimizers.lessons import facts_of
from optimizers.onnx_file import size_of
from optimizers.onnx_graph import constants, load, save
from optimizers.prepare import prepared
from optimizers.qat import QatConfig
from optimizers.qdq import Job, activation_ranges, planned, quantized
from optimizers.samples import Samples
from optimizers.torch_source import Outputs, counted, export, torch_for
from optimizers.trial import Trial, matching
from optimizers.workshop import Workshop

CHUNK: Final = 32
FULL: Final = 127
REDUCED: Final = 64
"""Largest level of a weight: ONNX Runtime's symmetric 8 bits, and its 7 for kernels without VNNI."""


def build(artifact: Artifact, config: QatConfig, form: Form, samples: Samples, budget: Budget) -> Artifact:
    """The artifact in int8. Raises NotApplicable with the reason."""
    started = time.monotonic()
    with torch_for(budget), _slow_attention():
        work = Workshop.open(artifact, config, samples, budget)
        lesson = work.lesson()
        module = folded(work.opened.module, tuple(value[:CHUNK] for value in lesson.held))
        levels = REDUCED if form.reduce_range else FULL
        simulation = simulate(module, _chunks(lesson.inputs, config.rows), levels, config.per_channel, config.learn_steps)
        if not simulation.layers:
            raise NotApplicable("there is no convolution or linear layer of its own weight to quantize")
        with torch.no_grad():
            before = lesson.score(module.eval())[0]
        trained = work.fine_tune(module, lesson, "training", span=(0.1, 0.8))
        learned = simulation.settle()
        plain = export(module, work.opened.signature, work.opened.rows, work.folder / "float.onnx")
    assert trained is not None
    budget.tick(config.method, "quantizing", 0.85)
    job = planned(
        save_and_reload_model_with_shape_infer(prepared(load(plain), work.folder).model), config.int8(), form,
        matching(samples, load(plain), config.rows, config.method), budget, work.folder,
    )  # fmt: skip
    ranges = activation_ranges(job)
    given = _ranges(job, learned)
    model = quantized(job, ranges | given)
    error = Trial.of(job.model, job.samples, work.folder, budget.threads).checked_error(model, "a smaller rate, or more rows")
    path = save(model, work.folder / "model.onnx")
    facts: dict[str, Any] = {
        "method": config.method, "target": form.target, "proven_here": form.here, "reduce_range": form.reduce_range, "per_channel": config.per_channel,
        "calibration_origin": samples.origin, "calibration_samples": len(job.samples), "simulated_layers": len(learned), "learned_ranges": len(given),
        "quantized_layers": len(job.layers), "clipped": _mean([one.clipped for one in learned.values()]),
        "step_factors": {name: round(one.factor, 4) for name, one in learned.items()}, "score_untrained": before,
        "training": {**facts_of(lesson, samples), **trained.facts()}, "seed": budget.seed, "output_error": error,
        "before": counted(artifact.path, work.opened.rows), "after": counted(path, work.opened.rows),
        "bytes_before": size_of(artifact.path), "bytes": size_of(path), "seconds": time.monotonic() - started,
    }  # fmt: skip
    budget.tick(config.method, "done", 1.0)
    return artifact.derived(path, config.to_json(), facts)


def _chunks(inputs: Outputs, rows: int) -> Iterator[Outputs]:
    for at in range(0, min(rows, len(inputs[0])), CHUNK):
        yield tuple(value[at : min(at + CHUNK, rows)] for value in inputs)


def _ranges(job: Job, learned: dict[str, Learned]) -> dict[str, tuple[float, float]]:
    """Activation to learned range: layers of the file are told by their weights, which the file may hold transposed."""
    known = {_fingerprint(one.weight.numpy()): one.range for one in learned.values()}
    weights = constants(job.model.graph)
    found = ((layer.source, known.get(_fingerprint(weights[layer.tensor]))) for layer in weighted_layers(job.model))
    return {source: span for source, span in found if span is not None}


def _fingerprint(weight: NDArray[Any]) -> str:
    return hashlib.sha256(np.sort(weight.astype(np.float32).ravel() + 0.0).tobytes()).hexdigest()


def _mean(values: list[float]) -> float:
    return round(sum(values) / max(1, len(values)), 6)


@contextlib.contextmanager
def _slow_attention() -> Iterator[None]:
    """PyTorch's encoder layers have a fast path that reads weights past their modules, where nothing is simulated."""
    before = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(before)
