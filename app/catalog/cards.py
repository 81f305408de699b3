"""Which versions exist, and what is known of them: cards, weights and proofs in the state folder. All methods block on the disk.

A version is there when its card is: folders appear whole, by rename, and numbers are never given twice. It decides nothing about serving.
"""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Collection
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from app.catalog import durable
from app.catalog.card_facts import (
    MAX_CARD_BYTES,
    BuiltCard,
    Card,
    CardFile,
    Draft,
    Fact,
    GoldenCard,
    Proof,
    RowsProof,
    dump,
    load,
)  # fmt: skip
from app.catalog.model_files import FileHashes, FileLimits, ModelFile, checked_file, copy_regular, links_within, version_files
from app.catalog.state_folder import BUILT_VERSION, GOLDEN_VERSION, StateFolder, is_version
from app.errors import Conflict, InvalidRequest, ModelRejected, NotFound

__all__ = ["BuiltCard", "Card", "CardFile", "Cards", "Draft", "GoldenCard", "Proof", "RowsProof", "card_files"]

CARD: Final = "card.json"


def card_files(files: Collection[ModelFile], hashes: FileHashes) -> tuple[CardFile, ...]:
    """Names, sizes and hashes as a card lists them."""
    return tuple(CardFile(file.name, file.bytes, hashes.of(file.path)) for file in files)


@dataclass(frozen=True)
class Cards:
    """The versions of all models in one state folder; several processes may use it at once."""

    state: StateFolder
    limits: FileLimits = FileLimits()

    # ---- golden
    def golden(self, model: str, version: str) -> GoldenCard | None:
        return self._read(GoldenCard, self.state.card(model, version))

    def write_golden(self, card: GoldenCard) -> GoldenCard:
        """Keep golden's card; the one that is there stays if it tells of the same files. Another golden's card is put aside with its proofs."""
        path = self.state.card(card.model, card.version)
        if not GOLDEN_VERSION.fullmatch(card.version):
            raise InvalidRequest(f"{card.version!r} is no deployed version; those are whole numbers")
        with durable.storage_errors(f"writing the card of {card.model}:{card.version}", path.parent):
            durable.make_folder(path.parent, 0o700)
            with durable.exclusive(self.state.lock(card.model), f"writing the card of {card.model}"):
                known = self.golden(card.model, card.version)
                if known is not None and known.sha256 == card.sha256:
                    return known
                if known is not None:
                    self._put_aside(path.parent, known.sha256)
                card = replace(card, seen_at=card.seen_at or time.time())
                durable.write_file(path, dump(card), 0o600)
        return card

    # ---- built versions
    def built(self, model: str) -> list[BuiltCard]:
        """Every built version with a whole card, the oldest first, weights or not."""
        cards = [self._read(BuiltCard, self.state.card(model, name)) for name in self._built_names(model)]
        return [card for card in cards if card is not None]

    def card(self, model: str, version: str) -> Card:
        """Raises NotFound, or InvalidRequest for what is no version name."""
        found = self._card(model, version)
        if found is None:
            raise NotFound(
                f"nothing is known here of version {version} of {model!r}; hone versions {model} lists what there is, "
                "and what another host built needs its files in this state folder too"
            )
        return found

    def publish(self, model: str, folder: Path, draft: Draft, taken: Collection[str] = ()) -> BuiltCard:
        """Make what lies in `folder` (model.onnx, data beside it) the next version of `draft.golden`; `folder` is gone then.

        The same job and try give the same version again, however often and by whomever this is called, also after a kill at any point.
        `taken` are versions that the journal knows. Raises Conflict when golden changed, ModelRejected, NotAllowed or InsufficientStorage.
        """
        what = f"publishing a version of {model!r}"
        with durable.storage_errors(what, self.state.model(model)):
            durable.make_folder(self.state.model(model), 0o700)
            with durable.exclusive(self.state.lock(model), what):
                card = self._published(model, draft)
                if card is None:
                    self._require_golden(model, draft)
                    card = self._publish_next(model, folder, draft, taken)
        shutil.rmtree(folder, ignore_errors=True)
        return card

    def require_space(self, size_bytes: int) -> None:
        """Raise InsufficientStorage unless twice `size_bytes` is free where jobs build."""
        durable.require_space(self.state.scratch, 2 * size_bytes, "building a version")

    # ---- weights
    def path(self, card: BuiltCard) -> Path:
        """The model file of a built version."""
        return self.state.version(card.model, card.version) / card.files[0].name

    def has_weights(self, card: BuiltCard) -> bool:
        folder = self.state.version(card.model, card.version)
        return all((folder / file.name).is_file() and (folder / file.name).stat().st_size == file.bytes for file in card.files)

    def verify(self, card: BuiltCard) -> None:
        """Read every file and hold it against the card. Raises NotFound when weights were removed, ModelRejected when one differs."""
        if not self.has_weights(card):
            raise NotFound(f"the weights of {card.model}:{card.version} are gone; build it again with: hone optimize {card.model}")
        folder = self.state.version(card.model, card.version)
        verify_files(card, {file.name: folder / file.name for file in card.files})

    def remove_weights(self, model: str, version: str) -> None:
        """Delete a built version's files; card and proofs stay. Whether anybody needs them is for the caller to know."""
        if not BUILT_VERSION.fullmatch(version):
            raise InvalidRequest(f"{version!r} is not a version that Hone built; only those are removed here")
        self.card(model, version)
        folder, what = self.state.version(model, version), f"removing {model}:{version}"
        with durable.storage_errors(what, folder), durable.exclusive(self.state.lock(model), what):
            for path in sorted(folder.iterdir()):
                if path.name not in {CARD, "proofs"} and not path.name.startswith("."):
                    durable.discard(path)

    def prune(self, model: str, keep: Collection[str]) -> list[str]:
        """Remove the weights of every built version that is not in `keep`; returns those removed."""
        gone = [card.version for card in self.built(model) if card.version not in keep and self._holds_files(card)]
        for version in gone:
            self.remove_weights(model, version)
        return gone

    def remove_model(self, model: str) -> None:
        """Delete weights and samples of a model that is gone from the repository, so that no job publishes for it; cards and proofs stay."""
        folder, what = self.state.model(model), f"removing {model!r}"
        if not folder.is_dir():
            return
        with durable.storage_errors(what, folder):
            with durable.exclusive(self.state.lock(model), what):
                for path in [path for path in folder.iterdir() if GOLDEN_VERSION.fullmatch(path.name)]:
                    if (card := self.golden(model, path.name)) is not None:
                        self._put_aside(path, card.sha256)
            self.prune(model, ())
            for samples in (self.state.captured(model), self.state.reference(model), self.state.spent(model)):
                durable.discard(samples)

    # ---- proofs
    def proof(self, card: Card, golden_sha256: str, host_class: str) -> Proof | None:
        """The proof of these very files against this golden on that class of host, if there is a whole one."""
        proof = self._read(Proof, self.state.proof(card.model, card.version, host_class))
        return proof if proof is not None and (proof.sha256, proof.golden_sha256) == (card.sha256, golden_sha256) else None

    def proofs(self, card: Card, golden_sha256: str) -> list[Proof]:
        """All valid proofs of a version, by host class."""
        folder = self.state.proofs(card.model, card.version)
        names = sorted(path.stem for path in folder.glob("*.json")) if folder.is_dir() else []
        found = (self.proof(card, golden_sha256, name) for name in names)
        return [proof for proof in found if proof is not None]

    def write_proof(self, card: Card, proof: Proof) -> Proof:
        """Put `proof` beside the card, in place of an older one for its host class. Raises Conflict when it is about other files."""
        if proof.sha256 != card.sha256:
            raise Conflict(f"the proof tells of {proof.sha256[:12]}, {card.model}:{card.version} is {card.sha256[:12]}; measure again")
        path = self.state.proof(card.model, card.version, proof.host_class)
        proof = replace(proof, measured_at=proof.measured_at or time.time())
        with durable.storage_errors(f"writing a proof of {card.model}:{card.version}", path.parent):
            durable.make_folder(path.parent, 0o700)
            durable.write_file(path, dump(proof), 0o600)
        return proof

    def problems(self, model: str) -> list[str]:
        """What lies in the model's state and cannot be used, for people."""
        names = [path.name for path in self.state.model(model).iterdir() if path.is_dir()] if self.state.model(model).is_dir() else []
        damaged = sorted(name for name in names if is_version(name) and self._card(model, name) is None)
        return [f"{self.state.model(model) / name} has no whole {CARD}; it is not used and may be deleted" for name in damaged]

    # ---- inside
    def _card(self, model: str, version: str) -> Card | None:
        path = self.state.card(model, version)
        return self._read(BuiltCard, path) if BUILT_VERSION.fullmatch(version) else self._read(GoldenCard, path)

    def _built_names(self, model: str) -> list[str]:
        folder = self.state.model(model)
        names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
        return sorted((name for name in names if BUILT_VERSION.fullmatch(name)), key=lambda name: tuple(map(int, name.split("."))))

    def _published(self, model: str, draft: Draft) -> BuiltCard | None:
        same = (card for card in self.built(model) if (card.draft.job, card.draft.try_index) == (draft.job, draft.try_index))
        return next(same, None)

    def _require_golden(self, model: str, draft: Draft) -> None:
        golden = self.golden(model, draft.golden)
        if golden is None or golden.sha256 != draft.golden_sha256:
            now = "was removed" if golden is None else "was replaced"
            raise Conflict(f"job {draft.job} was built from {model}:{draft.golden}, which {now} meanwhile; ask for a new one")

    def _publish_next(self, model: str, folder: Path, draft: Draft, taken: Collection[str]) -> BuiltCard:
        main = "model.onnx" if draft.kind == "onnx" else "model.safetensors"
        files = version_files(folder, main, links_within(folder), self.limits)
        if not files[0].bytes:
            raise ModelRejected(f"{folder / main} is empty; the job wrote no model")
        hashes = FileHashes()
        with durable.temporary_folder(self.state.model(model), 0o700) as version:
            for file in files:
                _place(file.path, version / file.name, self.limits)
            placed = [checked_file(version / file.name, file.name, links_within(version), self.limits) for file in files]
            name = self._next(model, draft.golden, taken)
            card = BuiltCard(model, name, hashes.combined(placed), card_files(placed, hashes), draft, time.time())
            durable.write_file(version / CARD, dump(card), 0o600)
            durable.publish(version, self.state.version(model, name))
        return card

    def _next(self, model: str, golden: str, taken: Collection[str]) -> str:
        used = [*self._built_names(model), *(name for name in taken if BUILT_VERSION.fullmatch(name))]
        return f"{golden}.{1 + max((int(name.split('.')[1]) for name in used if name.split('.')[0] == golden), default=0)}"

    def _put_aside(self, folder: Path, sha256: str) -> None:
        proofs, aside = folder / "proofs", folder / f"proofs-{sha256[:12]}"
        if proofs.is_dir():
            durable.discard(aside)
            proofs.rename(aside)
        (folder / CARD).replace(folder / f"card-{sha256[:12]}.json")
        durable.sync_folder(folder)

    def _holds_files(self, card: BuiltCard) -> bool:
        folder = self.state.version(card.model, card.version)
        return any((folder / file.name).exists() for file in card.files)

    def _read(self, kind: type[Fact], path: Path) -> Fact | None:
        """A whole card or proof; None for one that is absent or damaged, which is the same as not there (see `problems`)."""
        try:
            with path.open("rb") as file:
                return load(kind, file.read(MAX_CARD_BYTES), str(path))
        except (FileNotFoundError, NotADirectoryError, ModelRejected):
            return None


def verify_files(card: Card, paths: dict[str, Path]) -> None:
    """Hold the files at `paths` (by their names on the card) against the card, reading them anew. Raises ModelRejected naming the file."""
    hashes = FileHashes()
    for file in card.files:
        if hashes.of(paths[file.name]) != file.sha256:
            raise ModelRejected(
                f"{paths[file.name]} differs from what {card.model}:{card.version} was when its card was written; "
                "the file was changed or damaged, so it is not served"
            )


def _place(source: Path, target: Path, limits: FileLimits) -> None:
    """A second name for `source` where the file system can, else a copy; `source` stays, so that a killed publish can be repeated."""
    target.parent.mkdir(parents=True, exist_ok=True)
    try:
        os.link(source, target, follow_symlinks=False)
    except OSError:
        copy_regular(source, target, limits)
