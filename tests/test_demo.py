"""`hone demo` as a newcomer meets it: a real server and worker, the printed curl, the command line beside it, and Ctrl-C."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import pytest

from app.client import Client
from app.demo import copy_repository, greeting, own_address, refuse_other_server, refuse_taken_port
from app.errors import HoneError
from app.settings import Settings
from tests.running_server import server

ROOT = Path(__file__).resolve().parents[1]
HONE = [sys.executable, "-m", "app.cli"]
READY_S, STOP_S = 180.0, 60.0


@dataclass
class Demo:
    """A running `hone demo` with a state folder of its own; its output is collected as it comes."""

    folder: Path
    port: int
    process: subprocess.Popen[str] = field(init=False)
    lines: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.process = subprocess.Popen(
            [*HONE, "demo"], cwd=self.folder, env=self.environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        self.reader = threading.Thread(target=self._collect, daemon=True)
        self.reader.start()

    def _collect(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.lines.append(line)

    def environment(self) -> dict[str, str]:
        own = {
            "HONE_PORT": str(self.port),
            "HONE_STATE": str(self.folder / "state"),
            "PYTHONPATH": str(ROOT),
            "HOME": str(self.folder / "home"),
        }
        return {"PATH": os.environ["PATH"]} | own

    @property
    def output(self) -> str:
        return "".join(self.lines)

    def wait_for(self, text: str, seconds: float = READY_S) -> str:
        wait_until(lambda: text in self.output or self.process.poll() is not None, seconds)
        assert text in self.output, self.output
        return self.output

    def hone(self, *arguments: str, timeout: float = 240) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*HONE, *arguments], cwd=self.folder, env=self.environment(), capture_output=True, text=True, timeout=timeout)

    def processes(self) -> dict[int, str]:
        """Pid and command line of everything that was started with this state folder, but the demo itself."""
        mark, found = f"HONE_STATE={self.folder / 'state'}".encode(), {}
        for entry in Path("/proc").iterdir():
            try:
                if entry.name.isdigit() and mark in (entry / "environ").read_bytes().split(b"\0"):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
            except OSError:
                continue
        found.pop(self.process.pid, None)
        return found

    def stop(self) -> int:
        """Ctrl-C. Returns the exit status, with all that it printed read."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGINT)
        return self.ended()

    def ended(self) -> int:
        try:
            return self.process.wait(STOP_S)
        finally:
            self.process.kill()
            self.reader.join(10)
            assert self.process.stdout is not None
            self.process.stdout.close()


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Demo]:
    running = Demo(tmp_path_factory.mktemp("demo"), free_port())
    try:
        running.wait_for("Ctrl-C stops it")
        yield running
    finally:
        running.stop()


def test_the_printed_curl_gets_the_digit_s_label(demo: Demo) -> None:
    command = shlex.split(re.search(r"(curl .*)", demo.output)[1])  # type: ignore[index]
    if shutil.which("curl"):
        answer = json.loads(subprocess.run(command, cwd=demo.folder, capture_output=True, check=True, timeout=60).stdout)
    else:
        picture = next(part for part in command if part.startswith("@"))[1:]
        answer = httpx.post(command[-1], content=(demo.folder / picture).read_bytes()).json()
    assert answer["predictions"][0]["label"] == "6"


def test_what_it_prints_is_where_it_says(demo: Demo) -> None:
    token = re.search(r"admin token\s+(\S+)", demo.output)[1]  # type: ignore[index]
    assert (demo.folder / token).stat().st_mode & 0o777 == 0o600
    for path in ("/docs", "/metrics"):
        assert httpx.get(f"http://127.0.0.1:{demo.port}{path}").status_code == 200


def test_it_shows_one_line_for_each_event(demo: Demo) -> None:
    demo.wait_for("server.started", 30)
    demo.wait_for("model.deployed", 30)


def test_the_health_check_passes_without_token_or_home(demo: Demo) -> None:
    for arguments in (["--health"], ["--health", "live"]):
        checked = subprocess.run(
            [*HONE, "status", *arguments], cwd="/", env={"PYTHONPATH": str(ROOT), "HONE_PORT": str(demo.port), "HONE_HOST": "0.0.0.0"},
            capture_output=True, text=True, timeout=60,
        )  # fmt: skip
        assert (checked.returncode, checked.stdout) == (0, "ready\n"), checked


def test_the_command_line_finds_server_and_token_by_itself(demo: Demo) -> None:
    status = demo.hone("status")
    assert status.returncode == 0, status.stderr
    assert re.search(r"^digits\s+1\s", status.stdout, re.M), status.stdout
    models = json.loads(demo.hone("status", "--json").stdout)["models"]
    assert [(model["name"], model["active"], model["state"]) for model in models] == [("digits", "1", "ready")]
    assert "golden" in demo.hone("versions", "digits").stdout
    assert "model.deployed" in demo.hone("timeline", "digits").stdout
    assert all("kind" in json.loads(line) for line in demo.hone("timeline", "--json").stdout.splitlines())


def test_infer_takes_a_picture_and_a_protocol_request(demo: Demo) -> None:
    picture = demo.hone("infer", "digits", str(ROOT / "app" / "demo_models" / "digit.png"))
    assert picture.returncode == 0 and re.search(r"^6\s", picture.stdout, re.M), picture
    request = {"inputs": [{"name": "image", "datatype": "FP32", "shape": [1, 1, 32, 32], "data": [0.0] * 1024}]}
    (demo.folder / "request.json").write_text(json.dumps(request))
    answer = demo.hone("infer", "digits:1", "request.json")
    assert json.loads(answer.stdout)["outputs"][0]["shape"] == [1, 10], answer


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (["versions", "nothing"], "nothing"),
        (["promote", "digits"], "which version"),
        (["rollback", "digits"], "nothing to go back to"),
        (["optimize", "digits", "--with", "magic"], "magic"),
        (["infer", "digits", "missing.png"], "missing.png"),
        (["status", "--token", "wrong"], "--token"),
        (["jobs", "no-such-job"], "no-such-job"),
        (["remove", "digits:1"], "golden"),
    ],
    ids=lambda value: value if isinstance(value, str) else " ".join(value),
)
def test_refusals_are_one_line_with_the_remedy(demo: Demo, arguments: list[str], told: str) -> None:
    refused = demo.hone(*arguments)
    assert refused.returncode == 1 and refused.stderr.count("\n") == 1 and told in refused.stderr, refused


def test_a_second_demo_on_the_same_port_says_so(demo: Demo, tmp_path: Path) -> None:
    second = Demo(tmp_path, demo.port)
    assert second.ended() == 1
    assert "is in use" in second.output and f"HONE_PORT={demo.port + 1}" in second.output and second.output.count("\n") == 1
    assert second.processes() == {}


def test_a_model_is_deployed_and_removed_from_the_command_line(demo: Demo) -> None:
    deployed = demo.hone("deploy", str(ROOT / "app" / "demo_models" / "repository" / "digits" / "1" / "model.onnx"), "--name", "copy")
    assert deployed.returncode == 0, deployed.stderr
    assert httpx.get(f"http://127.0.0.1:{demo.port}/v2/models/copy/ready").status_code == 200
    removed = demo.hone("remove", "copy")
    assert removed.returncode == 0, removed.stderr
    wait_until(lambda: httpx.get(f"http://127.0.0.1:{demo.port}/v2/models/copy/ready").status_code == 404, 30)


def test_settings_change_on_the_live_server_and_roll_back(demo: Demo) -> None:
    before = json.loads(demo.hone("status", "digits", "--json").stdout)["settings"]["queue_limit"]
    assert demo.hone("settings", "digits", f"queue_limit={before + 1}").returncode == 0
    assert json.loads(demo.hone("status", "digits", "--json").stdout)["settings"]["queue_limit"] == before + 1
    assert demo.hone("rollback", "digits").returncode == 0
    assert json.loads(demo.hone("status", "digits", "--json").stdout)["settings"]["queue_limit"] == before


def test_ctrl_c_stops_all_of_it_cleanly(tmp_path: Path) -> None:
    demo = Demo(tmp_path, free_port())
    demo.wait_for("Ctrl-C stops it")
    assert demo.stop() == 0, demo.output
    assert "stopping" in demo.output and "Traceback" not in demo.output
    assert demo.processes() == {}
    assert "Traceback" not in "".join(path.read_text() for path in (tmp_path / "state" / "logs").iterdir())
    assert [path.name for path in tmp_path.iterdir()] == ["state"], (
        "it writes to its state folder only, not to HOME (ONNX Runtime's telemetry would)"
    )


def test_a_child_that_dies_ends_the_demo_and_says_which(tmp_path: Path) -> None:
    demo = Demo(tmp_path, free_port())
    demo.wait_for("Ctrl-C stops it")
    (server,) = (pid for pid, command in demo.processes().items() if command.rstrip().endswith("app.cli serve"))
    os.kill(server, signal.SIGKILL)
    assert demo.ended() == 1
    assert "`hone serve` was ended by SIGKILL" in demo.output
    wait_until(lambda: demo.processes() == {}, 20)


def test_files_that_were_changed_in_the_demo_s_repository_stay(tmp_path: Path) -> None:
    config = copy_repository(tmp_path) / "digits" / "model.yaml"
    config.write_text("description: mine\n")
    copy_repository(tmp_path)
    assert config.read_text() == "description: mine\n"
    assert (tmp_path / "demo" / "digits" / "1" / "model.onnx").stat().st_size > 1_000_000


def test_a_port_in_use_is_found_before_anything_starts() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken, pytest.raises(HoneError, match="in use"):
        refuse_taken_port(*taken.getsockname())
    with pytest.raises(HoneError, match="cannot listen on 192"):
        refuse_taken_port("192.0.2.1", 8000)


def test_the_greeting_names_what_a_newcomer_needs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = greeting(Settings(state=tmp_path / ".hone"), "http://127.0.0.1:8000", tmp_path / ".hone" / "digit.png")
    for part in ("@.hone/digit.png", ".hone/admin-token", "/docs", "/metrics", "optimize digits"):
        assert part in text


def test_the_greetings_commands_work_in_another_terminal_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    text = greeting(Settings(state=tmp_path / ".hone", port=8123), "http://127.0.0.1:8123", tmp_path / "digit.png")
    assert re.findall(r"  HONE_PORT=8123 \S+ (\w+)", text) == ["optimize", "status"], text
    settings = Settings(state=tmp_path / "a b", host="127.0.0.2", admin_token="secret")
    text = greeting(settings, "http://127.0.0.2:8000", tmp_path / "a b" / "digit.png")
    assert re.findall(r"  HONE_STATE='a b' HONE_HOST=127.0.0.2 \S+ (\w+)", text) == ["optimize", "status"], text
    assert "'@a b/digit.png'" in text and "admin-token" not in text and "HONE_ADMIN_TOKEN" in text and "secret" not in text


def test_the_demo_asks_its_own_server_whatever_the_variables_of_the_command_line_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With HONE_URL exported it watched, and broke, a server in production; an old HONE_TOKEN was taken for its own."""
    settings = Settings(state=tmp_path, port=8123)
    (tmp_path / "admin-token").write_text("own")
    elsewhere = {"HONE_URL": "https://production.example", "HONE_TOKEN": "old", "HONE_PORT": "9000"}
    address = own_address(settings, elsewhere)
    assert (address.url, address.admin, address.token) == ("http://127.0.0.1:8123", "http://127.0.0.1:8123", "own")
    assert own_address(settings, {**elsewhere, "HONE_ADMIN_TOKEN": "given"}).token == "given"
    monkeypatch.setenv("HONE_URL", "https://production.example")
    assert "  HONE_URL= HONE_STATE=" in greeting(settings, address.url, tmp_path / "digit.png"), "nor may the printed commands go there"


def test_only_the_demo_of_the_state_folder_is_broken(demo: Demo, tmp_path: Path) -> None:
    settings = Settings(state=demo.folder / "state", port=demo.port)
    with Client(own_address(settings, {})) as client:
        refuse_other_server(client, settings.state)
    with server(tmp_path, demo=True) as other:
        other.ready("digits")
        for state, told in ((tmp_path / "state", f"serves {tmp_path / 'models'}"), (tmp_path / "none", "does not take its token")):
            run = subprocess.run(
                [*HONE, "demo", "--break", "wrong"], cwd=tmp_path, env=demo.environment() | {"HONE_PORT": str(other.port), "HONE_STATE": str(state)},
                capture_output=True, text=True, timeout=60,
            )  # fmt: skip
            assert run.returncode == 1 and told in run.stderr and "--state" in run.stderr and run.stderr.count("\n") == 1, run.stderr
        assert [path.name for path in (tmp_path / "models" / "digits").iterdir() if path.name.isdigit()] == ["1"]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_the_midst_of_a_fault_puts_it_back(number: signal.Signals) -> None:
    """SIGTERM (timeout, a closed terminal) left the running server broken: its objective, its versions, its quota."""
    code = "import time\nfrom app.demo import interrupted_by_signal\nwith interrupted_by_signal():\n    try:\n        print('in', flush=True); time.sleep(60)\n"
    code += "    finally:\n        print('out', flush=True); time.sleep(0.5); print('put back', flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == "in\n"
        process.send_signal(number)
        assert process.stdout.readline() == "out\n"
        process.send_signal(number)
        out, error = process.communicate(timeout=20)
    assert out == "put back\n" and error.rstrip().endswith("KeyboardInterrupt")


@pytest.mark.parametrize(("ignored", "ended"), [(False, True), (True, False)])
def test_nohup_is_respected(ignored: bool, ended: bool) -> None:
    code = f"import signal\nif {ignored}: signal.signal(signal.SIGHUP, signal.SIG_IGN)\nfrom app.demo import stop_on_signal\n"
    code += "with stop_on_signal() as stop:\n    signal.raise_signal(signal.SIGHUP); print(stop.asked)"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout == f"{ended}\n"


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
        return port


def wait_until(holds: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.1)


@pytest.mark.parametrize(("cause", "told"), [("leek", "there are load, host"), ("leak", "pip install 'hone-server[optimize]'")])
def test_a_fault_that_cannot_be_put_in_is_told_before_anything_starts(tmp_path: Path, cause: str, told: str) -> None:
    """It was told after half a minute of traffic, with a Makefile's remedy to people who have none."""
    (tmp_path / "bare.py").write_text("import sys; sys.modules['torch'] = None; from app.cli import main; sys.exit(main())")
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "HONE_PORT": str(free_port())}
    run = subprocess.run(
        [sys.executable, "bare.py", "demo", "--break", cause], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=60
    )
    assert run.returncode == 1 and told in run.stderr and run.stderr.count("\n") == 1, run.stderr
    assert not (tmp_path / ".hone").exists()
