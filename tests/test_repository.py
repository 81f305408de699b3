"""A repository in Triton's layout as users really have it: links, odd names, half files."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from pathlib import Path

import pytest

from app.catalog.deploy import deploy
from app.catalog.model_config import ModelConfig
from app.catalog.model_files import FileHashes, FileLimits
from app.catalog.model_names import check_name, is_name
from app.catalog.repository import Repository
from app.errors import InvalidRequest, ModelRejected, NotAllowed, NotFound
from optimizers.artifact import Artifact, sha256_of
from tests.repositories import put, repository
from tests.storage import tree

__all__ = ["repository"]


CASE_09 = [
    "résumé",
    "模型",
    "a b",
    "a+b",
    "a%2Fb",
    "team/model",
    "..",
    ".",
    "a/../b",
    "x" * 300,
    "-rf",
    "m\n",
    "m\0",
    "versions",
    "e\u0301",
    "",
]


def old(path: Path, seconds: float = 60) -> None:
    """Wait until the file system's change time is past the age at which hashes are kept."""
    os.utime(path, (time.time() - seconds,) * 2)
    time.sleep(2.1)


def error_of(repository: Repository, name: str) -> str:
    return repository.find(name).error


# ---- scanning
def test_versions_are_numbers_and_the_highest_is_golden(repository: Repository) -> None:
    for number in ("1", "9", "10"):
        put(repository.root, f"m/{number}/model.onnx")
    for other in ("01", "0", "x", "1.2", "-3", "٣"):
        put(repository.root, f"m/{other}/model.onnx")
    (model,) = repository.scan()
    assert [version.number for version in model.versions] == ["1", "9", "10"]
    assert model.golden is not None and model.golden.path == (repository.root / "m/10/model.onnx").resolve()
    assert (model.error, model.golden.kind) == ("", "onnx")


def test_one_broken_model_never_hides_another(repository: Repository) -> None:
    put(repository.root, "good/1/model.onnx")
    put(repository.root, "typo/1/model.onnx")
    put(repository.root, "typo/model.yaml", b"tsak: generic")
    put(repository.root, "empty/1/model.onnx", b"")
    put(repository.root, "two/1/a.onnx"), put(repository.root, "two/1/b.onnx")
    put(repository.root, "flat/model.onnx")
    put(repository.root, "none/1/readme.txt")
    (repository.root / "bare").mkdir()
    put(repository.root, "lonely.onnx")
    put(repository.root, "README.md"), put(repository.root, ".git/1/model.onnx")
    os.mkfifo(put(repository.root, "pipe/1/x").parent / "model.onnx")
    (repository.root / "loop").symlink_to("loop")
    (repository.root / "böse").mkdir()
    os.mkdir(os.fsencode(repository.root) + b"/not-\xff-utf8")
    put(repository.root, "bytes/1/model.onnx")
    os.mkfifo(os.fsencode(repository.root) + b"/bytes/1/w\xff")
    found = {model.name: model.error for model in repository.scan()}
    assert [name for name, error in found.items() if not error] == ["good"]
    assert "typo/model.yaml:1: tsak is not a key of model.yaml; did you mean 'task'" in found["typo"]
    assert "empty" in found["empty"]
    assert "a.onnx, b.onnx" in found["two"] and "model.onnx" in found["two"]
    assert "flat/1/model.onnx" in found["flat"] and "--repository" in found["flat"]
    assert "holds no model.onnx" in found["none"]
    assert "bare/1/model.onnx" in found["bare"]
    assert "lonely/1/model.onnx" in found["lonely.onnx"]
    assert "a pipe, socket or device" in found["pipe"]
    assert "cannot be followed" in found["loop"]
    assert len(found) == 13
    json.dumps(found).encode()


def test_a_model_that_cannot_be_listed_is_one_models_error(repository: Repository) -> None:
    put(repository.root, "good/1/model.onnx")
    with socket.socket(socket.AF_UNIX) as listener:
        (repository.root / "s" / "1").mkdir(parents=True)
        previous = os.getcwd()
        os.chdir(repository.root / "s" / "1")
        try:
            listener.bind("model.onnx")
        finally:
            os.chdir(previous)
        assert "a pipe, socket or device" in error_of(repository, "s")
    assert not error_of(repository, "good")


def test_a_missing_repository_says_what_to_do(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="--repository"):
        Repository(tmp_path / "nowhere").scan()
    with pytest.raises(NotAllowed, match="--repository"):
        Repository(put(tmp_path, "file")).scan()
    with pytest.raises(NotFound, match="no model 'x'"):
        Repository(tmp_path).find("x")


@pytest.mark.parametrize("name", CASE_09)
def test_names_that_cannot_be_whole_everywhere_are_refused_with_rule_and_example(repository: Repository, tmp_path: Path, name: str) -> None:
    before = tree(tmp_path)
    source = put(tmp_path.parent / f"{tmp_path.name}-source", "model.onnx")
    with pytest.raises(InvalidRequest, match="a name has 1 to 128") as caught:
        deploy(repository, source, name)
    assert "example: resnet18_v2.1-int8" in str(caught.value) and str(caught.value).isprintable()
    assert tree(tmp_path) == before
    with pytest.raises(NotFound):
        repository.find(name)


@pytest.mark.parametrize("name", ["m", "CON", "_x", "9", "resnet18_v2.1-int8", "a..b", "x" * 128, "Stats2"])
def test_good_names_are_served_as_they_are_listed(repository: Repository, name: str) -> None:
    assert is_name(name) and check_name(name) == name
    put(repository.root, f"{name}/1/model.onnx")
    assert [model.name for model in repository.scan()] == [name]
    assert not error_of(repository, name)


def test_tritons_configuration_is_noted_and_not_read(repository: Repository) -> None:
    put(repository.root, "m/1/model.onnx"), put(repository.root, "m/config.pbtxt", b"name: 'm'")
    model = repository.find("m")
    assert not model.error and "config.pbtxt" in model.notes[0] and "model.yaml" in model.notes[0]


def test_a_single_onnx_file_of_another_name_is_served(repository: Repository) -> None:
    put(repository.root, "m/1/resnet.onnx")
    golden = repository.find("m").golden
    assert golden is not None and golden.path is not None and golden.path.name == "resnet.onnx"


def test_the_configuration_is_read_again_when_it_changes(repository: Repository) -> None:
    put(repository.root, "m/1/model.onnx")
    put(repository.root, "m/model.yaml", b"task: regression")
    first = repository.find("m").config
    assert first is not None and first.task == "regression" and repository.find("m").config is first
    put(repository.root, "m/model.yaml", b"task: embedding")
    second = repository.find("m").config
    assert second is not None and second.task == "embedding"
    put(repository.root, "m/model.yaml", b"")
    assert repository.find("m").config is second, "emptied by whoever is about to write it"
    os.utime(repository.root / "m/model.yaml", (0, 0))
    assert repository.find("m").config == ModelConfig(), "empty, and nobody is writing"


# ---- links
def test_links_inside_the_repository_are_followed_as_kubernetes_makes_them(repository: Repository) -> None:
    put(repository.root, "m/1/..2026_01/model.onnx", b"weights")
    put(repository.root, "m/1/..2026_01/model.onnx.data", b"data")
    (repository.root / "m/1/..data").symlink_to("..2026_01")
    for name in ("model.onnx", "model.onnx.data"):
        (repository.root / "m/1" / name).symlink_to(f"..data/{name}")
    model = repository.find("m")
    assert model.golden is not None and model.golden.path == (repository.root / "m/1/..2026_01/model.onnx").resolve()
    assert [file.name for file in model.golden.files] == ["model.onnx", "model.onnx.data"] and not model.golden.notes


def test_links_that_leave_are_refused_with_the_remedy_unless_the_operator_allowed_their_end(repository: Repository, tmp_path: Path) -> None:
    blob = put(tmp_path, "cache/blobs/abc")
    put(repository.root, "m/1/x").unlink()
    (repository.root / "m/1/model.onnx").symlink_to(blob)
    error = error_of(repository, "m")
    assert "outside the repository" in error and "HONE_ALLOWED_ROOTS" in error and "hone deploy" in error
    assert str(tmp_path / "cache") not in error, "callers read it, too"
    allowed = Repository(repository.root, allowed_roots=[tmp_path / "cache"])
    golden = allowed.find("m").golden
    assert golden is not None and golden.path == blob.resolve() and not golden.error
    assert allowed.sha256(golden) == FileHashes().combined(golden.files)


@pytest.mark.parametrize("what", ["m", "m/1", "m/model.yaml", "m/1/model.onnx.data"])
def test_no_link_of_any_kind_reads_outside(repository: Repository, tmp_path: Path, what: str) -> None:
    outside = tmp_path / "outside"
    (
        put(outside, "1/model.onnx"),
        put(outside, "model.onnx"),
        put(outside, "model.yaml", b"task: embedding"),
        put(outside, "model.onnx.data"),
    )
    put(repository.root, "m/1/model.onnx")
    target = {"m": outside, "m/1": outside / "1"}.get(what, outside / Path(what).name)
    path = repository.root / what
    shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    path.symlink_to(target)
    assert "outside the repository" in error_of(repository, "m")


def test_data_that_links_scatter_is_noted(repository: Repository) -> None:
    put(repository.root, "m/blobs/aa"), put(repository.root, "m/blobs/bb"), put(repository.root, "m/1/.keep")
    (repository.root / "m/1/model.onnx").symlink_to("../blobs/aa")
    (repository.root / "m/1/model.onnx_data").symlink_to("../blobs/bb")
    golden = repository.find("m").golden
    assert golden is not None and not golden.error and "hone deploy" in golden.notes[0]


# ---- hashes
def test_the_hash_is_the_optimizers_own_over_model_and_data(repository: Repository) -> None:
    path = put(repository.root, "m/1/model.onnx")
    put(repository.root, "m/1/model.onnx.data", b"data"), put(repository.root, "m/1/a.bin", b"more"), put(repository.root, "m/1/notes.md")
    golden = repository.find("m").golden
    assert golden is not None and repository.sha256(golden) == sha256_of(*Artifact(path).files())


def test_an_unchanged_file_is_hashed_once_and_a_changed_one_is_noticed(repository: Repository) -> None:
    path = put(repository.root, "m/1/model.onnx", b"a" * 1000)
    old(path)

    def digest() -> str:
        golden = repository.find("m").golden
        assert golden is not None
        return repository.sha256(golden)

    first = digest()
    assert digest() == first and repository.hashes.bytes_read == 1000
    stamp = path.stat()
    path.write_bytes(b"b" * 1000)
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert digest() != first, "same size and modification time, other content"


def test_a_file_that_just_changed_is_not_trusted_to_its_time_stamp(tmp_path: Path) -> None:
    hashes, path = FileHashes(), put(tmp_path, "f", b"1")
    hashes.of(path), hashes.of(path)
    assert hashes.bytes_read == 2


def test_only_regular_files_are_hashed(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to(put(tmp_path, "f"))
    for name in ("pipe", "link", "absent"):
        with pytest.raises(ModelRejected):
            FileHashes().of(tmp_path / name)
    with pytest.raises(ModelRejected):
        FileHashes().of(Path("/dev/zero"))


def test_sizes_and_numbers_are_bounded(repository: Repository) -> None:
    put(repository.root, "m/1/model.onnx", b"x" * 100), put(repository.root, "m/1/model.onnx.data", b"x" * 100)
    for limits, part in (
        (FileLimits(max_file_bytes=99), "at most 99"),
        (FileLimits(max_total_bytes=199), "at most 199"),
        (FileLimits(max_files=1), "more than 1 files"),
    ):
        assert part in error_of(Repository(repository.root, limits=limits), "m")


# ---- PyTorch
def test_a_pytorch_model_needs_a_factory_from_an_allowed_folder(repository: Repository, tmp_path: Path) -> None:
    put(repository.root, "m/1/model.safetensors")
    assert "source: {factory" in error_of(repository, "m")
    put(repository.root, "m/model.yaml", b"source: {factory: 'net.py:build'}")
    assert "HONE_FACTORIES" in error_of(repository, "m")
    factories = tmp_path / "factories"
    put(factories, "other.py")
    allowed = Repository(repository.root, factories=[factories])
    assert "no such file in HONE_FACTORIES" in error_of(allowed, "m")
    put(factories, "net.py")
    model = allowed.find("m")
    assert model.golden is not None and not model.error and model.golden.kind == "torch" and model.config is not None
    assert allowed.factory(model.config) == ((factories / "net.py").resolve(), "build")


def test_a_factory_never_comes_from_the_repository_or_through_a_link(repository: Repository, tmp_path: Path) -> None:
    factories = tmp_path / "factories"
    factories.mkdir()
    put(repository.root, "m/1/model.safetensors"), put(repository.root, "m/net.py")
    put(repository.root, "m/model.yaml", f"source: {{factory: '{repository.root}/m/net.py:build'}}".encode())
    allowed = Repository(repository.root, factories=[factories])
    assert "outside HONE_FACTORIES" in error_of(allowed, "m")
    (factories / "net.py").symlink_to(repository.root / "m/net.py")
    put(repository.root, "m/model.yaml", b"source: {factory: 'net.py:build'}")
    assert "outside HONE_FACTORIES" in error_of(allowed, "m")


def test_onnx_comes_first_where_both_lie_there(repository: Repository) -> None:
    put(repository.root, "m/1/model.onnx"), put(repository.root, "m/1/model.safetensors")
    golden = repository.find("m").golden
    assert golden is not None and (golden.kind, golden.error) == ("onnx", "")
