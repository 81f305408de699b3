"""What people are shown of a server, a model and a job: short, in words, with what matters and nothing that moves a terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from app import overview, tables
from app.domain import Event
from app.views import what_led_here
from tests.models import corrupt, scaled
from tests.running_server import server

HOST: dict[str, Any] = {
    "host_class": "x86_64-avx2", "cores": 2, "memory_bytes": 22_000_000_000, "store": "sqlite",
    "now": {"busy_ratio": 0.5, "others_ratio": 0.25, "steal_ratio": 0.0, "throttled_ratio": 0.2},
}  # fmt: skip
MODEL: dict[str, Any] = {
    "name": "digits", "state": "ready", "active": "1.1", "desired": "1.1", "golden": "1", "previous": "1", "mode": "auto",
    "loaded": [{"version": "1.1", "state": "READY", "alive": True, "pid": 7, "queued": 2, "inflight": 1, "memory_bytes": 1_500_000, "batching": True}],
    "rungs": ["1.2"], "failed": {"1.3": "crashed\x1b[2J"}, "captured": 3, "loop": {"p95_s": 0.02, "requests_per_s": 5.0, "phases_p95_s": {"queue": 0.003, "compute": 0.01, "edge": 0.0}},
}  # fmt: skip


def test_a_server_is_a_few_lines_and_a_table_of_its_models() -> None:
    found = {
        "version": "0.1.0",
        "ready": True,
        "uptime_s": 150,
        "host": HOST,
        "workers": [{"name": "w", "methods": ["a", "b"]}],
        "models": [MODEL],
    }
    lines = overview.server(found).splitlines()
    assert lines[0] == "hone 0.1.0 · ready · up 2 min · journal sqlite"
    assert lines[1] == "host x86_64-avx2 · 2 cores · 22.0 GB for models · busy 50% (25% by other programs) · throttled 20%"
    assert lines[2] == "worker w · idle · 2 methods" and lines[3] == ""
    assert lines[4].startswith("MODEL") and lines[5].startswith("digits")


def test_what_is_wrong_with_a_server_stands_above_its_models() -> None:
    found = {"version": "0.1.0", "ready": False, "uptime_s": 1, "frozen": True, "frozen_because": "restored", "store_error": "disk full"}
    text = overview.server(found)
    assert "not ready" in text and "FROZEN" in text and "restored" in text and "store: disk full" in text
    assert "no worker" in text and "no models" in text


def test_a_model_says_how_it_does_and_where_a_rollback_goes() -> None:
    text = overview.model(MODEL | {"waiting_for": "nobody knows yet"})
    for part in (
        "p95 20 ms at 5 requests/s (waiting 3, in the model 10, read and written 0)",
        "rollback goes back to 1",
        "under load 1.2 may answer",
        "1.5 MB",
        "nobody knows yet",
    ):
        assert part in text, text
    assert "version 1.3 failed: crashed" in text and "\x1b" not in text
    for share, does in ((0.05, "answers 5% of the requests"), (0.0, "is asked again what others answered")):
        split = {"version": "1.4", "share": share, "stage": "canary", "since": 100.0}
        assert f"version 1.4 {does} (canary, since 1970-01-01 " in overview.model(MODEL | {"split": split})
    assert "under load 1.2 answers" in overview.model(MODEL | {"stepped_down_to": "1.2"})


def test_every_objective_stands_beside_what_the_model_does() -> None:
    held: list[dict[str, Any]] = [
        {"promised": "p95 ≤ 20 ms", "now": "15 ms", "kept": True},
        {"promised": "memory ≤ 64 MiB", "now": "80 MiB", "kept": False},
        {"promised": "agreement ≥ 99%", "now": None, "kept": None},
    ]
    lines = overview.model(MODEL | {"loop": {"objectives": held, "attained": 0.987}}).splitlines()
    assert "p95 ≤ 20 ms, memory ≤ 64 MiB MISSED, agreement ≥ 99%" in lines[1]
    assert "objective p95 ≤ 20 ms: 15 ms, met by 98.7% of the answers of five minutes" in lines
    assert "objective memory ≤ 64 MiB: 80 MiB, MISSED" in lines and "objective agreement ≥ 99%: nothing to tell by yet" in lines


def test_a_job_says_what_came_of_it() -> None:
    job = {
        "id": "d-1", "model": "d", "tries": [["int8-static"]], "state": "finished", "outcome": "promoted", "requested_at": 100.0, "finished_at": 220.0,
        "reason": "too slow", "worker": "w",
        "report": {"cpu_s": 17.7, "canary": "no canary: too little traffic", "verdicts": [{"version": "1.1", "summary": "passed: no objection"}]},
    }  # fmt: skip
    text = overview.job(job)
    for part in ("too slow", "took 2 min, 17.7 s of CPU", "built by w", "no canary: too little traffic", "1.1  passed: no objection"):
        assert part in text, text
    assert "waits" not in text
    kept, undecided = ({**job, "outcome": outcome, "candidate": "1.1"} for outcome in ("kept", "inconclusive"))
    assert "hone promote d:1.1" in overview.job(kept) and "--force" not in overview.job(kept)
    assert "hone verify d:1.1 judges it anew, hone promote d:1.1 --force" in overview.job(undecided)
    tuned = {"candidate": "1", "report": {"tune": {"verdict": "tuned"}, "settings": {"instances": 2, "graph_level": "all"}}}
    assert "hone settings d instances=2" in overview.job(kept | tuned) and "promote" not in overview.job(kept | tuned)
    open_end = overview.job(undecided | {"candidate": "1", "report": {"tune": {"verdict": "inconclusive"}}})
    assert "hone optimize d --with tune" in open_end and "--force" not in open_end, "no version waits: the one that serves was measured"
    open_job = overview.job({"id": "d-2", "model": "d", "state": "building", "progress": {"method": "tune", "step": "x", "share": 0.42}})
    assert "building  tune  x  40%" in open_job


def test_what_led_here_is_not_buried_under_incidents_for_which_nothing_was_done() -> None:
    def incident(action: str, first: int) -> list[Event]:
        kinds = ("suspicion.raised", "diagnosis.made", "plan.made", "recovery.verified")
        return [Event(kind, "m", seq=first + at, data={"action": action} if kind == "plan.made" else {}) for at, kind in enumerate(kinds)]

    promoted = Event("desired.changed", "m", "1.1", seq=1)
    events = [
        promoted,
        *incident("restart", 10),
        *incident("nothing", 20),
        *incident("nothing", 30),
        Event("job.finished", "m", seq=40),
        *incident("nothing", 50),
    ]
    assert [event.seq for event in what_led_here(events)] == [1, 10, 11, 12, 13, 40, 50, 51, 52, 53]


def test_versions_and_explain_tell_of_what_answers_also_where_golden_does_not_load(tmp_path: Path) -> None:
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    with server(tmp_path) as running:
        running.ready("m")
        corrupt(tmp_path / "models" / "m" / "2" / "model.onnx")
        running.until(lambda: "2" in running.admin("GET", "/admin/models/m")["failed"])
        broken, serving = running.admin("GET", "/admin/models/m/versions")["versions"]
        assert (broken["version"], broken["golden"], broken["active"]) == ("2", True, False) and "not an ONNX file" in broken["reason"]
        assert (serving["version"], serving["golden"], serving["active"], serving["state"]) == ("1", False, True, "READY")
        shown = tables.versions([broken, serving])
        assert [line.split()[-1] for line in shown.splitlines()[:1]] == ["REASON"] and "deployed" in shown.splitlines()[2]
        explained = tables.explanation(running.admin("GET", "/admin/models/m/explain"))
    assert "version 1 answers" in explained and "1  not golden, as deployed" in explained and "no answers of late" in explained


def test_a_wrong_model_yaml_at_a_start_is_told_as_that_and_mended(tmp_path: Path) -> None:
    """Not that the version is gone: it lies there, and nothing of the folder was read."""
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    with server(tmp_path) as running:
        running.ready("m")
        config = tmp_path / "models" / "m" / "model.yaml"
        config.write_text("objectve: {p95_ms: 3}\n")
        running.restart().ready()
        model = running.until(lambda: (found := running.admin("GET", "/admin/models/m")).get("failed") and found)
        assert model["failed"] == {"1": model["reason"]} and "did you mean 'objective'" in model["reason"], model
        assert "no longer in the repository" not in running.log and running.log.count("is not served") == 1
        config.write_text("objective: {p95_ms: 3}\n")
        running.ready("m")


def test_a_start_on_another_class_of_hosts_is_told(tmp_path: Path) -> None:
    scaled(tmp_path / "models" / "m" / "1" / "model.onnx")
    with server(tmp_path) as running:
        running.ready("m")
        [note] = tmp_path.rglob("host-class")
        here = note.read_text()
        for before, is_told in ((here, False), ("x86_64-avx2-ort1.0.0-cpu", True), ("../no class\n", False)):
            note.write_text(before)
            running.restart().ready("m")
            events = running.admin("GET", "/admin/timeline?limit=1000")["events"]
            summary = [event for event in events if event["kind"] == "server.started"][-1]["data"].get("summary", "")
            assert (f"{here}, {before} before" in summary) == is_told, summary
            assert note.read_text() == here


def test_looks_without_a_remedy_are_not_shown_for_the_one_that_had_one() -> None:
    def look(first: int, action: str) -> list[Event]:
        return [Event("suspicion.raised", "m", seq=first), Event("plan.made", "m", seq=first + 1, data={"action": action})]

    events = [*look(1, "nothing"), *look(3, "nothing"), *look(5, "roll back"), *look(7, "nothing"), Event("recovery.verified", "m", seq=9)]
    assert [event.seq for event in what_led_here(events)] == [5, 6, 7, 8, 9]
    later = [*events, *look(10, "nothing"), Event("recovery.verified", "m", seq=12)]
    assert [event.seq for event in what_led_here(later)] == [5, 6, 9, 10, 11, 12]
