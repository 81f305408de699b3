"""What a person typed or keeps in files, as what a server takes: recipes, settings, request bodies, the files of a model.

Raises ClientError with what was expected. Knows neither server nor terminal.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from app.client import ClientError

MEDIA_TYPES: Final = {
    ".png": "image/png",
    ".jpg": "image/jpeg",
    ".jpeg": "image/jpeg",
    ".txt": "text/plain; charset=utf-8",
    ".json": "application/json",
}
UNKNOWN: Final = "application/octet-stream"
"""The server looks at the first bytes."""


def named(text: str) -> tuple[str, str]:
    """MODEL[:VERSION] as two texts. A colon without a version is none: `remove digits:$UNSET` must not remove the model."""
    model, colon, version = text.partition(":")
    if not model or (colon and not version):
        raise ClientError(f"{text!r}: expected MODEL or MODEL:VERSION, such as digits or digits:1.2")
    return model, version


def settings_of(changes: Sequence[str]) -> dict[str, int]:
    """NAME=VALUE pairs with whole numbers."""
    found: dict[str, int] = {}
    for change in changes:
        name, _, value = change.partition("=")
        try:
            found[name] = int(value)
        except ValueError:
            raise ClientError(f"{change!r}: expected NAME=VALUE with a whole number, such as batch_limit=16") from None
    return found


def steps_of(text: str) -> list[Any]:
    """`a,b(option=1,other=x,list=[y,z])` as steps: names, or objects with `method` and options. Raises ClientError."""
    steps: list[Any] = []
    rest = text.strip()
    while rest:
        name, bracket, after = _up_to(rest, "(,")
        if not name.strip():
            raise ClientError(f"{text!r}: expected names of methods with commas between them, such as graph,int8-static")
        if bracket != "(":
            steps.append(name.strip())
            rest = after.strip()
            continue
        step: dict[str, Any] = {"method": name.strip()}
        while bracket != ")":
            part, bracket, after = _up_to(after, ",)")
            if not bracket:
                raise ClientError(f"{text!r}: the bracket after {name.strip()} is not closed")
            step |= dict([_option(text, part)] if part.strip() else [])
        steps.append(step)
        rest = after.strip().removeprefix(",").strip()
    if not steps:
        raise ClientError("a recipe needs at least one method, such as int8-static")
    return steps


def _up_to(text: str, stops: str) -> tuple[str, str, str]:
    """What comes before the first of `stops` that stands in no list and in no quotes, that letter, and the rest."""
    depth, quoted = 0, False
    for at, letter in enumerate(text):
        quoted ^= letter == '"'
        if not quoted and not depth and letter in stops:
            return text[:at], letter, text[at + 1 :]
        depth += 0 if quoted else (letter in "[{") - (letter in "]}")
    return text, "", ""


def _option(text: str, part: str) -> tuple[str, Any]:
    name, equals, value = part.partition("=")
    if not equals:
        raise ClientError(f"{text!r}: {part.strip()!r} is no option; expected name=value")
    value = value.strip()
    try:
        return name.strip(), json.loads(value)
    except ValueError:
        words = value.startswith("[") and value.endswith("]")
        return name.strip(), [word.strip() for word in value[1:-1].split(",")] if words else value


def request_body(file: str) -> tuple[bytes, str]:
    """A file's content, or stdin's for `-`, and its media type."""
    if file == "-":
        body = sys.stdin.buffer.read()
        return body, "application/json" if body.lstrip()[:1] in (b"{", b"[") else UNKNOWN
    path = Path(file)
    return path.read_bytes(), MEDIA_TYPES.get(path.suffix.lower(), UNKNOWN)


def is_protocol(body: bytes) -> bool:
    """Whether JSON is a request of the Open Inference Protocol, not of the friendly door."""
    try:
        document = json.loads(body)
    except ValueError:
        return False
    return isinstance(document, dict) and isinstance(document.get("inputs"), list)


def files_to_deploy(path: Path, name: str | None, config: str | None) -> tuple[str, dict[str, Path]]:
    """Name and files to upload, by the names that the server shall see. Raises ClientError with what is expected where."""
    for flag, text in (("--name", name), ("--config", config)):
        if text == "":
            raise ClientError(f"{flag} is empty; leave it out, or say what was meant")
    if not path.exists():
        raise ClientError(f"{path} does not exist; give an .onnx file, or a folder with 1/model.onnx")
    if not (path.is_file() or path.is_dir()):
        raise ClientError(f"{path} is neither a file nor a folder; give an .onnx file, or a folder with 1/model.onnx")
    model, found_config = (path, None) if path.is_file() else _model_in(path)
    if model.suffix == ".packed":
        files = {"model.onnx.packed": model}
    elif model.suffix == ".onnx":
        files = {"model.onnx": model} | {data: model.parent / data for data in _external_data(model)}
    else:
        raise ClientError(
            f"{model} is no .onnx file, nor packed (hone pack); models of other kinds are put into the server's repository folder"
        )
    yaml = Path(config) if config else found_config
    if yaml:
        files["model.yaml"] = yaml
        files |= {side: yaml.parent / side for side in _side_files(yaml)}
    for shown, file in files.items():
        if not file.is_file():
            raise ClientError(f"{file} does not exist; it is the {shown} of this model")
    return name or (path.resolve().name if path.is_dir() else Path(path.name.removesuffix(".packed")).stem), files


def _model_in(folder: Path) -> tuple[Path, Path | None]:
    numbers = sorted((int(sub.name) for sub in folder.iterdir() if sub.is_dir() and sub.name.isdigit()), reverse=True)
    places = [*(folder / str(number) for number in numbers), folder]
    candidates = [place / name for place in places for name in ("model.onnx", "model.onnx.packed")]
    model = next((candidate for candidate in candidates if candidate.is_file()), None)
    if model is None:
        torch = next((file for place in places for file in sorted(place.glob("*.safetensors"))), None)
        other = f"; {torch} is a PyTorch model's: such a folder is put into the server's repository folder" if torch else ""
        raise ClientError(f"{folder} holds no model: expected {folder / '1' / 'model.onnx'}{other}")
    config = folder / "model.yaml"
    return model, config if config.is_file() else None


def _side_files(yaml: Path) -> tuple[str, ...]:
    """Labels and tokenizer that model.yaml names, and of its samples what lies beside it."""
    from app.catalog.deploy import sample_files
    from app.catalog.model_config import load_model_config
    from app.errors import ModelRejected

    try:
        config = load_model_config(yaml)
        return (*config.side_files, *(side for side in sample_files(config).values() if (yaml.parent / side).is_file()))
    except ModelRejected as error:
        raise ClientError(str(error)) from None


def _external_data(model: Path) -> list[str]:
    """Names of the data files that the model refers to, so that none is left behind."""
    import onnx
    from google.protobuf.message import DecodeError  # type: ignore[import-untyped]
    from onnx.external_data_helper import uses_external_data

    from optimizers.onnx_file import tensors

    try:
        proto = onnx.load(model, load_external_data=False)
    except DecodeError:
        return []  # the server says what is wrong with it
    entries = [entry for tensor in tensors(proto) if uses_external_data(tensor) for entry in tensor.external_data]
    return sorted({entry.value for entry in entries if entry.key == "location"})
