"""When the loop looks: tables of blocks in, suspicions out; no clock, no process."""

from __future__ import annotations

from dataclasses import replace

import pytest

from app.catalog.model_config import ModelConfig
from app.control.diagnosis import Cause, diagnose
from app.control.normal import Normal, learned, with_news
from app.control.objectives import Burn, burn
from app.control.patient import Looks, Patient
from app.control.suspicion import Kind, Seen, leap_of_latency, suspicions
from app.telemetry.block import Block
from app.telemetry.hostfacts import HostFacts
from tests.blocks import BUCKET, QUIET, block, findings, normal


def look(
    blocks: list[Block], config: ModelConfig | None = None, lately: Block | None = None, memory: int = 30 << 20, burning: Burn | None = None
) -> list[Kind]:
    config = config or ModelConfig()
    seen = Seen(blocks, lately or Block(0.0, 300.0), memory, 0)
    return [one.kind for one in suspicions(seen, normal(), config, burning)]


def test_nothing_is_suspected_while_all_is_as_ever_or_neighbours_move_cost_a_little() -> None:
    assert look([block(), block()]) == []
    assert look([block(0.00108), block(0.00108)]) == []


def test_every_quantile_that_is_promised_is_watched_also_beside_the_one_that_is_counted() -> None:
    tailed = block()
    for _ in range(8):
        tailed.total.add(0.1)
    for objective, found in (
        ({"p50_ms": 5, "p95_ms": 10, "p99_ms": 200}, []), ({"p50_ms": 5, "p95_ms": 10, "p99_ms": 50}, [Kind.LATENCY]),
        ({"p50_ms": 2, "p95_ms": 10, "p99_ms": 200}, [Kind.LATENCY]),
    ):  # fmt: skip
        assert look([tailed, tailed], ModelConfig.model_validate({"objective": objective})) == found


def test_cost_is_suspected_only_when_two_undisturbed_blocks_agree() -> None:
    assert look([block(0.0012), block(0.0012)]) == [Kind.COST]
    assert look([block(0.0012), block()]) == []
    assert look([block(), block(0.0012)]) == []
    assert look([block(0.0012), block(0.0012, disturbed=True)]) == []


def test_cost_that_leaps_is_suspected_in_the_first_block_that_shows_it() -> None:
    assert look([block(0.0016)]) == [Kind.COST]
    assert look([block(), block(0.0016)]) == [Kind.COST]
    assert look([block(0.0016, requests=30)]) == [], "too few calls"
    assert look([block(0.0016, disturbed=True)]) == []
    assert look([block(0.0016), block()]) == [], "it is over"


@pytest.mark.parametrize(
    ("deaths", "kills", "cause"),
    [(3, 0, Cause.VERSION), (5, 2, Cause.VERSION), (3, 3, Cause.HOST), (5, 3, Cause.HOST), (3, 1, None), (4, 2, None), (2, 0, None)],
)
def test_only_three_ends_of_its_own_in_five_minutes_are_a_version_s_fault(deaths: int, kills: int, cause: Cause | None) -> None:
    seen = Seen([block()], Block(0.0, 300.0), 30 << 20, deaths, kills)
    found = suspicions(seen, normal(), ModelConfig(), None)
    assert [one.kind for one in found] == ([] if cause is None else [Kind.DEATHS])
    if cause is not None:
        assert diagnose(replace(findings([Kind.DEATHS]), suspicions=found, began_with_version=True)).cause is cause


def leaps(seen: Block, host: HostFacts = QUIET, usual: Normal | None = None) -> bool:
    promised = ModelConfig.model_validate({"objective": {"p95_ms": 10}})
    found = leap_of_latency(seen, usual or normal(), promised.objective.promise, host)
    assert found is None or (found.kind is Kind.LATENCY and "threshold_s" not in found.numbers), (
        "no such thing as a version too slow as ever"
    )
    return found is not None


def test_time_that_leaps_for_the_runner_alone_is_suspected_in_the_first_block_that_shows_it() -> None:
    assert leaps(block(stretch=6.0, within=120))
    assert not leaps(block(stretch=6.0, within=160)), "too few are late"
    assert not leaps(block(stretch=6.0, within=10, requests=30)), "too few answers"
    assert not leaps(block(stretch=6.0, within=120, disturbed=True))
    assert not leaps(block(stretch=6.0, within=120), usual=Normal()), "nothing is known of it"
    unpromised = block(stretch=6.0, total_s=0.012)
    assert leap_of_latency(unpromised, normal(), None, QUIET) is not None
    assert leap_of_latency(block(stretch=6.0, total_s=0.006), normal(), None, QUIET) is None


def test_a_version_that_gets_slower_and_so_rests_less_is_suspected_all_the_same() -> None:
    """By the rest before its calls they would be of a kind never met, and become normal."""
    slow = block(0.0013)
    slow.costs = {(0, 13, 0): slow.costs.pop(BUCKET)}
    assert look([slow, slow]) == [Kind.COST]
    assert with_news(normal(), slow).costs == normal().costs


def test_time_that_leaps_for_the_server_as_well_or_in_the_queue_is_left_to_the_second_block() -> None:
    late = block(stretch=6.0, within=120)
    assert leaps(late, replace(QUIET, server_waiting_ratio=0.4)), "it waits by far more than the server"
    assert not leaps(late, replace(QUIET, server_waiting_ratio=0.8)), "neighbours hold up both"
    assert not leaps(late, replace(QUIET, throttled_ratio=0.2)) and not leaps(late, replace(QUIET, steal_ratio=0.2))
    assert not leaps(block(stretch=1.2, within=0, queue_s=200 * 0.1)), "load alone: the calls are as quick as ever"
    unknown = replace(QUIET, server_waiting_ratio=None)
    assert not leaps(block(stretch=6.0, within=120, wait_s=200 * 0.005), unknown), "no witness: its waiting is the host's"
    assert leaps(late, unknown), "it neither works nor waits for a core"
    assert not leaps(late, usual=normal(stretch=4.0)), "it always took so long for its CPU time"


def test_a_leap_of_time_stands_once_the_host_was_read_again_and_is_forgotten_when_it_is_over() -> None:
    patient = Patient()
    assert not patient.leap_stands(True, 100.0, 99.0), "what was read before it began knows nothing of it"
    assert not patient.leap_stands(True, 101.0, 99.0) and patient.leap_stands(True, 101.5, 101.2)
    assert not patient.leap_stands(False, 102.0, 101.2) and not patient.leap_stands(True, 103.0, 101.2)


def test_wall_time_is_held_to_the_promise_and_without_one_to_twice_its_normal() -> None:
    promised = ModelConfig.model_validate({"objective": {"p95_ms": 3}})
    assert look([block(within=150), block(within=150)], promised) == [Kind.LATENCY]
    assert look([block(within=195), block(within=150)], promised) == []
    burning = Burn({}, True)
    assert look([block(within=185), block(within=185)], promised, burning=burning) == [Kind.LATENCY]
    assert look([block(within=199), block(within=199)], promised, burning=burning) == [], "what is over needs no look"
    assert look([block(within=120), block(within=199)], promised, burning=burning) == [], "nor is what the newest block no longer shows"
    assert look([block(total_s=0.012), block(total_s=0.012)]) == [Kind.LATENCY]
    assert look([block(total_s=0.006), block(total_s=0.006)]) == []
    assert look([block(requests=5, total_s=0.1), block(requests=5, total_s=0.1)]) == []


def test_a_median_that_is_promised_can_be_missed_as_well() -> None:
    promised = ModelConfig.model_validate({"objective": {"p50_ms": 3}})
    assert look([block(within=40), block(within=40)], promised) == [Kind.LATENCY]
    assert look([block(within=60), block(within=60)], promised) == []
    assert burn(0.5, lambda seconds: (20, 80)).fires and not burn(0.5, lambda seconds: (30, 70)).fires
    assert burn(0.95, lambda seconds: (27, 73)).fires
    assert leap_of_latency(block(stretch=6.0, within=40), normal(), promised.objective.promise, QUIET) is not None


def test_with_few_requests_burn_rates_tell_and_the_last_two_blocks_alone_do_not() -> None:
    promised, few, lately = (
        ModelConfig.model_validate({"objective": {"p95_ms": 3}}),
        block(requests=8, within=0),
        Block(0.0, 300.0, requests=300),
    )
    assert look([few, few], promised, lately, burning=Burn({}, True)) == [Kind.LATENCY]
    assert look([few, few], promised, lately, burning=Burn({}, False)) == []
    assert look([few, block(requests=8, within=8)], promised, lately, burning=Burn({}, True)) == [], "it is over"
    assert look([few, few], promised, Block(0.0, 300.0, requests=10), burning=Burn({}, True)) == [], "no data"


def test_every_objective_is_held() -> None:
    def held(objective: dict[str, float], seen: list[Block], lately: Block | None = None) -> list[Kind]:
        return look(seen, ModelConfig.model_validate({"objective": objective}), lately)

    assert block(0.001).cpu_s == pytest.approx(0.2, rel=0.1), "1 ms for each of 200 requests"
    assert held({"cpu_s_per_request": 0.0008}, [block(), block()]) == [Kind.COST]
    assert held({"cpu_s_per_request": 0.0012}, [block(), block()]) == []
    assert held({"cpu_s_per_request": 0.0008}, [block(), block(0.0005)]) == []
    assert held({"throughput_rps": 21}, [block(refused=20), block(refused=20)]) == [Kind.REFUSALS, Kind.REFUSALS], "20 of 22 a second"
    assert held({"throughput_rps": 21}, [block(), block()]) == [], "as many do not come"
    assert held({"throughput_rps": 19}, [block(refused=3), block(refused=3)]) == []
    bad = Block(0.0, 300.0, requests=900, refused=100)
    assert held({"availability": 0.99}, [block(refused=1)], bad) == [Kind.REFUSALS]
    assert held({"availability": 0.99}, [block(failures=1)], Block(0.0, 300.0, requests=900, failures=100)) == [Kind.ERRORS]
    assert held({"availability": 0.99}, [block()], bad) == [], "what is over needs no look"
    assert held({"availability": 0.85}, [block(refused=1)], bad) == []


def test_faults_refusals_memory_and_fidelity_are_seen_at_once() -> None:
    assert look([block(failures=10)]) == [Kind.ERRORS]
    assert look([block(failures=2)]) == []
    assert look([block(non_finite=1)]) == [Kind.NON_FINITE]
    assert look([block(refused=20)]) == [Kind.REFUSALS]
    assert look([block()], memory=500 << 20) == [Kind.MEMORY]
    classifier = ModelConfig.model_validate({"task": "classification"})
    assert look([block()], classifier, Block(0.0, 300.0, compared=300, agreed=280)) == [Kind.FIDELITY]
    assert look([block()], classifier, Block(0.0, 300.0, compared=300, agreed=299)) == []
    assert look([block()], classifier, Block(0.0, 300.0, compared=10, agreed=5)) == []


def test_requests_that_expire_are_a_sign_of_load_and_never_the_versions_fault() -> None:
    late = block(expired=60, queue_s=200 * 0.003)
    assert look([late, late]) == [Kind.REFUSALS] and look([block(expired=3)]) == []
    available = ModelConfig.model_validate({"objective": {"availability": 0.99}})
    assert set(look([late], available, Block(0.0, 300.0, requests=900, expired=100))) == {Kind.REFUSALS}
    found = diagnose(findings([Kind.REFUSALS], late, host=replace(QUIET, busy_ratio=0.99)))
    assert found.cause is Cause.LOAD and "60 expired" in found.text
    assert learned(Normal(), late, 1) == Normal() and learned(Normal(), block(expired=1), 1) != Normal()


def test_a_model_that_fails_on_most_requests_is_suspected_and_blamed_only_where_it_is_new() -> None:
    failing, lately = block(requests=10, failed_calls=40), Block(0.0, 300.0, requests=10, failed_calls=40)
    assert look([failing], lately=lately) == [Kind.ERRORS]
    assert look([failing], lately=Block(0.0, 300.0, requests=900, failed_calls=40)) == [], "it answered others until a moment ago"
    few = block(requests=2, failed_calls=9)
    assert look([few], lately=Block(0.0, 300.0, requests=2, failed_calls=9)) == [], "too few"
    assert look([few], lately=lately) == [Kind.ERRORS], "and of a quiet model enough in five minutes"
    (found,) = suspicions(Seen([failing], lately, 0, 0), normal(), ModelConfig(), None)
    for new, of in ((True, Cause.VERSION), (False, Cause.UNKNOWN)):
        assert diagnose(replace(findings([]), suspicions=[found], began_with_version=new)).cause is of


def test_errors_of_a_quiet_model_count_over_five_minutes() -> None:
    """Two a block, and all of them failed: no block held three, so that nothing was ever suspected."""
    lately = Block(0.0, 300.0, requests=0, failures=120)
    assert look([block(requests=0, failures=2)], lately=lately) == [Kind.ERRORS]
    assert look([block(requests=2)], lately=lately) == [], "it is over"
    assert look([block(requests=200, failures=1)], lately=lately) == [], "of a busy one the newest block tells"


def test_what_is_normal_is_learned_from_quiet_blocks_alone() -> None:
    for odd in (block(disturbed=True), block(requests=5), block(failures=1), block(refused=1)):
        assert learned(Normal(), odd, 1) == Normal()
    assert not learned(Normal(), block(), 1).known


def test_two_windows_must_burn_and_few_answers_are_no_data() -> None:
    assert burn(0.95, lambda seconds: (5, 5)).rates[300.0] is None
    fast = burn(0.99, lambda seconds: (700, 300))
    assert fast.fires and fast.rates[300.0] == pytest.approx(30.0)
    short_only = burn(0.99, lambda seconds: (70, 30) if seconds <= 300 else (100_000, 30))
    assert not short_only.fires


def test_looks_in_vain_wait_ever_longer_but_not_for_what_is_new() -> None:
    looks, slow = Looks(), frozenset({Kind.LATENCY})
    assert looks.due(slow, 0.0)
    looks.in_vain(slow, 100.0, 2.0, 2)
    assert not looks.due(slow, 159.0) and looks.due(slow, 160.0)
    assert looks.due(frozenset({Kind.LATENCY, Kind.ERRORS}), 101.0), "errors were not looked into"
    looks.in_vain(slow, 160.0, 2.0, 2)
    assert not looks.due(slow, 279.0) and looks.due(slow, 280.0)
    looks.in_vain(slow, 280.0, 60.0, 2)
    assert not looks.due(slow, 579.0) and looks.due(slow, 581.0), "experiments take a tenth of the cores' time at most"
    looks.in_vain(slow, 10_000.0, 2.0, 2)
    assert looks.due(slow, 10_061.0), "an hour later it is another matter"
    dear = frozenset({Kind.COST})
    looks.in_vain(dear, 10_001.0, 2.0, 2)
    assert not looks.due(dear, 10_050.0) and not looks.due(slow, 10_050.0), "two kinds in turns wait as well"
    for _ in range(20):
        looks.in_vain(slow, looks.not_before, 2.0, 2)
    assert looks.count == 21
