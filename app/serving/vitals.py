"""What the loop sees of the data plane, and the little that it may do to it: probe a runner, renew it, ask golden about a live answer.

Which version ought to serve is said in the journal, never here.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections.abc import AsyncIterator, Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AsyncExitStack, suppress
from dataclasses import dataclass, field
from statistics import median
from time import monotonic
from typing import Any, Final

from app.catalog.model_config import ModelConfig
from app.catalog.reservoir import by_form
from app.catalog.tensors import all_finite, to_tensor
from app.domain import OWN, InferenceRequest, ModelView, RuntimeSettings, Tensor
from app.errors import HoneError, NotReady
from app.serving import procfs
from app.serving.engine import Engine
from app.serving.loader import Loader
from app.serving.mirror import EVERY_S, Compared
from app.serving.past_deaths import DEATHS_S, PastDeaths, own_doing
from app.serving.service import InferenceService
from app.serving.slot import Loaded, Slot
from app.telemetry.window import Window
from optimizers.samples import Samples

log = logging.getLogger("hone.serving")
PROBES: Final = 8
"""Different inputs that a probe goes through."""
SLICE_S: Final = 0.015
LONGEST_TURN_S: Final = 0.06
SLOW_S: Final = 0.05
"""A call that takes so long is a turn by itself, and hardly minds what the cache holds."""
MOST_PROBE_S: Final = 15.0
"""Slow calls may need so long for rounds enough; where that is too short there is no probe."""
NEWEST: Final = 24
"""Rows of live requests that tell what comes now; as many as there are rounds of a replay until its second look."""
NEWEST_S: Final = 4.0
PACED_CALLS: Final = 5
PAUSE_S: Final = 0.005
"""Between calls that are timed as a single caller meets them: threads go to sleep in it, or spin."""
LEAST_ROUNDS: Final = 8
MOST_ROUNDS: Final = 30
MIRROR_SHARE: Final = 0.05
"""Most of the cores' time that comparing live answers with golden's may use."""
TRIAL_TIMES: Final = 3
"""As many times the answers are compared while a version is on trial or watched: it waits for them."""


@dataclass(frozen=True, slots=True)
class Probe:
    """A live runner beside a fresh one, same version, settings and inputs, in turns: (estimate, low, high) of the ratios live / fresh."""

    cpu: tuple[float, float, float]
    wall: tuple[float, float, float]


@dataclass
class Spent:
    """CPU seconds of comparisons, to stay within their share."""

    cpu_s: float = 0.0
    since: float = field(default_factory=monotonic)

    def allows(self, cores: int) -> bool:
        elapsed = monotonic() - self.since
        if elapsed > 60:
            self.cpu_s, self.since = self.cpu_s * 30 / elapsed, monotonic() - 30
        return self.cpu_s <= MIRROR_SHARE * cores * max(1.0, monotonic() - self.since)


class Vitals:
    """One per server."""

    def __init__(self, service: InferenceService, loader: Loader, window: Window, cores: int, past: PastDeaths) -> None:
        self._service, self._loader, self._cores, self._past = service, loader, cores, past
        self.window = window
        self._since: dict[str, tuple[tuple[str, int], float]] = {}
        self._spent = Spent()
        self._own_cpu = procfs.OwnCpu()
        self._following = asyncio.Lock()
        self._first = 0
        """Which model's answers are compared first: the next one each time."""

    # ---- seeing
    def models(self) -> list[ModelView]:
        return [view for slot in self._service.slots.values() if (view := self._view(slot)) is not None]

    def model(self, name: str) -> ModelView | None:
        slot = self._service.slots.get(name)
        return self._view(slot) if slot is not None else None

    def config(self, name: str) -> ModelConfig:
        return self._service.slot(name).config

    def drift(self, name: str) -> float | None:
        slot = self._service.slots.get(name)
        return slot.mirror.drift if slot is not None and slot.mirror is not None else None

    def own_cpu(self, workers: Collection[int] = ()) -> Callable[[], float]:
        """What reads the CPU seconds that this process, `workers` and all that they started have used: made on the loop, called in a thread."""
        runners = [engine.pid for _, _, _, engine in self._service.engines() if engine.pid]
        return lambda: self._own_cpu.read(runners, workers)

    @property
    def idle(self) -> bool:
        """Whether nobody waits for a runner."""
        return all(engine.queued == 0 for _, _, _, engine in self._service.engines())

    # ---- doing
    async def renew(self, name: str) -> str:
        """A fresh runner takes over the active version's work. Returns the version. Raises NotReady or why none starts."""
        loaded = self._active(name)
        await loaded.engine.renew()
        return loaded.version

    async def against_fresh(self, name: str, seconds: float, limits: tuple[float, float]) -> Probe | None:
        """Hold the live runner against a fresh one, in ABBA turns of single calls; None where there is nothing to ask it or no room for a second.

        Both meet the same host in the same moments, so what differs is the process: its memory, its cores, its priority, its age.
        While a ratio (CPU, wall) lies above its limit and its interval not yet wholly, it goes on, up to three times as long.
        """
        loaded = self._active(name)
        inputs = _reference_rows(loaded)
        if not inputs:
            return None
        try:
            async with self._loader.fresh(loaded, self.config(name)) as fresh:
                loaded.engine.firm = True
                with self.window.background("probe"):
                    turns = await _take_turns((loaded.engine, fresh), inputs, seconds, limits)
        except HoneError as error:
            log.warning("model %s: the live runner could not be held against a second one: %s", name, error)
            return None
        finally:
            loaded.engine.firm = False
        return await asyncio.to_thread(_probe_of, turns) if len(turns) >= LEAST_ROUNDS else None

    async def in_turns(
        self, name: str, settings: tuple[RuntimeSettings, RuntimeSettings], inputs: Samples, seconds: float, limit: float
    ) -> tuple[float, float, float] | None:
        """The active version under two settings, in fresh runners, while the live one answers: (estimate, low, high) of the time that a single call
        takes under the second over that under the first, the waiting for cores counted. None where there is no room, or too little was seen.
        While it seems to lie above `limit` and is not sure to, it goes on, up to four times as long; sure to lie below, it ends.
        """
        loaded, config = self._active(name), self.config(name)
        specs = {spec.name: spec for spec in loaded.admitted.signature.inputs}
        rows = list(_rows(inputs.inputs, specs, inputs.stacked, min(PROBES, len(inputs))))
        try:
            async with AsyncExitStack() as stack:
                first, second = [await stack.enter_async_context(self._loader.fresh(loaded, config, one)) for one in settings]
                with self.window.background("tune"):
                    rounds = await _paced_rounds((second, first), rows, seconds, limit)
        except HoneError as error:
            log.warning("model %s: its settings could not be compared: %s", name, error)
            return None
        return (await asyncio.to_thread(_probe_of, rounds)).wall if len(rounds) >= LEAST_ROUNDS else None

    async def newest(self, name: str, count: int = NEWEST, seconds: float = NEWEST_S) -> list[Samples]:
        """A row of each of the next live requests, those of a form together; fewer where fewer come in `seconds`, none with capture off."""
        slot = self._service.slots.get(name)
        if slot is None:
            return []
        complete = asyncio.Event()
        async with self._following:  # a job and an investigation may ask at the same time
            taken = slot.reservoir.follow(count, complete.set)
            with suppress(TimeoutError):
                async with asyncio.timeout(seconds):
                    await complete.wait()
            slot.reservoir.follow(0)
        return await asyncio.to_thread(by_form, taken)

    async def compare_some(self, most: int = 4) -> list[tuple[str, Compared]]:
        """Put kept live requests to golden and to a version on trial, while nobody waits and the budget lasts; (model, outcome) of each."""
        found: list[tuple[str, Compared]] = []
        slots = list(self._service.slots.values())
        self._first = (self._first + 1) % max(1, len(slots))
        for slot in sorted(slots[self._first :] + slots[: self._first], key=lambda slot: slot.split is None):
            eager = TRIAL_TIMES if slot.split is not None else 1
            if slot.mirror is not None:
                slot.mirror.every_s = EVERY_S / eager
            for _ in range(most * eager):
                if slot.mirror is None or not slot.mirror.kept or not self.idle or not self._spent.allows(self._cores):
                    break
                try:
                    found += [(slot.name, compared) async for compared in self._compare(slot)]
                except Exception:  # one model's odd answer must not cost the others what was seen of them
                    log.exception("model %s: a live answer could not be compared with golden's", slot.name)
        for name, compared in found:
            if compared.agreed is not None:
                self.window.compared(name, compared.version, compared.agreed, compared.rows)
        return found

    async def _compare(self, slot: Slot) -> AsyncIterator[Compared]:
        assert slot.mirror is not None
        seen = slot.mirror.kept.popleft()
        if not slot.mirror.note(seen):
            asked_with = not all_finite(seen.inputs)
            self._service.saw_non_finite(slot.name, seen.version, asked_with)
            if asked_with:
                return  # nothing to hold against golden's
        golden = slot.versions.get(slot.golden)
        if golden is None or not golden.engine.alive:
            return
        answered = slot.versions.get(seen.version)
        if answered is None or answered.admitted.golden_sha256 != golden.admitted.golden_sha256:
            return  # an earlier golden, or a version of one, is not held to this golden
        if seen.version == golden.version:
            answer = seen.answer
        else:
            compared, answer = await slot.mirror.ask(seen, golden.engine, seen.version)
            self._spent.cpu_s += compared.cpu_s
            if not answer:
                return
            yield compared
        shared = slot.split
        if shared is not None and shared.loaded.version not in (seen.version, golden.version) and shared.loaded.engine.alive:
            compared, _ = await slot.mirror.ask(seen, shared.loaded.engine, shared.loaded.version, answer)
            self._spent.cpu_s += compared.cpu_s
            yield compared

    def _active(self, name: str) -> Loaded:
        loaded = self._service.slot(name).active
        if loaded is None:
            raise NotReady(f"model {name!r} has no active version")
        return loaded

    def _view(self, slot: Slot) -> ModelView | None:
        active = slot.active
        if active is None:
            return None
        identity = (active.version, active.generation)
        known = self._since.get(slot.name)
        if known is None or known[0] != identity:
            known = self._since[slot.name] = (identity, monotonic())
        told = [own_doing(death.reason) for death in active.engine.deaths if death.at > monotonic() - DEATHS_S]
        recent = [not own for own in told if own is not None]
        recent += [death.outside for death in self._past.recent(slot.name, active.version)]
        return ModelView(
            slot.name, active.version, active.generation, active.settings, slot.ready, active.memory_bytes, len(recent), tuple(slot.versions),
            known[1], sum(recent), slot.rung.version if slot.rung is not None else "",
            tuple(slot.failed.items()), tuple((version, loaded.memory_bytes) for version, loaded in slot.versions.items()),
            active.admitted.kind, slot.golden_kind, active.engine.distinct_killers,
            tuple(version for version in slot.failed if version in slot.no_room),
        )  # fmt: skip


Turn = tuple[float, float]
"""Mean CPU and wall seconds of the calls of one turn."""
Round = tuple[list[Turn], list[Turn]]
"""Turns of the live runner, turns of the fresh one."""


async def _take_turns(
    engines: tuple[Engine, Engine], inputs: Sequence[list[Tensor]], seconds: float, limits: tuple[float, float]
) -> list[Round]:
    """ABBA, BAAB, … rounds until the time is over, and longer while it is `_undecided`; none where too few would fit."""
    walls = await _call_s(engines, inputs)
    calls = _calls_in_a_slice(walls)
    began = monotonic()
    until = began + seconds
    rounds: list[Round] = []
    if LEAST_ROUNDS * 2 * sum(walls) * (calls + (calls > 1)) > MOST_PROBE_S:
        return rounds
    while len(rounds) < MOST_ROUNDS and (
        monotonic() < until or len(rounds) < LEAST_ROUNDS or await asyncio.to_thread(_undecided, rounds, limits)
    ):
        turns: tuple[list[Turn], list[Turn]] = ([], [])
        for which in (0, 1, 1, 0) if len(rounds) % 2 else (1, 0, 0, 1):
            turns[which].append(await _turn(engines[which], inputs, calls))
        rounds.append(turns)
        if monotonic() > (until + 2 * seconds if len(rounds) >= LEAST_ROUNDS else began + MOST_PROBE_S):
            break
    return rounds


async def _call_s(engines: tuple[Engine, Engine], inputs: Sequence[list[Tensor]]) -> list[float]:
    """About what a call takes on each side, by one call where it is slow."""
    walls = []
    for engine in engines:
        first = (await _turn(engine, inputs, 1))[1]
        walls.append(max(1e-5, first if first > SLOW_S else (await _turn(engine, inputs, 5))[1]))
    return walls


def _calls_in_a_slice(walls: Sequence[float]) -> int:
    """So many that a turn of the quicker one fills a slice, and none of the slower takes so long that the rounds become too few."""
    if max(walls) > SLOW_S:
        return 1
    return max(2, min(64, round(SLICE_S / min(walls)), round(LONGEST_TURN_S / max(walls))))


async def _paced_rounds(engines: tuple[Engine, Engine], inputs: Sequence[list[Tensor]], seconds: float, limit: float) -> list[Round]:
    """ABBA rounds of single calls with pauses between them, as a caller meets them at low load: what is compared is how long each takes."""
    until = monotonic() + seconds
    rounds: list[Round] = []
    while monotonic() < until + 3 * seconds and (
        len(rounds) < LEAST_ROUNDS
        or (monotonic() < until and not await asyncio.to_thread(_hopeless, rounds, limit))
        or await asyncio.to_thread(_undecided, rounds, (math.inf, limit))
    ):
        turns: tuple[list[Turn], list[Turn]] = ([], [])
        for which in (0, 1, 1, 0) if len(rounds) % 2 else (1, 0, 0, 1):
            turns[which].append(await _paced_turn(engines[which], inputs))
        rounds.append(turns)
    return rounds


async def _paced_turn(engine: Engine, inputs: Sequence[list[Tensor]]) -> Turn:
    """Medians of CPU seconds and of the seconds that a call waits for cores and computes."""
    results = []
    for number in range(PACED_CALLS + 1):
        request = InferenceRequest(list(inputs[number % len(inputs)]), "tune", deadline=monotonic() + 10.0, caller=OWN)
        results.append(await engine.infer(request))
        await asyncio.sleep(PAUSE_S)
    return median(r.cpu_s for r in results[1:]), median(r.queue_s + r.compute_s for r in results[1:])


async def _turn(engine: Engine, inputs: Sequence[list[Tensor]], calls: int) -> Turn:
    results = []
    for number in range(calls + (calls > 1)):
        request = InferenceRequest(list(inputs[number % len(inputs)]), "probe", deadline=monotonic() + 10.0, caller=OWN)
        results.append(await engine.infer(request))
    counted = results[1:] or results  # the first fetches the weights back into the cache that the other used
    return sum(r.cpu_s for r in counted) / len(counted), sum(r.compute_s for r in counted) / len(counted)


def _undecided(rounds: Sequence[Round], limits: tuple[float, float]) -> bool:
    """Whether a ratio seems to lie above its limit, and more rounds might show it."""
    probe = _probe_of(rounds)
    return any(low <= limit < estimate for (estimate, low, _), limit in zip((probe.cpu, probe.wall), limits, strict=True))


def _hopeless(rounds: Sequence[Round], limit: float) -> bool:
    """Whether the ratio of wall times lies below its limit for sure."""
    return _probe_of(rounds).wall[2] < limit


def _probe_of(rounds: Sequence[Round]) -> Probe:
    from optimizers.stats import hodges_lehmann

    def ratio(which: int) -> tuple[float, float, float]:
        logs = [
            sum(math.log(max(1e-6, turn[which])) for turn in live) / len(live)
            - sum(math.log(max(1e-6, turn[which])) for turn in fresh) / len(fresh)
            for live, fresh in rounds
        ]
        found = hodges_lehmann(logs, 0.98).exp()
        return found.estimate, found.low, found.high

    return Probe(ratio(0), ratio(1))


def _reference_rows(loaded: Loaded) -> list[list[Tensor]]:
    """Some frozen samples as requests of one row each; none where no reference is frozen."""
    reference = loaded.admitted.reference
    if reference is None:
        return []
    specs = {spec.name: spec for spec in loaded.admitted.signature.inputs}
    stacked, inputs = reference.samples.stacked, reference.samples.inputs
    return list(_rows(inputs, specs, stacked, min(PROBES, len(reference.samples))))


def _rows(inputs: Mapping[str, Any], specs: Mapping[str, Any], stacked: bool, count: int) -> Iterator[list[Tensor]]:
    for row in range(count):
        yield [
            to_tensor(name, specs[name].datatype, values[row : row + 1] if stacked else values[row])
            for name, values in inputs.items()
            if name in specs
        ]
