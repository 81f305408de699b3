"""What a reply means to those who share a batch: each gets its part of the outputs, or what went wrong in words, and who counts a report.

It knows neither queues nor runners.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from app.domain import OWN, InferenceResult
from app.errors import HoneError, InvalidRequest, ModelFailed, NotReady
from app.serving.exchange import Batch, Reply
from app.serving.layout import split
from app.serving.runners import RunnerSpec


@dataclass(frozen=True, slots=True)
class BatchReport:
    """What one finished batch cost, for those who count. Seconds; `queue_s` has one entry per request."""

    rows: int
    row_bytes: int
    requests: int
    compute_s: float
    cpu_s: float
    wait_s: float
    queue_s: tuple[float, ...]


def hand_out(spec: RunnerSpec, batch: Batch, reply: Reply, observer: Callable[[BatchReport], None] | None) -> bool:
    """Give everybody who still waits its part of the outputs, and `observer` the report.

    False, and nothing is given, where an output has not one row for each input row.
    """
    rows = batch.rows
    answers = split(batch.work, reply.described, reply.data, rows)
    if answers is None:
        return False
    for work, outputs in zip(batch.work, answers, strict=True):
        if work.future.done():
            continue
        share = work.rows / rows
        cpu_s, wait_s = reply.cpu_s * share, reply.wait_s * share
        work.future.set_result(
            InferenceResult(outputs, spec.model, spec.version, spec.generation, work.queue_s, reply.compute_s, rows, cpu_s, wait_s)
        )
    if observer is not None and not (len(batch.work) == 1 and batch.work[0].request.caller == OWN):
        queue_s = tuple([work.queue_s for work in batch.work])
        row_bytes = batch.plan.payload // (rows or 1)  # without the gaps between inputs, which small rows hardly notice in a batch
        observer(BatchReport(rows, row_bytes, len(batch.work), reply.compute_s, reply.cpu_s, reply.wait_s, queue_s))
    return True


def failure_of(name: str, reply: Reply) -> HoneError:
    """What a request that ran alone is told where `name`, the version, failed on it."""
    if reply.failed == "InvalidRequest":
        return InvalidRequest(reply.text)
    if reply.failed == "OutOfMemory":
        return NotReady(f"{name} had no memory left for this request ({reply.text}); try again, or send less at once")
    return ModelFailed(f"{name} failed on this request: {reply.text}")
