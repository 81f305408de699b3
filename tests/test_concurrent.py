"""Verdicts on a canary, each from facts of both sides alone; what Kayenta's users complained of is here by name."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from app.control.concurrent import ArmFacts, Policy, judge
from app.domain import Verdict

MANY = 400


def times(median_s: float, count: int = MANY, spread: float = 0.2, seed: int = 0) -> tuple[float, ...]:
    return tuple(float(v) for v in np.random.default_rng(seed).lognormal(math.log(median_s), spread, count))


def arm(cpu_s: float = 0.004, latency_s: float = 0.006, count: int = MANY, seed: int = 0, **facts: Any) -> ArmFacts:
    return ArmFacts(count, latencies_s=times(latency_s, count, 0.4, seed), cpu_s_per_row=times(cpu_s, count, 0.1, seed + 1), **facts)


INCUMBENT = arm()


def test_a_faster_candidate_passes_and_the_text_says_by_how_much() -> None:
    found = judge(INCUMBENT, arm(cpu_s=0.0016, latency_s=0.003, seed=5))
    assert found.verdict is Verdict.PASSED
    assert found.text.startswith("CPU time per row -60% [-6") and "0 of 400 requests failed" in found.text
    assert found.numbers["cpu_ratio"]["high"] < 0.42 and found.numbers["candidate"]["requests"] == MANY
    json.dumps(found.numbers, allow_nan=False)


def test_an_equal_candidate_passes() -> None:
    assert judge(INCUMBENT, arm(seed=7)).verdict is Verdict.PASSED


def test_a_slower_candidate_fails_by_cpu_and_latency_together() -> None:
    found = judge(INCUMBENT, arm(cpu_s=0.0052, latency_s=0.008, seed=9))
    assert found.verdict is Verdict.FAILED and "it is slower: CPU time per row +29% [" in found.text


def test_wall_time_alone_never_fails_a_candidate() -> None:
    found = judge(INCUMBENT, arm(latency_s=0.025, seed=9))
    assert found.verdict is Verdict.PASSED and "wall time alone" in found.text


def test_cpu_time_that_latency_does_not_show_is_neither_passed_nor_failed() -> None:
    found = judge(INCUMBENT, arm(cpu_s=0.0052, seed=9))
    assert found.verdict is Verdict.INCONCLUSIVE and "does not show it" in found.text


def test_no_traffic_is_no_data_and_few_points_are_inconclusive() -> None:
    assert judge(INCUMBENT, ArmFacts()).verdict is Verdict.NO_DATA
    assert "no request went to the incumbent" in judge(ArmFacts(), arm()).text
    few = judge(INCUMBENT, arm(cpu_s=0.03, latency_s=0.1, count=49))
    assert few.verdict is Verdict.INCONCLUSIVE and "49 requests of the candidate, 50 are needed" in few.text
    assert judge(INCUMBENT, arm(cpu_s=0.03, latency_s=0.1, count=50)).verdict is Verdict.FAILED


def test_near_the_effect_it_waits_for_more() -> None:
    near = judge(arm(count=60), arm(cpu_s=0.0044, latency_s=0.0066, count=60, seed=3))
    assert near.verdict is Verdict.INCONCLUSIVE and "is not told from +10%" in near.text


@pytest.mark.parametrize(
    ("mine", "theirs", "verdict"),
    [(0, 0, Verdict.PASSED), (20, 0, Verdict.FAILED), (20, 20, Verdict.PASSED), (2, 0, Verdict.PASSED), (4, 1, Verdict.INCONCLUSIVE)],
)
def test_errors(mine: int, theirs: int, verdict: Verdict) -> None:
    assert judge(replace(INCUMBENT, errors=theirs), replace(arm(seed=4), errors=mine)).verdict is verdict


def test_what_fails_every_request_fails_before_there_are_fifty_and_one_error_does_not() -> None:
    assert judge(INCUMBENT, ArmFacts(5, errors=5)).verdict is Verdict.FAILED
    assert judge(INCUMBENT, ArmFacts(1, errors=1)).verdict is Verdict.INCONCLUSIVE


def test_deaths_count_from_the_third_on() -> None:
    assert judge(INCUMBENT, replace(arm(seed=4), deaths=2)).verdict is Verdict.PASSED
    assert judge(INCUMBENT, ArmFacts(3, deaths=3)).text == "its process died 3 times"


def test_answers_that_are_no_numbers_fail_unless_the_incumbent_gives_as_many() -> None:
    assert judge(INCUMBENT, replace(arm(seed=4), non_finite=1)).verdict is Verdict.FAILED
    assert judge(replace(INCUMBENT, non_finite=9), replace(arm(seed=4), non_finite=9)).verdict is Verdict.PASSED
    assert judge(replace(INCUMBENT, non_finite=1), replace(arm(seed=4), non_finite=90)).verdict is Verdict.FAILED


def test_fidelity_fails_by_its_upper_bound_and_doubts_by_its_estimate() -> None:
    policy = Policy(fidelity_floor=0.99)
    for agreements, compared, verdict in ((100, 100, Verdict.PASSED), (990, 1000, Verdict.PASSED), (985, 1000, Verdict.INCONCLUSIVE),
                                          (900, 1000, Verdict.FAILED), (0, 2, Verdict.INCONCLUSIVE), (0, 0, Verdict.PASSED)):  # fmt: skip
        found = judge(INCUMBENT, replace(arm(seed=4), agreements=agreements, compared=compared), policy)
        assert found.verdict is verdict, (agreements, compared, found.text)
    assert judge(INCUMBENT, replace(arm(seed=4), agreements=0, compared=90)).verdict is Verdict.PASSED, "without a floor it only tells"


def test_memory_above_its_objective_fails() -> None:
    fat = replace(arm(seed=4), memory_bytes=300 << 20)
    assert judge(INCUMBENT, fat, Policy(memory_limit_bytes=256 << 20)).text == "it takes 300 MiB of memory, the objective is 256 MiB"
    assert judge(INCUMBENT, fat).verdict is Verdict.PASSED


def test_some_calls_that_cost_far_more_are_seen_behind_a_faster_middle() -> None:
    """Three in ten took seven times as long; the middle said -60 %."""
    quick, slow = times(0.0016, 280, 0.1, 9), times(0.016, 120, 0.1, 10)
    found = judge(INCUMBENT, replace(arm(seed=4), cpu_s_per_row=quick + slow))
    assert found.verdict is Verdict.FAILED and "some of its calls cost far more: mean CPU time per row +4" in found.text
    assert judge(INCUMBENT, replace(arm(seed=4), cpu_s_per_row=quick[:60] + (0.2,))).verdict is not Verdict.FAILED, (
        "one call of 61 is an accident"
    )


def test_agreement_is_told_from_answers_enough_or_not_at_all() -> None:
    policy = Policy(fidelity_floor=0.99, least_compared=100)
    few = judge(INCUMBENT, replace(arm(seed=4), agreements=20, compared=20), policy)
    assert few.verdict is Verdict.INCONCLUSIVE and "20 of its answers were held to golden's, 100 are needed" in few.text
    assert judge(INCUMBENT, replace(arm(seed=4), agreements=100, compared=100), policy).verdict is Verdict.PASSED
    assert judge(INCUMBENT, arm(seed=4), policy).verdict is Verdict.PASSED, "large requests are never asked again"


def test_a_class_below_its_floor_fails_though_the_whole_agrees() -> None:
    found = judge(INCUMBENT, replace(arm(seed=4), agreements=390, compared=400, class_below_floor="agrees with golden on 2 of 30"))
    assert found.verdict is Verdict.FAILED and "2 of 30" in found.text


def test_zeros_ties_and_what_is_no_number() -> None:
    """Zero means, all ties, NaN: Kayenta's issues 420, 633 and its noise for ties."""
    tied = ArmFacts(MANY, latencies_s=(0.01,) * MANY, cpu_s_per_row=(0.004,) * MANY)
    assert judge(tied, tied).verdict is Verdict.PASSED
    zeros = replace(tied, cpu_s_per_row=(0.0,) * MANY)
    assert judge(zeros, zeros).verdict is Verdict.PASSED
    assert judge(zeros, replace(tied, latencies_s=(0.1,) * MANY)).verdict is Verdict.FAILED
    dirty = replace(arm(seed=2), cpu_s_per_row=(math.nan,) * 380 + (0.004,) * 20)
    found = judge(INCUMBENT, dirty)
    assert found.verdict is Verdict.INCONCLUSIVE and "20 CPU times of the candidate" in found.text
    json.dumps(found.numbers, allow_nan=False)
    json.dumps(judge(INCUMBENT, ArmFacts()).numbers, allow_nan=False)


def test_a_sixfold_candidate_does_not_pass_for_lack_of_points() -> None:
    assert judge(INCUMBENT, arm(cpu_s=0.03, latency_s=0.045, count=30)).verdict is Verdict.INCONCLUSIVE


def test_equal_arms_hardly_ever_fail_and_twenty_percent_is_found() -> None:
    verdicts = [judge(arm(seed=3 * i), arm(count=80, seed=3 * i + 1000)).verdict for i in range(60)]
    assert Verdict.FAILED not in verdicts and verdicts.count(Verdict.PASSED) >= 58
    slower = [judge(arm(seed=3 * i), arm(0.0048, 0.0078, 200, 3 * i + 1000)).verdict for i in range(60)]
    assert slower.count(Verdict.FAILED) >= 50 and Verdict.PASSED not in slower
