"""Architecture search's work: the space, the strategy that looks for the best candidate in it, and that candidate trained to the end."""

from __future__ import annotations

import hashlib
import time
from typing import Any

import numpy as np

from optimizers import darts
from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.samples import Samples
from optimizers.search import ArchitectureSearchConfig
from optimizers.search_space import Space
from optimizers.strategies import Evolution, Reinforce, Strategy
from optimizers.torch_source import torch_for
from optimizers.trials import Examiner, Trial
from optimizers.workshop import Workshop


def build(artifact: Artifact, config: ArchitectureSearchConfig, samples: Samples, budget: Budget) -> Artifact:
    """The best candidate as an artifact. Raises NotApplicable with what was tried where none is cheaper than the parent."""
    started = time.monotonic()
    with torch_for(budget):
        work = Workshop.open(artifact, config, samples, budget)
        space = Space(work.opened, config, budget)
        examiner = Examiner(work, space, config, min(config.search_minutes * 60, 0.5 * budget.left_s))
        found = _by_gradient(examiner, space, config) if config.strategy == "darts" else _by_trial(examiner, space, config, budget)
        if examiner.best is None:
            raise NotApplicable(f"no candidate is cheaper than the parent: {_told(list(examiner.trials.values()))}")
        best, module = examiner.best
        lesson = work.lesson()
        trained = work.fine_tune(module, lesson, f"training {_name(best)}", span=(0.6, 0.9))
        facts = {
            "strategy": config.strategy, "target": config.target, "cost": config.cost, "cost_weight": config.cost_weight,
            "space": {f"{decision.kind} {decision.name}": list(decision.options) for decision in space.decisions},
            "trials": [trial.to_json() for trial in examiner.trials.values()], "chosen": best.to_json(), "search": found,
            "trial_rows": examiner.lesson.rows, "trial_held_out": len(examiner.lesson.held[0]), "seconds": time.monotonic() - started,
        }  # fmt: skip
        return work.deliver(module, lesson, facts, trained)


def _by_trial(examiner: Examiner, space: Space, config: ArchitectureSearchConfig, budget: Budget) -> dict[str, Any]:
    strategy = _strategy(config, space.sizes, np.random.default_rng(budget.seed))
    step = 0.5 / config.trials
    for _ in range(config.trials):
        if examiner.best is not None and examiner.left_s <= 0:
            break
        first = 0.1 + step * len(examiner.trials)
        budget.tick(config.method, "proposing", first, best=_reward(examiner))
        choice = strategy.propose()
        strategy.learn(choice, examiner.examine(choice, (first, first + step)).merit)
    return strategy.facts()


def _by_gradient(examiner: Examiner, space: Space, config: ArchitectureSearchConfig) -> dict[str, Any]:
    choice, facts = darts.search(examiner, space, config)
    examiner.examine(choice, (0.55, 0.6))
    return facts


def _strategy(config: ArchitectureSearchConfig, sizes: list[int], random: np.random.Generator) -> Strategy:
    if config.strategy == "evolution":
        return Evolution(sizes, config.population, config.tournament, random)
    return Reinforce(sizes, config.policy_rate, random)


def _reward(examiner: Examiner) -> float | None:
    return None if examiner.best is None else round(examiner.best[0].reward, 4)


def _name(trial: Trial) -> str:
    """The same candidate has the same name in another run, and so finds its checkpoint."""
    return hashlib.sha256(repr(sorted(trial.decisions.items())).encode()).hexdigest()[:8]


def _told(trials: list[Trial]) -> str:
    return "; ".join(f"{trial.decisions or 'the parent'} costs {trial.cost:.2f}{trial.why and f', {trial.why}'}" for trial in trials[:5])
