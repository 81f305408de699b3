"""Text for a terminal or a log, from whoever wrote it: nothing in it moves the cursor, and nothing passes for a line of its own.

Names of tensors and nodes, reasons and errors come out of files and requests.
"""

from __future__ import annotations

import logging
import sys
from typing import Final

_FORMAT: Final = "%(asctime)s %(levelname)-7s %(name)s: %(message)s"


def clean(value: object) -> str:
    """One line."""
    return "".join(letter if letter.isprintable() else " " for letter in str(value))


def clean_lines(text: str) -> str:
    return "\n".join(clean(line) for line in text.expandtabs(4).splitlines())


class _Formatter(logging.Formatter):
    """Lines after an entry's first are indented, so that none passes for a new entry."""

    def format(self, record: logging.LogRecord) -> str:
        return clean_lines(super().format(record)).replace("\n", "\n    ")


def log_to_stderr(level: str) -> None:
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter(_FORMAT))
    logging.basicConfig(level=level.upper(), handlers=[handler])
