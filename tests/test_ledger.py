"""Core tokens: who runs, who waits, and that one model's flood is not another's drought."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic, perf_counter

import numpy as np
import pytest

from app.domain import RuntimeSettings
from app.errors import NotReady
from app.serving.engine import Engine, RunnerSpec
from app.serving.forkserver import ForkServer
from app.serving.ledger import PATIENCE_S, RECENT_S, Account, CoreLedger
from tests import models
from tests.engines import anyio_backend, forkserver, request

__all__ = ["anyio_backend", "forkserver"]


def nobody() -> None:
    """A wake-up call for an account that is driven by hand."""


def take(ledger: CoreLedger, account: Account, threads: int = 1, now: float = 100.0, expected_s: float = 0.01) -> int:
    return ledger.take(account, threads, expected_s, now)


def test_a_batch_takes_as_many_tokens_as_threads_but_never_more_than_there_are_cores() -> None:
    ledger = CoreLedger(2)
    account = ledger.join("a", nobody)
    assert take(ledger, account, threads=8) == 2
    ledger.give(account, 2, 0.01, 0.01, 100.0)
    assert ledger.running == 0


def test_a_model_alone_runs_as_many_batches_as_it_has_instances() -> None:
    ledger = CoreLedger(2)
    account = ledger.join("a", nobody)
    assert [take(ledger, account) for _ in range(5)] == [1] * 5


def heavy_and(ledger: CoreLedger, now: float = 100.0) -> Account:
    """An account that has used both cores for seconds and still holds them."""
    heavy = ledger.join("heavy", nobody)
    for step in range(40):
        take(ledger, heavy, now=now - 4 + step / 10)
        ledger.give(heavy, 1, 0.01, 0.2, now - 4 + step / 10)
    take(ledger, heavy, now=now)
    take(ledger, heavy, now=now)
    return heavy


def test_cores_whose_calls_give_way_are_free_for_others() -> None:
    ledger = CoreLedger(2)
    flooded, light = ledger.join("flooded", nobody), ledger.join("light", nobody)
    assert take(ledger, flooded) and take(ledger, flooded)
    assert take(ledger, light), "it used less than its share"
    assert not take(ledger, light), "its share is one core of two"
    flooded.yields = True
    assert take(ledger, light)
    assert not take(ledger, light), "there are two cores"
    ledger.give(flooded, 1, 0.01, 0.01, 100.0)
    assert not take(ledger, flooded), "who gives way takes no core that somebody computes on"


def test_a_light_model_need_not_wait_for_a_heavy_ones_batch() -> None:
    ledger = CoreLedger(2)
    heavy = heavy_and(ledger)
    light = ledger.join("light", nobody)
    assert take(ledger, light) == 1
    assert take(ledger, light) == 0, "one batch beyond the tokens, not more"
    assert take(ledger, heavy) == 0, "and none for the heavy one"


def test_of_two_heavy_models_the_one_that_has_used_less_is_next() -> None:
    ledger = CoreLedger(1)
    woken: list[str] = []
    accounts = {name: ledger.join(name, lambda name=name: woken.append(name)) for name in "abc"}  # type: ignore[misc]
    now = 100.0
    for name, used in (("a", 3.0), ("b", 1.0), ("c", 2.0)):
        assert take(ledger, accounts[name], now=now)
        ledger.give(accounts[name], 1, 0.01, used, now)
    busy = ledger.join("busy", nobody)
    assert take(ledger, busy, now=now)
    woken.clear()
    assert [take(ledger, accounts[name], now=now) for name in "abc"] == [0, 0, 0]
    ledger.give(busy, 1, 0.01, 0.01, now)
    assert woken == ["b"]


def test_one_that_returns_from_idleness_has_saved_up_no_credit() -> None:
    ledger = CoreLedger(1)
    sleeper, worker = ledger.join("sleeper", nobody), ledger.join("worker", nobody)
    for step in range(50):
        take(ledger, worker, now=100.0 + step)
        ledger.give(worker, 1, 0.01, 1.0, 100.0 + step)
    take(ledger, sleeper, now=150.0)
    assert sleeper.vtime >= worker.vtime - 1.1


@pytest.mark.parametrize("weight", [1.0, 2.0])
def test_a_weight_of_two_is_twice_the_cpu_time(weight: float) -> None:
    simulation = Simulation(cores=1)
    simulation.add("a", cost_s=0.010, weight=weight)
    simulation.add("b", cost_s=0.003)
    simulation.run(30.0)
    assert simulation.used["a"] / simulation.used["b"] == pytest.approx(weight, rel=0.15)


def test_a_batch_of_all_cores_is_not_starved_by_batches_of_one() -> None:
    simulation = Simulation(cores=2)
    simulation.add("wide", cost_s=0.010, threads=2)
    for name in ("b", "c", "d"):
        simulation.add(name, cost_s=0.004, instances=2)
    simulation.run(20.0)
    assert simulation.batches["wide"] > 100
    assert simulation.used["wide"] > 0.5 * simulation.used["b"]


def test_more_threads_than_cores_do_not_deadlock() -> None:
    simulation = Simulation(cores=2)
    simulation.add("a", cost_s=0.010, threads=16)
    simulation.add("b", cost_s=0.010, threads=3)
    simulation.run(5.0)
    assert min(simulation.batches.values()) > 50


def test_one_that_withdraws_or_closes_lets_the_next_one_by() -> None:
    ledger = CoreLedger(2)
    woken: list[str] = []
    holder = heavy_and(ledger)
    wide = ledger.join("wide", nobody)
    wide.pay(9.0, 100.0)
    narrow = ledger.join("narrow", lambda: woken.append("narrow"))
    narrow.pay(9.0, 100.0)
    narrow.vtime = wide.vtime + 5
    assert take(ledger, wide, threads=2) == 0
    assert take(ledger, narrow) == 0
    ledger.give(holder, 1, 0.01, 0.01, 100.0)
    assert woken == [], "a token is kept for the wide one, which is next"
    wide.vtime = 0.0
    ledger.withdraw(wide, 100.0)
    assert woken == ["narrow"]
    ledger.close(holder, 100.0)
    assert ledger.running == 0


def test_waiting_is_bounded_for_the_one_that_is_next() -> None:
    ledger = CoreLedger(1)
    heavy_and(ledger)
    patient = ledger.join("patient", nobody)
    patient.pay(9.0, 100.0)
    assert take(ledger, patient) == 0
    assert take(ledger, patient, now=100.0 + PATIENCE_S * 2) in {0, 1}


def test_company_is_forgotten_after_a_while() -> None:
    ledger = CoreLedger(2)
    one, other = ledger.join("one", nobody), ledger.join("other", nobody)
    take(ledger, one, now=100.0)
    assert not ledger.has_company(one, 100.0)
    take(ledger, other, now=100.1)
    ledger.give(other, 1, 0.0, 0.01, 100.2)
    assert ledger.has_company(one, 100.3)
    assert not ledger.has_company(one, 100.3 + RECENT_S)


def test_alone_it_costs_next_to_nothing() -> None:
    ledger = CoreLedger(2)
    account = ledger.join("a", nobody)
    others = [ledger.join(str(n), nobody) for n in range(50)]
    began = perf_counter()
    for _ in range(2000):
        account.give(account.take(1, 0.001), 0.001, 0.001)
    assert (perf_counter() - began) / 2000 < 100e-6
    assert len(others) == 50


@dataclass(eq=False)
class Running:
    account: Account
    tokens: int
    cost_s: float
    left_s: float


@dataclass
class Simulation:
    """Models that always have work, on a clock of its own: what the ledger grants shares the cores as a kernel would share them."""

    cores: int
    now: float = 1000.0
    used: dict[str, float] = field(default_factory=dict)
    batches: dict[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.ledger = CoreLedger(self.cores)
        self.running: list[Running] = []
        self.free: dict[str, int] = {}
        self.starters: dict[str, tuple[Account, int, float]] = {}

    def add(self, name: str, cost_s: float, threads: int = 1, instances: int = 1, weight: float = 1.0) -> None:
        account = self.ledger.join(name, lambda: self.start(name), weight)
        self.starters[name] = (account, threads, cost_s)
        self.free[name] = instances
        self.used[name] = 0.0
        self.batches[name] = 0

    def start(self, name: str) -> None:
        account, threads, cost_s = self.starters[name]
        while self.free[name]:
            tokens = self.ledger.take(account, threads, cost_s, self.now)
            if not tokens:
                return
            self.free[name] -= 1
            self.running.append(Running(account, tokens, cost_s, cost_s))
        self.ledger.withdraw(account, self.now)

    def run(self, seconds: float) -> None:
        end = self.now + seconds
        for name in self.starters:
            self.start(name)
        while self.now < end:
            assert self.running, "everybody waits: a deadlock"
            rate = min(1.0, self.cores / sum(batch.tokens for batch in self.running))
            first = min(self.running, key=lambda batch: batch.left_s)
            passed = first.left_s
            self.now += passed / rate
            for batch in self.running:
                batch.left_s -= passed
            self.running.remove(first)
            name = first.account.model
            self.used[name] += first.cost_s * first.tokens
            self.batches[name] += 1
            self.free[name] += 1
            self.ledger.give(first.account, first.tokens, first.cost_s, first.cost_s * first.tokens, self.now, first.tokens)
            self.start(name)


# ---- with real models -----------------------------------------------------------------------------------------------


@pytest.mark.anyio
async def test_calls_of_seconds_on_all_cores_do_not_keep_another_model_waiting(forkserver: ForkServer, tmp_path: Path) -> None:
    """Not even one that has used its share: after a bounded wait it runs beside them."""
    ledger = CoreLedger(2)
    slow_path, quick_path = models.endless(tmp_path / "slow.onnx"), models.scaled(tmp_path / "quick.onnx")
    slow = await Engine.start(
        RunnerSpec("slow", "1", 1, str(slow_path), models.signature_of(slow_path), RuntimeSettings(instances=2)),
        forkserver=forkserver,
        ledger=ledger,
    )
    quick = await Engine.start(
        RunnerSpec("quick", "1", 1, str(quick_path), models.signature_of(quick_path), RuntimeSettings()),
        forkserver=forkserver,
        ledger=ledger,
    )
    calls = [asyncio.create_task(slow.infer(request(x=np.ones(2, np.float32), n=np.array([1 << 40])))) for _ in range(2)]
    while ledger.running < 2:
        await asyncio.sleep(0.01)
    quick._dispatcher._account.pay(100.0, monotonic())
    for _ in range(3):
        async with asyncio.timeout(20):
            await quick.infer(request(x=np.ones((1, 4), np.float32)))
    assert not any(call.done() for call in calls)
    await slow.stop()
    await quick.stop()
    assert [type(outcome) for outcome in await asyncio.gather(*calls, return_exceptions=True)] == [NotReady, NotReady]
    assert ledger.running == 0
