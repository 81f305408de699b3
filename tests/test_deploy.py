"""What deploying and uploading make of a repository: copies that are whole or not there, on any disk."""

from __future__ import annotations

import os
import shutil
import threading
from collections.abc import Callable
from pathlib import Path

import pytest

from app.catalog import durable
from app.catalog.deploy import deploy, remove
from app.catalog.repository import Repository
from app.catalog.state_folder import StateFolder
from app.catalog.uploads import stage_upload
from app.errors import InsufficientStorage, ModelRejected, NotAllowed, NotFound
from tests.repositories import put, repository
from tests.storage import largest_file, read_only, small_disk, tree

__all__ = ["repository"]


# ---- deploying
def test_deploying_makes_the_next_version_and_the_same_files_make_none(repository: Repository, tmp_path: Path) -> None:
    source = put(tmp_path, "resnet.onnx", b"one")
    first = deploy(repository, source, "m", b"task: regression\n")
    assert first.config is not None and first.config.task == "regression"
    again = deploy(repository, source, "m", b"task: embedding\n")
    assert "version 1 already" in again.notes[-1] and again.config is not None and again.config.task == "embedding"
    source.write_bytes(b"two")
    second = deploy(repository, source, "m", taken=["7"])
    assert [version.number for version in second.versions] == ["1", "8"] and second.config == again.config
    assert tree(repository.root) == ["m", "m/1", "m/1/model.onnx", "m/8", "m/8/model.onnx", "m/model.yaml"]


def test_a_hugging_face_download_is_copied_with_its_data_and_tokenizer(repository: Repository, tmp_path: Path) -> None:
    cache = tmp_path / "hub/models--org--net"
    for blob, data in (("aa", b"model"), ("bb", b"weights"), ("cc", b"{}")):
        put(cache, f"blobs/{blob}", data)
    snapshot = cache / "snapshots/rev1"
    snapshot.mkdir(parents=True)
    for name, blob in (("model.onnx", "aa"), ("model.onnx_data", "bb"), ("tokenizer.json", "cc")):
        (snapshot / name).symlink_to(f"../../blobs/{blob}")
    config = b"preprocess: {text: {tokenizer: tokenizer.json}}"
    model = deploy(repository, snapshot, "m", config, data_files=["model.onnx_data"])
    shutil.rmtree(tmp_path / "hub")
    assert not model.error and tree(repository.root) == [
        "m", "m/1", "m/1/model.onnx", "m/1/model.onnx_data", "m/model.yaml", "m/tokenizer.json",
    ]  # fmt: skip
    assert (repository.root / "m/1/model.onnx_data").read_bytes() == b"weights"
    assert not any(path.is_symlink() for path in repository.root.rglob("*"))


def test_data_left_behind_is_named_with_how_to_send_both(repository: Repository, tmp_path: Path) -> None:
    source = put(tmp_path, "up/model.onnx")
    with pytest.raises(ModelRejected, match=r"model\.onnx\.data.*not beside it.*-F model\.onnx\.data=@"):
        deploy(repository, source, "m", data_files=["model.onnx.data"])
    assert tree(repository.root) == []


@pytest.mark.parametrize(
    "name",
    ["../secret", "/etc/passwd", "..", "sub/w.bin", ".hidden", "a\0b", "w\n", "", "model.onnx", "x.py", "model.yaml", "x.so", "w" * 256],
)
def test_external_data_with_a_path_or_a_forbidden_name_is_refused(repository: Repository, tmp_path: Path, name: str) -> None:
    source = put(tmp_path, "up/model.onnx")
    put(tmp_path, "secret"), put(tmp_path, "up/sub/w.bin"), put(tmp_path, "up/x.py"), put(tmp_path, "up/.hidden")
    with pytest.raises(ModelRejected):
        deploy(repository, source, "m", data_files=[name])
    assert tree(repository.root) == []


def test_external_data_that_is_a_link_elsewhere_or_no_file_is_refused(repository: Repository, tmp_path: Path) -> None:
    source = put(tmp_path, "up/model.onnx")
    (tmp_path / "up/w.bin").symlink_to(put(tmp_path, "secret"))
    os.mkfifo(tmp_path / "up/p.bin")
    (tmp_path / "up/d.bin").mkdir()
    (tmp_path / "up/n.bin").symlink_to("nowhere")
    for name in ("w.bin", "p.bin", "d.bin", "n.bin"):
        with pytest.raises(ModelRejected):
            deploy(repository, source, "m", data_files=[name])
    assert tree(repository.root) == []


def test_what_is_no_model_is_refused_with_the_remedy(repository: Repository, tmp_path: Path) -> None:
    for name, part in (("m.pt", "torch.onnx.export"), ("m.safetensors", "source: {factory"), ("empty.onnx", "is empty")):
        with pytest.raises(ModelRejected, match=part):
            deploy(repository, put(tmp_path, name, b"" if "empty" in name else b"x"), "m")
    with pytest.raises(NotFound):
        deploy(repository, tmp_path / "absent.onnx", "m")
    with pytest.raises(ModelRejected, match="is not a key"):
        deploy(repository, put(tmp_path, "m.onnx"), "m", b"tsak: x")
    with pytest.raises(ModelRejected, match="device"):
        (tmp_path / "zero.onnx").symlink_to("/dev/zero")
        deploy(repository, tmp_path / "zero.onnx", "m")
    assert tree(repository.root) == []


def test_something_in_the_way_is_said_and_left(repository: Repository, tmp_path: Path) -> None:
    put(repository.root, "m", b"a file")
    with pytest.raises(ModelRejected, match="in the way"):
        deploy(repository, put(tmp_path, "m.onnx"), "m")
    assert (repository.root / "m").read_bytes() == b"a file"


def test_too_little_room_is_said_before_anything_is_copied(tmp_path: Path) -> None:
    source = put(tmp_path, "m.onnx", os.urandom(3 << 20))
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        with pytest.raises(InsufficientStorage, match=r"deploying 'm': 3145728 bytes .* are needed"):
            deploy(Repository(disk), source, "m")
        assert tree(disk) == []


@pytest.mark.parametrize("name", ["m", "new"])
def test_a_disk_that_is_full_at_any_step_is_an_error_that_leaves_nothing_behind(tmp_path: Path, name: str) -> None:
    source, failed = put(tmp_path, "m.onnx"), 0
    for inodes in range(5, 20):
        with small_disk(tmp_path / f"disk{inodes}", 64 << 20, inodes) as disk:
            put(disk, "m/1/model.onnx", b"there")
            before = tree(disk)
            try:
                deploy(Repository(disk), source, name, b"task: regression")
                break
            except InsufficientStorage as error:
                assert "nothing was changed" in str(error)
            assert tree(disk) == before
            failed += 1
    assert failed >= 3


def test_a_file_that_may_not_grow_is_no_room_either(repository: Repository, tmp_path: Path) -> None:
    source = put(tmp_path, "m.onnx", b"x" * 200_000)
    with largest_file(100_000), pytest.raises(InsufficientStorage, match="nothing was changed"):
        deploy(repository, source, "m")
    assert tree(repository.root) == []


def test_a_read_only_repository_is_served_and_not_written(repository: Repository, tmp_path: Path) -> None:
    put(repository.root, "m/1/model.onnx", b"there")
    source = put(tmp_path, "new.onnx")
    with read_only(repository.root):
        (model,) = repository.scan()
        assert not model.error and model.golden is not None and repository.sha256(model.golden)
        for change in (lambda: deploy(repository, source, "m"), lambda: deploy(repository, source, "new"), lambda: remove(repository, "m")):
            with pytest.raises(NotAllowed, match=r"cannot be written .*make it writable"):
                change()
    assert tree(repository.root) == ["m", "m/1", "m/1/model.onnx"]


def test_deploys_at_the_same_time_get_a_version_each(repository: Repository, tmp_path: Path) -> None:
    sources = [put(tmp_path, f"s{i}.onnx", bytes([i]) * 1000) for i in range(8)]
    failures: list[BaseException] = []

    def run(act: Callable[[], object]) -> None:
        try:
            act()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=(lambda s=s: deploy(repository, s, "m"),)) for s in sources]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    versions = repository.find("m").versions
    assert not failures and [version.number for version in versions] == [str(i) for i in range(1, 9)]
    assert {(version.folder / "model.onnx").read_bytes()[0] for version in versions} == set(range(8))
    assert not [name for name in tree(repository.root) if durable.TEMPORARY in name]


def test_removing_takes_the_whole_model(repository: Repository, tmp_path: Path) -> None:
    deploy(repository, put(tmp_path, "m.onnx"), "m")
    put(repository.root, "other/1/model.onnx")
    remove(repository, "m")
    assert [model.name for model in repository.scan()] == ["other"] and not (repository.root / "m").exists()
    with pytest.raises(NotFound):
        remove(repository, "m")


# ---- uploads
def test_an_upload_is_staged_deployed_and_gone(repository: Repository, tmp_path: Path) -> None:
    state = StateFolder(tmp_path / "state").prepare()
    files = {
        "model.onnx": put(tmp_path, "tmp/1"), "model.onnx.data": put(tmp_path, "tmp/2", b"data"),
        "model.yaml": put(tmp_path, "tmp/3", b"postprocess: {labels: labels.txt}"), "labels.txt": put(tmp_path, "tmp/4", b"a\nb\n"),
    }  # fmt: skip
    with stage_upload(state, files, repository) as staged:
        assert staged.data_files == ("model.onnx.data",)
        assert state.sweep() == 0, "an upload that is being looked at is not a leftover"
        model = deploy(repository, staged.model, "m", staged.config, staged.data_files)
    assert not model.error and tree(repository.root) == [
        "m", "m/1", "m/1/model.onnx", "m/1/model.onnx.data", "m/labels.txt", "m/model.yaml",
    ]  # fmt: skip
    assert tree(state.staging) == []


@pytest.mark.parametrize(
    ("names", "part"),
    [
        (["model.yaml"], "one .onnx file, got 0"),
        (["a.onnx", "b.onnx"], "one .onnx file, got 2"),
        (["model.onnx", "evil.py"], "evil.py"),
        (["model.onnx", "../../x.bin"], "no paths"),
        (["model.onnx", "/etc/x.bin"], "no paths"),
        (["../model.onnx"], "plain name"),
        (["model.onnx", "config.pbtxt"], "config.pbtxt"),
    ],
)
def test_an_upload_with_forbidden_files_is_refused(repository: Repository, tmp_path: Path, names: list[str], part: str) -> None:
    state = StateFolder(tmp_path / "state").prepare()
    files = {name: put(tmp_path, f"tmp/{i}", b"{}") for i, name in enumerate(names)}
    with pytest.raises(ModelRejected, match=part.replace(".", r"\.")):
        stage_upload(state, files, repository)
    assert tree(state.staging) == []


def test_an_upload_to_a_full_disk_is_refused_and_leaves_nothing(repository: Repository, tmp_path: Path) -> None:
    source = put(tmp_path, "up", os.urandom(3 << 20))
    with small_disk(tmp_path / "disk", 2 << 20) as disk:
        state = StateFolder(disk / "state").prepare()
        with pytest.raises(InsufficientStorage):
            stage_upload(state, {"model.onnx": source}, repository)
        assert tree(state.staging) == []


# ---- durability
def test_a_sweep_removes_what_the_dead_left_and_spares_the_living(tmp_path: Path) -> None:
    put(tmp_path, f"{durable.TEMPORARY}dead/x"), put(tmp_path, f"{durable.TEMPORARY}file"), put(tmp_path, "kept")
    with durable.temporary_folder(tmp_path) as living:
        put(living, "x")
        assert durable.sweep(tmp_path) == 2
        assert sorted(os.listdir(tmp_path)) == sorted([living.name, "kept"])
    assert os.listdir(tmp_path) == ["kept"]


def test_a_replaced_file_is_whole_for_every_reader(tmp_path: Path) -> None:
    path = tmp_path / "f"
    durable.write_file(path, b"0" * 4096)
    stop = threading.Event()
    torn: list[bytes] = []

    def read() -> None:
        while not stop.is_set():
            data = path.read_bytes()
            if len(data) != 4096 or len(set(data)) != 1:
                torn.append(data)

    reader = threading.Thread(target=read)
    reader.start()
    for i in range(100):
        durable.write_file(path, bytes([i]) * 4096)
    stop.set()
    reader.join(30)
    assert not torn and os.listdir(tmp_path) == ["f"]
