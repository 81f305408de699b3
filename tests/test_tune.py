"""Tuning on a real model, and the choice among layouts as a pure function of what was measured."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path

import pytest

from optimizers.base import Budget, Rejected
from optimizers.session import Settings
from optimizers.stats import Interval
from optimizers.tune import BatchRow, Row, TuneRequest, choose, choose_batch, describe, layouts, run
from tests.judged_models import deep
from tests.judged_models import samples as saved_samples


def row(settings: Settings, speedup: tuple[float, float, float], cores_burnt: float) -> Row:
    return Row(settings, Interval(*speedup), 0.001, None, cores_burnt, 0.05)


def test_layouts_fit_the_cores_and_spin_only_where_there_are_threads() -> None:
    used = Settings()
    saturated = layouts(4, used, "throughput")
    assert {(s.intra_op_threads, s.instances) for s in saturated} == {(1, 4), (2, 2), (4, 1)}
    assert all(s.spin_duration_us == 0 for s in saturated if s.intra_op_threads == 1)
    assert {s.spin_duration_us for s in saturated if s.intra_op_threads == 2} == {0, 200, 1000}
    single = layouts(4, used, "latency")
    assert used not in single and {s.instances for s in single} == {1}
    assert layouts(1, used, "latency") == []
    assert {s.intra_op_threads for s in layouts(6, used, "latency")} == {2, 4, 6}


def test_what_the_owner_fixed_is_not_varied() -> None:
    used = Settings(intra_op_threads=2, instances=2)
    spinning = layouts(4, used, "throughput", ("intra_op_threads", "instances"))
    assert [(s.intra_op_threads, s.instances, s.spin_duration_us) for s in spinning] == [(2, 2, 200), (2, 2, 1000)]
    assert layouts(4, used, "latency", ("intra_op_threads", "instances", "spin_duration_us")) == []
    assert {s.spin_duration_us for s in layouts(4, used, "latency", ("spin_duration_us",))} == {0}
    with pytest.raises(Rejected, match=r"tune: 'graph_level' cannot be fixed; there are intra_op_threads, instances"):
        TuneRequest.from_json({"path": "m.onnx", "samples": "s.npz", "fixed": ["graph_level"]})


def test_the_settings_in_use_stay_without_a_shown_gain() -> None:
    used, two = Settings(), Settings(intra_op_threads=2)
    assert choose(used, [row(two, (1.2, 0.98, 1.5), 1.0)]) == (used, None)
    assert choose(used, []) == (used, None)


def test_the_cheapest_of_the_best_is_taken() -> None:
    """The measurement of shared facts, noise: the int8 model gains from a second thread only while it spins, the fp32 one anyway."""
    used, off = Settings(), Settings(intra_op_threads=2)
    short, long = Settings(intra_op_threads=2, spin_duration_us=200), Settings(intra_op_threads=2, spin_duration_us=1000)
    int8 = [row(off, (1.0, 0.9, 1.1), 0.45), row(short, (1.25, 1.1, 1.4), 0.6), row(long, (1.6, 1.5, 1.7), 0.74)]
    assert choose(used, int8)[0] == long
    fp32 = [row(off, (1.66, 1.6, 1.7), 0.88), row(short, (1.70, 1.6, 1.8), 0.97), row(long, (1.68, 1.6, 1.7), 1.05)]
    assert choose(used, fp32)[0] == off


def test_the_batch_limit_stays_where_rows_are_about_as_cheap_and_else_is_the_smallest_good_one() -> None:
    rows = [BatchRow(1, 10e-6, 1), BatchRow(4, 6.2e-6, 1), BatchRow(8, 6.1e-6, 1), BatchRow(32, 6.0e-6, 1)]
    assert choose_batch(8, rows) == 8
    assert choose_batch(1, rows) == 4


def test_a_layout_is_described_in_words() -> None:
    assert describe(Settings(intra_op_threads=2, spin_duration_us=200)) == "1 instance of 2 threads, spinning 200 µs"
    assert describe(Settings(instances=2)) == "2 instances of 1 thread"


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_a_small_model_is_tuned_in_time_and_the_table_says_what_was_tried(objective: str, tmp_path: Path) -> None:
    path = deep(tmp_path / "model.onnx", 12)
    request = {
        "path": str(path),
        "samples": saved_samples(tmp_path / "s.npz", 64, 128),
        "config": {"objective": objective, "max_seconds": 10, "cores": 2},
    }
    began = time.monotonic()
    answer = run(request, Budget())
    assert time.monotonic() - began < 60
    json.dumps(answer, allow_nan=False)
    assert answer["verdict"] in {"tuned", "kept", "inconclusive"} and answer["summary"].startswith(answer["verdict"])
    settings = answer["settings"]
    assert settings["intra_op_threads"] * settings["instances"] <= 2
    tried = {entry["batch"] for entry in answer["batches"]}
    assert settings["batch_limit"] in tried or (answer["verdict"] == "inconclusive" and not tried), (
        "a loud host may leave no time for batches"
    )
    assert answer["table"] or answer["notes"]
    assert all(entry["waiting_ratio"] >= 0 and entry["cores_burnt"] > 0 for entry in answer["table"])
    if answer["verdict"] == "tuned" and answer["gain"]:
        assert answer["gain"]["low"] >= 1.05
    if answer["verdict"] == "inconclusive":
        assert not answer["changed"] and "too busy" in answer["reason"]


def test_a_batch_is_cheaper_per_row_than_a_row_alone(tmp_path: Path) -> None:
    path = deep(tmp_path / "model.onnx", 12)
    request = {
        "path": str(path),
        "samples": saved_samples(tmp_path / "s.npz", 64, 128),
        "config": {"max_seconds": 6, "cores": 1},
        "settings": {"batch_limit": 1},
    }
    answer = run(request, Budget())
    assert answer["table"] == [] and answer["cores"] == 1
    per_row = {entry["batch"]: entry["cpu_s_per_row"] for entry in answer["batches"]}
    assert per_row[8] < per_row[1]
    assert answer["settings"]["batch_limit"] > 1 and answer["changed"]


def test_a_model_that_is_not_batched_keeps_its_batch_limit(tmp_path: Path) -> None:
    path = deep(tmp_path / "model.onnx", 3)
    request = {
        "path": str(path),
        "samples": saved_samples(tmp_path / "s.npz", 8, 128),
        "batchable": False,
        "config": {"max_seconds": 2, "cores": 1},
    }
    answer = run(request, Budget())
    assert answer["batches"] == [] and answer["settings"]["batch_limit"] == Settings().batch_limit and answer["verdict"] == "kept"


@pytest.mark.parametrize(
    ("change", "says"),
    [({"config": {"objective": "speed"}}, "objective 'speed'"), ({"samples": "/nowhere.npz"}, "nowhere"), ({"color": 1}, "color")],
)
def test_a_wrong_request_is_rejected(change: dict[str, object], says: str, tmp_path: Path) -> None:
    request = {"path": str(deep(tmp_path / "model.onnx", 1)), "samples": saved_samples(tmp_path / "s.npz", 8, 128), **change}
    with pytest.raises(Rejected, match=says):
        run(request, Budget())


def test_a_speedup_without_an_upper_bound_is_still_json() -> None:
    text = json.dumps(row(Settings(), (1.1, 0.9, math.inf), 1.0).to_json("p50_s"), allow_nan=False)
    assert '"high": null' in text
