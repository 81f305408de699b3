"""One small trainer for every method that trains: any module, any objective; bounded, cancellable, resumable, chosen for this host.

Knows nothing of teachers, labels or pruning: an Objective says what the loss of some rows is, and how good the module is on rows held out.
"""

from __future__ import annotations

import copy
import math
import os
import pickle
import time
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final, Protocol

import torch
from torch import Tensor, nn

from optimizers.base import Budget, NotApplicable
from optimizers.running import raise_if_memory

Score = tuple[float, float]
"""Larger is better; the second entry settles ties."""
BFLOAT16_GAIN: Final = 0.9
"""bfloat16 loses digits, so it must be faster than this share of float32's time (on AVX2 it is 20 times slower)."""
LEAST_STEP_MS: Final = 5.0
"""A shorter step of float32 is noise to time and nothing to gain from: it stays, so that equal seeds train equally."""
FORMS: Final = ("float32", "float32-channels-last", "bfloat16", "bfloat16-channels-last")
TIMED_ROWS: Final = 8
"""Of a step that is timed on cores; a GPU is timed on a whole batch, since small ones only keep it waiting."""


class Objective(Protocol):
    """What to train for. `rows`: how many rows there are to train on. `index` and `random` lie where the module does."""

    @property
    def rows(self) -> int: ...

    def loss(self, module: nn.Module, index: Tensor, random: torch.Generator) -> Tensor: ...

    def score(self, module: nn.Module) -> Score: ...


@dataclass(frozen=True)
class Plan:
    """How long and how. The rate follows a cosine to zero over epochs or seconds, whichever ends first; `patience` in epochs."""

    epochs: int = 30
    batch: int = 64
    rate: float = 1e-3
    optimizer: str = "adamw"
    weight_decay: float = 1e-4
    patience: int = 10
    seconds: float = 600.0
    form: str = "auto"
    """auto, or one of FORMS"""


@dataclass
class Trained:
    """What became of it: `history` has one entry per epoch. The module holds the weights of the best epoch (0: before training)."""

    best_epoch: int
    score: Score
    history: list[dict[str, float]] = field(default_factory=list)
    device: str = "cpu"
    form: str = "float32"
    timed_ms: dict[str, float] = field(default_factory=dict)
    resumed_at: int = 0
    seconds: float = 0.0
    stopped: str = "epochs"

    def facts(self) -> dict[str, Any]:
        return {
            "epochs": len(self.history), "best_epoch": self.best_epoch, "score": list(self.score), "device": self.device, "form": self.form, "timed_ms": self.timed_ms,
            "resumed_at": self.resumed_at, "seconds": round(self.seconds, 1), "stopped": self.stopped, "history": self.history,
        }  # fmt: skip


class AfterStep(Protocol):
    """What may change the weights after each step (a proximal step). `progress` is the share of the training that is over."""

    def __call__(self, module: nn.Module, rate: float, progress: float) -> None: ...
    def state(self) -> dict[str, Any]:
        """Tensors and numbers from which `restore` goes on after a kill."""

    def restore(self, state: dict[str, Any]) -> None: ...


@dataclass(frozen=True)
class Watch:
    """How a training shows itself, and where it may be taken up again after a kill."""

    budget: Budget
    method: str
    step: str = "training"
    span: tuple[float, float] = (0.2, 0.8)
    checkpoint: Path | None = None
    after_step: AfterStep | None = None


def train(module: nn.Module, objective: Objective, plan: Plan, watch: Watch) -> Trained:
    """Train `module` in place, on the budget's device, and leave the best weights in it, back on the cores.

    Raises Cancelled, and NotApplicable where the loss is no number or there is no such device.
    """
    if objective.rows < 2:
        raise NotApplicable(f"{watch.method} has {objective.rows} rows to train on; it needs at least 2")
    device, plan = device_of(watch.budget.device), replace(plan, batch=min(plan.batch, objective.rows))
    try:
        module.to(device)
        form, timed = choose_form(module, objective, plan, watch.budget)
        _lay_out(module, form)
        return _Run(module, objective, plan, watch, Trained(0, (-math.inf, 0.0), device=named(device), form=form, timed_ms=timed)).all()
    finally:
        module.to("cpu")


def device_of(name: str) -> torch.device:
    """The device that 'auto', 'cpu' or 'cuda' means here. Raises NotApplicable where cuda is asked for and there is none."""
    found = torch.cuda.is_available() if name != "cpu" else False
    if name == "cuda" and not found:
        built = torch.version.cuda or "no CUDA"
        raise NotApplicable(
            f"device cuda was asked for, and PyTorch {torch.__version__} (built for {built}) finds none here: use auto or cpu"
        )
    return torch.device("cuda" if found else "cpu")


def named(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class _Run:
    """One training: what changes from epoch to epoch."""

    def __init__(self, module: nn.Module, objective: Objective, plan: Plan, watch: Watch, trained: Trained) -> None:
        self.module, self.objective, self.plan, self.watch, self.trained = module, objective, plan, watch, trained
        self.optimizer = optimizer_of(module, plan)
        self.device = place_of(module)
        self.random = torch.Generator(self.device).manual_seed(watch.budget.seed)
        self.started = time.monotonic()
        self.best: dict[str, Tensor] = {}
        self.steps = objective.rows // plan.batch
        self.progress = 0.0
        self.finished = False

    @property
    def elapsed(self) -> float:
        return self.trained.seconds + time.monotonic() - self.started

    def all(self) -> Trained:
        if not self._resumed():
            self._judge(0)
        elif self.finished:
            return self._left_as_best()
        for epoch in range(len(self.trained.history), self.plan.epochs):
            if self.elapsed >= self.plan.seconds:
                self.trained.stopped = "time"
                break
            self._epoch(epoch)
            self._keep()
            if epoch + 1 - self.trained.best_epoch >= self.plan.patience:
                self.trained.stopped = "no more gain"
                break
        self.trained.seconds, self.started = self.elapsed, time.monotonic()
        self.finished = True
        self._keep()
        return self._left_as_best()

    def _left_as_best(self) -> Trained:
        self.module.load_state_dict(self.best)
        self.module.eval()
        return self.trained

    def _epoch(self, epoch: int) -> None:
        self.module.train()
        order, total, done = torch.randperm(self.objective.rows, generator=self.random, device=self.device), 0.0, 0
        for step in range(self.steps):
            if self.elapsed >= self.plan.seconds:
                break
            self._rate(
                max(
                    (epoch + step / self.steps) / self.plan.epochs,
                    self.elapsed / self.plan.seconds if math.isfinite(self.plan.seconds) else 0.0,
                )
            )
            index = order[step * self.plan.batch : (step + 1) * self.plan.batch]
            total += self._step(index)
            done += 1
            self._tell(epoch, step, total / done)
        self._judge(epoch + 1, total / max(done, 1))

    def _step(self, index: Tensor) -> float:
        with _precision(self.trained.form, self.device):
            loss = self.objective.loss(self.module, index, self.random)
        value = float(loss.detach())
        if not math.isfinite(value):
            raise NotApplicable(f"{self.watch.method}: the loss became {value} in training: try a smaller rate than {self.plan.rate:g}")
        self.optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        self.optimizer.step()
        if self.watch.after_step is not None:
            self.watch.after_step(self.module, float(self.optimizer.param_groups[0]["lr"]), self.progress)
        return value

    def _rate(self, progress: float) -> None:
        self.progress = min(1.0, progress)
        for group in self.optimizer.param_groups:
            group["lr"] = self.plan.rate * 0.5 * (1 + math.cos(math.pi * self.progress))

    def _judge(self, epoch: int, loss: float = math.nan) -> None:
        """Score the module on the rows held out and keep its weights where they are the best so far."""
        self.module.eval()
        with torch.no_grad():
            score = self.objective.score(self.module)
        if epoch:
            self.trained.history.append({"epoch": epoch, "loss": loss, "score": score[0], "held_out_loss": -score[1]})
        if score > self.trained.score or not self.best or self._shrinks:
            self.trained.score, self.trained.best_epoch = score, epoch
            self.best = {name: value.detach().clone() for name, value in self.module.state_dict().items()}

    @property
    def _shrinks(self) -> bool:
        """With a proximal step the last weights are the ones wanted: earlier ones have fewer zeros."""
        return self.watch.after_step is not None

    def _tell(self, epoch: int, step: int, loss: float) -> None:
        share = max((epoch + (step + 1) / self.steps) / self.plan.epochs, min(1.0, self.elapsed / self.plan.seconds))
        first, last = self.watch.span
        eta = self.elapsed * (1 - share) / max(share, 1e-6)
        self.watch.budget.tick(
            self.watch.method,
            self.watch.step,
            first + (last - first) * share,
            epoch=epoch + 1,
            epochs=self.plan.epochs,
            loss=loss,
            eta_s=round(eta, 1),
        )

    # ---- after a kill
    def _keep(self) -> None:
        if self.watch.checkpoint is None:
            return
        state = {
            "finished": self.finished, "stopped": self.trained.stopped,
            "module": self.module.state_dict(), "best": self.best, "optimizer": self.optimizer.state_dict(), "random": self.random.get_state(),
            "history": self.trained.history, "score": list(self.trained.score), "best_epoch": self.trained.best_epoch, "seconds": self.elapsed,
            "after_step": self.watch.after_step.state() if self.watch.after_step is not None else {},
        }  # fmt: skip
        self.watch.checkpoint.parent.mkdir(parents=True, exist_ok=True)
        partial = self.watch.checkpoint.with_suffix(".partial")
        torch.save(state, partial)
        os.replace(partial, self.watch.checkpoint)

    def _resumed(self) -> bool:
        """Take up where a killed run of the same plan left off; only tensors and numbers are read. What is not of this module counts as none."""
        if self.watch.checkpoint is None or not self.watch.checkpoint.is_file():
            return False
        try:
            state = torch.load(self.watch.checkpoint, map_location=self.device, weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, pickle.UnpicklingError) as error:
            raise_if_memory(error)
            return False
        if _sizes(state["module"]) != _sizes(self.module.state_dict()):
            return False
        self.module.load_state_dict(state["module"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.random.set_state(state["random"].cpu())
        self.best = state["best"]
        if self.watch.after_step is not None:
            self.watch.after_step.restore(state["after_step"])
        done = self.trained
        done.history, done.score, done.best_epoch = state["history"], tuple(state["score"]), state["best_epoch"]
        done.seconds, done.resumed_at, done.stopped = state["seconds"], len(done.history), state["stopped"]
        self.finished = state["finished"]
        return True


def _sizes(weights: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in weights.items()}


def optimizer_of(module: nn.Module, plan: Plan) -> torch.optim.Optimizer:
    weights = [p for p in module.parameters() if p.requires_grad and p.ndim > 1]
    others = [p for p in module.parameters() if p.requires_grad and p.ndim <= 1]  # biases and normalizations are not decayed
    groups = [{"params": weights, "weight_decay": plan.weight_decay}, {"params": others, "weight_decay": 0.0}]
    if plan.optimizer == "sgd":
        return torch.optim.SGD(groups, plan.rate, momentum=0.9, nesterov=True)
    return torch.optim.AdamW(groups, plan.rate)


# ---- precision and memory layout
def choose_form(module: nn.Module, objective: Objective, plan: Plan, budget: Budget) -> tuple[str, dict[str, float]]:
    """The fastest form where the module lies, and milliseconds of a step in each: the shortest of a few, on a copy of the module."""
    if plan.form != "auto":
        return plan.form, {}
    images, cores = any(p.ndim == 4 for p in module.parameters()), place_of(module).type == "cpu"
    forms = [form for form in FORMS if (images or "channels-last" not in form) and not (cores and form == "bfloat16-channels-last")]
    timed = {form: _timed(module, objective, plan, form, budget) for form in forms}
    told = {form: round(ms, 1) for form, ms in timed.items()}
    if timed["float32"] < LEAST_STEP_MS:
        return "float32", told
    allowed = {form: ms / (BFLOAT16_GAIN if form.startswith("bfloat16") else 1.0) for form, ms in timed.items()}
    return min(allowed, key=lambda form: allowed[form]), told


def _timed(module: nn.Module, objective: Objective, plan: Plan, form: str, budget: Budget) -> float:
    twin = copy.deepcopy(module).train()
    _lay_out(twin, form)
    optimizer, device = optimizer_of(twin, plan), place_of(twin)
    rows = min(plan.batch, objective.rows)
    index = torch.arange(rows if device.type == "cuda" else min(TIMED_ROWS, rows), device=device)
    seconds = math.inf
    for _ in range(2 if device.type == "cpu" else 6):
        started = _clock(device)
        with _precision(form, device):
            loss = objective.loss(twin, index, torch.Generator(device).manual_seed(0))
        optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
        seconds = min(seconds, _clock(device) - started)
        budget.tick("training", f"timing {form}", 0.0)
    return seconds * 1e3


def _clock(device: torch.device) -> float:
    """Seconds: CPU time on cores, which others' work does not count into, wall time after all is done on a GPU."""
    if device.type == "cpu":
        return time.process_time()
    torch.cuda.synchronize(device)
    return time.monotonic()


def _lay_out(module: nn.Module, form: str) -> None:
    module.to(memory_format=torch.channels_last if form.endswith("channels-last") else torch.contiguous_format)  # type: ignore[call-overload]


def _precision(form: str, device: torch.device) -> torch.autocast:
    return torch.autocast(device.type, dtype=torch.bfloat16, enabled=form.startswith("bfloat16"))


def place_of(module: nn.Module) -> torch.device:
    """Where the module's weights lie."""
    first = next(module.parameters(), None)
    return torch.device("cpu") if first is None else first.device
