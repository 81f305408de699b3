"""The transformer example without its hour: the parts and patches, the rows, and a model of five epochs as `hone serve` takes it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from app.arguments import steps_of
from app.catalog.model_config import load_model_config
from examples.digits_transformer import __main__ as example
from examples.digits_transformer import digits
from optimizers.catalogue import parse_recipe
from tests.families import answers

pytestmark = pytest.mark.needs("torch")


def test_patches_are_squares_of_the_image_and_parts_share_none() -> None:
    image = np.arange(64, dtype=np.float64).reshape(1, 8, 8) % 17
    cut = digits.patches(image)
    assert cut.shape == (1, 16, 4)
    assert (cut[0, 0] * 16).tolist() == [image[0, 0, 0], image[0, 0, 1], image[0, 1, 0], image[0, 1, 1]]
    assert (cut[0, 5] * 16).tolist() == [image[0, 2, 2], image[0, 2, 3], image[0, 3, 2], image[0, 3, 3]]
    parts = digits.parts()
    assert {name: len(part) for name, part in parts.items()} == digits.PARTS
    seen = [row.tobytes() for part in parts.values() for row in part.patches]
    assert len(set(seen)) == len(seen)


@pytest.mark.parametrize("name", example.ROWS)
def test_every_row_is_a_recipe_of_the_catalogue(name: str) -> None:
    assert parse_recipe(steps_of(example.ROWS[name].asked(3.0)))


def test_the_model_is_what_the_server_takes(tmp_path: Path) -> None:
    onnx, judging = digits.prepare(tmp_path, 5, print)
    assert load_model_config(tmp_path / digits.MODEL / "model.yaml").task == "classification"
    logits = answers(onnx, {digits.INPUT: judging.patches})[0]
    assert logits.shape == (747, 10) and float((logits.argmax(1) == judging.labels).mean()) > 0.3
    before = onnx.stat().st_mtime_ns
    digits.prepare(tmp_path, 5, print)
    assert onnx.stat().st_mtime_ns == before, "what is there is not made again"


def test_the_documentation_has_the_marks() -> None:
    text = example.DOCUMENT.read_text()
    assert f"<!-- {example.PART}: begin -->" in text and f"<!-- {example.PART}: end -->" in text
