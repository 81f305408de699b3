"""Live requests asked again: a few answered requests are put to golden (and to a candidate) too, and the answers compared and dropped.

It is how quality is watched without labels. It runs only while nobody waits, within the background budget, and never delays an answer.
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass, field
from time import monotonic
from typing import Any, Final, Protocol

from app.catalog.tensors import to_array
from app.domain import OWN, InferenceRequest, InferenceResult, Tensor
from app.errors import HoneError
from app.telemetry.likeness import Row

log = logging.getLogger("hone.serving")
WAITING: Final = 32
MOST_BYTES: Final = 1 << 20
"""Requests larger than this are not asked again: their copies would cost memory."""
MOST_KEPT: Final = 16 << 20
"""Bytes of one model's kept requests with their answers; one that is larger by itself is not kept."""
EVERY_S: Final = 0.2
"""Between two that are kept: about as many as are asked again."""
DRIFT_SAMPLES: Final = 400
LEAST_DRIFT: Final = 100
CALL_S: Final = 10.0
MOST_ROWS: Final = 64
"""Of one request, whose classes and confidence are held to golden's."""


class Answering(Protocol):
    """An engine, as far as it is asked here."""

    @property
    def queued(self) -> int: ...
    async def infer(self, request: InferenceRequest) -> InferenceResult: ...


@dataclass(frozen=True, slots=True)
class Seen:
    """A live request, who answered it and what."""

    inputs: list[Tensor]
    outputs: tuple[str, ...] | None
    answer: list[Tensor]
    version: str

    @property
    def size(self) -> int:
        """Bytes of it all."""
        return _size(self.inputs) + _size(self.answer)


@dataclass(frozen=True, slots=True)
class Compared:
    """How much of a version's answer to one live request is golden's, from 0 to 1; `rows` of it where both are scores of classes. `cpu_s` is
    what asking took. None: its few values say something only together with those of the requests that follow."""

    version: str
    agreed: float | None
    cpu_s: float
    rows: tuple[Row, ...] = ()


@dataclass
class Mirror:
    """One model's. `offer` is called for every answered request and keeps few; `ask` puts one of them to another version."""

    metric: str
    floor: float
    kept: deque[Seen] = field(default_factory=lambda: deque(maxlen=WAITING))
    every_s: float = EVERY_S
    opens_at: float = 0.0
    usual: dict[int, float] = field(default_factory=dict)
    """Shares of golden's classes on the reference."""
    classes: Counter[int] = field(default_factory=Counter)
    short: dict[str, list[tuple[Any, Any]]] = field(default_factory=dict)
    """By version, answers (golden's, its own) of too few values to be compared alone."""

    def offer(self, request: InferenceRequest, result: InferenceResult) -> None:
        """Perhaps keep one answered request; a clock reading where its time has not come."""
        now = monotonic()
        if now < self.opens_at or request.caller == OWN:
            return
        asked, size = _size(request.inputs), _size(request.inputs) + _size(result.outputs)
        self.opens_at = now + self.every_s * max(
            1.0, size / MOST_BYTES
        )  # copies are made between two requests: of large answers there are fewer
        if asked > MOST_BYTES or size > MOST_KEPT or any(0 in tensor.shape for tensor in result.outputs):
            return  # too large, or no rows and nothing to compare
        while self.kept and sum(seen.size for seen in self.kept) + size > MOST_KEPT:
            self.kept.popleft()
        self.kept.append(Seen(_copied(request.inputs), request.outputs, _copied(result.outputs), result.version))

    def note(self, seen: Seen) -> bool:
        """Count the class that a live request was given (old ones fade); False where the answer holds NaN or infinity."""
        import numpy as np

        arrays = [to_array(tensor) for tensor in seen.answer]
        well = all(bool(np.isfinite(array).all()) for array in arrays if array.dtype.kind == "f")
        if not self.usual or not well:
            return well
        scores = arrays[0]
        if scores.dtype.kind == "f" and scores.ndim and scores.shape[-1] > 1:
            self.classes.update(int(best) for best in scores.reshape(-1, scores.shape[-1]).argmax(-1))
        if self.classes.total() > 2 * DRIFT_SAMPLES:
            self.classes = Counter({group: count // 2 for group, count in self.classes.items()})
        return well

    @property
    def drift(self) -> float | None:
        """Population stability index of the predicted classes against the reference's; None with too few. Above 0.25 it is another traffic."""
        total = self.classes.total()
        if not self.usual or total < LEAST_DRIFT:
            return None
        groups = self.usual.keys() | self.classes.keys()
        even = 0.5 / len(groups)
        shares = [((self.classes[g] + even) / (total + 0.5), max(even / total, self.usual.get(g, 0.0))) for g in groups]
        return sum((now - before) * math.log(now / before) for now, before in shares)

    async def ask(self, seen: Seen, engine: Answering, version: str, golden: list[Tensor] | None = None) -> tuple[Compared, list[Tensor]]:
        """Put `seen` to `engine`. Without `golden`, the engine is golden and the live answer is judged by it; else the engine's answer is."""
        try:
            request = InferenceRequest(seen.inputs, "mirror", seen.outputs, deadline=monotonic() + CALL_S, caller=OWN, priority=1 << 30)
            result = await engine.infer(request)
        except HoneError:
            return Compared(version, 0.0, 0.0), []
        first, other = (result.outputs, seen.answer) if golden is None else (golden, result.outputs)
        agreed, rows = await asyncio.to_thread(lambda: (self.agreement(first, other, version), self.rows(first, other)))
        return Compared(version, agreed, result.cpu_s, rows), result.outputs

    def agreement(self, golden: Sequence[Tensor], other: Sequence[Tensor], version: str = "") -> float | None:
        """The share of its rows that agree, by the output that is judged offline as well: in their class for classifiers, else by cosine or SQNR
        against the floor. Texts must be the same.

        Of a regression's one number the cosine is its sign: such answers of `version` are taken together, SHORT_ROW values at a time. None until
        there are as many.
        """
        import numpy as np

        from optimizers.fidelity import closeness, judged_output, predicted

        arrays, others = ({tensor.name: _rows_of(tensor) for tensor in tensors} for tensors in (golden, other))
        if arrays.keys() != others.keys():
            return 0.0
        name = judged_output(arrays, self.metric)
        first, second = arrays[name], others[name]
        if first.shape != second.shape:
            return 0.0
        if first.dtype.kind not in "fiub":
            return float(np.array_equal(first, second))
        if first.dtype.kind == "f" and np.isfinite(first).all() and not np.isfinite(second).all():
            return 0.0
        if self.metric in ("agreement", "accuracy"):
            return float((predicted(first) == predicted(second)).mean())
        if self.metric == "cosine":
            together = self._with_earlier(version, first, second)
            if together is None:
                return None
            first, second = together
        return float((closeness(first, second, self.metric) >= self.floor).mean())

    def _with_earlier(self, version: str, golden: Any, other: Any) -> tuple[Any, Any] | None:
        """Rows that are long enough; of shorter ones those that came before as well, once they are enough together."""
        import numpy as np

        from optimizers.fidelity import SHORT_ROW

        if golden[0].size >= SHORT_ROW:
            return golden, other
        kept = self.short.setdefault(version, [])
        if kept and kept[0][0].shape[1:] != golden.shape[1:]:
            kept.clear()
        kept.append((golden, other))
        if sum(pair[0].size for pair in kept) < SHORT_ROW:
            return None
        del self.short[version]
        first, second = (np.concatenate([pair[side] for pair in kept]) for side in (0, 1))
        return first, second

    def rows(self, golden: Sequence[Tensor], other: Sequence[Tensor]) -> tuple[Row, ...]:
        """How sure both are of each row's classes; nothing where the first output is no finite scores [n, classes] on both sides."""
        import numpy as np

        first, second = to_array(golden[0]), to_array(other[0])
        if self.metric not in ("agreement", "accuracy") or first.shape != second.shape or first.ndim != 2 or first.shape[1] < 2:
            return ()
        if first.dtype.kind != "f" or not (np.isfinite(first).all() and np.isfinite(second).all()):
            return ()
        groups, same = first[:MOST_ROWS].argmax(1), first[:MOST_ROWS].argmax(1) == second[:MOST_ROWS].argmax(1)
        (entropy, margin), (other_entropy, other_margin) = (_sureness(scores[:MOST_ROWS].astype(np.float64)) for scores in (first, second))
        columns = (groups, same, entropy, other_entropy, margin, other_margin)
        return tuple(Row(*row) for row in zip(*(column.tolist() for column in columns), strict=True))


def _sureness(scores: Any) -> tuple[Any, Any]:
    """Entropy (nats) and margin of each row's probabilities."""
    import numpy as np

    from app.catalog.processing import activate

    p = np.clip(activate(scores, "auto"), 0.0, 1.0)
    best = np.sort(p, axis=1)
    return -(p * np.log(np.maximum(p, 1e-12))).sum(1), best[:, -1] - best[:, -2]


def _rows_of(tensor: Tensor) -> Any:
    """Its values with an axis of rows, which a lone number has not."""
    array = to_array(tensor)
    return array if array.ndim else array.reshape(1)


def _size(tensors: Sequence[Tensor]) -> int:
    return sum(len(tensor.data) for tensor in tensors)


def _copied(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The same on memory of their own: a request's body is given back once it is answered."""
    return [Tensor(t.name, t.datatype, t.shape, bytes(t.data)) for t in tensors]
