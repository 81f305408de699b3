"""The limit: ONNX Runtime alone on all cores, in a process of its own that does nothing else. What no server can pass.

python -m benchmarks.limit MODEL reads one layout a line (JSON) and answers with calls per second. `Limit` is the other end.
"""

from __future__ import annotations

import json
import subprocess
import sys
import threading
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Final

RUNTIME_DEFAULT: Final = -1
"""Spin as ONNX Runtime does when it is told nothing."""
_LEAST_CALLS: Final = 8
"""Of each thread, whatever the seconds: of fewer calls of a tenth of a second no layout can be chosen."""


@dataclass(frozen=True, slots=True)
class Layout:
    """`instances` threads call one session of `threads` threads with `batch` rows each. `spin_us`: 0 off, -1 the runtime's default."""

    threads: int
    instances: int
    batch: int
    spin_us: int = RUNTIME_DEFAULT

    def __str__(self) -> str:
        spin = {RUNTIME_DEFAULT: "default spin", 0: "no spin"}.get(self.spin_us, f"spin {self.spin_us} µs")
        return f"{self.instances} × {self.threads} threads, batch {self.batch}, {spin}"


def many_layouts(cores: int) -> list[Layout]:
    """All cores busy: from one session over all of them to one caller on each, batches 1 to 8."""
    shapes = [(threads, cores // threads) for threads in range(1, cores + 1) if cores % threads == 0]
    return [Layout(t, i, batch, spin) for t, i in shapes for batch in (1, 2, 4, 8) for spin in ([0] if t == 1 else [RUNTIME_DEFAULT, 0])]


def single_layouts(cores: int) -> list[Layout]:
    """One call at a time."""
    return [Layout(t, 1, 1, spin) for t in range(1, cores + 1) for spin in ([0] if t == 1 else [RUNTIME_DEFAULT, 1000, 0])]


class Limit:
    """Speaks to the measuring process. `sweep` finds the best layouts, `best` measures the leading ones again in each round."""

    def __init__(self, model: Path) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "benchmarks.limit", str(model)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )

    def measure(self, layout: Layout, seconds: float) -> float:
        """Rows per second."""
        assert self._process.stdin is not None and self._process.stdout is not None
        self._process.stdin.write(json.dumps({**asdict(layout), "seconds": seconds}) + "\n")
        self._process.stdin.flush()
        line = self._process.stdout.readline()
        if not line:
            raise RuntimeError("the process that measures the limit ended")
        return float(json.loads(line)["per_s"])

    def sweep(self, layouts: list[Layout], seconds: float, keep: int = 3) -> list[Layout]:
        """The `keep` best of two passes over all layouts."""
        found = {layout: max(self.measure(layout, seconds) for _ in range(2)) for layout in layouts}
        return sorted(layouts, key=lambda layout: -found[layout])[:keep]

    def best(self, leading: list[Layout], seconds: float) -> float:
        return max(self.measure(layout, seconds / len(leading)) for layout in leading)

    def close(self) -> None:
        self._process.communicate(timeout=10)


# ---- the measuring process


def _session(path: str, threads: int, spin_us: int) -> Any:
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    if spin_us == 0:
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    elif spin_us > 0:
        options.add_session_config_entry("session.intra_op.spin_duration_us", str(spin_us))
    return ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])


def _per_second(session: Any, layout: Layout, seconds: float) -> float:
    import numpy as np

    entry = session.get_inputs()[0]
    feeds = {entry.name: np.random.default_rng(0).standard_normal((layout.batch, *entry.shape[1:])).astype(np.float32)}
    session.run(None, feeds)
    began = time.perf_counter()
    session.run(None, feeds)
    end = time.perf_counter()
    end += max(seconds, (end - began) * _LEAST_CALLS)
    rates = [0.0] * layout.instances

    def call(number: int) -> None:
        calls, began = 0, time.perf_counter()
        while (now := time.perf_counter()) < end:
            session.run(None, feeds)
            calls += 1
        rates[number] = calls / (now - began)  # its own time: it is not idle while another ends its last call

    threads = [threading.Thread(target=call, args=(number,)) for number in range(layout.instances)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return sum(rates) * layout.batch


def _main(path: str) -> None:
    sessions: dict[tuple[int, int], Any] = {}
    for line in sys.stdin:
        asked = json.loads(line)
        seconds = asked.pop("seconds")
        layout = Layout(**asked)
        key = (layout.threads, layout.spin_us)
        if key not in sessions:
            sessions[key] = _session(path, *key)
        print(json.dumps({"per_s": _per_second(sessions[key], layout, seconds)}), flush=True)


if __name__ == "__main__":
    _main(sys.argv[1])
