"""What a job needs of one model: its files, samples and settings, gathered from repository, cards and references. Blocks on the disk.

Shared by the worker, which builds, and the keeper, which verifies; decides nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from app.catalog import durable
from app.catalog.card_facts import source_json
from app.catalog.cards import BuiltCard, Card, Cards, GoldenCard
from app.catalog.model_config import ModelConfig
from app.catalog.processing import Processor
from app.catalog.repository import FoundModel, Repository, factory_file
from app.catalog.rows import as_declared, rows_by_word, with_rows
from app.catalog.sample_sources import SampleReader
from app.catalog.samples import Reference, References, SampleSets, Spent, assemble
from app.catalog.state_folder import StateFolder
from app.domain import JSON, ModelState, RuntimeSettings
from app.errors import Conflict, HoneError, ModelRejected, NotFound


@dataclass(frozen=True)
class Workpiece:
    """One model as a job sees it."""

    found: FoundModel
    config: ModelConfig
    golden: GoldenCard
    golden_path: Path
    samples: SampleSets
    frozen: Reference | None = None

    @property
    def quality(self) -> JSON:
        quality = self.config.quality
        return {
            "metric": quality.metric, "floor": quality.floor, "per_class_floor": quality.per_class_floor, "min_samples": quality.min_samples,
        }  # fmt: skip


@dataclass(frozen=True)
class Bench:
    """The files of all models."""

    repository: Repository
    state: StateFolder
    cards: Cards

    def workpiece(
        self, model: str, golden: str, golden_sha256: str, most_train: int = 0, recent: bool = False, trains: bool = False
    ) -> Workpiece:
        """With `most_train` it is for building: so many training samples, and what calibrates or trains is noted, so that it never judges.
        `recent`: captured inputs calibrate beside what the owner named. `trains`: something learns, from captured inputs where none are named.

        Raises Conflict when golden changed or the model is gone, ModelRejected where it may not be used, and what reading samples raises.
        """
        found = self.repository.find(model)
        version = next((v for v in found.versions if v.number == golden), None)
        card = self.cards.golden(model, golden)
        if version is not None and version.error:
            raise ModelRejected(version.error)
        if version is not None and card is None:
            raise Conflict(
                f"this state folder has no card of golden {golden} of {model!r}: either it never loaded (see: hone status {model}), or the worker "
                "works in another state folder than the server (--state, HONE_STATE)"
            )
        if version is None or version.path is None or card is None or card.sha256 != golden_sha256:
            raise Conflict(f"golden {golden} of {model!r} changed or is gone; ask for the job again")
        config = found.config or ModelConfig()
        card = as_declared(card, config)
        signature = with_rows(card.signature, rows_by_word(card.rows, card.signature, config))
        processor = Processor(signature, config.preprocess, config.postprocess, found.folder, config.task)
        reader = SampleReader(
            found.folder, signature, self.repository.policy, self.state.captured(model), processor, self.repository.factories,
            row_shapes=card.facts.get("row_shapes"), integers=card.facts.get("integers"),
        )  # fmt: skip
        reference = References(self.state.reference(model)).load()
        if reference is not None and reference.meta.golden_sha256 != golden_sha256:
            reference = None
        path = self.repository.model_file(version)
        spent = Spent(self.state.spent(model))
        sets = assemble(config.samples, reader, reference, most_train=most_train, spent=spent, recent=recent, trains=trains)
        if most_train:
            spent.add(sets)
        return Workpiece(found, config, card, path, sets, reference)

    def model_path(self, piece: Workpiece, version: str) -> Path:
        """The model file of golden, of an earlier golden that is there, or of a built version. Raises NotFound, or what `Repository.model_file` does."""
        if version == piece.golden.version:
            return piece.golden_path
        deployed = next((one for one in piece.found.versions if one.number == version), None)
        if deployed is not None:
            return self.repository.model_file(deployed)
        card = self.cards.card(piece.found.name, version)
        if not isinstance(card, BuiltCard):
            raise NotFound(f"version {version} of {piece.found.name!r} is no longer in the repository")
        path = self.cards.path(card)
        if not path.is_file():
            raise NotFound(f"version {version} of {piece.found.name!r} was removed; its weights are gone")
        return path

    def torch_source(self, piece: Workpiece, version: str, as_deployed: bool = False) -> JSON:
        """What the weights of a PyTorch version need beside them to be run. `as_deployed`: by the factory that it first came with, where that
        is still there; model.yaml may name another one for what was deployed since.

        Raises NotAllowed or ModelRejected where its factory lies in no folder that the operator allowed, NotFound without a card.
        """
        card = piece.golden if version == piece.golden.version else self.cards.card(piece.found.name, version)
        first = str(card.facts.get("factory") or "") if as_deployed and isinstance(card, GoldenCard) else ""
        file, function = self._factory(piece.config, first)
        return source_json(f"{file}:{function}", card.signature)

    def _factory(self, config: ModelConfig, first: str) -> tuple[Path, str]:
        if first:
            with suppress(HoneError):
                return factory_file(first, self.repository.factories)
        return self.repository.factory(config)

    def card(self, piece: Workpiece, version: str) -> Card:
        return piece.golden if version == piece.golden.version else self.cards.card(piece.found.name, version)

    def settings(self, piece: Workpiece, want: ModelState, version: str, host_class: str, fallback: RuntimeSettings) -> RuntimeSettings:
        """What a version runs with here: what was decided, else proven, else the fallback (with the graph level that inspection found)."""
        given = want.settings_of(version)
        if given is not None:
            return given
        card = self.card(piece, version)
        proof = self.cards.proof(card, want.golden_sha256, host_class)
        careful = fallback if card.kind == "onnx" else _unmeasured(piece.config, fallback)
        return (proof.settings_over(careful) if proof is not None else None) or careful

    @contextmanager
    def scratch(self) -> Iterator[Path]:
        """A folder for one job's files, gone at the end; swept at the next start if this process is killed."""
        self.state.scratch.mkdir(parents=True, exist_ok=True)
        with durable.temporary_folder(self.state.scratch, 0o700) as folder:
            yield folder


def _unmeasured(config: ModelConfig, fallback: RuntimeSettings) -> RuntimeSettings:
    """How a PyTorch version is served where nothing was decided: a core for each call, but for what model.yaml fixes."""
    given, cores = config.runtime, max(fallback.intra_op_threads, fallback.instances)
    return replace(
        fallback,
        intra_op_threads=min(given.threads or 1, cores),
        instances=given.instances or cores,
        batch_limit=config.batching.limit or fallback.batch_limit,
    )


def settings_json(settings: RuntimeSettings) -> JSON:
    return asdict(settings)


def report_of(error: HoneError) -> JSON:
    return {"error": str(error)}
