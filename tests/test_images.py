"""Images to tensors: real files by Pillow, all their forms, and hostile bytes."""

from __future__ import annotations

import io
import random
import struct
import subprocess
import sys
import warnings
import zlib
from typing import Any

import numpy as np
import pytest
from PIL import Image

from app.catalog.processing import Processor
from app.catalog.tensors import to_array
from app.errors import InvalidRequest, PayloadTooLarge
from tests.pictures import image_processor


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


def keyed_png(depth: int, colour_type: int, row: bytes, key: bytes) -> bytes:
    """A PNG of one row of two pixels that names a see-through grey or colour (tRNS), whatever its depth; Pillow writes few of these."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    head = struct.pack(">IIBBBBB", 2, 1, depth, colour_type, 0, 0, 0)
    parts = [(b"IHDR", head), (b"tRNS", key), (b"IDAT", zlib.compress(b"\0" + row)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(chunk(*part) for part in parts)


@pytest.mark.parametrize(
    ("depth", "colour_type", "row", "key", "second"),
    [
        (1, 0, bytes([0b01000000]), [0], [255] * 3),
        (2, 0, bytes([0b01100000]), [1], [170] * 3),
        (4, 0, bytes([0x5C]), [5], [204] * 3),
        (8, 0, bytes([5, 200]), [5], [200] * 3),
        (16, 0, struct.pack(">2H", 0x0102, 0x0103), [0x0102], [1] * 3),
        (8, 2, bytes([1, 2, 3, 1, 2, 4]), [1, 2, 3], [1, 2, 4]),
        (16, 2, struct.pack(">6H", 0x0201, 0x0302, 0x0403, 0x0201, 0x0302, 0x0404), [0x0201, 0x0302, 0x0403], [2, 3, 4]),
    ],
)
def test_a_see_through_grey_or_colour_is_one_at_every_depth(
    depth: int, colour_type: int, row: bytes, key: list[int], second: list[int]
) -> None:
    """The first pixel is the key, the second differs from it, in the 16-bit ones by their lower byte alone."""
    data = keyed_png(depth, colour_type, row, struct.pack(f">{len(key)}H", *key))
    pixels = encode(image_processor((1, 1, 2, 3), layout="NHWC", divide_by=1, background=[250, 251, 252]), data)
    assert pixels[0, 0].tolist() == [[250, 251, 252], second]


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
