"""What /proc tells of this process and what it started."""

from __future__ import annotations

import os
import subprocess
import sys
import time

from app.serving.procfs import OwnCpu, descendants

BUSY = "import subprocess, sys\nif len(sys.argv) > 1: subprocess.Popen([sys.executable, '-c', sys.argv[1]])\nwhile True: pass"


def test_own_cpu_holds_what_was_started_below_and_does_not_fall_where_it_ends() -> None:
    own = OwnCpu()
    before = own.read()
    with subprocess.Popen([sys.executable, "-c", BUSY, "while True: pass"], start_new_session=True) as child:
        try:
            while len(below := descendants(child.pid)) < 2:
                time.sleep(0.02)
            assert set(below) <= set(descendants(os.getpid()))
            time.sleep(1.0)
            during = own.read()
        finally:
            os.killpg(child.pid, 9)
    after = own.read()
    assert during - before > 0.3, "a child's time, and that of the child's child"
    assert after >= during and own.read([os.getpid(), 1 << 30]) >= after, "a runner that is named twice, or is gone, counts once or not"
