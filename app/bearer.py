"""Bearer tokens: taken out of a header, compared in constant time. Nobody bears a token that is not set."""

from __future__ import annotations

import hmac


def bears(header: str, token: str) -> bool:
    """Whether `header`, the value of Authorization, carries `token`."""
    scheme, _, given = header.partition(" ")
    same = hmac.compare_digest(given.strip().encode(), token.encode())
    return same and bool(token) and scheme.lower() == "bearer"
