"""JSON of the admin side as text for people: aligned tables, one line for an event. Pure; knows neither server nor terminal."""

from __future__ import annotations

import datetime
import json
import math
import time
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Final, TypeAlias

from app.domain import short
from app.plain import clean

JSON: TypeAlias = dict[str, Any]
Cell: TypeAlias = Callable[[JSON], object]

_QUIET: Final = frozenset({
    "sha256", "golden_sha256", "report", "epoch", "attempt", "evidence", "numbers", "kinds", "confidence", "rules_out", "beside", "action",
    "cause", "waits", "took_s", "host_class", "watch_share", "keep_since", "expected", "back",
})  # fmt: skip
"""Keys of an event that say nothing to a person."""


def table(rows: Iterable[JSON], columns: Sequence[tuple[str, Cell]]) -> str:
    """Columns as wide as their widest cell; what is absent is a dash. Columns with nothing in them are left out."""
    found = [[_text(cell(row)) for _, cell in columns] for row in rows]
    used = [i for i in range(len(columns)) if any(line[i] != "-" for line in found)]
    lines = [[columns[i][0] for i in used], *([line[i] for i in used] for line in found)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(used))]
    return "\n".join("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def fields_of(row: JSON, indent: str = "") -> str:
    """One thing as `name  value` lines; nested objects are indented, empty values (objects of nothing else, too) left out."""
    shown = {key: value for key, value in row.items() if not _empty(value)}
    width = max((len(key) for key in shown), default=0)
    lines: list[str] = []
    for key, value in shown.items():
        if isinstance(value, dict):
            lines += [f"{indent}{key}", fields_of(value, indent + "  ")]
        elif isinstance(value, list) and any(isinstance(item, dict) for item in value):
            lines += [f"{indent}{key}", *(f"{indent}  - {_inline(item)}" for item in value)]
        else:
            at = isinstance(value, float) and (key == "at" or key.endswith("_at"))
            lines.append(f"{indent}{key.ljust(width)}  {clock(value) if at else _text(value)}")
    return "\n".join(lines)


def _empty(value: object) -> bool:
    return value in (None, "", [], {}, ()) or (isinstance(value, dict) and all(map(_empty, value.values())))


def ladder(found: JSON) -> str:
    """Who may answer in a model's place under load."""
    rungs = found.get("rungs")
    return (
        f"{found.get('model')}: under load, {' then '.join(rungs)} may answer"
        if rungs
        else f"{found.get('model')}: no other version may answer, whatever the load"
    )


def models(rows: Iterable[JSON]) -> str:
    return table(
        rows,
        [
            ("MODEL", lambda r: r.get("name")),
            ("ACTIVE", lambda r: r.get("active")),
            ("DESIRED", lambda r: r.get("desired")),
            ("GOLDEN", lambda r: r.get("golden")),
            ("STATE", _state_of),
            ("OBJECTIVE", lambda r: _promised(r.get("loop") or {})),
            ("NOW", lambda r: _p95(r.get("loop") or {})),
            ("TREND", lambda r: _trend((r.get("loop") or {}).get("trend"))),
            ("LAST EVENT", lambda r: _latest(r.get("latest") or {})),
            ("MODE", lambda r: r.get("mode")),
            ("RUNS WITH", lambda r: _settings(r.get("settings") or {})),
            ("MEMORY", lambda r: size(sum(loaded.get("memory_bytes") or 0 for loaded in r.get("loaded") or ()))),
            ("REASON", lambda r: r.get("reason")),
        ],
    )


def _state_of(row: JSON) -> str:
    """Ready or not; and what the loop is about with it, unless all is well."""
    condition = (row.get("loop") or {}).get("condition", "steady")
    return str(row.get("state")) if condition == "steady" else f"{row.get('state')}, {condition}"


def _promised(loop: JSON) -> str:
    """All that it is held to; what it misses of late is marked."""
    return ", ".join(f"{one['promised']}{' MISSED' if one['kept'] is False else ''}" for one in loop.get("objectives") or ())


def _p95(loop: JSON) -> str:
    return f"p95 {short(loop['p95_s'] * 1e3)} ms" if loop.get("p95_s") else ""


def _trend(ratio: float | None) -> str:
    """The last minute against all five."""
    if not isinstance(ratio, int | float):
        return ""
    return "level" if 0.8 <= ratio <= 1.25 else f"{ratio - 1:+.0%}"


def _latest(event: JSON) -> str:
    """What happened last, and how long ago."""
    at = event.get("at")
    return f"{event.get('kind')}, {age(time.time() - at)} ago" if isinstance(at, int | float) else ""


def age(seconds: float) -> str:
    """In the largest unit that there is one of, such as 5 min; a clock that was set back makes nothing younger than now."""
    for name, unit in (("d", 86_400), ("h", 3600), ("min", 60)):
        if seconds >= unit:
            return f"{seconds / unit:.0f} {name}"
    return f"{max(0.0, seconds):.0f} s"


def explanation(found: JSON) -> str:
    """Why a version is live: its lineage with the proofs, how it does now, and what led here."""
    loop = found.get("loop") or {}
    lines = [
        f"{found.get('name')}: version {found.get('active') or 'none'} answers, {found.get('mode')} mode, {loop.get('condition', 'steady')}"
    ]
    for version in found.get("lineage") or ():
        built = f"from {version['parent']} by {recipe(version.get('recipe'))}" if version.get("parent") else "not golden, as deployed"
        origin = "golden, as deployed" if version.get("golden") else built
        proof = version.get("proof") or {}
        said = f"{proof.get('verdict')} here: {proof.get('summary')}" if proof else "no proof on this class of host"
        lines.append(f"  {version.get('version')}  {origin}; {version.get('why') or ''}; {said}")
    lines += ["", "now:", *(f"  {line}" for line in [*now(loop)] or ["no answers of late"]), "", "what led here:"]
    return "\n".join([*map(clean, lines), *(f"  {event_line(event)}" for event in found.get("story") or ())])


def now(loop: JSON) -> Iterable[str]:
    """How a model does, a line each."""
    for number, one in enumerate(loop.get("objectives") or ()):
        met = loop.get("attained") if number == 0 else None  # the share of answers is counted for the first of latency
        share = f", met by {met:.1%} of the answers of five minutes" if met is not None else ""
        held = "nothing to tell by yet" if one["now"] is None else f"{one['now']}{'' if one['kept'] else ', MISSED'}{share}"
        yield f"objective {one['promised']}: {held}"
    if loop.get("p95_s"):
        words = (("queue", "waiting"), ("compute", "in the model"), ("edge", "read and written"))
        phases = [f"{word} {short(of[key] * 1e3)}" for key, word in words if key in (of := loop.get("phases_p95_s") or {})]
        yield f"p95 {short(loop['p95_s'] * 1e3)} ms at {short(loop.get('requests_per_s', 0))} requests/s" + (
            f" ({', '.join(phases)})" if phases else ""
        )
    fidelity = loop.get("fidelity")
    if fidelity:
        yield f"agrees with golden on {short(fidelity['agreed'], 4)} of {fidelity['compared']} live requests{_lowest(loop.get('classes') or ())}"
    labels = loop.get("labels")
    if labels:
        usual = f", on {labels['usual']:.1%} when all was well" if labels["usual"] is not None else ""
        yield f"right on {labels['right']} of {labels['labelled']} labelled answers of five minutes{usual}"
    if loop.get("entropy_shift") is not None:
        yield (
            f"beside golden on the same requests: entropy {loop['entropy_shift']:+.2f}, margin {loop['margin_shift']:+.2f} standard deviations"
        )
    if loop.get("cost_ratio"):
        yield f"CPU time per row {loop['cost_ratio']:.2f} × its normal"
    yield from (f"suspicion: {text}" for text in loop.get("suspicions") or ())
    if loop.get("cause"):
        yield f"blamed on {loop['cause']}: {loop.get('why')}"


def _lowest(classes: Sequence[JSON]) -> str:
    """The class on which golden is agreed with least, where that is not always."""
    if not classes or classes[0]["agreed"] == classes[0]["compared"]:
        return ""
    return f"; least on class {classes[0]['class']}: {classes[0]['agreed']} of {classes[0]['compared']}"


def versions(rows: Iterable[JSON]) -> str:
    return table(
        rows,
        [
            ("", lambda r: "*" if r.get("active") else ""),
            ("VERSION", lambda r: r.get("version")),
            ("PARENT", lambda r: "golden" if r.get("golden") else r.get("parent") or "deployed"),
            ("RECIPE", lambda r: recipe(r.get("recipe"))),
            ("STATE", lambda r: r.get("state")),
            ("SIZE", lambda r: size(r.get("bytes"))),
            ("VERDICT HERE", lambda r: (r.get("proof") or {}).get("verdict") or "unproven"),
            ("FIDELITY", lambda r: _fidelity((r.get("proof") or {}).get("fidelity") or {})),
            ("CPU PER ROW", lambda r: _cpu((r.get("proof") or {}).get("latency") or {})),
            ("PROOF", lambda r: (r.get("proof") or {}).get("summary")),
            ("REASON", lambda r: r.get("reason")),
        ],
    )


def jobs(rows: Iterable[JSON]) -> str:
    return table(
        rows,
        [
            ("JOB", lambda r: r.get("id")),
            ("MODEL", lambda r: r.get("model")),
            ("TRIES", lambda r: recipes(r.get("tries"))),
            ("STATE", lambda r: r.get("state")),
            ("OUTCOME", lambda r: r.get("outcome")),
            ("VERSION", lambda r: r.get("candidate") or ", ".join(r.get("candidates") or ())),
            ("ASKED", lambda r: clock(r.get("requested_at"))),
            ("BY", lambda r: r.get("actor")),
        ],
    )


def methods(rows: Iterable[JSON]) -> str:
    """What `hone optimize --with` takes, and whether this installation has it."""
    found = table(
        rows,
        [
            ("METHOD", lambda r: r.get("method")),
            ("GIVES", lambda r: ", ".join(r.get("gives") or ())),
            ("HERE", lambda r: "yes" if r.get("available") else r.get("reason")),
            ("WHAT IT DOES", lambda r: r.get("summary")),
        ],
    )
    return f"{found}\n\nhone methods METHOD shows its options"


def method(row: JSON) -> str:
    """One method with its options, written as `--with` takes them."""
    options = table(
        row.get("options") or (),
        [
            ("OPTION", lambda r: r.get("option")),
            ("DEFAULT", lambda r: r["default"] if isinstance(r["default"], str) and r["default"] else json.dumps(r["default"])),
            ("TYPE", lambda r: r.get("type")),
        ],
    )
    facts = {
        "gives": row.get("gives"),
        "needs": row.get("needs"),
        "mostly followed by": row.get("then"),
        "not available": row.get("reason"),
    }
    parts = [f"{row.get('method')}: {row.get('summary')}", fields_of(facts), row.get("details"), options if row.get("options") else ""]
    return "\n\n".join(part for part in parts if part)


def recipe(steps: Iterable[Any] | None) -> str:
    """Methods in order, and of what. Their options are many, most of them defaults: they stand in the job and on the version's card."""
    named = ((step.get("method", "?"), step.get("version", "")) if isinstance(step, dict) else (step,) for step in steps or ())
    return " + ".join(" ".join(str(part) for part in parts if part) for parts in named)


def recipes(tries: Iterable[Any] | None) -> str:
    return " | ".join(recipe(steps) for steps in tries or ())


def progress(job: JSON) -> str:
    """Where a job is: its state, and the step of its child process where one says so, in tenths."""
    seen = job.get("progress") or {}
    share = seen.get("share")
    percent = f"{math.floor(share * 10)}0%" if isinstance(share, int | float) and share >= 0.1 else ""
    parts = [job.get("id", ""), job.get("state", ""), seen.get("method", ""), seen.get("step", ""), percent]
    return "  ".join(clean(part) for part in parts if part)


def job_report(report: JSON) -> str:
    """What became of each alternative, a line each; every number is in the version's proof (hone versions MODEL --json)."""
    lines = [f"{one.get('version')}  built by {recipe(one.get('try'))}, {size(one.get('bytes'))}" for one in report.get("built") or ()]
    lines += [f"skipped {recipe(one.get('try'))}: {one.get('reason')}" for one in report.get("skipped") or ()]
    for verdict in report.get("verdicts") or ():
        lines.append(f"{verdict.get('version')}  {verdict.get('summary')}")
        lines += [f"  note: {note}" for note in verdict.get("notes") or ()]
    tuned = report.get("tune")
    if isinstance(tuned, dict):
        lines.append(f"tune: {tuned.get('verdict')}: {tuned.get('reason')}")
    lines += [f"{key}: {report[key]}" for key in ("reason", "waits") if report.get(key)]
    return "\n".join(f"  {clean(line)}" for line in lines)


def event_line(event: JSON) -> str:
    """One event on one line: when, what, of which model and version, and why."""
    data = dict(event.get("data") or {})
    version = event.get("version") or data.get("version") or ""
    data.pop("version", None)
    subject = f"{event.get('model', '')}:{version}" if version else str(event.get("model", ""))
    first = " ".join(str(data.pop(key)) for key in ("outcome", "verdict", "mode") if data.get(key))
    reason = str(data.pop("reason", "") or data.pop("summary", "") or "")
    if isinstance(state := data.get("state"), dict):  # all of it, put back at once
        del data["state"]
        reason = (
            f"state of event {state.get('seq', 0)} (models: {len(state.get('models') or ())}); all change is frozen until `hone unfreeze`"
        )
    report = data.get("report")
    if not reason and isinstance(report, dict):
        reason = str(report.get("summary") or report.get("reason") or "")
    data |= {"tries": recipes(data["tries"])} if "tries" in data else {}
    data |= {"recipe": recipe(data["recipe"])} if "recipe" in data else {}
    rest = ", ".join(f"{key}={_inline(value)}" for key, value in data.items() if key not in _QUIET and value not in (None, "", [], {}))
    actor = event.get("actor", "")
    by = f"(by {actor})" if actor not in ("", "hone") else ""
    parts = [clock(event.get("at")), str(event.get("kind", "")).ljust(18), subject, event.get("job", ""), first, reason, rest, by]
    return "  ".join(clean(part) for part in parts if part)


def clock(at: float | None) -> str:
    """Local time of day; with the date where it is not today's."""
    if not at:
        return "-"
    then = datetime.datetime.fromtimestamp(at)
    return then.strftime("%H:%M:%S" if then.date() == datetime.date.today() else "%Y-%m-%d %H:%M:%S")


def size(count: int | None) -> str:
    if not count:
        return "-"
    amount, units = float(count), ["B", "KB", "MB", "GB", "TB"]
    while amount >= 1000 and len(units) > 1:
        amount, units = amount / 1000, units[1:]
    return f"{amount:.0f} {units[0]}" if units[0] == "B" else f"{amount:.1f} {units[0]}"


def _text(value: object) -> str:
    if value is None or value == "":
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.4g}"
    return _inline(value) if isinstance(value, dict | list | tuple) else clean(value)


def _inline(value: Any) -> str:
    if isinstance(value, dict):
        return " ".join(f"{key}={_inline(item)}" for key, item in value.items() if item not in (None, "", [], {}))
    if isinstance(value, list | tuple):
        return ",".join(_inline(item) for item in value)
    return _text(value)


def _settings(settings: JSON) -> str:
    """Threads × instances, and the batch limit."""
    if not settings:
        return ""
    return f"{settings.get('intra_op_threads')} threads x {settings.get('instances')}, batch {settings.get('batch_limit')}"


def _fidelity(sets: JSON) -> str:
    """Of the largest set of samples that judged: what was measured, and its lower confidence bound."""
    judged = [found for found in sets.values() if isinstance(found, dict) and isinstance(found.get("value"), int | float)]
    if not judged:
        return ""
    most = max(judged, key=lambda found: found.get("samples") or 0)
    return f"{most.get('metric', '')} {most['value']:.4g} (at least {most.get('low', most['value']):.4g}, {most.get('samples')} samples)"


def _cpu(latency: JSON) -> str:
    """CPU time per row as a ratio to what served when it was measured."""
    ratio = (latency.get("rows_ratio") or {}).get("estimate")
    return f"{ratio:.2f} x" if isinstance(ratio, int | float) else ""
