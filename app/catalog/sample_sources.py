"""Reads the samples that an owner names in model.yaml: an .npz, a folder of images, a Python function, or what was captured.

A function is the operator's code and runs in a task child, never in the process that reads.
"""

from __future__ import annotations

import difflib
import random
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

import numpy as np
from numpy.typing import NDArray

from app.catalog.model_config import CAPTURED
from app.catalog.model_files import LinkPolicy
from app.catalog.processing import Processor
from app.catalog.repository import factory_file
from app.catalog.reservoir import load_captured
from app.catalog.tensors import DTYPES, to_array
from app.domain import BYTES, Signature, TensorSpec
from app.errors import HoneError, ModelRejected, NotFound
from optimizers.samples import Samples
from optimizers.task import TaskFailed, TaskLimits, run_task_sync

IMAGES: Final = frozenset({".png", ".jpg", ".jpeg"})
MOST_SAMPLES: Final = 4096
MAX_IMAGE_BYTES: Final = 256 << 20
FUNCTION_S: Final = 600.0
_INDEPENDENT: Final = "batching: {rows: independent} in model.yaml"


@dataclass(frozen=True)
class SampleReader:
    """Reads sources for one model. Paths are relative to `folder` (where model.yaml lies) and end within `policy`'s roots.

    `row_shapes`, `integers`: shapes and whole numbers that the model is known to take, for inputs that are made up (see synthetic).
    """

    folder: Path
    signature: Signature
    policy: LinkPolicy
    captured: Path
    processor: Processor | None = None
    factories: Sequence[Path] = ()
    most: int = MOST_SAMPLES
    row_shapes: Mapping[str, Sequence[int]] | None = None
    integers: Sequence[int] | None = None

    def read(self, source: str, key: str, seed: int = 0) -> Samples:
        """The samples that `key` of model.yaml names, at most `most` (chosen by `seed`, evenly over labels).

        Raises ModelRejected or NotAllowed naming key, value, rule and remedy, NotFound where nothing was captured yet.
        """
        where = f"{key} = {source!r}"
        if source == CAPTURED:
            captured = load_captured(self.captured)
            if captured is None:
                raise NotFound(f"{where}: no live input was captured yet; send requests first, or name a file")
            return self._checked(captured, where)
        if ".py:" in source:
            return self._fewer(self._checked(_call(source, self.factories, where), where), seed)
        path = self._path(source, where)
        if path.is_dir():
            return self._checked(self._images(path, where, seed), where)
        if path.suffix != ".npz":
            raise ModelRejected(f"{where} is neither an .npz, a folder of images, FILE.py:FUNCTION, nor the word {CAPTURED}")
        try:
            return self._fewer(self._checked(Samples.load(path), where), seed)
        except (OSError, ValueError, EOFError) as error:
            raise ModelRejected(f"{where} cannot be read as .npz: {error}") from None

    def _path(self, source: str, where: str) -> Path:
        path = self.folder / source
        if "\0" in source or not (path.exists() or path.is_symlink()):
            near = difflib.get_close_matches(Path(source).name, _names(path.parent), 1)
            hint = f"; did you mean {near[0]!r}?" if near else ""
            raise ModelRejected(f"{where} does not exist (looked for {path}){hint}")
        return self.policy.resolve(path)

    def _images(self, folder: Path, where: str, seed: int) -> Samples:
        """Each subfolder is a label; images without subfolders have none."""
        if self.processor is None or self.processor.image is None:
            raise ModelRejected(f"{where} is a folder of images, but model.yaml has no preprocess.image that says how they become inputs")
        classes = sorted(path for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))
        by_label = {_label(path.name, self.processor.labels, classes, where): _image_files(path) for path in classes} or {
            -1: _image_files(folder)
        }
        chosen = _evenly(by_label, self.most, seed)
        if not chosen:
            raise ModelRejected(f"{where} holds no .png or .jpg files")
        rows = [self._encode(path, where) for _, path in chosen]
        names = rows[0].keys()
        if len({tuple(row[name].shape for name in names) for row in rows}) != 1:
            raise ModelRejected(f"{where}: images become inputs of several shapes; give preprocess.image a size")
        labels = None if not classes else np.array([label for label, _ in chosen], dtype=np.int64)
        return Samples({name: np.stack([row[name] for row in rows]) for name in names}, labels, "owner", self.signature.batchable)

    def _encode(self, path: Path, where: str) -> dict[str, NDArray[Any]]:
        assert self.processor is not None
        real = self.policy.resolve(path)
        if real.stat().st_size > MAX_IMAGE_BYTES:
            raise ModelRejected(f"{where}: {path} is larger than {MAX_IMAGE_BYTES} bytes")
        try:
            tensors = self.processor.encode_image(real.read_bytes())
        except HoneError as error:
            raise ModelRejected(f"{where}: {path}: {error}") from None
        return {tensor.name: to_array(tensor)[0] if self.signature.batchable else to_array(tensor) for tensor in tensors}

    def _checked(self, samples: Samples, where: str) -> Samples:
        """Names, datatypes and shapes as the model wants them; whole numbers and floats are converted where nothing is lost."""
        specs = {spec.name: spec for spec in self.signature.inputs}
        needed = {spec.name for spec in self.signature.inputs if not spec.optional}
        if not len(samples):
            raise ModelRejected(f"{where} holds no samples")
        if not needed <= samples.inputs.keys() <= specs.keys():
            raise ModelRejected(f"{where} holds {', '.join(sorted(samples.inputs))}; the model's inputs are {', '.join(specs)}")
        inputs = {name: _fitting(values, specs[name], self.signature, where) for name, values in samples.inputs.items()}
        return Samples(inputs, samples.labels, samples.origin, self.signature.batchable)

    def _fewer(self, samples: Samples, seed: int) -> Samples:
        if len(samples) <= self.most:
            return samples
        chosen = np.sort(np.random.default_rng(seed).permutation(len(samples))[: self.most])
        return samples.rows(chosen)


def _fitting(values: NDArray[Any], spec: TensorSpec, signature: Signature, where: str) -> NDArray[Any]:
    wanted = spec.shape[1:] if signature.batchable else spec.shape
    shape = values.shape[1:]
    if not _fits(shape, wanted):
        hint = ""
        if not signature.batchable and spec.shape[:1] == (-1,) and _fits(shape, spec.shape[1:]):
            why = f" ({signature.rows_reason})" if signature.rows_reason else ""
            hint = f". A sample is a whole call, as this model's rows are not batched{why}: give each a first axis of 1, or state {_INDEPENDENT}"
        listed = ", ".join(map(str, ("n", *wanted)))
        raise ModelRejected(f"{where}: {spec.name} has shape {list(values.shape)}; [{listed}] is wanted, n being the samples{hint}")
    if spec.datatype == BYTES:
        if values.dtype.kind not in "OUS":
            raise ModelRejected(f"{where}: {spec.name} has dtype {values.dtype}; text is wanted")
        return values.astype(str).astype(object) if values.dtype.kind == "S" else values.astype(object)
    dtype = np.dtype(DTYPES.get(spec.datatype, "<f4"))
    if values.dtype == dtype:
        return values
    with np.errstate(all="ignore"):
        converted = values.astype(dtype) if values.dtype.kind in "biuf" else None
    if converted is None or (dtype.kind in "biu" and not np.array_equal(converted.astype(values.dtype), values)):
        raise ModelRejected(f"{where}: {spec.name} has dtype {values.dtype}, which cannot be converted to {spec.datatype} without loss")
    return converted


def _fits(shape: Sequence[int], wanted: Sequence[int]) -> bool:
    return len(shape) == len(wanted) and all(size in (-1, got) for size, got in zip(wanted, shape, strict=True))


def _call(source: str, factories: Sequence[Path], where: str) -> Samples:
    """What FILE.py:FUNCTION makes, run in a task child."""
    path, function = factory_file(source, factories)
    with tempfile.TemporaryDirectory(prefix="hone-samples-") as folder:
        out = Path(folder) / "samples.npz"
        try:
            run_task_sync("samples", {"path": str(path), "function": function, "out": str(out)}, TaskLimits(FUNCTION_S, nice=5))
            return Samples.load(out)
        except TaskFailed as failure:
            raise ModelRejected(f"{where} {failure.text}") from None
        except ValueError as error:
            raise ModelRejected(f"{where} returned what are no samples: {error}") from None


def _label(name: str, labels: Sequence[str], classes: Sequence[Path], where: str) -> int:
    """The class that a subfolder stands for: by the model's labels, else by number, else by the order of names."""
    if labels:
        if name in labels:
            return labels.index(name)
        near = difflib.get_close_matches(name, labels, 1)
        hint = f"; did you mean {near[0]!r}?" if near else ""
        raise ModelRejected(f"{where}: folder {name!r} is none of the model's labels{hint}")
    if all(path.name.isascii() and path.name.isdigit() for path in classes):
        return int(name)
    return [path.name for path in classes].index(name)


def _evenly(by_label: Mapping[int, Sequence[Path]], most: int, seed: int) -> list[tuple[int, Path]]:
    """Up to `most` files, the same number of each label as far as they go, in a fixed order."""
    chooser = random.Random(seed)
    shuffled = {label: chooser.sample(list(paths), len(paths)) for label, paths in sorted(by_label.items())}
    turns = max((len(paths) for paths in shuffled.values()), default=0)
    return [(label, paths[turn]) for turn in range(turns) for label, paths in shuffled.items() if turn < len(paths)][:most]


def _image_files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.suffix.lower() in IMAGES and path.is_file())


def _names(folder: Path) -> list[str]:
    return [path.name for path in folder.iterdir()] if folder.is_dir() else []
