"""What a process remembers by itself: the last state it folded, in a file of its own, for when the store is away or lost.

It knows nothing of stores. A damaged or unreadable file is as good as none.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Final

from app.domain import State
from app.store.codec import dumps, loads, state_from_json
from app.store.durable import write_durably

FORMAT: Final = 1


def save(path: Path, state: State) -> None:
    """Keep `state` (fsync and rename; a crash leaves the former file whole). Raises OSError."""
    body = dumps(state)
    write_durably(path, [dumps({"format": FORMAT, "sha256": hashlib.sha256(body.encode()).hexdigest()}) + "\n", body + "\n"])


def load(path: Path) -> State | None:
    """The state that was kept; None where there is no file, or none that can be trusted."""
    try:
        header, body = path.read_text(encoding="utf-8").rstrip("\n").split("\n")
        said = loads(header)
        if said["format"] != FORMAT or said["sha256"] != hashlib.sha256(body.encode()).hexdigest():
            return None
        return state_from_json(loads(body))
    except (OSError, ValueError, KeyError, TypeError):
        return None
