"""Golden as the yardstick, and the quick check of a version on a host of another class: on this machine, by the same stored outputs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader, QuantFormat, QuantType, quantize_static

from optimizers.base import Budget, Rejected
from optimizers.golden import golden_outputs, quick_check
from optimizers.host import host_class
from optimizers.samples import Samples, read_npz, write_npz
from optimizers.session import Settings, open_session
from tests.judged_models import mlp, mlp_weights, noisy, samples

SIZES = (16, 32, 5)


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return mlp(tmp_path / "golden.onnx", SIZES)


def stored(golden: Path, tmp_path: Path, count: int = 320) -> dict[str, Any]:
    """A request for a quick check against golden's outputs, made by the task `golden`."""
    request = {
        "path": str(golden),
        "samples": samples(tmp_path / "s.npz", count),
        "outputs": str(tmp_path / "o.npz"),
        "task": "classification",
    }
    answer = golden_outputs(request, Budget())
    json.dumps(answer, allow_nan=False)
    assert answer["right"] and answer["as_asked"] and answer["samples"] == count and answer["output_names"] == ["y"]
    return {"samples": request["samples"], "golden_outputs": request["outputs"], "task": "classification", "seconds": 60}


def test_goldens_outputs_are_those_of_the_unoptimized_file_in_the_order_of_the_samples(golden: Path, tmp_path: Path) -> None:
    request = stored(golden, tmp_path)
    inputs = Samples.load(Path(request["samples"])).inputs
    expected = open_session(golden, Settings(graph_level="none")).run(None, inputs)[0]
    assert np.allclose(read_npz(Path(request["golden_outputs"]))["y"], expected, atol=1e-5)


def test_a_version_that_differs_under_all_settings_is_wrong_and_says_what_was_tried(golden: Path, tmp_path: Path) -> None:
    request = stored(golden, tmp_path)
    outputs = read_npz(Path(request["golden_outputs"]))
    write_npz(Path(request["golden_outputs"]), {"y": -outputs["y"]})
    answer = quick_check({"path": str(golden), **request}, Budget())
    assert not answer["right"] and answer["settings"] is None
    assert [t["settings"]["graph_level"] for t in answer["tries"]][-2:] == ["basic", "none"]
    assert "agreement is" in answer["reason"]


def test_a_version_that_computes_rightly_here_is_right_as_asked(golden: Path, tmp_path: Path) -> None:
    request = stored(golden, tmp_path)
    close = mlp(tmp_path / "close.onnx", weights=noisy(mlp_weights(SIZES), 1e-4))
    answer = quick_check({"path": str(close), **request, "settings": {"batch_limit": 4, "queue_limit": 9}}, Budget())
    assert answer["right"] and answer["as_asked"] and answer["settings"]["batch_limit"] == 4
    assert answer["host_class"] == host_class().key
    json.dumps(answer, allow_nan=False)


class OneBatch(CalibrationDataReader):  # type: ignore[misc]
    def __init__(self, rows: NDArray[Any]) -> None:
        self._rows = iter([{"x": rows}])

    def get_next(self) -> Any:
        return next(self._rows, None)


def saturating_int8(path: Path, tmp_path: Path) -> tuple[Path, Path]:
    """A golden whose inputs and weights all lie near their largest value, and its usual int8 form (u8 × s8).

    Two products of 230 × 110 do not fit into 16 bits: without VNNI their sum is clipped.
    """
    rng = np.random.default_rng(0)
    first = rng.uniform(0.7, 1.0, (256, 64)) * np.where(np.arange(64) % 2, 1, -1) / 256
    weights = [first.astype(np.float32), rng.standard_normal((64, 8)).astype(np.float32)]
    golden = mlp(tmp_path / "plain.onnx", weights=weights)
    inputs = rng.uniform(0.7, 1.0, (320, 256)).astype(np.float32)
    Samples({"x": inputs}).save(tmp_path / "s.npz")
    quantize_static(
        golden, path, OneBatch(inputs[:64]), quant_format=QuantFormat.QDQ, per_channel=True,
        activation_type=QuantType.QUInt8, weight_type=QuantType.QInt8,
    )  # fmt: skip
    return golden, path


@pytest.mark.filterwarnings("ignore")
def test_an_int8_version_that_saturates_here_is_mended_by_a_session_option(tmp_path: Path) -> None:
    golden, int8 = saturating_int8(tmp_path / "int8.onnx", tmp_path)
    request = {"samples": str(tmp_path / "s.npz"), "task": "regression", "quality": {"metric": "sqnr_db", "floor": 25.0}, "seconds": 60}
    answer = golden_outputs({"path": str(golden), "outputs": str(tmp_path / "o.npz"), **request}, Budget())
    assert answer["right"]
    found = quick_check({"path": str(int8), "golden_outputs": str(tmp_path / "o.npz"), **request}, Budget())
    assert found["right"], found["reason"]
    if host_class().int8_saturates:
        assert not found["as_asked"]
        assert found["settings"]["session_options"] == [["session.x64quantprecision", "1"]]
    else:
        assert found["as_asked"]


@pytest.mark.filterwarnings("ignore")
def test_a_golden_that_is_wrong_as_it_is_served_is_served_otherwise(tmp_path: Path) -> None:
    """A user's own int8 file: unoptimized it computes in floats, as served it saturates where there is no VNNI."""
    _, int8 = saturating_int8(tmp_path / "int8.onnx", tmp_path)
    answer = golden_outputs({"path": str(int8), "samples": str(tmp_path / "s.npz"), "task": "regression"}, Budget())
    assert answer["right"], answer["reason"]
    assert not (answer["as_asked"] and host_class().int8_saturates)
    if host_class().int8_saturates:
        assert answer["settings"]["session_options"] or answer["settings"]["graph_level"] != "all"


def test_a_version_with_other_outputs_or_that_does_not_run_is_wrong_with_the_reason(golden: Path, tmp_path: Path) -> None:
    request = stored(golden, tmp_path)
    model = onnx.load(golden)
    model.graph.node.append(helper.make_node("Identity", ["y"], ["z"]))
    model.graph.output[0].name = "z"
    onnx.save(model, tmp_path / "renamed.onnx")
    assert "differ by name" in quick_check({"path": str(tmp_path / "renamed.onnx"), **request}, Budget())["reason"]
    (tmp_path / "broken.onnx").write_bytes(b"junk")
    assert "Protobuf" in quick_check({"path": str(tmp_path / "broken.onnx"), **request}, Budget())["reason"]


def test_samples_and_outputs_that_do_not_belong_together_are_rejected(golden: Path, tmp_path: Path) -> None:
    request = stored(golden, tmp_path)
    with pytest.raises(Rejected, match="do not belong together"):
        quick_check({"path": str(golden), **request, "samples": samples(tmp_path / "other.npz", 10)}, Budget())
    with pytest.raises(Rejected, match="is no file"):
        quick_check({**request, "path": str(tmp_path / "none.onnx")}, Budget())
    with pytest.raises(Rejected, match="golden does not answer"):
        golden_outputs({"path": str(golden), "samples": samples(tmp_path / "wide.npz", 10, 17)}, Budget())
