"""Real processes that use the machine beside what is measured: arithmetic, copies of memory, bursts of arithmetic."""

from __future__ import annotations

import re
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Final

KINDS: Final = {
    "cpu": "x = 1\nwhile True:\n    x = (x * 31 + 7) % 1000003",
    "mem": "import numpy as np\na = np.ones(40_000_000)\nb = np.empty_like(a)\nwhile True:\n    np.copyto(b, a)",
    "burst": "import time\nwhile True:\n    until = time.monotonic() + 0.4\n    while time.monotonic() < until:\n        pass\n    time.sleep(0.6)",
}
"""`mem` copies 320 MB at a time; `burst` works 0.4 s of each second."""
NONE: Final = "none"
_ENDS_WITH_US: Final = "import ctypes\nctypes.CDLL(None).prctl(1, 9)\n"
"""PR_SET_PDEATHSIG: a benchmark that is killed leaves none of them behind, to compute beside whatever comes next."""


@contextmanager
def neighbours(name: str) -> Iterator[None]:
    """`none`, or kind and number: cpu2, mem1, burst2. They run when it yields and are gone afterwards."""
    if name == NONE:
        yield
        return
    kind, count = parsed(name)
    processes = [subprocess.Popen([sys.executable, "-c", _ENDS_WITH_US + KINDS[kind]]) for _ in range(count)]
    try:
        time.sleep(0.5)
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def parsed(name: str) -> tuple[str, int]:
    found = re.fullmatch(r"([a-z]+)([1-9][0-9]*)", name)
    if found is None or found[1] not in KINDS:
        raise ValueError(f"neighbours {name!r} are unknown; name none, or one of {', '.join(KINDS)} and a number, as in cpu2")
    return found[1], int(found[2])
