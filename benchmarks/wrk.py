"""`wrk` as the closed-loop client: one script per request, its numbers parsed.

A closed loop waits for each answer before it sends again, so a stall costs it one request: its p99 hides stalls (see benchmarks.openloop).
What is under way at the end is not counted, so a run must last many latencies: of a batching server half of one is lost.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from benchmarks.models import Body

_SCRIPT: Final = """\
local file = assert(io.open("{body}", "rb"))
wrk.method = "POST"
wrk.body = file:read("*a")
file:close()
{headers}
function done(summary, latency, requests)
  local e = summary.errors
  io.write(string.format('\\nRESULT {{"requests":%d,"us":%d,"p50_us":%d,"p99_us":%d,"failed":%d}}\\n', summary.requests, summary.duration,
    latency:percentile(50), latency:percentile(99), e.connect + e.read + e.write + e.status + e.timeout))
end
"""


@dataclass(frozen=True, slots=True)
class Closed:
    """One run: answers per second, and the latencies of a closed loop."""

    per_s: float
    p50_ms: float
    p99_ms: float
    failed: int


def available() -> bool:
    return shutil.which("wrk") is not None


def run(host: str, port: int, body: Body, connections: int, seconds: float) -> Closed:
    """Drive one route with `connections` callers. Raises RuntimeError with wrk's words where it measured nothing."""
    with tempfile.TemporaryDirectory(prefix="hone-wrk-") as name:
        folder = Path(name)
        (folder / "body").write_bytes(body.data)
        headers = "\n".join(f'wrk.headers["{key}"] = "{value}"' for key, value in body.headers.items())
        (folder / "script.lua").write_text(_SCRIPT.format(body=folder / "body", headers=headers))
        command = ["wrk", "-t1", f"-c{connections}", f"-d{max(1, round(seconds))}s", "--timeout", "30s", "-s", str(folder / "script.lua")]
        done = subprocess.run([*command, f"http://{host}:{port}{body.path}"], capture_output=True, text=True, timeout=seconds + 60)
    return parse(done.stdout, done.stderr)


def parse(output: str, errors: str = "") -> Closed:
    line = next((line for line in output.splitlines() if line.startswith("RESULT ")), None)
    if line is None:
        raise RuntimeError(f"wrk measured nothing: {(errors or output).strip()[-500:]}")
    found = json.loads(line.removeprefix("RESULT "))
    return Closed(found["requests"] / found["us"] * 1e6, found["p50_us"] / 1e3, found["p99_us"] / 1e3, found["failed"])
