"""Texts as anybody may read them: paths of this server are shortened to what lies inside its folders. Knows nothing of who reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path


class Wording:
    """Replaces each of `folders` (its name for people by its path), and leaves what lies below it: /srv/models/m/1 becomes m/1."""

    def __init__(self, folders: Mapping[Path, str]) -> None:
        paths = {str(path): name for path, name in folders.items() if path != Path("/")}
        self._pairs = tuple((path, name) for path, name in sorted(paths.items(), key=lambda pair: len(pair[0]), reverse=True))
        self._bytes = tuple((path.encode(), name.encode()) for path, name in self._pairs)

    @classmethod
    def of(cls, repository: Path, state: Path, others: Iterable[Path] = ()) -> Wording:
        return cls({**dict.fromkeys(others, "an allowed folder"), state: "the state folder", repository: "the repository"})

    def __call__(self, text: str) -> str:
        for path, name in self._pairs:
            if path in text:
                text = text.replace(f"{path}/", "").replace(path, name)
        return text

    def in_json(self, body: bytes) -> bytes:
        """The same within JSON."""
        for path, name in self._bytes:
            if path in body:
                body = body.replace(path + b"/", b"").replace(path, name)
        return body
