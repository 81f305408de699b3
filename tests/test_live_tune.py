"""Settings compared beside the traffic: what follows from what was seen (made-up numbers), and a real server whose host is never idle."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app.control.live_tune import Lived, concluded, layouts_of
from app.domain import RuntimeSettings
from app.scenes import busy
from tests.running_server import server

USED = RuntimeSettings(intra_op_threads=2, batch_limit=8)
LAYOUTS = [
    {"intra_op_threads": threads, "instances": 1, "spin_duration_us": spin} for threads, spin in ((1, 0), (2, 0), (2, 200), (2, 1000))
]
REPORT: dict[str, Any] = {"verdict": "inconclusive", "objective": "latency", "reason": "too busy", "layouts": LAYOUTS}


def lived(*speedups: tuple[float, float, float] | None) -> list[Lived]:
    return [Lived(layout, speedup) for layout, speedup in zip(layouts_of(REPORT, USED), speedups, strict=True)]


def test_what_the_tuner_was_to_try_is_tried_but_for_what_is_in_use() -> None:
    found = [(layout.intra_op_threads, layout.spin_duration_us) for layout in layouts_of(REPORT, USED)]
    assert found == [(1, 0), (2, 200), (2, 1000)] and layouts_of({}, USED) == []


def test_the_cheapest_of_the_best_is_taken_where_its_interval_shows_the_gain() -> None:
    found = concluded(REPORT, USED, lived((0.7, 0.6, 0.8), (1.50, 1.4, 1.6), (1.53, 1.4, 1.7)))
    assert found["verdict"] == "tuned" and found["changed"] and "1.50 × as fast [1.40, 1.60]" in found["summary"]
    assert found["settings"] == {"intra_op_threads": 2, "instances": 1, "spin_duration_us": 200}
    assert len(found["beside_traffic"]) == 3 and found["layouts"] == LAYOUTS


def test_without_a_gain_they_are_kept_and_with_too_little_seen_nothing_is_said() -> None:
    kept = concluded(REPORT, USED, lived((0.7, 0.6, 0.8), (1.04, 1.0, 1.1), (1.3, 0.9, 1.9)))
    assert kept["verdict"] == "kept" and not kept["changed"] and kept["summary"].startswith("kept: no layout gains")
    open_end = concluded(REPORT, USED, lived((0.7, 0.6, 0.8), None, None))
    assert open_end["verdict"] == "inconclusive" and open_end["summary"] == "inconclusive: too busy"


def test_on_a_host_that_is_never_idle_fresh_runners_take_turns_beside_the_traffic(tmp_path: Path) -> None:
    with server(tmp_path, demo=True) as running:
        running.ready("digits")
        neighbours = [busy() for _ in range(6)]
        try:
            asked = {"recipe": [{"method": "tune", "max_seconds": 20}]}
            done = running.job_done(running.admin("POST", "/admin/models/digits/optimize", 202, json=asked)["id"], 150)
        finally:
            for neighbour in neighbours:
                neighbour.kill()
                neighbour.wait()
        tuned = done["report"]["tune"]
        assert "beside_traffic" in tuned, str(tuned)
        layouts = tuned["beside_traffic"]
        measured = [layout["speedup"][0] for layout in layouts if layout["speedup"]]  # a loud host leaves some without figures
        assert {layout["intra_op_threads"] for layout in layouts} and all(speedup > 0 for speedup in measured), tuned
        decided = tuned["verdict"] in ("kept", "tuned") and done["outcome"] in ("nothing_changed", "promoted", "kept")
        assert decided or not measured, done
        assert running.admin("GET", "/admin/models/digits")["loaded"], "what took turns is gone, what serves is not"
