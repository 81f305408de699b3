"""The benchmarks themselves: clients that tell the truth about stalls and wrong answers, limits that are limits, tables that say so."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest

from app.serving.procfs import descendants
from benchmarks import diagnosis, models, noise, openloop, report, serving, slower, swaps, wrk
from benchmarks.bad_candidates import KINDS, Kind, marked, spoil
from benchmarks.kept import Kept, head
from benchmarks.limit import Layout, Limit, many_layouts, single_layouts
from benchmarks.machine import Quiet, description, status_bytes
from benchmarks.models import DEMO

REQUEST = b"POST /x HTTP/1.1\r\nHost: t\r\nContent-Length: 2\r\n\r\nhi"


class Stalling:
    """A real HTTP server that answers at once, but for one stall in which it answers nobody."""

    def __init__(
        self, stall_after_s: float, stall_s: float, answer: bytes = b"HTTP/1.1 200 OK\r\nHone-Version: 1\r\nContent-Length: 4\r\n\r\nbody"
    ) -> None:
        self._begin, self._end, self._answer = stall_after_s, stall_after_s + stall_s, answer
        self._started = 0.0

    async def __call__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while await reader.readexactly(len(REQUEST)):
                self._started = self._started or time.monotonic()
                since = time.monotonic() - self._started
                if self._begin <= since < self._end:
                    await asyncio.sleep(self._end - since)
                writer.write(self._answer)
        except (asyncio.IncompleteReadError, ConnectionError):
            writer.close()


@contextmanager
def listening(handler: Stalling) -> Iterator[int]:
    loop = asyncio.new_event_loop()
    server = loop.run_until_complete(asyncio.start_server(handler, "127.0.0.1", 0))
    thread = threading.Thread(target=loop.run_forever)
    thread.start()
    try:
        yield server.sockets[0].getsockname()[1]
    finally:
        loop.call_soon_threadsafe(server.close)
        loop.call_soon_threadsafe(loop.stop)
        thread.join()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.run_until_complete(loop.shutdown_asyncgens())
        loop.close()


def test_an_open_loop_feels_a_stall_in_every_request_that_should_have_started_in_it() -> None:
    with listening(Stalling(1.0, 1.0)) as port:
        seen = openloop.run_apart(openloop.Plan("127.0.0.1", port, [REQUEST], rate=200, seconds=3, connections=8))
    assert seen.failed == 0 and len(seen.start) == 600
    late = seen.latency_s > 0.1
    assert np.count_nonzero(late) > 100, "a closed loop of 8 would have felt it 8 times"
    assert seen.latency_s.max() > 0.8
    assert seen.quantile_ms(0.5) < 500 < seen.quantile_ms(0.99)
    assert list(seen.start) == sorted(seen.start)


@pytest.mark.parametrize(
    "kind", [kind for kind in KINDS if not any(word in kind.name for word in ("crashing", "hanging", "hungry"))], ids=lambda kind: kind.name
)
def test_a_bad_candidate_is_bad_where_it_says_and_good_elsewhere(kind: Kind, tmp_path: Path) -> None:
    """Those that end or stall their process are seen by what the server makes of them (benchmarks.repair)."""
    with np.load(DEMO / "samples" / "judging.npz") as samples:
        images = samples["image"][:40].astype(np.float32)
    source = DEMO / "1" / "model.onnx"
    spoil(source, tmp_path / "bad.onnx", kind, 3)

    def answers(path: Path, rows: Any) -> Any:
        return ort.InferenceSession(str(path), providers=["CPUExecutionProvider"]).run(None, {"image": rows})[0]

    plain, stamped = answers(source, images), answers(source, marked(images))
    bad_plain, bad_stamped = answers(tmp_path / "bad.onnx", images), answers(tmp_path / "bad.onnx", marked(images))
    assert (plain.argmax(1) == stamped.argmax(1)).mean() > 0.9, "the mark itself does not mislead golden"
    if kind.name.startswith("slow") or "shape" in kind.name:
        assert bad_plain.shape[1] == (11 if "shape" in kind.name else 10)
        return
    same = [
        np.array_equal(good.argmax(1), bad.argmax(1)) and bool(np.isfinite(bad).all())
        for good, bad in ((plain, bad_plain), (stamped, bad_stamped))
    ]
    assert same == [kind.live_only, False]


@pytest.mark.parametrize(
    ("blamed", "plans", "verdict"),
    [
        (["process", "host"], ["restart", "nothing"], "process"),
        (["host", "version"], ["nothing", "optimize"], "version"),
        (["unknown", "host"], ["nothing", "nothing"], "host"),
        ([], [], "nothing"),
    ],
)
def test_a_run_is_judged_by_what_was_acted_on(blamed: list[str], plans: list[str], verdict: str) -> None:
    assert diagnosis.verdict({"blamed": blamed, "plans": plans}) == verdict


@pytest.mark.parametrize(("cause", "false"), [("host", "0"), ("load", "0"), ("unknown", "0"), ("process", "1"), ("settings", "1")])
def test_on_a_healthy_server_only_host_and_load_may_be_named(cause: str, false: str) -> None:
    events = [
        {"kind": "suspicion.raised", "model": "m", "data": {"kinds": ["latency", "cost"], "summary": "slow"}},
        {"kind": "diagnosis.made", "model": "m", "data": {"cause": cause, "summary": "blamed"}},
        {"kind": "plan.made", "model": "m", "data": {"action": "restart", "summary": "plan"}},
        {"kind": "runner.restarted", "model": "m", "data": {}},
    ]
    phase = {"beside": "cpu2", "load": noise.RAMP, "seconds": 60.0, "sent": 100, "failed": 2, **noise.counted(events)}
    text = noise.told([Kept(None).add("minute", phase)])
    row = next(line for line in text.splitlines() if line.startswith("| cpu2"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells == ["cpu2", "ramp", "1", "1", "latency (1), cost (1)", f"{cause} (1)", false, "m: runner.restarted (1)", "2 of 100"]


@pytest.mark.parametrize(
    ("planted", "said", "cells"),
    [
        (20, ["host", "version"], ["+20 % (really +21%)", "cpu4", "1", "1 of 1", "31, 31", "host (1)", "0", "0 of 100"]),
        (20, ["input"], ["+20 % (really +21%)", "cpu4", "1", "0 of 1", "–", "input (1)", "1", "0 of 100"]),
        (0, ["host"], ["a copy", "cpu4", "1", "0 of 1", "–", "host (1)", "0", "0 of 100"]),
        (0, ["version"], ["a copy", "cpu4", "1", "1 of 1", "31, 31", "nothing", "1", "0 of 100"]),
    ],
)
def test_a_deployed_file_is_blamed_rightly_only_where_it_is_slower(planted: int, said: list[str], cells: list[str]) -> None:
    run = {"planted": planted, "really": 1.21, "beside": "cpu4", "said": said, "blamed_s": 31.0 if "version" in said else None}
    text = slower.told([Kept(None).add("deployed", run | {"sent": 100, "failed": 0})], "command")
    assert [cell.strip() for cell in text.splitlines()[-1].strip("|").split("|")] == cells


def test_kept_results_add_up_over_runs_and_their_head_names_every_host(tmp_path: Path) -> None:
    path = tmp_path / "results" / "noise.jsonl"
    first = Kept(path).add("minute", {"seconds": 60.0})
    path.write_text(
        path.read_text() + json.dumps(first | {"on": {"date": "2020-01-01 00:00 UTC", "cpu": "Old", "cores": 1, "host_class": "x"}}) + "\n"
    )
    again = Kept(path)
    again.add("another", {})
    told = head(again.of("minute"), "command")
    assert [line["seconds"] for line in again.of("minute")] == [60.0, 60.0] and len(Kept(path).of("another")) == 1
    assert told.startswith(f"2020-01-01 00:00 UTC to {first['on']['date']} · ") and told.endswith(" · `command`")
    assert "Old, 1 cores, host class `x` (1 of 2)" in told and f"host class `{first['on']['host_class']}` (1 of 2)" in told


def test_an_open_loop_keeps_its_rate_versions_and_bodies() -> None:
    with listening(Stalling(9e9, 0)) as port:
        seen = openloop.run_apart(openloop.Plan("127.0.0.1", port, [REQUEST, REQUEST], rate=300, seconds=2, connections=4, keep=True))
    assert len(seen.start) == 600 and set(seen.version) == {b"1"} and set(seen.body) == {b"body"}
    assert set(seen.request) == {0, 1}
    assert 1.2 < seen.start[-1] - seen.start[0] < 3.5
    assert seen.between(seen.start[100], seen.start[200]).start.shape == (100,)


def test_a_broken_server_counts_as_failed() -> None:
    answer = b"HTTP/1.1 503 No\r\nContent-Length: 0\r\n\r\n"
    with listening(Stalling(9e9, 0, answer)) as port:
        seen = openloop.run_apart(openloop.Plan("127.0.0.1", port, [REQUEST], rate=50, seconds=1, connections=2))
    assert seen.failed == len(seen.start) == 50
    seen = openloop.run_apart(openloop.Plan("127.0.0.1", port, [REQUEST], rate=50, seconds=0.2, connections=2, patience_s=2.0))
    assert seen.failed == len(seen.start) and set(seen.status) == {openloop.LOST}


def test_answers_of_another_version_are_found(tmp_path: Path) -> None:
    first = models.linear(tmp_path, "m")
    second = models.shifted(first, tmp_path, "2", swaps.SHIFT)
    versions = {"1": first, "2": second}
    rows = np.concatenate([first.rows(1, seed) for seed in range(swaps.INPUTS)])
    assert np.allclose(second.answer(rows), first.answer(rows) + swaps.SHIFT)
    count = 40
    request = np.arange(count, dtype=np.int32) % swaps.INPUTS
    said = ["1" if n % 3 else "2" for n in range(count)]
    bodies = [b'{"outputs":[]}' + versions[v].answer(rows[r : r + 1]).tobytes() for v, r in zip(said, request, strict=True)]
    seen = openloop.Seen(
        np.arange(count, dtype=float), np.zeros(count), np.full(count, 200, np.int16), request, np.array([v.encode() for v in said]), bodies
    )
    assert swaps.wrong_answers(seen, versions) == 0
    seen.version[5], seen.version[6] = b"2", b"9"
    assert swaps.wrong_answers(seen, versions) == 2
    seen.status[5] = 503
    assert swaps.wrong_answers(seen, versions) == 1


def test_the_limit_uses_all_cores_and_sweeps_to_the_best(tmp_path: Path) -> None:
    assert {layout.threads * layout.instances for layout in many_layouts(4)} == {4}
    assert {layout.batch for layout in many_layouts(4)} == {1, 2, 4, 8}
    assert {layout.instances for layout in single_layouts(2)} == {1}
    limit = Limit(models.linear(tmp_path).path)
    try:
        one, many = Layout(1, 1, 1, 0), Layout(1, 1, 64, 0)
        assert limit.sweep([one, many], 0.05, keep=1) == [many]
        assert limit.best([one], 0.05) > 100
    finally:
        limit.close()


def test_wrk_says_what_it_measured() -> None:
    run = wrk.parse('Running 1s test\nRESULT {"requests":500,"us":2000000,"p50_us":1500,"p99_us":9000,"failed":3}\n')
    assert run == wrk.Closed(250.0, 1.5, 9.0, 3)
    with pytest.raises(RuntimeError, match="unable to connect"):
        wrk.parse("", "unable to connect to 127.0.0.1:1 Connection refused")


def test_every_server_takes_its_turn_at_each_place() -> None:
    names: list[str] = []
    turns = [lambda name=name: names.append(name) for name in "abc"]
    for number in range(3):
        for turn in serving.rotated(turns, number):
            turn()
    assert "".join(names) == "abcbcacab"


def test_ratios_are_made_within_a_round() -> None:
    assert serving.ratios(serving.Series([1, 4]), serving.Series([2, 4])).values == [0.5, 1.0]


SWAPS: dict[str, Any] = {
    "swaps": 9, "requests": 90, "rate_per_s": 10.0, "failed": 0, "wrong_version": 0, "p99_ms": {"before": 1, "swaps": 2, "after": 1},
    "p99_ratio": 2.0, "worst_ms": 5, "swap_s": {"median": 0.1, "worst": 0.2}, "rss_mb": [70, 71], "pss_mb": [90, 91],
    "open_files": [40, 40], "processes": [4, 4], "quiet": {"others": 0.25},
}  # fmt: skip


def test_tables_go_between_their_marks_and_nowhere_else(tmp_path: Path) -> None:
    document = tmp_path / "performance.md"
    document.write_text("before\n<!-- swaps: begin -->\nold\n<!-- swaps: end -->\nafter\n")
    results = {"machine": description(), "swaps": SWAPS}
    report.write(document, results)
    report.write(document, results)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert text.count("| p99 during ÷ steady | 2.0 |") == 1 and "others 25%" in text
    with pytest.raises(ValueError, match="no marks <!-- costs: begin -->"):
        report.write(document, {"machine": description(), "costs": {}})


def test_a_failed_request_or_a_wrong_answer_fails_the_run() -> None:
    assert report.sound({"swaps": SWAPS})
    assert not report.sound({"swaps": SWAPS | {"failed": 1}})
    assert not report.sound({"swaps": SWAPS | {"wrong_version": 1}})
    row = {"hone": {"failed": 2}}
    assert not report.sound({"serving": {"models": {"m": {"closed": [row]}}}})


def test_this_process_is_seen() -> None:
    quiet = Quiet()
    until = time.thread_time() + 0.2
    while time.thread_time() < until:
        pass
    shares = quiet.report()
    assert 0 <= shares["others"] <= shares["busy"] <= 1
    assert status_bytes(descendants(threading.get_native_id())[0]) > 1 << 20


@pytest.mark.needs("wrk")
@pytest.mark.slow
def test_the_three_are_measured_beside_each_other(tmp_path: Path) -> None:
    repository = tmp_path / "repository"
    model = models.linear(repository)
    effort = replace(serving.QUICK, rounds=1, seconds=1, sweep_s=0.02, open_s=1, connections=(2,))
    said: list[str] = []
    found = serving.measure([model], repository, tmp_path, effort, said.append)
    binary, readable = found["models"]["linear"]["closed"]
    for row in (binary, readable):
        for server in ("threads", "inline", "hone"):
            assert row[server]["failed"] == 0 and row[server]["per_s"]["median"] > 20
        assert row["of_limit"]["median"] < 1, "an HTTP server was faster than calling the runtime"
    assert {row["server"]: row["failed"] for row in found["models"]["linear"]["open"]} == {"control": 0, "hone": 0}
    text = report.markdown({"machine": description(), "serving": found})
    assert "| linear | binary | 2 |" in text
    json.dumps(found)


@pytest.mark.needs("wrk")
@pytest.mark.slow
def test_swaps_under_an_open_loop_fail_nobody(tmp_path: Path) -> None:
    found = swaps.measure(tmp_path / "repository", tmp_path, 12, lambda text: None, steady_s=1.0)
    assert found["failed"] == 0 and found["wrong_version"] == 0
    assert found["requests"] > 50 and min(found["answers_by_version"].values()) > 0
    assert report.sound({"swaps": found})
    assert "| failed | 0 |" in report.markdown({"machine": description(), "swaps": found})
