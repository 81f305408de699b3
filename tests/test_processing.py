"""Images and texts to tensors, scores to labels: real files by Pillow, a real tokenizer, hostile bytes."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path
from typing import Any

import numpy as np
import orjson
import pytest
from PIL import Image
from pydantic import ValidationError
from tokenizers import Tokenizer
from tokenizers.models import WordPiece
from tokenizers.pre_tokenizers import Whitespace
from tokenizers.processors import TemplateProcessing

from app.catalog.processing import Postprocess, Preprocess, Processor
from app.catalog.tensors import bytes_tensor, elements, to_array, to_tensor
from app.domain import Signature, Tensor, TensorSpec
from app.errors import InvalidRequest, ModelFailed, ModelRejected, PayloadTooLarge

WORDS = ["[UNK]", "[PAD]", "[CLS]", "[SEP]", "good", "bad", "film", "very", "##ly"]


def image_signature(shape: tuple[int, ...] = (-1, 3, 4, 6), datatype: str = "FP32") -> Signature:
    return Signature((TensorSpec("x", datatype, shape),), (TensorSpec("scores", "FP32", (-1, 3)),), batchable=True)


def image_processor(shape: tuple[int, ...] = (-1, 3, 4, 6), datatype: str = "FP32", **section: Any) -> Processor:
    return Processor(image_signature(shape, datatype), Preprocess.model_validate({"image": section}))


def encode(processor: Processor, data: bytes) -> np.ndarray[Any, Any]:
    (tensor,) = processor.encode_image(data)
    array = to_array(tensor)
    assert array.shape == tensor.shape
    return array


def file_of(pixels: Any, kind: str = "PNG", mode: str | None = None, **options: Any) -> bytes:
    image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(np.asarray(pixels, np.uint8), mode)
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


@pytest.fixture
def picture() -> np.ndarray[Any, Any]:
    return np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)


# -- images: the numbers


def test_a_picture_of_the_right_size_becomes_its_own_pixels_scaled(picture: np.ndarray[Any, Any]) -> None:
    array = encode(image_processor(), file_of(picture))
    assert array.dtype == np.float32
    np.testing.assert_allclose(array, picture.transpose(2, 0, 1)[None] / 255, rtol=1e-6)


def test_mean_and_std_are_applied_after_dividing_per_channel(picture: np.ndarray[Any, Any]) -> None:
    mean, std = [0.485, 0.456, 0.406], [0.229, 0.224, 0.225]
    array = encode(image_processor(mean=mean, std=std), file_of(picture))
    np.testing.assert_allclose(array[0], ((picture / 255 - mean) / std).transpose(2, 0, 1), rtol=1e-4, atol=1e-6)


def test_bgr_nhwc_uint8_and_half_precision(picture: np.ndarray[Any, Any]) -> None:
    bgr = encode(image_processor((-1, 4, 6, 3), layout="NHWC", colour="BGR", divide_by=1), file_of(picture))
    np.testing.assert_array_equal(bgr[0], picture[:, :, ::-1])
    raw = encode(image_processor((1, 3, 4, 6), "UINT8"), file_of(picture))
    assert raw.dtype == np.uint8
    np.testing.assert_array_equal(raw[0], picture.transpose(2, 0, 1))
    half = encode(image_processor(datatype="FP16"), file_of(picture))
    assert half.dtype == np.float16
    bf16 = encode(image_processor(datatype="BF16"), file_of(picture))
    np.testing.assert_allclose(bf16, half.astype(np.float32), atol=0.004)


@pytest.mark.parametrize(("layout", "shape"), [("NHW", (-1, 4, 6)), ("HW", (4, 6)), ("CHW", (1, 4, 6)), ("HWC", (4, 6, 1))])
def test_grey_layouts_without_batch_or_channels(layout: str, shape: tuple[int, ...], picture: np.ndarray[Any, Any]) -> None:
    array = encode(image_processor(shape, layout=layout, colour="GRAY"), file_of(picture[:, :, 0]))
    assert array.shape == tuple(1 if side == -1 else side for side in shape)
    np.testing.assert_allclose(array.reshape(4, 6), picture[:, :, 0] / 255, rtol=1e-6)


def test_resizing_and_cropping_agree_with_pillow() -> None:
    source = Image.fromarray(np.random.default_rng(1).integers(0, 256, (40, 60, 3), dtype=np.uint8))
    exact = encode(image_processor((-1, 3, 8, 8), divide_by=1, interpolation="bicubic"), file_of(source))
    np.testing.assert_array_equal(exact[0], np.asarray(source.resize((8, 8), Image.Resampling.BICUBIC)).transpose(2, 0, 1))
    shorter = encode(image_processor((-1, 3, 8, 8), divide_by=1, resize="shorter", size=10), file_of(source))
    np.testing.assert_array_equal(
        shorter[0], np.asarray(source.resize((15, 10), Image.Resampling.BILINEAR).crop((4, 1, 12, 9))).transpose(2, 0, 1)
    )


def test_without_resizing_a_wrong_size_is_refused_and_a_free_one_kept(picture: np.ndarray[Any, Any]) -> None:
    assert encode(image_processor((-1, 3, -1, -1), resize="none"), file_of(picture)).shape == (1, 3, 4, 6)
    assert encode(image_processor((-1, 3, 2, 2), resize="none", crop=2), file_of(picture)).shape == (1, 3, 2, 2)
    with pytest.raises(InvalidRequest, match=r"4 × 6.*model takes 8 × 8"):
        encode(image_processor((-1, 3, 8, 8), resize="none"), file_of(picture))
    with pytest.raises(InvalidRequest, match="too small"):
        encode(image_processor((-1, 3, 8, 8), resize="none", crop=8), file_of(picture))


# -- images: the files that people send


SHOWN = {
    1: lambda a: a, 2: lambda a: a[:, ::-1], 3: lambda a: a[::-1, ::-1], 4: lambda a: a[::-1], 5: lambda a: a.T,
    6: lambda a: a.T[:, ::-1], 7: lambda a: a.T[::-1, ::-1], 8: lambda a: a.T[::-1],
}  # fmt: skip
"""How a viewer shows stored rows and columns, by the table of the EXIF standard; 6 and 8 undo each other, the rest undo themselves."""


@pytest.mark.parametrize("orientation", SHOWN)
@pytest.mark.parametrize("kind", ["PNG", "JPEG"])
def test_exif_orientation_is_applied(orientation: int, kind: str) -> None:
    upright = np.kron(np.arange(24, dtype=np.uint8).reshape(4, 6) * 10, np.ones((8, 8), np.uint8))
    stored = SHOWN[{6: 8, 8: 6}.get(orientation, orientation)](upright)
    exif = Image.Exif()
    exif[0x0112] = orientation
    array = encode(image_processor((-1, 1, 32, 48), colour="GRAY", divide_by=1, resize="none"), file_of(stored, kind, exif=exif))
    np.testing.assert_allclose(array[0, 0], upright, atol=0 if kind == "PNG" else 3)


def test_an_unreadable_exif_block_changes_nothing(picture: np.ndarray[Any, Any]) -> None:
    data = file_of(picture, "JPEG", exif=b"Exif\0\0II*\0\xff\xff\xff\xff")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert encode(image_processor(), data).shape == (1, 3, 4, 6)


def test_transparency_shows_the_background() -> None:
    pixels = np.zeros((4, 6, 4), np.uint8)
    pixels[0, 0] = (10, 20, 30, 255)
    data = file_of(pixels)
    white = encode(image_processor(divide_by=1), data)[0]
    assert white[:, 0, 0].tolist() == [10, 20, 30]
    assert white[:, 1, 1].tolist() == [255, 255, 255]
    black = encode(image_processor(divide_by=1, background=[0, 0, 0]), data)[0]
    assert black[:, 1, 1].tolist() == [0, 0, 0]


def test_palette_two_level_and_cmyk_pictures_are_taken(picture: np.ndarray[Any, Any]) -> None:
    image = Image.fromarray(picture)
    palette = image.quantize(4)
    np.testing.assert_array_equal(
        encode(image_processor(divide_by=1), file_of(palette))[0], np.asarray(palette.convert("RGB")).transpose(2, 0, 1)
    )
    see_through = encode(image_processor(divide_by=1), file_of(palette, transparency=palette.getpixel((0, 0))))
    assert see_through[0, :, 0, 0].tolist() == [255, 255, 255]
    two_level = encode(image_processor(divide_by=1), file_of(image.convert("1")))
    assert set(np.unique(two_level)) <= {0, 255}
    assert encode(image_processor(), file_of(image.convert("CMYK"), "JPEG")).shape == (1, 3, 4, 6)


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    wide = np.array([[0, 257, 32896, 65535]], np.uint16)
    buffer = io.BytesIO()
    Image.fromarray(wide).save(buffer, "PNG")
    array = encode(image_processor((-1, 1, 1, 4), colour="GRAY", divide_by=1), buffer.getvalue())
    assert array.ravel().tolist() == [0, 1, 128, 255]


def test_the_first_picture_of_a_phones_multi_picture_jpeg_is_taken(picture: np.ndarray[Any, Any]) -> None:
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "MPO", save_all=True, append_images=[Image.new("RGB", (6, 4))], quality=95)
    with Image.open(io.BytesIO(buffer.getvalue())) as opened:
        assert getattr(opened, "n_frames", 1) == 2
        first = np.asarray(opened.convert("RGB"))
    np.testing.assert_array_equal(encode(image_processor(divide_by=1), buffer.getvalue())[0], first.transpose(2, 0, 1))


def test_an_animated_png_is_refused() -> None:
    frames = [Image.new("RGB", (6, 4), colour) for colour in ("red", "blue")]
    with pytest.raises(InvalidRequest, match="animated"):
        encode(image_processor(), file_of(frames[0], save_all=True, append_images=frames[1:]))


# -- images: hostile files


def png_header(width: int, height: int, rows: int = 0) -> bytes:
    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 1, 0, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", _blank(width, rows)) + chunk(b"IEND", b"")


def _blank(width: int, rows: int) -> bytes:
    packer = zlib.compressobj(1)
    return b"".join(packer.compress(bytes(width // 8 + 1)) for _ in range(rows)) + packer.flush()


def test_a_pixel_bomb_is_refused_by_its_header_without_its_memory() -> None:
    script = """
import resource, sys
from app.domain import Signature, TensorSpec
from app.errors import PayloadTooLarge
from app.catalog.processing import Preprocess, Processor
from PIL import Image, PngImagePlugin
data = sys.stdin.buffer.read()
signature = Signature((TensorSpec("x", "FP32", (-1, 3, 4, 6)),), ())
processor = Processor(signature, Preprocess.model_validate({"image": {}}))
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
try:
    processor.encode_image(data)
except PayloadTooLarge as error:
    print(error)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    bomb = png_header(50_000, 50_000, 50_000)
    assert len(bomb) < 2_000_000
    done = subprocess.run([sys.executable, "-c", script], input=bomb, capture_output=True, timeout=60, check=True)
    message, grown_kib = done.stdout.decode().splitlines()
    assert "25,000,000" in message
    assert int(grown_kib) < 50_000, "decoded, the picture takes 2.5 GB"


def test_more_pixels_than_allowed_name_the_limit_and_its_key() -> None:
    with pytest.raises(PayloadTooLarge, match=r"1001 × 1000 = 1,001,000 pixels; the limit is 1,000,000.*max_pixels"):
        encode(image_processor(max_pixels=1_000_000), png_header(1001, 1000))


def test_a_long_thin_picture_does_not_blow_up_when_its_shorter_side_grows() -> None:
    thin = file_of(np.zeros((1, 60_000), np.uint8))
    with pytest.raises(PayloadTooLarge, match="pixels"):
        encode(image_processor((-1, 3, 224, 224), resize="shorter", size=256), thin)


def test_truncated_and_damaged_files_are_refused(picture: np.ndarray[Any, Any]) -> None:
    jpeg = file_of(np.tile(picture, (20, 20, 1)), "JPEG")
    png = file_of(picture)
    for data in (jpeg[: len(jpeg) // 2], jpeg[:20], png[: len(png) // 2], png[:8], png[:40] + b"\0" * 40, b"\xff\xd8\xff"):
        with pytest.raises(InvalidRequest, match="damaged or cut off"):
            encode(image_processor(), data)


def test_other_formats_are_refused_by_their_first_bytes(picture: np.ndarray[Any, Any]) -> None:
    for kind in ("GIF", "BMP", "TIFF", "WEBP", "PPM"):
        with pytest.raises(InvalidRequest, match="neither PNG nor JPEG"):
            encode(image_processor(), file_of(picture, kind))
    with pytest.raises(InvalidRequest, match="neither PNG nor JPEG"):
        encode(image_processor(), b"")


def test_a_jpeg_of_endless_scans_is_refused(picture: np.ndarray[Any, Any]) -> None:
    data = file_of(picture, "JPEG", progressive=True)
    assert encode(image_processor(), data).shape == (1, 3, 4, 6)
    scan = data[data.rindex(b"\xff\xda") : -2]
    with pytest.raises(InvalidRequest, match="scans"):
        encode(image_processor(), data[:-2] + scan * 200 + data[-2:])


def test_no_mutation_of_a_good_file_gets_past_the_two_errors(picture: np.ndarray[Any, Any]) -> None:
    chance = random.Random(7)
    exif = Image.Exif()
    exif[0x0112] = 6
    files = [file_of(picture, kind, exif=exif) for kind in ("PNG", "JPEG")] + [
        file_of(Image.fromarray(picture).quantize(8), transparency=0)
    ]
    processor, refused = image_processor(), 0
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for round_ in range(1500):
            data = bytearray(files[round_ % 3])
            for _ in range(chance.randint(1, 6)):
                data[chance.randrange(len(data))] = chance.randrange(256)
            try:
                processor.encode_image(bytes(data))
            except (InvalidRequest, PayloadTooLarge):
                refused += 1
    assert refused > 100


# -- images: a section that does not fit


@pytest.mark.parametrize(
    ("shape", "datatype", "section", "says"),
    [
        ((-1, 1, 4, 6), "FP32", {}, "RGB makes 3 channels but input 'x' wants 1"),
        ((-1, 24), "FP32", {}, "same number of axes"),
        ((8, 3, 4, 6), "FP32", {}, "8 images at once"),
        ((-1, 3, 4, 6), "INT64", {}, "is INT64"),
        ((-1, 3, 4, 6), "UINT8", {"mean": 0.5}, "without divide_by, mean and std"),
        ((-1, 3, -1, -1), "FP32", {}, "needs `size`"),
        ((-1, 3, 4, 6), "FP32", {"size": 8}, r"images of \[8, 8\] but input 'x' wants \[4, 6\]"),
        ((-1, 3, 4, 6), "FP32", {"resize": "shorter"}, "needs `size`"),
        ((-1, 3, 4, 6), "FP32", {"resize": "shorter", "size": 5}, "larger than the shorter side"),
        ((-1, 3, 4, 6), "FP32", {"resize": "none", "size": 5}, "leave one of them out"),
        ((-1, 3, 4, 6), "FP32", {"input": "y"}, "not 'y'"),
    ],
)
def test_a_section_that_the_model_cannot_take_is_rejected_at_load(
    shape: tuple[int, ...], datatype: str, section: dict[str, Any], says: str
) -> None:
    with pytest.raises(ModelRejected, match=says):
        image_processor(shape, datatype, **section)


def test_a_model_that_wants_more_than_an_image_is_rejected() -> None:
    signature = Signature((TensorSpec("x", "FP32", (-1, 3, 4, 6)), TensorSpec("y", "FP32", (-1, 2))), ())
    with pytest.raises(ModelRejected, match="also wants y"):
        Processor(signature, Preprocess.model_validate({"image": {"input": "x"}}))


@pytest.mark.parametrize(
    "section",
    [
        {"image": {"size": True}}, {"image": {"size": "8"}}, {"image": {"sise": 8}}, {"image": {"mean": [1, 2]}}, {"image": {"std": 0}},
        {"image": {"mean": float("nan")}}, {"image": {"layout": "HW"}}, {"image": {"max_pixels": 10**12}}, {"text": {"max_length": 0}},
        {"image": {"resize": "shorter", "size": [8, 9]}},
    ],
)  # fmt: skip
def test_typos_and_silent_conversions_in_sections_are_errors(section: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Preprocess.model_validate(section)


# -- texts


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


def test_a_model_of_strings_takes_texts_as_they_are() -> None:
    signature = Signature((TensorSpec("s", "BYTES", (-1, 1)),), (TensorSpec("y", "FP32", (-1, 2)),))
    (tensor,) = Processor(signature, Preprocess.model_validate({"text": {}})).encode_text(["don’t", ""])
    assert (tensor.shape, elements(tensor)) == ((2, 1), ["don’t".encode(), b""])
    with pytest.raises(ModelRejected, match="BYTES"):
        Processor(text_signature(), Preprocess.model_validate({"text": {}}))


# -- answers


def scores(values: Any, datatype: str = "FP32", name: str = "scores") -> list[Tensor]:
    return [to_tensor(name, datatype, np.asarray(values, np.float32))]


def classifier(**section: Any) -> Processor:
    return Processor(image_signature(), None, Postprocess.model_validate({"labels": ["cat", "dog", "owl"]} | section))


def test_logits_become_labels_by_softmax_and_probabilities_stay() -> None:
    logits = np.array([[1.0, 3.0, 2.0], [5.0, 0.0, 0.0]])
    expected = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    first, second = classifier().decode(scores(logits))["predictions"]
    assert [p["label"] for p in first] == ["dog", "owl", "cat"]
    assert [p["index"] for p in first] == [1, 2, 0]
    np.testing.assert_allclose([p["probability"] for p in first], expected[0][[1, 2, 0]], atol=1e-6)
    assert second[0]["label"] == "cat"
    kept = classifier().decode(scores([[0.2, 0.7, 0.1]], "FP16"))["predictions"][0]
    np.testing.assert_allclose([p["probability"] for p in kept], [0.7, 0.2, 0.1], atol=1e-3)
    squeezed = classifier().decode(scores(logits.reshape(2, 3, 1, 1)))["predictions"]
    assert squeezed == [first, second]


def test_one_row_is_answered_without_its_batch_and_top_k_is_kept() -> None:
    answer = classifier(top_k=1).decode(scores([[1, 3, 2]]), single=True)
    assert [p["label"] for p in answer["predictions"]] == ["dog"]


def test_activations_can_be_named() -> None:
    values = [[-1.0, 2.0, 0.0]]
    sigmoid = classifier(activation="sigmoid").decode(scores(values), single=True)["predictions"]
    np.testing.assert_allclose([p["probability"] for p in sigmoid], [0.880797, 0.5, 0.268941], atol=1e-6)
    assert classifier(activation="none").decode(scores(values), single=True)["predictions"][0]["probability"] == 2.0
    forced = classifier(activation="softmax").decode(scores([[0.2, 0.7, 0.1]]), single=True)["predictions"]
    assert forced[0]["probability"] < 0.5


def test_one_score_is_the_probability_of_the_second_class() -> None:
    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), (TensorSpec("scores", "FP32", (-1, 1)),))
    processor = Processor(signature, None, Postprocess.model_validate({"labels": ["no", "yes"]}))
    rows = processor.decode(scores([[0.9], [0.2]]))["predictions"]
    assert [(row[0]["label"], row[0]["probability"]) for row in rows] == [("yes", 0.9), ("no", 0.8)]


def test_ties_and_missing_labels_are_by_index() -> None:
    processor = Processor(image_signature(), None, Postprocess.model_validate({"kind": "classification"}))
    predictions = processor.decode(scores([[1, 1, 1]]), single=True)["predictions"]
    assert [p["index"] for p in predictions] == [0, 1, 2]
    assert "label" not in predictions[0]
    by_task = Processor(image_signature(), task="classification")
    assert "predictions" in by_task.decode(scores([[1, 1, 1]]))


def test_nan_and_infinity_have_no_probability_and_are_counted() -> None:
    rows = [[1, 2, 3], [np.nan, 2, 3], [1, np.inf, 3], [-np.inf, 2, 3]]
    answer = classifier().decode(scores(rows))
    assert [len(row) for row in answer["predictions"]] == [3, 0, 0, 3]
    assert answer["non_finite"] == 3
    assert answer["predictions"][3][-1] == {"label": "cat", "index": 0, "probability": 0.0}


def test_plain_outputs_are_given_as_they_are_with_null_for_what_json_lacks() -> None:
    processor = Processor(image_signature())
    tensors = [
        *scores([[1.5, np.nan], [np.inf, 2]]),
        bytes_tensor("names", (2,), [b"caf\xc3\xa9", b"\xff"]),
        to_tensor("n", "INT64", np.array(7)),
        to_tensor("flag", "BOOL", np.array([True])),
    ]
    decoded = orjson.loads(orjson.dumps(processor.decode(tensors), option=orjson.OPT_SERIALIZE_NUMPY))
    assert decoded == {
        "outputs": {"scores": [[1.5, None], [None, 2.0]], "names": ["café", {"base64": "/w=="}], "n": 7, "flag": [True]},
        "non_finite": 2,
    }


def test_the_scores_are_found_among_several_outputs() -> None:
    outputs = (TensorSpec("label", "INT64", (-1,)), TensorSpec("probabilities", "FP32", (-1, 3)))
    signature = Signature((TensorSpec("x", "FP32", (-1, 4)),), outputs)
    processor = Processor(signature, task="classification")
    assert processor.output_names == ("probabilities",)
    assert processor.decode(scores([[0, 1, 0]], name="probabilities"), single=True)["predictions"][0]["index"] == 1
    with pytest.raises(ModelRejected, match="scores in floating point"):
        Processor(signature, None, Postprocess.model_validate({"kind": "classification", "output": "label"}))
    with pytest.raises(ModelFailed, match="probabilities"):
        processor.decode(scores([[0, 1, 0]], name="other"))


def test_labels_come_from_a_file_and_must_match_the_classes(tmp_path: Path) -> None:
    (tmp_path / "labels.txt").write_text("\ufeffcat\r\ndog\nowl\n\n", encoding="utf-8")
    processor = Processor(image_signature(), None, Postprocess.model_validate({"labels": "labels.txt"}), tmp_path)
    assert processor.labels == ("cat", "dog", "owl")
    with pytest.raises(ModelRejected, match="2 names but output 'scores' has 3"):
        Processor(image_signature(), None, Postprocess.model_validate({"labels": ["a", "b"]}))
    free = Signature((), (TensorSpec("scores", "FP32", (-1, -1)),))
    with pytest.raises(ModelFailed, match=r"3 classes; model\.yaml has 2 labels"):
        Processor(free, None, Postprocess.model_validate({"labels": ["a", "b"]})).decode(scores([[1, 2, 3]]))
    (tmp_path / "empty.txt").write_text("\n")
    with pytest.raises(ModelRejected, match="empty"):
        Processor(image_signature(), None, Postprocess.model_validate({"labels": "empty.txt"}), tmp_path)


def test_numbers_are_labels_and_yaml_words_are_explained() -> None:
    assert Postprocess.model_validate({"labels": [0, 1]}).labels == ("0", "1")
    with pytest.raises(ValidationError, match="quotes"):
        Postprocess.model_validate({"labels": [True, False]})
    with pytest.raises(ValidationError, match="empty"):
        Postprocess.model_validate({"labels": []})


def test_what_a_model_does_not_take_says_so() -> None:
    processor = Processor(image_signature())
    with pytest.raises(InvalidRequest, match=r"no preprocess\.image"):
        processor.encode_image(b"")
    with pytest.raises(InvalidRequest, match=r"no preprocess\.text"):
        processor.encode_text(["a"])


def test_bfloat16_rounds_to_nearest_even_and_keeps_nan() -> None:
    values = np.array([1.0, 1.00390625, 1.01171875, np.nan, -np.inf, 3.4e38], np.float32)
    back = to_array(to_tensor("x", "BF16", values))
    assert back[:3].tolist() == [1.0, 1.0, 1.015625]
    assert np.isnan(back[3]) and np.isneginf(back[4]) and np.isposinf(back[5])


def test_the_heavy_libraries_are_loaded_only_when_a_model_needs_them() -> None:
    script = (
        "import sys, app.catalog.processing; "
        "print([name for name in ('PIL', 'tokenizers', 'onnxruntime', 'onnx', 'torch', 'fastapi') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, check=True, timeout=60).stdout.decode().strip() == "[]"
