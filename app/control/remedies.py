"""Does what was planned: hands it to the data plane, the commands or the builders. It decides nothing."""

from __future__ import annotations

import asyncio
from typing import Protocol

from app.catalog.model_config import ModelConfig
from app.control.commands import Commands
from app.control.diagnosis import Diagnosis
from app.control.planner import Action, Plan
from app.control.steps import parse_tries
from app.domain import JSON, Event, ModelState, ModelView
from app.store.base import Journal
from app.telemetry.metrics import Metrics


class Plane(Protocol):
    """What is asked of the data plane."""

    def config(self, name: str) -> ModelConfig: ...
    async def renew(self, name: str) -> str: ...


class Remedies:
    """One per server."""

    def __init__(self, plane: Plane, commands: Commands, journal: Journal, metrics: Metrics) -> None:
        self._plane, self._commands, self._journal, self._metrics = plane, commands, journal, metrics

    async def apply(self, view: ModelView, want: ModelState, decided: Plan, diagnosis: Diagnosis, fault: bool, rank: float) -> None:
        """Begin it; jobs go on by themselves, in the order of their `rank`. `fault`: wrong or missing answers, so that what is left is not gone back to. Raises what commands raise."""
        reason = f"{diagnosis.cause.value}: {diagnosis.text}"
        match decided.action:
            case Action.RESTART:
                await self._plane.renew(view.name)
                data: JSON = {"summary": f"a fresh runner took over: {diagnosis.text}"}
                await asyncio.to_thread(self._journal.append, Event("runner.restarted", view.name, view.active, data=data))
            case Action.ROLL_BACK:
                await asyncio.to_thread(self._commands.leave, view.name, "hone", reason, fault)
                self._metrics.count("hone_rollbacks", view.name, diagnosis.cause.value)
            case Action.UNDO_SETTINGS:
                before = dict(want.previous_settings)[view.active]
                await asyncio.to_thread(self._commands.change_settings, view.name, before, "hone", reason, view.settings, True)
            case Action.SWITCH:
                await asyncio.to_thread(
                    self._commands.promote, view.name, decided.version, "hone", reason, decided.version.isdigit(), fault=fault
                )  # fmt: skip
                if decided.tries:
                    await self._build(view, decided, reason, rank, recent=True)
            case Action.TUNE | Action.OPTIMIZE | Action.RECALIBRATE:
                await self._build(view, decided, reason, rank, recent=decided.action is Action.RECALIBRATE)

    async def _build(self, view: ModelView, decided: Plan, reason: str, rank: float, recent: bool) -> None:
        recipes: list[list[str | JSON]] = [list(recipe) for recipe in decided.tries]
        torch = view.golden_kind == "torch"
        tries = await asyncio.to_thread(parse_tries, recipes, self._plane.config(view.name).allow, view.name, recent=recent, torch=torch)
        await asyncio.to_thread(self._commands.optimize, view.name, tries, reason, "auto", "hone", rank)
