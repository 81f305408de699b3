"""model.yaml: what is accepted, and what each mistake is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from app.catalog import yaml_file
from app.catalog.config_docs import example, keys, keys_in, renewed
from app.catalog.config_errors import dotted
from app.catalog.model_config import ModelConfig, load_model_config, parse_model_config
from app.domain import Mode
from app.errors import ModelRejected

HERE = Path("models/m/model.yaml")
DOC = Path(__file__).parent.parent / "docs" / "model-yaml.md"


def parsed(text: str) -> ModelConfig:
    return parse_model_config(text.encode(), HERE)


def refused(text: str) -> str:
    with pytest.raises(ModelRejected) as caught:
        parsed(text)
    return str(caught.value)


def test_without_a_file_everything_has_its_default(tmp_path: Path) -> None:
    config = load_model_config(tmp_path / "model.yaml")
    assert config == ModelConfig() == parsed("") == parsed("# only a comment\n")
    assert (config.task, config.mode, config.runtime.warm_versions, config.rollback_window_s) == ("generic", Mode.AUTO, 3, 600)


def test_a_typo_names_line_key_and_nearest_valid_one() -> None:
    assert refused("task: generic\nobjective:\n  p95_mss: 3") == (
        "models/m/model.yaml:3: objective.p95_mss is not a key of model.yaml; did you mean 'p95_ms'?"
    )
    assert "did you mean 'labels'" in refused("postprocess: {lables: [a, b]}")
    assert "did you mean 'rollback_window_s'" in refused("rollback-window-s: 3")
    assert refused("task: clasification").endswith("did you mean 'classification'?")


def test_a_key_in_the_wrong_section_is_told_where_it_belongs() -> None:
    assert "it belongs to objective.p95_ms" in refused("p95_ms: 3")
    assert "it belongs to preprocess.image.mean" in refused("preprocess: {mean: 3}")


@pytest.mark.parametrize(
    ("text", "parts"),
    [
        ("objective:\n  p95_ms: '20'", (":2: objective.p95_ms = '20'", "a number", "without quotes")),
        ("batching: {limit: 2.5}", ("batching.limit = 2.5", "a whole number")),
        ("batching: {limit: 0}", ("batching.limit = 0", "greater than or equal to 1")),
        ("batching: {limit: true}", ("batching.limit = true", "a whole number")),
        ("batching: 3", ("batching = 3", "keys with values")),
        ("description: 12", ("description = 12", "put it in quotes")),
        ("allow: int8-static", ("allow = 'int8-static'", "a list")),
        ("allow: [tune, 3]", ("allow[1] = 3", "text")),
        ("least_gain: .inf", ("least_gain = inf", "a finite number")),
        ("objective: {p95_ms: .nan}", ("objective.p95_ms = nan", "must")),
        ("mode: off", ("mode = false", "auto, approve or observe")),
        ("capture: {mode: 3}", ("capture.mode = 3", "on or off")),
        ("quality: {floor: 99}", ("quality", "99", "99 % is 0.99")),
        ("objective: {p95_ms: 5, p50_ms: 9}", ("p50_ms = 9", "p95_ms = 5")),
        ("source: {}", ("source.factory is missing",)),
        ("source: {factory: resnet}", ("source.factory = 'resnet'", "FILE.py:FUNCTION")),
        ("source: {factory: '../x.py:f'}", ("source.factory", "'..'")),
        ("source: {factory: 'a.py:f', weights: ../w.safetensors}", ("source.weights", "model.safetensors")),
        ("platform: torch", ("platform torch needs `source:`",)),
        ("postprocess: {labels: [yes, no]}", ("postprocess.labels", "quotes")),
        ("preprocess: {image: {size: [1, 2, 3]}}", ("preprocess.image.size = [1, 2, 3]", "at most 2")),
    ],
)
def test_a_wrong_value_names_value_rule_and_remedy(text: str, parts: tuple[str, ...]) -> None:
    message = refused(text)
    assert message.startswith(f"{HERE}:")
    for part in parts:
        assert part in message


def test_several_problems_are_told_together() -> None:
    message = refused("task: x\nmode: y\nbatching: {limit: 0}")
    assert [line.split(": ")[1].split(" ")[0] for line in message.splitlines()] == ["task", "mode", "batching.limit"]


@pytest.mark.parametrize("text", ["capture: off", "capture: {mode: off}", "capture: 'off'", "capture: false", "capture: {mode: 'off'}"])
def test_capture_is_switched_off_however_yaml_reads_the_word(text: str) -> None:
    assert parsed(text).capture.mode == "off"


def test_an_empty_section_is_its_defaults_and_numbers_are_numbers() -> None:
    assert parsed("batching:\n  # limit: 3\n").batching == ModelConfig().batching
    assert parsed("objective: {p95_ms: 1e-1, error_rate: 0}").objective.p95_ms == 0.1
    assert parsed("description: 2024-01-01").description == "2024-01-01"
    assert parsed("x: &x {limit: 3}\n".replace("x: &x", "batching: &x")).batching.limit == 3


def test_quality_resolves_metric_and_floor_by_task() -> None:
    assert parsed("task: classification").quality.resolved("classification") == ("agreement", 0.99)
    assert parsed("quality: {metric: sqnr_db, floor: 30}").quality.resolved("regression") == ("sqnr_db", 30.0)


def test_allowed_methods_are_checked_against_what_there_is() -> None:
    with pytest.raises(ModelRejected, match=r"allow\[1\] = 'int8-statik' is not known; did you mean 'int8-static'"):
        parse_model_config(b"allow: [tune, int8-statik]", HERE)


BOMB = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{chr(98 + i)}: &{chr(98 + i)} [{', '.join(['*' + chr(97 + i)] * 9)}]\n" for i in range(9)
)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        (BOMB, "aliases unfold"),
        ("&a [*a]", "aliases unfold"),
        ("a: &a {b: *a}", "aliases unfold"),
        ("[" * 100_000, "nest"),
        ("{a: " * 100_000, "nest"),
        ("- " * 5_000 + "x", "nest"),
        ("a: [" + "1," * 60_000 + "1]", "more than 50000 values"),
        ("x" * (1 << 20) + "y", "larger than 1048576 bytes"),
        ("!!python/object/apply:os.system ['echo hi']", "is not taken"),
        ("x: !!python/name:os.system ''", "is not taken"),
        ("task: !!bool maybe", "the tag 'tag:yaml.org,2002:bool' is not taken"),
        ("task: !!timestamp today", "is not taken"),
        ("runtime: {threads: !!int ''}", "is not taken"),
        ("x: =", "constructor"),
        ("runtime: {threads: 0x" + "f" * 5_000 + "}", "a number of 5002 characters"),
        ("runtime: {threads: " + "9:" * 3_000 + "9}", "a number of 6001 characters"),
        ("--- {}\n--- {}", "second document"),
        ("task: generic\ntask: regression", "given twice (first in line 1)"),
        ("? [a, b]\n: 3", "a key must be plain text"),
        ("- a", "a mapping of keys to values is expected"),
        ("hello", "a mapping of keys to values is expected"),
        ("task:\n\t- x", "not with tabs"),
        ("a: b: c", "not valid YAML"),
        ("\x00", "control characters"),
    ],
)
def test_hostile_or_broken_yaml_is_refused_with_a_reason(text: str, part: str) -> None:
    assert part in refused(text)


def test_bytes_that_are_no_text_are_refused() -> None:
    with pytest.raises(ModelRejected, match="not UTF-8"):
        parse_model_config(b"task: \xff", HERE)
    assert parse_model_config(b"\xef\xbb\xbftask: generic", HERE).task == "generic"


def test_a_file_that_cannot_be_read_is_no_default(tmp_path: Path) -> None:
    (tmp_path / "model.yaml").mkdir()
    with pytest.raises(ModelRejected, match="cannot be read"):
        load_model_config(tmp_path / "model.yaml")


@given(st.text(max_size=200))
def test_any_text_is_accepted_or_refused_and_nothing_else(text: str) -> None:
    try:
        parse_model_config(text.encode("utf-8", "surrogatepass"), HERE)
    except ModelRejected as error:
        assert str(error).startswith(str(HERE))


@given(
    st.recursive(
        st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
        lambda inner: st.lists(inner, max_size=3),
        max_leaves=4,
    ),
    st.data(),
)
def test_any_value_under_any_key_is_accepted_or_refused_by_its_name(value: object, data: st.DataObject) -> None:
    path = data.draw(st.sampled_from(list(keys())))
    text = json.dumps(value)
    for part in reversed(path):
        text = json.dumps({part: 0})[:-2] + text + "}"
    try:
        parse_model_config(text.encode(), HERE)
    except ModelRejected as error:
        assert dotted(path[:1]) in str(error) or "not valid YAML" in str(error)


def test_the_example_in_the_docs_validates_and_covers_every_key() -> None:
    config = parse_model_config(example(DOC.read_text()).encode(), DOC)
    missing = set(keys()) - set(keys_in(yaml_file.parse(example(DOC.read_text()), DOC).data))
    assert not missing, f"docs/model-yaml.md does not show {sorted(map(dotted, missing))}"
    assert config.task == "classification"


def test_the_docs_are_what_the_schema_generates() -> None:
    assert DOC.read_text() == renewed(DOC.read_text()), "run: python -m app.catalog.config_docs"
