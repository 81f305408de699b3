"""Golden's answers on frozen samples: computed once, in the background, and what every later version and host is held to."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic
from typing import Final

from app.catalog.model_config import ModelConfig
from app.catalog.repository import FoundModel
from app.domain import Event, ModelState, Signature
from app.errors import HoneError
from app.serving.admission import Admission, Admitted
from app.serving.backoff import RETRY_MOST_S
from app.serving.loader import Loader
from app.serving.slot import Loaded, Slot
from optimizers.allocator import give_back

log = logging.getLogger("hone.serving")
UNFROZEN: Final = "its reference is not frozen yet"


class ReferenceFreezer:
    """Of one model; at most one at work, and not again at once where it went wrong."""

    def __init__(self, slot: Slot, admission: Admission, loader: Loader, record: Callable[[Event], None]) -> None:
        self._slot, self._admission, self._loader, self._record = slot, admission, loader, record
        self._task: asyncio.Task[None] | None = None
        self._not_before = 0.0
        self._asked: object = None

    def freeze(self, found: FoundModel, want: ModelState, then: Callable[[], None]) -> None:
        """Once, in the background, where golden is loaded and has no reference yet, or another than model.yaml names; `then` is called when it has.

        What went wrong is not tried again at once, unless what was asked for has changed.
        """
        golden = self._slot.versions.get(want.golden)
        busy = self._task is not None and not self._task.done()
        if golden is None or busy or not _can_be_sampled(golden.admitted.signature):
            return
        sources, reference = (found.config or ModelConfig()).samples, golden.admitted.reference
        if reference is not None and reference.meta.stands_for(sources):
            golden.notes = _without(golden.notes)
            return
        asked = (golden.admitted.golden_sha256, golden.admitted.signature, sources, _written_at(found.folder, sources.reference))
        if asked == self._asked and monotonic() < self._not_before:
            return
        self._asked = asked
        self._not_before = monotonic() + RETRY_MOST_S
        self._task = asyncio.create_task(self._freeze(found, golden, then), name=f"freeze-{self._slot.name}")

    async def _freeze(self, found: FoundModel, golden: Loaded, then: Callable[[], None]) -> None:
        try:
            reference = await self._admission.freeze_reference(found, golden.admitted)
        except HoneError as error:
            log.warning("model %s: %s: %s", self._slot.name, UNFROZEN, error)
            golden.notes = (*_without(golden.notes), f"{UNFROZEN}: {error}")
            return
        await asyncio.to_thread(give_back)  # all but some of the samples is gone
        for loaded in self._slot.versions.values():
            if loaded.admitted.golden_sha256 == golden.admitted.golden_sha256:
                loaded.admitted = replace(loaded.admitted, reference=reference)
        data = {"version": golden.version, "samples": len(reference), "origin": reference.meta.origin}
        self._record(Event("reference.frozen", self._slot.name, golden.version, data=data))
        golden.notes = await self._loader.compare(golden, self._slot.config)
        then()

    def close(self) -> None:
        if self._task is not None:
            self._task.cancel()


def usual_classes(admitted: Admitted, classifies: bool) -> dict[int, float]:
    """Shares of golden's top classes on the reference; empty where there is none, or nothing is classified."""
    return admitted.reference.usual if classifies and admitted.reference is not None else {}


def _without(notes: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(note for note in notes if not note.startswith(UNFROZEN))


def _written_at(folder: Path, source: str | None) -> float:
    """When the file or folder of samples changed last; 0 where it is none."""
    try:
        return (folder / source).stat().st_mtime if source else 0.0
    except (OSError, ValueError):
        return 0.0


def _can_be_sampled(signature: Signature) -> bool:
    """Whether inputs can differ at all: some models take none, or only empty ones."""
    needed = [spec for spec in signature.inputs if not spec.optional]
    return bool(needed) and all(0 not in spec.shape for spec in needed)
