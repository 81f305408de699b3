"""The levels of graph optimization as files: built, held to the unoptimized answers, and timed in pairs against the file as it is served.

A baked file is served without further optimization, so that what was measured is what runs: `facts['serve']` and the file itself say so.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from onnx import ModelProto, helper

from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.difference import difference, scales_of
from optimizers.graph import GraphConfig
from optimizers.host import host_class, parse_target
from optimizers.inputs import find_maker
from optimizers.measure import Arm, ArmFailed, compare, interval_json
from optimizers.offline import save_optimized
from optimizers.onnx_file import RUNTIME_DOMAINS, SERVE_AT, STANDARD_DOMAINS, graphs, size_of
from optimizers.onnx_graph import load, save
from optimizers.prepare import tidy_domains
from optimizers.running import ORT_ERRORS, RunRefused, brief, raise_if_memory, runner
from optimizers.sameness import same_model
from optimizers.samples import Samples
from optimizers.session import Feeds, Settings, open_session, tensors
from optimizers.stats import Interval

BIT_CLOSE: Final = 1e-4
"""How far outputs may be from the unoptimized ones, as a share of the largest: rounding in another order, no more."""
SERVED: Final = Settings(graph_level="none")
SECONDS_EACH: Final = 10.0
HOST_SPECIFIC: Final = frozenset({"com.microsoft.nchwc", "com.ms.internal.nhwc"})


@dataclass(frozen=True)
class Variant:
    """One optimized file, and how long each call takes relative to the parent as it is served (CPU time; None: not timed)."""

    name: str
    path: Path
    error: float
    fused: dict[str, int]
    ratio: Interval | None = None

    def gains(self, least: float) -> bool:
        """Whether it was shown to save this share of the time."""
        return self.ratio is not None and self.ratio.high < 1 - least


def build(artifact: Artifact, config: GraphConfig, samples: Samples, budget: Budget) -> Artifact:
    """The best variant as an artifact. Raises NotApplicable with what was measured."""
    started = time.monotonic()
    folder = budget.folder(config.method)
    source = load(artifact.path)
    feeds = feeds_for(artifact.path, source, samples, budget.seed)
    plain = save(source, folder / "plain.onnx")
    here = not budget.target or parse_target(budget.target).isa == host_class().isa
    variants, dropped = _variants(plain, config, feeds, folder, budget, here)
    if not variants:
        raise NotApplicable("graph optimization changes nothing" + "".join(f"; {name}: {why}" for name, why in dropped.items()))
    incumbent = Settings.from_json(artifact.extra.get("settings"))
    row = feeds_for(artifact.path, source, samples, budget.seed, rows=1) if here else feeds
    timed = _timed(artifact.path, incumbent, variants, row, budget) if here else variants
    best = fastest(timed, config.least_gain)
    if config.level == "auto" and here and not best.gains(config.least_gain):
        raise NotApplicable(
            f"{no_gain(timed)}: CPU time relative to the file as it is served (level {incumbent.graph_level}): {told(timed)}"
        )
    path = best.path.rename(folder / "model.onnx")
    built = load(path)
    facts = {
        "method": config.method, "level": best.name, "output_error": best.error, "fused": best.fused, "measured": {v.name: interval_json(v.ratio) for v in timed if v.ratio},
        "dropped": dropped, "serve": {"graph_level": "none"}, "custom_domains": _custom_domains(built), "portable": not _host_specific(built),
        "target": host_class().key, "proven_here": here, "nodes_before": len(source.graph.node), "nodes": len(built.graph.node),
        "bytes_before": size_of(artifact.path), "bytes": size_of(path), "seconds": time.monotonic() - started,
    }  # fmt: skip
    budget.tick(config.method, "done", 1.0)
    made = artifact.derived(path, config.to_json(), facts)
    return replace(made, extra={**made.extra, "settings": {**incumbent.to_json(), "graph_level": "none"}})


def feeds_for(path: Path, model: ModelProto, samples: Samples, seed: int, rows: int = 4) -> Feeds:
    """A few rows to run (a whole call where samples are such): of the samples, else made up. Raises NotApplicable where the model takes none of them."""
    if len(samples):
        return {name: values[:rows] if samples.stacked else values[0] for name, values in samples.inputs.items()}
    try:
        session = open_session(path, SERVED)
        inputs, run = tensors(session.get_inputs()), runner(session)
        maker = find_maker(inputs, model.graph, lambda feeds: (run(feeds), None)[1], seed)
    except (*ORT_ERRORS, RunRefused) as error:
        raise_if_memory(error)
        raise NotApplicable(f"no samples, and no input could be made up that the model accepts: {brief(error)}") from None
    return maker.rows(rows if all(info.shape and not isinstance(info.shape[0], int) for info in inputs) else 1)


def _variants(
    plain: Path, config: GraphConfig, feeds: Feeds, folder: Path, budget: Budget, here: bool
) -> tuple[list[Variant], dict[str, str]]:
    """Files that differ from the source and from each other and keep the answers; and why others were dropped."""
    levels = [level for level in ("basic", "extended", "all") if config.level in {"auto", level} and (here or level != "all")]
    sources: dict[str, tuple[Path, dict[str, int]]] = {"": (plain, {})}
    dropped: dict[str, str] = {}
    if config.fusions and _has_attention(load(plain)):
        try:
            sources["fusions+"] = _fused(plain, folder / "fused.onnx")
        except (*ORT_ERRORS, ImportError, KeyError, AttributeError, AssertionError) as error:
            raise_if_memory(error)
            dropped["fusions"] = brief(error)
    expected = runner(open_session(plain, SERVED))(feeds)
    kept: list[Variant] = []
    for prefix, (source, fused) in sources.items():
        for level in levels:
            name = f"{prefix}{level}"
            budget.tick(config.method, name, 0.1 + 0.3 * len(kept) / 6)
            try:
                path = _tidied(save_optimized(source, folder / f"{name}.onnx", level))
                off = _error(path, feeds, expected)
            except NotApplicable as reason:
                dropped[name] = str(reason)
                continue
            if off > BIT_CLOSE:
                dropped[name] = f"changes the outputs by {off:.2g} (bit-close is {BIT_CLOSE:g})"
            elif same := next((other for other in (plain, *(v.path for v in kept)) if same_model(path, other)), None):
                dropped[name] = "changes nothing" if same == plain else f"is the same as {same.stem}"
            else:
                kept.append(Variant(name, path, off, fused))
    return kept, dropped


def _error(path: Path, feeds: Feeds, expected: list[Any]) -> float:
    try:
        return difference(expected, runner(open_session(path, SERVED))(feeds), scales_of(expected))
    except ORT_ERRORS as error:
        raise_if_memory(error)
        raise NotApplicable(f"the optimized graph does not work: {brief(error)}") from None


def _timed(parent: Path, incumbent: Settings, variants: list[Variant], row: Feeds, budget: Budget) -> list[Variant]:
    """Each variant with its CPU time relative to the parent as it is served, one quiet thread each, in turns."""
    timed: list[Variant] = []
    with Arm(parent, incumbent.one_quiet_thread()) as first:
        for index, variant in enumerate(variants):
            budget.tick("graph", f"timing {variant.name}", 0.4 + 0.5 * index / len(variants))
            try:
                with Arm(variant.path, SERVED) as other:
                    seconds = max(1.0, min(SECONDS_EACH, budget.left_s / 4))
                    compared = compare(first, other, row, seconds=seconds, tick=lambda: budget.tick("graph", "timing", 0.5))
            except ArmFailed as failure:
                raise NotApplicable(f"timing failed: {failure}") from None
            timed.append(replace(variant, ratio=compared.cpu))
    return timed


def fastest(variants: list[Variant], least_gain: float) -> Variant:
    """Of those that were shown to gain, else of all: what was measured on a loud host without bounds may be anything."""
    shown = [variant for variant in variants if variant.gains(least_gain)]
    return min(shown or variants, key=lambda v: v.ratio.estimate if v.ratio else 1.0)


def told(variants: list[Variant]) -> str:
    return ", ".join(f"{v.name} {v.ratio.estimate:.2f} ({v.ratio.low:.2f} to {v.ratio.high:.2f})" for v in variants if v.ratio)


def no_gain(variants: list[Variant]) -> str:
    """An interval without an end says that the host was too loud, and nothing about the variant."""
    loud = any(v.ratio and not math.isfinite(v.ratio.high) for v in variants)
    return "no gain to be seen, as the host was too busy to measure" if loud else "no gain"


def _has_attention(model: ModelProto) -> bool:
    kinds = Counter(node.op_type for node in model.graph.node)
    return (
        bool(kinds["MatMul"] >= 2 and (kinds["Softmax"] or kinds["Erf"] or kinds["LayerNormalization"] or kinds["ReduceMean"] >= 2))
        and not kinds["Conv"]
    )


def _fused(source: Path, target: Path) -> tuple[Path, dict[str, int]]:
    """Transformer blocks fused by ONNX Runtime's own tool; heads and width are read off the graph. Raises ImportError without sympy."""
    from onnxruntime.transformers.optimizer import optimize_model

    fused = optimize_model(str(source), model_type="bert", num_heads=0, hidden_size=0, opt_level=0)
    model: ModelProto = fused.model
    if "com.microsoft" not in {entry.domain for entry in model.opset_import}:
        model.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    counts = {name: int(count) for name, count in fused.get_fused_operator_statistics().items() if count}
    return save(model, target), counts


def _tidied(path: Path) -> Path:
    model = load(path)
    tidy_domains(model)
    model.producer_name, model.producer_version = "hone", ""
    helper.set_model_props(model, {**{prop.key: prop.value for prop in model.metadata_props}, SERVE_AT: SERVED.graph_level})
    return save(model, path)


def _domains(model: ModelProto) -> set[str]:
    return {node.domain for graph in graphs(model.graph) for node in graph.node}


def _custom_domains(model: ModelProto) -> list[str]:
    """Domains outside the standard: the file then needs ONNX Runtime."""
    return sorted((_domains(model) & RUNTIME_DOMAINS) - STANDARD_DOMAINS)


def _host_specific(model: ModelProto) -> bool:
    return bool(_domains(model) & HOST_SPECIFIC)
