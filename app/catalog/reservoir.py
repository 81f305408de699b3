"""A small, bounded set of live inputs, spread over time, predicted classes and callers: what calibrates and judges beside the reference.

`offer` runs on the event loop and costs a clock reading unless its time has come; everything else blocks and belongs off the loop.
Offer only what was answered well: a refused or failed request must never become a sample.
"""

from __future__ import annotations

import contextlib
import logging
import os
import random
import secrets
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from hashlib import blake2b
from math import inf
from pathlib import Path
from typing import Final

from app.catalog import durable
from app.catalog.model_config import Capture
from app.catalog.sample_file import SUFFIX, Captured, head_of, one_row, predicted_class, read, write
from app.catalog.tensors import all_finite
from app.domain import Signature, Tensor
from optimizers.samples import Samples

log = logging.getLogger(__name__)

MAX_TOTAL_BYTES: Final = 64 << 20
MAX_SAMPLE_BYTES: Final = MAX_TOTAL_BYTES // 8
FILL_INTERVAL_S: Final = 0.25
STEADY_INTERVAL_S: Final = 15.0
SALT: Final = ".salt"
GOLDEN: Final = ".golden"
MOST_PENDING: Final = 4
MOST_FOLLOWED_BYTES: Final = MAX_TOTAL_BYTES // 2


@dataclass(frozen=True, slots=True)
class Kept:
    """What the reservoir knows of one stored sample. `at` in unix seconds, `caller` salted and hashed."""

    path: Path
    at: float
    group: str
    caller: str
    bytes: int


class Reservoir:
    """The captured samples of one model in `folder`. Nothing is taken before `configure` has told what a row is."""

    def __init__(self, folder: Path, capture: Capture | None = None) -> None:
        self.folder = folder
        self._capture = capture or Capture()
        self._signature: Signature | None = None
        self._classifies = False
        self._golden = ""
        self._opens_at = inf
        self._pending: deque[tuple[list[Tensor], list[Tensor], str]] = deque(maxlen=MOST_PENDING)
        self._kept: list[Kept] = []
        self._callers: Counter[str] = Counter()
        self._salt = secrets.token_bytes(16)
        self._full = False
        self._told = False
        """That the disk takes nothing, which is told once, not each second."""
        self._followed: list[Captured] = []
        self._missing = 0
        self._followed_all: Callable[[], None] = lambda: None
        self._lock = threading.Lock()

    def configure(self, capture: Capture, signature: Signature, classifies: bool, golden_sha256: str = "") -> None:
        """Take samples of `signature` from now on, by these rules. Blocks on the disk.

        `capture.mode: off` deletes what there is; so does another golden than the one they were taken for.
        """
        with self._lock:
            if signature != self._signature:
                self._pending.clear()
            self._capture, self._signature, self._classifies, self._golden = capture, signature, classifies, golden_sha256
            self._read_folder()
            self._missing = 0
            voided = self._taken_for() not in {golden_sha256, None}
        if capture.mode == "off" or voided:
            self.clear()
        self._opens_at = 0.0 if capture.mode == "on" else inf

    def offer(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], caller: str = "") -> bool:
        """Perhaps remember one row of an answered request; True if so (it is stored by the next `store_pending`)."""
        now = time.monotonic()
        if self._missing:
            self._show(inputs, outputs)
        if now < self._opens_at:
            return False
        return self._admit(inputs, outputs, caller, now)

    def follow(self, count: int, done: Callable[[], None] = lambda: None) -> list[Captured]:
        """A list, in memory alone, that gets one row of each of the next `count` answered requests; then `done` is called. 0 ends it.

        With capture off it stays empty.
        """
        self._followed, self._followed_all = [], done
        self._missing = count if self._capture.mode == "on" and self._signature is not None else 0
        if not self._missing:
            done()
        return self._followed

    @property
    def pending(self) -> bool:
        """Whether `store_pending` has something to do."""
        eldest = next(iter(self._kept), None)
        return bool(self._pending) or (eldest is not None and eldest.at < self._oldest_allowed())

    def store_pending(self) -> int:
        """Write what was admitted, forget what is too old or too much; returns how many were stored. Blocks on the disk.

        A disk that is full or read-only costs samples, never answers: it is logged once, and what was admitted is dropped.
        """
        stored = 0
        with self._lock:
            try:
                while self._pending and self._capture.mode == "on":
                    stored += self._store(*self._pending.popleft())
                self._shrink()
                self._told = self._told and not stored
            except OSError as error:
                self._pending.clear()
                if not self._told:
                    log.warning("captured samples cannot be stored in %s until it takes them again: %s", self.folder, error)
                self._told = True
        return stored

    def clear(self) -> int:
        """Delete every sample; returns how many there were. Blocks on the disk."""
        with self._lock:
            self._pending.clear()
            if self._capture.mode == "off":
                self._opens_at = inf
            count = len(self._kept)
            with durable.storage_errors("deleting captured samples", self.folder):
                durable.discard(self.folder)
            self._kept.clear()
            self._callers.clear()
            self._full = False
        return count

    def load(self) -> Samples | None:
        """The samples of the commonest shape; None where there are none. Blocks on the disk."""
        return load_captured(self.folder)

    def __len__(self) -> int:
        return len(self._kept)

    # ---- on the event loop
    def _admit(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], caller: str, now: float) -> bool:
        signature = self._signature
        if signature is None:
            return False
        interval = STEADY_INTERVAL_S if self._full else FILL_INTERVAL_S
        known = self._hashed(caller)
        held = self._callers.get(known, 0)
        if self._capture.per_caller <= held < len(self._kept):
            self._opens_at = now + interval / 50
            return False
        self._opens_at = now + interval * random.uniform(0.5, 1.5)
        row = self._row(inputs, outputs, signature)
        if row is None:
            return False
        self._pending.append((*row, known))
        return True

    def _row(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor], signature: Signature) -> tuple[list[Tensor], list[Tensor]] | None:
        """A copy of one row with its outputs; None where it is too large or cannot be cut."""
        rows = max(1, inputs[0].shape[0] if inputs and inputs[0].shape and signature.batchable else 1)
        if sum(len(tensor.data) for tensor in inputs) > MAX_SAMPLE_BYTES * rows:
            return None  # before a byte is copied: this runs on the event loop
        row = one_row(inputs, outputs, signature)
        return row if row is not None and sum(len(tensor.data) for tensor in row[0]) <= MAX_SAMPLE_BYTES else None

    def _show(self, inputs: Sequence[Tensor], outputs: Sequence[Tensor]) -> None:
        """One more row for whoever follows; it ends early where rows are large."""
        signature = self._signature
        row = self._row(inputs, outputs, signature) if signature is not None else None
        if row is None or signature is None:
            return
        self._followed.append(Captured(time.time(), "", "", signature.batchable, tuple(row[0])))
        held = sum(len(tensor.data) for one in self._followed for tensor in one.inputs)
        self._missing = self._missing - 1 if held < MOST_FOLLOWED_BYTES else 0
        if not self._missing:
            self._followed_all()

    def _hashed(self, caller: str) -> str:
        return blake2b(caller.encode("utf-8", "surrogateescape"), key=self._salt, digest_size=8).hexdigest()

    # ---- off the loop, with the lock held
    def _store(self, inputs: list[Tensor], outputs: list[Tensor], caller: str) -> int:
        assert self._signature is not None
        if not (all_finite(inputs) or all_finite(outputs)):
            return 0  # poisoned: nothing to calibrate or judge with. Where the answer is whole, NaN may be how this model is told "missing"
        group = predicted_class(outputs) if self._classifies else ""
        sample = Captured(time.time(), group, caller, self._signature.batchable, tuple(inputs))
        self._open_folder()
        path, size = write(self.folder, sample)
        self._remember(Kept(path, sample.at, group, caller, size))
        return 1

    def _shrink(self) -> None:
        oldest, kept = self._oldest_allowed(), self._kept
        while kept and kept[0].at < oldest:
            self._forget(0)
            self._full = False
        while len(kept) > self._capture.samples or sum(one.bytes for one in kept) > MAX_TOTAL_BYTES:
            self._forget(victim(kept, self._capture.per_caller))
            self._full = True

    def _remember(self, kept: Kept) -> None:
        self._kept.append(kept)
        self._callers[kept.caller] += 1

    def _forget(self, index: int) -> None:
        gone = self._kept.pop(index)
        self._callers[gone.caller] -= 1
        self._callers += Counter()
        gone.path.unlink(missing_ok=True)

    def _open_folder(self) -> None:
        """The folder, and in it the key of the callers' hashes: a caller counts as the same after a restart, and no address is stored."""
        if self.folder.is_dir():
            return
        self.folder.mkdir(mode=0o700, parents=True)
        for name, data in ((SALT, self._salt), (GOLDEN, self._golden.encode())):
            descriptor = os.open(self.folder / name, os.O_WRONLY | os.O_CREAT, 0o600)
            with open(descriptor, "wb") as file:
                file.write(data)

    def _taken_for(self) -> str | None:
        """The golden whose samples lie there; None where there are none."""
        try:
            return (self.folder / GOLDEN).read_text()
        except OSError:
            return None

    def _oldest_allowed(self) -> float:
        return time.time() - self._capture.max_age_h * 3600

    def _read_folder(self) -> None:
        """Find again what an earlier life stored."""
        self._kept.clear()
        self._callers.clear()
        with contextlib.suppress(OSError):
            self._salt = (self.folder / SALT).read_bytes()[:64] or self._salt
        for path in sorted(self.folder.glob(f"*{SUFFIX}")):
            head = head_of(path)
            if head is None:
                path.unlink(missing_ok=True)
                continue
            self._remember(Kept(path, head.at, head.group, head.caller, path.stat().st_size))
        self._kept.sort(key=lambda kept: kept.at)
        self._shrink()


def victim(kept: Sequence[Kept], per_caller: int) -> int:
    """Which sample gives way: of a caller that has too many, else of the commonest class; there the one closest in time to its neighbours."""
    callers = Counter(one.caller for one in kept)
    caller, most = callers.most_common(1)[0]
    if most > per_caller and len(callers) > 1:
        among = [i for i, one in enumerate(kept) if one.caller == caller]
    else:
        groups = Counter(one.group for one in kept)
        group = groups.most_common(1)[0][0]
        among = [i for i, one in enumerate(kept) if one.group == group]
    if len(among) < 3:
        return among[0]
    inner = range(1, len(among) - 1)
    return among[min(inner, key=lambda j: kept[among[j + 1]].at - kept[among[j - 1]].at)]


def load_captured(folder: Path) -> Samples | None:
    """What any process may read of a reservoir: the samples of the commonest shape, the oldest first; None where there are none."""
    found = (read(path) for path in sorted(folder.glob(f"*{SUFFIX}")))
    return max(by_form([sample for sample in found if sample is not None]), key=len, default=None)


def captured_before(folder: Path, at: float, most: int) -> list[Samples]:
    """Up to `most` samples taken before `at` (unix seconds), spread over their time; those of a form together. Blocks on the disk."""
    older = [path for path in sorted(folder.glob(f"*{SUFFIX}")) if path.name < f"{int(at * 1000):014d}"]
    chosen = older if len(older) <= most else [older[round(i * (len(older) - 1) / max(1, most - 1))] for i in range(most)]
    return by_form([sample for sample in map(read, chosen) if sample is not None])


def by_form(samples: Sequence[Captured]) -> list[Samples]:
    """Those that may be stacked together, as arrays."""
    groups: dict[tuple[object, ...], list[Captured]] = {}
    for sample in samples:
        groups.setdefault(sample.form, []).append(sample)
    return [Captured.together(group) for group in groups.values()]
