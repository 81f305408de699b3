"""The host as proofs and thread counts see it, on made-up roots: both cgroup versions, nested, hidden, fractional."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from optimizers.host import LEAST_TASK_BYTES, HostClass, cpu_budget, host_class, memory_budget, parse_target, room_for_a_task
from tests.made_hosts import v1, v2, write

GIB = 1 << 30


def test_without_a_cgroup_the_affinity_mask_decides(tmp_path: Path) -> None:
    budget = cpu_budget(tmp_path, affinity={3, 1})
    assert (budget.cores, budget.affinity, budget.quota) == (2, (1, 3), None)


@pytest.mark.parametrize(
    ("cpu_max", "cores"), [("max 100000", 8), ("50000 100000", 1), ("150000 100000", 1), ("400000 100000", 4), ("1600000 100000", 8)]
)
def test_quota_of_cgroup_v2_cuts_the_affinity_mask_and_never_below_one(tmp_path: Path, cpu_max: str, cores: int) -> None:
    root = v2(tmp_path, "/", {"sys/fs/cgroup/cpu.max": cpu_max + "\n"})
    assert cpu_budget(root, affinity=range(8)).cores == cores


def test_the_tightest_quota_above_binds(tmp_path: Path) -> None:
    limits = {"sys/fs/cgroup/pod/cpu.max": "200000 100000", "sys/fs/cgroup/pod/app/cpu.max": "max 100000"}
    budget = cpu_budget(v2(tmp_path, "/pod/app", limits), affinity=range(8))
    assert (budget.cores, budget.quota) == (2, 2.0)
    assert "quota of 2 cores" in budget.reason


def test_quota_of_cgroup_v1(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct/box"
    root = v1(tmp_path, "/box", {f"{folder}/cpu.cfs_quota_us": "250000\n", f"{folder}/cpu.cfs_period_us": "100000\n"})
    assert cpu_budget(root, affinity=range(8)).cores == 2
    write(root, {f"{folder}/cpu.cfs_quota_us": "-1\n"})
    assert cpu_budget(root, affinity=range(8)).quota is None


def test_a_container_sees_its_own_cgroup_as_the_mount(tmp_path: Path) -> None:
    folder = "sys/fs/cgroup/cpu,cpuacct"
    limits = {f"{folder}/cpu.cfs_quota_us": "150000", f"{folder}/cpu.cfs_period_us": "100000"}
    assert cpu_budget(v1(tmp_path, "/docker/abc", limits, mount_root="/docker/abc"), affinity=range(4)).quota == 1.5


def test_memory_is_the_machine_cut_by_the_cgroup_and_page_cache_is_free(tmp_path: Path) -> None:
    meminfo = f"MemTotal: {16 * GIB // 1024} kB\nMemFree: 1 kB\nMemAvailable: {12 * GIB // 1024} kB\n"
    root = write(tmp_path, {"proc/meminfo": meminfo})
    assert memory_budget(root) == memory_budget(root).__class__(16 * GIB, 12 * GIB)
    folder = "sys/fs/cgroup/app"
    v2(
        root,
        "/app",
        {
            f"{folder}/memory.max": str(4 * GIB),
            f"{folder}/memory.current": str(3 * GIB),
            f"{folder}/memory.stat": f"anon 5\ninactive_file {GIB}\n",
        },
    )
    found = memory_budget(root)
    assert (found.limit_bytes, found.available_bytes) == (4 * GIB, 2 * GIB)


def test_unlimited_memory_of_cgroup_v1_is_no_limit(tmp_path: Path) -> None:
    root = write(tmp_path, {"proc/meminfo": "MemTotal: 1024 kB\nMemAvailable: 512 kB\n"})
    v1(root, "/box", {"sys/fs/cgroup/memory/box/memory.limit_in_bytes": "9223372036854771712"})
    assert memory_budget(root).available_bytes == 512 * 1024


@pytest.mark.parametrize(("left", "room"), [(8 * GIB, 4 * GIB), (GIB, GIB), (GIB // 8, LEAST_TASK_BYTES)])
def test_a_task_may_take_what_is_left_in_the_container(tmp_path: Path, left: int, room: int) -> None:
    assert room_for_a_task(4 * GIB, write(tmp_path, {"proc/meminfo": f"MemTotal: {GIB} kB\nMemAvailable: {left >> 10} kB\n"})) == room


def test_this_hosts_key_is_a_file_name_and_can_be_read_back() -> None:
    here = host_class()
    assert re.fullmatch(r"[A-Za-z0-9_.-]+", here.key)
    assert here.key.endswith("-cpu")
    assert parse_target(here.key) == here
    assert host_class("CPUExecutionProvider") == here


def test_flags_make_the_class(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("platform.machine", lambda: "x86_64")
    write(tmp_path, {"proc/cpuinfo": "processor : 0\nflags : fpu avx avx2 fma avx512f avx512_vnni\n"})
    found = host_class(root=tmp_path)
    assert found.isa == ("avx2", "avx512f", "avx512_vnni")
    assert found.has_vnni and not found.int8_saturates


@pytest.mark.parametrize(("target", "saturates"), [("avx2", True), ("avx512", True), ("vnni", False), ("avx_vnni", False), ("i8mm", False)])
def test_targets_say_whether_int8_saturates(target: str, saturates: bool) -> None:
    assert parse_target(target).int8_saturates is saturates


@pytest.mark.parametrize("text", ["avx3", "", "x86_64-avx9-ort1.0-cpu", "../../etc"])
def test_an_unknown_target_is_refused_with_the_known_ones(text: str) -> None:
    with pytest.raises(ValueError, match="avx2"):
        parse_target(text)


def test_classes_of_two_runtimes_differ() -> None:
    old, new = HostClass("x86_64", ("avx2",), "1.31.0"), HostClass("x86_64", ("avx2",), "1.32.0")
    assert new.key == "x86_64-avx2-ort1.32.0-cpu" != old.key


def test_reading_the_host_loads_no_runtime_and_no_numerics() -> None:
    check = "import sys; from optimizers import host; host.host_class(); host.cpu_budget(); assert not {'numpy', 'onnx', 'onnxruntime'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", check], check=True, cwd=Path(__file__).parent.parent, timeout=60)
