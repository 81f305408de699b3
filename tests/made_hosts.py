"""Made-up roots of a host: /proc and cgroup files of either version."""

from __future__ import annotations

from pathlib import Path


def write(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def v2(root: Path, own: str, limits: dict[str, str], mount_root: str = "/") -> Path:
    mountinfo = f"30 24 0:26 {mount_root} /sys/fs/cgroup ro,nosuid - cgroup2 cgroup2 rw,nsdelegate\n"
    return write(root, {"proc/self/cgroup": f"0::{own}\n", "proc/self/mountinfo": mountinfo, **limits})


def v1(root: Path, own: str, limits: dict[str, str], mount_root: str = "/") -> Path:
    mountinfo = (
        f"31 24 0:27 {mount_root} /sys/fs/cgroup/cpu,cpuacct rw - cgroup cgroup rw,cpu,cpuacct\n"
        f"32 24 0:28 {mount_root} /sys/fs/cgroup/memory rw - cgroup cgroup rw,memory\n"
    )
    return write(root, {"proc/self/cgroup": f"4:memory:{own}\n3:cpu,cpuacct:{own}\n", "proc/self/mountinfo": mountinfo, **limits})
