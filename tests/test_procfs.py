"""What /proc tells of this process and what it started."""

from __future__ import annotations

import os
import select
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


def test_a_worker_counts_from_when_it_is_named_with_what_it_starts() -> None:
    code = "import subprocess, sys\nsum(range(20_000_000))\nprint('did', flush=True)\nsys.stdin.readline()\n"
    code += "subprocess.run([sys.executable, '-c', 'sum(range(30_000_000))'])\nprint('did', flush=True)\nsys.stdin.readline()"
    parent = [sys.executable, "-c", f"import subprocess, sys; print(subprocess.Popen([sys.executable, '-c', {code!r}]).pid, flush=True)"]
    with subprocess.Popen(
        parent, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:  # what it starts is an orphan, not ours
        assert process.stdout is not None and process.stdin is not None
        worker = int(process.stdout.readline())
        assert process.stdout.readline() == "did\n" and process.wait(20) == 0
        own = OwnCpu()
        before = own.read((), [worker])
        assert own.read((), [worker]) - before < 0.1, "what it did before is not the server's of now"
        process.stdin.write("\n")
        process.stdin.flush()
        seen = before
        while not select.select([process.stdout], [], [], 0.05)[0]:
            seen = own.read((), [worker])
        assert process.stdout.readline() == "did\n"
        process.stdin.write("\n")
        process.stdin.flush()
        assert seen - before > 0.2
