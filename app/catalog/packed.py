"""Models that lie packed in the repository (model.onnx.packed, optimizers.packed): unpacked once into the state folder, held to a hash at each use.

It runs nothing: whoever needs the file runs the task `unpack` into `room`, and gives the result to `take`.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from app.catalog import durable
from app.catalog.model_files import FileHashes, ModelFile
from app.errors import ModelRejected

PACKED_NAME: Final = "model.onnx.packed"


@dataclass(frozen=True)
class Unpacked:
    """The folder of unpacked files, PACKED.UNPACKED.onnx: the SHA-256 of the packed file and of the one that came out of it."""

    folder: Path
    hashes: FileHashes

    def find(self, packed: ModelFile) -> Path | None:
        """The file that was unpacked from `packed`, if it is there and still has its hash; one that has not is removed."""
        for path in self.folder.glob(f"{self.hashes.of(packed.path)}.*.onnx"):
            try:
                if self.hashes.of(path) == path.name.split(".")[1]:
                    return path
            except ModelRejected:
                pass
            path.unlink(missing_ok=True)
        return None

    @contextmanager
    def room(self) -> Iterator[Path]:
        """A temporary folder for the task's file. Raises InsufficientStorage or NotAllowed."""
        with durable.storage_errors("unpacking a model", self.folder):
            durable.make_folder(self.folder, 0o700)
            durable.sweep(self.folder)
            with durable.temporary_folder(self.folder, 0o700) as folder:
                yield folder

    def take(self, packed: ModelFile, result: Mapping[str, Any]) -> Path:
        """Give the finished file its name."""
        target = self.folder / f"{self.hashes.of(packed.path)}.{result['sha256']}.onnx"
        os.replace(str(result["path"]), target)
        durable.sync_folder(self.folder)
        return target

    def keep_only(self, packed: Iterable[ModelFile]) -> None:
        """Remove what was unpacked from files that are in the repository no more; sessions that are open keep theirs."""
        wanted = {self.hashes.of(file.path) for file in packed}
        for path in self.folder.glob("*.*.onnx"):
            if path.name.split(".")[0] not in wanted:
                path.unlink(missing_ok=True)
