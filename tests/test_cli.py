"""The command `hone` without a server: arguments, what a person typed, tables, addresses and tokens, and errors in one line."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote_to_bytes

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from app import tables
from app.arguments import files_to_deploy, is_protocol, named, request_body, settings_of, steps_of
from app.cli import main, parser
from app.client import Address, Client, ClientError
from app.domain import short
from app.store.codec import dumps, loads
from tests.journal_story import deployed, requested, told

ROOT = Path(__file__).resolve().parents[1]


def subcommands() -> dict[str, argparse.ArgumentParser]:
    choices = next(action.choices for action in parser()._actions if isinstance(action.choices, dict))
    return dict(choices)


@pytest.mark.parametrize("name", subcommands())
def test_every_sub_command_explains_itself_with_an_example(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main([name, "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert f"usage: hone {name}" in text and "examples:" in text and f"hone {name}" in text.split("examples:")[1]


@pytest.mark.parametrize(
    "line", ["--url {0} status", "--url={0} --json status", "--json --timeout 2 --url {0} timeline", "-n 3 timeline --url {0}"]
)
def test_what_a_command_takes_may_stand_before_it(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.format("http://127.0.0.1:1").split()) == 1
    assert "http://127.0.0.1:1" in capsys.readouterr().err


@pytest.mark.parametrize("line", ["--url http://127.0.0.1:1", "--url", ""])
def test_options_without_a_command_ask_for_one(line: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(line.split())
    assert ended.value.code == 2 and "required: COMMAND" in capsys.readouterr().err


def test_an_option_means_the_same_kind_of_thing_in_every_command() -> None:
    """Before the command nobody knows which one it is: an option takes a value in all of them, or in none."""
    kinds = {(option, action.nargs != 0) for one in subcommands().values() for action in one._actions for option in action.option_strings}
    assert len(kinds) == len({option for option, _ in kinds})


def test_the_main_module_imports_nothing_heavy() -> None:
    code = "import sys, app.cli; print([m for m in ('fastapi', 'numpy', 'httpx', 'onnx', 'onnxruntime', 'pydantic', 'asyncio') if m in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=True)
    assert run.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("graph", ["graph"]),
        ("graph, int8-static ,tune", ["graph", "int8-static", "tune"]),
        ("int8-static(calibration=entropy)", [{"method": "int8-static", "calibration": "entropy"}]),
        (
            "int8-static(percentile=99.99, per_channel=true),tune",
            [{"method": "int8-static", "percentile": 99.99, "per_channel": True}, "tune"],
        ),
        ('int8-static(exclude=["a,b)","c"],samples=64),tune', [{"method": "int8-static", "exclude": ["a,b)", "c"], "samples": 64}, "tune"]),
        ("int8-static(exclude=[/fc/Gemm, /head/Gemm])", [{"method": "int8-static", "exclude": ["/fc/Gemm", "/head/Gemm"]}]),
        ('codebook(layer_bits=[["fc",4],["conv",6]])', [{"method": "codebook", "layer_bits": [["fc", 4], ["conv", 6]]}]),
    ],
)
def test_recipes_are_names_with_options(text: str, steps: list[Any]) -> None:
    assert steps_of(text) == steps


@pytest.mark.parametrize("text", ["", ",", "graph,,tune", "int8-static(", "int8-static(entropy)", "(x=1)", "int8-static(exclude=[a)"])
def test_a_recipe_that_is_none_says_what_was_expected(text: str) -> None:
    with pytest.raises(ClientError, match=r"expected|needs at least|not closed"):
        steps_of(text)


def test_settings_are_names_with_whole_numbers() -> None:
    assert settings_of(["batch_limit=16", "spin_duration_us=0"]) == {"batch_limit": 16, "spin_duration_us": 0}
    with pytest.raises(ClientError, match="batch_limit=many"):
        settings_of(["batch_limit=many"])


def test_a_model_may_name_its_version() -> None:
    assert named("digits:1.2") == ("digits", "1.2") and named("digits") == ("digits", "")


@pytest.mark.parametrize("command", ["remove", "promote", "verify", "infer", "load"])
@pytest.mark.parametrize("text", ["digits:", ":1.2", ""])
def test_a_version_that_was_meant_and_is_empty_is_refused_before_anything_is_asked(
    command: str, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([command, text, *(["-"] if command == "infer" else [])]) == 1
    assert "expected MODEL or MODEL:VERSION" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments",
    [["optimize", "digits", "--with", ""], ["optimize", "digits", "--try", ""], ["deploy", "m.onnx", "--name", ""], ["deploy", "m.onnx", "--config", ""]],
)  # fmt: skip
def test_what_a_script_left_empty_is_not_taken_for_the_default(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    assert main([*arguments, "--url", "http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert "at least one method" in error or "is empty" in error


def test_two_versions_to_promote_are_one_too_many(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["promote", "digits:1.1", "1.2"]) == 1
    assert "1.1 or 1.2?" in capsys.readouterr().err


@pytest.mark.parametrize("name", ["..", ".", "", "a/b", "a?b"])
def test_no_name_climbs_to_another_path(name: str) -> None:
    """`remove digits:..` is about a version that cannot be, never about the model."""
    asked: list[bytes] = []

    class Answers(BaseHTTPRequestHandler):
        def do_DELETE(self) -> None:
            asked.append(self.path.encode())
            self.send_response(200)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None: ...

    server = HTTPServer(("127.0.0.1", 0), Answers)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        url = f"http://127.0.0.1:{server.server_port}"
        with Client(Address(url, url, "t")) as client:
            if name:
                client.remove("digits", name)
                client.remove(name)
                assert [unquote_to_bytes(path.rpartition(b"/")[2]).decode() for path in asked] == [name, name]
                assert asked[0].startswith(b"/admin/models/digits/versions/") and asked[1].startswith(b"/admin/models/")
            with pytest.raises(ClientError, match="a name is empty"):
                client.versions("")
    finally:
        server.shutdown()
        server.server_close()


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "soon"])
def test_a_timeout_that_is_none_is_refused_as_an_argument(seconds: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["status", "--timeout", seconds])
    assert ended.value.code == 2 and "--timeout" in capsys.readouterr().err


@pytest.mark.parametrize("token", ["pässword", "two\nlines"])
def test_a_token_that_is_none_is_told_in_one_line_without_showing_it(token: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", "http://127.0.0.1:9", "--token", token]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "the token has characters" in error and token not in error


def test_a_file_is_sent_as_what_its_name_says(tmp_path: Path) -> None:
    for name, kind in (
        ("a.PNG", "image/png"),
        ("a.jpeg", "image/jpeg"),
        ("a.json", "application/json"),
        ("a.bin", "application/octet-stream"),
    ):
        (tmp_path / name).write_bytes(b"x")
        assert request_body(str(tmp_path / name)) == (b"x", kind)
    assert is_protocol(b'{"inputs": []}') and not is_protocol(b'{"image": []}') and not is_protocol(b"[1]") and not is_protocol(b"{")


def test_deploying_takes_the_newest_version_its_data_and_what_model_yaml_names(tmp_path: Path) -> None:
    for number in ("2", "10"):
        (tmp_path / "resnet" / number).mkdir(parents=True)
        save_with_external_data(tmp_path / "resnet" / number / "model.onnx", f"weights{number}.bin")
    (tmp_path / "resnet" / "model.yaml").write_text("task: classification\npostprocess: {labels: labels.txt}\n")
    (tmp_path / "resnet" / "labels.txt").write_text("cat\ndog\n")
    name, files = files_to_deploy(tmp_path / "resnet", None, None)
    assert name == "resnet" and set(files) == {"model.onnx", "weights10.bin", "model.yaml", "labels.txt"}
    assert files["model.onnx"] == tmp_path / "resnet" / "10" / "model.onnx"


def test_a_data_file_that_was_left_behind_is_named(tmp_path: Path) -> None:
    save_with_external_data(tmp_path / "net.onnx", "net.onnx.data")
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(ClientError, match=r"net\.onnx\.data does not exist"):
        files_to_deploy(tmp_path / "net.onnx", None, None)


def test_what_is_no_model_is_refused_with_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ClientError, match="does not exist"):
        files_to_deploy(tmp_path / "nothing.onnx", None, None)
    with pytest.raises(ClientError, match=r"expected .*1/model\.onnx"):
        files_to_deploy(tmp_path, None, None)
    (tmp_path / "1").mkdir()
    (tmp_path / "1" / "model.safetensors").touch()
    with pytest.raises(ClientError, match=r"1/model\.safetensors is a PyTorch model's: such a folder is put into the server's repository"):
        files_to_deploy(tmp_path, None, None)
    (tmp_path / "model.pt").touch()
    with pytest.raises(ClientError, match=r"no \.onnx file"):
        files_to_deploy(tmp_path / "model.pt", None, None)


def test_the_address_comes_from_arguments_then_from_the_environment() -> None:
    assert Address.from_env({"HONE_TOKEN": "t"}).url == "http://127.0.0.1:8000"
    assert Address.from_env({"HONE_TOKEN": "t", "HONE_HOST": "0.0.0.0", "HONE_PORT": "9000"}).url == "http://127.0.0.1:9000"
    assert Address.from_env({"HONE_TOKEN": "t", "HONE_HOST": "::"}).url == "http://[::1]:8000"
    assert Address.from_env({"HONE_TOKEN": "t", "HONE_URL": "https://hone.example/"}).url == "https://hone.example"
    assert Address.from_env({"HONE_TOKEN": "t", "HONE_URL": "x"}, url="box:1").url == "http://box:1"
    with_port = Address.from_env({"HONE_TOKEN": "t", "HONE_ADMIN_PORT": "9001"})
    assert (with_port.url, with_port.admin) == ("http://127.0.0.1:8000", "http://127.0.0.1:9001")
    elsewhere = {"HONE_TOKEN": "t", "HONE_URL": "https://box.example:8000", "HONE_ADMIN_PORT": "9001"}
    assert Address.from_env(elsewhere).admin == "https://box.example:9001", "a port of the machine that HONE_URL names, not of this one"
    assert Address.from_env(elsewhere | {"HONE_ADMIN_HOST": "0.0.0.0"}).admin == "https://box.example:9001"
    assert Address.from_env(elsewhere | {"HONE_ADMIN_HOST": "10.0.0.7"}).admin == "https://10.0.0.7:9001"
    assert Address.from_env(elsewhere, url="http://other:8000").admin == "http://other:8000"
    for port in ("9001x", "70000", "-1"):
        with pytest.raises(ClientError, match=r"HONE_ADMIN_PORT is .*from 1 to 65535"):
            Address.from_env(elsewhere | {"HONE_ADMIN_PORT": port})
    in_kubernetes = {"HONE_PORT": "tcp://10.96.0.7:8000", "HONE_PORT_8000_TCP_ADDR": "10.96.0.7", "HONE_TOKEN": "t\n"}
    found = Address.from_env(in_kubernetes)
    assert (found.url, found.token) == ("http://127.0.0.1:8000", "t")


def test_the_token_comes_from_the_state_folder_where_none_is_given(tmp_path: Path) -> None:
    (tmp_path / "admin-token").write_text("secret\n")
    assert Address.from_env({}, state=str(tmp_path)).token == "secret"
    assert Address.from_env({"HONE_STATE": str(tmp_path)}).token == "secret"
    assert Address.from_env({"HONE_STATE": str(tmp_path), "HONE_ADMIN_TOKEN": "other"}).token == "other"
    missing = Address.from_env({"HONE_STATE": str(tmp_path / "elsewhere")})
    assert missing.token == "" and "admin-token does not exist" in missing.token_problem and "--token" in missing.token_problem


def test_without_a_server_one_line_says_how_to_start_one(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--url", "http://127.0.0.1:9"]) == 1
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "no server answers at http://127.0.0.1:9" in error and "hone serve" in error


def test_the_health_check_fails_quietly_without_a_server(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["status", "--health", "--url", "http://127.0.0.1:9"]) == 1
    assert capsys.readouterr().out.startswith("not live: no server answers")
    assert main(["status", "--health", "--json", "--url", "http://127.0.0.1:9"]) == 1
    told = json.loads(capsys.readouterr().out)
    assert (told["live"], told["ready"]) == (False, False) and "no server answers" in told["error"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["timeline", "-n", "0"], "'0' is no number from 1 to 1000"),
        (["timeline", "-n", "1001"], "'1001' is no number from 1 to 1000"),
        (["status", "--timeout", "abc"], "'abc' is no number of seconds"),
    ],
)
def test_numbers_that_mean_nothing_are_refused_as_arguments(arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(arguments)
    assert ended.value.code == 2 and said in capsys.readouterr().err


def test_a_file_that_cannot_be_read_is_named_in_plain_words(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["infer", "digits", str(tmp_path / "nope.png")]) == 1
    assert capsys.readouterr().err == f"hone: {tmp_path / 'nope.png'}: No such file or directory\n"
    os.mkfifo(tmp_path / "pipe.onnx")
    with pytest.raises(ClientError, match="neither a file nor a folder"):
        files_to_deploy(tmp_path / "pipe.onnx", None, None)


def test_a_terminal_of_another_encoding_is_written_to(tmp_path: Path) -> None:
    """The figures of a status hold signs such as \u2264; a traceback is no way to say that a terminal lacks them."""
    run = subprocess.run(
        [sys.executable, "-c", "import sys; from app.cli import main; main(['status', '--health', '--url', 'http://\u2264:9'])"],
        cwd=ROOT, capture_output=True, text=True, env={**os.environ, "PYTHONIOENCODING": "ascii"}, check=False,
    )  # fmt: skip
    assert "not live" in run.stdout and "Traceback" not in run.stderr


def test_a_wrong_setting_is_named_in_one_line(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("HONE_PROT", "9000")
    assert main(["demo"]) == 1
    assert "did you mean HONE_PORT?" in capsys.readouterr().err


def test_a_table_is_aligned_and_leaves_out_what_is_empty() -> None:
    rows = [{"name": "digits", "active": "1.1", "state": "ready"}, {"name": "a", "active": "", "state": "loading"}]
    assert tables.models(rows).splitlines() == ["MODEL   ACTIVE  STATE", "digits  1.1     ready", "a       -       loading"]


def test_a_model_shows_what_happened_last_and_how_long_ago() -> None:
    text = tables.models([{"name": "digits", "latest": {"seq": 7, "kind": "version.confirmed", "at": time.time() - 130}}])
    assert "LAST EVENT" in text and "version.confirmed, 2 min ago" in text
    assert [tables.age(seconds) for seconds in (-5, 59, 3600, 200_000)] == ["0 s", "59 s", "1 h", "2 d"]


def test_an_event_is_one_line_with_what_of_whom_and_why() -> None:
    event = {
        "kind": "desired.changed", "model": "digits", "version": "1.1", "job": "", "actor": "admin:eve", "seq": 7, "at": 0.0,
        "data": {"version": "1.1", "from": "1", "reason": "asked\nfor\x1b[31m", "sha256": "ab"},
    }  # fmt: skip
    line = tables.event_line(event)
    assert line.isprintable()
    for part in ("desired.changed", "digits:1.1", "asked for", "from=1", "(by admin:eve)"):
        assert part in line
    assert "sha256" not in line


def test_numbers_for_people_are_no_powers_of_ten() -> None:
    assert [short(value) for value in (1100.4, 999.7, 839.4, 26.06, 0.0414, 0)] == ["1100", "1000", "839", "26.1", "0.0414", "0"]
    assert [short(value) for value in (0.00001234, -5.0, 20.0)] == ["0.0000123", "-5", "20"]
    assert short(1234.0, 4) == "1234" and short(12345.5, 4) == "12346"
    assert list(tables.now({"p95_s": 1.1004, "requests_per_s": 2345.6})) == ["p95 1100 ms at 2346 requests/s"]


def test_what_true_labels_said_stands_beside_what_is_usual() -> None:
    known: dict[str, Any] = {"right": 90, "labelled": 100, "usual": None}
    assert list(tables.now({"labels": known})) == ["right on 90 of 100 labelled answers of five minutes"]
    assert list(tables.now({"labels": known | {"usual": 0.981}})) == [
        "right on 90 of 100 labelled answers of five minutes, on 98.1% when all was well"
    ]


def test_what_a_build_is_expected_to_bring_is_said_once() -> None:
    data = {"summary": "plan: build int8-static; expected 2.6 × as fast", "expected": {"gain": 2.563, "cpu_s": 5.7}, "action": "optimize"}
    assert tables.event_line({"kind": "plan.made", "model": "m", "data": data}).endswith("expected 2.6 × as fast")


def test_a_state_that_was_put_back_is_one_short_line() -> None:
    """Not everything that stands in it, which is every model with all that it ever built."""
    state = loads(dumps(told(deployed(), requested("j"))))
    line = tables.event_line({"kind": "journal.recovered", "seq": 9, "at": 0.0, "data": {"state": state}})
    assert line.split(maxsplit=2)[2] == "state of event 2 (models: 1); all change is frozen until `hone unfreeze`"


def test_an_event_of_an_unknown_kind_is_shown_all_the_same() -> None:
    assert tables.event_line({"kind": "thing.happened", "data": {"a": [1, 2], "b": {"c": True}}}).split() == [
        "-", "thing.happened", "a=1,2,", "b=c=yes",
    ]  # fmt: skip


def test_a_job_says_where_it_is() -> None:
    seen = {"method": "int8-static", "step": "calibrating", "share": 0.25, "detail": {}}
    assert tables.progress({"id": "d-1", "state": "building", "progress": seen}) == "d-1  building  int8-static  calibrating  20%"
    assert tables.progress({"id": "d-1", "state": "finished", "progress": None}) == "d-1  finished"


def test_versions_show_fidelity_of_the_largest_set_and_speed() -> None:
    proof = {
        "verdict": "passed",
        "fidelity": {
            "live": {"metric": "agreement", "value": 1.0, "low": 0.27, "samples": 1},
            "labelled": {"metric": "accuracy", "value": 0.9987, "low": 0.9964, "samples": 747},
        },
        "latency": {"rows_ratio": {"estimate": 0.611, "low": 0.588, "high": 0.638}},
    }
    text = tables.versions([{"version": "1", "golden": True}, {"version": "1.1", "parent": "1", "active": True, "proof": proof}])
    assert "accuracy 0.9987 (at least 0.9964, 747 samples)" in text and "0.61 x" in text
    assert text.splitlines()[1].split()[:3] == ["-", "1", "golden"] and "unproven" in text.splitlines()[1]


def test_recipes_show_methods_not_all_their_options() -> None:
    rows = [{"id": "d-1", "model": "d", "tries": [[{"method": "graph", "level": "all"}, {"method": "tune"}], ["int8-static"]]}]
    assert "graph + tune | int8-static" in tables.jobs(rows)
    assert "verify 1.2" in tables.jobs([{"id": "d-2", "tries": [[{"method": "verify", "version": "1.2"}]]}]), "of which version"


def test_sizes_and_nested_fields_are_readable() -> None:
    assert [tables.size(n) for n in (0, 900, 1_900_000, 2_500_000_000)] == ["-", "900 B", "1.9 MB", "2.5 GB"]
    assert tables.fields_of({"a": 1, "long": {"x": 0.123456, "none": None}}) == "a     1\nlong\n  x  0.1235"
    assert tables.fields_of({"at": 1.7e9}) == f"at  {tables.clock(1.7e9)}" and "2023" in tables.clock(1.7e9)


def save_with_external_data(path: Path, data: str) -> None:
    weight = numpy_helper.from_array(np.ones((64, 64), np.float32), "w")
    graph = helper.make_graph(
        [helper.make_node("MatMul", ["x", "w"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 64])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 64])],
        [weight],
    )
    onnx.save_model(helper.make_model(graph), str(path), save_as_external_data=True, location=data, size_threshold=0)
