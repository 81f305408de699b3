"""The service's own errors. Each says what happened and what to do; none knows about HTTP (app.api.errors maps them)."""

from __future__ import annotations


class HoneError(Exception):
    """Base of every error that a caller may see: its text names the value, the rule and the remedy."""

    version = ""
    """Of the model: whose failure it is, where a version had the request already."""


class InvalidRequest(HoneError):
    """The request itself is wrong: malformed body, wrong name, datatype, shape or size."""


class PayloadTooLarge(HoneError):
    """A body, header block, image or unpacked body passes a configured bound."""


class NotFound(HoneError):
    """No such model, version, job or sample set."""


class NotReady(HoneError):
    """The model or version exists but cannot answer now; the text says why and what makes it ready."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class QueueFull(HoneError):
    """The bounded queue of a model is full."""

    def __init__(self, message: str, retry_after_s: float) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class CallerLimited(QueueFull):
    """One caller has most of what waits: it waits outside, so that others are served as ever. It says nothing of the model or of the load."""


class DeadlineExceeded(HoneError):
    """The request's deadline passed while it was queued or running."""


class CannotMeetDeadline(DeadlineExceeded):
    """Refused at once: by the measured service rate and the queue before it, the deadline cannot be met."""


class Cancelled(HoneError):
    """The client left before its answer was ready."""


class RunnerLost(HoneError):
    """The runner died or hung with this request in it, and the retry did not answer either."""

    def __init__(self, message: str, retry_after_s: float = 1.0) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class ModelFailed(HoneError):
    """The model itself raised an error on this request when it was run alone."""


class Quarantined(HoneError):
    """This very input killed a runner when run alone; it is not tried again."""


class Conflict(HoneError):
    """The state changed underneath: golden replaced, model deleted, generation moved on, job already finished."""


class NotAllowed(HoneError):
    """Refused by policy: capability switched off, folder not allowed, frozen model."""


class Unauthorized(HoneError):
    """No token, or a wrong one."""


class InsufficientStorage(HoneError):
    """Not enough room on disk or in the memory ledger for what was asked."""


class Unsupported(HoneError):
    """The thing is well formed but this server cannot do it (an extra is missing, a codec is unknown)."""


class ModelRejected(HoneError):
    """A model file or model.yaml was checked and refused; the text names the file, key or node."""


class UnsupportedMediaType(InvalidRequest):
    """The body's content type is none that this model takes; the text lists those that it does."""
