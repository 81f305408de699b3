"""What runner processes compute: every datatype, strings, scalars, large tensors; and how a load that fails says why."""

from __future__ import annotations

import asyncio
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.domain import InferenceRequest, RuntimeSettings, Tensor, TensorSpec
from app.errors import InvalidRequest, ModelFailed, ModelRejected
from app.serving.engine import Engine, RunnerSpec
from app.serving.forkserver import ForkServer
from app.serving.ledger import CoreLedger
from app.serving.runner_loop import cleaned
from tests import models
from tests.engines import DATATYPES, Start, anyio_backend, forkserver, request, start, tensor, until, values
from tests.runner_children import children_of

__all__ = ["anyio_backend", "forkserver", "start"]
pytestmark = pytest.mark.anyio


@pytest.mark.parametrize("name", sorted(DATATYPES))
async def test_every_numeric_datatype_returns_as_it_came(name: str, start: Start, tmp_path: Path) -> None:
    engine = await start(models.identity(tmp_path / "m.onnx", DATATYPES[name]))
    sent = np.array([[0, 1, 1], [1, 0, 1]]).astype(name)
    result = await engine.infer(request(x=sent))
    assert result.outputs[0].datatype == DATATYPES[name]
    assert np.array_equal(values(result), sent)
    assert values(result).dtype == sent.dtype


async def test_bfloat16_is_computed_and_batched(start: Start, tmp_path: Path) -> None:
    engine = await start(models.brain_half(tmp_path / "m.onnx"), batch_limit=4)

    def half(number: float) -> bytes:
        return struct.pack("<f", number)[2:]

    answers = await asyncio.gather(
        *(engine.infer(InferenceRequest([Tensor("x", "BF16", (1, 2), half(n) + half(n / 2))])) for n in (1.0, 2.0, 4.0))
    )
    assert [bytes(answer.outputs[0].data) for answer in answers] == [half(n * n) + half(n * n / 4) for n in (1.0, 2.0, 4.0)]
    assert {(o.datatype, o.shape) for answer in answers for o in answer.outputs} == {("BF16", (1, 2))}


def wire_text(*items: bytes) -> bytes:
    return b"".join(struct.pack("<I", len(item)) + item for item in items)


def texts(*items: bytes) -> InferenceRequest:
    return InferenceRequest([Tensor("x", "BYTES", (len(items),), wire_text(*items))])


async def test_strings_keep_every_byte_and_batches_are_cut_between_them(start: Start, tmp_path: Path) -> None:
    """Case 15: many-byte characters, NUL inside and empty ones return unchanged, whoever shares the call."""
    engine = await start(models.identity(tmp_path / "m.onnx", "BYTES", ["N"]), batch_limit=64)
    groups = [["accused’s".encode(), "模型".encode()], [b""], [b"a\0b", "𝛑".encode(), "e\u0301".encode()]] * 4
    answers = await asyncio.gather(*(engine.infer(texts(*group)) for group in groups))
    assert [bytes(answer.outputs[0].data) for answer in answers] == [wire_text(*group) for group in groups]
    assert max(answer.batch_rows for answer in answers) > 3


async def test_bytes_that_are_no_text_name_tensor_and_element_and_spare_their_batch_mates(start: Start, tmp_path: Path) -> None:
    engine = await start(models.identity(tmp_path / "m.onnx", "BYTES", ["N"]), batch_limit=64)
    good, bad, short = await asyncio.gather(
        engine.infer(texts(b"good")),
        engine.infer(texts(b"fine", b"\xff\xfe")),
        engine.infer(InferenceRequest([Tensor("x", "BYTES", (2,), wire_text(b"one"))])),
        return_exceptions=True,
    )
    assert not isinstance(good, BaseException)
    assert bytes(good.outputs[0].data) == wire_text(b"good")
    assert isinstance(bad, InvalidRequest)
    assert "'x': element 1 is not UTF-8" in str(bad)
    assert isinstance(short, InvalidRequest)
    assert "element 1 of 2 is missing" in str(short)


async def test_scalars_go_in_and_come_out_and_are_never_merged(start: Start, tmp_path: Path) -> None:
    """Case 11: four callers with different scalars at once each get their own answer."""
    engine = await start(models.scalars(tmp_path / "m.onnx"), batch_limit=16)
    x = np.array([1, 2], np.float32)
    factors = [1, 2, 3, 4]
    answers = await asyncio.gather(*(engine.infer(request(x=x, s=np.float32(s))) for s in factors))
    assert [values(answer, "z").shape for answer in answers] == [()] * 4
    assert [values(answer, "z").item() for answer in answers] == [3.0, 6.0, 9.0, 12.0]
    assert all(answer.batch_rows == 1 for answer in answers)


async def test_tensors_without_elements_are_answered(start: Start, tmp_path: Path) -> None:
    engine = await start(models.identity(tmp_path / "m.onnx"), batch_limit=8)
    for shape in [(0, 3), (2, 0), (0, 0)]:
        result = await engine.infer(request(x=np.empty(shape, np.float32)))
        assert result.outputs[0].shape == shape


async def test_only_the_outputs_asked_for_are_sent_in_the_order_asked(start: Start, tmp_path: Path) -> None:
    engine = await start(models.scalars(tmp_path / "m.onnx"))
    result = await engine.infer(request(outputs=("z", "y"), x=np.ones(3, np.float32), s=np.float32(2)))
    assert [output.name for output in result.outputs] == ["z", "y"]
    result = await engine.infer(request(outputs=("z",), x=np.ones(3, np.float32), s=np.float32(2)))
    assert [output.name for output in result.outputs] == ["z"]


async def test_large_tensors_pass_and_the_arena_is_small_again_afterwards(start: Start, tmp_path: Path) -> None:
    engine = await start(models.identity(tmp_path / "m.onnx", "FP32", ["N", "M"]))
    large = np.random.default_rng(0).normal(size=(1, 6_000_000)).astype(np.float32)
    assert np.array_equal(values(await engine.infer(request(x=large))), large)
    arena = engine._runner.instances[0].arena.fd  # type: ignore[union-attr]
    assert os.fstat(arena).st_blocks * 512 >= large.nbytes
    for _ in range(80):
        await engine.infer(request(x=np.ones((1, 2), np.float32)))
    assert os.fstat(arena).st_blocks * 512 <= 4 << 20
    assert np.array_equal(values(await engine.infer(request(x=large))), large), "an arena that was cut must serve large requests again"


async def test_descriptions_longer_than_a_message_travel_through_the_arena(start: Start, tmp_path: Path) -> None:
    from onnx import helper

    names = [f"a_rather_long_tensor_name_so_that_the_description_grows_{i:04d}" for i in range(900)]
    path = models.save(
        tmp_path / "m.onnx",
        [helper.make_node("Identity", [name], [f"out_{name}"]) for name in names],
        [models.value(name, "FP32", ["N", 1]) for name in names],
        [models.value(f"out_{name}", "FP32", ["N", 1]) for name in names],
    )
    engine = await start(path)
    sent: dict[str, Any] = {name: np.full((1, 1), index, np.float32) for index, name in enumerate(names)}
    result = await engine.infer(request(**sent))
    assert [values(result, f"out_{name}").item() for name in names] == list(range(900))


async def test_a_model_that_raises_says_why_without_source_files(start: Start, tmp_path: Path) -> None:
    engine = await start(models.failing(tmp_path / "m.onnx"))
    with pytest.raises(ModelFailed) as failure:
        await engine.infer(request(index=np.array([99])))
    assert "indices element out of data bounds, idx=99" in str(failure.value)
    assert ".cc" not in str(failure.value)
    assert str(tmp_path) not in str(failure.value)


def test_messages_lose_paths_but_keep_their_point() -> None:
    text = "[ONNXRuntimeError] : 1 : FAIL : Load model from /srv/models/x/1/model.onnx failed:/onnxruntime_src/onnxruntime/core/graph/model.cc:182 onnxruntime::Model::Model(onnx::ModelProto&&, const PathString&) Unsupported model IR version: 99, max supported IR version: 13"
    assert cleaned(text) == "Load model from model.onnx failed:Unsupported model IR version: 99, max supported IR version: 13"


@pytest.mark.parametrize("build", [models.corrupt], ids=["corrupt"])
async def test_a_file_that_is_no_model_is_refused_with_the_reason(build: Any, start: Start, tmp_path: Path) -> None:
    path = build(tmp_path / "broken.onnx")
    signature = models.signature_of(models.scaled(tmp_path / "other.onnx"))
    with pytest.raises(ModelRejected, match=r"refuses broken\.onnx: .*(INVALID_PROTOBUF|Protobuf parsing failed)"):
        await start(path, signature=signature)


async def test_a_missing_file_and_a_wrong_output_are_refused(start: Start, tmp_path: Path) -> None:
    path = models.scaled(tmp_path / "m.onnx")
    signature = models.signature_of(path)
    with pytest.raises(ModelRejected, match=r"absent\.onnx"):
        await start(tmp_path / "absent.onnx", signature=signature)
    from dataclasses import replace

    with pytest.raises(ModelRejected, match="output 'nope' is not in the file; it has y"):
        await start(path, signature=replace(signature, outputs=(TensorSpec("nope", "FP32", (-1, 4)),)))


async def test_a_load_that_eats_memory_ends_clearly_and_leaves_nothing(start: Start, tmp_path: Path, forkserver: ForkServer) -> None:
    """Case 53, five times in a row; the incumbent answers throughout and the sixth, good model loads."""
    incumbent = await start(models.scaled(tmp_path / "good.onnx"))
    eater = models.memory_eater(tmp_path / "eater.onnx")
    assert eater.stat().st_size < 400
    before = children_of(forkserver.pid)
    for _ in range(5):
        with pytest.raises(ModelRejected, match="more memory than the 1024 MiB"):
            await start(eater, spec={"memory_limit_bytes": 1 << 30})
        assert values(await incumbent.infer(request(x=np.ones((1, 4), np.float32)))).tolist() == [[2, 2, 2, 2]]
    await until(lambda: children_of(forkserver.pid) == before)
    sixth = await start(models.scaled(tmp_path / "sixth.onnx", 6), spec={"memory_limit_bytes": 1 << 30})
    assert values(await sixth.infer(request(x=np.ones((1, 4), np.float32)))).tolist() == [[6, 6, 6, 6]]


async def test_what_is_touched_counts_too_not_only_what_is_mapped_at_once(start: Start, tmp_path: Path) -> None:
    """A load that stays below each single bound of the process is still watched while it grows."""
    with pytest.raises(ModelRejected, match="64 MiB"):
        await start(models.memory_eater(tmp_path / "m.onnx", 200 << 20), spec={"memory_limit_bytes": 64 << 20})


async def test_a_warm_up_that_never_ends_is_bounded(start: Start, tmp_path: Path, forkserver: ForkServer) -> None:
    before = children_of(forkserver.pid)
    path = models.endless(tmp_path / "m.onnx", turns=1 << 40)
    with pytest.raises(ModelRejected, match="not loaded and warm within 1 s"):
        await start(path, timeout_s=1.0)
    await until(lambda: children_of(forkserver.pid) == before)


async def test_a_crash_in_mid_load_is_the_version_s_fault_and_says_the_signal(start: Start, tmp_path: Path) -> None:
    path = models.killer(tmp_path / "m.onnx", constant=True)
    with pytest.raises(ModelRejected, match="did not load: the runner crashed: SIGFPE"):
        await start(path)


async def test_thread_counts_in_the_environment_do_not_matter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Case 49: ORT_INTRA_OP_NUM_THREADS=abc stops sessions that leave the count open; ours never do, nor see it."""
    monkeypatch.setenv("ORT_INTRA_OP_NUM_THREADS", "abc")
    monkeypatch.setenv("HONE_ADMIN_TOKEN", "secret")
    server = ForkServer()
    server.start()
    path = models.scaled(tmp_path / "m.onnx")
    spec = RunnerSpec("m", "1", 1, str(path), models.signature_of(path), RuntimeSettings(intra_op_threads=2))
    engine = await Engine.start(spec, forkserver=server, ledger=CoreLedger(2))
    environment = Path(f"/proc/{engine.pid}/environ").read_bytes().split(b"\0")
    names = {entry.split(b"=")[0] for entry in environment}
    assert not names & {b"ORT_INTRA_OP_NUM_THREADS", b"HONE_ADMIN_TOKEN"}
    assert b"OPENBLAS_NUM_THREADS=1" in environment
    await engine.stop()
    server.close()


async def test_times_of_a_call_are_reported(start: Start, tmp_path: Path) -> None:
    engine = await start(models.heavy(tmp_path / "m.onnx", layers=8), batch_limit=1)
    result = await engine.infer(request(x=np.ones((1, 1024), np.float32)))
    assert 0 < result.compute_s < 60
    assert 0 < result.cpu_s <= result.compute_s * 1.5 + 0.001
    assert result.wait_s >= 0
    assert engine.cpu_seconds() > 0
    assert engine.memory_bytes() > 1 << 20


def test_tensors_of_the_tests_are_what_they_say() -> None:
    assert tensor("x", np.ones((1, 2), np.float32)).data == np.ones(2, np.float32).tobytes()
