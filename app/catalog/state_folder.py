"""Where things lie in Hone's state folder; the one place that spells its paths. Knows nothing of what stands in the files."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from app.catalog import durable
from app.errors import InvalidRequest, NotAllowed

BUILT_VERSION: Final = re.compile(r"([1-9][0-9]*)\.([1-9][0-9]*)")
GOLDEN_VERSION: Final = re.compile(r"[1-9][0-9]*")
_HOST_CLASS: Final = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.+,=-]{0,199}")


@dataclass(frozen=True)
class StateFolder:
    """STATE of the contract: models/NAME/{1,1.2,reference,captured}, staging, scratch, checkpoints, journal.db, admin-token, last-state.json, host-class, at-work-*, unpacked."""

    root: Path

    def prepare(self) -> StateFolder:
        """Create what is missing, and remove what dead processes left. Raises NotAllowed or InsufficientStorage."""
        try:
            with durable.storage_errors("preparing the state folder", self.root):
                durable.make_folder(self.root, 0o700)
                for folder in (self.models, self.staging, self.scratch):
                    durable.make_folder(folder, 0o700)
                self.sweep()
        except OSError as error:
            raise NotAllowed(f"{self.root} cannot be the state folder: {error.strerror}; name another with --state or HONE_STATE") from None
        return self

    def sweep(self) -> int:
        """Remove temporary files and folders of dead processes everywhere; returns how many."""
        folders = [self.root, self.models, self.staging, self.scratch]
        for model in self.model_folders():
            inner = [path for path in model.iterdir() if not path.name.startswith(durable.TEMPORARY)]
            folders += [model, *inner, *(path / "proofs" for path in inner if is_version(path.name))]
        return sum(durable.sweep(folder) for folder in folders)

    def moved_from(self, host_class: str) -> str:
        """The class of hosts that was served on from this folder until now; '' where it is the same, or not known. The next start is told of this one."""
        path = self.root / "host-class"
        try:
            before = path.read_text() if path.is_file() else ""
            if before != host_class:
                durable.write_file(path, host_class.encode())
        except (OSError, UnicodeDecodeError):
            return ""  # a note for the loop, and no reason not to serve
        return before if before != host_class and _HOST_CLASS.fullmatch(before) else ""

    @property
    def models(self) -> Path:
        return self.root / "models"

    @property
    def staging(self) -> Path:
        """Uploads before they are checked and deployed."""
        return self.root / "staging"

    @property
    def scratch(self) -> Path:
        """Where jobs build; on the same file system as `models`, so that publishing is a rename."""
        return self.root / "scratch"

    @property
    def checkpoints(self) -> Path:
        """JOB/TRY: trainings of jobs that are not built yet, so that the next attempt goes on where a killed one was."""
        return self.root / "checkpoints"

    @property
    def unpacked(self) -> Path:
        """Models that lie packed in the repository, as sessions open them."""
        return self.root / "unpacked"

    def model(self, name: str) -> Path:
        return self.models / name

    def model_folders(self) -> Iterator[Path]:
        if self.models.is_dir():
            yield from sorted(p for p in self.models.iterdir() if p.is_dir() and not p.name.startswith("."))

    def version(self, name: str, version: str) -> Path:
        """Raises InvalidRequest for what is no version name, so that no name reaches a path elsewhere."""
        if not is_version(version):
            raise InvalidRequest(f"{version!r} is no version; versions are numbers such as 1 (deployed) or 1.2 (built)")
        return self.model(name) / version

    def card(self, name: str, version: str) -> Path:
        return self.version(name, version) / "card.json"

    def proofs(self, name: str, version: str) -> Path:
        return self.version(name, version) / "proofs"

    def proof(self, name: str, version: str, host_class: str) -> Path:
        if not _HOST_CLASS.fullmatch(host_class):
            raise InvalidRequest(f"{host_class!r} is no host class; letters, digits and _ . + , = - are allowed, at most 200")
        return self.proofs(name, version) / f"{host_class}.json"

    def lock(self, name: str) -> Path:
        return self.model(name) / ".lock"

    def reference(self, name: str) -> Path:
        return self.model(name) / "reference"

    def spent(self, name: str) -> Path:
        """Hashes of what calibrated or trained."""
        return self.model(name) / "spent"

    def captured(self, name: str) -> Path:
        return self.model(name) / "captured"


def is_version(text: str) -> bool:
    return bool(GOLDEN_VERSION.fullmatch(text) or BUILT_VERSION.fullmatch(text))
