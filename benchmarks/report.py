"""Results as Markdown tables, in docs/performance.md between two marks; everything else in that file is written by people.

It judges nothing but whether answers failed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Final

PARTS: Final = ("serving", "swaps", "costs")


def markdown(results: dict[str, Any]) -> str:
    """All parts that `results` has."""
    tables = {"serving": _serving, "swaps": _swaps, "costs": _costs}
    return "\n\n".join(f"{_head(part, results)}\n\n{tables[part](results[part])}" for part in PARTS if part in results)


def write(document: Path, results: dict[str, Any]) -> None:
    """Put each measured part between its marks; parts that were not measured stay as they are. Raises ValueError where a mark is missing."""
    text = document.read_text()
    for part in PARTS:
        if part not in results:
            continue
        text = replaced(text, part, partial(markdown, {"machine": results["machine"], part: results[part]}))
    document.write_text(text)


def replaced(text: str, part: str, tables: Callable[[], str]) -> str:
    """`text` with what `tables` makes between the marks of `part`. Raises ValueError where a mark is missing."""
    begin, end = f"<!-- {part}: begin -->", f"<!-- {part}: end -->"
    if begin not in text or end not in text:
        raise ValueError(f"the document has no marks {begin} and {end}; put them where the tables of {part} belong")
    before, _, rest = text.partition(begin)
    return before + begin + "\n" + tables() + "\n" + end + rest.partition(end)[2]


def between(text: str, part: str) -> str:
    """What stands between the marks of `part`; '' where a mark is missing."""
    return text.partition(f"<!-- {part}: begin -->")[2].partition(f"<!-- {part}: end -->")[0]


def sound(results: dict[str, Any]) -> bool:
    """No request failed where none may, and no answer was of another version."""
    rows = [row for model in results.get("serving", {}).get("models", {}).values() for row in model["closed"]]
    served = all(row["hone"]["failed"] == 0 for row in rows)
    swaps = results.get("swaps", {"failed": 0, "wrong_version": 0})
    return served and not swaps["failed"] and not swaps["wrong_version"]


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> str:
    lines = ["| " + " | ".join(head) + " |", "|" + " --- |" * len(head)]
    return "\n".join(lines + ["| " + " | ".join(str(cell) for cell in row) + " |" for row in rows])


def _head(part: str, results: dict[str, Any]) -> str:
    about, quiet = results["machine"], results[part].get("quiet") or {}
    noise = ", ".join(f"{name} {share:.0%}" for name, share in quiet.items())
    return (
        f"{about['date']} · {about['cpu']}, {about['cores']} cores · host class `{about['host_class']}` · Python {about['python']}, "
        f"kernel {about['kernel']} · `{about['command']}` · share of all cores' time while it ran: {noise}"
    )


def _serving(found: dict[str, Any]) -> str:
    closed, opened = [], []
    head = [
        "model", "body", "connections", "limit", "control in threads", "control inline", "Hone", "of the limit", "× in threads", "× inline",
        "in threads ms", "inline ms", "Hone ms",
    ]  # fmt: skip
    for name, model in found["models"].items():
        for row in model["closed"]:
            servers = row["threads"], row["inline"], row["hone"]
            closed.append(
                [name, row["body"], row["connections"], _rate(row["limit"]), *(_rate(server["per_s"]) for server in servers),
                 _ratio(row["of_limit"]), _ratio(row["of_threads"]), _ratio(row["of_inline"]), *map(_latency, servers)]
            )  # fmt: skip
        opened += [
            [name, row["server"], f"{row['per_s']:.0f}", row["failed"], row["p50_ms"], row["p99_ms"], row["p999_ms"]]
            for row in model["open"]
        ]
    limits = [f"`{name}`: one call {model['single']}; many {model['many']}" for name, model in found["models"].items()]
    effort = found["effort"]
    return "\n\n".join(
        [
            f"Closed loop, answers a second, {effort['rounds']} rounds of {effort['seconds']:g} s (and {effort['latencies']} latencies) or more each, in turns. Ratios are of one round: median "
            "(lowest to highest). The control has two forms: the model in the thread pool (what a plain `def` route does), or inline on the event loop, which then answers nothing else. "
            "At 1 connection the limit is the best single call, else all cores. Milliseconds p50 / p99 of a closed loop: its p99 hides stalls.",
            table(head, closed),
            "The limit's best layouts: " + ". ".join(limits) + ".",
            "Open loop at half of Hone's capacity, both at the same rate, latency from the intended start:",
            table(["model", "server", "requests/s", "failed", "p50 ms", "p99 ms", "p99.9 ms"], opened),
        ]
    )


def _swaps(found: dict[str, Any]) -> str:
    p99 = found["p99_ms"]
    rows = [
        ["swaps", found["swaps"]],
        ["requests, at half of capacity", f"{found['requests']} at {found['rate_per_s']:.0f}/s"],
        ["failed", found["failed"]],
        ["answers of another version than they say", found["wrong_version"]],
        ["p99 before, during, after (ms)", f"{p99['before']}, {p99['swaps']}, {p99['after']}"],
        ["p99 during ÷ steady", found["p99_ratio"]],
        ["worst answer during swaps (ms)", found["worst_ms"]],
        ["seconds of a swap, median and worst", f"{found['swap_s']['median']}, {found['swap_s']['worst']}"],
        ["resident memory of the HTTP process, early and last (MB)", _pair(found["rss_mb"])],
        ["PSS of all processes, early and last (MB)", _pair(found["pss_mb"])],
        ["open files, early and last", _pair(found["open_files"])],
        ["processes, early and last", _pair(found["processes"])],
    ]
    return table(["swaps under load", ""], rows)


def _costs(found: dict[str, Any]) -> str:
    start, runner, many = found["start"], found["runner"], found["many"]
    overload, job = found["overload"], found["optimization"]
    rows = [
        [f"ready with a {start['model_mb']} MB model, first start and later (s)", f"{start['first_s']}, {start['second_s']}"],
        ["resident memory of the HTTP process, idle and after load (MB)", f"{start['idle_rss_mb']}, {start['busy_rss_mb']}"],
        ["a runner's process ready, median and worst (ms)", f"{runner['ready_ms']}, {runner['worst_ms']}"],
        [f"{many['models']} models loaded: p50 of one of them ÷ alone", many["ratio"]],
        [
            f"{many['models']} models loaded: private memory each beside weights, loaded, after a batch, at rest (MB)",
            ", ".join(map(str, many["private_beside_weights_mb"])),
        ],
        [f"{many['models']} models loaded: HTTP process (MB)", many["http_rss_mb"]],
        *(
            [
                f"p99 beside a neighbour at 3 × overload ({one['hot_per_s']:.0f} requests/s of {one['hot_rows']} rows, {one['hot_refused_share']:.0%} refused) ÷ alone",
                f"{one['ratio']} ({one['p99_alone_ms']} to {one['p99_beside_ms']} ms)",
            ]
            for one in overload
        ),
        *(
            [
                f"live and ready while {one['count']} {one['form']} bodies of {one['megabytes']} MB come at once ({one['answered']} answered, {one['refused']} refused, {one['failed']} failed): p99, worst (ms)",
                f"{one['p99_ms']}, {one['worst_ms']}",
            ]
            for one in found["bodies"]
        ),
        ["p99 while int8 is built on the same cores ÷ without", f"{job['ratio']} ({job['p99_without_ms']} to {job['p99_during_ms']} ms)"],
    ]
    base = found["features"][0]
    features = [
        [row["variant"], f"{row['per_s']:.0f}", row["cpu_us"], f"{base['cpu_us'] - row['cpu_us']:+.1f}"] for row in found["features"]
    ]
    return "\n\n".join(
        [
            table(["cost", ""], rows),
            "The linear model at 32 connections with one feature off at a time; the last column is what the feature costs:",
            table(["variant", "requests/s", "CPU of the HTTP process, µs a request", "µs saved"], features),
        ]
    )


def _rate(series: dict[str, float]) -> str:
    return f"{series['median']:.0f}" if series["median"] >= 100 else f"{series['median']:.1f}"


def _ratio(series: dict[str, float]) -> str:
    return f"{series['median']:.2f} ({series['low']:.2f}–{series['high']:.2f})"


def _latency(server: dict[str, dict[str, float]]) -> str:
    return f"{server['p50_ms']['median']:.2f} / {server['p99_ms']['median']:.2f}"


def _pair(values: Sequence[float]) -> str:
    return f"{values[0]}, {values[1]}"
