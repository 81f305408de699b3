"""Blame by a paired replay beside live traffic. Runs without other tests: on a loud host the replay rightly tells nothing."""

from __future__ import annotations

from app.faulty_models import free_size, slower_twin
from app.traffic import Traffic
from tests.loop_scene import deploy, running, told, traffic
from tests.running_server import Running

__all__ = ["running", "traffic"]  # fixtures


def test_a_slower_model_is_blamed_by_replay_and_a_better_one_asked_for(running: Running, traffic: Traffic) -> None:
    config = running.folder / "models" / "digits" / "model.yaml"
    promised = config.read_text().replace("objective: {p99_ms: 50}", "objective: {p95_ms: 1}")
    assert promised != config.read_text()
    deploy(running, lambda source, target: slower_twin(source, target, 3))
    running.until(lambda: running.admin("GET", "/admin/models/digits")["active"] == "2", 30)
    config.write_text(promised)
    assert told(running, "diagnosis.made", seconds=240, cause="version")["evidence"]["replay"]["version"][1] > 1.5
    assert "× as fast for" in told(running, "plan.made", action="optimize")["summary"]
    job = running.until(lambda: running.admin("GET", "/admin/jobs")["jobs"], 20)[0]
    assert job["actor"] == "hone" and job["tries"][0][0]["method"] == "int8-static" and job["rank"] > 0


def test_larger_images_are_blamed_though_most_of_what_was_captured_is_small(running: Running, traffic: Traffic) -> None:
    deploy(running, free_size)
    running.until(lambda: running.admin("GET", "/admin/models/digits")["active"] == "2", 30)
    traffic.raise_to(rate=80.0, rows=1, callers=8)
    running.until(lambda: _knows_its_normal(running), 90)
    traffic.change = lambda images: images.repeat(2, -1).repeat(2, -2)
    found = told(running, "diagnosis.made", seconds=240, cause="input")  # a loud host is told first, and asked again after a minute
    assert found["evidence"]["replay"]["recent"][1] > 1.5 and "earlier ones" in found["summary"]
    assert told(running, "plan.made", action="tune")
    assert traffic.failed == 0


def _knows_its_normal(running: Running) -> bool:
    told = running.admin("GET", "/admin/models/digits")["loop"]
    return bool(told["condition"] == "steady" and told.get("shape_shift") is not None and told.get("cost_ratio"))
