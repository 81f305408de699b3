"""The export of a PyTorch golden as a library call: names, axes and answers are the module's, and what cannot be exported says why."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers.artifact import Artifact, Source
from optimizers.base import Budget, NotApplicable, optimize
from optimizers.export import ExportConfig
from optimizers.graph import GraphConfig
from optimizers.recipe import Order, build
from optimizers.samples import Samples
from optimizers.session import Settings, open_session, tensors
from optimizers.torch_module import TorchModule, TorchSource
from tests import torch_models
from tests.judged_models import mlp

pytestmark = pytest.mark.needs("torch")
FACTORY = """
import torch
from torch import nn


class Two(nn.Module):
    '''A dict of more than is declared, in another order.'''

    def __init__(self):
        super().__init__()
        self.hidden, self.norm, self.head = nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Linear(16, 3)

    def forward(self, left, right):
        x = torch.relu(self.norm(self.hidden(torch.cat([left, right], 1))))
        return {"spare": x, "scores": self.head(x), "best": self.head(x).argmax(1)}


class Random(nn.Module):
    def forward(self, left, right):
        return left + torch.rand_like(right), left.argmax(1)


class Branches(nn.Module):
    def forward(self, left, right):
        return (left if left.sum() > 0 else right), left.argmax(1)


def two():
    torch.manual_seed(3)
    return Two()


def untaught():
    return Random()


def branches():
    return Branches()
"""
INPUTS = (("left", "FP32", (-1, 3)), ("right", "FP32", (-1, 3)))
OUTPUTS = (("scores", "FP32", (-1, 3)), ("best", "INT64", (-1,)))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from safetensors.torch import save_file

    from optimizers.torch_source import make

    made = tmp_path_factory.mktemp("export")
    (made / "net.py").write_text(FACTORY)
    for name in ("two", "untaught", "branches"):
        save_file(make(f"{made / 'net.py'}:{name}").state_dict(), str(made / f"{name}.safetensors"))
    return made


def golden(folder: Path, name: str, **changes: Any) -> Artifact:
    weights = folder / f"{name}.safetensors"
    source = Source(f"{folder / 'net.py'}:{name}", weights, INPUTS, OUTPUTS)
    return Artifact(weights, source=replace(source, **changes))


def rows(count: int = 20) -> Samples:
    random = np.random.default_rng(0)
    return Samples({name: random.standard_normal((count, 3)).astype(np.float32) for name in ("right", "left")})


def exported(folder: Path, tmp_path: Path, name: str, samples: Samples, **changes: Any) -> Artifact:
    return optimize(golden(folder, name, **changes), ExportConfig(), samples, Budget(seconds=120, scratch=str(tmp_path)))


def test_the_file_has_the_declared_names_a_free_batch_and_the_answers_of_torch(folder: Path, tmp_path: Path) -> None:
    made = exported(folder, tmp_path, "two", rows())
    session = open_session(made.path, Settings())
    assert [one.name for one in tensors(session.get_inputs())] == ["left", "right"]
    assert [one.name for one in tensors(session.get_outputs())] == ["scores", "best"]
    source = TorchSource(f"{folder / 'net.py'}:two", (("left", "FP32"), ("right", "FP32")), (("scores", "FP32"), ("best", "INT64")))
    module = TorchModule(source, str(folder / "two.safetensors"), 1)
    for count in (1, 5):
        feeds = dict(rows(count).inputs)
        expected = module.run(feeds)
        for name, seen in zip(expected, session.run(None, feeds), strict=True):
            np.testing.assert_allclose(expected[name], seen, atol=1e-5)
    assert made.golden == made.path and [step["method"] for step in made.recipe] == ["export"]
    assert made.facts[-1]["output_error"] < 1e-5 and made.facts[-1]["dynamic"] == {"left": [0], "right": [0]}


def test_whole_calls_of_one_row_do_not_freeze_the_batch(folder: Path, tmp_path: Path) -> None:
    """An exporter that saw one row may take 1 for a constant."""
    calls = Samples({name: values[:, None] for name, values in rows().inputs.items()}, stacked=False)
    made = exported(folder, tmp_path, "two", calls)
    assert not isinstance(tensors(open_session(made.path, Settings()).get_inputs())[0].shape[0], int)


def test_what_is_not_as_the_module_is_refused_with_the_reason(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotApplicable, match=r"differs from the module by|random"):
        exported(folder, tmp_path, "untaught", rows())
    with pytest.raises(
        NotApplicable, match=r"PyTorch cannot export the module: \w+: .*\(line \d+ of \w+\.py: return \(left if left\.sum\(\) > 0"
    ):
        exported(folder, tmp_path, "branches", rows())
    with pytest.raises(NotApplicable, match=r"declare source\.inputs and source\.outputs"):
        exported(folder, tmp_path, "two", rows(), inputs=())
    with pytest.raises(NotApplicable, match="'left' is declared BF16"):
        exported(folder, tmp_path, "two", rows(), inputs=(("left", "BF16", (-1, 3)), INPUTS[1]))
    with pytest.raises(NotApplicable, match="there are none for 'left'"):
        exported(folder, tmp_path, "two", Samples({}))
    with pytest.raises(NotApplicable, match="does not take the model's inputs"):
        exported(folder, tmp_path, "two", rows(), inputs=INPUTS[:1])


def test_other_methods_want_export_first_and_export_wants_no_onnx(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(NotApplicable, match=r"graph works on ONNX files.*two\.safetensors.*let export come first"):
        optimize(golden(folder, "two"), GraphConfig(), rows(), Budget(scratch=str(tmp_path)))
    with pytest.raises(NotApplicable, match=r"model\.onnx is one already"):
        optimize(Artifact(mlp(tmp_path / "model.onnx")), ExportConfig(), rows(), Budget(scratch=str(tmp_path)))


def test_a_recipe_goes_on_from_the_exported_file_which_teaches_what_trains(tmp_path: Path) -> None:
    """It outlives the steps between."""
    from safetensors.torch import save_model

    from optimizers.torch_source import make

    factory, weights = torch_models.factory(tmp_path, "mlp"), tmp_path / "mlp.safetensors"
    save_model(make(factory), str(weights))
    torch_models.rows("mlp", 80).save(tmp_path / "train.npz")
    source = {"factory": factory, "weights": str(weights), "inputs": [["x", "FP32", [-1, 16]]], "outputs": [["y", "FP32", [-1, 4]]]}
    steps = ("export", {"method": "structured-pruning", "ratio": 0.3, "epochs": 0}, {"method": "distill", "epochs": 1})
    order = Order(
        str(weights), steps, str(tmp_path / "out"), "classification", samples={"train": str(tmp_path / "train.npz")}, source=source
    )
    made = build(order, Budget(seconds=240, scratch=str(tmp_path / "scratch")))
    assert [step["method"] for step in made.recipe] == ["export", "structured-pruning", "distill"]
    assert made.facts[1]["after"]["parameters"] < made.facts[1]["before"]["parameters"] and made.facts[2]["training"]
    assert made.facts[0]["lossless"] and made.source is not None and Path(made.source["weights"]).is_file()
