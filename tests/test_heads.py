"""Heads removed for real: those whose gates matter least, from PyTorch's own attention and from the owner's, whatever its layout."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from optimizers import Artifact, Budget, Cancelled, NotApplicable, Progress, Samples, optimize
from optimizers.head_pruning import HeadPruningConfig
from tests import torch_models

pytestmark = pytest.mark.needs("torch")
FAST: dict[str, Any] = {"epochs": 6, "batch": 16, "rate": 3e-3, "ratio": 0.5}


def agreement(first: Artifact, second: Artifact, rows: Samples) -> float:
    import onnxruntime as ort

    answers = [ort.InferenceSession(str(each.path)).run(None, rows.inputs)[0].argmax(-1) for each in (first, second)]
    return float((answers[0] == answers[1]).mean())


@pytest.fixture(scope="module")
def goldens(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Artifact]:
    return {name: torch_models.artifact(tmp_path_factory.mktemp(name), name) for name in ("transformer", "sdpa")}


@pytest.mark.parametrize("name", ["transformer", "sdpa"])
def test_heads_go_and_the_model_answers_as_golden(goldens: dict[str, Artifact], tmp_path: Path, name: str) -> None:
    import onnx

    from optimizers.torch_source import load_module

    golden, seen = goldens[name], list[Progress]()
    budget = Budget(scratch=str(tmp_path / "s"), on_progress=seen.append)
    made = optimize(golden, HeadPruningConfig(**FAST), torch_models.rows(name, 96), budget)
    facts = made.facts[-1]
    layers = 2 if name == "transformer" else 1
    assert len(facts["heads"]) == layers and sum(len(h["removed"]) for h in facts["heads"].values()) == 2 * layers
    assert facts["after"]["multiply_adds"] < 0.85 * facts["before"]["multiply_adds"]
    assert agreement(golden, made, torch_models.rows(name, 200, seed=9)) > 0.85
    model = onnx.load(made.path)
    assert [v.name for v in model.graph.input] == ["x"] and [v.name for v in model.graph.output] == ["y"]
    assert made.source is not None and load_module(made.source), "the next step opens it"
    assert {"weighing heads", "fine-tuning", "done"} <= {p.step for p in seen}


@pytest.mark.parametrize("name", ["transformer", "sdpa"])
def test_heads_that_do_nothing_have_no_importance_and_go_first(goldens: dict[str, Artifact], tmp_path: Path, name: str) -> None:
    """Heads 1 and 2 reach no output: whatever else the gates say, those go, and no answer changes."""
    import torch

    from optimizers.heads import attentions, importances, least_important, with_separate_heads, without
    from optimizers.torch_source import tensors_of
    from optimizers.workshop import Workshop

    golden, data = goldens[name], torch_models.rows(name)
    config = HeadPruningConfig(**FAST)
    work = Workshop.open(golden, config, data, Budget(scratch=str(tmp_path / "s")))
    module = with_separate_heads(work.opened.module)
    example = tensors_of(data, work.opened.signature)
    found, left = attentions(module, example, ())
    with torch.no_grad():
        for attention in found:
            output: Any = module.get_submodule(attention.output)
            output.weight[:, attention.size : 3 * attention.size] = 0
        before = module(*example)
    weights = importances(module, found, work.lesson(), 64)
    assert not left and all(heads[1] == heads[2] == 0.0 < min(heads[0], heads[3]) for heads in weights.values())
    silent = least_important(weights, config)
    assert set(map(tuple, silent.values())) == {(1, 2)}
    for attention in found:
        smaller = without(module, attention, silent[attention.name], example)
        assert smaller is not None
        module = smaller
    with torch.no_grad():
        assert torch.allclose(module(*example), before, atol=1e-5)
    assert sum(p.numel() for p in module.parameters()) < sum(p.numel() for p in work.opened.module.parameters())


def test_separated_heads_answer_as_pytorchs_own_with_every_mask() -> None:
    import torch

    from optimizers.heads import separated

    torch.manual_seed(0)
    x, other = torch.randn(3, 5, 16), torch.randn(3, 7, 12)
    for how in ({}, {"kdim": 12, "vdim": 12, "bias": False}, {"batch_first": False}):
        layer = torch.nn.MultiheadAttention(16, 4, **{"batch_first": True, **how}).eval()
        made, keys = separated(layer), other if "kdim" in how else x
        rows, queries, places = (3, 5, keys.shape[1]) if layer.batch_first else (5, 3, 3)
        padding, causal = torch.zeros(rows, places, dtype=torch.bool), torch.ones(queries, places).triu(1).bool()
        padding[:, -1] = True
        per_head = torch.randn(rows * 4, queries, places)
        masks: tuple[dict[str, Any], ...] = ({}, {"key_padding_mask": padding}, {"attn_mask": causal}, {"attn_mask": per_head})
        for given in (*masks, {"average_attn_weights": False}, {"need_weights": False}):
            own, expected = made(x, keys, keys, **given), layer(x, keys, keys, **given)
            assert torch.allclose(own[0], expected[0], atol=1e-5)
            assert (own[1] is None) == (expected[1] is None) and (own[1] is None or torch.allclose(own[1], expected[1], atol=1e-5))


def test_where_there_are_no_heads_that_is_said_and_cancelling_works(goldens: dict[str, Artifact], tmp_path: Path) -> None:
    budget = Budget(scratch=str(tmp_path / "s"))
    with pytest.raises(NotApplicable, match="no attention head can be removed: no module counts heads"):
        optimize(torch_models.artifact(tmp_path, "mlp", steps=2), HeadPruningConfig(**FAST), torch_models.rows("mlp"), budget)
    golden, data = goldens["sdpa"], torch_models.rows("sdpa")
    with pytest.raises(NotApplicable, match="no attention head can be removed: attention: kept"):
        optimize(golden, HeadPruningConfig(**FAST, keep=("attention",)), data, budget)
    with pytest.raises(NotApplicable, match="attention has 4 heads, too few for this ratio"):
        optimize(golden, HeadPruningConfig(least=4), data, budget)
    seen: list[str] = []
    stop = Budget(scratch=str(tmp_path / "s"), on_progress=lambda p: seen.append(p.step), cancelled=lambda: "weighing heads" in seen)
    with pytest.raises(Cancelled):
        optimize(golden, HeadPruningConfig(**FAST), data, stop)
    for wrong in ({"ratio": 1.0}, {"least": 0}, {"rows": 1}):
        with pytest.raises(ValueError):
            HeadPruningConfig(**wrong)
