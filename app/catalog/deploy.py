"""Puts a model into the repository: what the operator named is copied (links resolved once), checked as files, and appears whole or not at all.

Whether it is a good model is for the task child to say before this runs; which external data it names comes from there too.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final

from app.catalog import durable
from app.catalog.model_config import FILE_NAME, ModelConfig, parse_model_config, read_config
from app.catalog.model_files import LinkPolicy, ModelFile, checked_file, copy_regular, links_within
from app.catalog.model_names import check_name, printable
from app.catalog.packed import PACKED_NAME
from app.catalog.repository import ONNX_NAME, FoundModel, Repository
from app.errors import Conflict, HoneError, ModelRejected, NotFound

UPLOAD_HELP: Final = (
    "send every file in one upload: -F model.onnx=@model.onnx -F model.onnx.data=@model.onnx.data -F model.yaml=@model.yaml"
)
_SIDE: Final = frozenset({".txt", ".json", ".labels", ".names"})
MOST_RACES: Final = 100
_NEVER_DATA: Final = frozenset({".py", ".pyc", ".pyd", ".so", ".sh", ".yaml", ".yml", ".json", ".pbtxt", ".onnx", ".lock"})


@dataclass(frozen=True)
class Plan:
    """What will be copied: `files` into the version's folder (the model first), `beside` and `config` (model.yaml) into the model's."""

    files: tuple[ModelFile, ...]
    config: bytes | None
    beside: tuple[ModelFile, ...] = ()

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in (*self.files, *self.beside))


def deploy(
    repository: Repository,
    source: Path,
    name: str,
    config: bytes | None = None,
    data_files: Sequence[str] = (),
    taken: Sequence[str] = (),
) -> FoundModel:
    """Copy `source` (an .onnx, .packed or .safetensors file, or a folder with one) into NAME/<next version>; blocks on the disk.

    A packed file (.packed) is kept packed. `config` is the text of a model.yaml (None: what lies beside in a source folder, else what the model has). `data_files` are the names of
    external data beside the model file; `taken` versions that may not be used again. Deploying what golden is already changes nothing.
    Raises InvalidRequest, ModelRejected, NotFound, NotAllowed or InsufficientStorage; then nothing was changed.
    """
    check_name(name)
    plan = plan_of(repository, source, name, config, data_files)
    what = f"deploying {name!r}"
    with durable.storage_errors(what, repository.root):
        durable.make_folder(repository.root)
        if same := _already_there(repository, name, plan):
            return same
        durable.require_space(repository.root, plan.bytes, what)
        for _ in range(MOST_RACES):
            try:
                _publish(repository, name, plan, taken)
                return repository.find(name)
            except FileExistsError:
                continue
    raise Conflict(f"{what}: others deploy it all the time; try again")


def remove(repository: Repository, name: str) -> None:
    """Delete a model's folder from the repository. Raises NotFound, NotAllowed."""
    folder = repository.find(name).folder
    with durable.storage_errors(f"removing {name!r}", repository.root):
        durable.discard(folder)


def plan_of(repository: Repository, source: Path, name: str, config: bytes | None, data_files: Sequence[str]) -> Plan:
    """Check everything that can be known before a byte is copied."""
    if source.is_dir():
        if config is None and (source / FILE_NAME).is_file():
            config = read_config(source / FILE_NAME)
        source = _model_in(source)
    parsed = parse_model_config(config, Path(FILE_NAME)) if config is not None else _present_config(repository, name)
    target = _target_name(source, parsed)
    policy = links_within(source.parent, _real(source).parent, *repository.allowed_roots)
    files = [replace(checked_file(_real(source), target, links_within(_real(source).parent), repository.limits), name=target)]
    if not files[0].bytes:
        raise ModelRejected(f"{source} is empty; was it copied or downloaded to the end?")
    for data in sorted(set(data_files)):
        check_file_name(data, target)
        if not (source.parent / data).exists() and not (source.parent / data).is_symlink():
            raise ModelRejected(f"{source.name} keeps weights in {printable(data)}, which is not beside it; {UPLOAD_HELP}")
        files.append(checked_file(source.parent / data, data, policy, repository.limits))
    if len(files) > repository.limits.max_files or sum(file.bytes for file in files) > repository.limits.max_total_bytes:
        raise ModelRejected(f"{source}: {len(files)} files; the model passes the bound of files or bytes")
    if target not in (ONNX_NAME, PACKED_NAME):
        repository.factory(parsed)
    beside = _side_files(repository, source.parent, name, parsed, policy) if config is not None else ()
    return Plan(tuple(files), config, beside)


def _side_files(repository: Repository, source: Path, name: str, config: ModelConfig, policy: LinkPolicy) -> tuple[ModelFile, ...]:
    """What model.yaml names beside itself (labels, tokenizer): from where the model came, else what the model has already. Samples too, if they came."""
    samples = (side for side in sample_files(config).values() if (source / side).exists() or (source / side).is_symlink())
    files = [checked_file(source / side, side, policy, repository.limits) for side in dict.fromkeys(samples)]
    for side in config.side_files:
        if not is_plain(side) or Path(side).suffix.lower() not in _SIDE:
            raise ModelRejected(f"{FILE_NAME} names {printable(side)}; labels and tokenizers are plain .txt or .json files beside it")
        if (source / side).exists() or (source / side).is_symlink():
            files.append(checked_file(source / side, side, policy, repository.limits))
        elif not (repository.root / name / side).exists():
            raise ModelRejected(f"{FILE_NAME} names {side!r}, which is neither beside the model nor deployed already; {UPLOAD_HELP}")
    return tuple(files)


def sample_files(config: ModelConfig) -> dict[str, str]:
    """By key of `samples`, what an upload may bring of them: plain .npz files beside model.yaml. They may come later, too."""
    named = config.samples.model_dump(exclude_none=True)
    return {key: str(name) for key, name in named.items() if is_plain(str(name)) and str(name).endswith(".npz")}


def is_plain(name: str) -> bool:
    """One visible file name, no path."""
    return bool(name) and "/" not in name and "\\" not in name and name.isprintable() and name[0] != "." and len(name.encode()) <= 255


def check_file_name(name: str, model_file: str = "") -> str:
    """`name`, if a file of a model may be called so. Raises ModelRejected with the rule."""
    if not is_plain(name):
        raise ModelRejected(f"file {printable(name)}: only plain names in the model's own folder are taken, no paths, no '..'")
    if name in {model_file, ONNX_NAME} or Path(name).suffix.lower() in _NEVER_DATA:
        raise ModelRejected(f"file {printable(name)}: no data of a model may be called so; save the model with another location")
    return name


def _publish(repository: Repository, name: str, plan: Plan, taken: Sequence[str]) -> None:
    folder = repository.root / name
    if not (folder.exists() or folder.is_symlink()):
        with durable.temporary_folder(repository.root) as whole:
            number = _next(folder, taken)
            (whole / number).mkdir()
            _copy(plan.files, whole / number, repository)
            _copy_beside(plan, whole, repository)
            durable.publish(whole, folder)
        return
    if not folder.is_dir():
        raise ModelRejected(f"{folder} is in the way: it is no folder; remove it, or choose another name")
    real = repository.policy.resolve(folder)
    with durable.temporary_folder(real) as version, durable.temporary_folder(real, 0o700) as aside:
        _copy(plan.files, version, repository)
        _copy_beside(plan, aside, repository)
        durable.publish(version, real / _next(real, taken))
        _bring_out(aside, real)


def _copy_beside(plan: Plan, folder: Path, repository: Repository) -> None:
    _copy(plan.beside, folder, repository)
    if plan.config is not None:
        durable.write_file(folder / FILE_NAME, plan.config)


def _bring_out(aside: Path, folder: Path) -> None:
    """Put model.yaml and what it names in place, model.yaml last; the room for them is taken already."""
    for path in sorted(aside.iterdir(), key=lambda path: path.name == FILE_NAME):
        path.replace(folder / path.name)
    durable.sync_folder(folder)


def _copy(files: Iterable[ModelFile], folder: Path, repository: Repository) -> None:
    for file in files:
        copy_regular(file.path, folder / file.name, repository.limits)


def _next(folder: Path, taken: Sequence[str]) -> str:
    """One more than every number that is or was a version here."""
    names = [path.name for path in folder.iterdir()] if folder.is_dir() else []
    return str(1 + max((int(name) for name in (*names, *taken) if name.isascii() and name.isdigit()), default=0))


def _already_there(repository: Repository, name: str, plan: Plan) -> FoundModel | None:
    """The model as it lies there, if its golden has these very files; a new model.yaml is put beside it."""
    try:
        found = repository.find(name)
        combined, golden = repository.hashes.combined, found.golden
        if golden is None or golden.error or combined(golden.files) != combined(plan.files):
            return None
    except (NotFound, ModelRejected):
        return None
    if plan.config is not None:
        real = repository.policy.resolve(found.folder)
        with durable.temporary_folder(real, 0o700) as aside:
            _copy_beside(plan, aside, repository)
            _bring_out(aside, real)
        found = repository.find(name)
    return replace(
        found, notes=(*found.notes, f"these very files are version {found.versions[-1].number} already; no new version was made")
    )


def _model_in(folder: Path) -> Path:
    """The one model file in a folder (a download, a version's folder). Raises ModelRejected."""
    for suffix, name in ((".onnx", ONNX_NAME), (".packed", PACKED_NAME), (".safetensors", "model.safetensors")):
        found = sorted(path for path in folder.iterdir() if path.suffix == suffix and not path.name.startswith("."))
        named = [path for path in found if path.name == name]
        if named or len(found) == 1:
            return (named or found)[0]
        if found:
            raise ModelRejected(f"{folder} holds {len(found)} {suffix} files ({listed(p.name for p in found)}); name the one to deploy")
    raise ModelRejected(f"{folder} holds no .onnx file; name the model file itself")


def _target_name(source: Path, config: ModelConfig) -> str:
    if source.suffix in (".onnx", ".packed"):
        if config.platform == "torch":
            raise ModelRejected(f"{source.name} is ONNX, but {FILE_NAME} says platform: torch; leave that out, or send .safetensors")
        return ONNX_NAME if source.suffix == ".onnx" else PACKED_NAME
    if source.suffix == ".safetensors":
        if config.source is None:
            raise ModelRejected(f"{source}: a PyTorch model needs a {FILE_NAME} with source: {{factory: FILE.py:FUNCTION}}")
        return config.source.weights
    raise ModelRejected(
        f"{source} is none of .onnx, .packed and .safetensors; export the model to ONNX (torch.onnx.export), or save its weights with safetensors"
    )


def _present_config(repository: Repository, name: str) -> ModelConfig:
    try:
        found = repository.find(name)
    except HoneError:
        return ModelConfig()
    return found.config or ModelConfig()


def _real(source: Path) -> Path:
    try:
        return source.resolve(strict=True)
    except (OSError, RuntimeError):
        raise NotFound(f"{source} does not exist, or is a link that ends nowhere") from None


def listed(names: Iterable[str]) -> str:
    shown = [printable(name) for name in names]
    return ", ".join(shown[:8]) + (", …" if len(shown) > 8 else "")
