"""Architecture search: strategies on rewards worked out by hand, a space that holds only what works, and candidates that are real modules."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers import Artifact, Budget, Cancelled, NotApplicable, Progress, optimize
from optimizers.search import ArchitectureSearchConfig
from optimizers.strategies import Evolution, Reinforce, Strategy
from tests import torch_models

SIZES = [3, 4, 2, 4, 3, 4, 2, 4]
BEST = (2, 1, 1, 3, 0, 2, 1, 1)
FAST: dict[str, Any] = {
    "epochs": 6, "batch": 16, "rate": 5e-3, "augment": False, "round_to": 4, "target": 0.4, "trials": 10, "population": 4, "tournament": 2,
    "trial_epochs": 3,
}  # fmt: skip


def searched(strategy: Strategy, trials: int) -> list[float]:
    """Rewards in the order of the trials: the share of decisions that are right."""
    rewards = []
    for _ in range(trials):
        choice = strategy.propose()
        rewards.append(sum(a == b for a, b in zip(choice, BEST, strict=True)) / len(BEST))
        strategy.learn(choice, (rewards[-1], 0.0))
    return rewards


def test_evolution_selects_and_the_oldest_dies() -> None:
    def run(tournament: int) -> float:
        return float(np.mean([max(searched(Evolution(SIZES, 10, tournament, np.random.default_rng(s)), 150)) for s in range(5)]))

    assert run(5) > 0.95 and run(1) < run(5) - 0.1, "a tournament of one selects nothing"
    strategy = Evolution([3] * 4, 2, 2, np.random.default_rng(0))
    for choice, reward in (((1, 1, 1, 1), 9.0), ((2, 2, 2, 2), 1.0), ((0, 0, 0, 1), 2.0)):
        strategy.learn(choice, (reward, 0.0))
    assert [choice for choice, _ in strategy.alive] == [(2, 2, 2, 2), (0, 0, 0, 1)], "however good it was"
    child = strategy.propose()
    assert sum(a != b for a, b in zip(child, (0, 0, 0, 1), strict=True)) == 1, "one decision of the best is mutated"


def test_reinforcement_follows_the_reward_and_its_gradient_is_that_of_the_log_likelihood() -> None:
    def run(rate: float) -> float:
        return float(np.mean([np.mean(searched(Reinforce(SIZES, rate, np.random.default_rng(s)), 300)[-50:]) for s in range(3)]))

    assert run(2.0) > 0.85 and run(0.0) < 0.5, "without the gradient it is chance"
    policy = Reinforce([2, 4], 2.0, np.random.default_rng(0))
    policy.learn((0, 0), (0.5, 0.0))
    assert [list(p) for p in policy.policy] == [[0.5] * 2, [0.25] * 4], "the first reward is the baseline"
    policy.learn((1, 2), (0.9, 0.0))  # advantage 0.4, rate 2: logits move by 0.8 (1[a] − p)
    expected = np.exp(0.8 * (np.eye(4)[2] - 0.25))
    assert policy.policy[1] == pytest.approx(expected / expected.sum()) and policy.facts()["baseline"] == pytest.approx(0.58)


@pytest.mark.needs("torch")
def test_the_reward_is_quality_until_the_cost_is_above_the_target() -> None:
    from optimizers.trials import reward

    assert reward(0.9, 0.3, 0.5, 1.0) == reward(0.9, 0.5, 0.5, 1.0) == 0.9
    assert reward(0.9, 1.0, 0.5, 1.0) == pytest.approx(0.45) and reward(0.9, 1.0, 0.5, 0.5) == pytest.approx(0.9 * 0.5**0.5)


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return torch_models.artifact(tmp_path_factory.mktemp("golden"), "cnn")


def workshop(golden: Artifact, folder: Path, **config: Any) -> Any:
    from optimizers.workshop import Workshop

    config = {**FAST, **config}
    return Workshop.open(golden, ArchitectureSearchConfig(**config), torch_models.rows("cnn", 96), Budget(scratch=str(folder / "s")))


@pytest.mark.needs("torch")
def test_the_space_holds_what_works_and_makes_it(golden: Artifact, tmp_path: Path) -> None:
    import torch

    from optimizers.search_space import Space, residual_blocks
    from optimizers.sensitivity import layer_multiply_adds
    from optimizers.torch_source import make

    work = workshop(golden, tmp_path)
    space = Space(work.opened, work.config, work.budget)
    kinds = {(decision.kind, decision.name): decision.options for decision in space.decisions}
    assert kinds["width", "block1.conv1"] == ("16 of 16", "12 of 16", "8 of 16") and kinds["depth", "block2"] == ("keep", "skip")
    assert "depthwise" in kinds["kernel", "block1.conv1"] and ("width", "head") not in kinds, "the output keeps its width"
    wanted = {("depth", "block1"): 1, ("width", "block2.conv1"): 2, ("kernel", "block2.conv2"): 1, ("kernel", "block1.conv1"): 1}
    choice = tuple(wanted.get((decision.kind, decision.name), 0) for decision in space.decisions)
    module: Any = space.made(choice)
    assert type(module.block1).__name__ == "Skip" and module.block2.conv1.out_channels == 8
    assert (
        type(module.block2.conv2).__name__ == {"spatial": "SpatialConv", "depthwise": "DepthwiseConv"}[kinds["kernel", "block2.conv2"][1]]
    )
    assert set(space.told(choice)) == {"depth block1", "width block2.conv1", "kernel block2.conv2", "kernel block1.conv1"}
    assert sum(layer_multiply_adds(module, space.example).values()) < 0.4 * sum(layer_multiply_adds(space.module, space.example).values())
    for name in ("depthwise", "unbind"):
        plain = make(torch_models.factory(tmp_path, name))
        assert residual_blocks(plain, (torch.randn(1, *torch_models.SHAPES[name]),)) == []


@pytest.mark.needs("torch")
@pytest.mark.parametrize("strategy", ["evolution", "reinforcement", "darts"])
def test_a_cheaper_network_is_found_and_answers_as_golden(golden: Artifact, tmp_path: Path, strategy: Any) -> None:
    import onnx
    import onnxruntime as ort

    from optimizers.torch_source import load_module

    seen: list[Progress] = []
    budget = Budget(scratch=str(tmp_path / "s"), on_progress=seen.append, seed=3)
    config = ArchitectureSearchConfig(**{**FAST, "trials": 4 if strategy == "darts" else 10}, strategy=strategy)
    made = optimize(golden, config, torch_models.rows("cnn", 96), budget)
    facts = made.facts[-1]
    assert facts["after"]["multiply_adds"] < 0.6 * facts["before"]["multiply_adds"] and facts["chosen"] in facts["trials"]
    assert facts["seed"] == 3 and facts["chosen"]["decisions"] and json.dumps(facts, allow_nan=False)
    assert len(facts["trials"]) == (
        1 if strategy == "darts" else len({json.dumps(t["decisions"], sort_keys=True) for t in facts["trials"]})
    )
    assert facts["chosen"]["reward"] == max(t["reward"] for t in facts["trials"])
    assert {"population", "policy", "softmaxes"} & facts["search"].keys()
    shares = [p.share for p in seen if p.method == "architecture-search"]
    assert np.diff(shares).min() > -1e-9 and any(p.step.startswith("training") for p in seen)
    model = onnx.load(made.path)
    assert [v.name for v in model.graph.input] == ["x"] and [v.name for v in model.graph.output] == ["y"]
    fresh = torch_models.rows("cnn", 200, seed=9).inputs
    answers = [ort.InferenceSession(str(each.path)).run(None, fresh)[0].argmax(-1) for each in (golden, made)]
    assert (answers[0] == answers[1]).mean() > 0.8
    assert made.source is not None and load_module(made.source), "the next step opens it"


@pytest.mark.needs("torch")
def test_the_cost_term_is_what_makes_the_relaxed_network_cheap(golden: Artifact, tmp_path: Path) -> None:
    from optimizers.darts import search
    from optimizers.search_space import Space
    from optimizers.trials import Examiner

    def cost(weight: float) -> tuple[float, float]:
        work = workshop(golden, tmp_path, strategy="darts", cost_weight=weight, trials=4)
        space = Space(work.opened, work.config, work.budget)
        examiner = Examiner(work, space, work.config, 60.0)
        choice, facts = search(examiner, space, work.config)
        return float(facts["expected_cost"]), examiner.examine(choice).cost

    (expected, real), (free, _) = cost(3.0), cost(0.0)
    assert expected < 0.5 and expected < free - 0.1, "with the term it comes near the target of 0.4, without it does not"
    assert real == pytest.approx(expected, abs=0.2), "sharp softmaxes: the largest options cost what was expected"


@pytest.mark.needs("torch")
def test_equal_seeds_search_equally_and_time_can_be_the_cost(golden: Artifact, tmp_path: Path) -> None:
    from optimizers.architecture import _by_trial
    from optimizers.search_space import Space
    from optimizers.trials import Examiner

    def trials(**config: Any) -> list[Any]:
        work = workshop(golden, tmp_path, **config)
        space = Space(work.opened, work.config, work.budget)
        examiner = Examiner(work, space, work.config, 60.0)
        _by_trial(examiner, space, work.config, work.budget)
        return list(examiner.trials.values())

    first, second = trials(trials=3), trials(trials=3)
    assert [(t.decisions, t.quality, t.multiply_adds) for t in first] == [(t.decisions, t.quality, t.multiply_adds) for t in second]
    (timed,) = trials(trials=1, cost="time")
    assert timed.cost > 0 and timed.cost != pytest.approx(timed.multiply_adds / first[0].multiply_adds)


@pytest.mark.needs("torch")
def test_cancelling_and_what_cannot_be_searched(golden: Artifact, tmp_path: Path) -> None:
    data, seen = torch_models.rows("cnn", 96), list[str]()
    stop = Budget(
        scratch=str(tmp_path / "s"), on_progress=lambda p: seen.append(p.step), cancelled=lambda: bool(seen) and seen[-1] == "trial 2"
    )
    with pytest.raises(Cancelled, match="architecture-search was cancelled during trial 2"):
        optimize(golden, ArchitectureSearchConfig(**FAST), data, stop)
    hurried = ArchitectureSearchConfig(**{**FAST, "strategy": "darts", "search_minutes": 1e-6})
    with pytest.raises(NotApplicable, match="were over before the first step of the search: give search_minutes more"):
        optimize(golden, hurried, data, Budget(scratch=str(tmp_path / "s")))
    bare, budget = torch_models.artifact(tmp_path, "bare_linear", steps=2), Budget(scratch=str(tmp_path / "s"))
    with pytest.raises(NotApplicable, match="nothing to decide: no channels that can go"):
        optimize(bare, ArchitectureSearchConfig(**FAST), torch_models.rows("bare_linear"), budget)
    for wrong in (
        {"target": 1.0}, {"operations": ("magic",)}, {"trials": 0}, {"tournament": 9}, {"strategy": "luck"}, {"strategy": "darts", "cost": "time"},
        {"widths": (0.0,)}, {"cost_weight": -1.0},
    ):  # fmt: skip
        with pytest.raises(ValueError):
            ArchitectureSearchConfig(**wrong)
