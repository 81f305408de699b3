"""Candidates of an architecture search, one after the other: made, trained briefly from golden's answers, judged on rows held out, rewarded."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from torch import nn

from optimizers.base import NotApplicable
from optimizers.layer_times import timed
from optimizers.lessons import Lesson, Terms
from optimizers.search import ArchitectureSearchConfig
from optimizers.search_space import Space
from optimizers.sensitivity import multiply_adds
from optimizers.session import Settings, open_session
from optimizers.strategies import Choice, Merit
from optimizers.torch_source import export
from optimizers.training import Plan, Watch, choose_form, train
from optimizers.workshop import Workshop

ROUNDS: Final = 7
TIMED_S: Final = 0.05
ROWS_TIMED: Final = 4


@dataclass(frozen=True)
class Trial:
    """One candidate. `quality`: agreement with golden (classes) or exp(−relative error); `cost`: share of the parent's; `why`: it could not be made."""

    number: int
    decisions: dict[str, str]
    quality: float
    loss: float
    multiply_adds: int
    cost: float
    reward: float
    seconds: float
    why: str = ""

    @property
    def merit(self) -> Merit:
        return self.reward, -self.loss

    def to_json(self) -> dict[str, Any]:
        return {name: None if value == math.inf else value for name, value in asdict(self).items()}


def reward(quality: float, cost: float, target: float, weight: float) -> float:
    """quality · min(1, target / cost)^weight: MnasNet's reward (Tan et al. 2019, arXiv:1807.11626, equation 3) with exponents 0 and −weight."""
    return float(quality * min(1.0, target / cost) ** weight)


class Examiner:
    """Judges candidates, remembers all, and holds on to the best module with what it learned. Equal candidates are judged once."""

    def __init__(self, work: Workshop, space: Space, config: ArchitectureSearchConfig, seconds: float) -> None:
        self.work, self.space, self.config = work, space, config
        self.lesson = _short_lesson(work, config)
        self.whole = multiply_adds(space.module, space.example)
        self.trials: dict[Choice, Trial] = {}
        self.best: tuple[Trial, nn.Module] | None = None
        self._ends = time.monotonic() + seconds
        self._form = choose_form(space.module, self.lesson, self._plan("auto"), work.budget)[0]

    @property
    def left_s(self) -> float:
        return self._ends - time.monotonic()

    def examine(self, choice: Choice, span: tuple[float, float] = (0.1, 0.6)) -> Trial:
        """`span`: the shares of progress between which this happens."""
        if choice not in self.trials:
            self.trials[choice] = self._examined(choice, span)
        return self.trials[choice]

    def _examined(self, choice: Choice, span: tuple[float, float]) -> Trial:
        started, number, told = time.monotonic(), len(self.trials) + 1, self.space.told(choice)
        try:
            module = self.space.made(choice)
            trained = train(
                module, self.lesson, self._plan(self._form), Watch(self.work.budget, self.config.method, f"trial {number}", span)
            )
            cost = self._cost(module, number)
        except NotApplicable as reason:
            return Trial(number, told, 0.0, math.inf, 0, math.inf, 0.0, time.monotonic() - started, str(reason))
        quality, loss = trained.score[0] if self.lesson.classes else math.exp(trained.score[0]), -trained.score[1]
        earned = reward(quality, cost, self.config.target, self.config.cost_weight)
        macs = multiply_adds(module, self.space.example)
        trial = Trial(number, told, quality, loss, macs, cost, earned, round(time.monotonic() - started, 2))
        if cost < 1 and (self.best is None or trial.merit > self.best[0].merit):
            self.best = trial, module
        return trial

    def _cost(self, module: nn.Module, number: int) -> float:
        if self.config.cost == "multiply-adds":
            return multiply_adds(module, self.space.example) / self.whole
        opened, parent = self.work.opened, self.work.artifact.path
        path = export(module, opened.signature, opened.rows, self.work.folder / f"trial{number}" / "model.onnx")
        feeds = {name: np.ascontiguousarray(values) for name, values in opened.rows.rows(slice(0, ROWS_TIMED)).inputs.items()}
        return cpu_ratio(path, parent, feeds, self.work.budget.threads)

    def _plan(self, form: str) -> Plan:
        c = self.config
        return Plan(
            c.trial_epochs,
            c.batch,
            c.rate,
            c.optimizer,
            c.weight_decay,
            patience=c.trial_epochs + 1,
            seconds=max(self.left_s, 1.0),
            form=form,
        )


def cpu_ratio(path: Path, other: Path, feeds: dict[str, Any], threads: int) -> float:
    """CPU time of a call of `path` over that of `other`, the median of rounds in turns."""
    sessions = [open_session(each, Settings(intra_op_threads=threads)) for each in (path, other)]
    rounds = [[timed(session, feeds, TIMED_S) for session in sessions] for _ in range(ROUNDS)]
    return float(np.median([own / theirs for own, theirs in rounds]))


def _short_lesson(work: Workshop, config: ArchitectureSearchConfig) -> Lesson:
    """Few rows; what it holds out, the whole lesson holds out too."""
    count = len(work.samples)
    drawn = np.random.default_rng(work.budget.seed).permutation(count)[: config.trial_rows]
    terms = Terms.of(config)
    samples = work.samples.rows(sorted(int(i) for i in drawn))
    return Lesson(work.opened.signature, samples, work.teacher, work.artifact.task, terms, work.budget.seed)
