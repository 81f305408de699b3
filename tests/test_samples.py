"""Samples: a reference that nothing overwrites, owners' files, and disjoint sets."""

from __future__ import annotations

import shutil
import zipfile
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.catalog.model_config import SampleSources
from app.catalog.model_files import links_within
from app.catalog.processing import Processor
from app.catalog.sample_sources import SampleReader
from app.catalog.samples import References, Spent, assemble, named_reference, reference_inputs, synthetic
from app.catalog.sections import ImagePreprocess, Postprocess, Preprocess
from app.domain import Signature, TensorSpec
from app.errors import Conflict, InsufficientStorage, ModelRejected, NotAllowed, NotFound
from optimizers.samples import Samples, write_npz
from tests.captures import ROWS, call, opened, take
from tests.storage import read_only, small_disk, tree

IMAGES = Signature((TensorSpec("image", "FP32", (-1, 3, 8, 8)),), (TensorSpec("y", "FP32", (-1, 2)),), True)


def samples(count: int, seed: int = 0) -> Samples:
    rng = np.random.default_rng(seed)
    return Samples({"x": rng.normal(size=(count, 4)).astype("f4")}, rng.integers(0, 3, count))


def reader(tmp_path: Path, signature: Signature = ROWS, **more: Any) -> SampleReader:
    (tmp_path / "m").mkdir(exist_ok=True)
    return SampleReader(tmp_path / "m", signature, links_within(tmp_path), tmp_path / "captured", **more)


# ---- reference
def test_a_reference_is_frozen_once_and_read_as_it_was(tmp_path: Path) -> None:
    references, inputs = References(tmp_path / "m" / "reference"), samples(20)
    outputs = {"y": np.arange(60, dtype="f4").reshape(20, 3), "text": np.array([f"é{i}" for i in range(20)], object)}
    frozen = references.freeze(inputs, outputs, "golden", "x86_64-avx2-ort1.32.0-cpu")
    assert tree(tmp_path) == ["m", "m/reference", "m/reference/golden_outputs.npz", "m/reference/meta.json", "m/reference/samples.npz"]
    again = references.freeze(samples(5, seed=9), {"y": np.zeros((5, 3))}, "golden", "another")
    assert again.meta == frozen.meta and again.meta.host_class == "x86_64-avx2-ort1.32.0-cpu"
    assert np.array_equal(again.samples.inputs["x"], inputs.inputs["x"]) and again.samples.labels is not None
    assert again.samples.hashes() == list(frozen.meta.hashes) == inputs.hashes()
    assert again.outputs["text"].tolist() == outputs["text"].tolist() and np.array_equal(again.outputs["y"], outputs["y"])


@pytest.mark.parametrize(
    ("frozen", "now", "stands"),
    [
        ({}, {}, True),
        ({}, {"reference": "r.npz"}, False),
        ({"reference": "r.npz"}, {"reference": "r.npz"}, True),
        ({"reference": "r.npz"}, {"reference": "more.npz"}, False),
        ({"reference": "r.npz"}, {"reference": "r.npz", "calibration": "c.npz"}, False),
        ({"reference": "r.npz"}, {}, True),
    ],
)
def test_a_reference_gives_way_only_to_another_that_the_owner_names(
    tmp_path: Path, frozen: dict[str, str], now: dict[str, str], stands: bool
) -> None:
    source = named_reference(SampleSources(**frozen))
    reference = References(tmp_path / "reference").freeze(samples(3), {"y": np.zeros((3, 1))}, "golden", "h", source=source)
    assert reference.meta.stands_for(SampleSources(**now)) == stands


def test_a_loaded_version_holds_some_of_the_reference_and_what_it_tells_of_all(tmp_path: Path) -> None:
    texts = np.array([["Aé"], ["日本"], [""], ["x"], ["longer than all"]], object)
    inputs = Samples({"x": np.arange(15, dtype=np.float32).reshape(5, 3), "t": texts}, np.arange(5), stacked=True)
    scores = np.eye(3, dtype=np.float32)[[0, 1, 1, 2, 1]]
    some = References(tmp_path / "reference").freeze(inputs, {"y": scores}, "golden", "h", most=2)
    assert len(some) == 5 and len(some.samples) == 2 and some.outputs["y"].tolist() == scores[:2].tolist()
    assert some.usual == {0: 0.2, 1: 0.6, 2: 0.2}
    assert some.samples.inputs["x"].tolist() == inputs.inputs["x"][:2].tolist() and some.samples.inputs["t"].tolist() == [["Aé"], ["日本"]]
    assert some.samples.inputs["x"].base is None or some.samples.inputs["x"].base.nbytes < 64, "not a view of all"
    assert some.first(1) is some and len(some.first(4).samples) == 4 and some.first(99).samples.hashes() == inputs.hashes()


def test_another_goldens_reference_must_be_retired_first(tmp_path: Path) -> None:
    references = References(tmp_path / "reference")
    references.freeze(samples(3), {"y": np.zeros((3, 1))}, "old", "h")
    with pytest.raises(Conflict, match="retire"):
        references.freeze(samples(3), {"y": np.zeros((3, 1))}, "new", "h")
    references.retire()
    assert references.load() is None and references.meta() is None
    assert references.freeze(samples(4), {"y": np.zeros((4, 1))}, "new", "h").meta.golden_sha256 == "new"


def test_a_reference_that_was_changed_does_not_judge(tmp_path: Path) -> None:
    references = References(tmp_path / "reference")
    references.freeze(samples(3), {"y": np.zeros((3, 1))}, "g", "h")
    write_npz(tmp_path / "reference" / "golden_outputs.npz", {"y": np.ones((3, 1))})
    with pytest.raises(ModelRejected, match=r"golden_outputs\.npz differs"):
        references.load()
    (tmp_path / "reference" / "meta.json").write_text("{")
    with pytest.raises(ModelRejected, match=r"meta\.json is damaged"):
        references.load()


def test_outputs_that_do_not_match_the_samples_are_refused(tmp_path: Path) -> None:
    for inputs, outputs in ((samples(3), {"y": np.zeros((2, 1))}), (samples(0), {"y": np.zeros((0, 1))}), (samples(3), {})):
        with pytest.raises(ModelRejected, match="one output for each"):
            References(tmp_path / "reference").freeze(inputs, outputs, "g", "h")
    assert tree(tmp_path) == []


def test_freezing_is_whole_or_not_at_all_on_bad_disks(tmp_path: Path) -> None:
    with small_disk(tmp_path / "disk", 1 << 20) as disk:
        rng = np.random.default_rng(0)
        large = Samples({"x": rng.normal(size=(1 << 16, 4)).astype("f4")})
        with pytest.raises(InsufficientStorage):
            References(disk / "reference").freeze(large, {"y": np.zeros((1 << 16, 1))}, "g", "h")
        assert tree(disk) == []
    folder = tmp_path / "ro"
    folder.mkdir()
    with read_only(folder), pytest.raises(NotAllowed):
        References(folder / "reference").freeze(samples(2), {"y": np.zeros((2, 1))}, "g", "h")


# ---- owners' samples
def test_an_npz_is_held_against_the_signature(tmp_path: Path) -> None:
    read = reader(tmp_path)
    write_npz(tmp_path / "m" / "good.npz", {"x": np.arange(40, dtype="f8").reshape(10, 4), "labels": np.arange(10)})
    found = read.read("good.npz", "samples.validation")
    assert found.inputs["x"].dtype == np.float32 and (len(found), found.origin) == (10, "owner") and found.labels is not None
    assert len(replace(read, most=4).read("good.npz", "k")) == 4
    bad = {
        "name.npz": ({"z": np.zeros((3, 4), "f4")}, r"holds z; the model's inputs are x"),
        "shape.npz": ({"x": np.zeros((3, 5), "f4")}, r"shape \[3, 5\]; \[n, 4\] is wanted, n being the samples$"),
        "dtype.npz": ({"x": np.array([["a"] * 4])}, "cannot be converted to FP32"),
        "length.npz": ({"x": np.zeros((3, 4), "f4"), "labels": np.arange(2)}, "must share one first axis"),
        "empty.npz": ({"x": np.zeros((0, 4), "f4")}, "holds no samples"),
        "labels.npz": ({"x": np.zeros((2, 4), "f4"), "labels": np.array(["cat", "dog"])}, "labels must be one number"),
    }
    for name, (arrays, part) in bad.items():
        write_npz(tmp_path / "m" / name, arrays)
        with pytest.raises(ModelRejected, match=part) as caught:
            read.read(name, "samples.train")
        assert f"samples.train = '{name}'" in str(caught.value)
    alone = replace(ROWS, batchable=False, rows_reason="not proven")
    with pytest.raises(ModelRejected, match=r"\[n, -1, 4\] is wanted.* not batched \(not proven\): .*rows: independent"):
        replace(read, signature=alone).read("good.npz", "k")


def test_whole_numbers_are_converted_only_without_loss(tmp_path: Path) -> None:
    read = reader(tmp_path, Signature((TensorSpec("x", "UINT8", (-1,)),), (TensorSpec("y", "FP32", (-1,)),), True))
    write_npz(tmp_path / "m" / "good.npz", {"x": np.array([0, 255], "i8")})
    assert read.read("good.npz", "k").inputs["x"].tolist() == [0, 255]
    for value in (np.array([256], "i8"), np.array([-1], "i8"), np.array([0.5], "f4"), np.array([np.nan], "f4")):
        write_npz(tmp_path / "m" / "bad.npz", {"x": value})
        with pytest.raises(ModelRejected, match="without loss"):
            read.read("bad.npz", "k")


def test_what_is_not_there_or_no_sample_file_is_told(tmp_path: Path) -> None:
    read = reader(tmp_path)
    (tmp_path / "m" / "train.npz").write_bytes(b"no zip")
    (tmp_path / "m" / "data.csv").write_text("1,2")
    np.savez(tmp_path / "m" / "one.npz", x=np.float32(1))
    np.savez(tmp_path / "m" / "stray.npz", x=np.zeros((2, 4), "f4"))
    whole = (tmp_path / "m" / "stray.npz").read_bytes()
    (tmp_path / "m" / "cut.npz").write_bytes(whole[:-30])
    (tmp_path / "m" / "flipped.npz").write_bytes(whole.replace(bytes(32), b"\1" * 32, 1))
    with zipfile.ZipFile(tmp_path / "m" / "stray.npz", "a") as file:
        file.writestr("readme", "which images these are")
    (tmp_path / "m" / "pickled.npz").write_bytes(b"")
    np.savez(tmp_path / "m" / "pickled.npz", x=np.array([{"a": 1}], object))
    for source, part in (
        ("trian.npz", "did you mean 'train.npz'"),
        ("train.npz", "cannot be read as .npz: it is no .npz, as numpy.savez writes it"),
        ("cut.npz", "it was copied in part"),
        ("flipped.npz", "cannot be read as .npz: it is damaged"),
        ("one.npz", "'x' is a single value"),
        ("stray.npz", "'readme' in it is no array"),
        ("pickled.npz", "cannot be read"),
        ("data.csv", "neither an .npz"),
        ("../../../etc/passwd", "outside the repository|does not exist"),
        ("/etc/passwd", "outside the repository"),
        ("a\0b", "does not exist"),
    ):
        with pytest.raises(ModelRejected, match=part):
            read.read(source, "k")
    with pytest.raises(NotFound, match="captured yet"):
        read.read("captured", "k")


def test_a_folder_of_images_goes_through_the_models_preprocessing(tmp_path: Path) -> None:
    processor = Processor(
        IMAGES, Preprocess(image=ImagePreprocess(size=8)), Postprocess(labels=("cat", "dog")), tmp_path, "classification"
    )  # fmt: skip
    read = reader(tmp_path, IMAGES, processor=processor)
    for label, shade, count in (("dog", 255, 6), ("cat", 0, 3)):
        for index in range(count):
            path = tmp_path / "m" / "images" / label / f"{index}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (10, 20), (shade,) * 3).save(path)
    (tmp_path / "m" / "images" / "cat" / "notes.txt").write_text("no image")
    found = read.read("images", "samples.validation")
    assert found.inputs["image"].shape == (9, 3, 8, 8) and found.labels is not None
    assert Counter(found.labels.tolist()) == {0: 3, 1: 6}
    assert all(np.all(image == label) for image, label in zip(found.inputs["image"], found.labels, strict=True))
    fewer = replace(read, most=4).read("images", "k")
    assert fewer.labels is not None and Counter(fewer.labels.tolist()) == {0: 2, 1: 2}
    (tmp_path / "m" / "images" / "dgo").mkdir()
    with pytest.raises(ModelRejected, match="folder 'dgo' is none of the model's labels; did you mean 'dog'"):
        read.read("images", "k")
    shutil.rmtree(tmp_path / "m" / "images" / "dgo")
    (tmp_path / "m" / "images" / "cat" / "9.png").write_bytes(b"broken")
    with pytest.raises(ModelRejected, match=r"9\.png"):
        read.read("images", "k")
    with pytest.raises(ModelRejected, match=r"no preprocess\.image"):
        reader(tmp_path).read("images", "k")


def test_a_python_function_gives_samples_from_an_allowed_folder_and_never_runs_here(tmp_path: Path) -> None:
    (tmp_path / "factories").mkdir()
    (tmp_path / "factories" / "data.py").write_text(
        "import numpy as np\ndef train():\n return {'x': np.zeros((5, 4), 'f4')}, [0, 1, 2, 0, 1]\n"
        "def broken():\n raise OSError('no data')\ndef wrong():\n return 3\n"
        "def ends():\n import os\n os._exit(3)\ndef odd():\n return {'x': np.zeros((5, 4)), 'y': np.zeros(4)}\n"
    )
    with pytest.raises(NotAllowed, match="HONE_FACTORIES"):
        reader(tmp_path).read("data.py:train", "samples.train")
    read = reader(tmp_path, factories=[tmp_path / "factories"])
    found = read.read("data.py:train", "samples.train")
    assert len(found) == 5 and found.labels is not None and found.labels.tolist() == [0, 1, 2, 0, 1]
    for function, part in (
        ("broken", "OSError: no data"),
        ("wrong", "returned int"),
        ("absent", "AttributeError"),
        ("odd", "different length"),
        ("ends", "3"),
    ):
        with pytest.raises(ModelRejected, match=part):
            read.read(f"data.py:{function}", "k")


# ---- made up
def test_made_up_inputs_fit_the_signature_and_repeat_with_the_seed() -> None:
    specs = [("x", "FP32", (-1, 3, -1, -1)), ("ids", "INT64", (-1, -1)), ("attention_mask", "INT64", (-1, -1)), ("token_type_ids", "INT64", (-1, -1)),
             ("b", "BOOL", (-1,)), ("u", "UINT8", (-1, 5)), ("t", "BYTES", (-1, 1)), ("h", "FP16", (-1, 2)), ("z", "BF16", (-1, 2))]  # fmt: skip
    signature = Signature(tuple(TensorSpec(*spec) for spec in specs) + (TensorSpec("o", "FP32", (-1, 4), optional=True),), (), True)
    made = synthetic(signature, 6, seed=3)
    assert {name: values.shape for name, values in made.inputs.items()} == {
        "x": (6, 3, 64, 64), "ids": (6, 16), "attention_mask": (6, 16), "token_type_ids": (6, 16), "b": (6,), "u": (6, 5), "t": (6, 1), "h": (6, 2), "z": (6, 2),
    }  # fmt: skip
    assert made.inputs["attention_mask"].all() and not made.inputs["token_type_ids"].any() and made.origin == "synthetic"
    assert made.hashes() == synthetic(signature, 6, seed=3).hashes() != synthetic(signature, 6, seed=4).hashes()
    assert synthetic(signature, 2, row_shapes={"x": (1, 3, 7, 9)}).inputs["x"].shape == (2, 3, 7, 9)
    whole = synthetic(replace(signature, batchable=False), 2, row_shapes={"ids": (4, 5)})
    assert not whole.stacked and whole.inputs["x"].shape == (2, 1, 3, 64, 64) and whole.inputs["ids"].shape == (2, 4, 5)


# ---- disjoint sets
def rows_of(part: Samples | None) -> set[str]:
    return set(part.hashes()) if part is not None else set()


def captured_some(folder: Path, count: int) -> None:
    """A reservoir with `count` calls in it."""
    reservoir = opened(folder / "captured")
    for value in range(count):
        reservoir._opens_at = 0.0
        take(reservoir, *call(value))


@pytest.mark.parametrize(
    "named", [(), ("reference",), ("validation",), ("train",), ("calibration",), ("reference", "validation", "train", "calibration")]
)
@pytest.mark.parametrize("captured", [0, 80])
def test_what_calibrates_or_trains_never_judges(tmp_path: Path, named: tuple[str, ...], captured: int) -> None:
    read = reader(tmp_path)
    for index, name in enumerate(named):
        mine = samples(60, seed=index)
        shared = samples(20, seed=99)
        both = Samples({"x": np.concatenate([mine.inputs["x"], shared.inputs["x"]])}, np.concatenate([mine.labels, shared.labels]))
        both.save(tmp_path / "m" / f"{name}.npz")
    sources = SampleSources(**{name: f"{name}.npz" for name in named})
    captured_some(tmp_path, captured)
    inputs = reference_inputs(sources, read)
    reference = References(tmp_path / "reference").freeze(inputs, {"y": np.zeros((len(inputs), 1))}, "g", "h")
    kept = Spent(tmp_path / "state" / "spent")
    sets = assemble(sources, read, reference, most_train=4096, spent=kept)
    kept.add(sets)
    spent = rows_of(sets.calibration) | rows_of(sets.train)
    assert len(sets.calibration) > 0 and sets.reference is not None
    for judge in (sets.reference, sets.live, sets.labelled):
        assert not rows_of(judge) & spent
    assert (sets.labelled is not None) == ("validation" in named) and (sets.train is not None) == ("train" in named)
    assert (sets.live is not None) == bool(captured) and sets.owner_named == bool({"reference", "validation"} & set(named))
    paths = sets.save(tmp_path)
    assert {name: len(Samples.load(Path(path))) for name, path in paths.items()} == {
        name: len(getattr(sets, name)) for name in ("calibration", "reference", "live", "labelled", "train") if getattr(sets, name) is not None
    }  # fmt: skip


def test_all_that_the_owner_named_to_judge_does_where_other_samples_calibrate(tmp_path: Path) -> None:
    """Who names the 300 that a verdict asks for has 300 that judge; a quarter is left aside only for want of anything else."""
    (tmp_path / "m").mkdir(exist_ok=True)
    samples(300).save(tmp_path / "m" / "r.npz")
    read = reader(tmp_path)
    for other in ({"calibration": "c.npz"}, {"train": "t.npz"}):
        assert len(reference_inputs(SampleSources(reference="r.npz", **other), read)) == 300
    for other in ({}, {"calibration": "captured"}):
        assert 200 < len(reference_inputs(SampleSources(reference="r.npz", **other), read)) < 250


def test_those_who_judge_later_neither_read_nor_take_what_trained(tmp_path: Path) -> None:
    read = reader(tmp_path)
    for name, seed in (("train", 1), ("validation", 2), ("calibration", 3)):
        samples(60, seed=seed).save(tmp_path / "m" / f"{name}.npz")
    sources = SampleSources(train="train.npz", validation="validation.npz", calibration="calibration.npz")
    kept = Spent(tmp_path / "state" / "spent")
    kept.add(assemble(sources, read, None, most_train=40))
    assert len(kept.known()) == 100
    (tmp_path / "m" / "train.npz").rename(tmp_path / "m" / "validation.npz")
    judging = assemble(sources.model_copy(update={"train": "gone.npz"}), read, None, spent=kept)
    assert judging.train is None and judging.labelled is not None and len(judging.labelled) == 20, "the forty that trained are out"
    assert judging.left_out == ("40 of 60 labelled samples calibrate or train, now or in an earlier job, and so never judge",)
    kept.add(judging)
    assert len(kept.known()) == 100
    kept.path.write_text("half a ha")
    with pytest.raises(ModelRejected, match="damaged"):
        assemble(sources, read, None, spent=kept)


def test_a_job_before_the_reference_is_frozen_leaves_what_will_be_frozen_alone(tmp_path: Path) -> None:
    """A reference takes golden's answers, which take time: of PyTorch models the import of torch alone."""
    (tmp_path / "m").mkdir(exist_ok=True)
    samples(200).save(tmp_path / "m" / "r.npz")
    sources, read = SampleSources(reference="r.npz"), reader(tmp_path)
    early = assemble(sources, read, None, most_train=9)
    assert rows_of(early.calibration) and not rows_of(early.calibration) & rows_of(reference_inputs(sources, read))


def test_without_a_frozen_reference_and_live_inputs_the_named_ones_judge_all_the_same(tmp_path: Path) -> None:
    """Golden answers anew then; where it cannot, or the file is not there, that is what is said, and not that no samples were named."""
    (tmp_path / "m").mkdir(exist_ok=True)
    samples(40, seed=1).save(tmp_path / "m" / "c.npz")
    sources, read = SampleSources(reference="r.npz", calibration="c.npz"), reader(tmp_path)
    with pytest.raises(ModelRejected, match=r"samples.reference = 'r.npz' does not exist"):
        assemble(sources, read, None)
    samples(60).save(tmp_path / "m" / "r.npz")
    found = assemble(sources, read, None)
    assert found.reference is not None and rows_of(found.reference) == rows_of(samples(60))
    captured_some(tmp_path, 8)
    assert assemble(sources, read, None).reference is None, "what was frozen is better, and live inputs are there"


def test_recent_inputs_calibrate_beside_named_ones_and_then_never_judge(tmp_path: Path) -> None:
    read = reader(tmp_path)
    samples(60, seed=1).save(tmp_path / "m" / "calibration.npz")
    sources = SampleSources(calibration="calibration.npz")
    captured_some(tmp_path, 80)
    plain, recent = assemble(sources, read, None, most_train=9), assemble(sources, read, None, most_train=9, recent=True)
    assert len(plain.calibration) == 60 and plain.live is not None and len(plain.live) == 80
    assert recent.live is not None and len(recent.calibration) == 60 + 80 - len(recent.live) and 20 < len(recent.live) < 60
    assert not rows_of(recent.live) & rows_of(recent.calibration) and "captured inputs" in recent.notes[0]


def test_what_learns_from_captured_inputs_takes_half_of_them_and_those_never_judge(tmp_path: Path) -> None:
    read = reader(tmp_path)
    samples(60, seed=1).save(tmp_path / "m" / "calibration.npz")
    sources = SampleSources(calibration="calibration.npz")
    captured_some(tmp_path, 80)
    kept = Spent(tmp_path / "state" / "spent")
    learning = assemble(sources, read, None, most_train=9, spent=kept, trains=True)
    assert learning.train is not None and learning.live is not None and not rows_of(learning.train) & rows_of(learning.live)
    kept.add(learning)
    judging = assemble(sources, read, None, spent=kept)
    assert judging.train is None and rows_of(judging.live) == rows_of(learning.live), "what learned is out, whoever judges"


def test_validation_without_labels_is_refused(tmp_path: Path) -> None:
    Samples({"x": np.zeros((3, 4), "f4")}).save(reader(tmp_path).folder / "v.npz")
    with pytest.raises(ModelRejected, match="holds no labels"):
        assemble(SampleSources(validation="v.npz"), reader(tmp_path), None)


# ---- the library's own file and hashes
def test_text_hashes_by_its_characters_and_survives_the_file(tmp_path: Path) -> None:
    text = Samples({"file": np.array(["a", "ünï", ""], object), "a/b:0": np.arange(3)})
    text.save(tmp_path / "s.npz")
    again = Samples.load(tmp_path / "s.npz")
    assert again.hashes() == text.hashes() and again.inputs["file"].dtype == object and again.inputs["file"].tolist() == ["a", "ünï", ""]
    assert Samples({"t": np.array(["a", "b"])}).hashes()[0] == Samples({"t": np.array(["a", "longer"])}).hashes()[0]
    assert Samples({"t": np.array([["ab", "c"]])}).hashes() != Samples({"t": np.array([["a", "bc"]])}).hashes()
