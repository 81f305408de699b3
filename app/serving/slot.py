"""One model's place in the server: which version is active, which are warm, and why it cannot answer when it cannot.

A slot only points; loading, draining and stopping are the reconciler's.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from typing import Final
from zlib import crc32

from app.catalog.model_config import ModelConfig
from app.catalog.processing import Processor
from app.catalog.samples import Reservoir
from app.domain import RuntimeSettings, VersionState
from app.errors import NotFound, NotReady
from app.serving.admission import Admitted
from app.serving.engine import Engine
from app.serving.mirror import Mirror

RUN_S: Final = 0.25
"""So long a version with a share answers all that comes, or twice as long where it is behind its share. A process that others' weights drove out of the
caches is as quick as ever after eight to ten calls (48 MB, benchmarks.share)."""


@dataclass(slots=True)
class Loaded:
    """A version with a running engine. `pinned` keeps it warm on request; `warm_until` (monotonic) bounds a previous version's stay; `run_by` and
    `memory_mb` are what model.yaml said of how it is run (None: nobody asked)."""

    admitted: Admitted
    engine: Engine
    settings: RuntimeSettings
    generation: int
    took_s: float
    state: VersionState = VersionState.READY
    pinned: bool = False
    warm_until: float = 0.0
    memory_bytes: int = 0
    notes: tuple[str, ...] = ()
    run_by: tuple[object, ...] | None = None
    memory_mb: int | None = None

    @property
    def version(self) -> str:
        return self.admitted.version


def asked_alike(one: Loaded, other: Loaded) -> bool:
    """Whether requests for one version are requests for the other: inputs and outputs count, not what was proven about rows."""
    first, second = one.admitted.signature, other.admitted.signature
    return (first.inputs, first.outputs) == (second.inputs, second.outputs)


@dataclass(slots=True)
class Share:
    """A second version that answers a share of the requests: a candidate on trial, or the previous one beside its successor."""

    loaded: Loaded
    share: float
    stage: str
    due: float = 0.0
    """Requests that it may answer by now: never more than its share of all that came."""
    run_at: float = -math.inf
    running: bool = False

    def takes(self, key: bytes | None, now: float) -> bool:
        """Whether the next request, which comes at `now` (time.monotonic()), is its.

        With a key (a header's value) the same callers get the same version. Else it answers all that comes for RUN_S, then nothing until
        that was its share: every twentieth request would find it cold and alone, where the other one's calls follow each other and
        share batches, and costs that are the same would look half as much again.
        """
        if key is not None:
            return crc32(key) < self.share * 2**32
        self.due += self.share
        if self.running and now - self.run_at > 2 * RUN_S:
            self.running, self.due = False, min(1.0, self.due)  # of what came when more came, little comes now
        self.running = self.running and self.due >= 1
        if not self.running and self.due >= 1 and now - self.run_at >= RUN_S / self.share:
            self.running, self.run_at = True, now
        self.due -= self.running
        return self.running


@dataclass(frozen=True, slots=True)
class Neighbours:
    """The versions of the ladder next to `of`, which stands for the model. The one above goes on answering what it has room for; the one below
    answers what would wait too long, since a step takes longer than the first of them may."""

    of: Loaded
    above: Loaded | None
    below: Loaded | None


@dataclass(slots=True)
class Slot:
    """`versions` holds every loaded version by name; `active` is the one that answers without /versions/{v}."""

    name: str
    config: ModelConfig
    reservoir: Reservoir
    active: Loaded | None = None
    versions: dict[str, Loaded] = field(default_factory=dict)
    known: tuple[str, ...] = ()
    golden: str = ""
    golden_kind: str = "onnx"
    """What golden is: onnx or torch."""
    desired: str = ""
    reason: str = "the server is starting"
    loading: str = ""
    unloaded: bool = False
    trouble: str = ""
    """Why what lies in the repository now is not taken: what was read before goes on holding."""
    misfit: str = ""
    """Why pre- and post-processing are not as model.yaml says now: those from before go on."""
    failed: dict[str, str] = field(default_factory=dict)
    no_room: set[str] = field(default_factory=set)
    """Of `failed` those for which memory or disk had no room: no fault of theirs."""
    processor: Processor | None = None
    split: Share | None = None
    mirror: Mirror | None = None
    rung: Loaded | None = None
    """The version that answers in the active one's place while load would break the objective (app.serving.ladder)."""
    neighbours: Neighbours | None = None
    spare_s: float = 0.0
    """So long may what waits take, for both together, that the version above still answers."""
    most_s: float = math.inf
    """So long may what waits take until the version below answers."""

    def lease(self, version: str | None) -> Loaded:
        """The loaded version that stands for `version`. Raises NotReady with the reason and remedy, or NotFound."""
        if version is None:
            loaded = self.rung if self.rung is not None and self.rung.engine.alive else self.active
            near = self.neighbours
            if near is not None and near.of is loaded:
                loaded = self._among(near)
        else:
            loaded = self.versions.get(version)
        if loaded is None:
            raise self._unavailable(version)
        return loaded

    def route(self, headers: Mapping[bytes, bytes]) -> Loaded:
        """The version that shall answer a request which names none. Only a version that can answer at once gets its share."""
        split = self.split
        if split is None or self.rung is not None or not split.loaded.engine.alive:
            return self.lease(None)
        name = self.config.rollout.header
        key = headers.get(name.lower().encode()) if name else None
        return split.loaded if split.takes(key, monotonic()) else self.lease(None)

    def _among(self, near: Neighbours) -> Loaded:
        """Who answers this request, by what waits now."""
        above, below, waits_s = near.above, near.below, near.of.engine.backlog_s
        if above is not None and above.engine.alive and above.engine.backlog_s + waits_s <= self.spare_s:
            return above
        return below if below is not None and waits_s > self.most_s and below.engine.alive else near.of

    def does_not_load(self, version: str, reason: str, no_room: bool = False) -> None:
        self.failed[version] = reason
        (self.no_room.add if no_room else self.no_room.discard)(version)

    def let_go(self, loaded: Loaded) -> None:
        """It is about to be stopped: no request goes to it any more."""
        if self.versions.get(loaded.version) is loaded:
            del self.versions[loaded.version]
        if self.split is not None and self.split.loaded is loaded:
            self.split = None
        if self.rung is loaded:
            self.rung = None
        near = self.neighbours
        if near is not None and any(one is loaded for one in (near.of, near.above, near.below)):
            self.neighbours = None

    def _unavailable(self, version: str | None) -> NotFound | NotReady:
        if version is None:
            if self.unloaded:
                return NotReady(f"model {self.name!r} is unloaded; load it with POST /v2/repository/models/{self.name}/load")
            return NotReady(f"model {self.name!r} is not ready: {self.reason}")
        if version not in self.known:
            return NotFound(f"model {self.name!r} has no version {version!r}; it has {', '.join(self.known) or 'none'}")
        if version in self.failed:
            return NotReady(f"version {version} of {self.name!r} does not load: {self.failed[version]}", retry_after_s=30)
        if version == self.loading:
            return NotReady(f"version {version} of {self.name!r} is loading")
        return NotReady(
            f"version {version} of {self.name!r} is not loaded; load it with: hone load {self.name}:{version}", retry_after_s=30
        )

    def state_of(self, version: str) -> tuple[VersionState, str]:
        """State and reason of one version, as the repository index shows it."""
        if loaded := self.versions.get(version):
            return loaded.state, "; ".join(loaded.notes)
        if version == self.loading:
            return VersionState.LOADING, ""
        return VersionState.UNAVAILABLE, self.failed.get(version, "unloaded")

    @property
    def ready(self) -> bool:
        return self.active is not None and self.active.engine.alive
