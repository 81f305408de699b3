"""True labels that come later: remembers what lately answered requests were given, and tells the sensor whether that was right.

Each request counts once; labels raise a suspicion at most. Nothing is remembered unless the operator set a token for it.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from typing import Final

from app.catalog.tensors import to_array
from app.domain import InferenceResult
from app.errors import Conflict, InvalidRequest, NotFound
from app.telemetry.window import Window

REMEMBERED: Final = 20_000


class Feedback:
    """One per server; the newest answers of all models."""

    def __init__(self, window: Window) -> None:
        self._window = window
        self._answers: OrderedDict[tuple[str, str], tuple[str, InferenceResult | None]] = OrderedDict()

    def remember(self, model: str, request_id: str, result: InferenceResult) -> None:
        """Keep a small answer until its label comes; a repeated id stands for the latest."""
        if request_id and len(result.outputs[0].data) <= 65_536:
            self._answers[model, request_id] = (result.version, result)
            if len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)

    def label(self, model: str, request_id: str, label: str | int, labels: Sequence[str]) -> bool:
        """Whether the answer's top class was `label` (its number, or its name). Raises NotFound, Conflict for a second one, InvalidRequest."""
        known = self._answers.get((model, request_id))
        if known is None:
            raise NotFound(f"no answer of model {model!r} is remembered under request id {request_id!r}: only the latest {REMEMBERED} are")
        version, result = known
        if result is None:
            raise Conflict(f"request {request_id!r} was labelled already; each counts once")
        scores = to_array(result.outputs[0])
        if scores.dtype.kind != "f" or scores.shape[-1] < 2 or scores.size != scores.shape[-1]:
            raise InvalidRequest(f"request {request_id!r} has no one row of scores that a label could be held against")
        number = _number(label, labels, scores.shape[-1])
        self._answers[model, request_id] = (version, None)
        right = int(scores.reshape(-1).argmax()) == number
        self._window.labelled(model, version, right)
        return right


def _number(label: str | int, labels: Sequence[str], classes: int) -> int:
    if isinstance(label, str) and label in labels:
        return list(labels).index(label)
    if isinstance(label, int) or label.isdigit():
        number = int(label)
        if 0 <= number < classes:
            return number
    raise InvalidRequest(f"label {label!r} is neither the number of a class (0 to {classes - 1}) nor one of its names")
