"""What a model may be called. The rule keeps names whole in URLs, in paths and on command lines."""

from __future__ import annotations

import re
from typing import Final

from app.errors import InvalidRequest

RESERVED: Final = frozenset({"versions", "stats", "ready", "infer", "config", "load", "unload", "index", "jobs", "timeline"})
RULE: Final = (
    "a name has 1 to 128 of the characters A-Z a-z 0-9 _ . - and begins with a letter, a digit or _; "
    f"reserved: {', '.join(sorted(RESERVED))} (example: resnet18_v2.1-int8)"
)
_NAME: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,127}")


def is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and text.lower() not in RESERVED


def check_name(text: str) -> str:
    """`text`, if a model may have that name. Raises InvalidRequest with the rule and an example."""
    if not is_name(text):
        raise InvalidRequest(f"{printable(text)} cannot be a model's name: {RULE}")
    return text


def printable(text: str) -> str:
    """`text` quoted, in ASCII and of bounded length, whatever bytes a file name had."""
    shown = ascii(text)
    return shown if len(shown) <= 100 else f"{shown[:97]}..."
