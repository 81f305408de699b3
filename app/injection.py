"""`hone demo --break CAUSE`: real traffic on the demo's model, one real fault put into the running server (app.scenes), and the story until all
is well again.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Final
from urllib.parse import urlsplit

from app import tables
from app.client import Client
from app.control_group import check_quota_possible
from app.domain import JSON
from app.errors import HoneError, InvalidRequest
from app.scenes import CAUSES, WARM_S, Scene, leak, quota
from app.traffic import MODEL, RATE, Traffic

TIME_LIMIT_S: Final = 420.0
CALM_S: Final = 75.0
REMEDIES: Final = frozenset({"desired.changed", "settings.changed", "runner.restarted", "ladder.stepped"})  # what the loop did


def check_cause(cause: str) -> None:
    """Whether it can be injected here, before anything is started or waited for. Raises HoneError."""
    if cause not in CAUSES:
        raise InvalidRequest(f"{cause!r} is no cause that can be injected; there are {', '.join(CAUSES)}")
    if CAUSES[cause] is leak and importlib.util.find_spec("torch") is None:
        raise HoneError("--break leak serves a PyTorch model: pip install 'hone-server[optimize]', or make run EXTRAS=optimize")
    if CAUSES[cause] is quota:
        check_quota_possible()


def run_break(cause: str, client: Client, state: Path, say: Callable[[str], None], limit_s: float = TIME_LIMIT_S) -> JSON:
    """Inject one cause and follow the timeline until the loop has said that all is well, or that nothing is to be done.

    Returns what was found: {"cause", "blamed": [...], "plans": [...], "recovered": seconds or None, "failed": requests}. Raises HoneError.
    """
    check_cause(cause)
    repository = state / "demo"
    images = _images(repository)
    address = urlsplit(client.address.url)
    with ExitStack() as stack:
        scene = Scene(client, Traffic(address.hostname or "", address.port or 80, images), repository, say)
        stack.callback(scene.put_back)
        stack.enter_context(scene.traffic)
        say(f"{RATE:g} requests a second of real digits; {WARM_S:.0f} s for the loop to learn what is normal")
        time.sleep(WARM_S)
        stack.enter_context(CAUSES[cause](scene))
        return _follow(cause, scene, limit_s, say)


def _follow(cause: str, scene: Scene, limit_s: float, say: Callable[[str], None]) -> JSON:
    client, traffic, after, began = scene.client, scene.traffic, scene.after, scene.began
    blamed: list[str] = []
    plans: list[str] = []
    recovered: float | None = None
    acted: float | None = None
    decided_at = 0.0
    building: set[str] = set()
    while time.monotonic() - began < limit_s:
        for event in client.timeline(model=scene.name, after=after, limit=200)["events"]:
            after = event["seq"]
            say(tables.event_line(event))
            data = event.get("data") or {}
            if event["kind"] == "diagnosis.made":
                blamed.append(str(data.get("cause")))
            elif event["kind"] == "plan.made":
                plans.append(str(data.get("action")))
                decided_at = time.monotonic()
            elif event["kind"] in ("job.requested", "job.finished"):
                building ^= {event["job"]}
                decided_at = time.monotonic()
            elif event["kind"] in REMEDIES and plans and acted is None and event.get("actor", "") == "hone":
                acted = time.monotonic() - began
            elif event["kind"] == "recovery.verified" and set(blamed) - {"unknown"}:  # what passed unexplained may be no doing of the fault
                recovered = time.monotonic() - began
        nothing = bool(plans) and plans[-1] in ("nothing", "step down") and time.monotonic() - decided_at > CALM_S
        if recovered is not None or (nothing and not building):  # a second look may find nothing to do while a job goes on
            break
        time.sleep(0.5)
    return {
        "injected": cause, "blamed": blamed, "plans": plans, "acted_s": acted and round(acted, 1),
        "recovered_s": recovered and round(recovered, 1), "sent": traffic.sent, "failed": traffic.failed,
    }  # fmt: skip


def _images(repository: Path) -> Any:
    import numpy as np

    path = repository / MODEL / "samples" / "judging.npz"
    if not path.exists():
        raise HoneError(f"{path} is not there: --break works on a running demo (make run, or hone demo), with the same --state")
    with np.load(path) as samples:
        return samples["image"]
