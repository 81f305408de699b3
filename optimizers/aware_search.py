"""The search of accuracy-aware int8 (as NNCF's accuracy control): quantize all, give layers back to float by sensitivity, then take back what can be."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from onnx import ModelProto
from onnxruntime.quantization.quant_utils import save_and_reload_model_with_shape_infer

from optimizers.artifact import Artifact
from optimizers.aware import Int8AwareConfig
from optimizers.base import Budget, NotApplicable
from optimizers.census import quantization_of
from optimizers.int8 import Form
from optimizers.onnx_file import size_of
from optimizers.onnx_graph import load, save
from optimizers.prepare import prepared
from optimizers.qdq import activation_ranges, planned, quantized, sensitivity
from optimizers.samples import Samples
from optimizers.trial import LOOKED_AT, Trial, comparable, matching, outputs, rows_of

LEAST_HELD: Final = 16
"""Held-out rows below which agreement says nothing."""
NUMBERS: Final = frozenset({"regression", "embedding"})
"""Tasks whose outputs are no scores of classes."""


@dataclass(frozen=True)
class Found:
    """The layers kept float, the agreement with them, and every set that was tried."""

    kept: tuple[str, ...]
    agreement: float
    tried: tuple[tuple[tuple[str, ...], float], ...]


def build(artifact: Artifact, config: Int8AwareConfig, form: Form, samples: Samples, budget: Budget) -> Artifact:
    """The artifact in int8 but for the layers it takes. Raises NotApplicable with the best that was reached."""
    started = time.monotonic()
    folder = budget.folder(config.method)
    source = load(artifact.path)
    if how := quantization_of(source):
        raise NotApplicable(f"already quantized ({how}): int8-aware needs a float model")
    held, rest = matching(samples, source, config.samples, config.method).split(config.held_out)
    if len(held) < LEAST_HELD or not len(rest):
        raise NotApplicable(
            f"{len(held)} of {len(held) + len(rest)} samples are held out, and at least {LEAST_HELD} are needed: give more samples"
        )
    ready = prepared(source, folder)
    job = planned(save_and_reload_model_with_shape_infer(ready.model), config.int8(), form, rest, budget, folder)
    ranges = activation_ranges(job)
    trial = Trial.of(job.model, rest, folder, budget.threads)
    calls = [rows_of(held, start) for start in range(0, len(held), LOOKED_AT if held.stacked else 1)]
    judges = Trial.many(job.model, calls, folder, budget.threads)
    models: dict[tuple[str, ...], ModelProto] = {}

    def agreement(kept: tuple[str, ...]) -> float:
        budget.tick(config.method, f"{len(kept)} layers in float", 0.7)
        models.clear()
        models[kept] = quantized(job, ranges, keep=kept)
        return agreement_of(models[kept], judges, artifact.task)

    found = search(lambda: list(sensitivity(job, ranges, trial)), agreement, config.floor, min(config.most, len(job.layers) - 1))
    model = models.get(found.kept) or quantized(job, ranges, keep=found.kept)
    path = save(model, folder / "model.onnx")
    facts = {
        "method": config.method, "target": form.target, "proven_here": form.here, "reduce_range": form.reduce_range, "floor": config.floor,
        "agreement": found.agreement, "held_out": len(held), "kept_float": sorted({*config.exclude, *found.kept}), "tried": found.tried,
        "quantized_layers": len(job.layers) - len(found.kept), "calibration": config.calibration, "calibration_samples": len(rest),
        "calibration_origin": samples.origin, "calibration_hashes": [*rest.hashes(), *held.hashes()], "output_error": trial.error(model),
        "prepared": ready.facts, "bytes_before": size_of(artifact.path), "bytes": size_of(path), "seconds": time.monotonic() - started,
    }  # fmt: skip
    budget.tick(config.method, "done", 1.0)
    return artifact.derived(path, config.to_json(), facts)


def search(ranked: Callable[[], Sequence[str]], agreement: Callable[[tuple[str, ...]], float], floor: float, most: int) -> Found:
    """The smallest set of layers, found by giving back the worst first and then taking back, that reaches `floor`.

    `ranked` gives the layers, worst first, and is asked only if it must be. Raises NotApplicable where `most` layers are not enough.
    """
    kept: tuple[str, ...] = ()
    tried = {kept: agreement(kept)}
    order = ranked() if tried[kept] < floor and most > 0 else []
    for layer in order[:most]:
        kept = (*kept, layer)
        tried[kept] = agreement(kept)
        if tried[kept] >= floor:
            break
    if tried[kept] < floor:
        best = max(tried, key=lambda each: tried[each])
        raise NotApplicable(
            f"agreement reaches {tried[best]:.1%} with {len(best)} layers in float ({', '.join(best) or 'none'}), and the floor is {floor:.1%}"
        )
    for layer in kept[:-1]:
        without = tuple(other for other in kept if other != layer)
        tried[without] = agreement(without)
        kept = without if tried[without] >= floor else kept
    return Found(kept, tried[kept], tuple(tried.items()))


def agreement_of(model: ModelProto, trials: Sequence[Trial], task: str) -> float:
    """Mean over the rows of how far the first output says what the float model says. Raises NotApplicable as `comparable` does."""
    first = trials[0]
    answers = outputs(model, [trial.feeds for trial in trials], first.folder, first.threads)
    for trial, seen in zip(trials, answers, strict=True):
        comparable(model, trial.reference, seen)
    numbers = task in NUMBERS
    return float(np.concatenate([same(trial.reference[0], seen[0], numbers) for trial, seen in zip(trials, answers, strict=True)]).mean())


def same(expected: NDArray[Any], seen: NDArray[Any], numbers: bool = False) -> NDArray[np.float64]:
    """By row: the share of places with the same best class; for `numbers`, or a single one, 1 − |error| relative to the largest, at least 0."""
    expected, seen = (np.atleast_1d(values) for values in (expected, seen))
    if expected.dtype.kind != "f":
        return np.asarray((expected == seen).reshape(len(expected), -1).mean(axis=1))
    axis = 1 if expected.ndim == 4 else -1
    if expected.ndim > 1 and expected.shape[axis] > 1 and not numbers:
        agreed = expected.argmax(axis) == seen.argmax(axis)
        return np.asarray(agreed.reshape(len(expected), -1).mean(axis=1))
    errors = np.abs(seen - expected).reshape(len(expected), -1).mean(axis=1)
    return np.asarray(np.maximum(1 - errors / (np.abs(expected).max() or 1.0), 0.0))
