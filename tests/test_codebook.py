"""Codebooks in the graph: few levels per layer, what each kind of level is for, and the packed form."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper

from optimizers import NotApplicable, Samples
from optimizers.census import census
from optimizers.codebook import CodebookConfig, Levels
from optimizers.int8 import Int8DynamicConfig
from optimizers.onnx_graph import set_constant
from optimizers.packed import pack, unpack
from tests.families import FAMILIES, built, error_of, keeps_the_contract, samples_of
from tests.onnx_models import F, mlp, model, node, normal, value


def weights_of(path: Path) -> dict[str, Any]:
    """Every weight that is looked up, with its levels and indices, from the graph as it stands in the file."""
    graph = onnx.load(path).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    cast = {each.output[0]: each.input[0] for each in graph.node if each.op_type == "Cast"}
    found = {}
    for each in graph.node:
        if each.op_type == "Gather" and each.input[0].endswith(".levels"):
            found[each.output[0]] = tensors[each.input[0]], tensors[cast[each.input[1]]]
    return found


@pytest.mark.parametrize("levels", ["kmeans", "entropy", "perceptual"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_keeps_its_contract(family: str, levels: Levels, tmp_path: Path) -> None:
    config = CodebookConfig(levels=levels, bits=6, allot="equal")
    artifact = built(FAMILIES[family], config, tmp_path)
    facts = keeps_the_contract(artifact, config)
    assert error_of(FAMILIES[family], artifact) < 0.15 and facts["output_error"] < 0.15
    found = weights_of(artifact.path)
    assert len(found) == len(facts["layers"]) > 0
    for level, index in found.values():
        assert len(level) <= 64 and level.dtype == np.float32 and index.dtype == np.uint8 and index.max() < len(level)
    assert facts["bytes_packed"] < facts["bytes"]


def test_four_bits_take_half_a_byte_and_the_packed_form_still_less(tmp_path: Path) -> None:
    source = mlp((128, 256, 256, 10))
    config = CodebookConfig()
    artifact = built(source, config, tmp_path)
    facts = keeps_the_contract(artifact, config)
    indices = [t for t in onnx.load(artifact.path).graph.initializer if t.name.endswith(".index")]
    assert {t.data_type for t in indices} == {TensorProto.UINT4}
    assert facts["bytes"] < 0.14 * facts["bytes_before"] and facts["bytes_packed"] < 0.97 * facts["bytes"]
    assert [layer["levels"] for layer in facts["layers"]] == [16, 16, 16] and facts["mean_bits"] == 4
    packed = pack(artifact.path, tmp_path / "model.packed")
    assert unpack(packed.path, tmp_path / "back.onnx").read_bytes() == artifact.path.read_bytes()


def test_biases_and_normalization_stay(tmp_path: Path) -> None:
    artifact = built(mlp((32, 64, 10)), CodebookConfig(), tmp_path)
    tensors = {t.name: numpy_helper.to_array(t) for t in onnx.load(artifact.path).graph.initializer}
    assert np.array_equal(tensors["b0"], normal(100, 64, scale=0.1)) and set(weights_of(artifact.path)) == {"w0", "w1"}


def test_small_weights_stay_zero_when_asked(tmp_path: Path) -> None:
    source = mlp((64, 128, 10))
    artifact = built(source, CodebookConfig(bits=5, sparsity=0.4), tmp_path / "sparse")
    before = {t.name: numpy_helper.to_array(t) for t in source.graph.initializer}
    for name, (level, index) in weights_of(artifact.path).items():
        zero = level[index] == 0
        assert level[0] == 0 and np.mean(zero) == pytest.approx(0.4, abs=0.01) and len(level) == 32
        assert np.abs(before[name])[zero].max() <= np.abs(before[name])[~zero].min()
    counted = census(onnx.load(artifact.path))
    assert counted.nonzeros < 0.65 * counted.parameters
    dense = built(source, CodebookConfig(bits=5), tmp_path / "dense")
    assert artifact.facts[-1]["bytes_packed"] < 0.9 * dense.facts[-1]["bytes_packed"]


def test_rate_makes_the_packed_form_smaller(tmp_path: Path) -> None:
    source = mlp((64, 256, 64, 10))
    rng = np.random.default_rng(0)
    for name, shape in (("w0", (64, 256)), ("w1", (256, 64))):
        set_constant(source.graph, name, rng.laplace(size=shape).astype(np.float32) / 16)
    sizes = [
        built(source, CodebookConfig(levels="entropy", bits=5, rate=rate), tmp_path / str(rate)).facts[-1]["bytes_packed"]
        for rate in (0.0, 1.0)
    ]
    assert sizes[1] < 0.93 * sizes[0]


def uneven(seed: int = 0) -> tuple[Any, Samples]:
    """A network whose inputs differ in size, as activations do, and whose weights make up for it: what is large matters least."""
    source, size = mlp((64, 96, 10), seed), np.geomspace(0.1, 4, 64)
    set_constant(source.graph, "w0", (normal(seed, 64, 96, scale=0.1) / size[:, None]).astype(np.float32))
    inputs = np.random.default_rng(seed + 1).standard_normal((128, 64)) * size
    return source, Samples({"x": inputs.astype(np.float32)})


def test_perceptual_levels_have_less_error_at_the_outputs(tmp_path: Path) -> None:
    source, samples = uneven()
    errors = {
        levels: built(source, CodebookConfig(levels=levels, bits=4, allot="equal", exclude=("gemm1",)), tmp_path / levels, samples).facts[
            -1
        ]["output_error"]
        for levels in ("kmeans", "perceptual")
    }
    assert errors["perceptual"] < 0.7 * errors["kmeans"]


@pytest.mark.parametrize(("family", "most"), [("resnet", 0.5), ("mlp", 0.85)])
def test_perceptual_levels_are_better_at_equal_bits(family: str, most: float, tmp_path: Path) -> None:
    source, errors = FAMILIES[family], {}
    samples = samples_of(source, 32 if family == "resnet" else 512)
    for levels in ("kmeans", "perceptual"):
        artifact = built(source, CodebookConfig(levels=levels, bits=3, allot="equal", samples=512), tmp_path / levels, samples)
        errors[levels] = error_of(source, artifact)
    assert errors["perceptual"] < most * errors["kmeans"]


def test_bits_go_to_the_layers_that_need_them(tmp_path: Path) -> None:
    """The first layer feeds everything, the second is multiplied by nearly nothing: it gets few bits, and the mean is kept."""
    nodes = [
        node("MatMul", ["x", "a"], ["p"], "loud"),
        node("MatMul", ["x", "b"], ["q"], "quiet"),
        node("Mul", ["q", "little"], ["r"], "mul"),
    ]
    nodes.append(node("Add", ["p", "r"], ["y"], "add"))
    tensors = [numpy_helper.from_array(normal(i, 64, 64, scale=0.1), name) for i, name in enumerate("ab")]
    tensors.append(numpy_helper.from_array(np.full(64, 0.01, np.float32), "little"))
    source = model(nodes, [value("x", F, ["N", 64])], [value("y", F, ["N", 64])], tensors)
    errors = {}
    for allot in ("equal", "greedy", "exact"):
        artifact = built(source, CodebookConfig(levels="perceptual", bits=4, allot=allot), tmp_path / allot)
        facts = artifact.facts[-1]
        bits, errors[allot] = {layer["layer"].split("/")[0]: layer["bits"] for layer in facts["layers"]}, facts["output_error"]
        assert facts["mean_bits"] <= 4 and (bits == {"loud": 4, "quiet": 4} if allot == "equal" else bits == {"loud": 6, "quiet": 2})
    assert errors["greedy"] < 0.4 * errors["equal"]


def test_layers_may_have_bits_of_their_own(tmp_path: Path) -> None:
    config = CodebookConfig(bits=4, layer_bits=(("gemm1", 8), ("gemm0", 2)))
    artifact = built(mlp((64, 128, 64, 10)), config, tmp_path)
    assert {name: len(level) for name, (level, _) in weights_of(artifact.path).items()} == {"w0": 4, "w1": 256, "w2": 16}
    with pytest.raises(NotApplicable, match="layer_bits names 'fc', which is no layer"):
        built(mlp((64, 128, 10)), CodebookConfig(layer_bits=(("fc", 8),)), tmp_path / "other")


def test_where_it_does_not_apply(tmp_path: Path) -> None:
    source = mlp((32, 64, 10))
    with pytest.raises(NotApplicable, match="perceptual codebook needs calibration inputs"):
        built(source, CodebookConfig(levels="perceptual"), tmp_path, Samples({}))
    assert built(source, CodebookConfig(), tmp_path, Samples({})).facts[-1]["output_error"] is None
    with pytest.raises(NotApplicable, match="larger than its codebook"):
        built(mlp((2, 4)), CodebookConfig(), tmp_path)
    with pytest.raises(NotApplicable, match="larger than its codebook"):
        built(source, CodebookConfig(exclude=("gemm0", "gemm1")), tmp_path)
    quantized = built(source, Int8DynamicConfig(), tmp_path)
    with pytest.raises(NotApplicable, match=r"already quantized \(dynamic\)"):
        built(onnx.load(quantized.path), CodebookConfig(), tmp_path)
    with pytest.raises(NotApplicable, match=r"outputs change by \d+%"):
        built(FAMILIES["encoder"], CodebookConfig(bits=2, sparsity=0.9), tmp_path)


def test_the_same_inputs_give_the_same_file(tmp_path: Path) -> None:
    for levels in ("entropy", "perceptual"):
        files = [built(mlp((32, 64, 10)), CodebookConfig(levels=levels), tmp_path / f"{levels}{i}").path.read_bytes() for i in range(2)]
        assert files[0] == files[1]


@pytest.mark.parametrize(
    "wrong", [{"bits": 1}, {"layer_bits": (("a", 9),)}, {"levels": "median"}, {"allot": "all"}, {"sparsity": 1.0}, {"rate": -1}]
)
def test_wrong_configs_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"must be"):
        CodebookConfig(**wrong)
