"""A PNG or JPEG file becomes the tensor that a model takes, as `preprocess.image` says. Blocking: call it off the event loop.

Hostile files are the rule to plan for: what a header promises is checked before anything is decoded. Knows nothing of HTTP or labels.
"""

from __future__ import annotations

import io
import struct
import zlib
from typing import TYPE_CHECKING, Final

import numpy as np

from app.catalog.sections import ImagePreprocess
from app.catalog.tensors import FLOATS, Array, to_tensor
from app.domain import Tensor, TensorSpec
from app.errors import InvalidRequest, ModelRejected, PayloadTooLarge

if TYPE_CHECKING:
    from PIL import Image

MAX_JPEG_SCANS: Final = 100
"""A progressive JPEG has about ten scans; each costs a pass over the whole image, so a small file with thousands holds a core for minutes."""
DECODE_ERRORS: Final = (OSError, SyntaxError, ValueError, EOFError, IndexError, KeyError, TypeError, struct.error, zlib.error)
"""What Pillow's readers raise on broken files."""
ORIENTATION_TAG: Final = 0x0112
KEY_SCALES: Final = {"L;2": (3, 85), "L;4": (15, 17)}
"""Two and four bits of grey, and by what they are stretched to eight."""


def image_format(data: bytes | memoryview) -> str:
    """PNG or JPEG by the first bytes, else an empty string."""
    head = bytes(data[:8])
    return "PNG" if head == b"\x89PNG\r\n\x1a\n" else "JPEG" if head[:3] == b"\xff\xd8\xff" else ""


class ImageEncoder:
    """`preprocess.image` held against one input of the model; raises ModelRejected where they do not agree."""

    def __init__(self, config: ImagePreprocess, spec: TensorSpec) -> None:
        self.config, self.spec = config, spec
        self.channels = 1 if config.colour == "GRAY" else 3
        if len(spec.shape) != len(config.layout):
            raise ModelRejected(
                f"preprocess.image.layout is {config.layout} but input {spec.name!r} has shape {list(spec.shape)}: they need the same number of axes"
            )
        axes = dict(zip(config.layout, spec.shape, strict=True))
        if axes.get("N", 1) not in (-1, 1):
            raise ModelRejected(
                f"input {spec.name!r} takes {axes['N']} images at once (shape {list(spec.shape)}); preprocess.image makes one"
            )
        if axes.get("C", self.channels) not in (-1, self.channels):
            raise ModelRejected(
                f"preprocess.image.colour {config.colour} makes {self.channels} channels but input {spec.name!r} wants {axes['C']}, "
                f"shape {list(spec.shape)} in layout {config.layout}"
            )
        self.size, self.crop, self.final = self._geometry(axes["H"], axes["W"])
        self.divide_by = config.divide_by or (255.0 if spec.datatype in FLOATS else 1.0)
        if spec.datatype not in FLOATS and (spec.datatype != "UINT8" or (self.divide_by, config.mean, config.std) != (1.0, 0.0, 1.0)):
            raise ModelRejected(
                f"input {spec.name!r} is {spec.datatype}: preprocess.image fills floating-point inputs, or UINT8 without divide_by, mean and std"
            )
        self.mean, self.std = np.asarray(config.mean, np.float32), np.asarray(config.std, np.float32)

    def _geometry(self, height: int, width: int) -> tuple[tuple[int, int] | None, tuple[int, int] | None, tuple[int, int]]:
        """(resize to, crop to, what comes out), each (height, width); -1 is free."""
        config, model = self.config, (height, width)
        size, crop = _pair(config.size), _pair(config.crop)
        if config.resize == "shorter":
            if size is None:
                raise ModelRejected(
                    "preprocess.image.resize is shorter, which needs `size`: the length of the shorter side, for example 256"
                )
            crop = crop or (model if -1 not in model else None)
            if crop and max(crop) > size[0]:
                raise ModelRejected(f"preprocess.image.crop {list(crop)} is larger than the shorter side after resizing, {size[0]}")
        elif config.resize == "exact":
            size = size or (model if -1 not in model and crop is None else None)
            if size is None:
                raise ModelRejected(
                    f"preprocess.image needs `size`: input {self.spec.name!r} has no fixed height and width to resize to (or set `resize: none`)"
                )
            if crop and (crop[0] > size[0] or crop[1] > size[1]):
                raise ModelRejected(f"preprocess.image.crop {list(crop)} is larger than size {list(size)}")
        elif size is not None:
            raise ModelRejected("preprocess.image has a `size` but `resize: none`: leave one of them out")
        final = crop or (size if config.resize == "exact" and size else model)
        for made, wanted in zip(final, model, strict=True):
            if wanted not in (-1, made):
                raise ModelRejected(
                    f"preprocess.image makes images of {list(final)} but input {self.spec.name!r} wants {list(model)} (height, width)"
                )
        return size, crop, final

    def encode(self, data: bytes | memoryview) -> Tensor:
        """Raises InvalidRequest for anything that is no whole PNG or JPEG picture, PayloadTooLarge for one of too many pixels."""
        return self._to_tensor(self._read(data))

    def _read(self, data: bytes | memoryview) -> Image.Image:
        from PIL import Image

        kind = image_format(data)
        if not kind:
            raise InvalidRequest(f"the body is neither PNG nor JPEG (it begins with {bytes(data[:8])!r}); send one of these")
        scans = bytes(data).count(b"\xff\xda") if kind == "JPEG" else 0
        if scans > MAX_JPEG_SCANS:
            raise InvalidRequest(f"the JPEG has {scans} scans, more than {MAX_JPEG_SCANS}; save it as a baseline JPEG or PNG")
        try:
            with Image.open(io.BytesIO(data), formats=(kind,)) as image:
                self._check_pixels(image.size)
                if kind == "PNG" and getattr(image, "is_animated", False):
                    raise InvalidRequest("the PNG is animated; send a single picture")
                packing = str(image.tile[0].args) if image.tile else ""
                turn = _turn(image)
                image.load()
                opaque = self._colour(_with_key_as_alpha(image, packing, data))
                return self._shape(opaque if turn is None else opaque.transpose(turn))
        except (Image.DecompressionBombError, Image.DecompressionBombWarning) as e:
            raise PayloadTooLarge(f"the image is too large: {e}; the limit is {self.config.max_pixels:,} pixels") from None
        except DECODE_ERRORS as e:
            raise InvalidRequest(f"the {kind} cannot be decoded, it is damaged or cut off: {e or type(e).__name__}") from None

    def _check_pixels(self, size: tuple[int, int]) -> None:
        width, height = size
        if width * height > self.config.max_pixels:
            raise PayloadTooLarge(
                f"the image has {width} × {height} = {width * height:,} pixels; the limit is {self.config.max_pixels:,} "
                "(preprocess.image.max_pixels in model.yaml)"
            )

    def _colour(self, image: Image.Image) -> Image.Image:
        """In the colours that the model takes, before anything is interpolated, as training pipelines do it."""
        from PIL import Image

        image = _eight_bits(image)
        if image.mode in ("P", "PA", "LA", "La", "RGBA", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            behind = Image.new("RGB", image.size, self.config.background)
            behind.paste(image, mask=image)
            image = behind
        return image.convert("L" if self.config.colour == "GRAY" else "RGB")

    def _shape(self, image: Image.Image) -> Image.Image:
        """Resized and cropped."""
        from PIL import Image

        if self.size is not None:
            width, height = image.size
            target = self.size
            if self.config.resize == "shorter":
                side, shorter = self.size[0], min(width, height)
                target = (max(side, height * side // shorter), max(side, width * side // shorter))
            self._check_pixels((target[1], target[0]))
            if (height, width) != target:
                image = image.resize((target[1], target[0]), Image.Resampling[self.config.interpolation.upper()])
        if self.crop is None:
            return image
        width, height = image.size
        if height < self.crop[0] or width < self.crop[1]:
            raise InvalidRequest(
                f"the image is {height} × {width} (height × width), too small to cut {self.crop[0]} × {self.crop[1]} from it"
            )
        top, left = round((height - self.crop[0]) / 2), round((width - self.crop[1]) / 2)
        return image.crop((left, top, left + self.crop[1], top + self.crop[0]))

    def _to_tensor(self, image: Image.Image) -> Tensor:
        pixels: Array = np.asarray(image)
        height, width = pixels.shape[:2]
        for made, wanted in zip((height, width), self.final, strict=True):
            if wanted not in (-1, made):
                raise InvalidRequest(
                    f"the image is {height} × {width} (height × width) but the model takes {self.final[0]} × {self.final[1]}, and model.yaml says `resize: none`"
                )
        pixels = pixels.reshape(height, width, self.channels)
        if self.config.colour == "BGR":
            pixels = pixels[:, :, ::-1]
        if self.spec.datatype in FLOATS:
            pixels = self._normalized(pixels)
        if "C" not in self.config.layout:
            pixels = pixels[:, :, 0]
        elif self.config.layout.endswith("CHW"):
            pixels = pixels.transpose(2, 0, 1)
        if self.config.layout.startswith("N"):
            pixels = pixels[np.newaxis]
        return to_tensor(self.spec.name, self.spec.datatype, pixels)

    def _normalized(self, pixels: Array) -> Array:
        """(pixels / divide_by - mean) / std in float32, in place, steps that change nothing left out."""
        values: Array = pixels.astype(np.float32)
        if self.divide_by != 1:
            values /= np.float32(self.divide_by)
        if self.mean.any():
            values -= self.mean
        if (self.std != 1).any():
            values /= self.std
        return values


def _pair(value: int | tuple[int, int] | None) -> tuple[int, int] | None:
    return (value, value) if isinstance(value, int) else value


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey by its upper byte, as Pillow does for 16-bit colour (its conversion of grey would clip to white)."""
    from PIL import Image

    if image.mode != "I;16":
        return image
    return Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))


def _with_key_as_alpha(image: Image.Image, packing: str, data: bytes | memoryview) -> Image.Image:
    """A PNG may name one grey or colour as see-through, at its own depth; Pillow holds that against samples scaled or cut to eight bits.

    `packing` is how the file holds its samples, in Pillow's words ("L;4": four bits of grey), which it forgets once they are loaded.
    """
    from PIL import Image

    key = image.info.get("transparency")
    if key is None or (packing not in KEY_SCALES and packing not in ("I;16B", "RGB;16B")):
        return image
    if packing in KEY_SCALES:
        bits, scale = KEY_SCALES[packing]
        image.info["transparency"] = (key & bits) * scale
        return image
    samples: Array = np.asarray(image)
    if packing == "I;16B":
        hidden = samples == key
    else:
        wanted = np.asarray(key, np.uint16)
        hidden = (samples == wanted >> 8).all(-1) & (_low_bytes(data) == wanted & 255).all(-1)
    del image.info["transparency"]
    image = _eight_bits(image)
    image.putalpha(Image.fromarray(np.where(hidden, np.uint8(0), np.uint8(255))))
    return image


def _low_bytes(data: bytes | memoryview) -> Array:
    """Of the 16-bit samples of an RGB PNG, whose upper bytes are all that Pillow keeps; the other byte order's reader takes these."""
    from PIL import Image

    with Image.open(io.BytesIO(data), formats=("PNG",)) as image:
        image.tile = [image.tile[0]._replace(args="RGB;16L")]
        return np.asarray(image)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """What the camera's EXIF tag asks for; a tag that cannot be read asks for nothing."""
    from PIL import Image

    try:
        orientation = image.getexif().get(ORIENTATION_TAG)
    except DECODE_ERRORS:
        return None
    return {
        2: Image.Transpose.FLIP_LEFT_RIGHT,
        3: Image.Transpose.ROTATE_180,
        4: Image.Transpose.FLIP_TOP_BOTTOM,
        5: Image.Transpose.TRANSPOSE,
        6: Image.Transpose.ROTATE_270,
        7: Image.Transpose.TRANSVERSE,
        8: Image.Transpose.ROTATE_90,
    }.get(orientation or 1)
