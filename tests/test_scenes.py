"""What `hone demo --break` changes, and that only this is undone: what a person has in the demo is not the scene's to remove."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from app.client import Address, Client
from app.demo import copy_repository
from app.errors import HoneError
from app.faulty_models import not_a_number
from app.scenes import LEAKY, Scene, held_to, leak
from app.traffic import MODEL, Traffic


@pytest.fixture
def scene(tmp_path: Path) -> Scene:
    """In a demo's repository in which a person deployed version 2; nothing is asked of a server."""
    repository = copy_repository(tmp_path)
    (repository / MODEL / "2").mkdir()
    (repository / MODEL / "2" / "model.onnx").write_bytes(b"better")
    address = Address("http://127.0.0.1:1", "http://127.0.0.1:1", "token")
    return Scene(Client(address), Traffic("127.0.0.1", 1, None), repository, lambda text: None)


def test_a_version_that_a_person_deployed_outlives_the_scenes(scene: Scene) -> None:
    """Version 2 was overwritten by three scenes, and removed after every one."""
    model = scene.repository / MODEL
    assert scene.deploy(not_a_number) == "3"
    assert (model / "3" / "model.onnx").stat().st_size > 1_000_000
    scene.put_back()
    assert (model / "2" / "model.onnx").read_bytes() == b"better" and not (model / "3").exists()


def test_model_yaml_is_put_back_only_where_the_scene_changed_it(scene: Scene) -> None:
    config = scene.repository / MODEL / "model.yaml"
    shipped = config.read_text()
    scene.set_objective(3.0)
    scene.set_objective(5.0)
    assert "objective: {p95_ms: 5}" in config.read_text()
    scene.put_back()
    assert config.read_text() == shipped
    other = Scene(scene.client, scene.traffic, scene.repository, scene.say)
    config.write_text("description: mine\n")
    other.put_back()
    assert config.read_text() == "description: mine\n"


def test_a_model_of_the_name_that_a_scene_takes_is_neither_replaced_nor_removed(scene: Scene) -> None:
    (scene.repository / LEAKY).mkdir()
    with pytest.raises(HoneError, match=f"hone remove {LEAKY}"), leak(scene):
        pass
    scene.put_back()
    assert (scene.repository / LEAKY).is_dir()


def test_a_process_that_was_held_to_one_core_may_use_all_of_its_own_again() -> None:
    """Its neighbours went, and the runner stayed where it was put."""
    cores = os.sched_getaffinity(0)
    if len(cores) < 2:
        pytest.skip("there is but one core")
    code = "import threading, sys\nthreads = [threading.Thread(target=sys.stdin.read) for _ in range(2)]\n"
    code += "for one in threads: one.start()\nprint('up', flush=True)"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stdout.readline() == b"up\n"
        threads = [int(one) for one in os.listdir(f"/proc/{process.pid}/task")]
        os.sched_setaffinity(threads[-1], {min(cores)})  # as a runtime pins its own
        was = {one: os.sched_getaffinity(one) for one in threads}
        with held_to(max(cores), process.pid):
            assert [os.sched_getaffinity(one) for one in threads] == [{max(cores)}] * len(threads)
        assert {one: os.sched_getaffinity(one) for one in threads} == was
        with held_to(max(cores), process.pid):
            process.communicate()
