"""The packed form gives the very bytes back, is smaller where it should be, and takes nothing that is damaged or too large."""

from __future__ import annotations

import hashlib
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper

from app.cli import main
from optimizers import Rejected, huffman
from optimizers.packed import MAGIC, ZEROS, Coding, pack, unpack
from tests.models import scaled
from tests.odd_models import json_input
from tests.onnx_models import F, mlp, model, node, normal, value, weights, write
from tests.running_server import server


@given(st.binary(max_size=600), st.integers(0, 3))
@settings(max_examples=60, deadline=None)
def test_huffman_gives_the_symbols_back(data: bytes, times: int) -> None:
    symbols = np.tile(np.frombuffer(data, np.uint8), times)
    assert np.array_equal(huffman.decode(huffman.encode(symbols), len(symbols)), symbols)


@pytest.mark.parametrize("counts", [[5], [0, 3, 0], [1] * 256, [2**i for i in range(40)], [0, *(int(1.7**i) for i in range(60))]])
def test_code_lengths_are_a_code_of_bounded_length(counts: list[int]) -> None:
    """Kraft's equality; powers would want codes as long as there are symbols."""
    each = np.array(counts)
    lengths = huffman.code_lengths(each)
    used = lengths[each > 0]
    assert lengths.max() <= huffman.LONGEST and (lengths[each == 0] == 0).all() and (used > 0).all()
    assert len(used) < 2 or sum(2.0 ** -used.astype(float)) == 1


def test_code_lengths_by_hand() -> None:
    assert huffman.code_lengths(np.array([45, 13, 12, 16, 9, 5])).tolist() == [1, 3, 3, 3, 4, 4]


def test_huffman_is_within_a_bit_of_the_entropy() -> None:
    symbols = np.minimum(np.random.default_rng(0).geometric(0.4, 50_000) - 1, 15).astype(np.uint8)
    share = np.bincount(symbols) / len(symbols)
    bound = -(share[share > 0] * np.log2(share[share > 0])).sum()
    assert bound <= len(huffman.encode(symbols)) * 8 / len(symbols) < bound + 0.1


def file_of(folder: Path, *tensors: TensorProto) -> Path:
    built = model([node("Identity", ["x"], ["y"])], [value("x", F, ["N"])], [value("y", F, ["N"])], tensors)
    return write(built, folder / "model.onnx")


def there_and_back(path: Path) -> tuple[int, dict[str, int]]:
    packed = pack(path, path.with_suffix(".packed"))
    assert packed.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    back = unpack(packed.path, path.with_name("back.onnx"))
    assert back.read_bytes() == path.read_bytes()
    return packed.bytes, packed.codings


@given(st.lists(st.integers(0, 15), min_size=1, max_size=700), st.integers(0, 600), st.booleans())
@settings(max_examples=40, deadline=None)
def test_any_indices_come_back(values: list[int], zeros: int, nibbles: bool) -> None:
    import tempfile

    symbols = np.concatenate([np.zeros(zeros), values, np.zeros(zeros)]).astype(np.uint8)
    even = np.append(symbols, np.zeros(len(symbols) % 2, np.uint8))
    raw = (even[::2] | even[1::2] << 4).tobytes() if nibbles else symbols.tobytes()
    tensor = helper.make_tensor("i", TensorProto.UINT4 if nibbles else TensorProto.UINT8, [len(symbols)], raw, raw=True)
    with tempfile.TemporaryDirectory() as folder:
        there_and_back(file_of(Path(folder), tensor, *weights(b=normal(0, 40))))


def test_codings_are_chosen_by_size(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    sparse = np.where(rng.random(40_000) < 0.03, rng.integers(1, 200, 40_000), 0).astype(np.uint8)
    skewed = np.minimum(rng.geometric(0.3, 40_000), 255).astype(np.uint8)
    size, codings = there_and_back(file_of(tmp_path, *weights(sparse=sparse, skewed=skewed, noise=normal(0, 3000))))
    assert codings == {"huffman": 1, "planes": 1, "sparse": 1}
    assert size < 12_000 + 40_000 * (3.1 + 0.45) / 8 + 1000
    far = np.zeros(3 * ZEROS + 7, np.uint8)
    far[[0, ZEROS, 2 * ZEROS + 3]] = 1
    there_and_back(file_of(tmp_path, *weights(far=far, none=np.zeros(900, np.uint8))))


def test_any_model_is_packed(tmp_path: Path) -> None:
    there_and_back(write(mlp(), tmp_path / "m.onnx"))
    there_and_back(file_of(tmp_path))
    (tmp_path / "junk.onnx").write_bytes(b"junk")
    with pytest.raises(Rejected, match="not an ONNX"):
        pack(tmp_path / "junk.onnx", tmp_path / "p")


def test_damage_is_found_and_nothing_is_written(tmp_path: Path) -> None:
    rng = np.random.default_rng(1)
    tensors = weights(
        i=np.minimum(rng.geometric(0.3, 3000), 255).astype(np.uint8), s=(rng.random(5000) < 0.02).astype(np.uint8), f=normal(0, 99)
    )
    good = pack(file_of(tmp_path, *tensors), tmp_path / "good").path.read_bytes()
    bad, out = tmp_path / "bad", tmp_path / "out.onnx"
    flips = [good[:at] + bytes([good[at] ^ (1 << rng.integers(8))]) + good[at + 1 :] for at in rng.integers(0, len(good), 150)]
    for data in (*flips, *(good[:cut] for cut in rng.integers(0, len(good), 40)), good + b"x", b"", MAGIC):
        bad.write_bytes(data)
        with pytest.raises(Rejected, match="is no packed model, or is damaged"):
            unpack(bad, out)
    assert not out.exists()


def test_sizes_are_bounded_before_memory_is_taken(tmp_path: Path) -> None:
    path = file_of(tmp_path, *weights(i=np.zeros(1 << 20, np.uint8)))
    packed = pack(path, tmp_path / "p")
    assert packed.bytes < 2000
    with pytest.raises(Rejected, match="claims to unpack to"):
        unpack(packed.path, tmp_path / "out", most_bytes=1 << 20)
    with pytest.raises(Rejected, match="at most 100 are taken"):
        unpack(packed.path, tmp_path / "out", most_bytes=100)


@given(st.sampled_from(Coding), st.binary(max_size=200), st.integers(0, 1 << 32))
@settings(max_examples=200, deadline=None)
def test_no_stream_makes_a_decoder_fail_otherwise(coding: Coding, data: bytes, size: int) -> None:
    """Whatever the bytes are: that many come out, or ValueError (or LZMA's), without memory beyond what the bytes can justify."""
    import lzma
    import struct

    from optimizers.packed import _DECODERS

    try:
        assert len(_DECODERS[coding](data, size)) == size
    except (ValueError, struct.error, lzma.LZMAError):
        pass


# In the repository


def test_a_packed_model_is_unpacked_once_served_and_held_to_its_hash(tmp_path: Path) -> None:
    """`hone pack`, served from the repository under its name; a restart unpacks nothing, and a spoiled copy is made anew."""
    folder = tmp_path / "models" / "m" / "1"
    folder.mkdir(parents=True)
    source = scaled(tmp_path / "model.onnx", 3.0)
    assert main(["pack", str(source), str(folder / "model.onnx.packed")]) == 0
    x = json_input("x", "FP32", [1, 4], [1, 2, 3, 4])
    with server(tmp_path) as running:
        running.ready("m")
        assert running.call("POST", "/v2/models/m/infer", json={"inputs": [x]}).json()["outputs"][0]["data"] == [3.0, 6.0, 9.0, 12.0]
        (unpacked,) = (tmp_path / "state" / "unpacked").iterdir()
        assert unpacked.read_bytes() == source.read_bytes()
        written = unpacked.stat().st_mtime_ns
        running.restart().ready("m")
        assert unpacked.stat().st_mtime_ns == written
        running.worker()
        job = running.admin("POST", "/admin/models/m/optimize", 202, json={"recipe": ["graph"], "promote": "manual"})
        done = running.job_done(job["id"])
        assert done["outcome"] == "not_applicable" and "unpacked" not in str(done["report"]), (
            "the job found the file, in which there is nothing to fuse"
        )
        unpacked.write_bytes(b"spoiled")
        running.restart().ready("m")
        assert unpacked.read_bytes() == source.read_bytes()
        other = scaled(tmp_path / "other.onnx", 5.0)
        assert main(["pack", str(other), str(folder / "model.onnx.packed")]) == 0
        running.restart().ready("m")
        assert running.call("POST", "/v2/models/m/infer", json={"inputs": [x]}).json()["outputs"][0]["data"] == [5.0, 10.0, 15.0, 20.0]
        (unpacked,) = (tmp_path / "state" / "unpacked").iterdir()
        assert unpacked.read_bytes() == other.read_bytes(), "what came out of a packed file that is gone is gone too"


def test_a_packed_model_that_is_damaged_is_refused_with_its_reason(tmp_path: Path) -> None:
    folder = tmp_path / "models" / "m" / "1"
    folder.mkdir(parents=True)
    pack(scaled(tmp_path / "model.onnx", 3.0), folder / "model.onnx.packed")
    data = bytearray((folder / "model.onnx.packed").read_bytes())
    data[-1] ^= 1
    (folder / "model.onnx.packed").write_bytes(bytes(data))
    scaled(tmp_path / "models" / "other" / "1" / "model.onnx")
    with server(tmp_path) as running:
        running.ready("other")
        reason = running.until(lambda: running.call("GET", "/v2/models/m/ready").json().get("error"))
        assert "damaged" in running.until(lambda: "damaged" in (text := str(running.admin("GET", "/admin/models/m"))) and text), reason
        assert not list((tmp_path / "state" / "unpacked").iterdir())
