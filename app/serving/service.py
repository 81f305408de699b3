"""The hot path, one screen: find the version, let its engine answer, tell the sinks. It knows no HTTP and no files."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from time import monotonic
from typing import Final

from app.catalog.processing import Processor
from app.domain import InferenceRequest, InferenceResult, Observation, Signature
from app.errors import (
    CallerLimited,
    Cancelled,
    CannotMeetDeadline,
    DeadlineExceeded,
    HoneError,
    ModelFailed,
    NotFound,
    NotReady,
    PayloadTooLarge,
    Quarantined,
    QueueFull,
    RunnerLost,
)
from app.serving.engine import Engine
from app.serving.feedback import Feedback
from app.serving.slot import Loaded, Slot, asked_alike
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window

Observer = Callable[[Observation], None]
_REASONS: Final[dict[type[HoneError], str]] = {
    QueueFull: "queue_full",
    CallerLimited: "caller_limited",
    DeadlineExceeded: "deadline",
    CannotMeetDeadline: "deadline_unreachable",
    NotReady: "not_ready",
    Cancelled: "cancelled",
    PayloadTooLarge: "too_large",
    Quarantined: "quarantined",
}
REJECTIONS: Final = tuple(_REASONS.values())
_ANOTHER_MAY_ANSWER: Final = (NotReady, ModelFailed, RunnerLost, Quarantined, QueueFull, CannotMeetDeadline)


class InferenceService:
    """All slots by model name. `infer` is what every door (protocol, predict) calls."""

    def __init__(self, default_timeout_s: float, metrics: Metrics, window: Window) -> None:
        self._metrics = metrics
        self.window = window
        self.slots: dict[str, Slot] = {}
        self.complete = True
        """Whether every model that there is has its slot; False while a server starts and has not looked yet."""
        self.feedback: Feedback | None = None
        self._default_timeout_s = default_timeout_s
        self._observers: tuple[Observer, ...] = ()

    def watch(self, observer: Observer) -> None:
        """Hand every finished request's Observation to `observer` too."""
        self._observers = (*self._observers, observer)

    async def infer(
        self, model: str, version: str | None, request: InferenceRequest, headers: Mapping[bytes, bytes] | None = None
    ) -> InferenceResult:
        """Answer one validated request. Raises the errors of app.errors; cancelling the caller's task drops queued work."""
        return await self.run(self.loaded(model, version, headers), request, version is not None)

    async def run(self, loaded: Loaded, request: InferenceRequest, named: bool = False) -> InferenceResult:
        """The same for a version that was leased before the request was parsed; `named`: the caller wants that one and no other."""
        if request.deadline is None and self._default_timeout_s:
            request.deadline = monotonic() + self._default_timeout_s
        slot = self.slots.get(loaded.admitted.model)
        try:
            try:
                result = await loaded.engine.infer(request)
            except _ANOTHER_MAY_ANSWER as error:
                instead = self._instead(slot, loaded, error, named)
                if instead is None:
                    raise
                loaded = instead
                result = await loaded.engine.infer(request)
        except HoneError as error:
            error.version = loaded.version
            raise
        result.generation = loaded.generation
        if slot is not None:
            slot.reservoir.offer(request.inputs, result.outputs, request.caller)
            if slot.mirror is not None:
                slot.mirror.offer(request, result)
            if self.feedback is not None:
                self.feedback.remember(slot.name, request.request_id, result)
        return result

    def _instead(self, slot: Slot | None, loaded: Loaded, error: HoneError, named: bool) -> Loaded | None:
        """Who answers what `loaded` could not: its next generation, or the active version where the caller named none.

        So nobody meets the failures of a version on trial, or the end of one that was replaced while the request came; they count against it.
        """
        if slot is None:
            return None
        current = slot.versions.get(loaded.version)
        if isinstance(error, NotReady) and current is not None and current is not loaded and asked_alike(current, loaded):
            return current  # replaced by a new generation of the same version since it was leased
        active = slot.active
        if named or active is None or active is loaded or not asked_alike(active, loaded):
            return None
        lower = loaded is slot.rung or (slot.neighbours is not None and loaded is slot.neighbours.below)
        if lower and not isinstance(error, NotReady | RunnerLost):
            return None
        if slot.split is not None and slot.split.loaded is loaded:
            self.window.failed(slot.name, loaded.version)
        return active

    def observe(self, observation: Observation) -> None:
        for observer in self._observers:
            observer(observation)

    def refused(self, observation: Observation, error: HoneError) -> None:
        """Count what was refused before it ran, by reason."""
        reason = _REASONS.get(type(error))
        if reason is not None:
            self._metrics.count("hone_rejections", observation.model, reason)
        if isinstance(error, ModelFailed) and observation.model:
            self.window.model_failed(observation.model, observation.version)

    def saw_non_finite(self, model: str, version: str, asked_with: bool) -> None:
        """An answer holds NaN or infinity; `asked_with`: so did the request, which says nothing of the version."""
        self._metrics.count("hone_nonfinite_outputs", model, version)
        if asked_with:
            self._metrics.count("hone_nonfinite_inputs", model, version)
        self.window.answered_non_finite(model, version, asked_with)

    def label(self, model: str, version: str | None, error: HoneError | None = None) -> tuple[str, str]:
        """Model and version to count a refusal under: whose `error` it is, else who would have answered.

        Unknown names are not labels, so that nobody can make series without end.
        """
        slot = self.slots.get(model)
        if slot is None:
            return "", ""
        version = (error.version if error is not None else "") or version
        if version is None:
            loaded = slot.rung or slot.active
            return model, loaded.version if loaded is not None else ""
        return model, version if version in slot.known else ""

    def slot(self, model: str) -> Slot:
        slot = self.slots.get(model)
        if slot is None and not self.complete:
            raise NotReady(f"the server is starting and has not looked for {model!r} yet; retry in a moment")
        if slot is None:
            raise NotFound(f"no model {model!r} here; GET /admin/models or POST /v2/repository/index lists what there is")
        return slot

    def loaded(self, model: str, version: str | None, headers: Mapping[bytes, bytes] | None = None) -> Loaded:
        """The version that answers. With a request's headers it may be one on trial, whose share of the requests is due."""
        slot = self.slot(model)
        return slot.route(headers) if version is None and headers is not None else slot.lease(version)

    def admit(self, model: str, version: str | None) -> Signature:
        """What a request must look like. Raises what would refuse it whatever it asks (no such model, loading, queue full), before its body is read."""
        loaded = self.loaded(model, version)
        loaded.engine.refuse_if_full()
        return loaded.admitted.signature

    def processor(self, model: str) -> Processor:
        """Pre- and post-processing of the model's golden, shared by all its versions."""
        slot = self.slot(model)
        slot.lease(None)
        if slot.processor is None:
            raise NotReady(f"model {model!r} is not ready: {slot.misfit or 'its pre- and post-processing is being read'}")
        return slot.processor

    # ---- for those who watch
    def engines(self) -> Iterator[tuple[tuple[str, str], str, str, Engine]]:
        for slot in self.slots.values():
            for loaded in slot.versions.values():
                yield (slot.name, loaded.version), loaded.admitted.optimizer, loaded.admitted.precision, loaded.engine

    def readiness(self) -> Iterator[tuple[str, bool]]:
        for slot in self.slots.values():
            yield slot.name, slot.ready

    def loaded_keys(self) -> set[tuple[str, str]]:
        return {(slot.name, version) for slot in self.slots.values() for version in slot.versions}

    def remember_memory(self, key: tuple[str, str], memory_bytes: int) -> None:
        slot = self.slots.get(key[0])
        if slot is not None and key[1] in slot.versions:
            slot.versions[key[1]].memory_bytes = memory_bytes
