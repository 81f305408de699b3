"""START HERE: the facts that cross boundaries inside Hone. Frozen, typed, and free of any library that serves or computes.

Wire tensors stay *bytes* from socket to runner: row-major, little-endian, exactly the form of the binary tensor extension.
So batching along the first axis is joining buffers, splitting is slicing, and the HTTP process needs no numerics on the hot path.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from decimal import Decimal
from enum import StrEnum
from typing import Any, Final, TypeAlias

Buffer: TypeAlias = bytes | bytearray | memoryview

DATATYPE_SIZES: Final[dict[str, int]] = {
    "BOOL": 1, "UINT8": 1, "UINT16": 2, "UINT32": 4, "UINT64": 8, "INT8": 1, "INT16": 2, "INT32": 4, "INT64": 8,
    "FP16": 2, "BF16": 2, "FP32": 4, "FP64": 8,
}  # fmt: skip
"""Bytes per element of each fixed-size datatype of the Open Inference Protocol. BYTES is variable and not listed."""
BYTES: Final = "BYTES"
OWN: Final = "(hone)"
"""Caller of a request that Hone asks itself: golden's outputs compared, a live answer checked, a runner probed."""


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """Name, datatype and shape of one input or output; -1 is a variable dimension."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    optional: bool = False


@dataclass(frozen=True, slots=True)
class Signature:
    """What a version takes and gives. `rows` says whether requests may share a call (see RowsProof)."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batchable: bool = False
    rows_reason: str = ""


@dataclass(slots=True)
class Tensor:
    """One tensor on the wire. `data` is its raw form; for BYTES each element is a uint32 length and its bytes."""

    name: str
    datatype: str
    shape: tuple[int, ...]
    data: Buffer


@dataclass(slots=True)
class InferenceRequest:
    """One request as the data plane sees it. `deadline` is on time.monotonic()'s clock; priority 1 is the highest, 0 the default level."""

    inputs: list[Tensor]
    request_id: str = ""
    outputs: tuple[str, ...] | None = None
    priority: int = 0
    deadline: float | None = None
    caller: str = ""
    """Whom to count it for: the client's address, or OWN for a question of Hone's, which no window or sample may count."""
    received_at: float = 0.0
    decode_s: float = 0.0


@dataclass(slots=True)
class InferenceResult:
    """The answer. Output buffers are owned by the caller (they have left shared memory); requests of one batch share one buffer.

    Times in seconds: `compute_s` is the whole call's, `cpu_s` and `wait_s` (for a core) are this request's share of it.
    """

    outputs: list[Tensor]
    model: str
    version: str
    generation: int
    queue_s: float
    compute_s: float
    batch_rows: int
    cpu_s: float = 0.0
    wait_s: float = 0.0


@dataclass(frozen=True, slots=True)
class RuntimeSettings:
    """How a version is run on this class of host. Changing them makes a new generation, never a new version."""

    intra_op_threads: int = 1
    instances: int = 1
    batch_limit: int = 8
    queue_limit: int = 256
    spin_duration_us: int = 0
    graph_level: str = "all"
    session_options: tuple[tuple[str, str], ...] = ()
    lone_threads: int = 0
    """Threads of a call that finds nobody else in the runner: it gets a second session, which holds the weights again. 0: none."""

    @property
    def has_lone(self) -> bool:
        return self.lone_threads > self.intra_op_threads

    def needs_new_session(self, other: RuntimeSettings) -> bool:
        """True where going from self to other cannot be done in the live runner."""
        mine = (self.intra_op_threads, self.spin_duration_us, self.graph_level, self.session_options, self.lone_threads)
        return mine != (other.intra_op_threads, other.spin_duration_us, other.graph_level, other.session_options, other.lone_threads)


@dataclass(frozen=True, slots=True)
class Observation:
    """What one finished request cost, written once and handed to every sink. Seconds; CPU and wait are the batch's share per row."""

    model: str
    version: str
    code: int
    total_s: float
    decode_s: float
    queue_s: float
    compute_s: float
    encode_s: float
    batch_rows: int
    rows: int
    cpu_s: float
    wait_s: float
    limited: bool = False
    """Refused since its caller has too much waiting already: no fault of the model, and no load of others."""


@dataclass(frozen=True, slots=True)
class ModelView:
    """One model as this server serves it at one moment: what the loop sees of the data plane.

    `recent_deaths` are unasked ends of its runner in five minutes, `recent_kills` of them by somebody outside. `active_since` is when
    this version or its settings became active here, time.monotonic(); `rung` the version that answers for it under load; `failed` pairs
    versions that do not load with why.
    """

    name: str
    active: str
    generation: int
    settings: RuntimeSettings
    ready: bool
    memory_bytes: int
    recent_deaths: int
    loaded: tuple[str, ...]
    active_since: float
    recent_kills: int = 0
    rung: str = ""
    failed: tuple[tuple[str, str], ...] = ()
    memory: tuple[tuple[str, int], ...] = ()
    """Bytes of each loaded version's runner."""
    kind: str = "onnx"
    """What the active version is: onnx or torch."""
    golden_kind: str = "onnx"
    """What golden is, which jobs build from."""
    killers: int = 0
    """Different inputs that killed a runner of the active version when run alone; they are refused since."""
    no_room: tuple[str, ...] = ()
    """Of `failed` those for which memory or disk had no room: no fault of theirs."""


class VersionState(StrEnum):
    """States of the repository index."""

    READY = "READY"
    LOADING = "LOADING"
    UNLOADING = "UNLOADING"
    UNAVAILABLE = "UNAVAILABLE"


class Verdict(StrEnum):
    """Only PASSED promotes."""

    PASSED = "passed"
    FAILED = "failed"
    INCONCLUSIVE = "inconclusive"
    NO_DATA = "no_data"
    ERROR = "error"


class JobState(StrEnum):
    REQUESTED = "requested"
    BUILDING = "building"
    BUILT = "built"
    VERIFYING = "verifying"
    FINISHED = "finished"


class Mode(StrEnum):
    """How much the loop may do by itself with a model."""

    AUTO = "auto"
    APPROVE = "approve"
    OBSERVE = "observe"


JSON: TypeAlias = dict[str, Any]


@dataclass(frozen=True, slots=True)
class Event:
    """One decision or milestone in the journal: rare, explainable, never high-rate. `kind` is noun.past_participle.

    `seq` orders events and `at` (unix seconds) is for people only. Unknown kinds are kept and ignored by the fold.
    """

    kind: str
    model: str = ""
    version: str = ""
    job: str = ""
    actor: str = "hone"
    data: JSON = field(default_factory=dict)
    seq: int = 0
    at: float = 0.0
    schema: int = 1


@dataclass(frozen=True, slots=True)
class Generation:
    """A fence: later writers carry a larger (epoch, n)."""

    epoch: int = 1
    n: int = 0


@dataclass(frozen=True, slots=True)
class BuiltVersion:
    """A version that Hone built, as the journal tells it."""

    version: str
    parent: str
    golden_sha256: str
    job: str
    recipe: tuple[JSON, ...]
    sha256: str
    verdicts: tuple[tuple[str, Verdict], ...] = ()
    removed: bool = False
    size_bytes: int = 0
    served: bool = False
    """Whether it was ever the desired one: what waits for a person was not."""


@dataclass(frozen=True, slots=True)
class Job:
    """An optimization asked for by a person or the planner. `tries` are alternatives; each is a recipe of steps in order.

    A step is {"method": NAME, **config}. Outcome, once finished: promoted | kept | refused | nothing_changed | not_applicable
    | failed | cancelled | inconclusive.
    """

    id: str
    model: str
    golden: str
    golden_sha256: str
    tries: tuple[tuple[JSON, ...], ...]
    reason: str
    promote: str
    actor: str
    state: JobState
    requested_at: float
    worker: str = ""
    machine: str = ""
    """Where it is built (app.control.builders)."""
    attempt: int = 0
    candidates: tuple[str, ...] = ()
    cancel_asked: bool = False
    outcome: str = ""
    report: JSON = field(default_factory=dict)
    finished_at: float = 0.0
    candidate: str = ""
    rank: float = 1.0
    """What it is expected to repair for what it costs (app.control.expected); 1 where a person asked for it."""
    judgings: int = 0
    """How often judging it was begun: anew by each server that took it over, or was started again."""


@dataclass(frozen=True, slots=True)
class Split:
    """A second version beside the desired one: a candidate that is only asked again what others answered (shadow, share 0) or that takes a
    share of the live requests (canary), or the previous version beside its successor (watch). `since` is the event's time, unix seconds."""

    version: str
    share: float
    stage: str
    since: float = 0.0


@dataclass(frozen=True, slots=True)
class ModelState:
    """The desired state of one model: a fold over its events. `stamp` is the (epoch, seq) of the last event that changed it."""

    name: str
    golden: str
    golden_sha256: str
    desired: str
    previous: str
    generation: Generation
    settings: tuple[tuple[str, RuntimeSettings], ...] = ()
    previous_settings: tuple[tuple[str, RuntimeSettings], ...] = ()
    built: tuple[BuiltVersion, ...] = ()
    mode: Mode | None = None
    unloaded: bool = False
    split: Split | None = None
    rungs: tuple[str, ...] = ()
    """Proven versions that the data plane may step down to by itself when load threatens the objective, the best first."""
    left: tuple[str, ...] = ()
    """Versions that were left for faults, or failed their canary, since golden was deployed: the loop does not take them by itself."""
    changed: str = ""
    """What the newest generation changed: "version" or "settings"; "" where nothing was changed yet, or an older release noted it."""
    last_event: int = 0
    stamp: tuple[int, int] = (0, 0)

    def settings_of(self, version: str) -> RuntimeSettings | None:
        return dict(self.settings).get(version)


@dataclass(frozen=True, slots=True)
class RemovedModel:
    """What stays of a model that was removed: a name that returns goes on after `n`."""

    n: int
    stamp: tuple[int, int]


@dataclass(frozen=True, slots=True)
class State:
    """Everything the journal says, up to and including event `seq`.

    `epoch` grows each time the journal was lost and rebuilt; `left_at` says with which seq each earlier epoch was left. `last` is the
    store's own name of event `seq`, where it told: a store with another one there went on from an earlier past.
    """

    seq: int = 0
    models: dict[str, ModelState] = field(default_factory=dict)
    jobs: dict[str, Job] = field(default_factory=dict)
    frozen: bool = False
    frozen_because: str = ""
    epoch: int = 1
    left_at: dict[int, int] = field(default_factory=dict)
    removed: dict[str, RemovedModel] = field(default_factory=dict)
    last: str = field(default="", compare=False)


def short(number: float, digits: int = 3) -> str:
    """As many digits as say something, never as a power of ten: 1234, 56.7, 0.0123."""
    return f"{number:.0f}" if abs(number) >= 10**digits - 0.5 else f"{Decimal(f'{number:.{digits}g}'):f}"
