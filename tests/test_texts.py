"""Texts to tensors by a real tokenizer: padded, cut, refused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from app.catalog.processing import Preprocess, Processor
from app.catalog.tensors import elements, to_array
from app.domain import Signature, TensorSpec
from app.errors import InvalidRequest, ModelFailed, ModelRejected, PayloadTooLarge

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "good", "bad", "film", "very", "##ly"]


def tokenizer_file(folder: Path, **options: Any) -> Path:
    tokenizer = Tokenizer(WordPiece({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    if options:
        tokenizer.enable_padding(**options)
    path = folder / "tokenizer.json"
    tokenizer.save(str(path))
    return path


def text_signature(tokens: int = -1, datatype: str = "INT64", *names: str) -> Signature:
    names = names or ("input_ids", "attention_mask", "token_type_ids")
    return Signature(
        tuple(TensorSpec(name, datatype, (-1, tokens)) for name in names), (TensorSpec("logits", "FP32", (-1, 2)),), batchable=True
    )


def text_processor(folder: Path, signature: Signature | None = None, **section: Any) -> Processor:
    return Processor(
        signature or text_signature(), Preprocess.model_validate({"text": {"tokenizer": "tokenizer.json"} | section}), None, folder
    )


def test_texts_become_padded_ids_mask_and_types(tmp_path: Path) -> None:
    tokenizer_file(tmp_path)
    tensors = {t.name: to_array(t) for t in text_processor(tmp_path).encode_text(["good film", "very very bad film", "badly"])}
    assert tensors["input_ids"].dtype == np.int64
    assert tensors["input_ids"].tolist() == [[2, 4, 6, 3, 1, 1], [2, 7, 7, 5, 6, 3], [2, 5, 8, 3, 1, 1]]
    assert tensors["attention_mask"].tolist() == [[1, 1, 1, 1, 0, 0], [1] * 6, [1, 1, 1, 1, 0, 0]]
    assert tensors["token_type_ids"].tolist() == [[0] * 6] * 3


def test_long_texts_are_cut_or_refused(tmp_path: Path) -> None:
    tokenizer_file(tmp_path)
    (ids, *_) = text_processor(tmp_path, max_length=4).encode_text(["very very good film"])
    assert to_array(ids).tolist() == [[2, 7, 7, 3]]
    with pytest.raises(InvalidRequest, match=r"text 1 has 6 tokens; the model takes 4"):
        text_processor(tmp_path, max_length=4, truncation=False).encode_text(["good", "very very good film"])


def test_a_fixed_length_is_always_filled_and_int32_kept(tmp_path: Path) -> None:
    tokenizer_file(tmp_path)
    (ids, mask) = text_processor(tmp_path, text_signature(8, "INT32", "input_ids", "attention_mask")).encode_text(["good"])
    assert (ids.shape, ids.datatype) == ((1, 8), "INT32")
    assert to_array(ids).tolist() == [[2, 4, 3, 1, 1, 1, 1, 1]]
    assert to_array(mask).sum() == 3


def test_the_tokenizers_own_padding_side_is_kept(tmp_path: Path) -> None:
    tokenizer_file(tmp_path, direction="left", pad_id=1, pad_token="[PAD]")
    (ids, *_) = text_processor(tmp_path).encode_text(["good", "good film"])
    assert to_array(ids).tolist() == [[1, 2, 4, 3], [2, 4, 6, 3]]


def test_one_input_of_any_name_takes_the_ids(tmp_path: Path) -> None:
    tokenizer_file(tmp_path)
    assert [t.name for t in text_processor(tmp_path, text_signature(-1, "INT64", "tok")).encode_text(["good"])] == ["tok"]
    named = text_processor(tmp_path, text_signature(-1, "INT64", "a", "b"), inputs={"ids": "b", "mask": "a"})
    assert {t.name for t in named.encode_text(["good"])} == {"a", "b"}


def test_empty_too_many_too_long_and_broken_texts_are_refused(tmp_path: Path) -> None:
    tokenizer_file(tmp_path)
    processor = text_processor(tmp_path, max_texts=2, max_characters=20)
    with pytest.raises(InvalidRequest, match="no text"):
        processor.encode_text([])
    with pytest.raises(InvalidRequest, match="3 texts in one request"):
        processor.encode_text(["a"] * 3)
    with pytest.raises(PayloadTooLarge, match="21 characters"):
        processor.encode_text(["a" * 21])
    with pytest.raises(InvalidRequest, match="lone surrogate"):
        processor.encode_text(["a\ud800"])
    assert to_array(processor.encode_text([""])[0]).tolist() == [[2, 3]]


def test_text_sections_that_do_not_fit_are_rejected(tmp_path: Path) -> None:
    tokenizer_file(tmp_path)
    with pytest.raises(ModelRejected, match="also wants pixels"):
        text_processor(tmp_path, text_signature(-1, "INT64", "input_ids", "pixels"))
    with pytest.raises(ModelRejected, match="INT64 or INT32"):
        text_processor(tmp_path, text_signature(-1, "FP32"))
    with pytest.raises(ModelRejected, match="'nothing'"):
        text_processor(tmp_path, inputs={"ids": "nothing"})
    with pytest.raises(ModelRejected, match="pad_token"):
        text_processor(tmp_path, pad_token="<none>")
    with pytest.raises(ModelRejected, match="max_length is 9"):
        text_processor(tmp_path, text_signature(8), max_length=9)
    with pytest.raises(ModelRejected, match="adds 2 tokens"):
        text_processor(tmp_path, max_length=2)


def test_a_tokenizer_without_its_unknown_token_fails_the_request_not_the_server(tmp_path: Path) -> None:
    Tokenizer(WordPiece({"good": 0}, unk_token="[UNK]")).save(str(tmp_path / "tokenizer.json"))
    processor = text_processor(tmp_path)
    assert to_array(processor.encode_text(["good"])[0]).tolist() == [[0]]
    with pytest.raises(ModelFailed, match="tokenizer failed"):
        processor.encode_text(["bad"])
    with pytest.raises(InvalidRequest, match="text 0 is empty"):
        processor.encode_text([""])


def test_tokenizer_files_stay_in_the_models_folder_and_must_be_sound(tmp_path: Path) -> None:
    model, outside = tmp_path / "model", tmp_path / "outside"
    model.mkdir()
    outside.mkdir()
    tokenizer_file(outside)
    (model / "link.json").symlink_to(outside / "tokenizer.json")
    (model / "bad.json").write_text("{}")
    for name, says in [("../outside/tokenizer.json", "own folder"), ("/etc/passwd", "own folder"), ("link.json", "leaves the model's folder"),
                       ("absent.json", "no file"), ("bad.json", "no tokenizer.json")]:  # fmt: skip
        with pytest.raises(ModelRejected, match=says):
            text_processor(model, tokenizer=name)


def test_where_the_library_panics_the_file_or_the_text_is_refused(tmp_path: Path) -> None:
    """A panic of its Rust code is no Exception in Python: it ended whatever task it was raised in."""
    path = tokenizer_file(tmp_path)
    sound = json.loads(path.read_text())
    path.write_text(json.dumps({**sound, "model": {"type": "BPE", "vocab": {"a": 0, "b": 1}, "merges": ["a b"]}}))
    with pytest.raises(ModelRejected, match="is no tokenizer"):
        text_processor(tmp_path)
    endless = {"type": "Split", "pattern": {"Regex": "((a+)+)+$"}, "behavior": "Isolated", "invert": False}
    path.write_text(json.dumps({**sound, "pre_tokenizer": endless}))
    processor = text_processor(tmp_path)
    assert len(processor.encode_text(["good"])) == 3
    with pytest.raises(ModelFailed, match="retry-limit"):
        processor.encode_text(["a" * 40 + "!"])


def test_a_model_of_strings_takes_texts_as_they_are() -> None:
    signature = Signature((TensorSpec("s", "BYTES", (-1, 1)),), (TensorSpec("y", "FP32", (-1, 2)),))
    (tensor,) = Processor(signature, Preprocess.model_validate({"text": {}})).encode_text(["don’t", ""])
    assert (tensor.shape, elements(tensor)) == ((2, 1), ["don’t".encode(), b""])
    with pytest.raises(ModelRejected, match="BYTES"):
        Processor(text_signature(), Preprocess.model_validate({"text": {}}))
