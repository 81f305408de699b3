"""A loop with one model, on a real journal: a clock that is moved by hand and a data plane that only says what it is told to."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from app.catalog.cards import Cards
from app.catalog.model_config import ModelConfig
from app.control.commands import Commands
from app.control.loop import Loop
from app.domain import Event, ModelState, ModelView, Observation, RuntimeSettings
from app.settings import Settings
from app.store.base import Journal, StoreUnavailable
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window
from tests.journal_story import deployed


class Plane:
    """What the loop sees: one model, as the test sets it."""

    def __init__(self) -> None:
        self.view = ModelView("m", "1", 1, RuntimeSettings(), True, 0, 0, ("1",), 0.0)
        self.kept = ModelConfig()

    def models(self) -> list[ModelView]:
        return [self.view]

    def model(self, name: str) -> ModelView | None:
        return self.view

    def config(self, name: str) -> ModelConfig:
        return self.kept

    def drift(self, name: str) -> float | None:
        return None

    def own_cpu(self, workers: Collection[int]) -> Callable[[], float]:
        return lambda: 0.0

    compared: Sequence[object] = ()

    async def compare_some(self) -> Sequence[object]:
        return self.compared


class Store(Commands):
    """Commands that the store refuses while it is `gone`."""

    gone = False

    def leave(self, name: str, actor: str, reason: str, fault: bool = False) -> Event:
        if self.gone:
            raise StoreUnavailable("gone")
        return super().leave(name, actor, reason, fault)


class Ward:
    """A loop with one model."""

    def __init__(self, journal: Journal, cards: Cards, moved_from: str = "") -> None:
        self.now, self.journal, self.plane, self.leads = 10_000.0, journal, Plane(), True
        self.window = Window(clock=lambda: self.now)
        self.commands = Store(journal, "here")
        bench: Any = type("Bench", (), {"cards": cards})()
        self.loop = Loop(
            self.plane, self.window, journal, self.commands, bench, Metrics(), Settings(), "here", 2, lambda: self.leads, moved_from  # type: ignore[arg-type]
        )  # fmt: skip

    @property
    def state(self) -> ModelState:
        return self.journal.state().models["m"]

    @property
    def patient(self) -> Any:
        return self.loop._patients["m"]

    def serves(self, version: str) -> None:
        self.plane.view = replace(self.plane.view, active=version, generation=self.plane.view.generation + 1, active_since=self.now)

    def deploys(self, golden: str, sha256: str) -> None:
        self.journal.append(deployed("m", golden, sha256))
        self.serves(golden)

    def answers(self, version: str, count: int = 40, nan: int = 0, late: int = 0) -> None:
        """Each after 10 ms, those that are `late` after 100."""
        for number in range(count):
            self.window.observe(Observation("m", version, 200, 0.1 if number < late else 0.01, 0.0, 0.001, 0.005, 0.0, 1, 1, 0.001, 0.0))
            if number < nan:
                self.window.answered_non_finite("m", version)

    async def tick(self) -> None:
        await self.loop.tick()
        if self.loop._busy is not None:
            with suppress(StoreUnavailable):
                await self.loop._busy

    def told(self, kind: str) -> list[Event]:
        return [event for event in self.journal.read(0, 500) if event.kind == kind]
