"""What every method that trains does around its own step: open the source, make the lesson, fine-tune, hand on. Imports torch."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from optimizers.artifact import Artifact, sha256_of
from optimizers.base import Budget
from optimizers.lessons import Extra, Lesson, Teacher, Terms, facts_of
from optimizers.pruning import TrainingConfig
from optimizers.samples import Samples
from optimizers.torch_source import Opened, delivered, golden_source, open_source
from optimizers.training import Plan, Trained, Watch, train


@dataclass(frozen=True)
class Workshop:
    """One method's job: the parent's module, what to train on, and where to write."""

    artifact: Artifact
    config: TrainingConfig
    samples: Samples
    budget: Budget
    opened: Opened
    teacher: Teacher
    folder: Path

    @classmethod
    def open(cls, artifact: Artifact, config: TrainingConfig, samples: Samples, budget: Budget) -> Workshop:
        """Raises NotApplicable where source, samples and parent do not fit together."""
        opened = open_source(artifact, samples, config.method)
        budget.tick(config.method, "opened", 0.05)
        teacher = Teacher(artifact.golden or artifact.path, opened.signature, budget.threads, golden_source(artifact), opened.rows)
        return cls(artifact, config, samples, budget, opened, teacher, budget.folder(config.method))

    def lesson(self, extra: Extra | None = None) -> Lesson:
        terms = Terms.of(self.config)
        return Lesson(self.opened.signature, self.samples, self.teacher, self.artifact.task, terms, self.budget.seed, extra)

    def fine_tune(self, module: nn.Module, lesson: Lesson, part: str = "fine-tuning", share: float = 1.0, **watch: Any) -> Trained | None:
        """Train `module` in place for `share` of the config's epochs and minutes; None where the config wants no training."""
        config = self.config
        epochs = round(config.epochs * share)
        if epochs == 0:
            return None
        seconds = min(config.minutes * 60 * share, 0.9 * self.budget.left_s)
        plan = Plan(epochs, config.batch, config.rate, config.optimizer, config.weight_decay, config.patience, seconds)
        return train(module, lesson, plan, Watch(self.budget, config.method, part, checkpoint=self._checkpoint(part), **watch))

    def deliver(self, module: nn.Module, lesson: Lesson, facts: dict[str, Any], trained: Trained | None, factory: str = "") -> Artifact:
        """`factory`: where the module is not one of the parent's factory."""
        self.budget.tick(self.config.method, "exporting", 0.9)
        told = {**facts, "training": {**facts_of(lesson, self.samples), **trained.facts()} if trained else None, "seed": self.budget.seed}
        made = delivered(self.opened, module, self.artifact, self.config.to_json(), told, self.folder, factory)
        self.budget.tick(self.config.method, "done", 1.0)
        return made

    def _checkpoint(self, part: str) -> Path | None:
        """The same job finds its checkpoint again after a kill, another job does not."""
        if not self.budget.keep:
            return None
        job = {
            "config": self.config.to_json(), "part": part, "parent": sha256_of(*self.artifact.files()), "seed": self.budget.seed,
            "rows": sorted(self.samples.hashes()), "task": self.artifact.task,
        }  # fmt: skip
        key = hashlib.sha256(json.dumps(job, sort_keys=True).encode()).hexdigest()[:16]
        return Path(self.budget.keep) / f"training-{key}.checkpoint"
