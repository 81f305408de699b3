"""From proven to promoted under traffic: shadow, then canary in growing shares, each judged beside the incumbent at the same time.

It writes who gets how much to the journal and reads the sensor; loading and routing are the data plane's. A crash leaves a split that
the next holder of the job ends or goes on with.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from time import monotonic
from typing import Final, Protocol, TypeVar

from app.catalog.model_config import ModelConfig
from app.control.concurrent import ArmFacts, Judgement, Policy, judge
from app.control.quality import worst_class
from app.domain import Event, ModelView, Verdict, short
from app.store.base import Journal
from app.telemetry.block import Block, Cost
from app.telemetry.window import Window
from optimizers.stats import wilson

Kind = TypeVar("Kind")
LOOK_S: Final = 0.5
SHADOW_S: Final = 8.0
SHADOW_ENOUGH: Final = 20
LOAD_SLACK_S: Final = 15.0
"""The data plane says after limits.load_timeout_s that a version does not load; it is waited for so much longer."""
SAMPLE: Final = 300
TRAFFIC_S: Final = 30.0
LEAST_COMPARED: Final = 200
"""Answers of a candidate that were held to golden's before it is promoted. With a floor of 99 % it may miss two: three wrong in a hundred pass in one trial of sixteen."""


class Plane(Protocol):
    """What is asked of the data plane."""

    def model(self, name: str) -> ModelView | None: ...


@dataclass(frozen=True, slots=True)
class End:
    """How a rollout ended. `skipped` where there was no canary to judge."""

    verdict: Verdict
    text: str
    skipped: bool = False


class Patience:
    """So many seconds for something on trial. Those in which a rung of the ladder answers do not count: nobody on trial is asked meanwhile."""

    def __init__(self, seconds: float) -> None:
        self._left_s, self._looked_at = seconds, monotonic()

    def over(self, view: ModelView | None) -> bool:
        now = monotonic()
        if view is None or not view.rung:
            self._left_s -= now - self._looked_at
        self._looked_at = now
        return self._left_s < 0


class Rollout:
    """One per server."""

    def __init__(self, journal: Journal, window: Window, plane: Plane) -> None:
        self._journal, self._window, self._plane = journal, window, plane

    async def run(self, model: str, version: str, config: ModelConfig, job: str, stop: Callable[[], str]) -> End:
        """Bring `version` up to the largest share of the canary, or end on the incumbent. The split stays in place when it passed.

        `stop` says why it must not go on; '' while it may. What was stopped is undecided: nobody erred.
        """
        await self._let_watch_end(model, config.rollout.watch_s, stop)
        rules = config.rollout
        if rules.canary:
            await self._let_rung_go(model, stop)
        if why := stop():
            return End(Verdict.INCONCLUSIVE, why, True)
        view = self._plane.model(model)
        if view is None or not rules.canary:
            return End(Verdict.PASSED, "no canary: the offline proof decides", True)
        rate = self._window.rate(model, TRAFFIC_S)  # of all versions: a moment ago a rung may have answered
        if rate * rules.canary[0] * rules.max_age_s < rules.min_samples:
            return End(Verdict.PASSED, f"no canary: too little traffic for one ({rate:.2g} requests/s), the offline proof decides", True)
        try:
            end = await self._through_stages(model, view.active, version, config, job, stop)
        except BaseException:
            await self._split(model, "", 0.0, "canary", job, "interrupted")
            raise
        if end.verdict is not Verdict.PASSED:
            await self._split(model, "", 0.0, "canary", job, end.text)
        data = {"version": version, "verdict": end.verdict.value, "summary": end.text}
        await asyncio.to_thread(self._journal.append, Event("canary.ended", model, version, job, data=data))
        return end

    async def _let_watch_end(self, model: str, most_s: float, stop: Callable[[], str]) -> None:
        """The trial would take the place of the watch over the version that was promoted last, so it comes after it."""
        patience = Patience(most_s)
        while not patience.over(self._plane.model(model)) and not stop():
            want = (await asyncio.to_thread(self._journal.state)).models.get(model)
            if want is None or want.split is None or want.split.stage != "watch":
                return
            await asyncio.sleep(LOOK_S)

    async def _let_rung_go(self, model: str, stop: Callable[[], str]) -> None:
        """While a rung of the ladder answers, nobody on trial would be asked."""
        while not stop():
            view = self._plane.model(model)
            if view is None or not view.rung:
                return
            await asyncio.sleep(LOOK_S)

    async def _through_stages(
        self, model: str, incumbent: str, version: str, config: ModelConfig, job: str, stop: Callable[[], str]
    ) -> End:  # fmt: skip
        patience, tried = Patience(config.rollout.max_age_s), self._window.now()
        await self._split(model, version, 0.0, "shadow", job, "asked what others answered, compared with golden, dropped")
        end = await self._shadow(model, version, config, patience, stop)
        if end is not None:
            return end
        judgement = Judgement(Verdict.NO_DATA, "not begun", {})
        for share in config.rollout.canary:
            await self._split(model, version, share, "canary", job, judgement.text if judgement.numbers else f"{share:.0%} of the requests")
            began = self._window.cut(model)
            judgement = await self._stage(model, incumbent, version, config, (began, tried), patience, stop)
            if judgement.verdict is not Verdict.PASSED:
                return End(judgement.verdict, f"at {share:.0%}: {judgement.text}")
        return End(Verdict.PASSED, judgement.text)

    async def _shadow(self, model: str, version: str, config: ModelConfig, trial: Patience, stop: Callable[[], str]) -> End | None:
        """Wait until it is loaded, then for some comparisons; an end where it does not load or clearly disagrees. `trial` goes on beside.

        Room in memory may come while it is waited for; where none does, that is no fault of the version.
        """
        loading_until = monotonic() + config.limits.load_timeout_s + LOAD_SLACK_S
        while (view := self._plane.model(model)) is None or version not in view.loaded:
            failed = dict(view.failed).get(version, "") if view is not None else ""
            no_room = failed if view is not None and version in view.no_room else ""
            fault, why = "" if no_room else failed, stop()
            trial.over(view)
            if fault or why or monotonic() > loading_until:
                verdict = Verdict.FAILED if fault else Verdict.INCONCLUSIVE if why or no_room else Verdict.ERROR
                return End(verdict, fault or why or no_room or "it was not loaded in time")
            await asyncio.sleep(LOOK_S)
        began, patience = self._window.cut(model), Patience(SHADOW_S)
        while not patience.over(view := self._plane.model(model)):
            trial.over(view)
            if why := stop():
                return End(Verdict.INCONCLUSIVE, why)
            block = self._window.since(model, version, began)
            if block.deaths:
                return End(Verdict.FAILED, "its runner ended on mirrored requests")
            if block.compared >= SHADOW_ENOUGH:
                return _disagrees(block, config)
            await asyncio.sleep(LOOK_S)
        return _disagrees(self._window.since(model, version, began), config)

    async def _stage(
        self, model: str, incumbent: str, version: str, config: ModelConfig, began: tuple[float, float], patience: Patience, stop: Callable[[], str]
    ) -> Judgement:  # fmt: skip
        """`began`: the stage, and the trial, over which the answers that were held to golden's add up. It stands still while a rung answers,
        and compares from there on anew: what the incumbent alone answered beside the rung is nothing to hold a candidate against."""
        paused = False
        while True:
            await asyncio.sleep(LOOK_S)
            view = self._plane.model(model)
            over = patience.over(view)
            if (why := stop()) or view is None or view.active != incumbent:
                return Judgement(Verdict.INCONCLUSIVE, why or "another version serves meanwhile", {})
            if view.rung:
                paused = True
                continue
            if paused:
                began, paused = (self._window.cut(model), began[1]), False
            judgement = compared(self._window, model, incumbent, version, began, view, config, LEAST_COMPARED)
            undecided = judgement.verdict in (Verdict.INCONCLUSIVE, Verdict.NO_DATA)
            if not undecided or over:
                return judgement

    async def clear(self, model: str, version: str, job: str) -> None:
        """Take back what `version` has on trial, if anything."""
        want = (await asyncio.to_thread(self._journal.state)).models.get(model)
        if want is not None and want.split is not None and want.split.stage != "watch" and want.split.version == version:
            await self._split(model, "", 0.0, "canary", job, "it was not promoted")

    async def _split(self, model: str, version: str, share: float, stage: str, job: str, text: str) -> None:
        data = {"version": version, "share": share, "stage": stage, "summary": text}
        await asyncio.to_thread(self._journal.append, Event("traffic.split", model, version, job, data=data))


def compared(
    window: Window, model: str, incumbent: str, candidate: str, began: tuple[float, float], view: ModelView, config: ModelConfig, least: int
) -> Judgement:  # fmt: skip
    """The candidate beside the incumbent, both since `began[0]`; its agreement with golden since `began[1]`, of `least` answers."""
    first, other = window.since(model, incumbent, began[0]), window.since(model, candidate, began[0])
    held = window.since(model, candidate, began[1], sketches=False)
    metric, floor = config.quality.resolved(config.task)
    limit = config.objective.memory_mb
    policy = Policy(
        least_samples=config.rollout.min_samples,
        fidelity_floor=floor if metric in ("agreement", "accuracy") else 0.99,
        least_compared=least,
        memory_limit_bytes=int(limit * (1 << 20)) if limit is not None else 0,
    )
    arms, worst, memory = _arms(first, other), worst_class(held.likeness, config), dict(view.memory)
    below = worst.text if worst is not None else ""
    return judge(
        replace(arms[0], memory_bytes=memory.get(incumbent, 0)),
        replace(
            arms[1], agreements=held.agreed, compared=held.compared, class_below_floor=below, memory_bytes=memory.get(candidate, 0)
        ),
        policy,
    )  # fmt: skip


def _arms(first: Block, other: Block) -> tuple[ArmFacts, ArmFacts]:
    """Facts of both, with CPU times of the calls that both have most of: of one size after one rest where that is a third of the candidate's, else of one
    size, else of all."""
    chosen = _most_alike(first.costs, other.costs, other.calls / 3) or _most_alike(first.costs_by_size(), other.costs_by_size(), 1)

    def facts(block: Block, of: Cost | None) -> ArmFacts:
        sketches = [of.cpu] if of is not None else [cost.cpu for cost in block.costs.values()]
        cpu = tuple(value for sketch in sketches for value in sketch.sample(SAMPLE))
        return ArmFacts(
            block.requests + block.failures, block.failures, block.deaths, tuple(block.total.sample(SAMPLE)), cpu, block.non_finite, block.agreed,
            block.compared,
        )  # fmt: skip

    return facts(first, chosen[0] if chosen else None), facts(other, chosen[1] if chosen else None)


def _most_alike(first: Mapping[Kind, Cost], other: Mapping[Kind, Cost], least: float) -> tuple[Cost, Cost] | None:
    """Calls of the kind that both have most of, where that is `least` at least."""
    common = max(first.keys() & other.keys(), key=lambda kind: min(first[kind].calls, other[kind].calls), default=None)
    if common is None or min(first[common].calls, other[common].calls) < least:
        return None
    return first[common], other[common]


def _disagrees(block: Block, config: ModelConfig) -> End | None:
    metric, floor = config.quality.resolved(config.task)
    least = floor if metric in ("agreement", "accuracy") else 0.99
    if block.compared >= SHADOW_ENOUGH and wilson(block.agreed, block.compared)[1] < least:
        return End(
            Verdict.FAILED, f"agrees with golden on {short(block.agreed, 4)} of {block.compared} mirrored requests (floor {least:.1%})"
        )
    worst = worst_class(block.likeness, config)
    return End(Verdict.FAILED, worst.text) if worst is not None else None
