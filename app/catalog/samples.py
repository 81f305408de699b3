"""The samples of one model: the frozen reference with golden's outputs, and the sets that a job calibrates, trains and is judged with.

What calibrates or trains never judges (disjoint by content hash), and nothing here overwrites a reference. All of it blocks on the disk.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray
from pydantic import TypeAdapter, ValidationError

from app.catalog import durable
from app.catalog.model_config import SampleSources
from app.catalog.model_files import FileHashes
from app.catalog.reservoir import Reservoir, load_captured
from app.catalog.sample_sources import SampleReader
from app.catalog.synthetic import synthetic
from app.errors import Conflict, ModelRejected
from optimizers.samples import Samples, read_npz, write_npz

__all__ = [
    "Reference",
    "ReferenceMeta",
    "References",
    "Reservoir",
    "SampleSets",
    "assemble",
    "load_captured",
    "reference_inputs",
    "synthetic",
]

REFERENCE_SAMPLES: Final = 1024
SYNTHETIC_SAMPLES: Final = 64
CALIBRATION_SAMPLES: Final = 512
CALIBRATION_SEED: Final = 1
LEAST_RECENT: Final = 16
TRAIN_SAMPLES: Final = 65_536
"""A job that trains reads so many at most; everybody else needs a few."""
_HELD_BACK: Final = 0.25
_SHORT: Final = 16
"""Hex digits of a hash that tell 65,536 samples apart."""


@dataclass(frozen=True, slots=True)
class ReferenceMeta:
    """Where a reference came from. `hashes` are one per sample; `files` maps file names to SHA-256; `source`: see named_reference."""

    golden_sha256: str
    host_class: str
    origin: str
    stacked: bool
    hashes: tuple[str, ...]
    files: dict[str, str]
    frozen_at: float
    schema: int = 1
    source: str = ""

    def stands_for(self, sources: SampleSources) -> bool:
        """Whether it is what would be frozen now. What was made up gives way to what the owner names, and that to another name; else it stays."""
        return named_reference(sources) in {"", self.source}


@dataclass(frozen=True)
class Reference:
    """Frozen inputs and what golden, unoptimized, answered to them on `meta.host_class`: outputs[name] has one entry per sample.

    All of them, or only the first: len() is the number of all, `usual` the shares of golden's best classes in all (empty where outputs are no scores).
    """

    samples: Samples
    outputs: dict[str, NDArray[Any]]
    meta: ReferenceMeta
    usual: dict[int, float]
    folder: Path

    def __len__(self) -> int:
        return len(self.meta.hashes)

    def first(self, count: int) -> Reference:
        """At least the first `count` samples, from the disk where they are not at hand. Raises ModelRejected when it is damaged or gone."""
        if min(count, len(self)) <= len(self.samples):
            return self
        found = References(self.folder).load(count)
        if found is None or found.meta.hashes != self.meta.hashes:
            raise ModelRejected(f"{self.folder} holds other samples than when this version was loaded")
        return found


@dataclass(frozen=True)
class References:
    """The reference of one model, in a folder that appears whole and is never written again."""

    folder: Path

    def freeze(
        self, samples: Samples, outputs: Mapping[str, NDArray[Any]], golden_sha256: str, host_class: str, most: int | None = None,
        source: str = "",
    ) -> Reference:  # fmt: skip
        """Keep `samples` with golden's outputs for good, and return the first `most` of them. With the same golden the first ones stay.

        Raises Conflict where another golden's reference lies (see `retire`), ModelRejected, InsufficientStorage or NotAllowed.
        """
        if (known := self.load(most)) is not None:
            return self._same(known, golden_sha256)
        counts = {name: len(values) for name, values in outputs.items()}
        if not len(samples) or set(counts.values()) != {len(samples)}:
            raise ModelRejected(f"a reference needs one output for each of its {len(samples)} samples, got {counts}")
        with durable.storage_errors("freezing reference samples", self.folder):
            durable.make_folder(self.folder.parent, 0o700)
            with durable.temporary_folder(self.folder.parent, 0o700) as folder:
                samples.save(folder / "samples.npz")
                write_npz(folder / "golden_outputs.npz", outputs)
                files = {name: FileHashes().of(folder / name) for name in ("samples.npz", "golden_outputs.npz")}
                meta = ReferenceMeta(
                    golden_sha256, host_class, samples.origin, samples.stacked, tuple(samples.hashes()), files, time.time(), source=source,
                )  # fmt: skip
                (folder / "meta.json").write_bytes(TypeAdapter(ReferenceMeta).dump_json(meta, indent=2))
                try:
                    durable.publish(folder, self.folder)
                except FileExistsError:
                    pass
        found = self.load(most)
        assert found is not None
        return self._same(found, golden_sha256)

    def load(self, most: int | None = None) -> Reference | None:
        """The reference (its first `most` samples), held against its hashes; None where there is none. Raises ModelRejected when it is damaged."""
        meta = self.meta()
        if meta is None:
            return None
        hashes = FileHashes()
        for name, expected in meta.files.items():
            if hashes.of(self.folder / name) != expected:
                raise ModelRejected(
                    f"{self.folder / name} differs from what was frozen; it cannot judge (hone remove the model's samples, deploy again)"
                )
        samples = Samples.load(self.folder / "samples.npz", meta.origin, meta.stacked, most)
        outputs = read_npz(self.folder / "golden_outputs.npz")
        usual = _best_classes(next(iter(outputs.values())))
        return Reference(samples, {name: values[:most].copy() for name, values in outputs.items()}, meta, usual, self.folder)

    def meta(self) -> ReferenceMeta | None:
        """Its origin and hashes alone. Raises ModelRejected when they are damaged."""
        path = self.folder / "meta.json"
        try:
            return TypeAdapter(ReferenceMeta).validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except ValidationError as error:
            raise ModelRejected(f"{path} is damaged: {error.errors(include_url=False)[0]['msg']}") from None

    def retire(self) -> None:
        """Delete it: a new golden, or another source in model.yaml, voids it."""
        with durable.storage_errors("removing reference samples", self.folder):
            durable.discard(self.folder)

    def _same(self, known: Reference, golden_sha256: str) -> Reference:
        if known.meta.golden_sha256 != golden_sha256:
            raise Conflict(f"{self.folder} belongs to golden {known.meta.golden_sha256[:12]}, not {golden_sha256[:12]}; retire it first")
        return known


def _best_classes(scores: NDArray[Any]) -> dict[int, float]:
    if scores.dtype.kind != "f" or scores.ndim < 2 or not scores.size:
        return {}
    best = Counter(scores.reshape(-1, scores.shape[-1]).argmax(-1).tolist())
    return {group: count / best.total() for group, count in best.items()}


@dataclass(frozen=True)
class SampleSets:
    """What one job works with. `reference`, `live` and `labelled` judge and share no sample with `calibration` and `train`.

    `owner_named`: the owner named samples that judge, which lossy changes need to be automatic. `left_out`: which do not judge, and why.
    """

    calibration: Samples
    reference: Samples | None = None
    live: Samples | None = None
    labelled: Samples | None = None
    train: Samples | None = None
    owner_named: bool = False
    notes: tuple[str, ...] = field(default=())
    left_out: tuple[str, ...] = ()

    def save(self, folder: Path) -> dict[str, str]:
        """Write each set that there is as NAME.npz; returns the paths by name, for a task child's request."""
        paths = {}
        for name in ("calibration", "reference", "live", "labelled", "train"):
            samples: Samples | None = getattr(self, name)
            if samples is not None and len(samples):
                samples.save(folder / f"{name}.npz")
                paths[name] = str(folder / f"{name}.npz")
        return paths


def reference_inputs(sources: SampleSources, reader: SampleReader, seed: int = 0) -> Samples:
    """What to freeze at the first deploy: what the owner named, else made up. Where nothing else that is named calibrates, a quarter is left for that."""
    if sources.reference is None:
        return synthetic(reader.signature, SYNTHETIC_SAMPLES, seed, reader.row_shapes, reader.integers)
    named = reader.read(sources.reference, "samples.reference", seed)
    kept = named if _others_calibrate(sources) or len(named) <= 8 else named.split(1 - _HELD_BACK, seed)[0]
    return kept.rows(slice(0, REFERENCE_SAMPLES))


def named_reference(sources: SampleSources) -> str:
    """What `reference_inputs` takes of what the owner named, in words that change with it; '' where nothing is named."""
    if sources.reference is None:
        return ""
    return sources.reference if _others_calibrate(sources) else f"three quarters of {sources.reference}"


def _others_calibrate(sources: SampleSources) -> bool:
    return bool(sources.train or (sources.calibration and sources.calibration != "captured"))


@dataclass(frozen=True)
class Spent:
    """Hashes of all that ever calibrated or trained a version of a model, in one file that only grows: what stands there never judges."""

    path: Path

    def known(self) -> set[str]:
        """Raises ModelRejected where the file is damaged: without it nothing could judge."""
        try:
            text = self.path.read_text("ascii")
        except FileNotFoundError:
            return set()
        except UnicodeDecodeError:
            text = "?"
        found = set(text.split())
        if any(len(one) != _SHORT for one in found):
            raise ModelRejected(
                f"{self.path}, which says what may not judge, is damaged; restore it, or deploy the model under another name"
            )
        return found

    def add(self, sets: SampleSets) -> None:
        """Note what a job is about to build from. Raises InsufficientStorage or NotAllowed."""
        what = "noting what calibrates and trains"
        more = {digest[:_SHORT] for part in (sets.calibration, sets.train) if part for digest in part.hashes()}
        with durable.storage_errors(what, self.path.parent):
            durable.make_folder(self.path.parent, 0o700)
            with durable.exclusive(self.path.with_name(".lock"), what):  # workers build side by side
                before = self.known()
                if not more <= before:
                    durable.write_file(self.path, "\n".join(sorted(before | more)).encode(), 0o600)


def assemble(
    sources: SampleSources, reader: SampleReader, reference: Reference | None, seed: int = 0, most_train: int = 0, spent: Spent | None = None,
    recent: bool = False, trains: bool = False,
) -> SampleSets:  # fmt: skip
    """Read every source, and part what judges from what calibrates or trains (now, or before: `spent`). Raises what reading a source raises.

    `most_train`: so many training samples are read; 0 for those who only judge. `recent`: half of what was captured calibrates too.
    `trains`: something learns; where no training samples are named, from half of what was captured, which never judges from then on.
    """
    frozen = reference.samples if reference else None
    captured = load_captured(reader.captured)
    train = replace(reader, most=most_train).read(sources.train, "samples.train", seed) if sources.train and most_train else None
    calibration, live, note = _calibration(sources, reader, frozen, captured, train, seed)
    if recent and live is not None and live is captured and len(live) >= LEAST_RECENT:
        first, live = live.split(0.5, seed)
        calibration, note = _joined(calibration, first), f"{note}, and {len(first)} of {len(captured)} captured inputs"
    if trains and train is None and live is not None and live is captured and len(live) >= LEAST_RECENT:
        train, live = live.split(0.5, seed)
        note = f"{note}; training: {len(train)} of {len(captured)} captured inputs"
    used = {one[:_SHORT] for part in (calibration, train) if part is not None for one in part.hashes()} | (
        spent.known() if spent else set()
    )
    labelled = reader.read(sources.validation, "samples.validation", seed) if sources.validation else None
    if labelled is not None and labelled.labels is None:
        raise ModelRejected(
            f"samples.validation = {sources.validation!r} holds no labels; add an array `labels`, or one subfolder for each label"
        )
    if frozen is None and live is None and labelled is None:  # golden answers anew then, and where it cannot, that is told
        frozen = reference_inputs(sources, reader, seed)
    judging = {"reference": frozen, "live": live, "labelled": labelled}
    unspent = {name: _unspent(samples, used) for name, samples in judging.items()}
    counts = {name: (len(samples), len(unspent[name] or ())) for name, samples in judging.items() if samples is not None}
    return SampleSets(
        calibration=calibration,
        **unspent,
        train=train,
        left_out=tuple(
            f"{total - left} of {total} {name} samples calibrate or train, now or in an earlier job, and so never judge"
            for name, (total, left) in counts.items()
            if left < total
        ),
        owner_named=bool(sources.reference or sources.validation),
        notes=(note,),
    )


def _calibration(
    sources: SampleSources, reader: SampleReader, frozen: Samples | None, captured: Samples | None, train: Samples | None, seed: int
) -> tuple[Samples, Samples | None, str]:
    """What calibrates, what is left of the captured to judge, and why it was chosen."""
    if sources.calibration and sources.calibration != "captured":
        return _most(reader.read(sources.calibration, "samples.calibration", seed)), captured, f"calibration: {sources.calibration}"
    if captured is not None and len(captured) >= 32:
        first, rest = captured.split(0.5, seed)
        return _most(first), rest, f"calibration: {len(first)} of {len(captured)} captured inputs"
    if sources.train:
        return _most(train or reader.read(sources.train, "samples.train", seed)), captured, "calibration: samples.train"
    if sources.reference is not None:
        named = reader.read(sources.reference, "samples.reference", seed)
        kept = frozen if frozen is not None else reference_inputs(sources, reader, seed)  # a job may come before the freezing has ended
        spare = named.without(set(kept.hashes()))
        if len(spare) >= 8:
            return _most(spare), captured, "calibration: the part of samples.reference that is not frozen"
    made_up = synthetic(reader.signature, SYNTHETIC_SAMPLES, seed + CALIBRATION_SEED, reader.row_shapes, reader.integers)
    return made_up, captured, "calibration: made-up inputs, since no samples are named and few were captured"


def _joined(first: Samples, other: Samples) -> Samples:
    """Half of either at most, where both have the same inputs; else the newer alone."""
    half = CALIBRATION_SAMPLES // 2
    one, two = first.rows(slice(0, half)), other.rows(slice(0, half))
    if one.inputs.keys() != two.inputs.keys() or any(one.inputs[n].shape[1:] != two.inputs[n].shape[1:] for n in one.inputs):
        return two
    return Samples({n: np.concatenate([one.inputs[n], two.inputs[n]]) for n in one.inputs}, None, first.origin, first.stacked)


def _most(samples: Samples) -> Samples:
    return samples.rows(slice(0, CALIBRATION_SAMPLES))


def _unspent(samples: Samples | None, spent: set[str]) -> Samples | None:
    """What may judge; None where nothing is left."""
    if samples is None:
        return None
    left = samples.rows([at for at, one in enumerate(samples.hashes()) if one[:_SHORT] not in spent])
    return left if len(left) else None
