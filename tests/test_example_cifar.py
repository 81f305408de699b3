"""The CIFAR-10 example without CIFAR-10: its loader on made-up images in each of the three forms, its parts, its rows and its table."""

from __future__ import annotations

import io
import math
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from PIL import Image

from app.arguments import steps_of
from examples.resnet18_cifar10 import __main__ as example
from examples.resnet18_cifar10 import images, repository, rows, table
from examples.resnet18_cifar10.measuring import Measured
from examples.resnet18_cifar10.records import GOLDEN, Records, command
from examples.resnet18_cifar10.service import Built, report_of
from optimizers.catalogue import parse_recipe
from optimizers.samples import Samples


def made_up(count: int, seed: int = 0) -> images.Images:
    random = np.random.default_rng(seed)
    return images.Images(random.integers(0, 256, (count, 32, 32, 3), dtype=np.uint8), np.arange(count) % 10)


def png(pixels: Any) -> bytes:
    file = io.BytesIO()
    Image.fromarray(pixels).save(file, "png")
    return file.getvalue()


def write_batch(path: Path, content: images.Images) -> None:
    flat = content.pixels.transpose(0, 3, 1, 2).reshape(len(content), -1)
    path.write_bytes(pickle.dumps({b"data": flat, b"labels": content.labels.tolist()}, protocol=4))


def test_all_three_forms_hold_the_same_images(tmp_path: Path) -> None:
    content = made_up(20)
    (tmp_path / "own" / "cifar-10-batches-py").mkdir(parents=True)
    write_batch(tmp_path / "own" / "cifar-10-batches-py" / "test_batch", content)
    files = [png(pixels) for pixels in content.pixels]
    (tmp_path / "packed").mkdir()
    offsets = np.cumsum([0, *map(len, files)])
    np.savez(tmp_path / "packed" / "test.npz", jpeg=np.frombuffer(b"".join(files), np.uint8), offsets=offsets, labels=content.labels)
    for i, (file, label) in enumerate(zip(files, content.labels, strict=True)):
        folder = tmp_path / "pictures" / "test" / images.LABELS[label]
        folder.mkdir(parents=True, exist_ok=True)
        (folder / f"{i:04d}.png").write_bytes(file)

    for form in ("own", "packed"):
        found = images.load(tmp_path / form, "test")
        assert np.array_equal(found.pixels, content.pixels) and np.array_equal(found.labels, content.labels)
        assert len(images.load(tmp_path / form, "test", 7)) == 7
    found = images.load(tmp_path / "pictures", "test")
    known = {pixels.tobytes(): label for pixels, label in zip(content.pixels, content.labels, strict=True)}
    assert {pixels.tobytes(): label for pixels, label in zip(found.pixels, found.labels, strict=True)} == known


def test_a_batch_that_calls_something_is_refused(tmp_path: Path) -> None:
    class Caller:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "called",))

    (tmp_path / "test_batch").write_bytes(pickle.dumps({b"data": Caller()}))
    with pytest.raises(images.NoImages, match="no batch needs"):
        images.load(tmp_path, "test")
    assert not (tmp_path / "called").exists()


def test_inputs_are_scaled_and_normalized() -> None:
    inputs = images.Images(np.full((1, 32, 32, 3), 255, np.uint8), np.zeros(1, np.int64)).inputs()
    assert inputs.shape == (1, 3, 32, 32) and inputs.dtype == np.float32
    assert np.allclose(inputs[0, :, 0, 0], [(1 - mean) / std for mean, std in zip(images.MEAN, images.STD, strict=True)])


def test_parts_share_no_image_and_only_training_images_train(tmp_path: Path) -> None:
    train, test = made_up(700, 1), made_up(1600, 2)
    parts = repository.parts(train, test, 100)
    held = {name: {pixels.tobytes() for pixels in part.pixels} for name, part in parts.items()}
    assert {name: len(part) for name, part in held.items()} == {"calibration": 512, "train": 100, "reference": 500, "validation": 1000}
    assert len(set().union(*held.values())) == sum(map(len, held.values()))
    assert held["train"] | held["calibration"] <= {pixels.tobytes() for pixels in train.pixels}
    repository.save_samples(tmp_path / "train.npz", parts["train"])
    saved = Samples.load(tmp_path / "train.npz")
    assert saved.labels is not None and len(saved) == 100 and list(saved.inputs) == [repository.INPUT]


def test_model_yaml_is_one_that_the_server_takes(tmp_path: Path) -> None:
    from app.catalog.model_config import load_model_config

    (tmp_path / "model.yaml").write_text(repository._YAML)
    config = load_model_config(tmp_path / "model.yaml")
    assert config.task == "classification" and yaml.safe_load(repository._YAML)["postprocess"]["labels"] == list(images.LABELS)


@pytest.mark.parametrize("name", rows.ROWS)
def test_every_row_is_a_recipe_of_the_catalogue(name: str) -> None:
    row = rows.ROWS[name]
    configs = parse_recipe(steps_of(row.asked(6.0)))
    minutes = sum(getattr(config, "minutes", 0.0) + getattr(config, "search_minutes", 0.0) for config in configs)
    assert minutes == pytest.approx(6.0 if row.trains else 0.0)


def test_a_row_that_is_not_there_is_told_with_those_that_are() -> None:
    assert [row.name for row in rows.chosen("int8-static,graph")] == ["graph", "int8-static"]
    with pytest.raises(rows.UnknownRow, match=r"int4.*graph, int8-static"):
        rows.chosen("int4")


def test_a_ratio_without_a_bound_is_told_all_the_same() -> None:
    assert table.inverted([0.5, 0.4, 0.8]) == (2.0, 1.25, 2.5)
    assert table.inverted([0.5, 0.0, math.inf]) == (2.0, 0.0, math.inf)
    assert table._times([0.5, 0.0, math.inf]) == "2.00 [0.00, inf]"


def test_the_table_has_figures_and_reasons(tmp_path: Path) -> None:
    found = Records.open(tmp_path / "rows.json")
    assert "Nothing was measured" in table.markdown(found)
    found.put_build("low-rank", "low-rank", Built(None, "not_applicable", "no layer | is faster", 3.0), "", {})
    found.put_build("int8-static", "int8-static", Built(tmp_path / "a.onnx", "kept", "", 60.0), "", {"others": 0.5})
    ratio = {"fp32-1": (0.5, 0.4, 0.8)}
    for name, right in ((GOLDEN, 8851), ("int8-static", 8841)):
        seen = Measured(right, 10_000, 11_000_000, None, 11_000_000, 555_000_000, ratio, 0.25)
        found.rows.setdefault(name, {"recipe": "as deployed", "file": True})["measured"] = {"key": name, **vars(seen)}
    lines = table.markdown(found).splitlines()
    assert [line.split(" | ")[0] for line in lines if line.startswith("|")][2:] == ["| golden", "| int8-static", "| low-rank"]
    assert "| 88.41% (-0.10) | 11,000,000 | 555.0 M | 2.00 [1.25, 2.50] | – |" in lines[-2]
    assert "not_applicable: no layer / is faster" in lines[-1] and lines[-1].count("|") == lines[-2].count("|")

    found.rows["int8-static"]["measured"]["multiply_adds"] = None
    assert "| 11,000,000 | – | 2.00" in table.markdown(found)

    document = tmp_path / "doc.md"
    document.write_text("before\n<!-- cifar10: begin -->\nEARLIER\n<!-- cifar10: end -->\nafter\n")
    table.write(document, found)
    text = document.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "EARLIER" not in text and "88.41%" in text

    later = Records(
        tmp_path / "other.json", {"golden": found.rows["golden"]} | {"cp": {"recipe": "cp", "file": False, "outcome": "failed"}}
    )
    table.write(document, later)
    table.write(document, later)
    text = document.read_text()
    names = [line.split("|")[1].strip() for line in text.splitlines() if line.startswith("| ")][2:]
    assert names == ["golden", "int8-static", "low-rank", "cp"], "what was not measured again stays, in the rows' order"
    assert text.count("Rows golden, cp: Nothing was measured yet.") == 1 and text.count("Others: Nothing was measured yet.") == 1


def test_two_runs_on_one_state_folder_lose_nothing(tmp_path: Path) -> None:
    one, other = (Records.open(tmp_path / "rows.json") for _ in range(2))
    one.put_build("graph", "graph", Built(None, "not_applicable", "no gain", 1.0), "", {})
    other.put_build("cp", "cp", Built(None, "failed", "no time", 1.0), "5 min", {})
    assert set(Records.open(tmp_path / "rows.json").rows) == {"graph", "cp"}


def test_the_command_is_told_without_this_machines_folders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        "sys.argv",
        ["x", "--data", "/a/b", "--rows", "graph", "--minutes", "5", "--state", "/c", "--docs", "--checkpoint", "/d.safetensors"],
    )
    assert command() == "python -m examples.resnet18_cifar10 --data FOLDER --minutes 5 --checkpoint FILE"


def test_the_reason_of_a_job_is_told_on_one_line() -> None:
    assert (
        report_of({"report": {"skipped": [{"reason": "no linear layer"}], "verdicts": [{"summary": "slower"}]}})
        == "no linear layer; slower"
    )
    assert report_of({"report": {"reason": "cancelled"}}) == "cancelled"


def test_without_a_folder_it_says_how_to_get_one(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert example.main([]) == 2
    assert "cifar-10-python.tar.gz" in capsys.readouterr().err
    assert example.main(["--data", str(tmp_path)]) == 1
    assert "holds no CIFAR-10" in capsys.readouterr().err


def test_the_documentation_has_the_marks() -> None:
    text = example.DOCUMENT.read_text()
    for part in (table.PART, table.PART_VNNI):
        assert f"<!-- {part}: begin -->" in text and f"<!-- {part}: end -->" in text
    assert table.part_of(Records(Path())) == table.PART
    assert table.part_of(Records(Path(), runs=[{"host_class": "x86_64-avx2-avx512f-avx512_vnni-ort1-cpu"}])) == table.PART_VNNI
