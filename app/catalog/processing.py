"""What the friendly door does around a model: images and texts become its inputs, its outputs become labels with probabilities.

Pure but for reading labels and tokenizer once, at construction. Blocking (call it off the event loop); knows nothing of HTTP or of runners.
"""

from __future__ import annotations

import base64
from collections.abc import Sequence
from pathlib import Path, PurePosixPath
from typing import Any, Final

import numpy as np

from app.catalog.images import ImageEncoder
from app.catalog.sections import ImagePreprocess, Postprocess, Preprocess, TextInputs, TextPreprocess
from app.catalog.tensors import FLOATS, Array, elements, to_array
from app.catalog.text import StringEncoder, TextEncoder
from app.domain import BYTES, JSON, Signature, Tensor, TensorSpec
from app.errors import InvalidRequest, ModelFailed, ModelRejected

__all__ = ["ImagePreprocess", "Postprocess", "Preprocess", "Processor", "TextInputs", "TextPreprocess"]

MAX_LABELS_BYTES: Final = 16 << 20


class Processor:
    """The sections of model.yaml held against one version's signature; raises ModelRejected where they do not agree.

    `folder` is where model.yaml lies; `task` is its task, if it has one ("classification" answers labels even without names for them).
    """

    def __init__(
        self,
        signature: Signature,
        preprocess: Preprocess | None = None,
        postprocess: Postprocess | None = None,
        folder: Path | None = None,
        task: str = "",
    ) -> None:
        preprocess, self.post = preprocess or Preprocess(), postprocess or Postprocess()
        self.signature = signature
        self.image = ImageEncoder(preprocess.image, _image_input(preprocess.image, signature)) if preprocess.image else None
        self.text = _text_encoder(preprocess.text, signature, folder) if preprocess.text else None
        self.classifies = self.post.kind == "classification" or (
            self.post.kind == "auto" and (self.post.labels is not None or task == "classification")
        )
        self.scores = _scores_output(self.post, signature) if self.classifies else None
        self.labels = _read_labels(self.post.labels, folder)
        self._check_labels()

    @property
    def output_names(self) -> tuple[str, ...] | None:
        """The outputs that `decode` needs; None for all."""
        return (self.scores.name,) if self.scores else (self.post.output,) if self.post.output else None

    def encode_image(self, data: bytes | memoryview) -> list[Tensor]:
        """One PNG or JPEG file -> the model's input with one row. Raises InvalidRequest or PayloadTooLarge."""
        if self.image is None:
            raise InvalidRequest("this model takes no images: its model.yaml has no preprocess.image; send its inputs as JSON")
        return [self.image.encode(data)]

    def encode_text(self, texts: Sequence[str]) -> list[Tensor]:
        """n texts -> the model's inputs with n rows. Raises InvalidRequest or PayloadTooLarge."""
        if self.text is None:
            raise InvalidRequest("this model takes no text: its model.yaml has no preprocess.text; send its inputs as JSON")
        return self.text.encode(texts)

    def decode(self, outputs: Sequence[Tensor], single: bool = False) -> JSON:
        """Outputs -> {"predictions": ...} for a classifier, else {"outputs": {name: array, or nested list of strings}}.

        Predictions: the top_k classes of each row, likeliest first, as {"label"?, "index", "probability"}; with `single` those of the
        first row alone. JSON has no NaN or infinity: such values become null, a row whose probabilities they spoil (NaN, +infinity) an
        empty list, and "non_finite" counts them.
        """
        if self.scores is None:
            return _plain(outputs)
        scores = next((tensor for tensor in outputs if tensor.name == self.scores.name), None)
        if scores is None:
            raise ModelFailed(f"the model gave no output {self.scores.name!r}, which holds its scores")
        values = to_array(scores)
        rows = self._class_rows(values)
        answer: JSON = {"predictions": self._top(rows[0]) if single else [self._top(row) for row in rows]}
        non_finite = values.size - int(np.count_nonzero(np.isfinite(values)))
        return answer | {"non_finite": non_finite} if non_finite else answer

    def _class_rows(self, scores: Array) -> Array:
        """Probabilities [rows, classes] in float64; a row with NaN or +inf is NaN throughout."""
        values = scores.astype(np.float64)
        while values.ndim > 2 and values.shape[-1] == 1:
            values = values[..., 0]
        if values.ndim == 1:
            one_row = len(self.signature_shape) == 1 and self.signature_shape[0] == len(values) > 1
            values = values[np.newaxis] if one_row else values[:, np.newaxis]
        if values.ndim != 2 or not values.size:
            raise ModelFailed(f"the model's output has shape {list(scores.shape)}; labels need one row of scores for each input")
        values[np.isnan(values).any(axis=1) | np.isposinf(values).any(axis=1)] = np.nan
        values = activate(values, self.post.activation)
        if values.shape[1] == 1:
            values = np.concatenate([1 - values, values], axis=1)
        if self.labels and len(self.labels) != values.shape[1]:
            raise ModelFailed(f"the model gave {values.shape[1]} classes; model.yaml has {len(self.labels)} labels")
        return values

    @property
    def signature_shape(self) -> tuple[int, ...]:
        return self.scores.shape if self.scores else ()

    def _top(self, row: Array) -> list[JSON]:
        if np.isnan(row).any():
            return []
        best = np.argsort(-row, kind="stable")[: self.post.top_k]
        named = [{"label": self.labels[index]} if self.labels else {} for index in best]
        return [name | {"index": int(index), "probability": round(float(row[index]), 6)} for name, index in zip(named, best, strict=True)]

    def _check_labels(self) -> None:
        classes = self.signature_shape[1] if len(self.signature_shape) > 1 else -1
        if self.labels and classes != -1 and len(self.labels) != max(classes, 2):
            raise ModelRejected(
                f"postprocess.labels has {len(self.labels)} names but output {self.scores.name if self.scores else ''!r} has {classes} classes"
            )


def activate(values: Array, activation: str) -> Array:
    """Scores [n, classes] as probabilities; `activation` as in model.yaml, auto leaves alone what are probabilities already."""
    if activation == "auto":
        activation = "none" if _are_probabilities(values) else "softmax" if values.shape[1] > 1 else "sigmoid"
    if activation == "softmax":
        shifted = np.exp(values - values.max(axis=1, keepdims=True))
        return np.asarray(shifted / shifted.sum(axis=1, keepdims=True))
    if activation == "sigmoid":
        return np.asarray(0.5 * (1 + np.tanh(values / 2)))
    return values


def _are_probabilities(values: Array) -> bool:
    """Within 0..1 and each row summing to one, as far as half precision can tell; rows with NaN do not speak."""
    rows = values[~np.isnan(values).any(axis=1)]
    if not ((rows >= 0) & (rows <= 1.001)).all():
        return False
    return rows.shape[1] == 1 or bool(np.allclose(rows.sum(axis=1), 1, atol=5e-3))


def _plain(outputs: Sequence[Tensor]) -> JSON:
    values: dict[str, Any] = {}
    non_finite = 0
    for tensor in outputs:
        if tensor.datatype == BYTES:
            values[tensor.name] = np.array([_readable(item) for item in elements(tensor)], dtype=object).reshape(tensor.shape).tolist()
            continue
        array = to_array(tensor)
        if tensor.datatype in FLOATS:
            non_finite += array.size - int(np.count_nonzero(np.isfinite(array)))
        values[tensor.name] = array if array.ndim else array.item()
    return {"outputs": values} | ({"non_finite": non_finite} if non_finite else {})


def _readable(item: bytes) -> Any:
    try:
        return item.decode()
    except UnicodeDecodeError:
        return {"base64": base64.b64encode(item).decode()}


def _image_input(config: ImagePreprocess, signature: Signature) -> TensorSpec:
    specs = {spec.name: spec for spec in signature.inputs}
    needed = [spec.name for spec in signature.inputs if not spec.optional]
    name = config.input or (needed[0] if len(needed) == 1 else "")
    if name not in specs:
        raise ModelRejected(
            f"preprocess.image.input must name one of the model's inputs: {', '.join(specs)}" + (f", not {name!r}" if name else "")
        )
    others = [other for other in needed if other != name]
    if others:
        raise ModelRejected(f"the model also wants {', '.join(others)}, which an image does not give; preprocess.image cannot serve it")
    return specs[name]


def _text_encoder(config: TextPreprocess, signature: Signature, folder: Path | None) -> TextEncoder | StringEncoder:
    if config.tokenizer is None:
        return StringEncoder(config, signature)
    return TextEncoder(config, signature, _beside(folder, config.tokenizer, "preprocess.text.tokenizer"))


def _scores_output(post: Postprocess, signature: Signature) -> TensorSpec:
    numeric = [spec for spec in signature.outputs if spec.datatype != BYTES]
    if post.output is not None:
        numeric = [spec for spec in numeric if spec.name == post.output]
    floats = [spec for spec in numeric if spec.datatype in FLOATS]
    if not floats:
        names = ", ".join(f"{spec.name} ({spec.datatype})" for spec in signature.outputs)
        raise ModelRejected(
            f"postprocess needs an output of scores in floating point; the model gives {names} and postprocess.output is {post.output}"
        )
    return floats[0]


def _read_labels(labels: tuple[str, ...] | str | None, folder: Path | None) -> tuple[str, ...]:
    if labels is None or isinstance(labels, tuple):
        return labels or ()
    path = _beside(folder, labels, "postprocess.labels")
    try:
        if path.stat().st_size > MAX_LABELS_BYTES:
            raise ModelRejected(
                f"postprocess.labels {labels!r} is larger than {MAX_LABELS_BYTES >> 20} MiB; it should have one name on each line"
            )
        lines = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as e:
        raise ModelRejected(f"postprocess.labels {labels!r} cannot be read: {e}") from None
    while lines and not lines[-1].strip():
        lines.pop()
    if not lines:
        raise ModelRejected(f"postprocess.labels {labels!r} is empty; it should have one name on each line")
    return tuple(line.strip() for line in lines)


def _beside(folder: Path | None, name: str, key: str) -> Path:
    """A file named in model.yaml: relative, and inside the model's folder also after links are followed."""
    parts = PurePosixPath(name)
    if folder is None or parts.is_absolute() or ".." in parts.parts or "\0" in name:
        raise ModelRejected(f"{key} is {name!r}; it must name a file in the model's own folder, beside model.yaml")
    path = (folder / name).resolve()
    if not path.is_relative_to(folder.resolve()):
        raise ModelRejected(f"{key} {name!r} is a link that leaves the model's folder; copy the file there")
    if not path.is_file():
        raise ModelRejected(f"{key} names {name!r}, which is no file in {folder}")
    return path
