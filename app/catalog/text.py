"""Texts become token tensors, as `preprocess.text` says. Blocking: call it off the event loop.

The only user of the `tokenizers` library, which is imported when the first text model is there. Knows nothing of HTTP or labels.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

import numpy as np

from app.catalog.sections import TextPreprocess
from app.catalog.tensors import bytes_tensor, to_tensor
from app.domain import BYTES, Signature, Tensor, TensorSpec
from app.errors import HoneError, InvalidRequest, ModelFailed, ModelRejected, PayloadTooLarge, Unsupported

if TYPE_CHECKING:
    from tokenizers import Encoding, Tokenizer

USUAL_NAMES: Final = {
    "ids": ("input_ids", "ids", "tokens"),
    "mask": ("attention_mask", "input_mask", "mask"),
    "type_ids": ("token_type_ids", "segment_ids", "type_ids"),
}
USUAL_PADS: Final = ("[PAD]", "<pad>", "<|endoftext|>", "</s>")
DEFAULT_MAX_LENGTH: Final = 512
MAX_TOKENIZER_BYTES: Final = 64 << 20
PANIC: Final = "PanicException"
"""Of pyo3_runtime, a module that cannot be imported."""


class StringEncoder:
    """Texts as they are, for a model with one input of strings (BYTES), shape [N] or [N, 1]."""

    def __init__(self, config: TextPreprocess, signature: Signature) -> None:
        name = config.inputs.ids or (signature.inputs[0].name if len(signature.inputs) == 1 else "")
        specs = {spec.name: spec for spec in signature.inputs}
        if name not in specs or specs[name].datatype != BYTES or len(specs[name].shape) not in (1, 2):
            raise ModelRejected(
                "preprocess.text names no tokenizer, which only a model with one input of strings (BYTES, [N] or [N, 1]) can do without"
            )
        self.config, self.spec = config, specs[name]

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        _check_texts(texts, self.config)
        shape = (len(texts),) if len(self.spec.shape) == 1 else (len(texts), 1)
        return [bytes_tensor(self.spec.name, shape, (_utf8(text, row) for row, text in enumerate(texts)))]


class TextEncoder:
    """Texts by a tokenizer; raises ModelRejected where tokenizer, section and signature do not agree."""

    def __init__(self, config: TextPreprocess, signature: Signature, path: Path) -> None:
        self.config = config
        self.specs = _match_inputs(config, signature)
        self.tokenizer = _load(path)
        fixed = {spec.shape[1] for spec in self.specs.values() if spec.shape[1] != -1}
        if len(fixed) > 1 or (fixed and config.max_length and config.max_length not in fixed):
            raise ModelRejected(f"the model takes texts of {sorted(fixed)} tokens; preprocess.text.max_length is {config.max_length}")
        truncation = self.tokenizer.truncation or {}
        self.max_length = int(next(iter(fixed), 0) or config.max_length or truncation.get("max_length") or DEFAULT_MAX_LENGTH)
        self.fill = bool(fixed) or config.padding == "max_length"
        self._set_truncation(path)
        self._set_padding()

    def _set_truncation(self, path: Path) -> None:
        direction = (self.tokenizer.truncation or {}).get("direction", "right")
        self.tokenizer.no_truncation()
        if not self.config.truncation:
            return
        added = self.tokenizer.num_special_tokens_to_add(False)
        if self.max_length <= added:
            raise ModelRejected(
                f"preprocess.text.max_length is {self.max_length}, but {path.name} alone adds {added} tokens to a text; allow more"
            )
        self.tokenizer.enable_truncation(self.max_length, direction=direction)

    def _set_padding(self) -> None:
        told = self.tokenizer.padding or {}
        pad_id, pad_token = self._pad(told)
        self.tokenizer.enable_padding(
            direction=told.get("direction", "right"),
            pad_id=pad_id,
            pad_token=pad_token,
            pad_type_id=told.get("pad_type_id", 0),
            length=self.max_length if self.fill else None,
        )

    def _pad(self, told: dict[str, Any]) -> tuple[int, str]:
        """Id and text of the padding token; id 0 where the tokenizer has none, which the mask hides."""
        wanted = self.config.pad_token
        if wanted is None and told:
            return int(told["pad_id"]), str(told["pad_token"])
        for token in (wanted,) if wanted is not None else USUAL_PADS:
            found = self.tokenizer.token_to_id(token)
            if found is not None:
                return int(found), token
        if wanted is not None:
            raise ModelRejected(f"preprocess.text.pad_token {wanted!r} is not in the tokenizer's vocabulary")
        return 0, self.tokenizer.id_to_token(0) or "[PAD]"

    def encode(self, texts: Sequence[str]) -> list[Tensor]:
        """int tensors [len(texts), tokens]. Raises InvalidRequest for no or too many texts, and for too long ones where they may not be cut."""
        _check_texts(texts, self.config)
        with _failures(lambda said: ModelFailed(f"the model's tokenizer failed on this text: {said}")):
            encoded = self.tokenizer.encode_batch(list(texts))
        for row, one in enumerate(encoded):
            tokens = sum(one.attention_mask)
            if tokens > self.max_length:
                raise InvalidRequest(
                    f"text {row} has {tokens} tokens; the model takes {self.max_length} and model.yaml says `truncation: false`"
                )
            if not tokens:
                raise InvalidRequest(f"text {row} is empty: the tokenizer makes no token of it")
        taken = {part: [_part(one, part) for one in encoded] for part in self.specs}
        return [to_tensor(spec.name, spec.datatype, np.asarray(taken[part], dtype=np.int64)) for part, spec in self.specs.items()]


def _part(one: Encoding, part: str) -> list[int]:
    return one.ids if part == "ids" else one.attention_mask if part == "mask" else one.type_ids


def _match_inputs(config: TextPreprocess, signature: Signature) -> dict[str, TensorSpec]:
    """Which input takes ids, mask and type ids; every input that must be given has to be one of them."""
    specs = {spec.name: spec for spec in signature.inputs}
    found: dict[str, TensorSpec] = {}
    for part, usual in USUAL_NAMES.items():
        named = getattr(config.inputs, part)
        if named is not None and named not in specs:
            raise ModelRejected(f"preprocess.text.inputs.{part} names {named!r}; the model's inputs are {', '.join(specs)}")
        name = named or next((name for name in usual if name in specs), None)
        if name is None and part == "ids" and len(specs) == 1:
            name = next(iter(specs))
        if name is not None:
            found[part] = specs[name]
    if "ids" not in found:
        raise ModelRejected(
            f"preprocess.text.inputs.ids is needed: none of the model's inputs ({', '.join(specs)}) has a usual name for token ids"
        )
    missing = [spec.name for spec in signature.inputs if spec not in found.values() and not spec.optional]
    if missing:
        raise ModelRejected(
            f"the model also wants {', '.join(missing)}, which a text does not give; preprocess.text.inputs can name ids, mask and type_ids"
        )
    for spec in found.values():
        if spec.datatype not in ("INT64", "INT32") or len(spec.shape) != 2:
            raise ModelRejected(
                f"input {spec.name!r} is {spec.datatype} {list(spec.shape)}; token inputs are INT64 or INT32 of shape [texts, tokens]"
            )
    return found


def _load(path: Path) -> Tokenizer:
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # its threads would be sized to the host and ignore the core ledger
    try:
        from tokenizers import Tokenizer
    except ImportError:
        raise Unsupported("this server has no `tokenizers` library, which preprocess.text needs: pip install tokenizers") from None
    try:
        if path.stat().st_size > MAX_TOKENIZER_BYTES:
            raise ModelRejected(f"{path} is larger than {MAX_TOKENIZER_BYTES >> 20} MiB; a tokenizer.json is not")
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as e:
        raise ModelRejected(f"preprocess.text.tokenizer {path.name!r} cannot be read: {e}") from None
    with _failures(
        lambda said: ModelRejected(f"{path.name} is no tokenizer.json that this version of the tokenizers library reads: {said}")
    ):
        return Tokenizer.from_str(text)


@contextmanager
def _failures(as_error: Callable[[str], HoneError]) -> Iterator[None]:
    """The library raises bare Exception, and panics where a file or a text goes beyond it: such a panic is no Exception at all."""
    try:
        yield
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != PANIC:
            raise
        raise as_error(str(error)) from None


def _check_texts(texts: Sequence[str], config: TextPreprocess) -> None:
    if not texts:
        raise InvalidRequest("there is no text in the request")
    if len(texts) > config.max_texts:
        raise InvalidRequest(f"{len(texts)} texts in one request; the model takes {config.max_texts} (preprocess.text.max_texts)")
    characters = sum(map(len, texts))
    if characters > config.max_characters:
        raise PayloadTooLarge(
            f"the texts have {characters:,} characters; the model takes {config.max_characters:,} in one request (preprocess.text.max_characters)"
        )
    for row, text in enumerate(texts):
        _utf8(text, row)


def _utf8(text: str, row: int) -> bytes:
    try:
        return text.encode()
    except UnicodeEncodeError as e:
        raise InvalidRequest(f"text {row} is not valid Unicode at character {e.start}: a lone surrogate") from None
