"""The catalogue comes from the methods themselves, and steps are parsed strictly with the nearest right name."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import dataclass
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Literal

import pytest

from app.arguments import steps_of
from app.cli import main
from optimizers import base, catalogue
from optimizers.base import Config, registered
from optimizers.catalogue import InvalidStep, parse_recipe, parse_step
from optimizers.int8 import Int8StaticConfig

ROOT = Path(__file__).resolve().parent.parent


class Colour(StrEnum):
    RED = "red"


@dataclass(frozen=True)
class OddConfig(Config):
    method: ClassVar[str] = "odd"
    extra: ClassVar[str] = "optimize"
    whole: int = 1
    share: float = 0.5
    pair: tuple[int, float] = (1, 2.0)
    names: tuple[str, ...] = ()
    nested: tuple[tuple[str, float], ...] = ()
    perhaps: int | None = None
    mode: Literal["a", "b"] = "a"
    colour: Colour = Colour.RED
    budget: dict[str, float] | None = None


@pytest.fixture
def odd(monkeypatch: pytest.MonkeyPatch) -> None:
    catalogue.config_types()
    monkeypatch.setitem(base._methods, OddConfig, lambda artifact, config, samples, budget: artifact)


def test_every_method_is_there_once_and_describes_itself() -> None:
    entries = catalogue.catalogue()
    names = [entry.method for entry in entries]
    assert names == sorted(set(names)) and {"graph", "int8-static", "int8-dynamic", "tune"} <= set(names)
    for entry in entries:
        assert entry.summary and entry.needs and entry.gives, entry.method
        assert entry.available == (entry.reason == "")
        assert set(entry.search) <= set(entry.fields), entry.method
        for name, values in entry.search.items():
            for tried in values:
                parse_step({"method": entry.method, name: tried})
        assert parse_step(entry.method).to_json()["method"] == entry.method


def test_reading_the_catalogue_loads_no_runtime() -> None:
    code = "import sys; from optimizers.catalogue import catalogue; catalogue(); print([m for m in ('onnx', 'onnxruntime', 'torch') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr


def test_methods_are_told_with_their_options_as_a_recipe_takes_them(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["methods"]) == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in catalogue.config_types()) and "hone methods METHOD" in listed
    for name, config in catalogue.config_types().items():
        assert main(["methods", name]) == 0
        lines = [line.split(maxsplit=2) for line in capsys.readouterr().out.splitlines()]
        head = next((number for number, line in enumerate(lines) if line == ["OPTION", "DEFAULT", "TYPE"]), len(lines))
        told = ",".join(f"{option}={default}" for option, default, _ in lines[head + 1 :] if default != '""' and "[" not in default)
        assert parse_step(steps_of(f"{name}({told})")[0]) == config(), told
    assert main(["methods", "int8-static", "--json"]) == 0
    one = json.loads(capsys.readouterr().out)
    assert one["method"] == "int8-static" and {"option": "samples", "type": "an integer", "default": 512} in one["options"]
    assert "'entropy'" in next(option["type"] for option in one["options"] if option["option"] == "calibration")
    assert main(["methods", "int8-statik"]) == 1 and "did you mean 'int8-static'" in capsys.readouterr().err


def test_a_step_survives_json() -> None:
    config = Int8StaticConfig(calibration="mse", exclude=("fc",), keep_float=2)
    assert parse_step(json.loads(json.dumps(config.to_json()))) == config
    assert parse_recipe(["int8-static", config.to_json()]) == (Int8StaticConfig(), config)


@pytest.mark.parametrize(
    ("step", "text"),
    [
        ("int8-statik", "no method 'int8-statik'; did you mean 'int8-static'"),
        ("", "no method ''"),
        ({"method": "int8-static", "calibrate": "mse"}, "no field 'calibrate'; did you mean 'calibration'"),
        ({"method": "int8-static", "calibration": "mean"}, "calibration must be one of 'minmax', 'moving_average'"),
        ({"method": "int8-static", "samples": "many"}, "samples must be an integer, not 'many'"),
        ({"method": "int8-static", "samples": True}, "samples must be an integer, not True"),
        ({"method": "int8-static", "samples": 1.5}, "samples must be an integer, not 1.5"),
        ({"method": "int8-static", "per_channel": 1}, "per_channel must be true or false, not 1"),
        ({"method": "int8-static", "exclude": "fc"}, "exclude must be a list"),
        ({"method": "int8-static", "exclude": [1]}, "exclude must be a list"),
        ({"calibration": "mse"}, "a step is"),
        (None, "a step is"),
        (["int8-static"], "a step is"),
    ],
)
def test_wrong_steps_are_refused_with_the_remedy(step: Any, text: str) -> None:
    with pytest.raises(InvalidStep, match=text):
        parse_step(step)


def test_a_recipe_names_the_step_that_is_wrong() -> None:
    with pytest.raises(InvalidStep, match="step 2: there is no method"):
        parse_recipe(["graph", "nonsense"])
    with pytest.raises(InvalidStep, match="at least one step"):
        parse_recipe([])


@pytest.mark.usefixtures("odd")
def test_fields_of_every_kind_are_typed() -> None:
    step = {
        "method": "odd", "share": 1, "pair": [3, 4], "names": ["x"], "nested": [["a", 1]], "perhaps": 7, "mode": "b", "colour": "red", "budget": {"a": 1},
    }  # fmt: skip
    expected = OddConfig(share=1.0, pair=(3, 4.0), names=("x",), nested=(("a", 1.0),), perhaps=7, mode="b", budget={"a": 1.0})
    parsed = parse_step(step)
    assert parsed == expected and isinstance(parsed, OddConfig) and isinstance(parsed.share, float) and parsed.colour is Colour.RED
    for key, wrong in {
        "pair": [1],
        "perhaps": "x",
        "mode": "c",
        "colour": "blue",
        "nested": [["a"]],
        "budget": {"a": "b"},
        "whole": None,
    }.items():
        with pytest.raises(InvalidStep, match=f"odd: {key} must be"):
            parse_step({"method": "odd", key: wrong})


@pytest.mark.usefixtures("odd")
def test_a_method_whose_extra_is_missing_is_listed_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(catalogue, "EXTRAS", {"optimize": "a_module_that_is_not_there"})
    entry = next(entry for entry in catalogue.catalogue() if entry.method == "odd")
    assert not entry.available and "pip install 'hone-server[optimize]'" in entry.reason
    assert OddConfig in set(registered())
