"""What people are shown of a server, a model, a job: a few lines in words, and tables; `--json` has everything. Pure."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final, TypeAlias

from app import tables
from app.domain import short
from app.plain import clean

JSON: TypeAlias = dict[str, Any]
_SHOWN: Final = frozenset({
    "name", "state", "reason", "mode", "golden", "desired", "active", "settings", "loaded", "loop", "latest", "last_event", "jobs", "description",
    "objective", "task", "generation", "failed", "split", "rungs", "stepped_down_to", "captured", "previous",
})  # fmt: skip
"""What of a model is told in words; whatever else the server says is listed as it came."""


def server(found: JSON) -> str:
    """Server, host and workers, then a table of the models and the open jobs."""
    models, jobs = found.get("models") or [], found.get("jobs") or []
    parts = ["\n".join(clean(line) for line in (_service(found), _host(found.get("host") or {}), *_workers(found), *_troubles(found)))]
    parts.append(tables.models(models) if models else "no models: hand it one with `hone deploy`, or put one into the repository")
    if jobs:
        parts.append(tables.jobs(jobs))
    return "\n\n".join(parts)


def model(found: JSON) -> str:
    """One model: how it does, which versions are loaded, and its jobs."""
    loaded, jobs = found.get("loaded") or [], found.get("jobs") or []
    parts = [tables.models([found])]
    told = [*([str(found["description"])] if found.get("description") else []), *tables.now(found.get("loop") or {}), *_standing(found)]
    if told:
        parts.append("\n".join(clean(line) for line in told))
    if loaded:
        parts.append(_loaded(loaded))
    if jobs:
        parts.append(tables.jobs(jobs))
    rest = tables.fields_of({key: value for key, value in found.items() if key not in _SHOWN})
    return "\n\n".join([*parts, *([rest] if rest else [])])


def loaded(found: JSON) -> str:
    """One loaded version."""
    return _loaded([found])


def job(found: JSON) -> str:
    """One job: what was asked, by whom it is built, and what came of each alternative."""
    report = found.get("report") or {}
    told = [f"asked because: {found['reason']}"] if found.get("reason") not in (None, "", "asked for") else []
    if found.get("state") != "finished":
        told.append(tables.progress(found))
    elif found.get("finished_at"):
        took = f"took {tables.age(found['finished_at'] - found['requested_at'])}"
        told.append(f"{took}, {short(report['cpu_s'])} s of CPU" if report.get("cpu_s") else took)
    if found.get("worker"):
        told.append(f"{'is' if found.get('state') == 'building' else 'was'} built by {found['worker']}, attempt {found.get('attempt', 1)}")
    told += [str(report["canary"])] if report.get("canary") else []
    lines = "\n".join(clean(line) for line in told)
    return "\n\n".join(part for part in (tables.jobs([found]), lines, tables.job_report(report), left_to_a_person(found)) if part)


def left_to_a_person(found: JSON) -> str:
    """What to do with what a job built and did not promote."""
    version, report = f"{found.get('model')}:{found.get('candidate')}", found.get("report") or {}
    if not found.get("candidate") or found.get("outcome") not in {"kept", "inconclusive"}:
        return ""
    if report.get("tune") and found["candidate"] not in {one.get("version") for one in report.get("verdicts") or ()}:
        return _settings_left(str(found.get("model")), report.get("settings") or {})
    if found["outcome"] == "kept":
        return f"{version} waits for a person: hone promote {version}"
    return f"{version} is undecided: hone verify {version} judges it anew, hone promote {version} --force takes it as it is"


def _settings_left(model: str, settings: JSON) -> str:
    """What was measured for the version that serves: its settings wait, no version does."""
    if not settings:
        return f"the settings stay as they are; measure them anew on a quieter host: hone optimize {model} --with tune"
    changes = " ".join(f"{name}={value}" for name, value in settings.items() if isinstance(value, int))
    return f"the settings wait for a person: hone settings {model} {changes}"


def _service(found: JSON) -> str:
    host = found.get("host") or {}
    ready = "ready" if found.get("ready") else "not ready"
    where = [
        f"{name} {host[key]}" for name, key in (("journal", "store"), ("models in", "repository"), ("state in", "state")) if host.get(key)
    ]
    return " · ".join([f"hone {found.get('version')}", ready, f"up {tables.age(found.get('uptime_s') or 0)}", *_replica(host), *where])


def _replica(host: JSON) -> Iterator[str]:
    """Which of several servers this is, as the timeline names it, and whether it is the one that decides."""
    if host.get("store") == "redis":
        yield f"replica {host.get('replica')} at {host.get('server')}, {'which decides' if host.get('decides') else 'another decides'}"


def _host(host: JSON) -> str:
    now = host.get("now") or {}
    parts = [f"host {host.get('host_class')}", f"{host.get('cores')} cores", f"{tables.size(host.get('memory_bytes'))} for models"]
    if now.get("busy_ratio") is not None:
        others = f" ({now['others_ratio']:.0%} by other programs)" if now.get("others_ratio") is not None else ""
        parts.append(f"busy {now['busy_ratio']:.0%}{others}")
    for name, key in (("steal", "steal_ratio"), ("throttled", "throttled_ratio"), ("memory pressure", "memory_pressure")):
        if (now.get(key) or 0) >= 0.01:
            parts.append(f"{name} {now[key]:.0%}")
    return " · ".join(parts)


def _workers(found: JSON) -> Iterator[str]:
    """A line each, the methods counted: `hone status --json` names them."""
    for worker in found.get("workers") or ():
        yield f"worker {worker.get('name')} · {worker.get('job') or 'idle'} · {len(worker.get('methods') or ())} methods"
    if not found.get("workers"):
        yield "no worker: nothing is built; start one with `hone worker`"


def _troubles(found: JSON) -> Iterator[str]:
    if found.get("frozen"):
        yield f"FROZEN: nothing changes but by rollback, until `hone unfreeze`; {found.get('frozen_because') or 'asked for'}"
    for name in ("store", "repository"):
        if found.get(f"{name}_error"):
            yield f"{name}: {found[f'{name}_error']}"
    yield from (f"warning: {text}" for text in found.get("warnings") or ())


def _standing(found: JSON) -> Iterator[str]:
    """What of the state is not as usual."""
    if found.get("previous"):
        yield f"rollback goes back to {found['previous']}"
    if found.get("stepped_down_to"):
        yield f"under load {found['stepped_down_to']} answers in its place"
    elif rungs := [rung for rung in found.get("rungs") or () if rung != found.get("active")]:
        yield f"under load {' then '.join(rungs)} may answer in its place"
    if found.get("split"):
        yield _split(found["split"])
    yield from (f"version {version} failed: {why}" for version, why in (found.get("failed") or {}).items())
    if found.get("captured"):
        yield f"{found['captured']} live inputs are kept"


def _split(split: JSON) -> str:
    share = split.get("share") or 0.0
    does = f"answers {100 * share:.3g}% of the requests" if share else "is asked again what others answered"
    return f"traffic is split: version {split.get('version')} {does} ({split.get('stage')}, since {tables.clock(split.get('since'))})"


def _loaded(rows: list[JSON]) -> str:
    return tables.table(
        rows,
        [
            ("LOADED", lambda r: r.get("version")),
            ("STATE", lambda r: r.get("state") if r.get("alive") else f"{r.get('state')}, no process"),
            ("GENERATION", lambda r: r.get("generation")),
            ("PID", lambda r: r.get("pid")),
            ("WAITING", lambda r: r.get("queued")),
            ("RUNNING", lambda r: r.get("inflight")),
            ("MEMORY", lambda r: tables.size(r.get("memory_bytes"))),
            ("BATCHES", lambda r: r.get("batching")),
            ("NOTES", lambda r: "; ".join(r.get("notes") or ())),
        ],
    )
