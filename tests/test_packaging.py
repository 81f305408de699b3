"""Image, compose file, board and README say what is true: files exist, commands run, settings and tree are complete.

`python -m tests.test_packaging` writes the README's table of settings anew.
"""

from __future__ import annotations

import dataclasses
import json
import re
import shlex
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

from app.settings import PREFIX, Settings
from tests.conftest import SEARCH_PATH

ROOT = Path(__file__).resolve().parents[1]
COMPOSE: dict[str, Any] = yaml.safe_load((ROOT / "docker-compose.yml").read_text())
DOCKERFILE = re.sub(r"\\\n", " ", (ROOT / "Dockerfile").read_text())
README = (ROOT / "README.md").read_text()
BOARD: dict[str, Any] = json.loads((ROOT / "grafana" / "dashboards" / "hone.json").read_text())


def instructions(name: str) -> list[str]:
    return [line.partition(" ")[2].strip() for line in DOCKERFILE.splitlines() if line.startswith(f"{name} ")]


def hone_commands() -> list[list[str]]:
    """Every `hone …` that the image and the compose file run."""
    of_image = [json.loads(line[line.index("[") :]) for line in instructions("CMD") + instructions("HEALTHCHECK")]
    of_compose = [service["command"] for service in COMPOSE["services"].values() if service.get("command", [""])[0] == "hone"]
    return [*of_image, *of_compose]


def test_the_compose_file_obeys_the_compose_specification() -> None:
    schema = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text())
    jsonschema.Draft7Validator(schema).validate(COMPOSE)


def test_a_wrong_key_in_the_compose_file_would_be_found() -> None:
    schema = json.loads((ROOT / "tests" / "data" / "compose-spec.json").read_text())
    broken = {"services": {"server": COMPOSE["services"]["server"] | {"comand": ["hone", "serve"]}}}
    with pytest.raises(jsonschema.ValidationError, match="comand"):
        jsonschema.Draft7Validator(schema).validate(broken)


def test_services_name_stages_volumes_and_services_that_exist() -> None:
    stages = {line.split()[-1] for line in instructions("FROM")}
    for name, service in COMPOSE["services"].items():
        if "build" in service:
            assert service["build"]["target"] in stages, name
        for needed in service.get("depends_on", ()):
            assert needed in COMPOSE["services"], name
        for volume in service.get("volumes", ()):
            source = re.sub(r"\$\{\w+:-([^}]*)\}", r"\1", volume).split(":")[0]
            assert (ROOT / source).exists() if source.startswith(".") else source in COMPOSE["volumes"], volume


def test_settings_in_image_and_compose_file_are_settings() -> None:
    named = set(re.findall(r"\bHONE_\w+", DOCKERFILE))
    for service in COMPOSE["services"].values():
        named |= {name for name in service.get("environment", {}) if name.startswith(PREFIX)}
    known = {PREFIX + field.name.upper() for field in dataclasses.fields(Settings)}
    assert named and named <= known


def test_every_file_that_the_image_copies_exists_and_is_not_ignored() -> None:
    wanted = [source for line in instructions("COPY") if not line.startswith("--from") for source in line.split()[:-1]]
    let_in = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
    assert wanted and all((ROOT / source).exists() for source in wanted)
    assert set(wanted) <= let_in
    stages = {line.split()[-1] for line in instructions("FROM")}
    assert {match for line in instructions("COPY") for match in re.findall(r"--from=(\S+)", line)} <= stages


def test_images_run_as_an_ordinary_user_and_only_the_server_image_is_last() -> None:
    assert instructions("USER") == ["hone"]
    assert instructions("FROM")[-1].endswith("AS server"), "a plain `docker build .` makes the image without torch"


@pytest.mark.parametrize("command", hone_commands(), ids=shlex.join)
def test_every_hone_command_of_image_and_compose_file_is_one(command: list[str]) -> None:
    run = subprocess.run([sys.executable, "-m", "app.cli", *command[1:], "--help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert run.returncode == 0 and f"usage: hone {command[1]}" in run.stdout, run.stderr


@pytest.mark.needs("redis-server", "redis-cli")
def test_the_redis_command_starts_and_its_health_check_passes(tmp_path: Path) -> None:
    service = COMPOSE["services"]["redis"]
    where = ["--dir", str(tmp_path), "--port", "0", "--unixsocket", str(tmp_path / "redis.sock")]
    with subprocess.Popen([*service["command"], *where], stdout=subprocess.DEVNULL) as redis:
        try:
            check = [*service["healthcheck"]["test"][1:]]
            wait_until(lambda: _says([check[0], "-s", str(tmp_path / "redis.sock"), *check[1:]]) == "PONG", 20)
        finally:
            redis.send_signal(signal.SIGTERM)
    assert redis.returncode == 0


@pytest.mark.needs("prometheus", "promtool")
def test_the_prometheus_command_starts_with_its_configuration(tmp_path: Path) -> None:
    config = ROOT / "grafana" / "prometheus.yml"
    subprocess.run(["promtool", "check", "config", str(config)], check=True, capture_output=True, env={"PATH": SEARCH_PATH})
    here = {"/etc/prometheus/prometheus.yml": str(config), "/prometheus": str(tmp_path / "data")}
    arguments = [re.sub(r"=(/.*)", lambda found: f"={here[found[1]]}", part) for part in COMPOSE["services"]["prometheus"]["command"]]
    log = tmp_path / "log"
    with (
        log.open("w") as out,
        subprocess.Popen(
            ["prometheus", *arguments, "--web.listen-address=127.0.0.1:0"], stderr=out, env={"PATH": SEARCH_PATH}
        ) as prometheus,
    ):
        try:
            wait_until(lambda: "Server is ready" in log.read_text(), 60)
        finally:
            prometheus.send_signal(signal.SIGTERM)
    assert prometheus.returncode == 0


def test_prometheus_scrapes_the_services_at_the_ports_that_they_listen_on() -> None:
    config = yaml.safe_load((ROOT / "grafana" / "prometheus.yml").read_text())
    targets = {target for job in config["scrape_configs"] for group in job["static_configs"] for target in group["targets"]}
    worker_port = COMPOSE["services"]["worker"]["environment"]["HONE_WORKER_PORT"]
    assert targets == {"server:8000", f"worker:{worker_port}"}


def test_the_board_asks_the_provisioned_source_and_has_one_place_for_each_panel() -> None:
    source = yaml.safe_load((ROOT / "grafana" / "provisioning" / "datasources" / "prometheus.yml").read_text())["datasources"][0]
    provider = yaml.safe_load((ROOT / "grafana" / "provisioning" / "dashboards" / "hone.yml").read_text())["providers"][0]
    mounts = COMPOSE["services"]["grafana"]["volumes"]
    assert any(mount.startswith("./grafana/dashboards:") and mount.split(":")[1] == provider["options"]["path"] for mount in mounts)
    panels = BOARD["panels"]
    assert {panel["datasource"]["uid"] for panel in panels} == {source["uid"]}
    assert (
        len({(panel["gridPos"]["x"], panel["gridPos"]["y"]) for panel in panels}) == len({panel["id"] for panel in panels}) == len(panels)
    )
    assert all(panel["gridPos"]["x"] + panel["gridPos"]["w"] <= 24 for panel in panels)
    assert [note["name"] for note in BOARD["annotations"]["list"]] == ["Swaps"]


def test_the_board_shows_several_servers_as_one_or_names_each() -> None:
    """Else all have a line of the same name, and one that is stuck on another version is not to be found."""
    targets = [target for panel in BOARD["panels"] for target in panel["targets"]]
    assert all(" by (" in target["expr"] or "{{instance}}" in target["legendFormat"] for target in targets)


def test_the_readme_lists_every_setting_with_its_default_and_meaning() -> None:
    assert settings_table() in README, "write the table anew: python -m tests.test_packaging"


def test_the_readme_shows_the_tree_as_it_is() -> None:
    shown = set(tree_paths(README))
    assert all((ROOT / path).exists() for path in shown), sorted(path for path in shown if not (ROOT / path).exists())
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True, check=True).stdout.split()
    top = {path.split("/")[0] for path in tracked} - {".gitignore", ".dockerignore"}
    packages = {
        str(Path(path).parent) for path in tracked if path.startswith("app/") and path.count("/") == 2 and path.endswith("/__init__.py")
    }
    missing = {name for name in top | packages if not any(path == name or path.startswith(f"{name}/") for path in shown)}
    assert not missing, f"the README's tree lacks {sorted(missing)}"


def test_every_command_that_the_readme_names_exists() -> None:
    from app.cli import parser

    names = set(re.findall(r"(?:^|`|\s)hone ([a-z]+)\b(?=[ `\n])", "\n".join(code_of(README))))
    choices = next(action.choices for action in parser()._actions if isinstance(action.choices, dict))
    assert {"demo", "serve", "worker", "optimize", "rollback"} <= names <= set(choices)
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.M))
    assert set(re.findall(r"\bmake ([a-z]+)", README)) <= targets


def test_everything_that_is_installed_is_pinned_exactly() -> None:
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and not line.startswith("#")]
    assert all(re.fullmatch(r"[\w.-]+==[\w.]+", pin) for pin in pins)
    pinned = {_canonical(pin.split("==")[0]) for pin in pins}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    asked = [*project["dependencies"], *(name for extra in project["optional-dependencies"].values() for name in extra)]
    assert {_canonical(re.split(r"[\[>=<]", name)[0]) for name in asked} <= pinned


def settings_table() -> str:
    """The README's table, made of app.settings."""
    rows = ["| setting | default | what it is |", "|---|---|---|"]
    for field in dataclasses.fields(Settings):
        default = "" if field.default in ("", ()) else f"`{_plain(field.default)}`"
        rows.append(f"| `{PREFIX}{field.name.upper()}` | {default} | {field.metadata['text'].replace('|', '/')} |")
    return "\n".join(rows)


def tree_paths(text: str) -> list[str]:
    """The paths of the README's tree: two blanks of indent for each level, names up to the first double blank, `·` between peers."""
    block = text[text.index("```tree\n") + 8 :]
    folders: list[str] = []
    paths: list[str] = []
    for line in block[: block.index("\n```")].splitlines():
        names = re.split(r"\s{2,}", line.strip())[0]
        depth = (len(line) - len(line.lstrip())) // 2
        for name in names.split(" · "):
            folders[depth:] = [name]
            paths.append("/".join(part.rstrip("/") for part in folders))
    return paths


def code_of(text: str) -> list[str]:
    return re.findall(r"```.*?```|`[^`\n]+`", text, re.S)


def wait_until(holds: Any, seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not holds():
        assert time.monotonic() < deadline, f"did not happen within {seconds} s"
        time.sleep(0.1)


def _says(command: list[str]) -> str:
    return subprocess.run(command, capture_output=True, text=True, timeout=10).stdout.strip()


def _plain(value: object) -> object:
    return str(value).lower() if isinstance(value, bool) else value


def _canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    before, after = README.split("<!-- settings -->\n")[0], README.split("<!-- /settings -->\n")[1]
    (ROOT / "README.md").write_text(f"{before}<!-- settings -->\n{settings_table()}\n<!-- /settings -->\n{after}")
