"""Convolutions split by space, by CP and by channel: exact at full rank, cheaper below it, ranks from energy, noise or measurement."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers import Artifact, Budget, Cancelled, NotApplicable, Progress, optimize
from optimizers.base import Config
from optimizers.low_rank import TuckerConfig
from optimizers.separable import CpConfig, DepthwiseConfig, SpatialConfig
from optimizers.vbmf import rank_of
from tests import torch_models

FAST: dict[str, Any] = {"epochs": 6, "batch": 16, "rate": 5e-3, "augment": False}


@pytest.mark.parametrize(("shape", "rank", "noise"), [((60, 100), 5, 0.5), ((100, 60), 8, 0.3), ((64, 576), 12, 1.0), ((64, 576), 0, 1.0)])
def test_vbmf_finds_the_rank_under_noise(shape: tuple[int, int], rank: int, noise: float) -> None:
    random = np.random.default_rng(0)
    hidden = random.normal(size=(shape[0], rank)) @ random.normal(size=(rank, shape[1]))
    assert rank_of(hidden + noise * random.normal(size=shape)) == rank
    assert rank_of(1000 * (hidden + noise * random.normal(size=shape))) == rank, "the scale does not matter"


def forms() -> dict[str, Any]:
    from optimizers.kernels import Cp, Depthwise, Spatial

    return {"spatial": Spatial(), "cp": Cp(), "depthwise": Depthwise()}


@pytest.mark.needs("torch")
@pytest.mark.parametrize("name", ["spatial", "cp", "depthwise"])
@pytest.mark.parametrize("how", [{"stride": 2, "padding": 1}, {"padding": "same", "dilation": 2}, {"stride": (1, 2), "padding": (0, 2)}])
def test_a_kernel_of_known_rank_is_split_without_loss(name: str, how: dict[str, Any]) -> None:
    """Three terms of each form: split at three it is the layer, split at two it is not, and the parts cost what is said."""
    import torch

    from optimizers.sensitivity import multiply_adds

    torch.manual_seed(0)
    layer, form = torch.nn.Conv2d(8, 12, 3, **how), forms()[name]
    whole = {
        "spatial": lambda: torch.einsum("rox,riy->oiyx", torch.randn(3, 12, 3), torch.randn(3, 8, 3)),
        "cp": lambda: torch.einsum("or,ir,yr,xr->oiyx", *(torch.randn(size, 3) for size in (12, 8, 3, 3))),
        "depthwise": lambda: torch.einsum("iot,ityx->oiyx", torch.randn(8, 12, 3), torch.randn(8, 3, 3, 3)),
    }[name]()
    with torch.no_grad():
        layer.weight.copy_(whole)
        x = torch.randn(1, 8, 12, 12)
        assert torch.allclose(form.made(layer, (3,))(x), layer(x), atol=0.02)
        assert not torch.allclose(form.made(layer, (2,))(x), layer(x), atol=0.2)
        parts = form.made(layer, (3,))
        places = layer(x).shape[-1] * layer(x).shape[-2]
    assert multiply_adds(parts, (x,)) == pytest.approx(form.cost(layer, (3,)) * places, rel=0.35), "the rim of the image aside"
    if name != "cp":
        assert form.by_energy(layer, 0.9999) == (3,) and form.full(layer)[0] >= 3


@pytest.fixture(scope="module")
def golden(tmp_path_factory: pytest.TempPathFactory) -> Artifact:
    return torch_models.artifact(tmp_path_factory.mktemp("golden"), "cnn")


def agreement(first: Artifact, second: Artifact) -> float:
    import onnxruntime as ort

    rows = torch_models.rows("cnn", 200, seed=9).inputs
    answers = [ort.InferenceSession(str(each.path)).run(None, rows)[0].argmax(-1) for each in (first, second)]
    return float((answers[0] == answers[1]).mean())


@pytest.mark.needs("torch")
@pytest.mark.parametrize(
    "config",
    [
        SpatialConfig(energy=0.5, **FAST),
        CpConfig(energy=0.3, **FAST),
        DepthwiseConfig(energy=0.5, **FAST),
        TuckerConfig(rank="sensitivity", **FAST),
    ],
    ids=lambda config: config.method,
)
def test_the_file_has_fewer_multiply_adds_and_answers_as_golden(golden: Artifact, tmp_path: Path, config: Any) -> None:
    import onnx

    seen: list[Progress] = []
    made = optimize(golden, config, torch_models.rows("cnn", 96), Budget(scratch=str(tmp_path / "s"), on_progress=seen.append))
    facts = made.facts[-1]
    assert facts["split"] and facts["after"]["multiply_adds"] < 0.85 * facts["before"]["multiply_adds"]
    assert agreement(golden, made) > 0.8 and {"opened", "exporting", "done"} <= {p.step for p in seen}
    model = onnx.load(made.path)
    assert [v.name for v in model.graph.input] == ["x"] and [v.name for v in model.graph.output] == ["y"]
    if config.rank == "sensitivity":
        assert facts["curves"] and facts["before"]["multiply_adds"] * 0.65 > facts["after"]["multiply_adds"], "the ratio asked for is saved"


@pytest.mark.needs("torch")
def test_vbmf_ranks_are_those_above_the_noise_in_the_kernel() -> None:
    import torch

    from optimizers.kernels import Cp, Spatial
    from optimizers.tucker import Tucker

    torch.manual_seed(0)
    layer = torch.nn.Conv2d(32, 48, 3)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("rsyx,or,is->oiyx", torch.randn(4, 3, 3, 3), torch.randn(48, 4), torch.randn(32, 3)))
        layer.weight += 0.5 * torch.randn(layer.weight.shape)
    assert Tucker().by_vbmf(layer) == (4, 3) and Cp().by_vbmf(layer) == (4,)
    with torch.no_grad():
        layer.weight.copy_(torch.einsum("rox,riy->oiyx", torch.randn(5, 48, 3), torch.randn(5, 32, 3)) + 0.5 * torch.randn(48, 32, 3, 3))
        assert Spatial().by_vbmf(layer) == (5,)
        layer.weight.normal_()
        assert Tucker().by_vbmf(layer) == (0, 0)


@pytest.mark.needs("torch")
def test_the_stand_ins_come_back_from_the_file(golden: Artifact, tmp_path: Path) -> None:
    from optimizers.kernels import Cp, Depthwise, Spatial
    from optimizers.torch_source import load_module, save_source
    from optimizers.torch_structure import replace_layer

    assert golden.source is not None
    module: Any = load_module(golden.source)
    for name, form in (("block1.conv1", Spatial()), ("block1.conv2", Cp()), ("block2.conv1", Depthwise())):
        replace_layer(module, name, form.made(module.get_submodule(name), (2,)))
    again = load_module(save_source(module, golden.source.factory, tmp_path / "w.safetensors"))
    assert {n: type(m).__name__ for n, m in again.named_modules()} == {n: type(m).__name__ for n, m in module.named_modules()}


@pytest.mark.needs("torch")
@pytest.mark.parametrize("name", ["mlp", "unbind", "transformer"])
def test_linear_layers_are_split_trained_and_opened_again(tmp_path: Path, name: str) -> None:
    """Those whose owner reads their weight, as PyTorch's own encoder does, are left alone and named."""
    import onnxruntime as ort

    from optimizers.torch_source import load_module

    parent, data = torch_models.artifact(tmp_path, name), torch_models.rows(name, 96)
    config, budget = TuckerConfig(linear=True, energy=0.6, **FAST), Budget(scratch=str(tmp_path / "s"))
    made = optimize(parent, config, data, budget)
    facts = made.facts[-1]
    if name == "transformer":
        owned = {f"encoder.layers.{layer}.linear{which}" for layer in (0, 1) for which in (1, 2)}
        assert {facts["left"][each] for each in owned} == {"what it is part of reads its weight"} and set(facts["split"]) == {"head"}
        return
    assert facts["split"] and facts["training"]["history"] and facts["after"]["multiply_adds"] < 0.8 * facts["before"]["multiply_adds"]
    assert facts["after"]["bytes"] < facts["before"]["bytes"]
    fresh = torch_models.rows(name, 200, seed=9).inputs
    answers = [ort.InferenceSession(str(each.path)).run(None, fresh)[0].argmax(-1) for each in (parent, made)]
    assert (answers[0] == answers[1]).mean() > 0.8
    assert made.source is not None
    kinds = {type(part).__name__ for part in load_module(made.source).modules()}
    assert "LowRankLinear" in kinds
    with pytest.raises(NotApplicable, match="no convolution is better off split: there is none"):
        optimize(parent, TuckerConfig(**FAST), data, budget)


@pytest.mark.needs("torch")
def test_what_cannot_be_split_is_said_and_cancelling_works(golden: Artifact, tmp_path: Path) -> None:
    data, budget = torch_models.rows("cnn"), Budget(scratch=str(tmp_path / "s"))
    with pytest.raises(NotApplicable, match=r"no convolution is better off split: .*ranks \[\d+\] would save"):
        optimize(golden, SpatialConfig(energy=0.999999, **FAST), data, budget)
    configs: tuple[Config, ...] = (CpConfig(**FAST), SpatialConfig(**FAST))
    for config in configs:
        stop = Budget(scratch=str(tmp_path / "s"), cancelled=lambda: len(list((tmp_path / "s").iterdir())) > 1)
        with pytest.raises(Cancelled):
            optimize(golden, config, data, stop)
    wrongs: tuple[tuple[Any, dict[str, Any]], ...] = (
        (DepthwiseConfig, {"rank": "vbmf"}), (SpatialConfig, {"rank": "luck"}), (CpConfig, {"ratio": 1.0}), (TuckerConfig, {"rows": 1}),
    )  # fmt: skip
    for kind, wrong in wrongs:
        with pytest.raises(ValueError):
            kind(**wrong)


@pytest.mark.needs("torch")
@pytest.mark.parametrize("name", ["cp", "spatial", "depthwise", "tucker"])
def test_a_kernel_of_zeros_is_left_alone(name: str) -> None:
    import torch

    from optimizers.kernels import Cp
    from optimizers.search_space import FORMS

    layer = torch.nn.Conv2d(4, 4, 3)
    torch.nn.init.zeros_(layer.weight)
    assert {**FORMS, "cp": Cp()}[name].unfit(layer) == "all zero"


def test_cp_is_as_near_as_the_librarys_and_takes_no_more_memory_than_its_kernel() -> None:
    import torch
    from tensorly.decomposition import parafac

    from optimizers.kernels import cp_factors

    kernel = torch.randn(32, 16, 3, 3, generator=torch.Generator().manual_seed(0), dtype=torch.double)

    def lost(factors: Any) -> float:
        return float((kernel - torch.einsum("or,ir,yr,xr->oiyx", *factors)).pow(2).sum() / kernel.pow(2).sum())

    _, theirs = parafac(kernel.numpy(), 24, n_iter_max=60, init="random", tol=1e-6, random_state=0)
    assert lost(cp_factors(kernel, 24)) < 1.03 * lost([torch.from_numpy(factor) for factor in theirs])
    code = """
import resource, torch
from optimizers import kernels
kernels.SWEEPS = 2
kernel = torch.randn(512, 512, 3, 3, dtype=torch.double)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
kernels.cp_factors(kernel, 287)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    grown = int(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout)
    assert grown < 300_000, "kilobytes; a Khatri-Rao product of three axes takes 1.8 GB"
