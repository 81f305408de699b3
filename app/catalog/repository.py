"""The user's models in Triton's layout: NAME/1/model.onnx, with NAME/model.yaml if there is one. Reads, never opens a model.

One broken model never hides another: what is wrong stands in its `error`. What was deployed is for app.catalog.deploy to write.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Final

from app.catalog.model_config import FILE_NAME, ModelConfig, load_model_config
from app.catalog.model_files import FileHashes, FileLimits, LinkPolicy, ModelFile, links_within, version_files
from app.catalog.model_names import RULE, is_name, printable
from app.catalog.packed import PACKED_NAME, Unpacked
from app.catalog.state_folder import GOLDEN_VERSION
from app.errors import HoneError, ModelRejected, NotAllowed, NotFound, NotReady

ONNX_NAME: Final = "model.onnx"
BEING_WRITTEN_S: Final = 2.0
_IGNORED: Final = frozenset({"lost+found", "__pycache__"})


@dataclass(frozen=True)
class FoundVersion:
    """One numbered folder. `path` is the model file with its links resolved (None: see `error`), `files` it and what lies beside it; `source` is
    the file of a PyTorch model's factory."""

    number: str
    folder: Path
    kind: str = "onnx"
    path: Path | None = None
    files: tuple[ModelFile, ...] = ()
    error: str = ""
    notes: tuple[str, ...] = ()
    source: ModelFile | None = None

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def packed(self) -> bool:
        return bool(self.files) and self.files[0].name == PACKED_NAME


@dataclass(frozen=True)
class FoundModel:
    """One model as it lies there; servable when `error` is empty. `versions` are in ascending order, the last is golden.

    `beside` tells one state of the files that model.yaml names (labels, tokenizer) from another.
    """

    name: str
    folder: Path
    versions: tuple[FoundVersion, ...] = ()
    config: ModelConfig | None = None
    error: str = ""
    notes: tuple[str, ...] = ()
    beside: tuple[object, ...] = ()

    @property
    def golden(self) -> FoundVersion | None:
        return self.versions[-1] if self.versions else None


@dataclass
class Repository:
    """One folder of models. `allowed_roots`: where links may end beside the repository; `factories`: where PyTorch sources may lie.

    `unpack_to`: where packed models are unpacked; without it they are refused.
    """

    root: Path
    allowed_roots: Sequence[Path] = ()
    factories: Sequence[Path] = ()
    unpack_to: Path | None = None
    limits: FileLimits = FileLimits()
    hashes: FileHashes = field(default_factory=FileHashes)
    _configs: dict[Path, tuple[object, ModelConfig]] = field(default_factory=dict, repr=False)

    @property
    def policy(self) -> LinkPolicy:
        return links_within(self.root, *self.allowed_roots)

    def scan(self) -> list[FoundModel]:
        """Every model, by name. Blocks on the disk. Raises NotFound or NotAllowed when the folder itself cannot be read."""
        try:
            names = sorted(os.listdir(self.root))
        except FileNotFoundError:
            raise NotFound(f"the repository {self.root} does not exist; create it, or name another with --repository") from None
        except OSError as error:
            raise NotAllowed(
                f"the repository {self.root} cannot be read: {error.strerror}; name a readable folder with --repository"
            ) from None
        found = (self._entry(name) for name in names if not name.startswith(".") and name not in _IGNORED)
        return [model for model in found if model is not None]

    def find(self, name: str) -> FoundModel:
        """One model. Raises NotFound."""
        model = self._entry(name) if is_name(name) else None
        if model is None:
            raise NotFound(f"no model {printable(name)} in the repository {self.root}")
        return model

    def sha256(self, version: FoundVersion) -> str:
        """Hash over the version's files, and its factory's: other code beside the same weights is another model. Reads only what changed since the
        last time. Raises ModelRejected."""
        if version.error:
            raise ModelRejected(version.error)
        return self.hashes.combined(version.files if version.source is None else (*version.files, version.source))

    @property
    def unpacked(self) -> Unpacked:
        if self.unpack_to is None:
            raise NotAllowed(f"packed models cannot be served from {self.root}: no folder to unpack them to is known")
        return Unpacked(self.unpack_to, self.hashes)

    def model_file(self, version: FoundVersion) -> Path:
        """The file that sessions open. Raises ModelRejected, and NotReady for a packed model that nobody unpacked yet."""
        if version.error or version.path is None:
            raise ModelRejected(version.error or f"{version.folder} holds no model")
        if not version.packed:
            return version.path
        path = self.unpacked.find(version.files[0])
        if path is None:
            raise NotReady(f"{version.path} is not unpacked yet", retry_after_s=2.0)
        return path

    def forget_unpacked(self) -> None:
        """Remove the unpacked copies of packed files that are gone. Blocks on the disk. Raises NotFound, NotAllowed or ModelRejected."""
        versions = (version for model in self.scan() for version in model.versions)
        self.unpacked.keep_only(version.files[0] for version in versions if version.packed and version.files)

    def factory(self, config: ModelConfig) -> tuple[Path, str]:
        """File and function of the model's PyTorch source, in a folder that the operator allowed. Raises ModelRejected or NotAllowed."""
        if config.source is None:
            raise ModelRejected(f"{FILE_NAME} names no source; add source: {{factory: FILE.py:FUNCTION}}")
        return factory_file(config.source.factory, self.factories)

    def _entry(self, name: str) -> FoundModel | None:
        """None for what is no model at all, such as a README."""
        folder = self.root / name
        if not is_name(name):
            return FoundModel(printable(name), folder, error=f"{printable(name)}: {RULE}; rename the folder") if folder.is_dir() else None
        if folder.is_symlink() or folder.is_dir():
            return self._model(name, folder)
        if name.endswith(".onnx"):
            stem = name.removesuffix(".onnx")
            return FoundModel(
                name, folder, error=f"{folder} lies in the repository itself; move it to {self.root / stem / '1' / ONNX_NAME}"
            )
        return None

    def _model(self, name: str, folder: Path) -> FoundModel:
        notes: tuple[str, ...] = ()
        config = None
        try:
            if not self.policy.resolve(folder).is_dir():
                return FoundModel(name, folder, error=f"{folder} is no folder")
            if (folder / "config.pbtxt").exists():
                notes = (f"config.pbtxt is Triton's and is not read; what Hone can be told stands in {FILE_NAME} (docs/model-yaml.md)",)
            config = self._config(folder / FILE_NAME)
            versions = tuple(self._version(folder, number, config) for number in _numbers(folder))
        except (HoneError, OSError) as error:
            return FoundModel(name, folder, config=config, error=_told(error), notes=notes)
        error_text = versions[-1].error if versions else _no_version(folder)
        beside = tuple(_stamp(folder / side) for side in config.side_files)
        return FoundModel(name, folder, versions, config, error_text, notes, beside)

    def _config(self, path: Path) -> ModelConfig:
        """model.yaml, parsed again only when it changed."""
        if not (path.exists() or path.is_symlink()):
            return ModelConfig()
        real = self.policy.resolve(path)
        if not real.is_file():
            raise ModelRejected(f"{path} is no regular file")
        stamp = (real, _stamp(real))
        known = self._configs.get(path)
        if known is not None and known[0] != stamp and _is_being_written(real):
            return known[1]
        if known is None or known[0] != stamp:
            known = (stamp, load_model_config(path))
            self._configs[path] = known
        return known[1]

    def _version(self, model: Path, number: str, config: ModelConfig) -> FoundVersion:
        folder = model / number
        try:
            self.policy.resolve(folder)
            kind, main = _main_file(folder, config)
            source = self._source(config) if kind == "torch" else None
            files = version_files(folder, main, self.policy, self.limits)
        except (HoneError, OSError) as error:
            return FoundVersion(number, folder, error=_told(error))
        if not files[0].bytes:
            return FoundVersion(number, folder, kind, error=f"{folder / main} is empty; was it copied to the end?")
        return FoundVersion(number, folder, kind, files[0].path, files, notes=_scattered(files), source=source)

    def _source(self, config: ModelConfig) -> ModelFile:
        """Named by its file alone: a folder of factories may move."""
        path, _ = self.factory(config)
        return ModelFile(path.name, path, path.stat().st_size)


def factory_file(factory: str, factories: Sequence[Path]) -> tuple[Path, str]:
    """FILE.py:FUNCTION as a path within one of `factories`. Raises NotAllowed or ModelRejected with the remedy."""
    file, _, function = factory.rpartition(":")
    if not factories:
        raise NotAllowed(f"source.factory = {factory!r}: Python sources are switched off; the operator allows folders with HONE_FACTORIES")
    for root in (folder.resolve() for folder in factories):
        candidate = root / file
        if candidate.is_file():
            real = candidate.resolve()
            if not any(real.is_relative_to(allowed.resolve()) for allowed in factories):
                raise NotAllowed(f"source.factory = {factory!r} ends in {real}, outside HONE_FACTORIES ({_listed(factories)})")
            return real, function
    raise ModelRejected(f"source.factory = {factory!r}: no such file in HONE_FACTORIES ({_listed(factories)})")


def _stamp(path: Path) -> tuple[int, ...] | None:
    """What changes when a file does; None where it cannot be seen."""
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _is_being_written(path: Path) -> bool:
    """Whether a file was emptied just now, as editors and shells do before they write it: for all that is known its text is on the way."""
    found = path.stat()
    return not found.st_size and abs(time.time() - found.st_mtime) < BEING_WRITTEN_S


def _numbers(folder: Path) -> list[str]:
    return sorted((name for name in os.listdir(folder) if GOLDEN_VERSION.fullmatch(name) and (folder / name).is_dir()), key=int)


def _main_file(folder: Path, config: ModelConfig) -> tuple[str, str]:
    """Kind and name of the file that is served. Raises ModelRejected with what to put where."""
    onnx = sorted(name for name in os.listdir(folder) if name.endswith(".onnx") and not name.startswith("."))
    weights = config.source.weights if config.source else "model.safetensors"
    has_weights = (folder / weights).exists()
    if config.platform == "torch" or (config.platform == "auto" and not onnx and has_weights):
        if not has_weights:
            raise ModelRejected(f"{folder} holds no {weights}, which platform torch serves")
        if config.source is None:
            raise ModelRejected(f"{folder / weights}: a PyTorch model needs source: {{factory: FILE.py:FUNCTION}} in {FILE_NAME}")
        return "torch", weights
    if ONNX_NAME in onnx or len(onnx) == 1:
        return "onnx", ONNX_NAME if ONNX_NAME in onnx else onnx[0]
    if not onnx and (folder / PACKED_NAME).exists():
        return "onnx", PACKED_NAME
    if onnx:
        raise ModelRejected(f"{folder} holds {len(onnx)} ONNX files ({', '.join(onnx[:4])}); name the one to serve {ONNX_NAME}")
    raise ModelRejected(f"{folder} holds no {ONNX_NAME}; put the model there")


def _no_version(folder: Path) -> str:
    models = sorted(name for name in os.listdir(folder) if name.endswith((".onnx", ".safetensors")))
    if models:
        inside = f"move {models[0]} to {folder / '1' / ONNX_NAME}"
        return f"{folder} holds a model but no version folder; {inside} (if {folder.parent} is itself the model, give its parent as --repository)"
    return f"{folder} holds no version; put the model into {folder / '1' / ONNX_NAME}"


def _scattered(files: Sequence[ModelFile]) -> tuple[str, ...]:
    main = files[0].path.parent
    apart = [file.name for file in files[1:] if file.path != main / file.name]
    if not apart:
        return ()
    return (
        f"{', '.join(apart[:3])} lies elsewhere than the model when links are followed; as external data it is only found after `hone deploy`",
    )


def _told(error: HoneError | OSError) -> str:
    """The error as text that JSON can carry, whatever bytes a file name had."""
    text = f"{error.filename} cannot be read: {error.strerror}" if isinstance(error, OSError) else str(error)
    return text.encode("utf-8", "backslashreplace").decode()


def _listed(folders: Sequence[Path]) -> str:
    return ", ".join(str(folder) for folder in folders)
