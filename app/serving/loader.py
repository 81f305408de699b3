"""Starts and stops the engine of an admitted version: room in memory, a session, a warm-up, and golden's outputs compared before it serves.

Knows engines and the memory ledger; which version ought to run is the reconciler's to say.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic
from typing import Any, Final

from app.catalog.model_config import ModelConfig
from app.catalog.tensors import to_array, to_tensor
from app.domain import OWN, InferenceRequest, RuntimeSettings, Tensor
from app.errors import DeadlineExceeded, HoneError, InsufficientStorage, ModelRejected
from app.serving.admission import KEPT_ROWS, Admitted
from app.serving.at_work import AtWork, Mark
from app.serving.engine import BatchReport, Engine, RunnerSpec
from app.serving.forkserver import ForkServer
from app.serving.ledger import CoreLedger
from app.serving.quarantine import Quarantine
from app.serving.slot import Loaded
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window

log = logging.getLogger("hone.serving")
CHECK_S: Final = 20.0
OOM_ACTIVE, OOM_WARM, OOM_CANDIDATE = 300, 500, 700
PLACE_S: Final = 10.0
"""So long a load keeps one of the places; most are done in one."""
RUNNER_BYTES: Final = 24 << 20
PRECISE_INT8: Final = "session.x64quantprecision"
WEIGHTS_FACTOR: Final = 2.5
"""A session holds the weights, a packed copy of most of them and its arena; measured on convolutional nets 1.6 to 2.4 times the file."""


class Disagrees(ModelRejected):
    """The version loads, but does not answer as golden does."""


class Loader:
    """One per server. `memory_limit` is what all runners together may take (bytes)."""

    def __init__(
        self, forkserver: ForkServer, ledger: CoreLedger, metrics: Metrics, window: Window, host_class: str, memory_limit: int,
        on_death: Callable[[str, str, str, int, tuple[str, ...]], None], at_work: AtWork | None = None,
    ) -> None:  # fmt: skip
        self._forkserver, self._ledger, self._metrics, self._window = forkserver, ledger, metrics, window
        self._memory_limit, self._on_death, self._at_work = memory_limit, on_death, at_work
        self.host_class = host_class
        self.replica = uuid.uuid4().hex[:8]
        self._taken: dict[int, int] = {}
        self._loading = asyncio.Semaphore(2)
        self._deadly: dict[tuple[str, str], tuple[Quarantine, set[str]]] = {}

    async def load(self, admitted: Admitted, settings: RuntimeSettings, generation: int, config: ModelConfig) -> Loaded:
        """A running engine that agrees with golden on the reference. Raises ModelRejected, InsufficientStorage or Unsupported.

        An int8 version that saturates in silence on this class of host is tried once more with the option that computes it rightly.
        """
        try:
            return await self._load(admitted, settings, generation, config)
        except Disagrees as disagreement:
            precise = with_precise_int8(settings)
            if admitted.precision != "int8" or precise == settings:
                raise
            log.warning("%s; trying %s", disagreement, PRECISE_INT8)
            loaded = await self._load(admitted, precise, generation, config)
            loaded.notes = (*loaded.notes, f"served with {PRECISE_INT8}: without it, it disagrees with golden on this host")
            return loaded

    async def compare(self, loaded: Loaded, config: ModelConfig) -> tuple[str, ...]:
        """Hold a version that serves already against golden's outputs; a disagreement is told in its notes."""
        try:
            return await self._agrees(loaded, config)
        except HoneError as error:
            return (str(error),)

    async def _load(self, admitted: Admitted, settings: RuntimeSettings, generation: int, config: ModelConfig) -> Loaded:
        async with self._place():
            key, lone = self._reserve(admitted, settings.has_lone and admitted.kind == "onnx")
            try:
                limit = (config.limits.memory_mb or 0) << 20 or max(64 << 20, self._memory_limit - self.taken_bytes + self._taken[key])
                spec = RunnerSpec(
                    model=admitted.model, version=admitted.version, generation=generation, kind=admitted.kind, path=str(admitted.path),
                    factory=admitted.factory, signature=admitted.signature, settings=settings, memory_limit_bytes=limit,
                    oom_score_adj=OOM_CANDIDATE, second_session=lone,
                )  # fmt: skip
                engine = await self._start(spec, config, *self._known_killers(admitted))
            except BaseException:
                self._taken.pop(key, None)
                raise
        loaded = Loaded(admitted, engine, settings, generation, 0.0, run_by=config.run_by, memory_mb=config.limits.memory_mb)
        self._taken[id(engine)] = self._taken.pop(key)
        try:
            loaded.notes = (*_takes_what_it_says(loaded), *await self._agrees(loaded, config))
            loaded.memory_bytes = await asyncio.to_thread(engine.memory_bytes)
            self._taken[id(engine)] = max(loaded.memory_bytes, self._taken[id(engine)] if lone else 0) or self._taken[id(engine)]
        except BaseException:
            await self.stop(loaded, 1.0)
            raise
        return loaded

    @contextlib.asynccontextmanager
    async def fresh(self, loaded: Loaded, config: ModelConfig, settings: RuntimeSettings | None = None) -> AsyncIterator[Engine]:
        """A second engine of the same version in a new process, with its settings or others, to hold against. Raises InsufficientStorage."""
        spec = loaded.engine.spec
        if settings is not None:
            spec = replace(spec, settings=settings, second_session=spec.second_session and settings.has_lone)
        key, _ = self._reserve(loaded.admitted, settings is not None and spec.second_session)
        try:
            engine = await self._start(spec, config)
            engine.firm = True
            try:
                yield engine
            finally:
                await engine.stop()
        finally:
            self._taken.pop(key, None)

    async def stop(self, loaded: Loaded, drain_s: float) -> None:
        """Answer what it has, bounded, then end its process."""
        with contextlib.suppress(HoneError):
            await loaded.engine.drain(drain_s)
        await loaded.engine.stop()
        self._taken.pop(id(loaded.engine), None)

    def ranked(self, loaded: Loaded, active: bool) -> None:
        """Tell the kernel who dies first when memory runs out: warm versions before active ones."""
        with contextlib.suppress(OSError):
            Path(f"/proc/{loaded.engine.pid}/oom_score_adj").write_text(str(OOM_ACTIVE if active else OOM_WARM))

    @property
    def taken_bytes(self) -> int:
        return sum(self._taken.values())

    @contextlib.asynccontextmanager
    async def _place(self) -> AsyncIterator[None]:
        """A place among the few that load at once, given back at the end, or before where a load takes long: one that hangs must not hold up others."""
        await self._loading.acquire()
        place = contextlib.ExitStack()
        place.callback(self._loading.release)
        timer = asyncio.get_running_loop().call_later(PLACE_S, place.close)
        try:
            yield
        finally:
            timer.cancel()
            place.close()

    def _known_killers(self, admitted: Admitted) -> tuple[Quarantine, set[str]]:
        """What killed runners of these very weights, whichever engine had them: a reload or other settings let no input kill again."""
        return self._deadly.setdefault((admitted.model, admitted.sha256), (Quarantine(), set()))

    async def _start(
        self, spec: RunnerSpec, config: ModelConfig, quarantine: Quarantine | None = None, killers: set[str] | None = None
    ) -> Engine:
        mark = self._at_work.mark(spec.model, spec.version) if self._at_work is not None else Mark()
        try:
            async with asyncio.timeout(config.limits.load_timeout_s):
                with mark.loading():
                    return await Engine.start(
                        spec, forkserver=self._forkserver, ledger=self._ledger, observer=partial(self._batch, spec.model, spec.version),
                        on_death=partial(self._on_death, spec.model, spec.version), quarantine=quarantine, killers=killers, mark=mark,
                    )  # fmt: skip
        except TimeoutError:
            raise ModelRejected(
                f"{spec.model}:{spec.version} was not ready within {config.limits.load_timeout_s:.0f} s (limits.load_timeout_s in model.yaml)"
            ) from None

    def _batch(self, model: str, version: str, seen: BatchReport) -> None:
        self._metrics.batch(model, version, seen.rows, seen.compute_s)
        self._window.called(model, version, seen.rows, seen.row_bytes, seen.compute_s, seen.cpu_s, seen.wait_s)

    def _reserve(self, admitted: Admitted, lone: bool) -> tuple[int, bool]:
        """Book what the version will need, so that two loads at once cannot both take the last room; and whether a second session fits.

        A session for lone calls holds the weights again: a luxury, for while half of the memory stays free.
        """
        known = admitted.proof.detail.get("memory_bytes") if admitted.proof is not None else None
        need = int(known) if isinstance(known, int | float) else RUNNER_BYTES + int(WEIGHTS_FACTOR * admitted.card.bytes)
        free = self._memory_limit - self.taken_bytes
        if need > free:
            raise InsufficientStorage(
                f"{admitted.model}:{admitted.version} needs about {need >> 20} MiB of memory, {max(0, free) >> 20} of {self._memory_limit >> 20} MiB are free; "
                "unload another model, or raise HONE_MEMORY_BYTES"
            )
        key = hash((admitted.model, admitted.version, monotonic()))
        lone = lone and self.taken_bytes + 2 * need < self._memory_limit // 2
        self._taken[key] = 2 * need if lone else need
        return key, lone

    async def _agrees(self, loaded: Loaded, config: ModelConfig) -> tuple[str, ...]:
        """Run reference rows through the new engine and hold them against golden's stored outputs."""
        reference = loaded.admitted.reference
        if reference is None:
            return ("not compared with golden's outputs yet: no reference is frozen",) if not loaded.admitted.is_golden else ()
        names = [spec.name for spec in loaded.admitted.signature.outputs]
        rows = min(KEPT_ROWS if loaded.admitted.proof is not None or loaded.admitted.is_golden else 1024, len(reference))
        reference = await asyncio.to_thread(reference.first, rows)
        stacked = reference.samples.stacked
        got: dict[str, list[Any]] = {name: [] for name in names}
        until = monotonic() + CHECK_S
        done = 0
        for row in range(rows):
            if done and monotonic() > until:
                break
            tensors = [
                self._one(loaded, name, values[row : row + 1] if stacked else values[row])
                for name, values in reference.samples.inputs.items()
            ]
            within = until if done else monotonic() + config.limits.load_timeout_s
            try:
                result = await loaded.engine.infer(InferenceRequest(tensors, "check", deadline=within, caller=OWN))
            except DeadlineExceeded:
                if not done:
                    raise
                break  # its calls take seconds: what was compared by now is what there is time for
            for tensor in result.outputs:
                got[tensor.name].append(_row(to_array(tensor), stacked, reference.outputs[tensor.name].shape[1:]))
            done += 1
        expected = {name: reference.outputs[name][:done] for name in names}
        return await asyncio.to_thread(held_against_golden, loaded.admitted, config, expected, got)

    def _one(self, loaded: Loaded, name: str, values: Any) -> Tensor:
        spec = next(spec for spec in loaded.admitted.signature.inputs if spec.name == name)
        return to_tensor(name, spec.datatype, values)


def _takes_what_it_says(loaded: Loaded) -> tuple[str, ...]:
    """A note where a PyTorch model failed on what model.yaml says that it takes; with free sizes, 1 may just be too small for it."""
    inputs = loaded.admitted.signature.inputs
    errors = [run["error"] for run in loaded.engine.opened.warm_up if run["rows"] == 1]
    if loaded.admitted.kind != "torch" or not errors or not all(errors) or any(-1 in spec.shape[1:] for spec in inputs):
        return ()
    taken = ", ".join(f"{spec.name!r} {spec.datatype} {list(spec.shape)}" for spec in inputs)
    note = f"it failed on ones and on zeros as its inputs ({taken}): {errors[0]}; is source.inputs in model.yaml right?"
    log.warning("%s:%s: %s", loaded.admitted.model, loaded.version, note)
    return (note,)


def _row(array: Any, stacked: bool, row_shape: tuple[int, ...]) -> Any:
    """One sample's entry among the outputs. A whole call whose first axis is 1 has its axis of samples there already, as golden's has."""
    whole_row = array.ndim > 1 and array.shape[0] == 1 and array.shape[1:] == row_shape
    return array[0] if stacked or whole_row else array


def held_against_golden(admitted: Admitted, config: ModelConfig, expected: dict[str, Any], got: dict[str, list[Any]]) -> tuple[str, ...]:
    """Notes on the comparison. Raises ModelRejected where the version answers otherwise than it may on this host."""
    import numpy as np

    from optimizers.fidelity import Floor, Met, judge

    try:
        arrays = {name: np.stack(values) for name, values in got.items()}
    except ValueError:
        raise ModelRejected(f"{admitted.model}:{admitted.version} answers reference samples with outputs of differing shapes") from None
    for name, values in expected.items():
        if arrays[name].shape != np.asarray(values).shape:
            raise ModelRejected(
                f"{admitted.model}:{admitted.version}: output {name!r} has shape {list(arrays[name].shape)} on the reference, golden's has {list(np.shape(values))}"
            )
    metric, least = config.quality.resolved(config.task)
    proven = admitted.proof is not None or admitted.is_golden
    count = len(next(iter(expected.values())))
    numeric = {name: np.asarray(values) for name, values in expected.items() if np.asarray(values).dtype.kind in "fiub"}
    if not numeric:
        same = all(np.array_equal(arrays[name], expected[name]) for name in expected)
        if not same:
            raise ModelRejected(f"{admitted.model}:{admitted.version} answers other texts than golden on the reference samples")
        return ()
    floor = Floor("agreement" if metric == "accuracy" else metric, least, min_samples=1)
    fidelity = judge(numeric, {name: arrays[name] for name in numeric}, floor)
    said = f"{fidelity.metric} with golden {fidelity.value:.4g} on {count} reference samples"
    if fidelity.more_non_finite:
        raise ModelRejected(f"{admitted.model}:{admitted.version} answers NaN or infinity on reference samples where golden does not")
    enough = fidelity.met is Met.MET if not proven else fidelity.high >= least
    if not enough:
        raise Disagrees(
            f"{admitted.model}:{admitted.version} does not agree with golden on this host ({said}, floor {least:g}); "
            f"prove it here with: hone verify {admitted.model}:{admitted.version}"
        )
    return () if proven else (f"unproven on this class of host; quick check passed: {said}",)


def with_precise_int8(settings: RuntimeSettings) -> RuntimeSettings:
    """The option under which 8-bit kernels without VNNI do not saturate: slower, and right."""
    options = dict(settings.session_options) | {PRECISE_INT8: "1"}
    return replace(settings, session_options=tuple(sorted(options.items())))
