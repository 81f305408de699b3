"""The paired replay on real sessions: ratios and findings, never bare milliseconds; and what its findings rest on, from made-up intervals."""

from __future__ import annotations

import json
import math
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from optimizers.base import Budget, Rejected
from optimizers.blame import VARIED_INPUTS, BlameRequest, _Replay, run
from optimizers.blame_report import CLEAR_PLACEMENTS, PLACEMENTS, BlameReport, Proven, Weighed
from optimizers.measure import Quietness
from optimizers.samples import Samples
from optimizers.stats import Interval
from optimizers.task import Failure, TaskFailed, TaskLimits, run_task_sync
from optimizers.verdict import SampleSet
from tests.judged_models import deep

QUIET, LOUD = Quietness(0.02, 0.0), Quietness(0.97, 0.0)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two files, the deeper one about twice as slow; samples of 4 rows and of 16 to a call."""
    made = tmp_path_factory.mktemp("blame")
    deep(made / "shallow.onnx", 20)
    deep(made / "deep.onnx", 40)
    for name, rows in (("reference", 16), ("recent", 16), ("longer", 48)):
        values = np.random.default_rng(len(name)).standard_normal((12, rows, 128)).astype(np.float32)
        Samples({"x": values}, stacked=False).save(made / f"{name}.npz")
    return made


def request(folder: Path, live: str, **more: Any) -> dict[str, Any]:
    return {"live": str(folder / f"{live}.onnx"), "reference": samples(folder, "reference"), "seconds": 20, **more}


def samples(folder: Path, name: str) -> dict[str, Any]:
    return {"path": str(folder / f"{name}.npz"), "stacked": False}


def test_a_slower_file_is_blamed_when_all_placements_agree(folder: Path) -> None:
    began = time.monotonic()
    found = run(request(folder, "deep", other=str(folder / "shallow.onnx")), Budget(seconds=30))
    assert found["findings"] == ["version_slower"], found["text"]
    assert 2 <= len(found["version"]) <= PLACEMENTS and all(1.4 < one["ratio"]["low"] < 2.4 for one in found["version"])
    assert found["fresh"]["cpu_s_per_row"] > 0 and found["input"] is None
    assert found["version_over_proof"] == min((one["ratio"] for one in found["version"]), key=lambda ratio: ratio["estimate"])
    assert time.monotonic() - began < 30
    json.dumps(found, allow_nan=False)


def test_the_same_file_is_as_proven_and_so_is_one_whose_proof_said_so(folder: Path) -> None:
    same = run(
        request(folder, "shallow", other=str(folder / "shallow.onnx"), recent=[samples(folder, "recent")], tolerance=0.3),
        Budget(seconds=30),
    )
    assert same["findings"] == ["as_proven"], same["text"]
    proof = {"rows_ratio": {"estimate": 2.0, "low": 1.9, "high": 2.3}}
    proven = run(request(folder, "deep", other=str(folder / "shallow.onnx"), proof=proof), Budget(seconds=30))
    assert proven["findings"] == ["as_proven"], proven["text"]
    assert 0.7 < proven["version_over_proof"]["estimate"] < 1.15


def test_inputs_are_weighed_first_only_where_the_file_seems_as_quick_as_the_other(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    weigh, placements = _Replay._weigh_input, []

    def noted(self: _Replay, live: Any, share: float) -> None:
        placements.append(len(self._version))
        weigh(self, live, share)

    monkeypatch.setattr(_Replay, "_weigh_input", noted)
    for live, tolerance in (("shallow", 0.3), ("deep", 0.05)):
        asked = request(folder, live, other=str(folder / "shallow.onnx"), recent=[samples(folder, "recent")], tolerance=tolerance)
        found = run(asked, Budget(seconds=30))
        assert found["input"] is not None, found["text"]
    assert placements[0] == 1 and placements[1] >= CLEAR_PLACEMENTS, "on a busy host the time may do for one of the two"


def test_longer_inputs_are_blamed_and_the_file_is_not(folder: Path) -> None:
    found = run(request(folder, "shallow", recent=[samples(folder, "longer")], proof={"live_cpu_s": 1e-9}), Budget(seconds=30))
    assert found["findings"] == ["input_costlier"], found["text"]
    assert found["input"]["ratio"]["low"] > 1.5 and found["fresh_over_proof"] > 1


def test_recent_inputs_are_held_against_earlier_ones_and_not_against_frozen_ones_of_another_length(folder: Path) -> None:
    longer = [samples(folder, "longer")]
    found = run(request(folder, "shallow", recent=longer, usual=longer, tolerance=0.3), Budget(seconds=30))
    assert found["findings"] == ["as_proven"] and found["usual"] == "earlier", found["text"]
    assert 0.7 < found["input"]["ratio"]["estimate"] < 1.3 and found["fresh"]["cpu_s_per_row"] > 0


def test_inputs_of_many_lengths_count_once_each_and_blame_nothing_where_the_mix_is_as_ever(folder: Path) -> None:
    mixed = [samples(folder, "reference"), samples(folder, "longer")]
    same = run(request(folder, "shallow", recent=mixed, usual=mixed), Budget(seconds=30))
    assert same["findings"] != ["input_costlier"] and same["input"]["rounds"] <= VARIED_INPUTS, same["text"]
    longer = run(request(folder, "shallow", recent=mixed[1:], usual=mixed), Budget(seconds=30))
    assert longer["input"]["ratio"]["estimate"] > 1.2 and longer["input"]["rounds"] <= VARIED_INPUTS, longer["text"]


def test_without_anything_to_compare_with_only_a_fresh_sessions_cost_is_told(folder: Path) -> None:
    found = run(request(folder, "shallow"), Budget(seconds=30))
    assert found["findings"] == ["inconclusive"] and "name another version's file" in found["text"]
    assert found["fresh"]["p10_s"] <= found["fresh"]["cpu_s_per_row"] <= found["fresh"]["p90_s"] * 1.2


def test_with_little_time_it_ends_in_time_and_claims_no_more_than_it_saw(folder: Path) -> None:
    began = time.monotonic()
    found = run(request(folder, "deep", other=str(folder / "shallow.onnx"), seconds=2.0), Budget(seconds=3))
    assert found["findings"] in (["inconclusive"], ["version_slower"]) and time.monotonic() - began < 8


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"live": "/nowhere/model.onnx"}, "/nowhere/model.onnx is no file"),
        ({"reference": {"path": "/nowhere/samples.npz"}}, "samples: .*/nowhere/samples.npz"),
        ({"reference": None}, "'reference' is missing"),
        ({"speed": 3}, "unknown key 'speed'"),
        ({"settings": {"graph_level": "wild"}}, "graph level 'wild' is unknown"),
    ],
)
def test_what_cannot_be_replayed_says_why(folder: Path, change: dict[str, Any], text: str) -> None:
    with pytest.raises(Rejected, match=text):
        run({**request(folder, "shallow"), **change}, Budget(seconds=30))


def test_inputs_that_the_model_refuses_are_named(folder: Path) -> None:
    Samples({"x": np.zeros((3, 2, 7), np.float32)}, stacked=False).save(folder / "narrow.npz")
    with pytest.raises(Rejected, match=r"blame: shallow\.onnx: .*[Ii]nvalid"):
        run(request(folder, "shallow", recent=[samples(folder, "narrow")]), Budget(seconds=30))


def test_as_a_task_it_runs_in_a_child(folder: Path) -> None:
    with pytest.raises(TaskFailed, match="is no file") as caught:
        run_task_sync("blame", {**request(folder, "shallow"), "other": "/nowhere.onnx"}, TaskLimits(nice=0, scheduler="other"))
    assert caught.value.kind is Failure.REJECTED


def weighed(low: float, high: float, limit: float = 1.05, quiet: Quietness = QUIET) -> Weighed:
    return Weighed(Interval((low + high) / 2, low, high), limit, 12, quiet)


def findings(*version: Weighed, recent: Weighed | None = None, notes: tuple[str, ...] = ()) -> list[str]:
    return [one.value for one in BlameReport(version, recent, notes=notes).findings]


def test_more_instructions_are_more_work_whatever_the_host_does() -> None:
    """Of one file they decide about its inputs; of two files they only say that no placement in memory is the reason, and fewer of them say nothing."""
    more, as_many = Interval(1.3, 1.29, 1.31), Interval(1.0, 1.0, 1.0)
    loud = replace(weighed(0.5, 2.0, quiet=LOUD), instructions=more, one_file=True)
    assert findings(recent=loud) == ["input_costlier"]
    told = BlameReport(input=loud).to_json()
    assert told["input_by"] == "instructions" and told["input_ratio"]["estimate"] == 1.3 and "too busy" not in told["text"]
    assert findings(recent=replace(loud, instructions=as_many)) == findings(replace(loud, one_file=False)) == ["inconclusive"]
    within, slower = weighed(0.98, 1.02), weighed(1.1, 1.3)
    assert findings(recent=replace(within, instructions=more, one_file=True)) == ["as_proven"], "as quick, by more of them"
    assert findings(recent=replace(slower, instructions=as_many, one_file=True)) == ["input_costlier"]
    assert BlameReport(input=replace(slower, instructions=more, one_file=True)).to_json()["input_by"] == "CPU time"
    assert findings(*(replace(slower, instructions=more),) * CLEAR_PLACEMENTS) == ["version_slower"]
    assert findings(*(replace(slower, instructions=as_many),) * CLEAR_PLACEMENTS) == ["inconclusive"]


def test_findings_follow_from_intervals() -> None:
    slower, same, wide = weighed(1.1, 1.3), weighed(0.98, 1.02), weighed(0.9, 1.2)
    often = (slower,) * PLACEMENTS
    assert findings(*often) == ["version_slower"]
    clear = weighed(1.7, 1.9)
    assert findings(clear, clear) == ["version_slower"] and findings(clear) == findings(clear, slower) == ["inconclusive"]
    assert findings(slower, same) == findings(*often[1:]) == findings(wide) == ["inconclusive"], "one placement in memory blames nobody"
    assert findings(same) == findings(same, recent=same) == ["as_proven"]
    assert findings(same, recent=slower) == ["input_costlier"]
    assert findings(*often, recent=slower) == ["version_slower", "input_costlier"]
    assert findings(same, recent=wide) == findings() == findings(same, notes=("out of time",)) == ["inconclusive"]


def test_a_loud_host_blames_nobody_and_acquits_nobody() -> None:
    loud = weighed(1.5, 1.6, quiet=LOUD)
    assert findings(*(loud,) * PLACEMENTS, recent=loud) == findings(weighed(0.9, 1.0, quiet=LOUD)) == ["inconclusive"]
    report = BlameReport((loud,))
    assert "threads waited for a core 97% of the time" in report.text and not report.to_json()["cpu_counts"]
    assert findings(replace(loud, ratio=Interval(1.2, -math.inf, math.inf), quiet=QUIET)) == ["inconclusive"]


def test_the_proof_is_read_in_its_forms() -> None:
    assert Proven.from_json(None) == Proven(Interval(1.0, 1.0, 1.0))
    assert Proven.from_json({"rows_ratio": 0.5}).rows_ratio == Interval(0.5, 0.475, 0.525)
    assert Proven.from_json({"rows_ratio": {"estimate": 0.5, "low": 0.45, "high": None}}).rows_ratio == Interval(0.5, 0.45, 0.525)
    given = BlameRequest.from_json({"live": "a", "reference": {"path": "b"}, "settings": {"intra_op_threads": 4, "queue_limit": 9}})
    assert given.settings.intra_op_threads == 1 and given.reference == SampleSet("b") and given.recent == ()
