"""What the sub-commands that talk to a server do: ask through app.client, print through app.tables. Returns exit statuses."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Final

from app import overview, tables
from app.arguments import files_to_deploy, is_protocol, named, request_body, settings_of, steps_of
from app.client import Address, Client, ClientError
from app.domain import Verdict
from app.settings import Settings

FAILED, NO_VERSION = 1, 3
POLL_S: Final = 0.5
TIMEOUT_S: Final = 180.0
"""Promoting answers when the version serves; the server itself waits up to two minutes for that."""
HEALTH_TIMEOUT_S: Final = 5.0
AWAY: Final = frozenset({0, 502, 503, 504})
"""Statuses of a server that is not there (0: no answer came), or not yet."""
WON: Final = frozenset({"promoted", "kept", "proven"})


def status(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        if arguments.health:
            return _health(arguments, client)
        if arguments.model:
            return _show(arguments, client.model(arguments.model), overview.model)
        return _show(arguments, client.status(), overview.server)


def versions(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        return _show(arguments, client.versions(arguments.model), lambda found: tables.versions(found["versions"]))


def explain(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        return _show(arguments, client.explain(arguments.model), tables.explanation)


def timeline(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        events = client.timeline(arguments.model, limit=arguments.limit)["events"]
        for event in events:
            _print_event(arguments, event)
        if arguments.model and not events:
            print(f"nothing has happened with {arguments.model!r}; hone status lists the models", file=sys.stderr)
        if arguments.follow:
            last = events[-1]["seq"] if events else 0
            for event in _following(client, arguments.model, last):
                _print_event(arguments, event)
    return 0


def infer(arguments: argparse.Namespace) -> int:
    model, version = named(arguments.model)
    body, kind = request_body(arguments.file)
    with _client(arguments) as client:
        if kind == "application/json" and is_protocol(body):
            return _show(arguments, client.infer(model, body, version), lambda answer: json.dumps(answer, indent=2))
        return _show(arguments, client.predict(model, body, kind, version), _answer_text)


def deploy(arguments: argparse.Namespace) -> int:
    name, files = files_to_deploy(Path(arguments.path), arguments.name, arguments.config)
    with _client(arguments) as client:
        return _show(arguments, client.deploy(name, files), tables.fields_of)


def remove(arguments: argparse.Namespace) -> int:
    model, version = named(arguments.model)
    with _client(arguments) as client:
        return _show(arguments, client.remove(model, version), tables.fields_of)


def settings(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        if not arguments.changes:
            return _show(arguments, client.model(arguments.model)["settings"], tables.fields_of)
        return _show(arguments, client.change_settings(arguments.model, settings_of(arguments.changes)), overview.model)


def mode(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        return _show(arguments, client.set_mode(arguments.model, arguments.mode), tables.fields_of)


def ladder(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        if not arguments.rungs:
            return _show(arguments, {"model": arguments.model, "rungs": client.model(arguments.model)["rungs"]}, tables.ladder)
        rungs = [] if arguments.rungs == ["none"] else arguments.rungs
        return _show(arguments, client.set_ladder(arguments.model, rungs), tables.ladder)


def capture(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        return _show(arguments, client.clear_capture(arguments.model), tables.fields_of)


def freeze(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        return _show(arguments, client.freeze(True), tables.fields_of)


def unfreeze(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        return _show(arguments, client.freeze(False), tables.fields_of)


def promote(arguments: argparse.Namespace) -> int:
    model, version = named(arguments.model)
    if version and arguments.version and version != arguments.version:
        raise ClientError(f"{version} or {arguments.version}? name one version to promote")
    version = version or arguments.version or ""
    if not version:
        raise ClientError(f"which version of {model}? `hone versions {model}` lists them; then: hone promote {model} VERSION")
    with _client(arguments) as client:
        return _show(arguments, client.promote(model, version, arguments.reason, arguments.force), overview.model)


def rollback(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        return _show(arguments, client.rollback(arguments.model, arguments.reason), overview.model)


def verify(arguments: argparse.Namespace) -> int:
    model, version = named(arguments.model)
    if arguments.here:
        from app.control.prove import prove_here

        found = prove_here(_local_settings(arguments), model, version)
        return _show(arguments, found, tables.fields_of) or (0 if found["verdict"] == Verdict.PASSED else FAILED)
    with _client(arguments) as client:
        return _show(arguments, client.verify(model, version, arguments.reason), overview.job)


def _local_settings(arguments: argparse.Namespace) -> Settings:
    """Settings of the server whose folders are worked on directly."""
    folders = {name: Path(value) if (value := getattr(arguments, name)) else None for name in ("repository", "state")}
    return Settings.from_env(os.environ, **folders)


def load(arguments: argparse.Namespace) -> int:
    model, version = named(arguments.model)
    if not version:
        raise ClientError(f"which version of {model}? hone load {model}:VERSION")
    with _client(arguments) as client:
        return _show(arguments, client.load(model, version), overview.loaded)


def jobs(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        if arguments.job:
            return _show(arguments, client.job(arguments.job), overview.job)
        return _show(
            arguments, client.jobs(open_only=arguments.open), lambda found: tables.jobs(found["jobs"]) if found["jobs"] else "no jobs"
        )


def cancel(arguments: argparse.Namespace) -> int:
    with _client(arguments) as client:
        return _show(arguments, client.cancel(arguments.job), overview.job)


def optimize(arguments: argparse.Namespace) -> int:
    if arguments.recipe is not None and arguments.tries:
        raise ClientError("give either --with (one recipe) or --try (alternatives), not both")
    tries = [steps_of(text) for text in arguments.tries or ([arguments.recipe] if arguments.recipe is not None else [])]
    with _client(arguments) as client:
        job = client.optimize(arguments.model, tries or None, arguments.reason, arguments.promote, arguments.target)
        if not arguments.wait:
            return _show(arguments, job, lambda found: f"job {found['id']} is asked for; follow it with: hone jobs {found['id']}")
        try:
            return _show(arguments, job := _finished(client, job, quiet=arguments.json), _outcome) or (
                0 if job["outcome"] in WON else NO_VERSION
            )
        except KeyboardInterrupt:
            print(f"the job goes on; cancel it with: hone cancel {job['id']}", file=sys.stderr)
            raise


def _client(arguments: argparse.Namespace) -> Client:
    address = Address.from_env(os.environ, arguments.url, arguments.token, arguments.state)
    return Client(address, arguments.timeout or (HEALTH_TIMEOUT_S if getattr(arguments, "health", None) else TIMEOUT_S))


def _show(arguments: argparse.Namespace, found: Any, as_text: Callable[[Any], str]) -> int:
    print(json.dumps(found, indent=2) if arguments.json else as_text(found))
    return 0


def _health(arguments: argparse.Namespace, client: Client) -> int:
    """One line and 0 or 1, whatever happens."""
    is_live = is_ready = False
    trouble = ""
    try:
        is_live, is_ready = client.live(), client.ready()
    except ClientError as error:
        trouble = str(error)
    if arguments.json:
        print(json.dumps({"live": is_live, "ready": is_ready} | ({"error": trouble} if trouble else {})))
    else:
        said = "ready" if is_ready else "live, but not ready" if is_live else "not live"
        print(f"{said}: {trouble}" if trouble else said)
    return 0 if (is_ready if arguments.health == "ready" else is_live) else FAILED


def _answer_text(answer: dict[str, Any]) -> str:
    predictions = answer.get("predictions")
    if not isinstance(predictions, list) or not predictions or not all(isinstance(row, dict) for row in predictions):
        return json.dumps(answer, indent=2)
    names = list(predictions[0])
    return tables.table(predictions, [(name.upper(), lambda row, name=name: row.get(name)) for name in names])  # type: ignore[misc]


def _print_event(arguments: argparse.Namespace, event: dict[str, Any]) -> None:
    print(json.dumps(event) if arguments.json else tables.event_line(event), flush=True)


def _following(client: Client, model: str, after: int) -> Iterator[dict[str, Any]]:
    """Events until you leave; a broken stream is taken up where it ended, also after the server was started again."""
    told = False
    while True:
        try:
            for event in client.follow(model, after):
                after, told = event["seq"], False
                yield event
        except ClientError as error:
            if error.status not in AWAY:
                raise
            if not told:
                print(f"{error}; trying again", file=sys.stderr, flush=True)
            told = True
        time.sleep(POLL_S)


def _finished(client: Client, job: dict[str, Any], quiet: bool) -> dict[str, Any]:
    """The job once it has ended, one line for each step on the way."""
    shown = ""
    while True:
        line = tables.progress(job)
        if line != shown and not quiet:
            print(f"{tables.clock(time.time())}  {line}", flush=True)
            shown = line
        if job["state"] == "finished":
            return job
        time.sleep(POLL_S)
        job = client.job(job["id"])


def _outcome(job: dict[str, Any]) -> str:
    report = job.get("report") or {}
    text = f"{job['outcome']}" + (f": version {job['candidate']}" if job.get("candidate") else "")
    return "\n".join(part for part in (text, tables.job_report(report), overview.left_to_a_person(job)) if part)
