"""Paired measurement on real sessions in real processes, on a machine that others use: ratios and their order, never bare milliseconds."""

from __future__ import annotations

import math
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest

from optimizers.cores import quietest_core
from optimizers.gain import Goal, speed
from optimizers.layouts import for_others, low_load, throughput
from optimizers.measure import LEAST_ROUNDS, Arm, ArmFailed, Quietness, compare, quietness
from optimizers.session import Feeds, Settings, to_bfloat16
from tests.judged_models import deep, save, value

SHALLOW, DEEP = 20, 40
"""Layers of the two models; their times are as these, and constant parts make the ratio a little less than 2."""


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    folder = tmp_path_factory.mktemp("models")
    return deep(folder / "shallow.onnx", SHALLOW), deep(folder / "deep.onnx", DEEP)


def rows(count: int, width: int = 128) -> Feeds:
    return {"x": np.random.default_rng(0).standard_normal((count, width)).astype(np.float32)}


@contextmanager
def busy_neighbours(count: int) -> Iterator[None]:
    """Processes that keep every core busy with arithmetic."""
    spin = "x = 1\nwhile True:\n    x = (x * 31 + 7) % 1000003"
    processes = [subprocess.Popen([sys.executable, "-c", spin]) for _ in range(count)]
    try:
        time.sleep(0.2)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def test_an_equal_file_makes_no_difference_and_a_deeper_one_is_slower(models: tuple[Path, Path]) -> None:
    shallow, deeper = models
    with Arm(shallow, Settings()) as first, Arm(shallow, Settings()) as same, Arm(deeper, Settings()) as slower:
        equal = compare(first, same, rows(16), 16, seconds=8)
        regressed = compare(first, slower, rows(16), 16, seconds=8)
    assert equal.cpu.low <= 1.06 and equal.cpu.high >= 0.94, equal
    assert 0.85 < equal.cpu.estimate < 1.15, equal
    assert regressed.cpu.low > 1.5, regressed


def test_too_few_rounds_for_an_interval_are_made_up_for(models: tuple[Path, Path]) -> None:
    """On a machine that stalled, time is over after a few rounds, which say nothing about either side."""
    with Arm(models[0], Settings()) as first, Arm(models[1], Settings()) as other:
        enough = compare(first, other, rows(16), 16, seconds=0.01, longest=60)
        given_up = compare(first, other, rows(16), 16, seconds=0.01)
    assert enough.rounds == LEAST_ROUNDS and 0 < enough.cpu.low <= enough.cpu.high < math.inf
    assert given_up.rounds < LEAST_ROUNDS and given_up.cpu.high == math.inf


def test_under_busy_neighbours_wall_time_lies_and_cpu_time_does_not(models: tuple[Path, Path]) -> None:
    shallow, deeper = models
    with Arm(shallow, Settings()) as first, Arm(shallow, Settings()) as same, Arm(deeper, Settings()) as slower:
        quiet = compare(first, slower, rows(16), 16, seconds=8)
        with busy_neighbours(2 * (os.cpu_count() or 1)):
            equal = compare(first, same, rows(16), 16, seconds=8)
            regressed = compare(first, slower, rows(16), 16, seconds=8)
    assert equal.quiet.waiting_ratio > 0.3
    assert 0.8 < equal.cpu.estimate < 1.25, equal
    assert 1.5 < regressed.cpu.low < regressed.cpu.high < 2.5, regressed
    assert regressed.cpu.estimate == pytest.approx(quiet.cpu.estimate, rel=0.15)
    assert not equal.quiet.wall_counts


def test_two_instances_serve_more_rows_than_one_if_there_are_cores(models: tuple[Path, Path]) -> None:
    _, deeper = models
    with Arm(deeper, Settings()) as one, Arm(deeper, Settings(instances=2)) as two:
        found = throughput(one, two, (rows(16), rows(16)), (16, 16), seconds=2)
    assert found.unit == "rows_per_s" and found.rounds >= 1
    if len(os.sched_getaffinity(0)) >= 2 and found.quiet.wall_counts:
        assert found.ratio.high > 1.2, found
    assert found.other.cores_burnt > 0.2


def test_spinning_threads_are_seen_burning_cores_at_low_load(models: tuple[Path, Path]) -> None:
    _, deeper = models
    if len(os.sched_getaffinity(0)) < 2:
        pytest.skip("needs two cores")
    with Arm(deeper, Settings()) as calm, Arm(deeper, Settings(intra_op_threads=2, spin_duration_us=5000)) as spinning:
        found = low_load(calm, spinning, rows(128), seconds=2, pause_s=0.008)
    assert found.other.cores_burnt > 1.3 * found.first.cores_burnt or not found.quiet.wall_counts, found


def test_each_thread_of_a_call_can_have_a_core_of_its_own(models: tuple[Path, Path]) -> None:
    cores = sorted(os.sched_getaffinity(0))[:2]
    if len(cores) < 2:
        pytest.skip("needs two cores")
    with Arm(models[0], Settings(intra_op_threads=2)) as two, Arm(models[0], Settings(intra_op_threads=3)) as three:
        for arm in (two, three):
            arm.spread(cores)
        assert [cpus for cpus in affinities(two._process.pid) if len(cpus) == 1] == [{cores[0]}, {cores[1]}]
        assert all(cpus == set(cores) for cpus in affinities(three._process.pid)), "three threads on two cores are left to the kernel"
        two.pin(cores)
        assert all(cpus == set(cores) for cpus in affinities(two._process.pid))


def affinities(pid: int) -> list[set[int]]:
    """Of its threads, the calling one first."""
    return [os.sched_getaffinity(int(task.name)) for task in sorted(Path(f"/proc/{pid}/task").iterdir(), key=lambda t: int(t.name))]


def test_a_proof_at_low_load_gives_each_thread_a_core(models: tuple[Path, Path]) -> None:
    """Helpers that wake on their caller's core wait for it while another idles: proofs on idle machines called the host loud."""
    cores = sorted(os.sched_getaffinity(0))
    if len(cores) < 2:
        pytest.skip("needs two cores")
    settings, seen = Settings(intra_op_threads=2), list[set[int]]()

    def look(step: str, _share: float) -> None:
        if step == "latency in its layout":
            seen.extend(
                cpus for arm in Path(f"/proc/self/task/{os.getpid()}/children").read_text().split() for cpus in affinities(int(arm))
            )

    report = speed(str(models[0]), settings, str(models[0]), settings, {1: rows(16)}, Goal(), seconds=3, tick=look)
    if report.layout is None:
        pytest.skip(f"the host was too busy for layouts: {report.notes}")
    for core in cores[:2]:
        assert seen.count({core}) == 2 * report.layout.rounds + 2 * report.layout.rounds_left_out


def test_threads_of_one_layout_that_wait_for_each_other_do_not_make_the_host_loud(
    models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert for_others(2.0, 3.0, 10.0, 13.5) == 0.5 and for_others(2.0, 3.0, 10.0, 18.0) == 2.0
    assert for_others(2.0, 3.0, 10.0, 12.9) == 0.0 and for_others(2.0, 3.0, None, None) == 2.0
    settings = Settings(intra_op_threads=2)
    with Arm(models[0], settings) as first, Arm(models[0], settings) as other:
        with one_core(), busy_neighbours(1):  # the arms' own threads and another program share one core
            found = low_load(first, other, rows(16), seconds=1.5)
            assert found.quiet.waiting_ratio > 0.25, found
        monkeypatch.setattr("optimizers.layouts.busy_s", lambda: 0.0)  # nobody else ran
        assert low_load(first, other, rows(16), seconds=1.0).quiet.waiting_ratio == 0.0


@contextmanager
def one_core() -> Iterator[None]:
    cores = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {max(cores)})
    try:
        yield
    finally:
        os.sched_setaffinity(0, cores)


def test_inputs_are_sent_once_and_outputs_come_back_in_order(models: tuple[Path, Path]) -> None:
    with Arm(models[0], Settings()) as arm:
        feeds = rows(3)
        assert arm.keep(feeds) == arm.keep(feeds) == 0 and arm.keep(rows(2)) == 1
        alone = [arm.call({"x": feeds["x"][i : i + 1]})[0] for i in range(3)]
        assert np.allclose(np.concatenate(alone), arm.call(feeds)[0], atol=1e-4)
        assert [info.name for info in arm.opened.outputs] == ["y"] and arm.opened.load_s > 0


def test_a_file_that_does_not_open_is_an_error_with_the_runtimes_words(tmp_path: Path) -> None:
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(b"not a model")
    with pytest.raises(ArmFailed, match=r"broken\.onnx: .*[Pp]rotobuf") as caught:
        Arm(broken, Settings())
    assert caught.value.how == "error" and caught.value.path == broken


def test_a_call_that_the_model_refuses_leaves_the_arm_alive(models: tuple[Path, Path]) -> None:
    with Arm(models[0], Settings()) as arm:
        with pytest.raises(ArmFailed, match="shallow") as caught:
            arm.call(rows(1, width=3))
        assert caught.value.how == "error"
        assert arm.call(rows(1))[0].shape == (1, 128)


def test_an_arm_that_dies_says_by_which_signal_and_takes_nobody_along(models: tuple[Path, Path]) -> None:
    with Arm(models[0], Settings()) as arm, Arm(models[0], Settings()) as bystander:
        arm._process.kill()
        with pytest.raises(ArmFailed, match="SIGKILL") as caught:
            arm.call(rows(1))
        assert caught.value.how == "died"
        assert bystander.call(rows(1))[0].shape == (1, 128)


def test_an_arm_that_hangs_is_given_up_and_one_that_works_or_waits_is_not(models: tuple[Path, Path]) -> None:
    with Arm(models[0], Settings()) as arm:
        key, arm.idle_s = arm.keep(rows(1)), 0.5
        assert arm.saturate(key, 2.0).calls_per_s > 0
        with pytest.raises(ArmFailed, match="no CPU time used") as caught:
            arm.time(key, 3, 1, pause_s=5.0)
        assert caught.value.how == "hung"


def test_an_arm_that_works_for_ever_is_given_up(models: tuple[Path, Path]) -> None:
    with Arm(models[0], Settings()) as arm:
        key, arm.longest_s = arm.keep(rows(1)), 1.0
        with pytest.raises(ArmFailed, match="within 1 s"):
            arm.saturate(key, 60.0)


def test_arms_end_with_the_process_that_started_them(models: tuple[Path, Path]) -> None:
    code = (
        "import sys, os\nfrom optimizers.measure import Arm\nfrom optimizers.session import Settings\n"
        f"arm = Arm({str(models[0])!r}, Settings())\nprint(arm._process.pid, flush=True)\nos.kill(os.getpid(), 9)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60, cwd=Path(__file__).parent.parent)
    pid = int(done.stdout)
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and is_running(pid):
        time.sleep(0.05)
    assert not is_running(pid)


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()[0] != "Z"
    except OSError:
        return False


def test_a_variable_of_the_runtime_does_not_override_the_settings(models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_INTRA_OP_NUM_THREADS", "abc")
    with Arm(models[0], Settings()) as arm:
        assert arm.call(rows(1))[0].shape == (1, 128)


def test_quietness_is_a_share_of_the_time_wanted() -> None:
    assert quietness(3.0, 1.0, 0.0, 5.0).waiting_ratio == 0.25
    assert quietness(0.0, 0.0, 0.0, 1.0).waiting_ratio == 0.0
    assert Quietness(0.02, 0.0).label == "quiet" and Quietness(0.2, 0.0).label == "busy" and Quietness(0.5, 0.0).label == "loud"
    assert Quietness(0.5, 0.0).cpu_counts and not Quietness(0.5, 0.0).wall_counts
    assert not Quietness(0.97, 0.0).cpu_counts


def test_the_quietest_core_is_one_we_may_use() -> None:
    assert quietest_core(0.02) in os.sched_getaffinity(0)


def test_bfloat16_rounds_to_nearest_even_and_keeps_what_is_not_finite(tmp_path: Path) -> None:
    values = np.array([1.0, 1.0 + 2**-8, 1.0 + 3 * 2**-8, math.inf, -math.inf, math.nan], np.float32)
    upper = (to_bfloat16(values).astype(np.uint32) << 16).view(np.float32)
    assert upper[:3].tolist() == [1.0, 1.0, 1.0 + 2**-6]
    assert upper[3] == math.inf and upper[4] == -math.inf and math.isnan(upper[5])


def test_bfloat16_models_run(tmp_path: Path) -> None:
    import onnx

    kind = onnx.TensorProto.BFLOAT16
    path = save(
        tmp_path / "half.onnx",
        [onnx.helper.make_node("Identity", ["x"], ["y"])],
        [value("x", ("n", 2), kind)],
        [value("y", ("n", 2), kind)],
    )
    with Arm(path, Settings()) as arm:
        assert arm.call({"x": np.array([[1.5, -2.0]], np.float32)})[0].tolist() == [[1.5, -2.0]]
