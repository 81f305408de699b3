"""An open-loop client: requests start when a clock says, whatever the server does, and latency counts from that intended start.

So a stall is felt by every request that should have started in it (closed loops hide that). Raw sockets on one event loop, in a process
of its own: `run_apart`. Start times are Poisson, from a seed.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import subprocess
import sys
import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from typing import Any, Final, cast

import numpy as np
from numpy.typing import NDArray

LOST: Final = 0
"""Status of a request whose connection broke or that was not answered within the patience."""


@dataclass(frozen=True)
class Plan:
    """What to send: `requests` (whole, as bytes) in turn, `rate` a second on average for `seconds`. `keep` stores bodies.

    All `connections` are opened first, so that the server's open files stay level; a request that finds none free waits, its clock running.
    """

    host: str
    port: int
    requests: list[bytes]
    rate: float
    seconds: float
    connections: int = 256
    keep: bool = False
    seed: int = 0
    patience_s: float = 30.0


@dataclass
class Seen:
    """What came back, in order of intended starts. `start` on time.monotonic()'s clock, the same in every process of a host."""

    start: NDArray[np.float64]
    latency_s: NDArray[np.float64]
    status: NDArray[np.int16]
    request: NDArray[np.int32]
    version: NDArray[Any]
    body: list[bytes] = field(default_factory=list)

    @property
    def failed(self) -> int:
        return int(np.count_nonzero(self.status != 200))

    def quantile_ms(self, q: float) -> float:
        return float(np.quantile(self.latency_s, q) * 1e3) if len(self.latency_s) else 0.0

    def between(self, begin: float, end: float) -> Seen:
        """The requests that should have started within [begin, end)."""
        chosen = (self.start >= begin) & (self.start < end)
        body = [b for b, c in zip(self.body, chosen, strict=True) if c] if self.body else []
        return Seen(self.start[chosen], self.latency_s[chosen], self.status[chosen], self.request[chosen], self.version[chosen], body)

    def summary(self) -> dict[str, float]:
        quantiles = {
            f"p{str(q * 100).rstrip('0').rstrip('.').replace('.', '')}_ms": round(self.quantile_ms(q), 2) for q in (0.5, 0.99, 0.999)
        }
        return {"requests": len(self.start), "failed": self.failed, **quantiles}


def run_apart(plan: Plan) -> Seen:
    """Run `plan` in a process of its own and wait for it."""
    return Running(plan).result()


class Running:
    """A plan under way in its own process. `result` waits for its end; `stop` ends it earlier, and result then has what was seen."""

    def __init__(self, plan: Plan) -> None:
        self._folder = tempfile.TemporaryDirectory(prefix="hone-open-")
        folder = Path(self._folder.name)
        np.savez(folder / "requests.npz", *[np.frombuffer(request, np.uint8) for request in plan.requests])
        settings = {name: getattr(plan, name) for name in ("host", "port", "rate", "seconds", "connections", "keep", "seed", "patience_s")}
        (folder / "plan.json").write_text(json.dumps(settings))
        self._process = subprocess.Popen([sys.executable, "-m", "benchmarks.openloop", str(folder)])

    def stop(self) -> None:
        (Path(self._folder.name) / "stop").touch()

    def result(self) -> Seen:
        if self._process.wait() != 0:
            raise RuntimeError("the open-loop client failed")
        folder = Path(self._folder.name)
        with np.load(folder / "seen.npz") as file:
            seen = Seen(file["start"], file["latency_s"], file["status"], file["request"], file["version"])
            if "body" in file:
                ends = np.cumsum(file["sizes"])
                whole = file["body"].tobytes()
                seen.body = [whole[end - size : end] for end, size in zip(ends, file["sizes"], strict=True)]
        self._folder.cleanup()
        return seen


# ---- the client's process


class _Connection(asyncio.Protocol):
    """One keep-alive connection with at most one request on it. Reads a head, then Content-Length bytes."""

    def __init__(self, client: _Client) -> None:
        self._client = client
        self.number = -1
        self._head = b""
        self._parts: list[bytes] = []
        self._left = -1
        self.transport: asyncio.Transport | None = None

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self.transport = cast(asyncio.Transport, transport)  # uvloop's is none by inheritance

    def send(self, number: int, request: bytes) -> None:
        assert self.transport is not None
        self.number, self._head, self._parts, self._left = number, b"", [], -1
        self.transport.write(request)

    def data_received(self, data: bytes) -> None:
        if self._left < 0:
            self._head += data
            end = self._head.find(b"\r\n\r\n")
            if end < 0:
                return
            data, self._head = self._head[end + 4 :], self._head[: end + 2].lower()
            self._left = int(_header(self._head, b"content-length") or 0)
        self._parts.append(data)
        self._left -= len(data)
        if self._left <= 0 and self.number >= 0:
            number, self.number = self.number, -1
            closes = _header(self._head, b"connection") == b"close"
            self._client.answered(self, number, int(self._head[9:12]), _header(self._head, b"hone-version"), b"".join(self._parts), closes)

    def connection_lost(self, error: Exception | None) -> None:
        self._client.lost(self)


def _header(head: bytes, name: bytes) -> bytes:
    at = head.find(b"\r\n" + name + b":")
    return head[at + len(name) + 3 : head.index(b"\r\n", at + 2)].strip() if at >= 0 else b""


class _Client:
    def __init__(self, plan: Plan, stop: Path) -> None:
        self._plan, self._stop = plan, stop
        rng = np.random.default_rng(plan.seed)
        count = max(1, int(plan.rate * plan.seconds))
        self._starts: list[float] = np.cumsum(rng.exponential(1 / plan.rate, count)).tolist()
        self._idle: list[_Connection] = []
        self._open = 0
        self._waiting: deque[int] = deque()
        self._done = 0
        self._sent = -1
        self.latency = np.full(count, np.nan)
        self.status = np.zeros(count, np.int16)
        self.version: list[bytes] = [b""] * count
        self.body: list[bytes] = [b""] * (count if plan.keep else 0)
        self._connecting: set[asyncio.Task[None]] = set()
        self._all_done = asyncio.Event()

    async def run(self) -> Seen:
        await asyncio.gather(*(self._connect() for _ in range(self._plan.connections)))
        began = monotonic() + 0.05
        self._starts = [began + start for start in self._starts]
        count, number = len(self._starts), 0
        while number < count:
            pause = self._starts[number] - monotonic()
            if pause > 0:
                await asyncio.sleep(pause)
            now = monotonic()
            while number < count and self._starts[number] <= now:
                self._begin(number)
                number += 1
            if number % 64 == 0 and self._stop.exists():
                break
        self._sent = number
        if self._done < number:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._all_done.wait(), self._plan.patience_s)
        return self._seen(number)

    def _seen(self, count: int) -> Seen:
        missing = np.isnan(self.latency[:count])
        self.latency[:count][missing] = self._plan.patience_s
        request = np.arange(count, dtype=np.int32) % len(self._plan.requests)
        start = np.array(self._starts[:count])
        return Seen(start, self.latency[:count], self.status[:count], request, np.array(self.version[:count]), self.body[:count])

    def _begin(self, number: int) -> None:
        if self._idle:
            self._idle.pop().send(number, self._plan.requests[number % len(self._plan.requests)])
            return
        self._waiting.append(number)
        if self._open + len(self._connecting) < self._plan.connections:
            task = asyncio.get_running_loop().create_task(self._connect())
            self._connecting.add(task)
            task.add_done_callback(self._connecting.discard)

    async def _connect(self) -> None:
        try:
            _, connection = await asyncio.get_running_loop().create_connection(lambda: _Connection(self), self._plan.host, self._plan.port)
        except OSError:
            if self._waiting:
                self._finish(self._waiting.popleft(), LOST)
            return
        self._open += 1
        self._free(connection)

    def _free(self, connection: _Connection) -> None:
        if self._waiting:
            number = self._waiting.popleft()
            connection.send(number, self._plan.requests[number % len(self._plan.requests)])
        else:
            self._idle.append(connection)

    def answered(self, connection: _Connection, number: int, status: int, version: bytes, body: bytes, closes: bool) -> None:
        self._finish(number, status)
        self.version[number] = version
        if self._plan.keep:
            self.body[number] = body
        if closes and connection.transport is not None:
            connection.transport.close()
        else:
            self._free(connection)

    def lost(self, connection: _Connection) -> None:
        self._open -= 1
        if connection in self._idle:
            self._idle.remove(connection)
        if connection.number >= 0:
            self._finish(connection.number, LOST)

    def _finish(self, number: int, status: int) -> None:
        self.latency[number] = monotonic() - self._starts[number]
        self.status[number] = status
        self._done += 1
        if self._done == self._sent:
            self._all_done.set()


def _main(folder: Path) -> None:
    import uvloop

    settings = json.loads((folder / "plan.json").read_text())
    with np.load(folder / "requests.npz") as file:
        requests = [file[name].tobytes() for name in file.files]
    with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
        seen = runner.run(_Client(Plan(requests=requests, **settings), folder / "stop").run())
    arrays = {"start": seen.start, "latency_s": seen.latency_s, "status": seen.status, "request": seen.request, "version": seen.version}
    if seen.body:
        arrays["body"] = np.frombuffer(b"".join(seen.body), np.uint8)
        arrays["sizes"] = np.array([len(body) for body in seen.body])
    np.savez(folder / "seen.npz", **arrays)  # type: ignore[arg-type]


if __name__ == "__main__":
    _main(Path(sys.argv[1]))
