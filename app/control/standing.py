"""How one model does over five minutes, as facts for people and gauges for Prometheus. It decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Final

from app.catalog.model_config import ModelConfig
from app.control.diagnosis import Cause
from app.control.normal import BASE_LABELS, LEAST_CALLS, Normal, cost_ratio, shape_shift
from app.control.objectives import burn, held_to
from app.control.quality import LEAST_OF_CLASS, LEAST_PAIRS
from app.control.suspicion import Kind
from app.domain import JSON, ModelView, Verdict
from app.telemetry.block import Block
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window

LATELY_S: Final = 300.0
CLASSES_SHOWN: Final = 20
OF_MODELS: Final = (
    "hone_model_state", "hone_swap_timestamp_seconds", "hone_ladder_rung", "hone_shape_shift_ratio", "hone_drift_score",
    "hone_slo_attainment_ratio", "hone_burn_rate",
)  # fmt: skip
OF_VERSIONS: Final = ("hone_fidelity_ratio", "hone_class_fidelity_ratio", "hone_confidence_shift")
"""Gauges that are set one by one, whose first label is the model, and of the latter the second the version."""


def standing(window: Window, metrics: Metrics, view: ModelView, config: ModelConfig, normal: Normal, drift: float | None) -> JSON:
    """Merges many blocks: call it once for each that closes."""
    name, promise = view.name, config.objective.promise
    lately = window.since(name, view.active, window.now() - LATELY_S)
    facts: JSON = {
        "p95_s": lately.total.quantile(0.95), "phases_p95_s": window.phases(name, view.active, 0.95), "requests_per_s": round(window.rate(name, LATELY_S), 3), "drift": drift, "trend": _trend(window, view, lately),
        "fidelity": {"agreed": lately.agreed, "compared": lately.compared} if lately.compared else None,
        "availability": round(lately.requests / lately.offered, 5) if lately.offered else None,
        "cost_ratio": cost_ratio(lately, normal) if normal.known else None, "objectives": held_to(config.objective, lately, view.memory_bytes),
    }  # fmt: skip
    if lately.labelled:
        usual = round(normal.right / normal.labelled, 4) if normal.labelled >= BASE_LABELS else None
        facts["labels"] = {"right": lately.right, "labelled": lately.labelled, "usual": usual}
    metrics.gauge("hone_fidelity_ratio", name, view.active, value=lately.agreed / lately.compared if lately.compared else None)
    _sureness(metrics, view, lately, facts)
    shapes = shape_shift(lately, normal)
    if shapes is not None:
        facts["shape_shift"] = round(shapes, 3)
    metrics.gauge("hone_shape_shift_ratio", name, value=shapes)
    metrics.gauge("hone_drift_score", name, value=drift)
    attained: float | None = None
    rates: dict[float, float | None] = {}
    if promise is not None and lately.requests:
        attained = lately.within / lately.requests
        rates = burn(promise.share, lambda seconds: window.good_and_bad(name, seconds)).rates
        facts["attained"], facts["burn"] = round(attained, 5), {f"{seconds:.0f}": rate for seconds, rate in rates.items()}
    metrics.gauge("hone_slo_attainment_ratio", name, value=attained)
    for window_s in {labels[1] for labels in metrics.gauges["hone_burn_rate"] if labels[0] == name} | {f"{s:.0f}" for s in rates}:
        metrics.gauge("hone_burn_rate", name, window_s, value=next((rate for s, rate in rates.items() if f"{s:.0f}" == window_s), None))
    return facts


def begin_at_zero(metrics: Metrics, model: str) -> None:
    """Show what may come to be counted for a model before it is: a counter that is born at 1 hides this first from Prometheus's increase()."""
    kinds = (
        ("hone_suspicions", [kind.value for kind in Kind]), ("hone_diagnoses", [cause.value for cause in Cause]),
        ("hone_rollbacks", ["watch", "killers", *(cause.value for cause in Cause)]), ("hone_ladder_steps", ["down", "up"]),
    )  # fmt: skip
    for name, values in kinds:
        for value in values:
            metrics.count(name, model, value, by=0.0)
    for stage in ("offline", "canary", "watch"):
        for verdict in Verdict:
            metrics.count("hone_verdicts", stage, verdict.value, by=0.0)


def prune(metrics: Metrics, active: Mapping[str, str]) -> None:
    """Take back what is shown of models and versions that do not answer any more. `active`: the version that does, by model."""
    for family in (*OF_MODELS, *OF_VERSIONS):
        shown = metrics.gauges[family]
        gone = [one for one in shown if one[0] not in active or (family in OF_VERSIONS and one[1] != active[one[0]])]
        for labels in gone:
            del shown[labels]


def _sureness(metrics: Metrics, view: ModelView, lately: Block, facts: JSON) -> None:
    """Agreement by golden's class, the lowest first, and how much less sure than golden it is; only of the version that answers now."""
    groups = [(group, *counts) for group, counts in lately.likeness.groups.items() if counts[1] >= LEAST_OF_CLASS]
    worst = sorted(groups, key=lambda one: one[1] / one[2])[:CLASSES_SHOWN]
    kept = [(labels, value) for labels, value in metrics.gauges["hone_class_fidelity_ratio"].items() if labels[0] != view.name]
    shown = [((view.name, view.active, str(group)), agreed / compared) for group, agreed, compared in worst]
    metrics.replace_gauge("hone_class_fidelity_ratio", [*kept, *shown])
    if worst:
        facts["classes"] = [{"class": group, "agreed": agreed, "compared": compared} for group, agreed, compared in worst]
    likeness = lately.likeness
    if likeness.entropy.count >= LEAST_PAIRS:
        facts["entropy_shift"], facts["margin_shift"] = round(likeness.entropy.effect, 3), round(likeness.margin.effect, 3)
    for figure in ("entropy", "margin"):
        metrics.gauge("hone_confidence_shift", view.name, view.active, figure, value=facts.get(f"{figure}_shift"))


def _trend(window: Window, view: ModelView, older: Block) -> float | None:
    """p95 of the last minute over that of five (`older`); None without enough answers."""
    newest = window.since(view.name, view.active, window.now() - 60)
    if newest.requests < LEAST_CALLS or older.requests < 2 * newest.requests:
        return None
    first, last = older.total.quantile(0.95), newest.total.quantile(0.95)
    return last / first if first and last else None
