"""Shows app.telemetry.metrics in Prometheus's text form, bit by bit. The only importer of prometheus_client; knows names and help texts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import accumulate
from typing import Final, TypeVar

from prometheus_client import CollectorRegistry, PlatformCollector, ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import choose_encoder
from prometheus_client.registry import Collector

from app.telemetry.metrics import LADDER, PHASES, Histogram, Metrics

_T = TypeVar("_T")

VERSION: Final = ["model", "version"]
COUNTERS: Final[dict[str, tuple[str, list[str]]]] = {
    "hone_rejections": ("Requests refused before they ran.", ["model", "reason"]),
    "hone_swaps": ("Changes of the active version or its settings.", ["model", "outcome"]),
    "hone_jobs": ("Finished jobs.", ["optimizer", "outcome"]),
    "hone_model_cpu_seconds": ("CPU time of the version's runner processes.", VERSION),
    "hone_model_yielding_seconds": (
        "Time in which the version gave way to lighter models, as it takes more than its share of the cores or is asked for more than it can answer.",
        VERSION,
    ),
    "hone_runner_deaths": ("Runner processes that died or were ended because they hung.", ["model", "version", "reason"]),
    "hone_nonfinite_outputs": ("Answers with NaN or infinity in them.", VERSION),
    "hone_nonfinite_inputs": ("Of those the ones whose request held some itself: what came of it is the caller's.", VERSION),
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
_END: Final = b"# EOF\n"
"""What OpenMetrics ends with."""


PIECE: Final = 160
"""Samples that are made and written at once: about a millisecond in which the event loop answers nobody."""


class HoneCollector(Collector):
    """Renders one Metrics, large families in pieces. `loaded` tells which (model, version) are loaded now, so that others may leave the export."""

    def __init__(self, metrics: Metrics, loaded: Callable[[], set[tuple[str, str]]]) -> None:
        self._metrics = metrics
        self._loaded = loaded

    def collect(self) -> Iterator[Metric]:
        metrics = self._metrics
        for refresh in metrics.before_scrape:
            refresh()
        metrics.retire(self._loaded())
        yield from self._requests()
        for name, (text, labels) in COUNTERS.items():
            yield from _values(CounterMetricFamily, name, text, labels, metrics.counters[name].items())
        for name, (text, labels) in GAUGES.items():
            yield from _values(GaugeMetricFamily, name, text, labels, metrics.gauges[name].items())
        for name, (text, labels) in HISTOGRAMS.items():
            yield from _histograms(name, text, labels, metrics.histograms[name].items())

    def _requests(self) -> Iterator[Metric]:
        rows = [((row.model, row.version), row) for row in self._metrics.rows.values()]
        answered = [(key, row) for key, row in rows if row.version]
        objectives = list(self._metrics.objectives.items())
        codes = [((*key, str(code)), count) for key, row in rows for code, count in sorted(row.codes.items())]
        phases = [((*key, name), one) for key, row in answered for name, one in zip(PHASES, row.phases, strict=True)]
        yield from _values(CounterMetricFamily, "hone_requests", "Finished requests by HTTP status.", [*VERSION, "code"], codes)
        yield from _histograms(
            "hone_request_duration_seconds",
            "From first byte read to answer encoded.",
            VERSION,
            [(key, row.duration) for key, row in answered],
        )
        yield from _histograms("hone_phase_duration_seconds", "Time of a request in each phase.", [*VERSION, "phase"], phases)
        yield from _histograms("hone_batch_size", "Rows per call of the model.", VERSION, [(key, row.batch) for key, row in answered])
        yield from _values(CounterMetricFamily, "hone_inferences", "Rows answered.", VERSION, [(key, row.rows) for key, row in answered])
        for name, text, of in (
            ("hone_requests_within_objective", "Answers within the model's latency objective.", "within"),
            ("hone_requests_with_objective", "Answers judged against the model's latency objective.", "total"),
        ):
            yield from _values(CounterMetricFamily, name, text, ["model"], [((model,), getattr(one, of)) for model, one in objectives])


def _values(
    kind: type[CounterMetricFamily | GaugeMetricFamily], name: str, text: str, labels: list[str], found: Iterable[tuple[tuple[str, ...], float]]
) -> Iterator[Metric]:  # fmt: skip
    """A family in pieces; one without samples where there are none."""
    for piece in _pieces(list(found), 1):
        family = kind(name, text, labels=labels)
        for key, value in piece:
            family.add_metric(key, value)
        yield family


def _histograms(name: str, text: str, labels: list[str], found: Iterable[tuple[tuple[str, ...], Histogram]]) -> Iterator[Metric]:
    for piece in _pieces(list(found), len(LADDER) + 3):
        family = HistogramMetricFamily(name, text, labels=labels)
        for key, one in piece:
            edges = [*(str(float(edge)) for edge in one.edges), "+Inf"]
            family.add_metric(key, list(zip(edges, accumulate(one.counts), strict=True)), one.total)
        yield family


def _pieces(found: list[_T], samples: int) -> Iterator[list[_T]]:
    """`found`, whose elements have so many samples each, in parts of PIECE samples."""
    size = max(1, PIECE // samples)
    yield found[:size]
    for at in range(size, len(found), size):
        yield found[at : at + size]


class _One(Collector):
    """A single family, for encoders that want a registry."""

    def __init__(self, family: Metric) -> None:
        self._family = family

    def collect(self) -> Iterator[Metric]:
        yield self._family


class Exporter:
    """The text that GET /metrics answers."""

    def __init__(self, metrics: Metrics, loaded: Callable[[], set[tuple[str, str]]]) -> None:
        self._registry = CollectorRegistry(auto_describe=False)
        ProcessCollector(registry=self._registry)
        PlatformCollector(registry=self._registry)
        self._registry.register(HoneCollector(metrics, loaded))

    def render(self, accept: str) -> tuple[bytes, str]:
        """(body, content type) in the form that `accept` asks for."""
        pieces, content_type = self.pieces(accept)
        return b"".join(pieces), content_type

    def pieces(self, accept: str) -> tuple[Iterator[bytes], str]:
        """The same bit by bit: with many models the whole takes longer than a request may wait."""
        encode, content_type = choose_encoder(accept)
        return self._encoded(encode), content_type

    def _encoded(self, encode: Callable[[Collector], bytes]) -> Iterator[bytes]:
        name, end = "", b""
        for family in self._registry.collect():
            text = encode(_One(family))
            if text.endswith(_END):
                text, end = text.removesuffix(_END), _END
            yield _without_head(text) if family.name == name else text
            name = family.name
        yield end


def _without_head(text: bytes) -> bytes:
    """Samples of a family whose help and type stand above already."""
    while text.startswith(b"# "):
        text = text.partition(b"\n")[2]
    return text
