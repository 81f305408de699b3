"""The detection benchmark: its rules on made-up traces whose truth is known, its files that are really slower, its tables."""

from __future__ import annotations

import subprocess
from pathlib import Path

import numpy as np
import onnxruntime as ort
import pytest

from benchmarks import detection, traces
from benchmarks import machine as machines
from benchmarks.detectors import plain_rules, river_rules
from benchmarks.models import DEMO
from benchmarks.neighbours import NONE, neighbours, parsed
from benchmarks.planted import with_convolutions
from benchmarks.traces import BESIDE, Phase, Trace, phases_of


def phase(beside: str, planted: int, wall: float, cpu: float, seconds: float = 60.0, seed: int = 0) -> Phase:
    """Calls each 50 ms with 5 % of noise."""
    rng = np.random.default_rng(seed)
    at = np.arange(0, seconds, 0.05)
    return Phase(beside, planted, at, 0.01 * wall * rng.lognormal(0, 0.05, len(at)), 0.01 * cpu * rng.lognormal(0, 0.05, len(at)))


TRACE = Trace(
    "made up",
    (
        phase(NONE, 0, 1, 1),
        phase(NONE, 0, 1, 1, seed=1),
        phase("cpu2", 0, 2, 1, seed=2),
        phase("cpu2", 20, 2.4, 1.2, seed=3),
        phase(NONE, 20, 1.2, 1.2, seed=4),
    ),
)


def test_wall_time_cries_wolf_beside_neighbours_and_cpu_time_does_not() -> None:
    scores = {(s.rule, s.signal): s for s in (detection.score(rule, TRACE) for rule in plain_rules())}
    cpu, wall = scores["2 blocks of 10 s > +15%", "cpu"], scores["3 blocks of 10 s > +20%", "wall"]
    assert (cpu.false_quiet, cpu.false_beside) == (0, 0) and wall.false_beside >= 1 and wall.false_quiet == 0
    assert [round(delay or 0) for delay in cpu.delays[20]] == [20, 20], "two blocks of ten seconds"
    hone = next(score for (rule, _), score in scores.items() if rule.startswith("Hone"))
    assert (hone.false_quiet, hone.false_beside) == (0, 0) and all(0 < (delay or 0) <= 20 for delay in hone.delays[20])
    assert scores["CUSUM k=1 h=8", "wall"].false_beside > 10 and scores["CUSUM k=1 h=8", "cpu"].delays[20][1] is not None


def test_rivers_detectors_are_left_out_or_see_what_doubles() -> None:
    for rule in river_rules():
        assert rule.suspicions(TRACE.baseline, phase(NONE, 100, 2, 2, seed=9)), rule
    if not river_rules():
        results = {
            "machine": machines.description(),
            "suspicions": {"t": detection.scored(TRACE)},
            "river": False,
            "minutes": 1,
            "quiet": {},
        }
        assert "River is not installed" in detection.markdown(results)


def test_a_trace_is_read_as_it_was_written(tmp_path: Path) -> None:
    rows = [(100 + i * 0.05, i // 100, 2.0, 1.0 + (i // 100) * 0.5, 0.1) for i in range(200)]
    np.savez(tmp_path / "t.npz", one_thread=np.array(rows, np.float64), one_thread_phases=np.array(["none+0", "none+50"]))
    trace = traces.read(tmp_path / "t.npz")
    assert [(p.beside, p.planted, len(p.cpu_s)) for p in trace.phases] == [(NONE, 0, 100), (NONE, 50, 100)]
    assert trace.planted_ratio(50) == pytest.approx(1.5) and trace.baseline.wall_s[0] == pytest.approx(0.002)
    assert trace.phases[1].at_s[0] == 0


def test_other_files_are_refused_by_what_they_lack(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", y=np.zeros(3))
    with pytest.raises(ValueError, match="no arrays one_thread and one_thread_phases; it has y"):
        traces.read(tmp_path / "x.npz")
    np.savez(tmp_path / "x.npz", one_thread=np.zeros((3, 5)), one_thread_phases=np.array(["cpu1+0"]))
    with pytest.raises(ValueError, match="the first phase must be"):
        traces.read(tmp_path / "x.npz")


def test_a_recording_takes_the_time_that_was_asked_for_and_begins_quiet() -> None:
    plan = phases_of([0, 10, 20], 600)
    assert plan[0][:2] == (NONE, 0) and sum(seconds for _, _, seconds in plan) == pytest.approx(600)
    assert {(beside, level) for beside, level, _ in plan} == {(beside, level) for beside in BESIDE for level in (0, 10, 20)}


def test_a_file_with_planted_convolutions_gives_the_same_answers(tmp_path: Path) -> None:
    source = DEMO / "1" / "model.onnx"
    images = np.random.default_rng(0).random((3, 1, 32, 32), np.float32)
    answers = []
    for path in (source, with_convolutions(source, tmp_path / "slower.onnx", 3)):
        session = ort.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        answers.append(session.run(None, {"image": images})[0])
    assert np.array_equal(*answers)


def test_neighbours_are_there_and_gone() -> None:
    with neighbours("burst1"):
        found = subprocess.run(["pgrep", "-f", "until = time.monotonic"], capture_output=True, text=True)
        assert found.returncode == 0
    with pytest.raises(ValueError, match="neighbours 'disk1' are unknown; name none, or one of cpu, mem, burst"):
        parsed("disk1")


def test_the_table_of_blames_counts_right_and_wrong_ones() -> None:
    quiet = {"waiting_ratio": 0.5}
    slower = {"findings": ["version_slower"], "version_over_proof": {"estimate": 1.2}, "quiet": quiet, "seconds": 5.0}
    fine = {"findings": ["as_proven"], "version_over_proof": {"estimate": 1.0}, "quiet": quiet, "seconds": 4.0}
    rows = [
        detection._row("nothing wrong", "", "cpu2", [fine, fine, slower]),
        detection._row("file +20 %", "version_slower", "cpu2", [slower, slower, fine]),
    ]
    results = {"machine": machines.description(), "suspicions": {}, "river": True, "minutes": 1, "quiet": {}, "blame": rows}
    text = detection.markdown(results)
    assert "Blamed wrongly: 1 times in 6 replays, 3 of them with nothing wrong; file +20 % blamed in 2 of 3." in text
    assert "| file +20 % | cpu2 | 3 | as_proven 1, version_slower 2 | 1.20 (1.00–1.20) | 50% | 5.0 / 5.0 |" in text
