"""`hone backup` and `hone restore`: journal, cards, proofs, references, built versions and the repository's models as one tar file.

What is private or a secret stays out: captured inputs, tokens. A restore makes the backup's state the state from now on (a new epoch, the loop
frozen), and never writes over a file that differs unless told to. Both work on files and store, with or without a running server.
"""

from __future__ import annotations

import errno
import hashlib
import os
import tarfile
import tempfile
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath
from typing import IO, Final

from app.catalog import durable
from app.catalog.model_files import LinkPolicy, links_within, open_regular
from app.catalog.state_folder import StateFolder
from app.domain import JSON, State
from app.errors import Conflict, HoneError, InvalidRequest, ModelRejected
from app.settings import Settings
from app.store import backups, last_state
from app.store.open import open_journal

JOURNAL: Final = "journal.jsonl"
LAST_STATE: Final = "last-state.json"
MODELS: Final = "state/models"
REPOSITORY: Final = "repository"
_LEFT_OUT: Final = frozenset({".lock", "__pycache__"})
_BLOCK: Final = 1 << 20
RESTORING: Final = "restoring a backup"
Say = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Piece:
    """One file of a backup: its name there, and where it lies here."""

    name: str
    path: Path


def backup(settings: Settings, target: Path, say: Say) -> JSON:
    """Write `target`, whole or not at all, readable for its owner alone. Raises HoneError or OSError."""
    if target.is_dir():
        raise InvalidRequest(f"{target} is a folder; name the file to write, such as {target / 'hone.tar'}")
    if not target.absolute().parent.is_dir():
        raise InvalidRequest(f"{target.absolute().parent} does not exist; create it, or write the backup elsewhere")
    if not settings.store and not Path(settings.journal).exists():
        raise InvalidRequest(f"there is no journal in {settings.state}; name the server's folder with --state, or its store with --store")
    notes: list[str] = []
    with tempfile.TemporaryDirectory(prefix="hone-backup-") as name, durable.storage_errors("writing a backup", target.parent):
        journal = open_journal(settings.journal)
        try:
            journal.backup(Path(name) / JOURNAL)
        finally:
            journal.close()
        pieces = [Piece(JOURNAL, Path(name) / JOURNAL), *_pieces(settings, notes)]
        size = sum(_size(piece.path) for piece in pieces)
        durable.require_space(target.parent, size, "writing a backup")
        say(f"{len(pieces)} files, {size / 1e6:.1f} MB")
        with durable.temporary_folder(target.absolute().parent, 0o700) as folder:
            written = _write(folder / "tar", pieces, notes)
            os.replace(folder / "tar", target)
            durable.sync_folder(target.absolute().parent)
    return {"path": str(target), "files": written, "bytes": size, "notes": notes}


def restore(settings: Settings, source: Path, overwrite: bool, say: Say) -> JSON:
    """Put files back, then the journal. Raises InvalidRequest for what is no whole backup, Conflict where files differ, InsufficientStorage or
    NotAllowed where a folder cannot take them: nothing was changed then, or the text says how far it came."""
    state = StateFolder(settings.state).prepare()
    with durable.temporary_folder(state.root, 0o700) as folder:
        durable.require_space(folder, source.stat().st_size, RESTORING)
        names = _unpack(source, folder)
        _above(folder / JOURNAL, last_state.load(memory := state.root / LAST_STATE))
        places = {name: _place(settings, state, name) for name in names if name != JOURNAL}
        differing = [str(place) for name, place in places.items() if place.exists() and not _same(folder / name, place)]
        if differing and not overwrite:
            more = f" and {len(differing) - 3} more" if len(differing) > 3 else ""
            raise Conflict(
                f"{', '.join(differing[:3])}{more} differ from the backup; move them away, or say --overwrite. Nothing was changed"
            )
        _put_all(folder, {name: place for name, place in places.items() if not place.exists() or str(place) in differing})
        say(f"{len(places)} files in place")
        journal = open_journal(settings.journal)
        try:
            after = journal.restore(folder / JOURNAL)
        finally:
            journal.close()
        last_state.save(memory, after)
    return {
        "models": sorted(after.models),
        "files": len(places),
        "overwritten": differing if overwrite else [],
        "epoch": after.epoch,
        "frozen": after.frozen,
    }


# ---- what belongs to it


def _pieces(settings: Settings, notes: list[str]) -> Iterator[Piece]:
    roots = ((MODELS, StateFolder(settings.state).models, ()), (REPOSITORY, settings.repository, tuple(settings.allowed_roots)))
    for prefix, root, allowed in roots:
        if root.is_dir():
            policy = links_within(root, *allowed)
            for path, real in _files(root, policy, notes):
                inside = path.relative_to(root)
                if prefix == REPOSITORY or inside.parts[1:2] != ("captured",):
                    yield Piece(f"{prefix}/{inside}", real)


def _files(root: Path, policy: LinkPolicy, notes: list[str]) -> Iterator[tuple[Path, Path]]:
    """Every regular file below `root` as (where it is seen, where it lies); links that lead elsewhere are told of and left out."""
    stack = [(root, frozenset({root.resolve()}))]
    while stack:
        folder, above = stack.pop()
        for path in _inside(folder):
            if path.name in _LEFT_OUT or path.name.startswith(durable.TEMPORARY):
                continue
            try:
                real = policy.resolve(path)
            except HoneError as error:
                notes.append(f"left out: {error}")
                continue
            if real.is_dir() and real not in above:  # a link may lead back up, and two may lead to one folder
                stack.append((path, above | {real}))
            elif real.is_file():
                yield path, real


def _inside(folder: Path) -> list[Path]:
    """Nothing where a running server removed the folder since it was seen."""
    with suppress(FileNotFoundError):
        return sorted(folder.iterdir())
    return []


def _size(path: Path) -> int:
    with suppress(FileNotFoundError):
        return path.stat().st_size
    return 0


def _write(target: Path, pieces: list[Piece], notes: list[str]) -> int:
    """How many there are in it: a running server may remove a version that nobody needs in the middle of this."""
    written = 0
    with target.open("xb") as file:
        os.fchmod(file.fileno(), 0o600)
        with tarfile.open(fileobj=file, mode="w", format=tarfile.PAX_FORMAT) as tar:
            for piece in pieces:
                try:
                    descriptor = open_regular(piece.path)
                except ModelRejected:
                    if piece.path.exists():
                        raise
                    notes.append(f"left out: {piece.name} was removed meanwhile")
                    continue
                with open(descriptor, "rb") as content:
                    entry = tarfile.TarInfo(piece.name)
                    entry.size, entry.mode = os.fstat(content.fileno()).st_size, 0o600 if piece.name.startswith("state/") else 0o644
                    tar.addfile(entry, content)
                written += 1
        file.flush()
        os.fsync(file.fileno())
    return written


# ---- putting it back


def _above(journal: Path, remembered: State | None) -> None:
    """Let the epoch of what is restored lie above the one that a server remembers beside an emptied store: else it would put that back."""
    backup = backups.read(journal)
    if remembered is not None and remembered.epoch > backup.state.epoch:
        backups.write(journal, replace(backup.state, epoch=remembered.epoch), backup.events)


def _unpack(source: Path, folder: Path) -> list[str]:
    """Regular files with plain names alone, each into its place below `folder`; whoever made the file is not trusted."""
    names: list[str] = []
    try:
        with tarfile.open(source, "r:") as tar:
            for entry in tar:
                _check(entry)
                content = tar.extractfile(entry)
                assert content is not None
                place = folder / entry.name
                place.parent.mkdir(parents=True, exist_ok=True)
                with place.open("xb") as file:
                    _pour(content, file)
                    file.flush()
                    os.fsync(file.fileno())
                place.chmod(entry.mode & 0o644)
                names.append(entry.name)
    except (tarfile.TarError, EOFError, FileExistsError) as error:
        raise InvalidRequest(f"{source} is not a whole backup ({error}); make one with: hone backup FILE") from None
    if JOURNAL not in names:
        raise InvalidRequest(f"{source} holds no {JOURNAL}, so it is no backup; make one with: hone backup FILE")
    return names


def _check(entry: tarfile.TarInfo) -> None:
    path = PurePosixPath(entry.name)
    known = entry.name == JOURNAL or path.parts[:2] == ("state", "models") or path.parts[:1] == (REPOSITORY,)
    plain = not path.is_absolute() and ".." not in path.parts and "\0" not in entry.name and str(path) == entry.name
    if not entry.isreg() or not known or not plain:
        raise InvalidRequest(f"the backup holds {entry.name!r}, which none that Hone makes does; it is not restored")


def _place(settings: Settings, state: StateFolder, name: str) -> Path:
    path = PurePosixPath(name)
    return state.models.joinpath(*path.parts[2:]) if path.parts[0] == "state" else settings.repository.joinpath(*path.parts[1:])


def _same(one: Path, other: Path) -> bool:
    return one.stat().st_size == other.stat().st_size and _digest(one) == _digest(other)


def _digest(path: Path) -> bytes:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").digest()


def _put_all(folder: Path, places: dict[str, Path]) -> None:
    """Move files from `folder` to their places, once all of them can be taken there."""
    _require_places(folder, places)
    for done, (name, place) in enumerate(places.items()):
        far = f"{done} of {len(places)} files were put back, the journal was not; restore again when this is mended"
        try:
            with durable.storage_errors(RESTORING, place.parent, far):
                durable.make_folder(place.parent)
                if not _moved(folder / name, place):
                    _copy(folder / name, place)
        except OSError as error:
            raise OSError(error.errno, f"{error.strerror}; {far}", str(place)) from error
    for parent in {place.parent for place in places.values()}:
        durable.sync_folder(parent)


def _require_places(folder: Path, places: dict[str, Path]) -> None:
    """Raise while nothing is changed where a folder cannot be written, or lacks room for what must be copied to it."""
    sizes: dict[Path, int] = {}
    for name, place in places.items():
        there = next(parent for parent in place.parents if parent.exists())
        sizes[there] = sizes.get(there, 0) + (folder / name).stat().st_size
    copied: dict[int, tuple[Path, int]] = {}
    for there, size in sizes.items():
        with durable.storage_errors(RESTORING, there), durable.temporary_folder(there, 0o700) as probe:
            (folder / "probe").touch()
            if not _moved(folder / "probe", probe / "probe"):
                disk = there.stat().st_dev
                copied[disk] = there, size + (copied[disk][1] if disk in copied else 0)
    for there, size in copied.values():
        durable.require_space(there, size, RESTORING)


def _moved(source: Path, place: Path) -> bool:
    """False where that takes a copy: another disk, or another mount of the same one."""
    try:
        os.replace(source, place)
    except OSError as error:
        if error.errno != errno.EXDEV:
            raise
        return False
    return True


def _copy(source: Path, place: Path) -> None:
    with durable.temporary_folder(place.parent, 0o700) as folder:
        with source.open("rb") as content, (folder / "file").open("xb") as file:
            _pour(content, file)
            os.fchmod(file.fileno(), source.stat().st_mode & 0o777)
            os.fsync(file.fileno())
        os.replace(folder / "file", place)


def _pour(source: IO[bytes], target: IO[bytes]) -> None:
    while block := source.read(_BLOCK):
        target.write(block)
