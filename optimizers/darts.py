"""Differentiable architecture search: every decision a softmax over its options, all in one network; weights and softmaxes learn in turns.

DARTS, first order (Liu et al. 2019, arXiv:1806.09055), with the expected multiply-adds in the loss; widths as masks of channels (FBNetV2,
Wan et al. 2020, arXiv:2004.05565). The softmaxes sharpen as training goes on, so that taking the largest option at the end changes little.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any, Final

import torch
from torch import Tensor, nn

from optimizers.base import NotApplicable
from optimizers.running import brief, raise_if_memory
from optimizers.search import ArchitectureSearchConfig
from optimizers.search_space import Decision, Space
from optimizers.sensitivity import layer_multiply_adds
from optimizers.strategies import Choice
from optimizers.torch_structure import replace_layer
from optimizers.training import Plan, optimizer_of
from optimizers.trials import Examiner

COLDEST: Final = 0.2
"""Temperature of the softmaxes at the end; they begin at 1."""
FIRST: Final = 0.75
"""Chance of what is there in the beginning, when the network should still answer as the parent does."""
REACH: Final = 6.0
"""How far the rate lets a logit go in a whole search."""
FASTEST: Final = 0.3
Chances = Callable[[], Tensor]


class Relaxed(nn.Module):
    """The parent's network with all options of all decisions in it. `logits`: one vector per decision, no parameters of the module."""

    def __init__(self, space: Space) -> None:
        super().__init__()
        self.net = copy.deepcopy(space.module)
        self.decisions, self.temperature = space.decisions, 1.0
        self.logits = [_first_logits(len(decision.options)) for decision in space.decisions]
        self._costs = layer_multiply_adds(space.module, space.example)
        self._touched = [self._touched_by(decision) for decision in space.decisions]
        self._kernel_costs: dict[str, Tensor] = {}
        for at in sorted(range(len(self.decisions)), key=lambda i: ("kernel", "width", "depth").index(self.decisions[i].kind)):
            self._relax(space, at)

    def chances(self, at: int) -> Tensor:
        return (self.logits[at] / self.temperature).softmax(0)

    def forward(self, *inputs: Tensor) -> Any:
        return self.net(*inputs)

    def choice(self) -> Choice:
        return tuple(int(logits.argmax()) for logits in self.logits)

    def expected_cost(self) -> Tensor:
        """Expected multiply-adds as a share of the parent's: what each layer's kernel, widths and block let through, multiplied."""
        shares = {name: torch.ones(()) for name in self._costs}
        for at, decision in enumerate(self.decisions):
            chances = self.chances(at)
            for name in self._touched[at]:
                shares[name] = shares[name] * self._share(decision, chances)
        whole = sum(self._costs.values())
        return torch.stack([shares[name] * (cost / whole) for name, cost in self._costs.items()]).sum()

    def _touched_by(self, decision: Decision) -> list[str]:
        """Layers that a decision makes cheaper, as often as it does so: a layer inside a group loses inputs and outputs."""
        if decision.kind == "kernel":
            return [decision.name]
        if decision.kind == "depth":
            return [name for name in self._costs if name.startswith(f"{decision.name}.")]
        assert decision.group is not None
        inward = [name for name in decision.group.inward if name not in decision.group.outward or not self._is_grouped(name)]
        return [name for name in (*decision.group.outward, *inward) if name in self._costs]

    def _share(self, decision: Decision, chances: Tensor) -> Tensor:
        if decision.kind == "kernel":
            return (chances * self._kernel_costs[decision.name]).sum()
        if decision.kind == "depth":
            return chances[0]
        return (chances * torch.tensor(decision.kept)).sum() / decision.kept[0]

    def _is_grouped(self, name: str) -> bool:
        return getattr(self.net.get_submodule(name), "groups", 1) > 1

    def _relax(self, space: Space, at: int) -> None:
        decision = self.decisions[at]
        if decision.kind == "width":
            self._mask(decision, lambda: self.chances(at))
            return
        layer = self.net.get_submodule(decision.name)
        if decision.kind == "depth":
            replace_layer(self.net, decision.name, MixedBlock(layer, lambda: self.chances(at)))
            return
        assert isinstance(layer, nn.Conv2d)
        made = [(option, space.operation(layer, option)) for option in decision.options[1:]]
        operations = [layer, *(operation for _, operation in made if operation is not None)]
        costs = [float(sum(v for v in _costs_of(operation, layer).values())) for operation in operations]
        self._kernel_costs[decision.name] = torch.tensor(costs) / costs[0]
        replace_layer(self.net, decision.name, MixedKernel(operations, lambda: self.chances(at)))

    def _mask(self, decision: Decision, chances: Chances) -> None:
        """Multiply the channels of every layer of the group by the chance that they stay; the least important go first."""
        assert decision.group is not None
        scores, whole = decision.group.scores, decision.kept[0]
        if len(scores) != whole:
            raise NotApplicable(f"the channels of {decision.name} are not those of its group")
        rank = scores.argsort(descending=True).argsort()
        stays = torch.stack([(rank < kept).float() for kept in decision.kept])
        for name in decision.group.outward:
            layer = self.net.get_submodule(name)
            axis = -1 if isinstance(layer, nn.Linear | nn.LayerNorm) else 1
            layer.register_forward_hook(lambda _, __, out, axis=axis: _masked(out, chances() @ stays, axis))


class MixedKernel(nn.Module):
    """Σ p_o · o(x) over a convolution and its cheaper forms."""

    def __init__(self, operations: list[nn.Module], chances: Chances) -> None:
        super().__init__()
        self.operations, self._chances = nn.ModuleList(operations), chances

    def forward(self, x: Tensor) -> Tensor:
        chances = self._chances()
        return torch.stack([chance * operation(x) for chance, operation in zip(chances, self.operations, strict=True)]).sum(0)


class MixedBlock(nn.Module):
    """p_keep · block(x) + p_skip · x."""

    def __init__(self, block: nn.Module, chances: Chances) -> None:
        super().__init__()
        self.block, self._chances = block, chances

    def forward(self, x: Tensor, *rest: Any, **named: Any) -> Tensor:
        chances = self._chances()
        result: Tensor = chances[0] * self.block(x, *rest, **named) + chances[1] * x
        return result


def search(examiner: Examiner, space: Space, config: ArchitectureSearchConfig) -> tuple[Choice, dict[str, Any]]:
    """The choice of the largest options, and how the search went. Raises NotApplicable where the module does not bear relaxing."""
    budget, lesson = examiner.work.budget, examiner.lesson
    net = _relaxed(space)
    order = torch.randperm(lesson.rows, generator=torch.Generator().manual_seed(budget.seed))
    own, held = order[: len(order) // 2], order[len(order) // 2 :]
    batch, random = min(config.batch, len(own)), torch.Generator().manual_seed(budget.seed)
    steps = max(1, len(own) // batch) * config.trials * config.trial_epochs
    weights = optimizer_of(net, Plan(rate=config.rate, optimizer=config.optimizer))
    logits = torch.optim.Adam(net.logits, min(FASTEST, REACH / steps), betas=(0.5, 0.999))
    history: list[dict[str, float]] = []
    for step in range(steps):
        if examiner.left_s <= 0:
            break
        net.train()
        net.temperature = COLDEST ** (step / steps)
        given = [rows[torch.randint(len(rows), (batch,), generator=random)] for rows in (held, own)]
        cost = net.expected_cost()
        over = torch.relu((cost / config.target).log())  # the reward's logarithm: log quality − weight · log(cost / target)
        loss = lesson.loss(net, given[0], random)
        _step(logits, loss + config.cost_weight * over)
        _step(weights, lesson.loss(net, given[1], random))
        history.append({"loss": round(float(loss.detach()), 5), "cost": round(float(cost.detach()), 5)})
        if not math.isfinite(history[-1]["loss"]):
            raise NotApplicable(f"the loss became {history[-1]['loss']} in the search: try a smaller rate than {config.rate:g}")
        budget.tick(config.method, "relaxed search", 0.1 + 0.45 * (step + 1) / steps, **history[-1])
    if not history:
        raise NotApplicable(f"{config.search_minutes:g} minutes were over before the first step of the search: give search_minutes more")
    softmaxes = {f"{d.kind} {d.name}": [round(float(p), 4) for p in net.chances(at).detach()] for at, d in enumerate(space.decisions)}
    kept = history[:: max(1, len(history) // 50)]
    return net.choice(), {"steps": len(history), "history": kept, "expected_cost": history[-1]["cost"], "softmaxes": softmaxes}


def _first_logits(options: int) -> Tensor:
    logits = torch.zeros(options)
    logits[0] = math.log(FIRST / (1 - FIRST) * (options - 1))
    return logits.requires_grad_()


def _relaxed(space: Space) -> Relaxed:
    try:
        net = Relaxed(space)
        net.train()(*(torch.cat([value, value]) for value in space.example))
    except (RuntimeError, AttributeError, TypeError, ValueError) as error:
        raise_if_memory(error)
        raise NotApplicable(f"the module does not bear being relaxed ({brief(error)}): choose evolution or reinforcement") from error
    return net


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()


def _masked(out: Tensor, mask: Tensor, axis: int) -> Tensor:
    return out * mask if axis == -1 else out * mask.reshape(1, -1, *[1] * (out.ndim - 2))


def _costs_of(operation: nn.Module, layer: nn.Conv2d) -> dict[str, int]:
    """Multiply-adds of an operation in the place of `layer`, on an image large enough that its rim does not count."""
    side = 8 * max(*layer.kernel_size, *layer.stride)
    twin = nn.Sequential(copy.deepcopy(operation))
    return layer_multiply_adds(twin, (torch.zeros(1, layer.in_channels, side, side),))
