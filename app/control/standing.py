"""How one model does over five minutes, as facts for people and gauges for Prometheus. It decides nothing."""

from __future__ import annotations

from typing import Final

from app.catalog.model_config import ModelConfig
from app.control.objectives import burn
from app.control.suspicion import LEAST_CALLS, Normal, cost_ratio
from app.domain import JSON, ModelView
from app.telemetry.metrics import Metrics
from app.telemetry.window import Block, Window

LATELY_S: Final = 300.0


def standing(window: Window, metrics: Metrics, view: ModelView, config: ModelConfig, normal: Normal, drift: float | None) -> JSON:
    """Merges many blocks: call it once for each that closes."""
    name, promise = view.name, config.objective.promise
    lately = window.since(name, view.active, window.now() - LATELY_S)
    facts: JSON = {
        "p95_s": lately.total.quantile(0.95), "requests_per_s": round(lately.requests / LATELY_S, 3), "drift": drift, "trend": _trend(window, view, lately),
        "fidelity": {"agreed": lately.agreed, "compared": lately.compared} if lately.compared else None,
        "cost_ratio": cost_ratio(lately, normal) if normal.known else None, "objective": promise.text if promise is not None else "",
    }  # fmt: skip
    if lately.compared:
        metrics.gauge("hone_fidelity_ratio", name, view.active, value=lately.agreed / lately.compared)
    if drift is not None:
        metrics.gauge("hone_drift_score", name, value=drift)
    if promise is not None and lately.requests:
        facts["attained"] = round(lately.within / lately.requests, 5)
        metrics.gauge("hone_slo_attainment_ratio", name, value=lately.within / lately.requests)
        rates = burn(promise.share, lambda seconds: window.good_and_bad(name, seconds)).rates
        facts["burn"] = {f"{seconds:.0f}": rate for seconds, rate in rates.items()}
        for seconds, rate in rates.items():
            if rate is not None:
                metrics.gauge("hone_burn_rate", name, f"{seconds:.0f}", value=rate)
    return facts


def _trend(window: Window, view: ModelView, older: Block) -> float | None:
    """p95 of the last minute over that of five (`older`); None without enough answers."""
    newest = window.since(view.name, view.active, window.now() - 60)
    if newest.requests < LEAST_CALLS or older.requests < 2 * newest.requests:
        return None
    first, last = older.total.quantile(0.95), newest.total.quantile(0.95)
    return last / first if first and last else None
