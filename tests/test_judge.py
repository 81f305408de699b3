"""Verdicts on real small models, each with one known fault or none, through the task's JSON."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnxruntime.quantization import QuantType, quantize_dynamic

from optimizers.base import Budget, Cancelled, Rejected
from optimizers.gain import Goal, SpeedReport, conclude
from optimizers.judge import run
from optimizers.measure import Comparison, Quietness, Series
from optimizers.samples import Samples
from optimizers.session import Settings, open_session
from optimizers.stats import Interval
from tests.judged_models import (
    deep,
    frozen_batch_inside,
    frozen_length_inside,
    mlp,
    mlp_weights,
    mlp_with,
    nan_for_large,
    noisy,
    samples,
    scaled_by_company,
    tokens_model,
    wrong_for_class,
)  # fmt: skip
from tests.models import save, value

SIZES = (16, 32, 5)


def verify(golden: Path, candidate: Path, sets: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A verdict on answers alone, unless the test asks for more."""
    request: dict[str, Any] = {
        "golden": str(golden),
        "candidate": str(candidate),
        "sets": sets,
        "task": "classification",
        "purpose": "proof",
    }
    answer = run({**request, "timed": False, **more}, Budget(seconds=400))
    json.dumps(answer, allow_nan=False)
    return answer


@pytest.fixture
def golden(tmp_path: Path) -> Path:
    return mlp(tmp_path / "golden.onnx", SIZES)


@pytest.fixture
def reference(tmp_path: Path) -> dict[str, Any]:
    return {"reference": {"path": samples(tmp_path / "reference.npz")}}


def test_a_close_candidate_passes_and_the_report_says_on_what(golden: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    close = mlp(tmp_path / "close.onnx", weights=noisy(mlp_weights(SIZES), 1e-4))
    report = verify(golden, close, reference, timed=True, seconds=12.0)
    assert report["verdict"] == "passed", report["reasons"]
    found = report["fidelity"]["reference"]
    assert (found["metric"], found["samples"], found["met"], found["origin"]) == ("agreement", 400, "met", "owner")
    assert found["low"] >= 0.99 and found["kl_max"] < 1e-3 and report["bit_close"]
    assert report["evidence"] == "owner" and report["host_class"].endswith("-cpu")
    assert report["latency"]["batches"][0]["batch"] == 1
    assert not report["capacity"] or report["capacity"]["incumbent"]["rows_per_s"] > 0, "a loud host leaves capacity out"
    assert report["rows"]["independent"] and report["serve"]["batch_limit"] == 8


def test_a_wrong_candidate_fails_with_its_worst_element(golden: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    report = verify(golden, mlp(tmp_path / "wrong.onnx", weights=noisy(mlp_weights(SIZES), 0.3)), reference)
    assert report["verdict"] == "failed"
    assert any("agreement is" in reason and "worst: y[" in reason for reason in report["reasons"])
    assert report["latency"] == {}, "what is wrong is not timed"


def test_answers_of_several_shapes_are_blamed_on_who_gives_them(tmp_path: Path) -> None:
    """How many values pass a threshold differs by sample: of golden that ends the judging with the reason, of a candidate it is its fault."""

    def kept(path: Path, threshold: float) -> Path:
        nodes = [
            onnx.helper.make_node("Greater", ["x", "t"], ["over"]),
            onnx.helper.make_node("Compress", ["x", "over"], ["y"]),
        ]
        return save(path, nodes, [value("x", "FP32", [16])], [value("y", "FP32", ["K"])], {"t": np.float32(threshold)})

    all_of_them, some = kept(tmp_path / "all.onnx", -99), kept(tmp_path / "some.onnx", 0)
    sets = {"reference": {"path": samples(tmp_path / "whole.npz", 320), "stacked": False}}
    report = verify(all_of_them, some, sets, task="generic")
    assert report["verdict"] == "failed" and "output 'y' of candidate has a different shape for each sample" in report["summary"]
    with pytest.raises(Rejected, match="nothing can be judged by golden: output 'y' of golden has a different shape for each sample"):
        verify(some, all_of_them, sets, task="generic")


def test_a_candidate_wrong_for_one_rare_class_fails(golden: Path, tmp_path: Path) -> None:
    session = open_session(golden, Settings())
    inputs = np.random.default_rng(1).standard_normal((4000, 16)).astype(np.float32)
    classes = session.run(None, {"x": inputs})[0].argmax(1)
    kept = np.concatenate([np.flatnonzero(classes != 2)[:1200], np.flatnonzero(classes == 2)[:6]])
    Samples({"x": inputs[kept]}).save(tmp_path / "rare.npz")
    report = verify(golden, wrong_for_class(tmp_path / "rare.onnx", 2), {"reference": {"path": str(tmp_path / "rare.npz")}})
    assert report["fidelity"]["reference"]["value"] > 0.99
    assert report["verdict"] == "failed"
    assert any("class 2 has collapsed" in reason for reason in report["reasons"])


def test_too_few_samples_are_inconclusive_unless_a_lossless_candidate_is_bit_close(golden: Path, tmp_path: Path) -> None:
    few = {"reference": {"path": samples(tmp_path / "few.npz", 64), "origin": "synthetic"}}
    close = mlp(tmp_path / "close.onnx", weights=noisy(mlp_weights(SIZES), 1e-5))
    lossy = verify(golden, close, few)
    assert lossy["verdict"] == "inconclusive" and lossy["evidence"] == "synthetic"
    assert any("64 samples are fewer than the 300 asked for, and they are made up: name some" in reason for reason in lossy["reasons"])
    assert verify(golden, close, few, lossless=True)["verdict"] == "passed"
    off = mlp(tmp_path / "off.onnx", weights=noisy(mlp_weights(SIZES), 0.02))
    assert verify(golden, off, few, lossless=True)["verdict"] != "passed"
    one = few | {"live": {"path": samples(tmp_path / "one.npz", 1, seed=5), "origin": "captured"}}
    assert verify(golden, close, one, lossless=True)["verdict"] == "passed", "one captured input more is no doubt"
    assert verify(golden, close, one)["verdict"] == "inconclusive"


def test_a_candidate_must_pass_on_live_samples_too(golden: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """A candidate that is right near the reference and saturates beyond it."""
    clip = [onnx.helper.make_node("Clip", ["logits", "low", "high"], ["y"])]
    clipped = mlp_with(tmp_path / "clipped.onnx", clip, low=np.array(-9, np.float32), high=np.array(9, np.float32))
    far = np.random.default_rng(3).standard_normal((400, 16)).astype(np.float32) * 30
    Samples({"x": far}).save(tmp_path / "live.npz")
    live = {"live": {"path": str(tmp_path / "live.npz"), "origin": "captured"}}
    assert verify(golden, clipped, reference)["verdict"] == "passed"
    report = verify(golden, clipped, reference | live)
    assert report["verdict"] == "failed"
    assert any(reason.startswith("live samples: agreement") for reason in report["reasons"])


def test_a_handful_of_live_samples_casts_no_doubt_on_what_the_reference_shows(
    golden: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    """Two requests tried by hand, and no lossy version passed any more until 300 had been captured."""
    close = mlp(tmp_path / "close.onnx", weights=noisy(mlp_weights(SIZES), 1e-3))

    def live(count: int) -> dict[str, Any]:
        return reference | {"live": {"path": samples(tmp_path / "live.npz", count, seed=5), "origin": "captured"}}

    report = verify(golden, close, live(2))
    assert report["verdict"] == "passed", report["reasons"]
    assert any("2 samples are fewer than the 300 asked for; reference samples show it" in note for note in report["notes"])
    wrong = verify(golden, mlp(tmp_path / "wrong.onnx", weights=noisy(mlp_weights(SIZES), 5.0)), live(20))
    assert wrong["verdict"] == "failed" and any(reason.startswith("live samples: agreement") for reason in wrong["reasons"])
    strict = verify(golden, close, live(280), quality={"min_samples": 270, "floor": 0.9999})
    assert strict["verdict"] == "inconclusive" and any(reason.startswith("live samples") for reason in strict["reasons"])


def test_what_calibrated_does_not_judge(golden: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    close = mlp(tmp_path / "close.onnx", weights=noisy(mlp_weights(SIZES), 1e-4))
    hashes = Samples.load(Path(reference["reference"]["path"])).hashes()
    half = verify(golden, close, reference, exclude=hashes[:200], notes=["200 of 400 calibrated"])
    assert half["notes"][0] == "200 of 400 calibrated"
    assert half["fidelity"]["reference"]["samples"] == 200 and half["verdict"] == "inconclusive"
    assert verify(golden, close, reference, exclude=hashes)["verdict"] == "no_data"
    assert verify(golden, close, {})["verdict"] == "no_data"


def labelled(golden: Path, path: Path, count: int = 1200) -> str:
    """Inputs with golden's own class as label for nine of ten, another one for the tenth."""
    inputs = np.random.default_rng(5).standard_normal((count, 16)).astype(np.float32)
    labels: NDArray[np.int64] = open_session(golden, Settings()).run(None, {"x": inputs})[0].argmax(1)
    labels[::10] = (labels[::10] + 1) % 5
    Samples({"x": inputs}, labels.astype(np.int64)).save(path)
    return str(path)


def test_labels_decide_by_accuracy_relative_to_goldens(golden: Path, tmp_path: Path) -> None:
    sets = {"labelled": {"path": labelled(golden, tmp_path / "labelled.npz")}}
    close = mlp(tmp_path / "close.onnx", weights=noisy(mlp_weights(SIZES), 1e-4))
    report = verify(golden, close, sets)
    assert report["verdict"] == "passed" and report["evidence"] == "labelled"
    found = report["fidelity"]["labelled"]
    assert found["metric"] == "accuracy" and found["golden_accuracy"] == pytest.approx(0.9)
    worse = verify(golden, mlp(tmp_path / "worse.onnx", weights=noisy(mlp_weights(SIZES), 0.3)), sets)
    assert worse["verdict"] == "failed" and any("accuracy is" in reason for reason in worse["reasons"])


def test_more_non_finite_outputs_than_golden_fail(golden: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    report = verify(golden, nan_for_large(tmp_path / "nan.onnx"), reference)
    assert report["verdict"] == "failed"
    assert any("non-finite values, golden's has 0" in reason for reason in report["reasons"])


def test_non_finite_outputs_that_golden_has_too_are_no_objection(reference: dict[str, Any], tmp_path: Path) -> None:
    golden, renamed = nan_for_large(tmp_path / "golden.onnx"), nan_for_large(tmp_path / "renamed.onnx")
    report = verify(golden, renamed, reference)
    assert report["verdict"] == "passed", report["reasons"]
    (output,) = report["fidelity"]["reference"]["outputs"]
    assert output["non_finite_golden"] == output["non_finite_candidate"] > 0


@pytest.mark.parametrize("batch", [1, "n"])
def test_a_frozen_batch_fails(batch: int | str, golden: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    path = mlp(tmp_path / "frozen.onnx", batch=1) if batch == 1 else frozen_batch_inside(tmp_path / "frozen.onnx")
    report = verify(golden, path, reference)
    assert report["verdict"] == "failed"
    assert any("batch is frozen" in reason or "fails at batch 2" in reason for reason in report["reasons"])


def test_rows_that_mind_their_company_are_judged_and_served_one_by_one(golden: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    report = verify(golden, scaled_by_company(tmp_path / "company.onnx"), reference)
    assert report["rows"]["independent"] is False and report["serve"]["batch_limit"] == 1
    assert any("requests must be served one at a time" in note for note in report["notes"])


def test_what_is_right_alone_and_wrong_in_company_fails(golden: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    """Requests may be kept apart, but the rows of one request are not: a caller may send any number of them."""
    nodes = [
        onnx.helper.make_node("Gather", ["logits", "first"], ["leader"], axis=0),
        onnx.helper.make_node("Sub", ["logits", "leader"], ["apart"]),
        onnx.helper.make_node("Mul", ["apart", "most"], ["drawn"]),
        onnx.helper.make_node("Sub", ["logits", "drawn"], ["y"]),
    ]
    follows = mlp_with(tmp_path / "follows.onnx", nodes, SIZES, first=np.array([0]), most=np.array(0.9, dtype=np.float32))
    report = verify(golden, follows, reference)
    assert report["serve"]["batch_limit"] == 1 and report["verdict"] == "failed", report["summary"]


def test_dynamic_quantization_is_found_out(golden: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    quantize_dynamic(golden, tmp_path / "dynamic.onnx", weight_type=QuantType.QUInt8)
    report = verify(golden, tmp_path / "dynamic.onnx", reference, quality={"floor": 0.9})
    assert report["rows"]["independent"] is False and report["serve"]["batch_limit"] == 1
    assert report["verdict"] == "passed", report["reasons"]


def test_other_lengths_than_the_samples_are_tried(tmp_path: Path) -> None:
    golden = tokens_model(tmp_path / "golden.onnx")
    sets = {"reference": {"path": samples(tmp_path / "tokens.npz", 400, (12, 8))}}
    good = verify(golden, tokens_model(tmp_path / "good.onnx", scale=1 + 1e-6), sets, task="regression")
    assert good["verdict"] == "passed", good["reasons"]
    assert [entry["label"] for entry in good["shapes"]] == ["length = 6", "length = 11", "length = 24"]
    assert any("unverified beyond" in note for note in good["notes"])
    frozen = verify(golden, frozen_length_inside(tmp_path / "frozen.onnx", 12), sets, task="regression")
    assert frozen["verdict"] == "failed"
    assert any(reason.startswith("at length = 6: cosine is") for reason in frozen["reasons"]), frozen["reasons"]


def test_regression_is_judged_by_cosine_and_can_be_by_noise(tmp_path: Path) -> None:
    golden, path = mlp(tmp_path / "golden.onnx", (16, 32, 1)), samples(tmp_path / "reference.npz")
    candidate = mlp(tmp_path / "near.onnx", weights=noisy(mlp_weights((16, 32, 1)), 0.01))
    sets = {"reference": {"path": path}}
    near = verify(golden, candidate, sets, task="regression", quality={"min_samples": 20})
    assert near["fidelity"]["reference"]["metric"] == "cosine" and near["verdict"] == "passed", near["reasons"]
    noise = verify(golden, candidate, sets, task="regression", quality={"metric": "sqnr_db", "floor": 60})
    assert noise["verdict"] == "failed" and any("dB" in reason for reason in noise["reasons"])


def test_whole_calls_are_judged_one_by_one(tmp_path: Path) -> None:
    """Samples of a model that is not batched: each is one call with its own first axis."""
    golden = mlp(tmp_path / "golden.onnx", batch=1)
    close = mlp(tmp_path / "close.onnx", batch=1, weights=noisy(mlp_weights(SIZES), 1e-4))
    calls = samples(tmp_path / "calls.npz", 320, (1, 16))
    report = verify(golden, close, {"reference": {"path": calls, "stacked": False}}, batchable=False)
    assert report["verdict"] == "passed", report["reasons"]
    assert (
        report["fidelity"]["reference"]["samples"] == 320
        and report["fidelity"]["reference"]["classes"]["met"] + report["fidelity"]["reference"]["classes"]["unverified"] > 1
    )


def test_stored_answers_of_golden_are_used(golden: Path, tmp_path: Path) -> None:
    path = samples(tmp_path / "reference.npz")
    inputs = Samples.load(Path(path)).inputs
    answers = open_session(golden, Settings(graph_level="none")).run(None, inputs)[0]
    Samples({"y": -answers}).save(tmp_path / "answers.npz")
    sets = {"reference": {"path": path, "answers": str(tmp_path / "answers.npz")}}
    report = verify(golden, mlp(tmp_path / "close.onnx", weights=noisy(mlp_weights(SIZES), 1e-4)), sets)
    assert report["fidelity"]["reference"]["value"] < 0.5, "judged by the stored answers, which are turned round here"


def test_stored_answers_hold_for_the_same_inputs_in_another_set_and_for_no_others(golden: Path, tmp_path: Path) -> None:
    path, others = samples(tmp_path / "reference.npz"), samples(tmp_path / "others.npz", seed=9)
    inputs = Samples.load(Path(path)).inputs
    answers = open_session(golden, Settings(graph_level="none")).run(None, inputs)[0]
    Samples({"y": -answers}).save(tmp_path / "answers.npz")
    mixed = {name: np.concatenate([values[::-1], Samples.load(Path(others)).inputs[name][:1]]) for name, values in inputs.items()}
    Samples({name: values[:-1] for name, values in mixed.items()}).save(tmp_path / "same.npz")
    Samples(mixed).save(tmp_path / "mixed.npz")
    close = mlp(tmp_path / "close.onnx", weights=noisy(mlp_weights(SIZES), 1e-4))
    for name, turned in (("same", True), ("mixed", False)):
        sets = {"reference": {"path": path, "answers": str(tmp_path / "answers.npz")}, "live": {"path": str(tmp_path / f"{name}.npz")}}
        assert (verify(golden, close, sets)["fidelity"]["live"]["value"] < 0.5) is turned, name


def test_the_parent_under_another_name_is_nothing_changed(golden: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    renamed = mlp(tmp_path / "renamed.onnx", prefix="other_")
    report = verify(golden, renamed, reference, purpose="swap")
    assert (report["verdict"], report["nothing_changed"]) == ("failed", True)
    assert verify(golden, renamed, reference)["verdict"] == "passed", "a proof is of the version as it is"


def test_a_slower_candidate_fails_and_a_faster_one_passes(tmp_path: Path) -> None:
    """The same answers by another road: half of the products are undone by nothing but time."""
    shallow, deeper = deep(tmp_path / "shallow.onnx", 6), deep(tmp_path / "deep.onnx", 30)
    sets = {"reference": {"path": samples(tmp_path / "reference.npz", 320, 128)}}
    loose = {"metric": "sqnr_db", "floor": -100.0}
    slower = verify(shallow, deeper, sets, purpose="swap", task="regression", quality=loose, timed=True, seconds=20.0)
    assert slower["verdict"] == "failed"
    assert any("no gain worth a swap: CPU time per row +" in reason for reason in slower["reasons"]), slower["reasons"]
    faster = verify(deeper, shallow, sets, purpose="swap", task="regression", quality=loose, timed=True, seconds=20.0)
    assert faster["verdict"] == "passed", faster["reasons"]
    assert faster["latency"]["rows_ratio"]["high"] < 0.5 and "CPU time per row -" in faster["summary"]


def test_a_candidate_that_does_not_open_fails_and_golden_that_does_not_is_rejected(
    golden: Path, reference: dict[str, Any], tmp_path: Path
) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"junk")
    report = verify(golden, broken, reference)
    assert report["verdict"] == "failed" and "cannot be opened" in report["summary"]
    with pytest.raises(Rejected, match="nothing can be judged by golden: "):
        verify(broken, golden, reference)


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ({"floor": 1}, "unknown key 'floor'"),
        ({"quality": {"flor": 1}}, "flor"),
        ({"goal": {"objective": "speed"}}, "objective 'speed'"),
        ({"candidate": "/nowhere.onnx"}, "/nowhere.onnx is no file"),
        ({"sets": {"reference": {"path": "/nowhere.npz"}}}, "nowhere.npz"),
    ],
)
def test_a_wrong_request_is_rejected_with_what_is_wrong(more: dict[str, Any], says: str, golden: Path, reference: dict[str, Any]) -> None:
    request = {"golden": str(golden), "candidate": str(golden), "sets": reference, "purpose": "proof", **more}
    with pytest.raises(Rejected, match=says):
        run(request, Budget())


def test_it_can_be_cancelled(golden: Path, reference: dict[str, Any], tmp_path: Path) -> None:
    close = mlp(tmp_path / "close.onnx", weights=noisy(mlp_weights(SIZES), 1e-4))
    with pytest.raises(Cancelled):
        run({"golden": str(golden), "candidate": str(close), "sets": reference}, Budget(cancelled=lambda: True))


def timed(ratio: Interval, waiting: float = 0.1, batch: int = 1) -> Comparison:
    return Comparison(batch, ratio, ratio, 24, Series([1.0], [1.0]), Series([1.0], [1.0]), Quietness(waiting, 0.0))


@pytest.mark.parametrize(
    ("ratio", "waiting", "verdict", "says"),
    [
        (Interval(0.5, 0.48, 0.52), 0.1, "passed", ""),
        (Interval(0.98, 0.97, 0.99), 0.1, "failed", "no gain worth a swap"),
        (Interval(0.95, 0.90, 1.00), 0.1, "inconclusive", "the gain is not shown"),
        (Interval(0.5, 0.48, 0.52), 0.97, "inconclusive", "too busy to measure"),
    ],
)
def test_the_gain_is_shown_by_its_interval(ratio: Interval, waiting: float, verdict: str, says: str) -> None:
    report = SpeedReport(latency={"batch 1": timed(ratio, waiting)}, rows_ratio=ratio)
    conclude(report, Goal())
    assert report.verdict == verdict
    assert says in " ".join(report.reasons)


def test_a_gain_at_one_batch_does_not_pay_for_harm_at_another() -> None:
    report = SpeedReport(
        latency={"batch 1": timed(Interval(0.6, 0.58, 0.62)), "batch 8": timed(Interval(1.4, 1.3, 1.5), batch=8)},
        rows_ratio=Interval(0.6, 0.58, 0.62),
    )
    conclude(report, Goal())
    assert report.verdict == "failed" and "slower at batch 8" in " ".join(report.reasons)


def test_without_a_least_gain_no_slower_will_do() -> None:
    goal = Goal(least_gain=None)
    assert goal.weigh(Interval(1.0, 0.97, 1.03)) == "passed"
    assert goal.weigh(Interval(1.2, 1.1, 1.3)) == "failed"
    assert goal.weigh(Interval(1.02, 0.95, 1.10)) == "inconclusive"
