"""What is exported of a model: only what is known now, of what answers now, and counters from 0 on."""

from __future__ import annotations

from app.catalog.model_config import ModelConfig
from app.control.diagnosis import Cause, Diagnosis
from app.control.normal import Normal
from app.control.patient import Condition, Incident, Patient
from app.control.standing import begin_at_zero, prune, standing
from app.domain import ModelView, Observation, RuntimeSettings
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window

PROMISE = ModelConfig.model_validate({"task": "classification", "objective": {"p95_ms": 50}})


def view(version: str = "1.1", memory_bytes: int = 0) -> ModelView:
    return ModelView("m", version, 1, RuntimeSettings(), True, memory_bytes, 0, (version,), 0.0)


def served(window: Window, version: str) -> None:
    for _ in range(100):
        window.observe(Observation("m", version, 200, 0.01, 0.0, 0.0, 0.01, 0.0, 1, 1, 0.01, 0.0))
    window.compared("m", version, True)


def test_what_is_not_known_any_more_is_not_shown() -> None:
    metrics, window = Metrics(), Window()
    window.objective("m", 0.05)
    served(window, "1.1")
    standing(window, metrics, view(), PROMISE, Normal(), 0.1)
    shown = ("hone_fidelity_ratio", "hone_drift_score", "hone_slo_attainment_ratio", "hone_burn_rate")
    assert all(metrics.gauges[name] for name in shown), {name: metrics.gauges[name] for name in shown}
    standing(Window(), metrics, view(), ModelConfig(), Normal(), None)
    assert not any(metrics.gauges[name] for name in shown), {name: metrics.gauges[name] for name in shown}


HELD: dict[str, float] = {
    "p95_ms": 50, "p99_ms": 60, "throughput_rps": 200, "error_rate": 0.001, "memory_mb": 64, "cpu_s_per_request": 0.002, "fidelity": 0.99,
    "availability": 0.999,
}  # fmt: skip


def test_all_that_a_model_is_held_to_is_told_with_what_it_is_now() -> None:
    config, window = ModelConfig.model_validate({"task": "classification", "objective": HELD}), Window()
    assert all(one["now"] is one["kept"] is None for one in standing(window, Metrics(), view(), config, Normal(), None)["objectives"])
    window.objective("m", 0.05)
    served(window, "1.1")
    window.observe(Observation("m", "1.1", 500, 0.01, 0.0, 0.0, 0.01, 0.0, 1, 1, 0.01, 0.0))
    window.called("m", "1.1", 100, 64, 0.5, 0.4, 0.0)
    told = standing(window, Metrics(), view(memory_bytes=80 << 20), config, Normal(), None)["objectives"]
    kept = {one["promised"]: (one["now"], one["kept"]) for one in told}
    come = kept.pop("200 requests/s")
    assert come[1] is not None and "requests/s that come" in str(come[0])
    assert list(kept) == [
        "p95 ≤ 50 ms", "p99 ≤ 60 ms", "errors ≤ 0.1%", "memory ≤ 64 MiB", "CPU ≤ 2 ms a request", "agreement ≥ 99%", "answered ≥ 99.9%",
    ]  # fmt: skip
    assert [one[1] for one in kept.values()] == [True, True, False, False, False, True, False]
    assert kept["errors ≤ 0.1%"][0] == "0.9901%" and kept["memory ≤ 64 MiB"][0] == "80 MiB" and kept["agreement ≥ 99%"][0] == "100%"
    assert standing(window, Metrics(), view(), ModelConfig(), Normal(), None)["objectives"] == []


def test_what_does_not_answer_any_more_is_not_shown() -> None:
    metrics = Metrics()
    for model in ("m", "gone"):
        metrics.gauge("hone_model_state", model, "steady", value=1.0)
        metrics.gauge("hone_swap_timestamp_seconds", model, value=5.0)
        for version in ("1", "1.1"):
            metrics.gauge("hone_fidelity_ratio", model, version, value=1.0)
            metrics.gauge("hone_confidence_shift", model, version, "margin", value=0.1)
    prune(metrics, {"m": "1.1"})
    assert dict(metrics.gauges["hone_model_state"]) == {("m", "steady"): 1.0}
    assert list(metrics.gauges["hone_swap_timestamp_seconds"]) == [("m",)]
    assert list(metrics.gauges["hone_fidelity_ratio"]) == [("m", "1.1")]
    assert list(metrics.gauges["hone_confidence_shift"]) == [("m", "1.1", "margin")]


def test_counters_begin_at_zero_and_keep_what_they_counted() -> None:
    metrics = Metrics()
    metrics.count("hone_diagnoses", "m", "load")
    begin_at_zero(metrics, "m")
    assert metrics.counters["hone_diagnoses"][("m", "load")] == 1 and metrics.counters["hone_diagnoses"][("m", "version")] == 0
    assert metrics.counters["hone_rollbacks"][("m", "watch")] == 0 and metrics.counters["hone_verdicts"][("canary", "failed")] == 0
    assert metrics.counters["hone_suspicions"][("m", "errors")] == 0 and metrics.counters["hone_ladder_steps"][("m", "down")] == 0


def test_a_model_is_being_repaired_while_something_is_done_for_it() -> None:
    patient = Patient(incident=Incident(100.0, []))
    assert patient.condition(lambda _: True) is Condition.SUSPICIOUS and Patient().condition(lambda _: True) is Condition.STEADY
    patient.incident = Incident(100.0, [], Diagnosis(Cause.VERSION, 0.8, "large"), acted_at=110.0, unproven=True)
    assert patient.condition(lambda _: False) is Condition.REPAIRING, "whether it helped is not known"
    patient.incident.unproven = False
    assert patient.condition(lambda _: True) is Condition.REPAIRING, "a job is open"
    assert patient.condition(lambda _: False) is Condition.COOLING, "it was looked into again, and nothing is left to do"
