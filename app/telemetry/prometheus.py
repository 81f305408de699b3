"""Shows app.telemetry.metrics in Prometheus's text form. The only importer of prometheus_client; knows names and help texts."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from itertools import accumulate
from typing import Final

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from app.telemetry.metrics import PHASES, Histogram, Metrics

VERSION: Final = ["model", "version"]
COUNTERS: Final[dict[str, tuple[str, list[str]]]] = {
    "hone_rejections": ("Requests refused before they ran.", ["model", "reason"]),
    "hone_swaps": ("Changes of the active version or its settings.", ["model", "outcome"]),
    "hone_jobs": ("Finished jobs.", ["optimizer", "outcome"]),
    "hone_model_cpu_seconds": ("CPU time of the version's runner processes.", VERSION),
    "hone_model_yielding_seconds": (
        "Time in which the version gave way to lighter models, as it takes more than its share of the cores.",
        VERSION,
    ),
    "hone_runner_deaths": ("Runner processes that died or were ended because they hung.", ["model", "version", "reason"]),
    "hone_nonfinite_outputs": ("Answers with NaN or infinity in them.", VERSION),
    "hone_labelled_answers": ("Answers whose true label came later, by whether they were right.", [*VERSION, "answer"]),
    "hone_store_errors": ("Calls of the journal that failed.", ["operation"]),
    "hone_background_seconds": (
        "Time in which Hone's own work (verifying, tuning, replay, probes, comparing answers with golden's) ran beside the traffic.",
        ["kind"],
    ),
    "hone_suspicions": ("Times that something looked wrong with a model.", ["model", "kind"]),
    "hone_diagnoses": ("Times that something was blamed on a cause.", ["model", "cause"]),
    "hone_verdicts": ("Judgements of candidates.", ["stage", "verdict"]),
    "hone_ladder_steps": ("Steps of the brown-out ladder, by direction.", ["model", "direction"]),
    "hone_rollbacks": ("Times that the loop went back to a version before.", ["model", "reason"]),
    "hone_events": ("Events that the data plane of this process (loading, runners, the repository) wrote to the journal.", ["kind"]),
}
GAUGES: Final[dict[str, tuple[str, list[str]]]] = {
    "hone_queue_depth": ("Requests waiting for a runner.", VERSION),
    "hone_inflight_requests": ("Requests accepted and not yet answered.", VERSION),
    "hone_model_memory_bytes": ("Proportional set size of the version's runner.", VERSION),
    "hone_model_info": ("What each loaded version is; always 1.", ["model", "version", "optimizer", "precision"]),
    "hone_model_ready": ("1 where the model has an active version that answers.", ["model"]),
    "hone_swap_timestamp_seconds": ("When the active version last changed.", ["model"]),
    "hone_server_ready": ("1 once the first reconciliation is done and until shutdown begins.", []),
    "hone_store_up": ("1 while the journal answers and takes what is written.", []),
    "hone_cores": ("Cores that models may use here.", []),
    "hone_host_info": ("Class of this host; always 1.", ["host_class"]),
    "hone_event_loop_lag_seconds": ("How late the event loop ran its last timer.", []),
    "hone_model_state": ("1 for what the loop is about with the model.", ["model", "state"]),
    "hone_fidelity_ratio": ("Share of the rows of compared live answers that agree with golden, over five minutes.", VERSION),
    "hone_class_fidelity_ratio": (
        "Share of compared live rows that agree with golden, by golden's class; the twenty lowest classes, over five minutes.",
        ["model", "version", "class"],
    ),
    "hone_confidence_shift": (
        "Paired shift of entropy and margin against golden, in standard deviations of golden's own; over five minutes.",
        ["model", "version", "figure"],
    ),
    "hone_shape_shift_ratio": ("Distance of the mix of row sizes from the normal one: 0 the same, 1 nothing in common.", ["model"]),
    "hone_ladder_rung": ("1 while a faster version answers because of load.", ["model"]),
    "hone_drift_score": ("How far the predicted classes are from the reference's (population stability index).", ["model"]),
    "hone_slo_attainment_ratio": ("Share of answers within the model's latency objective, over five minutes.", ["model"]),
    "hone_burn_rate": ("How many times faster than allowed the model misses its objective, by window in seconds.", ["model", "window"]),
    "hone_host_ratio": ("Shares of the cores' time: busy, others (not ours), steal, throttled.", ["kind"]),
    "hone_host_pressure_ratio": ("Pressure stall information: share of ten seconds in which somebody waited.", ["resource"]),
    "hone_worker_busy": ("1 while the worker builds.", []),
}
HISTOGRAMS: Final[dict[str, tuple[str, list[str]]]] = {
    "hone_model_load_duration_seconds": ("From the decision to load a version until it could answer.", ["model"]),
    "hone_swap_duration_seconds": ("From the pointer's change until the old version was drained.", ["model"]),
    "hone_recovery_duration_seconds": ("From the first suspicion until all was well again.", ["model", "cause"]),
    "hone_job_duration_seconds": ("From a job's request to its end.", ["optimizer"]),
}


class HoneCollector(Collector):
    """Renders one Metrics. `loaded` tells which (model, version) are loaded now, so that others may leave the export."""

    def __init__(self, metrics: Metrics, loaded: Callable[[], set[tuple[str, str]]]) -> None:
        self._metrics = metrics
        self._loaded = loaded

    def collect(self) -> Iterator[Metric]:
        for refresh in self._metrics.before_scrape:
            refresh()
        self._metrics.retire(self._loaded())
        yield from self._requests()
        for name, (text, labels) in COUNTERS.items():
            counter = CounterMetricFamily(name, text, labels=labels)
            for key, value in list(self._metrics.counters[name].items()):
                counter.add_metric(key, value)
            yield counter
        for name, (text, labels) in GAUGES.items():
            gauge = GaugeMetricFamily(name, text, labels=labels)
            for key, value in list(self._metrics.gauges[name].items()):
                gauge.add_metric(key, value)
            yield gauge
        for name, (text, labels) in HISTOGRAMS.items():
            family = HistogramMetricFamily(name, text, labels=labels)
            for key, histogram in list(self._metrics.histograms[name].items()):
                _add(family, key, histogram)
            yield family

    def _requests(self) -> Iterator[Metric]:
        requests = CounterMetricFamily("hone_requests", "Finished requests by HTTP status.", labels=[*VERSION, "code"])
        duration = HistogramMetricFamily("hone_request_duration_seconds", "From first byte read to answer encoded.", labels=VERSION)
        phase = HistogramMetricFamily("hone_phase_duration_seconds", "Time of a request in each phase.", labels=[*VERSION, "phase"])
        batch = HistogramMetricFamily("hone_batch_size", "Rows per call of the model.", labels=VERSION)
        rows = CounterMetricFamily("hone_inferences", "Rows answered.", labels=VERSION)
        within = CounterMetricFamily("hone_requests_within_objective", "Answers within the model's latency objective.", labels=["model"])
        judged = CounterMetricFamily(
            "hone_requests_with_objective", "Answers judged against the model's latency objective.", labels=["model"]
        )
        for row in list(self._metrics.rows.values()):
            key = [row.model, row.version]
            for code, count in sorted(row.codes.items()):
                requests.add_metric([*key, str(code)], count)
            if row.version:
                _add(duration, key, row.duration)
                for name, histogram in zip(PHASES, row.phases, strict=True):
                    _add(phase, [*key, name], histogram)
                _add(batch, key, row.batch)
                rows.add_metric(key, row.rows)
        for model, objective in list(self._metrics.objectives.items()):
            within.add_metric([model], objective.within)
            judged.add_metric([model], objective.total)
        yield from (requests, duration, phase, batch, rows, within, judged)


def _add(family: HistogramMetricFamily, labels: list[str] | tuple[str, ...], histogram: Histogram) -> None:
    edges = [*(str(float(edge)) for edge in histogram.edges), "+Inf"]
    family.add_metric(list(labels), list(zip(edges, accumulate(histogram.counts), strict=True)), histogram.total)


class Exporter:
    """The text that GET /metrics answers."""

    def __init__(self, metrics: Metrics, loaded: Callable[[], set[tuple[str, str]]]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(HoneCollector(metrics, loaded))

    def render(self, accept: str) -> tuple[bytes, str]:
        """(body, content type) in the form that `accept` asks for."""
        encode, content_type = choose_encoder(accept)
        return encode(self._registry), content_type
