"""An upload before it is a model: its files under their names in a folder of the state, checked as files, gone when nobody holds them."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from app.catalog import durable
from app.catalog.deploy import UPLOAD_HELP, check_file_name, is_plain, listed, sample_files
from app.catalog.model_config import FILE_NAME, ModelConfig, parse_model_config, read_config
from app.catalog.model_files import checked_file, copy_regular, links_within
from app.catalog.model_names import printable
from app.catalog.repository import ONNX_NAME, Repository
from app.catalog.state_folder import StateFolder
from app.errors import ModelRejected

MODEL_SUFFIXES: Final = (".onnx", ".packed", ".safetensors")


@dataclass
class Staged:
    """An upload in the state folder, whole and checked as files. `model` is its model file; discard it when it is deployed or refused."""

    folder: Path
    model: Path
    config: bytes | None
    data_files: tuple[str, ...]
    _held: ExitStack = field(repr=False)

    def discard(self) -> None:
        self._held.close()

    def __enter__(self) -> Staged:
        return self

    def __exit__(self, *_: object) -> None:
        self.discard()


def stage_upload(state: StateFolder, files: Mapping[str, Path], repository: Repository) -> Staged:
    """Move uploaded files (name in the form -> where they lie now) into a folder of their own. Blocks on the disk.

    One .onnx (or .packed, or .safetensors) file, its data files, and model.yaml if there is one. Raises ModelRejected, NotAllowed, InsufficientStorage.
    """
    models = next((found for suffix in MODEL_SUFFIXES if (found := [name for name in files if name.endswith(suffix)])), [])
    if len(models) != 1:
        raise ModelRejected(f"an upload holds one .onnx file, got {len(models)} among {listed(files)}; {UPLOAD_HELP}")
    config = read_config(files[FILE_NAME]) if FILE_NAME in files else None
    parsed = parse_model_config(config, Path(FILE_NAME)) if config is not None else ModelConfig()
    beside = {*parsed.side_files, *sample_files(parsed).values()}
    data_files = tuple(name for name in files if name not in {models[0], FILE_NAME, *beside})
    for name in data_files:
        check_file_name(name, models[0])
    if not is_plain(models[0]):
        raise ModelRejected(f"file {printable(models[0])}: send the model under a plain name, such as {ONNX_NAME}")
    held = ExitStack()
    try:
        with durable.storage_errors("receiving an upload", state.staging):
            folder = held.enter_context(durable.temporary_folder(state.staging, 0o700))
            for name in (name for name in files if name != FILE_NAME and is_plain(name)):
                _take(files[name], folder / name, repository)
    except BaseException:
        held.close()
        raise
    return Staged(folder, folder / models[0], config, data_files, held)


def _take(source: Path, target: Path, repository: Repository) -> None:
    """Move within the file system, else copy."""
    checked_file(source, source.name, links_within(source.parent), repository.limits)
    try:
        source.rename(target)
    except OSError:
        copy_regular(source, target, repository.limits)
