"""The `preprocess` and `postprocess` sections of model.yaml: what the friendly door does around a model, as checked data.

Knows nothing of images, tokenizers or signatures; app.catalog.processing holds these sections against what the model really takes.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

MAX_PIXELS_DEFAULT = 25_000_000
MAX_PIXELS_LIMIT = 178_000_000
MAX_SIDE = 16_384

Side = Annotated[int, Field(ge=1, le=MAX_SIDE)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Byte = Annotated[int, Field(ge=0, le=255)]
Sides = Annotated[tuple[Side, Side], Field(strict=False)]
"""Lists of YAML become tuples here; everything else converts nothing (`size: true` is no 1)."""


Label = Annotated[str, Field(min_length=1, max_length=1000)]


class Section(BaseModel):
    """Unknown keys are errors: a typo that is ignored is a model that answers wrongly."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)


class ImagePreprocess(Section):
    """How a PNG or JPEG becomes the model's input. Steps in order: orient (EXIF), colour, resize, crop, divide, mean, std, layout."""

    input: str | None = Field(default=None, description="Input that takes the image; default: the model's only input.")
    size: Side | Sides | None = Field(
        default=None,
        description="[height, width] to resize to, or one number for a square (with `resize: shorter`: the length of the shorter side). "
        "Default: height and width of the model's input.",
    )
    resize: Literal["exact", "shorter", "none"] = Field(
        default="exact",
        description="exact: to `size`, whatever the proportions. shorter: the shorter side to `size`, proportions kept; crop follows. "
        "none: the image must have the right size already, or be larger where `crop` is given.",
    )
    interpolation: Literal["nearest", "box", "bilinear", "bicubic", "lanczos"] = Field(
        default="bilinear", description="Filter for resizing, Pillow's (antialiased when it shrinks)."
    )
    crop: Side | Sides | None = Field(
        default=None,
        description="[height, width] cut from the centre, or one number for a square. Default: the model's size with `shorter`, else no crop.",
    )
    divide_by: Positive | None = Field(
        default=None, description="Pixels (0 to 255) are divided by this first. Default: 255 for floating-point inputs (0..1), 1 for UINT8."
    )
    mean: Finite | Annotated[tuple[Finite, ...], Field(strict=False)] = Field(
        0.0, description="Subtracted after `divide_by`: one number, or one for each channel in `colour` order."
    )
    std: Positive | Annotated[tuple[Positive, ...], Field(strict=False)] = Field(
        1.0, description="Divides after `mean`: one number, or one for each channel in `colour` order."
    )
    layout: Literal["NCHW", "NHWC", "CHW", "HWC", "NHW", "HW"] = Field(
        "NCHW", description="Order of the input's axes; without C only for GRAY."
    )
    colour: Literal["RGB", "BGR", "GRAY"] = Field(default="RGB", description="Channels and their order.")
    background: tuple[Byte, Byte, Byte] = Field(
        strict=False, default=(255, 255, 255), description="[red, green, blue] put behind transparent pixels."
    )
    max_pixels: int = Field(
        default=MAX_PIXELS_DEFAULT,
        ge=1,
        le=MAX_PIXELS_LIMIT,
        description="Larger images are refused by their header, before anything is decoded (413).",
    )

    @model_validator(mode="after")
    def _consistent(self) -> ImagePreprocess:
        channels = 1 if self.colour == "GRAY" else 3
        for key, value in (("mean", self.mean), ("std", self.std)):
            if isinstance(value, tuple) and len(value) not in (1, channels):
                raise ValueError(
                    f"{key} has {len(value)} values; {self.colour} has {channels} channel{'s' * (channels > 1)}: give one or {channels}"
                )
        if "C" not in self.layout and self.colour != "GRAY":
            raise ValueError(f"layout {self.layout} has no channel axis, which only `colour: GRAY` allows")
        if self.resize == "shorter" and isinstance(self.size, tuple) and self.size[0] != self.size[1]:
            raise ValueError(
                f"resize: shorter takes one number as size (the shorter side), not {list(self.size)}; the final form is `crop`"
            )
        return self


class TextInputs(Section):
    """Which model inputs take what the tokenizer makes. Default: found by the usual names; an input that the model lacks is left out."""

    ids: str | None = Field(default=None, description="Token ids; default: input_ids, or the model's only input.")
    mask: str | None = Field(
        default=None, description="Attention mask (1 for tokens, 0 for padding); default: attention_mask or input_mask."
    )
    type_ids: str | None = Field(default=None, description="Segment ids; default: token_type_ids or segment_ids.")


class TextPreprocess(Section):
    """How texts become the model's inputs: by a tokenizer, or as they are for a model that takes strings (BYTES)."""

    tokenizer: str | None = Field(
        default=None,
        description="tokenizer.json of the Hugging Face `tokenizers` library, beside model.yaml. Without it the model's input must be BYTES.",
    )
    inputs: TextInputs = Field(default=TextInputs())
    max_length: int | None = Field(
        default=None,
        ge=1,
        le=1_000_000,
        description="Most tokens of a text. Default: the model's fixed length, what tokenizer.json says, or 512.",
    )
    truncation: bool = Field(default=True, description="Cut texts that are longer than max_length; false refuses them.")
    padding: Literal["longest", "max_length"] = Field(
        default="longest",
        description="Pad to the longest text of the request, or always to max_length. A model with a fixed length is always filled.",
    )
    pad_token: str | None = Field(
        default=None, description="Default: what tokenizer.json says, else [PAD], <pad> or <|endoftext|> where one exists."
    )
    max_texts: int = Field(default=256, ge=1, le=65_536, description="Most texts in one request.")
    max_characters: int = Field(
        1_000_000, ge=1, description="Most characters of all texts of one request, counted before the tokenizer sees them."
    )


class Preprocess(Section):
    """What `POST /models/{model}/predict` takes beside plain tensors."""

    image: ImagePreprocess | None = Field(default=None, description="Present: the model takes PNG and JPEG images.")
    text: TextPreprocess | None = Field(default=None, description="Present: the model takes texts.")


class Postprocess(Section):
    """What `POST /models/{model}/predict` answers: labels with probabilities, or the outputs as they are."""

    kind: Literal["auto", "classification", "plain"] = Field(
        default="auto", description="auto: classification where labels are given or `task` says so, else plain (the outputs as JSON)."
    )
    output: str | None = Field(
        default=None, description="Output with one score for each class; default: the only one, or the first of floating point."
    )
    labels: Annotated[tuple[Label, ...], Field(strict=False)] | Label | None = Field(
        default=None, description="Names of the classes in order, or the name of a text file beside model.yaml with one on each line."
    )
    top_k: int = Field(default=5, ge=1, le=100_000, description="How many classes are answered, the likeliest first.")
    activation: Literal["auto", "softmax", "sigmoid", "none"] = Field(
        default="auto",
        description="auto: softmax, unless the outputs are probabilities already. sigmoid: classes that do not exclude each other.",
    )

    @field_validator("labels", mode="before")
    @classmethod
    def _quoted(cls, value: Any) -> Any:
        if isinstance(value, list):
            for index, label in enumerate(value):
                if isinstance(label, bool) or label is None:
                    raise ValueError(
                        f"label {index} is {label!r}, not text: YAML reads words like yes, no, on, off and null so; put it in quotes"
                    )
            if not value:
                raise ValueError("the list is empty: name the classes, or leave `labels` out")
            return [str(label) if isinstance(label, int | float) else label for label in value]
        return value
