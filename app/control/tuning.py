"""Settings measured for one version: on an idle host by the task `tune`, else in fresh runners beside the traffic. It changes nothing."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import asdict
from typing import Any, Final

from app.catalog.rows import rows_by_word
from app.control.bench import Bench, Workpiece
from app.control.live_tune import Plane, concluded, layouts_of, lived_with
from app.control.verification import TUNE_S
from app.domain import JSON, RuntimeSettings
from app.errors import NotAllowed
from app.store.codec import settings_from_json
from optimizers.artifact import WEIGHTS_SUFFIX
from optimizers.samples import Samples

LEAST_NEWEST: Final = 8
Ask = Callable[[JSON, float], Awaitable[dict[str, Any]]]
Serves = Callable[[], Awaitable[str]]


class Tuning:
    """One per server. `measuring` is held while runners are compared, as by whoever else measures."""

    def __init__(self, bench: Bench, plane: Plane, measuring: asyncio.Lock) -> None:
        self._bench, self._plane, self._measuring = bench, plane, measuring

    async def tune(
        self, piece: Workpiece, version: str, before: RuntimeSettings, step: Mapping[str, Any], ask: Ask, serves: Serves, stopped: Callable[[], bool]
    ) -> tuple[RuntimeSettings | None, JSON]:  # fmt: skip
        """Measured settings of `version`, and the report; None where nothing better was found. `serves` says which version answers now.

        `ask` runs the task, by its request and with at most so many seconds. Raises what both raise.
        """
        model = piece.found.name
        path = self._bench.model_path(piece, version)
        if path.suffix == WEIGHTS_SUFFIX:
            raise NotAllowed(
                f"version {version} of {model!r} is a PyTorch version, whose settings are not measured; build one for ONNX Runtime and tune that: "
                f"hone optimize {model} --with export,tune"
            )
        runtime = piece.config.runtime
        fixed = {
            "intra_op_threads": runtime.threads,
            "instances": runtime.instances,
            "spin_duration_us": runtime.spin_us,
            "batch_limit": piece.config.batching.limit,
        }
        objective = step.get("objective") or piece.config.tune_for
        live = objective == "latency" and version == await serves()
        with self._bench.scratch() as folder:
            inputs = await self._inputs_of_now(model, piece)
            await asyncio.to_thread(inputs.save, folder / "inputs.npz")
            request = {
                "path": str(path),
                "samples": str(folder / "inputs.npz"),
                "stacked": inputs.stacked,
                "settings": asdict(before),
                "fixed": [name for name, value in fixed.items() if value is not None],
                "elsewhere": live,
                "batchable": rows_by_word(piece.golden.rows, piece.golden.signature, piece.config).independent,
                "config": {"objective": objective, **{k: v for k, v in step.items() if k in {"max_seconds", "cores"} and v}},
            }
            report = await ask(request, TUNE_S * 4 + 60)
        layouts = layouts_of(report, before) if live and report.get("verdict") == "inconclusive" else []
        if layouts and version == await serves():  # never idle: beside the traffic, then, as they would be lived with
            async with self._measuring:
                lived = await lived_with(self._plane, model, before, layouts, inputs, stopped)
            report = concluded(report, before, lived)
        settings = report.get("settings")
        if not report.get("changed", True) or not settings:
            return None, report
        decided = {key: value for key, value in fixed.items() if value is not None}
        return settings_from_json({**asdict(before), **settings, **decided}), report

    async def _inputs_of_now(self, model: str, piece: Workpiece) -> Samples:
        """What settings are measured with: requests that come now, of their commonest form, where enough come; else frozen or calibrating ones."""
        newest = max(await self._plane.newest(model), key=len, default=None)
        if newest is not None and len(newest) >= LEAST_NEWEST:
            return newest
        sets = piece.samples
        return next(samples for samples in (sets.reference, sets.live, sets.calibration) if samples is not None and len(samples))
