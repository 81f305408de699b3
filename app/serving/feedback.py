"""True labels that come later: remembers what lately answered requests were given, and tells the sensor whether that was right.

Each request counts once; labels raise a suspicion at most. Nothing is remembered unless the operator set a token for it.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Final

from app.catalog.tensors import FLOATS, to_array
from app.domain import InferenceResult
from app.errors import Conflict, InvalidRequest, NotFound
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window

REMEMBERED: Final = 20_000


@dataclass(slots=True)
class Answer:
    """What one request was given: the top class of `classes`; 0 of them where the answer is no row of scores."""

    version: str
    top: int
    classes: int
    labelled: bool = False


class Feedback:
    """One per server; the newest answers of all models."""

    def __init__(self, window: Window, metrics: Metrics) -> None:
        self._window, self._metrics = window, metrics
        self._answers: OrderedDict[tuple[str, str], Answer] = OrderedDict()

    def remember(self, model: str, request_id: str, result: InferenceResult) -> None:
        """Keep an answer's top class until its label comes; a repeated id stands for the latest."""
        if request_id:
            self._answers[model, request_id] = Answer(result.version, *_top(result))
            if len(self._answers) > REMEMBERED:
                self._answers.popitem(last=False)

    def label(self, model: str, request_id: str, label: str | int, labels: Sequence[str]) -> bool:
        """Whether the answer's top class was `label` (its number, or its name). Raises NotFound, Conflict for a second one, InvalidRequest."""
        known = self._answers.get((model, request_id))
        if known is None:
            raise NotFound(f"no answer of model {model!r} is remembered under request id {request_id!r}: only the latest {REMEMBERED} are")
        if known.labelled:
            raise Conflict(f"request {request_id!r} was labelled already; each counts once")
        if not known.classes:
            raise InvalidRequest(f"request {request_id!r} has no one row of scores that a label could be held against")
        right = known.top == _number(label, labels, known.classes)
        known.labelled = True
        self._window.labelled(model, known.version, right)
        for answer in ("right", "wrong"):  # both from the first label on: a share needs the other side, even if it is none
            self._metrics.count("hone_labelled_answers", model, known.version, answer, by=float((answer == "right") == right))
        return right


def _top(result: InferenceResult) -> tuple[int, int]:
    """(the likeliest class, how many there are) of one row of scores; (0, 0) where the answer is something else."""
    scores = result.outputs[0]
    if scores.datatype not in FLOATS or not scores.shape or scores.shape[-1] < 2 or math.prod(scores.shape) != scores.shape[-1]:
        return 0, 0
    return int(to_array(scores).argmax()), scores.shape[-1]


def _number(label: str | int, labels: Sequence[str], classes: int) -> int:
    if isinstance(label, str) and label in labels:
        return list(labels).index(label)
    if isinstance(label, int) or label.isdecimal():  # "²" is a digit, and no number
        number = int(label)
        if 0 <= number < classes:
            return number
    raise InvalidRequest(f"label {label!r} is neither the number of a class (0 to {classes - 1}) nor one of its names")
