"""What builds are expected to bring and cost, and the order of jobs. Numbers are made up."""

from __future__ import annotations

from typing import Any

import pytest

from app.control.expected import ASKED, expected, harm_of, in_order, rank_of
from app.control.suspicion import Kind, Suspicion
from app.domain import Job, JobState

AVX2, VNNI = "x86_64-avx2-ort1.32.0-cpu", "x86_64-avx2-avx512f-avx512_vnni-ort1.32.0-cpu"
INT8 = ("int8-static",)


def job(identity: str, rank: float = ASKED, at: float = 0.0, model: str = "m", gain: float = 0.0, cpu_s: float = 0.0, **given: Any) -> Job:
    report = {
        "built": [{"try": list(INT8), "version": "1.1"}], "verdicts": [{"version": "1.1", "gain": gain}], "cpu_s": cpu_s,
    }  # fmt: skip
    tries = (({"method": "int8-static"},),)
    return Job(identity, model, "1", "sha", tries, "", "auto", "hone", JobState.FINISHED, at, report=report, rank=rank, **given)


def test_without_jobs_a_rule_of_thumb_by_the_hosts_instructions() -> None:
    slow, fast = (expected([INT8], [], "m", host) for host in (AVX2, VNNI))
    assert fast.gain == 2 * slow.gain > 2 and slow.origin == "a rule of thumb"
    assert "floor" in slow.text and "expected 3.0 × as fast for 40 s" in fast.text
    assert "no answer changes" in expected([("tune",)], [], "m", AVX2).text
    both = expected([INT8, ("graph",)], [], "m", AVX2)
    assert both.gain == slow.gain and both.cpu_s > slow.cpu_s, "the better of the two, and the time of both"
    assert expected([("structured-pruning", "distill", "int8-static")], [], "m", VNNI).cpu_s > 1000


def test_jobs_on_the_model_itself_tell_more_than_those_on_others() -> None:
    other, own = job("a", model="other", gain=0.5, cpu_s=20.0), job("b", gain=0.8, cpu_s=60.0)
    assert expected([INT8], [other], "m", AVX2).gain == pytest.approx(2.0)
    found = expected([INT8], [other, own], "m", AVX2)
    assert found.gain == pytest.approx(5.0) and found.cpu_s == 60.0 and found.origin == "jobs on it"
    tuned = Job(
        "c", "m", "1", "sha", (({"method": "tune"},),), "", "auto", "hone", JobState.FINISHED, 0.0,
        report={"tune": {"gain": {"estimate": 1.4}}, "cpu_s": 12.0},
    )  # fmt: skip
    assert expected([("tune",)], [tuned], "m", AVX2).gain == 1.4


@pytest.mark.parametrize(
    ("kind", "numbers", "share"),
    [
        (Kind.LATENCY, {"missed": 0.6}, 0.6),
        (Kind.LATENCY, {"p95_s": 0.04, "normal_s": 0.01}, 0.75),
        (Kind.COST, {"ratio": 2.0}, 0.5),
        (Kind.REFUSALS, {"refused": 10, "expired": 20, "offered": 100}, 0.3),
        (Kind.FIDELITY, {"agreed": 90, "compared": 100}, 0.1),
        (Kind.MEMORY, {"bytes": 1}, 0.1),
    ],
)
def test_harm_is_the_requests_that_are_out_of_order(kind: Kind, numbers: dict[str, Any], share: float) -> None:
    assert harm_of([Suspicion(kind, "", numbers)], 50.0) == pytest.approx(50 * share)


def test_rank_grows_with_harm_and_gain_and_falls_with_cost() -> None:
    light, heavy = expected([INT8], [], "m", VNNI), expected([("structured-pruning",)], [], "m", VNNI)
    assert rank_of(10.0, light) == 10 * rank_of(1.0, light) > rank_of(10.0, heavy) > 0
    assert rank_of(0.0, light) == 0


def test_the_highest_rank_is_first_and_waiting_counts() -> None:
    asked, urgent, idle = job("asked", at=100.0), job("urgent", 5.0, at=200.0), job("idle", 0.0, at=0.0)
    assert [one.id for one in in_order([idle, asked, urgent], 210.0)] == ["urgent", "asked", "idle"]
    later = job("later", at=1000.0)
    assert [one.id for one in in_order([later, idle], 1000.0)] == ["idle", "later"], "16 minutes count for more than being asked for"
    assert [one.id for one in in_order([job("b", at=50.0), job("a", at=40.0)], 10.0)] == ["a", "b"], (
        "a clock that was set back changes no order"
    )
