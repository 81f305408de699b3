"""Models that come by POST /admin/models: good ones serve, every other is refused with the reason and leaves nothing behind."""

from __future__ import annotations

import json
import resource
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import numpy as np
import pytest

from app.arguments import files_to_deploy
from optimizers.packed import pack
from tests.models import corrupt, identity, killer, scaled
from tests.odd_models import half_with_cast_left, json_input, with_external_data
from tests.running_server import ROOT, Running, server
from tests.storage import read_only

VIEWER = "only-looks"
LIMIT_BYTES = 4 << 20
NAMES = [
    "résumé", "模型", "a b", "a+b", "a%2Fb", "team/model", "..", ".", "a/../b", "x" * 300, "-rf", "m\n", "m\0", "versions", "Stats", "e\u0301", "",
]  # fmt: skip


@pytest.fixture(scope="module")
def running(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("uploads")
    scaled(folder / "models" / "standing" / "1" / "model.onnx")
    with server(folder, viewer_token=VIEWER, max_upload_bytes=str(LIMIT_BYTES)) as running:
        yield running.ready("standing")


@pytest.fixture
def good(tmp_path: Path) -> bytes:
    return scaled(tmp_path / "good.onnx").read_bytes()


def upload(running: Running, name: str, files: dict[str, bytes], token: str | None = None) -> httpx.Response:
    given = running.token if token is None else token
    return running.call(
        "POST",
        "/admin/models",
        headers={"Authorization": f"Bearer {given}"} if given else {},
        data={"name": name},
        files=[(shown, (shown, data)) for shown, data in files.items()],
    )


def refused(answer: httpx.Response, said: str, status: int = 400) -> None:
    assert answer.status_code == status and said in answer.json()["error"], answer.text


def leftovers(running: Running) -> list[str]:
    """What an upload may not leave: temporary folders in state or repository."""
    return [str(path) for path in (running.folder / "state" / "staging").iterdir()] + [
        str(path) for path in (running.folder / "models").rglob(".hone-tmp-*")
    ]


def test_a_good_model_serves_at_once_and_its_uploader_is_on_record(running: Running, good: bytes) -> None:
    answer = running.call(
        "POST", "/admin/models", headers={"Authorization": f"Bearer {running.token}", "X-Hone-Actor": "ada"}, data={"name": "fresh"},
        files={"model.onnx": ("whatever.onnx", good), "model.yaml": ("model.yaml", b"owner: ada\n")},
    )  # fmt: skip
    assert answer.status_code == 201 and answer.json() == {"model": "fresh", "version": "1", "ready": True, "notes": []}
    document = {"inputs": [json_input("x", "FP32", [1, 4], [1, 2, 3, 4])]}
    assert running.call("POST", "/v2/models/fresh/infer", json=document).json()["outputs"][0]["data"] == [2, 4, 6, 8]
    events = running.admin("GET", "/admin/timeline?model=fresh")["events"]
    assert [(event["kind"], event["actor"]) for event in events[:1]] == [("model.deployed", "admin:ada")]
    again = upload(running, "fresh", {"model.onnx": good})
    assert again.status_code == 201 and "no new version" in again.json()["notes"][0]
    assert sorted(path.name for path in (running.folder / "models" / "fresh").iterdir()) == ["1", "model.yaml"]
    assert not leftovers(running)


def test_weights_in_a_file_of_their_own(running: Running, tmp_path: Path) -> None:
    data = with_external_data(tmp_path / "model.onnx")
    model = (tmp_path / "model.onnx").read_bytes()
    refused(upload(running, "external", {"model.onnx": model}), "'model.onnx.data'")
    refused(upload(running, "external", {"model.onnx": model}), "upload both together")
    refused(upload(running, "external", {"model.onnx": model, "model.onnx.data": data[:-8]}), f"{len(data) - 8} bytes")
    answer = upload(running, "external", {"model.onnx": model, "model.onnx.data": data, "stray.bin": b"x"})
    assert answer.status_code == 201 and "'stray.bin' was not kept" in answer.json()["notes"][0]
    version = running.folder / "models" / "external" / "1"
    assert sorted(path.name for path in version.iterdir()) == ["model.onnx", "model.onnx.data"]


@pytest.mark.parametrize("location", ["/etc/hostname", "../../../../../../etc/hostname", "a/../model.onnx.data"])
def test_external_data_lies_beside_the_model_or_nowhere(running: Running, tmp_path: Path, location: str) -> None:
    with_external_data(tmp_path / "model.onnx", width=2, location=location, size=1)
    files = {"model.onnx": (tmp_path / "model.onnx").read_bytes(), "model.onnx.data": b"x" * 16}
    refused(upload(running, "hostile", files), location)
    assert not (running.folder / "models" / "hostile").exists()


def test_what_is_no_model_is_refused(running: Running, tmp_path: Path, good: bytes) -> None:
    refused(upload(running, "bad", {"model.onnx": corrupt(tmp_path / "c.onnx").read_bytes()}), "not an ONNX file")
    refused(upload(running, "bad", {"model.onnx": good[: len(good) // 2]}), "cut short")
    refused(upload(running, "bad", {"model.onnx": b""}), "empty")
    refused(upload(running, "bad", {"model.onnx": half_with_cast_left(tmp_path / "h.onnx").read_bytes()}), "cast_left")
    refused(upload(running, "bad", {"model.onnx": killer(tmp_path / "k.onnx", constant=True).read_bytes()}), "SIGFPE")
    assert not (running.folder / "models" / "bad").exists() and not leftovers(running)
    assert running.call("GET", "/v2/models/standing/ready").status_code == 200


@pytest.mark.parametrize(
    ("config", "said"),
    [
        (b"tsak: classification\n", "did you mean 'task'"),
        (b"task: [1\n", "not valid YAML"),
        (b"postprocess: {labels: labels.txt}\n", "'labels.txt'"),
        (b"postprocess: {labels: [only, two]}\n", "4 classes"),
        (b"platform: torch\n", "needs `source:`"),
        (b"platform: torch\nsource: {factory: net.py:build}\n", "platform: torch"),
    ],
)
def test_a_model_yaml_that_is_wrong_is_refused_before_anything_is_deployed(running: Running, good: bytes, config: bytes, said: str) -> None:
    refused(upload(running, "yaml", {"model.onnx": good, "model.yaml": config}), said)
    assert not (running.folder / "models" / "yaml").exists()


def test_forms_that_are_none_are_refused(running: Running, good: bytes) -> None:
    token = {"Authorization": f"Bearer {running.token}"}
    refused(running.call("POST", "/admin/models", headers=token, files={"model.onnx": good}), "`name`")
    refused(running.call("POST", "/admin/models", headers=token, json={}), "multipart/form-data", 415)
    cut = {**token, "Content-Type": "multipart/form-data; boundary=x"}
    refused(
        running.call("POST", "/admin/models", headers=cut, content=b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nm'),
        "cut off",
    )
    refused(running.call("POST", "/admin/models", headers=cut, content=b"nonsense"), "no multipart form")
    long = {**token, "Content-Type": f"multipart/form-data; boundary={'x' * 300}"}
    refused(running.call("POST", "/admin/models", headers=long, content=b"nonsense"), "exceeds maximum")
    for files in ({"model.onnx": good, "b.onnx": good}, {}, {"model.yaml": b"owner: x\n"}):
        answer = running.call("POST", "/admin/models", headers=token, data={"name": "m"}, files=list(files.items()) or {"x": b""})
        refused(answer, "one .onnx file")
    twice = running.call("POST", "/admin/models", headers=token, data={"name": "m"}, files=[("model.onnx", good), ("model.onnx", good)])
    refused(twice, "send each once")
    for shown in ("../../evil.data", "x.py", "/etc/passwd", "x.so"):
        answer = running.call(
            "POST", "/admin/models", headers=token, data={"name": "m"}, files=[("model.onnx", good), ("file", (shown, b"x"))]
        )
        refused(answer, shown)
    assert not (running.folder / "models" / "m").exists() and not leftovers(running)


def test_names_are_served_as_given_or_refused_with_the_rule(running: Running, good: bytes) -> None:
    before = sorted(path.name for path in running.folder.rglob("*") if path.suffix == ".onnx")
    for name in NAMES:
        answer = upload(running, name, {"model.onnx": good})
        refused(answer, "cannot be a model's name")
        assert "example" in answer.json()["error"]
    assert sorted(path.name for path in running.folder.rglob("*") if path.suffix == ".onnx") == before
    assert upload(running, "CON_v2.1-int8", {"model.onnx": good}).status_code == 201
    assert running.call("GET", "/v2/models/CON_v2.1-int8").json()["name"] == "CON_v2.1-int8"
    names = {line["name"] for line in running.call("POST", "/v2/repository/index").json()}
    assert "CON_v2.1-int8" in names


def test_without_a_token_the_answer_comes_before_the_body(running: Running) -> None:
    for token in ("", "wrong", running.token[:-1], running.token + "x"):
        head = (
            f"POST /admin/models HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 2000000\r\n"
            f"Authorization: Bearer {token}\r\n\r\n"
        )
        with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
            connection.sendall(head.encode())
            assert connection.recv(4096).startswith(b"HTTP/1.1 401 ")
    for method, path in [("GET", "/admin/status"), ("DELETE", "/admin/models/standing"), ("POST", "/v2/repository/models/standing/unload")]:
        assert running.call(method, path).status_code == 401
    assert running.call("GET", "/v2/models/standing/ready").status_code == 200


def test_a_viewer_reads_without_paths_and_changes_nothing(running: Running, good: bytes) -> None:
    refused(upload(running, "viewed", {"model.onnx": good}, token=VIEWER), "viewer token only reads", 403)
    token = {"Authorization": f"Bearer {VIEWER}"}
    changes = [
        ("POST", "models/standing/optimize"), ("POST", "models/standing/promote"), ("POST", "models/standing/rollback"),
        ("PATCH", "models/standing/settings"), ("DELETE", "models/standing/capture"), ("DELETE", "models/standing"), ("POST", "freeze"),
    ]  # fmt: skip
    for method, path in changes:
        assert running.call(method, f"/admin/{path}", headers=token, json={}).status_code == 403, path
    assert running.call("POST", "/v2/repository/models/standing/load", headers=token).status_code == 403
    for path in ("status", "models", "models/standing", "models/standing/versions", "jobs", "timeline"):
        shown, whole = (
            running.call("GET", f"/admin/{path}", headers=given) for given in (token, {"Authorization": f"Bearer {running.token}"})
        )
        assert shown.status_code == 200
        for secret in (str(running.folder), running.token, VIEWER):
            assert secret not in shown.text, path
        assert path != "status" or str(running.folder) in whole.text


def test_too_large_is_told_by_the_length_and_by_the_bytes(running: Running, good: bytes) -> None:
    refused(upload(running, "large", {"model.onnx": bytes(LIMIT_BYTES)}), "HONE_MAX_UPLOAD_BYTES", 413)

    def chunks() -> Iterator[bytes]:
        yield b'--x\r\nContent-Disposition: form-data; name="name"\r\n\r\nlarge\r\n'
        yield b'--x\r\nContent-Disposition: form-data; name="model.onnx"; filename="model.onnx"\r\n\r\n'
        for _ in range(LIMIT_BYTES // 65536 + 1):
            yield bytes(65536)

    headers = {"Authorization": f"Bearer {running.token}", "Content-Type": "multipart/form-data; boundary=x"}
    refused(running.call("POST", "/admin/models", headers=headers, content=chunks()), "HONE_MAX_UPLOAD_BYTES", 413)
    assert not leftovers(running)


@pytest.mark.parametrize("call", ["models/standing/verify", "models/standing/optimize", "models/standing/promote"])
def test_what_is_asked_of_the_admin_side_is_small(running: Running, call: str) -> None:
    def chunks() -> Iterator[bytes]:
        for _ in range(300):
            yield b" " * 65536

    headers = {"Authorization": f"Bearer {running.token}"}
    refused(running.call("POST", f"/admin/{call}", headers=headers, content=chunks()), "the body passes 1048576 bytes", 413)


def test_a_client_that_leaves_in_mid_upload_leaves_nothing(running: Running) -> None:
    head = (
        "POST /admin/models HTTP/1.1\r\nHost: x\r\nContent-Type: multipart/form-data; boundary=x\r\nContent-Length: 3000000\r\n"
        f"Authorization: Bearer {running.token}\r\n\r\n"
    )
    part = b'--x\r\nContent-Disposition: form-data; name="model.onnx"; filename="model.onnx"\r\n\r\n' + bytes(1_500_000)
    with socket.create_connection(("127.0.0.1", running.port), timeout=30) as connection:
        connection.sendall(head.encode() + part)
        running.until(lambda: leftovers(running))
    running.until(lambda: not leftovers(running))
    assert "Traceback" not in running.log


def test_a_full_disk_in_mid_upload_costs_the_upload_alone(running: Running) -> None:
    """A bound on file size stands for the full disk: the kernel refuses the write in the same way (EFBIG)."""
    pid = running.process.pid
    before = resource.prlimit(pid, resource.RLIMIT_FSIZE)
    resource.prlimit(pid, resource.RLIMIT_FSIZE, (1 << 20, before[1]))
    try:
        refused(upload(running, "full", {"model.onnx": bytes(2 << 20)}), "no room", 507)
    finally:
        resource.prlimit(pid, resource.RLIMIT_FSIZE, before)
    assert not leftovers(running) and not (running.folder / "models" / "full").exists()
    assert running.call("GET", "/v2/models/standing/ready").status_code == 200


def test_versions_and_models_leave_by_rule(running: Running, good: bytes, tmp_path: Path) -> None:
    assert upload(running, "leaving", {"model.onnx": good}).status_code == 201
    golden = running.admin("DELETE", "/admin/models/leaving/versions/1", 403)
    assert "golden" in golden["error"] and "hone remove leaving" in golden["error"]
    assert "no version" in running.admin("DELETE", "/admin/models/leaving/versions/1.7", 404)["error"]
    assert running.admin("DELETE", "/admin/models/nobody", 404)["error"]
    assert running.admin("DELETE", "/admin/models/leaving", 200) == {"model": "leaving", "removed": True}
    running.until(lambda: running.call("GET", "/v2/models/leaving/ready").status_code == 404)
    assert not (running.folder / "models" / "leaving").exists()
    removed = [event for event in running.admin("GET", "/admin/timeline?model=leaving")["events"] if event["kind"] == "model.removed"]
    assert [event["actor"] for event in removed] == ["admin"]
    assert upload(running, "leaving", {"model.onnx": scaled(tmp_path / "other.onnx", 5.0).read_bytes()}).status_code == 201
    document = {"inputs": [json_input("x", "FP32", [1, 4], [1, 1, 1, 1])]}
    assert running.call("POST", "/v2/models/leaving/infer", json=document).json()["outputs"][0]["data"] == [5, 5, 5, 5]


def test_hone_deploy_sends_a_whole_folder_and_hone_remove_takes_it_back(running: Running, tmp_path: Path) -> None:
    folder = tmp_path / "packed"
    data = with_external_data(folder / "3" / "model.onnx")
    (folder / "3" / "model.onnx.data").write_bytes(data)
    (folder / "model.yaml").write_text(
        "postprocess: {labels: labels.txt}\nsamples: {reference: r.npz, calibration: c.npz, train: train/}\n"
    )
    np.savez(folder / "r.npz", x=np.eye(64, dtype=np.float32))
    (folder / "labels.txt").write_text("\n".join(f"class {number}" for number in range(64)) + "\n")

    def hone(*arguments: str) -> subprocess.CompletedProcess[str]:
        environment = {"PATH": "/usr/bin:/bin", "PYTHONPATH": str(ROOT), "HONE_URL": running.url, "HONE_TOKEN": running.token}
        command = [sys.executable, "-m", "app.cli", *arguments]
        return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)

    sent = hone("deploy", str(folder))
    assert sent.returncode == 0, sent.stderr
    assert "'c.npz' is not there" in sent.stdout and "'train/' is not there" in sent.stdout and "r.npz" not in sent.stdout, sent.stdout
    running.until((running.folder / "state" / "models" / "packed" / "reference" / "meta.json").exists)
    answer = running.call("POST", "/models/packed/predict", json={"x": [[float(at == 7) for at in range(64)]]})
    assert answer.status_code == 200 and "class 7" in answer.text
    removed = hone("remove", "packed")
    assert removed.returncode == 0, removed.stderr
    running.until(lambda: running.call("GET", "/v2/models/packed/ready").status_code == 404)


def test_samples_that_cannot_judge_are_told_where_one_looks(running: Running, good: bytes) -> None:
    named = b"samples: {reference: gone.npz}\nsource: {factory: 'net.py:build', weights: w.safetensors}\n"
    answer = upload(running, "unjudged", {"model.onnx": good, "model.yaml": named})
    samples, weights = answer.json()["notes"]
    assert answer.status_code == 201 and "'gone.npz' is not there" in samples and "'w.safetensors' is not there" in weights
    said = "its reference is not frozen yet: samples.reference = 'gone.npz' does not exist"
    running.until(lambda: said in str(running.admin("GET", "/admin/models/unjudged")["loaded"]))


def test_samples_named_after_the_first_deploy_are_what_judges_from_then_on(running: Running, good: bytes) -> None:
    """A model without samples is told to name some; whoever did was still judged by what had been made up. A file that comes later is seen at once."""
    assert upload(running, "later", {"model.onnx": good}).status_code == 201
    folder, frozen = running.folder / "models" / "later", running.folder / "state" / "models" / "later" / "reference" / "meta.json"
    running.until(frozen.exists)
    assert json.loads(frozen.read_bytes())["origin"] == "synthetic"

    def reference() -> tuple[str, int]:
        meta: dict[str, Any] = json.loads(frozen.read_bytes()) if frozen.exists() else {"origin": "", "hashes": ()}
        return str(meta["origin"]), len(meta["hashes"])

    def judged_by(count: int) -> Callable[[], bool]:
        return lambda: reference() == ("owner", count)

    (folder / "model.yaml").write_text("samples: {reference: r.npz, calibration: c.npz}\n")
    missing: Callable[[], bool] = lambda: "'r.npz' does not exist" in str(running.admin("GET", "/admin/models/later")["loaded"])
    running.until(missing)
    assert reference() == ("synthetic", 64), "what is there judges until there is something better"
    (folder / "model.yaml").write_text("{}\n")
    running.until(lambda: not missing())
    for count, name in ((40, "r.npz"), (50, "more.npz")):
        np.savez(folder / name, x=np.eye(count, 4, dtype=np.float32) + np.arange(count, dtype=np.float32)[:, None])
        (folder / "model.yaml").write_text(f"samples: {{reference: {name}, calibration: c.npz}}\n")
        running.until(judged_by(count))
    assert not missing()


def test_a_packed_model_is_deployed_as_it_is_and_a_damaged_one_is_not(running: Running, tmp_path: Path) -> None:
    pack(scaled(tmp_path / "small.onnx", 4.0), tmp_path / "small.onnx.packed")
    name, files = files_to_deploy(tmp_path / "small.onnx.packed", None, None)
    assert (name, set(files)) == ("small", {"model.onnx.packed"})
    packed = files["model.onnx.packed"].read_bytes()
    assert upload(running, name, {"model.onnx.packed": packed}).status_code == 201
    document = {"inputs": [json_input("x", "FP32", [1, 4], [1, 2, 3, 4])]}
    assert running.call("POST", f"/v2/models/{name}/infer", json=document).json()["outputs"][0]["data"] == [4, 8, 12, 16]
    assert [path.name for path in (running.folder / "models" / name / "1").iterdir()] == ["model.onnx.packed"]
    damaged = packed[:-1] + bytes([packed[-1] ^ 1])
    refused(upload(running, "damaged", {"model.onnx.packed": damaged}), "packed")
    assert not (running.folder / "models" / "damaged").exists() and not leftovers(running)


def test_uploads_can_be_switched_off_and_need_a_writable_repository(tmp_path: Path, good: bytes) -> None:
    identity(tmp_path / "models" / "standing" / "1" / "model.onnx")
    with server(tmp_path, allow_uploads="false") as closed:
        closed.ready("standing")
        refused(upload(closed, "m", {"model.onnx": good}), "HONE_ALLOW_UPLOADS", 403)
        files = {"parameters": {"file:1/model.onnx": "AAAA"}}
        refused(
            closed.call("POST", "/v2/repository/models/m/load", json=files, headers={"Authorization": f"Bearer {closed.token}"}), "off", 403
        )
    with read_only(tmp_path / "models"), server(tmp_path) as unwritable:
        unwritable.ready("standing")
        refused(upload(unwritable, "m", {"model.onnx": good}), "cannot be written", 403)
        refused(
            unwritable.call("DELETE", "/admin/models/standing", headers={"Authorization": f"Bearer {unwritable.token}"}),
            "cannot be written",
            403,
        )
        assert unwritable.call("GET", "/v2/models/standing/ready").status_code == 200
        assert not leftovers(unwritable)
