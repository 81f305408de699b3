"""Who may do what on the admin side: bearer tokens, compared in constant time. Closed by default; tokens never reach a log."""

from __future__ import annotations

import os
import secrets
from enum import StrEnum
from pathlib import Path

from starlette.requests import HTTPConnection

from app.bearer import bears
from app.catalog.durable import storage_errors
from app.errors import NotAllowed, NotFound, Unauthorized
from app.settings import Settings


class Role(StrEnum):
    ADMIN = "admin"
    VIEWER = "viewer"


class Guard:
    """Knows the tokens and which role a request has."""

    def __init__(self, admin_token: str, viewer_token: str = "", feedback_token: str = "") -> None:
        self._admin, self._viewer, self._feedback = admin_token, viewer_token, feedback_token

    @classmethod
    def from_settings(cls, settings: Settings) -> Guard:
        return cls(settings.admin_token or token_file(settings.state), settings.viewer_token, settings.feedback_token)

    def role(self, request: HTTPConnection) -> Role | None:
        given = _authorization(request)
        is_admin, is_viewer = bears(given, self._admin), bears(given, self._viewer)
        return Role.ADMIN if is_admin else Role.VIEWER if is_viewer else None

    def may_read(self, request: HTTPConnection) -> Role:
        role = self.role(request)
        if role is None:
            raise Unauthorized(
                "this needs a bearer token: Authorization: Bearer … (HONE_ADMIN_TOKEN, or the file admin-token in the state folder)"
            )
        return role

    def may_label(self, request: HTTPConnection) -> None:
        """Raises Unauthorized without the feedback token, NotFound where the operator set none."""
        if not self._feedback:
            raise NotFound("this server takes no labels: its operator has set no HONE_FEEDBACK_TOKEN")
        if not bears(_authorization(request), self._feedback):
            raise Unauthorized("labels need the feedback token: Authorization: Bearer … (HONE_FEEDBACK_TOKEN)")

    def may_change(self, request: HTTPConnection) -> str:
        """The actor to record, or Unauthorized / NotAllowed."""
        if self.may_read(request) is not Role.ADMIN:
            raise NotAllowed("the viewer token only reads; changing state needs the admin token")
        name = request.headers.get("x-hone-actor", "")
        return f"admin:{name[:64]}" if name.isprintable() and name else "admin"


def _authorization(request: HTTPConnection) -> str:
    return request.headers.get("authorization", "")


def token_file(state: Path) -> str:
    """The admin token of this state folder; made at first start in a file that only its owner can read. Raises InsufficientStorage or NotAllowed."""
    with storage_errors("the admin token", state):
        return _token_in(state / "admin-token")


def _token_in(path: Path) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    except FileExistsError:
        token = path.read_text().strip()
        if token:
            return token
        descriptor = os.open(path, os.O_WRONLY | os.O_TRUNC)
    token = secrets.token_urlsafe(32)
    with os.fdopen(descriptor, "w") as file:
        file.write(token + "\n")
    return token
