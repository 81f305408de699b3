"""What this host is, as far as proofs and thread counts care: its class, its CPU budget, its memory budget.

Standard library only and cheap, because the server process reads it too. It opens no model and knows no runtime but its version.
"""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

X86_FLAGS: Final = ("avx2", "avx512f", "avx512_vnni", "avx_vnni", "amx_int8")
ARM_FLAGS: Final = ("asimddp", "i8mm", "sve", "sme")
"""The instruction sets by which ONNX Runtime chooses kernels; order is the order in keys."""
RUNTIMES: Final = ("onnxruntime", "onnxruntime-gpu", "onnxruntime-openvino")
TARGETS: Final[dict[str, tuple[str, tuple[str, ...]]]] = {
    "avx2": ("x86_64", ("avx2",)),
    "avx512": ("x86_64", ("avx2", "avx512f")),
    "avx512_vnni": ("x86_64", ("avx2", "avx512f", "avx512_vnni")),
    "vnni": ("x86_64", ("avx2", "avx512f", "avx512_vnni")),
    "avx_vnni": ("x86_64", ("avx2", "avx_vnni")),
    "amx": ("x86_64", ("avx2", "avx512f", "avx512_vnni", "amx_int8")),
    "neon": ("aarch64", ()),
    "asimddp": ("aarch64", ("asimddp",)),
    "i8mm": ("aarch64", ("asimddp", "i8mm")),
}
"""Short names for host classes that one may build for from elsewhere (`--for avx2`)."""
LEAST_TASK_BYTES: Final = 512 << 20
"""With less no task could begin at all."""
_NO_LIMIT: Final = 1 << 60
_KEY: Final = re.compile(
    r"(?P<arch>x86_64|aarch64|[a-z0-9_]+)(?P<isa>(?:-[a-z0-9_]+)*)-ort(?P<version>[A-Za-z0-9.+]+)-(?P<provider>[A-Za-z0-9_.]+)"
)


@dataclass(frozen=True)
class HostClass:
    """Where a proof holds: architecture, instruction sets that choose kernels, runtime version, execution provider (with its device)."""

    arch: str
    isa: tuple[str, ...]
    runtime_version: str
    provider: str = "cpu"

    @property
    def key(self) -> str:
        """Safe as a file name, such as `x86_64-avx2-ort1.32.0-cpu`."""
        return "-".join((self.arch, *self.isa, f"ort{self.runtime_version}", self.provider))

    @property
    def has_vnni(self) -> bool:
        """True where u8 × s8 products are added in 32 bits by one instruction."""
        return bool({"avx512_vnni", "avx_vnni", "amx_int8"} & set(self.isa))

    @property
    def int8_saturates(self) -> bool:
        """True where the usual int8 form (activations u8, weights s8) clips big sums in silence: x86 without VNNI (shared facts, hosts)."""
        return self.arch == "x86_64" and not self.has_vnni

    def __str__(self) -> str:
        return self.key


def host_class(provider: str = "cpu", root: str | Path = "/") -> HostClass:
    """The class of this host. `provider` may be short (`cpu`) or ONNX Runtime's name (`CPUExecutionProvider`)."""
    arch = platform.machine()
    flags = _cpu_flags(Path(root) / "proc/cpuinfo")
    known = ARM_FLAGS if arch == "aarch64" else X86_FLAGS
    return HostClass(arch, tuple(f for f in known if f in flags), runtime_version(), _short_provider(provider))


def runtime_version() -> str:
    """Version of the installed ONNX Runtime, without importing it; `none` where there is none."""
    for name in RUNTIMES:
        try:
            return importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return "none"


def parse_target(text: str) -> HostClass:
    """A host class from a short target (`avx2`) or a whole key. Raises ValueError with the names that are known."""
    if text in TARGETS:
        arch, isa = TARGETS[text]
        return HostClass(arch, isa, runtime_version())
    match = _KEY.fullmatch(text)
    if match is None:
        raise ValueError(
            f"{text!r} names no host class; give one of {', '.join(sorted(TARGETS))} or a whole key such as {host_class().key}"
        )
    isa = tuple(part for part in match["isa"].split("-") if part)
    unknown = [part for part in isa if part not in {*X86_FLAGS, *ARM_FLAGS}]
    if unknown:
        raise ValueError(f"{text!r} names the unknown instruction set {unknown[0]!r}; known are {', '.join((*X86_FLAGS, *ARM_FLAGS))}")
    return HostClass(match["arch"], isa, match["version"], match["provider"])


def spare_ratio(look_s: float = 0.2, affinity: Collection[int] | None = None) -> float:
    """Share of these cores (None: this process's) that nobody uses, by a short look; 0 where that cannot be told (a CPU quota, no /proc)."""
    budget = cpu_budget(affinity=affinity)
    if budget.quota is not None:
        return 0.0  # the cores may idle while the quota is used up
    try:
        before = _idle_and_all(budget.affinity)
        time.sleep(look_s)
        after = _idle_and_all(budget.affinity)
    except (OSError, ValueError, IndexError):
        return 0.0
    passed = after[1] - before[1]
    return (after[0] - before[0]) / passed if passed > 0 else 0.0


def _idle_and_all(cores: Collection[int]) -> tuple[int, int]:
    """Clock ticks of these cores since the start of the machine: idle, and all."""
    wanted = {f"cpu{core}" for core in cores}
    rows = [[int(n) for n in rest] for name, *rest in map(str.split, Path("/proc/stat").read_text().splitlines()) if name in wanted]
    return sum(row[3] + row[4] for row in rows), sum(sum(row[:8]) for row in rows)


@dataclass(frozen=True)
class CpuBudget:
    """The cores that threads may be sized to. `quota` is the cgroup's limit in cores, None where there is none."""

    cores: int
    affinity: tuple[int, ...]
    quota: float | None
    reason: str


def cpu_budget(root: str | Path = "/", affinity: Collection[int] | None = None) -> CpuBudget:
    """Cores of the affinity mask, cut by the tightest CPU quota of this cgroup and those above it (v1 and v2).

    A fraction of a core is no thread: 1.5 gives 1, and 0.5 gives 1 too, as less than one thread cannot be had.
    """
    cpus = tuple(sorted(os.sched_getaffinity(0) if affinity is None else affinity))
    quotas = [q for folder in cgroup_folders(Path(root), "cpu") if (q := cpu_quota(folder)) is not None]
    quota = min(quotas, default=None)
    if quota is None or quota >= len(cpus):
        return CpuBudget(len(cpus), cpus, quota, f"{len(cpus)} cores by affinity")
    return CpuBudget(max(1, int(quota)), cpus, quota, f"cgroup quota of {quota:g} cores, below the {len(cpus)} of the affinity mask")


@dataclass(frozen=True)
class MemoryBudget:
    """Bytes. `limit` is the cgroup's (or the machine's), `available` what may still be taken before somebody suffers."""

    limit_bytes: int
    available_bytes: int


def memory_budget(root: str | Path = "/") -> MemoryBudget:
    """Memory of the machine, cut by the limits of this cgroup and those above it (v1 and v2). Page cache counts as free."""
    machine = _meminfo(Path(root) / "proc/meminfo")
    limit = machine.get("MemTotal", _NO_LIMIT)
    available = machine.get("MemAvailable", limit)
    for folder in cgroup_folders(Path(root), "memory"):
        allowed = _first_int(folder, "memory.max", "memory.limit_in_bytes")
        if allowed is None or allowed >= _NO_LIMIT:
            continue
        used = _first_int(folder, "memory.current", "memory.usage_in_bytes") or 0
        limit = min(limit, allowed)
        available = min(available, allowed - max(0, used - _page_cache(folder)))
    return MemoryBudget(limit, max(0, available))


def room_for_a_task(most_bytes: int, root: str | Path = "/") -> int:
    """What a task child may take: no more than is left here, since the kernel's choice of whom to end for it may be this very process."""
    return min(most_bytes, max(LEAST_TASK_BYTES, memory_budget(root).available_bytes))


def _short_provider(provider: str) -> str:
    return re.sub(r"[^A-Za-z0-9_.]", "_", provider.removesuffix("ExecutionProvider").lower()) or "cpu"


def _cpu_flags(cpuinfo: Path) -> frozenset[str]:
    for line in _read(cpuinfo).splitlines():
        name, _, value = line.partition(":")
        if name.strip().lower() in {"flags", "features"}:
            return frozenset(value.split())
    return frozenset()


def cgroup_folders(root: Path, controller: str) -> Iterator[Path]:
    """Folders whose limits bind this process for one controller: its own cgroup, and each one above that can be seen from here."""
    own = _own_cgroups(_read(root / "proc/self/cgroup"))
    for line in _read(root / "proc/self/mountinfo").splitlines():
        mount, _, tail = line.partition(" - ")
        fields, kind = mount.split(), tail.split()
        if len(fields) < 5 or len(kind) < 3 or kind[0] not in {"cgroup", "cgroup2"}:
            continue
        if kind[0] == "cgroup" and controller not in kind[2].split(","):
            continue
        path = own.get("" if kind[0] == "cgroup2" else controller, "/")
        top = root / fields[4].lstrip("/")
        inside = path if fields[3] == "/" else path.removeprefix(fields[3]) if path.startswith(fields[3]) else "/"
        folder = top / inside.strip("/")
        while folder != top:
            if folder.is_dir():
                yield folder
            folder = folder.parent
        yield top


def _own_cgroups(text: str) -> dict[str, str]:
    """Controller to path from /proc/self/cgroup; the key '' is the v2 hierarchy. Paths outside (`/..`) count as the root."""
    found: dict[str, str] = {}
    for line in text.splitlines():
        _, controllers, path = line.split(":", 2)
        for name in controllers.split(","):
            found[name] = "/" if ".." in path.split("/") else path
    return found


def cpu_quota(folder: Path) -> float | None:
    """Cores that this cgroup may use, or None for no limit."""
    both = _read(folder / "cpu.max").split()
    if not both:
        both = [_read(folder / "cpu.cfs_quota_us").strip(), _read(folder / "cpu.cfs_period_us").strip()]
    if len(both) != 2 or not both[0].isdigit() or not both[1].isdigit() or both[1] == "0":
        return None
    return int(both[0]) / int(both[1])


def _first_int(folder: Path, *names: str) -> int | None:
    for name in names:
        text = _read(folder / name).strip()
        if text.isdigit():
            return int(text)
    return None


def _page_cache(folder: Path) -> int:
    """Bytes of file cache that the kernel would drop first."""
    stat = dict(line.split(maxsplit=1) for line in _read(folder / "memory.stat").splitlines() if " " in line)
    return int(stat.get("total_inactive_file", stat.get("inactive_file", "0")))


def _meminfo(path: Path) -> dict[str, int]:
    pairs = (line.partition(":") for line in _read(path).splitlines())
    return {name: int(value.split()[0]) * 1024 for name, _, value in pairs if value.split() and value.split()[0].isdigit()}


def _read(path: Path) -> str:
    """The text of a kernel file; empty where it is absent or hidden, as any of them may be."""
    try:
        return path.read_text()
    except OSError:
        return ""
