"""Real traffic for the demo's model: open-loop requests, each sent at its intended moment, whether or not those before it were answered.

It uses the public protocol alone, with the standard library's client; it knows nothing of what is wrong with the server that answers.
"""

from __future__ import annotations

import json
import threading
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from typing import Any, Final

MODEL: Final = "digits"
RATE: Final = 40.0


@dataclass
class Traffic:
    """Open-loop requests of real digits: `rate` a second of `rows` each, over `callers` connections, each at its intended moment."""

    host: str
    port: int
    images: Any
    rate: float = RATE
    rows: int = 1
    callers: int = 8
    model: str = MODEL
    input: str = "image"
    change: Callable[[Any], Any] = lambda images: images
    sent: int = 0
    failed: int = 0
    answered: Counter[str] = field(default_factory=Counter)
    """By the version that answered."""
    _stop: threading.Event = field(default_factory=threading.Event)
    _threads: list[threading.Thread] = field(default_factory=list)
    _lock: threading.Lock = field(default_factory=threading.Lock)
    _next: float = 0.0
    _turn: int = 0

    def __enter__(self) -> Traffic:
        self._next = time.monotonic()
        for _ in range(self.callers):
            self._call_one_more()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(10.0)

    @property
    def behind_s(self) -> float:
        """How late the next request is: more than a moment where the callers all wait for answers."""
        with self._lock:
            return max(0.0, time.monotonic() - self._next)

    def raise_to(self, rate: float, rows: int, callers: int) -> None:
        """More of it, from now on."""
        with self._lock:
            self.rate, self.rows, self._next = rate, rows, time.monotonic()
        while len(self._threads) < callers:
            self._call_one_more()

    def _call_one_more(self) -> None:
        thread = threading.Thread(target=self._call, name=f"caller-{len(self._threads)}", daemon=True)
        self._threads.append(thread)
        thread.start()

    def _call(self) -> None:
        connection = HTTPConnection(self.host, self.port, timeout=30)
        while not self._stop.is_set():
            with self._lock:
                due, self._turn = self._next, self._turn + 1
                self._next = max(self._next + 1 / self.rate, time.monotonic() - 1.0)
                turn = self._turn
            if self._stop.wait(max(0.0, due - time.monotonic())):
                break
            well, version = self._ask(connection, turn)
            with self._lock:
                self.sent += 1
                self.failed += not well
                self.answered[version] += bool(version)
            if not well:
                connection.close()
        connection.close()

    def _ask(self, connection: HTTPConnection, turn: int) -> tuple[bool, str]:
        """Whether it went well (a refusal for load is an answer), and which version answered."""
        at = turn * self.rows % max(1, len(self.images) - self.rows)
        data = self.change(self.images[at : at + self.rows]).astype("<f4")
        head = json.dumps({
            "inputs": [{"name": self.input, "datatype": "FP32", "shape": list(data.shape), "parameters": {"binary_data_size": data.nbytes}}]
        }).encode()  # fmt: skip
        try:
            connection.request(
                "POST", f"/v2/models/{self.model}/infer", head + data.tobytes(), {"Inference-Header-Content-Length": str(len(head))}
            )
            answer = connection.getresponse()
            answer.read()
        except (OSError, HTTPException):
            return False, ""
        return answer.status in (200, 429), (answer.getheader("Hone-Version") or "") if answer.status == 200 else ""
