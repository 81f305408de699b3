"""Who answers where the version that was asked cannot, and whose failure it is: real engines in a slot."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from pathlib import Path
from time import monotonic
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from onnx import helper

from app.catalog.model_config import ModelConfig
from app.catalog.samples import Reference, ReferenceMeta, Reservoir
from app.domain import Event, Generation, InferenceRequest, InferenceResult, ModelState, RuntimeSettings, Tensor
from app.errors import DeadlineExceeded, NotReady, Quarantined, QueueFull
from app.serving.admission import KEPT_ROWS, Admitted
from app.serving.engine import Engine
from app.serving.forkserver import ForkServer
from app.serving.ledger import CoreLedger
from app.serving.loader import Loader
from app.serving.mirror import MOST_KEPT, Mirror, Seen
from app.serving.past_deaths import PastDeaths
from app.serving.reconcile import ModelReconciler
from app.serving.service import InferenceService
from app.serving.slot import Loaded, Neighbours, Share, Slot
from app.serving.vitals import MIRROR_SHARE, Vitals, _calls_in_a_slice, _take_turns
from app.serving.warm import expired
from app.telemetry.metrics import Metrics
from app.telemetry.window import Window
from optimizers.samples import Samples
from tests.engines import Start, anyio_backend, forkserver, request, start, tensor, until, values
from tests.models import KILLING_ROW, corrupt, endless, killer, save, scaled, signature_of, slow, value

__all__ = ["anyio_backend", "forkserver", "start"]
pytestmark = pytest.mark.anyio
Put = Callable[..., Awaitable[Loaded]]


@pytest.fixture
def slot(tmp_path: Path) -> Slot:
    return Slot("m", ModelConfig(), Reservoir(tmp_path / "captured"), known=("1", "1.1"))


@pytest.fixture
def service(slot: Slot) -> InferenceService:
    made = InferenceService(60.0, Metrics(), Window())
    made.slots["m"] = slot
    return made


@pytest.fixture
def put(slot: Slot, start: Start) -> Put:
    """put(version, path, ...): loaded, and in the slot."""

    async def load(version: str, path: Path, **settings: Any) -> Loaded:
        engine = await start(path, **settings)
        loaded = slot.versions[version] = loaded_of(version, engine)
        return loaded

    return load


def loaded_of(version: str, engine: Engine) -> Loaded:
    settings = engine.spec.settings
    return Loaded(admitted_of(version, Path(engine.spec.path), settings), engine, settings, 1, 0.0)


def admitted_of(version: str, path: Path, settings: RuntimeSettings) -> Admitted:
    card: Any = SimpleNamespace(bytes=path.stat().st_size)
    return Admitted("m", version, "onnx", path, "", signature_of(path), "s", "g", settings, card, None, None)


def subtracting(path: Path) -> Path:
    """Takes what `killer` takes, and kills nothing: y = x - d."""
    inputs = [value("x", "INT64", ["N"]), value("d", "INT64", ["N"])]
    return save(path, [helper.make_node("Sub", ["x", "d"], ["y"])], inputs, [value("y", "INT64", ["N"])])


def float32(array: Any) -> Any:
    return np.asarray(array, np.float32)


def failures(service: InferenceService, version: str) -> int:
    return service.window.totals("m", version).failures


async def on_trial(service: InferenceService, **arrays: Any) -> InferenceResult:
    loaded = service.loaded("m", None, {})
    assert loaded.version == "1.1"
    return await service.run(loaded, request(**arrays))


async def test_an_input_that_kills_a_version_on_trial_is_answered_by_the_active_one(
    service: InferenceService, slot: Slot, put: Put, tmp_path: Path
) -> None:
    slot.active = await put("1", subtracting(tmp_path / "1.onnx"))
    slot.split = Share(await put("1.1", killer(tmp_path / "2.onnx")), 1.0, "canary")
    x, d = KILLING_ROW
    for count in (1, 2):  # found out, then known
        result = await on_trial(service, x=np.array([x], np.int64), d=np.array([d], np.int64))
        assert result.generation == 1 and values(result)[0] == x - d
        await until(lambda: slot.split is not None and slot.split.loaded.engine.alive)
        assert failures(service, "1.1") == count and failures(service, "1") == 0
    with pytest.raises(Quarantined) as refused:
        await service.infer("m", "1.1", request(x=np.array([x], np.int64), d=np.array([d], np.int64)))
    assert service.label("m", "1.1", refused.value) == ("m", "1.1")


async def test_a_full_queue_of_a_version_on_trial_refuses_nobody(service: InferenceService, slot: Slot, put: Put, tmp_path: Path) -> None:
    slot.active = await put("1", scaled(tmp_path / "1.onnx", 2.0))
    slot.split = Share(await put("1.1", scaled(tmp_path / "2.onnx", 3.0), queue_limit=0), 1.0, "canary")
    row = [[1.0, 1.0, 1.0, 1.0]]
    assert values(await on_trial(service, x=float32(row)))[0, 0] == 2.0
    assert failures(service, "1.1") == 1
    with pytest.raises(QueueFull):
        await service.infer("m", "1.1", request(x=float32(row)))


async def test_a_deadline_that_a_version_on_trial_misses_is_its_own(
    service: InferenceService, slot: Slot, put: Put, tmp_path: Path
) -> None:
    slot.active = await put("1", endless(tmp_path / "1.onnx"))
    slot.split = Share(await put("1.1", endless(tmp_path / "2.onnx")), 1.0, "canary")
    slow = request(x=float32([1.0]), n=np.array([3_000_000], np.int64), deadline=monotonic() + 0.1)
    with pytest.raises(DeadlineExceeded) as late:
        await service.run(service.loaded("m", None, {}), slow)
    assert service.label("m", None, late.value) == ("m", "1.1") and service.label("m", None) == ("m", "1")


async def test_a_rung_whose_runner_is_down_is_passed_over(service: InferenceService, slot: Slot, put: Put, tmp_path: Path) -> None:
    slot.active = await put("1", scaled(tmp_path / "1.onnx", 2.0))
    slot.rung = await put("1.1", scaled(tmp_path / "2.onnx", 3.0))
    assert service.loaded("m", None) is slot.rung
    await slot.rung.engine.stop()
    assert service.loaded("m", None) is slot.active


async def test_what_the_version_below_refuses_is_not_put_to_the_one_that_is_full(
    service: InferenceService, slot: Slot, put: Put, tmp_path: Path
) -> None:
    slot.active = await put("1", scaled(tmp_path / "1.onnx", 2.0))
    below = await put("1.1", scaled(tmp_path / "2.onnx", 3.0), queue_limit=0)
    slot.neighbours = Neighbours(slot.active, None, below)
    slot.most_s = -1.0  # whatever waits is too much
    row = float32([[1.0, 1.0, 1.0, 1.0]])
    with pytest.raises(QueueFull) as full:
        await service.infer("m", None, request(x=row))
    assert full.value.version == "1.1"
    await below.engine.stop()
    assert values(await service.infer("m", None, request(x=row)))[0, 0] == 2.0


async def test_what_is_unloaded_while_a_request_comes_is_answered_by_the_active_version(
    service: InferenceService, slot: Slot, put: Put, tmp_path: Path
) -> None:
    """As where a new golden takes over: versions of the one before go at once."""
    slot.active = old = await put("1.1", scaled(tmp_path / "1.onnx", 2.0))
    slot.active = await put("2", scaled(tmp_path / "2.onnx", 3.0))
    del slot.versions["1.1"]
    await old.engine.drain(1.0)
    ask = request(x=float32([[1.0, 1.0, 1.0, 1.0]]))
    assert values(await service.run(old, ask))[0, 0] == 3.0
    with pytest.raises(NotReady):
        await service.run(old, ask, named=True)
    slot.active = await put("3", scaled(tmp_path / "3.onnx", 3.0, width=5))
    with pytest.raises(NotReady):
        await service.run(old, ask)


async def test_an_answer_that_cannot_be_compared_costs_other_models_nothing(
    service: InferenceService, slot: Slot, put: Put, tmp_path: Path
) -> None:
    slot.active, slot.golden = await put("1", scaled(tmp_path / "1.onnx", 2.0)), "1"
    await put("1.1", scaled(tmp_path / "2.onnx", 2.0))
    odd = Slot("a", ModelConfig(), Reservoir(tmp_path / "more"), active=slot.active, mirror=Mirror("agreement", 0.99))
    service.slots = {"a": odd, "m": slot}
    odd.mirror.kept.append(Seen([], None, [Tensor("y", "FP32", (2, 2), b"short")], "1"))  # type: ignore[union-attr]
    slot.mirror = Mirror("sqnr_db", 20.0)
    row = np.ones((1, 4), np.float32)
    slot.mirror.kept.append(Seen([tensor("x", row)], None, [tensor("y", 2 * row)], "1.1"))
    found = await Vitals(service, None, service.window, 2, PastDeaths()).compare_some()  # type: ignore[arg-type]
    assert [(name, compared.version, compared.agreed) for name, compared in found] == [("m", "1.1", 1.0)]


async def test_nan_that_came_with_the_request_says_nothing_of_the_version(
    service: InferenceService, slot: Slot, put: Put, tmp_path: Path
) -> None:
    slot.active, slot.golden = await put("1", scaled(tmp_path / "1.onnx", 2.0)), "1"
    await put("1.1", scaled(tmp_path / "2.onnx", 2.0))
    slot.mirror, row = Mirror("cosine", 0.99), np.ones((1, 4), np.float32)
    vitals = Vitals(service, None, service.window, 2, PastDeaths())  # type: ignore[arg-type]
    slot.mirror.kept.append(Seen([tensor("x", row * np.nan)], None, [tensor("y", row * np.nan)], "1.1"))
    assert await vitals.compare_some() == [] and service.window.since("m", "1.1", 0.0).non_finite == 0
    slot.mirror.kept.append(Seen([tensor("x", row)], None, [tensor("y", row * np.nan)], "1.1"))
    assert [compared.agreed for _, compared in await vitals.compare_some()] == [0.0]
    assert service.window.since("m", "1.1", 0.0).non_finite == 1


async def test_each_model_has_its_turn_to_be_compared(service: InferenceService, slot: Slot, put: Put, tmp_path: Path) -> None:
    """The first model's comparisons took all of the budget, and the second was never held to its golden."""
    slot.active, slot.golden = await put("1", scaled(tmp_path / "1.onnx", 2.0)), "1"
    await put("1.1", scaled(tmp_path / "2.onnx", 2.0))
    other = Slot("a", ModelConfig(), Reservoir(tmp_path / "more"), active=slot.active, golden="1", versions=slot.versions)
    service.slots = {"a": other, "m": slot}
    vitals, row, seen = Vitals(service, None, service.window, 2, PastDeaths()), np.ones((1, 4), np.float32), []  # type: ignore[arg-type]
    for _ in range(4):
        for one in (other, slot):
            one.mirror = Mirror("sqnr_db", 20.0)
            one.mirror.kept.append(Seen([tensor("x", row)], None, [tensor("y", 2 * row)], "1.1"))
        vitals._spent.since, vitals._spent.cpu_s = monotonic(), MIRROR_SHARE * 2  # what one answer costs is all that is left
        seen += [name for name, _ in await vitals.compare_some()]
    assert set(seen) == {"a", "m"}, seen


async def test_slow_calls_are_probed_one_by_one_and_not_at_all_where_they_are_too_few() -> None:
    """A runner beside a fresh one, a second a call: it was held up for most of a minute, and then there were too few rounds."""
    assert (_calls_in_a_slice([0.12, 0.06]), _calls_in_a_slice([0.002, 0.001])) == (1, 15)
    asked: list[str] = []

    async def infer(request: InferenceRequest) -> InferenceResult:
        asked.append(request.request_id)
        return InferenceResult([], "m", "1", 1, 0.0, 1.0, 1, 1.0)

    engine: Any = SimpleNamespace(infer=infer)
    assert await _take_turns((engine, engine), [[]], 2.0, (1.15, 1.3)) == [] and len(asked) == 2


def test_what_is_about_to_answer_is_not_stopped_though_its_time_is_over(slot: Slot) -> None:
    """A rollback went to a version whose time had just ended: it was swapped in and stopped in the same moment."""
    for version in ("1", "1.1", "1.2", "1.3"):
        slot.versions[version] = SimpleNamespace(version=version, warm_until=5.0, pinned=False)  # type: ignore[assignment]
    slot.active, slot.known = slot.versions["1.2"], ("1", "1.1", "1.2")
    want = ModelState("m", "1", "sha", "1.1", "1.2", Generation(1, 3))
    assert [one.version for one in expired(slot, want, 9.0)] == ["1.3"]
    assert [one.version for one in expired(slot, replace(want, desired="1.2"), 9.0)] == ["1.1", "1.3"]
    assert [one.version for one in expired(slot, replace(want, desired="1.2"), 1.0)] == ["1.3"], "it was removed"


def one(value: float) -> list[Tensor]:
    return [tensor("y", np.array([[value]], np.float32))]


@pytest.mark.parametrize(
    ("other", "agreed"), [(lambda y: y, 1.0), (lambda y: y * 0.01, 0.0), (lambda y: 5.0, 0.0), (lambda y: y + 1e-5, 1.0)]
)
def test_a_regression_of_one_number_is_judged_over_several_answers(other: Callable[[float], float], agreed: float) -> None:
    """The cosine of one number is its sign: a version that was wrong by a factor of a hundred agreed."""
    mirror = Mirror("cosine", 0.999)
    found = [mirror.agreement(one(float(y)), one(other(float(y))), "1.1") for y in range(1, 41)]
    assert [at for at in found if at is not None] == [agreed, agreed] and found[:15] == [None] * 15
    assert Mirror("sqnr_db", 20.0).agreement(one(0.0), one(0.0)) == 1.0, "equal is as close as can be"


def test_classes_as_numbers_and_in_maps_are_compared_as_offline() -> None:
    labels = np.array([3, 1, 2, 0], np.int64)
    assert Mirror("agreement", 0.99).agreement([tensor("y", labels)], [tensor("y", labels[::-1].copy())]) == 0.0
    maps = np.zeros((1, 3, 2, 2), np.float32)
    maps[0, 1] = 1.0
    other = maps.copy()
    other[0, :, 0, 0] = 9.0, 0.0, 0.0
    assert Mirror("agreement", 0.99).agreement([tensor("y", maps)], [tensor("y", other)]) == 0.75


def test_what_is_kept_to_be_asked_again_is_bounded_with_its_answers() -> None:
    """Inputs alone were: 32 answers of a language model are gigabytes."""
    mirror, small = Mirror("agreement", 0.99), [tensor("x", np.zeros((1, 4), np.float32))]

    def offer(answer: int) -> None:
        mirror.opens_at = 0.0
        mirror.offer(
            InferenceRequest(small, "r"), InferenceResult([tensor("y", np.zeros((1, answer // 4), np.float32))], "m", "1", 1, 0, 0, 1, 0, 0)
        )

    for _ in range(20):
        offer(2 << 20)
    assert 1 < len(mirror.kept) <= 8 and sum(seen.size for seen in mirror.kept) <= MOST_KEPT
    offer(MOST_KEPT)
    assert all(seen.size < MOST_KEPT for seen in mirror.kept)


@pytest.mark.parametrize(("metric", "agreed"), [("agreement", 0.75), ("cosine", 1.0), ("sqnr_db", 0.75)])
def test_a_request_of_several_rows_agrees_by_its_rows_where_the_floor_is_one_of_rows(metric: str, agreed: float) -> None:
    golden = np.tile(np.array([[1, 0, 0], [0, 1, 0], [0, 0, 1], [0.5, 0.4, 0]], np.float32), (2, 1))
    other = golden.copy()
    other[3::4] = 0.4, 0.5, 0
    mirror = Mirror(metric, 30.0 if metric == "sqnr_db" else 0.95)
    assert mirror.agreement([tensor("y", golden)], [tensor("y", other)]) == agreed
    other[0] = np.nan
    assert mirror.agreement([tensor("y", golden)], [tensor("y", other)]) == 0.0
    assert mirror.agreement([tensor("y", golden)], [tensor("y", other[:2])]) == 0.0


@pytest.fixture
def loader(forkserver: ForkServer) -> Loader:
    return Loader(forkserver, CoreLedger(2), Metrics(), Window(), "here", 4 << 30, lambda *death: None)


async def test_what_killed_a_runner_is_refused_by_the_next_engine_of_the_same_weights(loader: Loader, tmp_path: Path) -> None:
    admitted = admitted_of("1.1", killer(tmp_path / "1.onnx"), RuntimeSettings())
    x, d = np.array([KILLING_ROW[0]], np.int64), np.array([KILLING_ROW[1]], np.int64)
    for settings in (RuntimeSettings(), RuntimeSettings(intra_op_threads=2)):
        loaded = await loader.load(admitted, settings, 1, ModelConfig())
        with pytest.raises(Quarantined):
            await loaded.engine.infer(request(x=x, d=d))
        assert loaded.engine.distinct_killers == 1
        deaths = len(loaded.engine.deaths)
        await loader.stop(loaded, 1.0)
    assert deaths == 0


@pytest.mark.parametrize("check_s", [0.02, 0.0])
async def test_a_model_too_slow_for_all_reference_rows_is_held_to_those_that_fit(
    loader: Loader, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, check_s: float
) -> None:
    monkeypatch.setattr("app.serving.loader.CHECK_S", check_s)
    rows = np.random.default_rng(0).normal(size=(KEPT_ROWS, 4)).astype(np.float32)
    meta = ReferenceMeta("g", "here", "owner", True, tuple(str(row) for row in range(KEPT_ROWS)), {}, 0.0)
    reference = Reference(Samples({"x": rows}), {"y": 3 * rows}, meta, {}, tmp_path)
    proof: Any = SimpleNamespace(detail={})
    admitted = replace(admitted_of("1", slow(tmp_path / "1.onnx", inner=1600), RuntimeSettings()), reference=reference, proof=proof)
    for _ in range(3):
        loaded = await loader.load(admitted, RuntimeSettings(), 1, ModelConfig())
        assert loaded.engine.alive
        await loader.stop(loaded, 1.0)


async def test_a_version_for_which_there_is_no_room_is_told_apart_from_one_that_does_not_load(
    slot: Slot, service: InferenceService, put: Put, forkserver: ForkServer, tmp_path: Path
) -> None:
    slot.active = await put("1", scaled(tmp_path / "1.onnx"))
    want, found = ModelState("m", "1", "g", "1", "", Generation(1, 1)), SimpleNamespace(config=None, beside=())
    for limit, file, no_room in ((1 << 20, scaled(tmp_path / "2.onnx"), ("1.1",)), (4 << 30, corrupt(tmp_path / "3.onnx"), ())):

        async def admit(*_: object, file: Path = file) -> Admitted:
            return replace(admitted_of("1.1", tmp_path / "1.onnx", RuntimeSettings()), path=file)

        loader = Loader(forkserver, CoreLedger(2), Metrics(), Window(), "here", limit, lambda *death: None)
        admission: Any = SimpleNamespace(admit=admit)
        reconciler = ModelReconciler(slot, service, admission, loader, list[Event]().append, Metrics(), PastDeaths())
        await reconciler._warm(want, found, "1.1")  # type: ignore[arg-type]
        view = Vitals(service, loader, service.window, 2, PastDeaths()).model("m")
        assert view is not None and dict(view.failed).keys() == {"1.1"} and view.no_room == no_room


async def test_loads_that_hang_give_their_places_back(loader: Loader, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("app.serving.loader.PLACE_S", 0.01)
    async with asyncio.timeout(10):
        async with loader._place(), loader._place(), loader._place():
            pass
    async with asyncio.timeout(10):
        async with loader._place(), loader._place():
            pass


async def test_a_deadly_version_is_left_once_for_its_faults(slot: Slot, service: InferenceService, put: Put, tmp_path: Path) -> None:
    """However long the store does not take it: each pass finds the same version active and desired."""
    told: list[Event] = []
    active = await put("1.1", scaled(tmp_path / "1.onnx"))
    want = ModelState("m", "1", "g", "1.1", "1", Generation(1, 7))
    metrics = Metrics()
    reconciler = ModelReconciler(slot, service, None, None, told.append, metrics, PastDeaths())  # type: ignore[arg-type]
    for _ in range(3):
        active.engine.killers.update("abc")
        reconciler._leave_deadly(active, want)
    assert [event.kind for event in told] == ["version.failed", "desired.changed"]
    assert told[1].data["fault"] and told[1].version == "1"
    assert metrics.counters["hone_rollbacks"] == {("m", "killers"): 1.0}
