"""What the sub-commands do that need no running server: be one, or a worker, or the demo; methods; backups; packed files. Returns exit statuses.

Each imports what it needs when it runs: a server and a worker have little in common.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

from app.plain import clean, clean_lines
from app.settings import Settings


def serve(arguments: argparse.Namespace) -> int:
    _hear_the_end()
    from app.main import run_server

    run_server(_settings(arguments))


def worker(arguments: argparse.Namespace) -> int:
    _hear_the_end()
    from app.control.worker import run_worker

    return run_worker(_settings(arguments)) or 0


def _hear_the_end() -> None:
    """SIGTERM ends what has not begun yet. Process 1 of a container would not notice it otherwise, and to import everything takes a while.

    Not by an exception: raised within an import it was taken for a failure of that import, or came to nothing (as from a callback of the collector).
    """
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))


def demo(arguments: argparse.Namespace) -> int:
    from app.demo import run_broken, run_demo

    cause = vars(arguments).pop("cause")
    return run_broken(_settings(arguments), cause) if cause else run_demo(_settings(arguments))


def backup(arguments: argparse.Namespace) -> int:
    from app.control import backup as backups

    given = vars(arguments)
    file, as_json = Path(given.pop("file")), given.pop("json")
    said = backups.backup(_settings(arguments), file, lambda text: print(clean_lines(text), file=sys.stderr))
    print(
        json.dumps(said)
        if as_json
        else "\n".join([*map(clean, said["notes"]), f"{file}: {said['files']} files, {said['bytes'] / 1e6:.1f} MB"])
    )
    return 0


def restore(arguments: argparse.Namespace) -> int:
    from app.control import backup as backups

    given = vars(arguments)
    file, overwrite, as_json = Path(given.pop("file")), given.pop("overwrite"), given.pop("json")
    said = backups.restore(_settings(arguments), file, overwrite, lambda text: print(clean_lines(text), file=sys.stderr))
    models = ", ".join(said["models"]) or "no model"
    text = f"restored {models} in epoch {said['epoch']}; the loop is frozen: look with hone status, then hone unfreeze"
    print(json.dumps(said) if as_json else text)
    return 0


def pack(arguments: argparse.Namespace) -> int:
    from app.errors import ModelRejected
    from optimizers import packed as packing
    from optimizers.base import Rejected

    try:
        packed = packing.pack(Path(arguments.source), Path(arguments.target))
    except Rejected as error:
        raise ModelRejected(str(error)) from None
    print(
        f"{packed.path}: {packed.bytes / 1e6:.2f} MB of {packed.bytes_before / 1e6:.2f}, {packed.bytes_before / packed.bytes:.1f} x smaller"
    )
    return 0


def methods(arguments: argparse.Namespace) -> int:
    from app import tables
    from app.errors import InvalidRequest
    from optimizers.catalogue import InvalidStep, catalogue, parse_step

    try:
        wanted = parse_step(arguments.method).method if arguments.method is not None else None
    except InvalidStep as error:
        raise InvalidRequest(str(error)) from None
    rows = [
        {key: value for key, value in asdict(entry).items() if key not in ("fields", "search", "outlook")}
        | {"options": [{"option": name, "type": kind, "default": default} for name, (kind, default) in entry.fields.items()]}
        for entry in catalogue()
        if wanted in (None, entry.method)
    ]
    if arguments.json:
        print(json.dumps(rows if wanted is None else rows[0]))
    else:
        print(tables.methods(rows) if wanted is None else tables.method(rows[0]))
    return 0


def _settings(arguments: argparse.Namespace) -> Settings:
    given = {key: value for key, value in vars(arguments).items() if key not in ("run", "command")}
    return Settings.from_env(os.environ, **_as_settings(given))


def _as_settings(given: dict[str, Any]) -> dict[str, Any]:
    return {key: Path(value) if value is not None and key in ("repository", "state") else value for key, value in given.items()}
