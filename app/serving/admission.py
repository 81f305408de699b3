"""Before a version may be loaded: its files are hashed, its card is read or made, and what is known of it on this class of host is gathered.

Heavy looks (inspecting a file, computing golden's outputs) happen in task children. It loads nothing into the server.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

from app.catalog import durable
from app.catalog.card_facts import signature_of, source_json
from app.catalog.cards import BuiltCard, Card, Cards, GoldenCard, Proof, RowsProof, card_files
from app.catalog.model_config import ModelConfig
from app.catalog.model_files import ModelFile
from app.catalog.processing import Processor
from app.catalog.repository import ONNX_NAME, FoundModel, FoundVersion, Repository
from app.catalog.rows import as_declared, dependent_by_word, rows_by_word, with_rows
from app.catalog.sample_sources import SampleReader
from app.catalog.samples import Reference, References, named_reference, reference_inputs
from app.catalog.state_folder import StateFolder
from app.domain import JSON, ModelState, RuntimeSettings, Signature
from app.errors import HoneError, InsufficientStorage, ModelRejected, NotFound, NotReady
from optimizers.task import Failure, TaskFailed

log = logging.getLogger("hone.serving")
RunTask = Callable[[str, Mapping[str, Any]], Awaitable[dict[str, Any]]]
DEFAULT_BATCH_LIMIT: Final = 16
DEFAULT_QUEUE_LIMIT: Final = 512
KEPT_ROWS: Final = 32
"""So many of the frozen samples stay in memory: a load is checked with them. A thousand images would be half a gigabyte for each loaded version."""
LONE_SPIN_US: Final = 1000
"""Threads of a lone call wait this long for its next step before they sleep: between small steps waking costs more than the step."""


@dataclass(frozen=True)
class Admitted:
    """A version that may be loaded, and how. `proof` is this host class's, if there is one; `check` says what must agree before it serves."""

    model: str
    version: str
    kind: str
    path: Path
    factory: str
    signature: Signature
    sha256: str
    golden_sha256: str
    settings: RuntimeSettings
    card: Card
    proof: Proof | None
    reference: Reference | None
    optimizer: str = ""
    precision: str = ""

    @property
    def is_golden(self) -> bool:
        return isinstance(self.card, GoldenCard)


class Admission:
    """Knows repository, cards and references of this server, and its host class."""

    def __init__(
        self, repository: Repository, state: StateFolder, cards: Cards, host_class: str, cores: int, run_task: RunTask
    ) -> None:  # fmt: skip
        self._repository, self._state, self._cards = repository, state, cards
        self._host_class, self._cores, self._run_task = host_class, cores, run_task

    def served_here(self, model: str) -> bool:
        """Whether the state folder has anything of it, from this life or one before."""
        return self._state.model(model).is_dir()

    async def admit(self, found: FoundModel, want: ModelState, version: str) -> Admitted:
        """Raises ModelRejected, NotFound, NotReady or InsufficientStorage with the reason and remedy."""
        number = next((v for v in found.versions if v.number == version), None)
        if number is not None:
            return await self._golden(found, number)
        if version.isdigit() and found.error and not found.versions:
            raise ModelRejected(found.error)  # it may well be there: nothing of the folder could be read, as with a wrong model.yaml
        if version.isdigit() and await asyncio.to_thread(self._cards.golden, found.name, version) is None:
            raise NotFound(
                f"version {version} of {found.name!r} is not in this server's repository, which has {', '.join(v.number for v in found.versions)}; "
                "where another server deployed it, its files must come here too"
            )
        return await self._built(found, want, version)

    async def processor(self, found: FoundModel, admitted: Admitted) -> Processor:
        config = found.config or ModelConfig()
        return await asyncio.to_thread(
            Processor, admitted.signature, config.preprocess, config.postprocess, found.folder, config.task
        )  # fmt: skip

    async def freeze_reference(self, found: FoundModel, admitted: Admitted) -> Reference:
        """Golden's reference: samples frozen with what golden, unoptimized, answers. Made once, then only read, unless model.yaml names others."""
        references = References(self._state.reference(found.name))
        meta = await asyncio.to_thread(references.meta)
        if meta is not None and meta.golden_sha256 != admitted.golden_sha256:
            await asyncio.to_thread(references.retire)
        known = await asyncio.to_thread(references.load, KEPT_ROWS)
        config = found.config or ModelConfig()
        if known is not None and known.meta.stands_for(config.samples):
            return known
        reader = await self.sample_reader(found, admitted)
        samples = await asyncio.to_thread(reference_inputs, config.samples, reader)
        with durable.temporary_folder(self._state.scratch, 0o700) as folder:
            await asyncio.to_thread(samples.save, folder / "samples.npz")
            outputs = await self._golden_outputs(admitted, folder, samples.stacked)
            if known is not None:
                await asyncio.to_thread(references.retire)
            source = named_reference(config.samples)
            return await asyncio.to_thread(references.freeze, samples, outputs, admitted.golden_sha256, self._host_class, KEPT_ROWS, source)

    async def sample_reader(self, found: FoundModel, admitted: Admitted) -> SampleReader:
        processor = await self.processor(found, admitted)
        facts = admitted.card.facts if isinstance(admitted.card, GoldenCard) else {}
        return SampleReader(
            found.folder, admitted.signature, self._repository.policy, self._state.captured(found.name), processor, self._repository.factories,
            row_shapes=facts.get("row_shapes"), integers=facts.get("integers"),
        )  # fmt: skip

    # ---- golden
    async def _golden(self, found: FoundModel, version: FoundVersion) -> Admitted:
        path = await self._model_file(version)
        sha256 = await asyncio.to_thread(self._repository.sha256, version)
        config = found.config or ModelConfig()
        card = await asyncio.to_thread(self._cards.golden, found.name, version.number)
        if card is None or card.sha256 != sha256:
            card = await self._inspected(found, version, path, sha256, config)
        card = as_declared(card, config)
        rows = rows_by_word(card.rows, card.signature, config)
        proof = await asyncio.to_thread(self._cards.proof, card, sha256, self._host_class)
        reference = await asyncio.to_thread(self._reference, found.name, sha256)
        factory = ""
        if version.kind == "torch":
            file, function = self._repository.factory(config)
            factory = f"{file}:{function}"
        return Admitted(
            found.name, version.number, version.kind, path, factory, with_rows(card.signature, rows), sha256, sha256,
            self._settings(config, rows, card.facts.get("serving") or {}, proof), card, proof, reference,
            precision=str(card.facts.get("quantized") or "") and "int8",
        )  # fmt: skip

    async def _model_file(self, version: FoundVersion) -> Path:
        """The file to open; a packed one is unpacked first, in a task child. Raises ModelRejected, InsufficientStorage or NotAllowed."""
        if version.packed:
            unpacked, packed = self._repository.unpacked, version.files[0]
            if await asyncio.to_thread(unpacked.find, packed) is None:
                with unpacked.room() as folder:
                    result = await self.unpack(packed.path, folder / ONNX_NAME)
                    path = await asyncio.to_thread(unpacked.take, packed, result)
                with contextlib.suppress(HoneError, OSError):
                    await asyncio.to_thread(self._repository.forget_unpacked)
                return path
        return await asyncio.to_thread(self._repository.model_file, version)

    async def _inspected(self, found: FoundModel, version: FoundVersion, path: Path, sha256: str, config: ModelConfig) -> GoldenCard:
        if version.kind == "torch":
            assert config.source is not None
            facts: JSON = {"serving": {}, "factory": config.source.factory}
            signature = config.source.signature()
            rows = RowsProof(False, "rows of a PyTorch model are batched where model.yaml states batching: {rows: independent}")
        else:
            request = {
                "path": str(path),
                "rows": "auto",
                "link_roots": [str(root) for root in (self._repository.root, *self._repository.allowed_roots)],
            }
            facts = await self.inspect(request)
            signature = signature_of(facts)
            rows = RowsProof(bool(facts["rows"]["independent"]), str(facts["rows"]["reason"]), bool(facts["rows"].get("stated", False)))
        files = await asyncio.to_thread(self._card_files, version.files)
        card = GoldenCard(found.name, version.number, sha256, files, signature, rows, version.kind, facts=facts)
        return await asyncio.to_thread(self._cards.write_golden, card)

    async def inspect(self, request: Mapping[str, Any]) -> JSON:
        """The full check of an ONNX file in a task child. Raises ModelRejected or InsufficientStorage."""
        return await self._checked("inspect", request)

    async def unpack(self, packed: Path, out: Path) -> JSON:
        """The model of a packed file, in a task child. Raises ModelRejected or InsufficientStorage."""
        return await self._checked("unpack", {"path": str(packed), "out": str(out)})

    async def _checked(self, kind: str, request: Mapping[str, Any]) -> JSON:
        try:
            return await self._run_task(kind, request)
        except TaskFailed as failure:
            text = failure.text.strip() or failure.kind.value
            if failure.kind is Failure.OUT_OF_MEMORY:
                raise InsufficientStorage(
                    f"there was not enough memory to check the model: {text}; serve a smaller one, or give the server more "
                    "(HONE_JOB_MEMORY_BYTES bounds a check, at most the memory for models)"
                ) from None
            raise ModelRejected(text) from None

    async def _golden_outputs(self, admitted: Admitted, folder: Path, stacked: bool) -> dict[str, Any]:
        from optimizers.samples import read_npz

        request = {
            "path": str(admitted.path),
            "samples": str(folder / "samples.npz"),
            "outputs": str(folder / "outputs.npz"),
            "stacked": stacked,
            "source": source_json(admitted.factory, admitted.signature) if admitted.kind == "torch" else None,
        }
        try:
            found = await self._run_task("golden", request)
        except TaskFailed as failure:
            raise NotReady(f"golden's outputs on the reference samples could not be computed: {failure.text}") from None
        if admitted.kind == "torch" and not found["right"]:
            raise NotReady(f"golden does not answer the reference samples twice alike, so nothing can be held to it: {found['reason']}")
        return await asyncio.to_thread(read_npz, folder / "outputs.npz")

    def _card_files(self, files: tuple[ModelFile, ...]) -> Any:
        return card_files(files, self._repository.hashes)

    def _reference(self, model: str, golden_sha256: str) -> Reference | None:
        """The frozen reference, where it belongs to this golden; a damaged one is told of and not used."""
        try:
            reference = References(self._state.reference(model)).load(KEPT_ROWS)
        except HoneError as error:
            log.warning("model %s: %s", model, error)
            return None
        return reference if reference is not None and reference.meta.golden_sha256 == golden_sha256 else None

    # ---- built versions
    async def _built(self, found: FoundModel, want: ModelState, version: str) -> Admitted:
        card = await asyncio.to_thread(self._cards.card, found.name, version)
        if not isinstance(card, BuiltCard):
            raise NotFound(f"version {version} of {found.name!r} is no longer in the repository")
        if card.draft.golden_sha256 != want.golden_sha256:
            raise ModelRejected(
                f"version {version} of {found.name!r} was built from another golden; build it again: hone optimize {found.name}"
            )
        await asyncio.to_thread(self._cards.verify, card)
        config = found.config or ModelConfig()
        proof = await asyncio.to_thread(self._cards.proof, card, want.golden_sha256, self._host_class)
        reference = await asyncio.to_thread(self._reference, found.name, want.golden_sha256)
        methods = "+".join(str(step.get("method", "")) for step in card.draft.recipe)
        serving = dict(next((fact["serving"] for fact in reversed(card.draft.facts) if "serving" in fact), {}))
        rows = dependent_by_word(config) or card.rows
        return Admitted(
            found.name, version, card.kind, self._cards.path(card), "", with_rows(card.signature, rows), card.sha256,
            want.golden_sha256, self._settings(config, rows, serving, proof), card, proof, reference, methods,
            "int8" if "int8" in methods else "",
        )  # fmt: skip

    # ---- settings
    def _settings(self, config: ModelConfig, rows: RowsProof, serving: JSON, proof: Proof | None) -> RuntimeSettings:
        """What model.yaml fixes, else what it was proven with on this class of host, else careful defaults."""
        given = config.runtime
        careful = self.defaults(config)
        measured = proof.settings_over(careful) if proof is not None else None
        base = measured or careful
        options = tuple(sorted((str(k), str(v)) for k, v in serving.get("session_options", ())))
        settings = replace(
            base,
            intra_op_threads=min(given.threads or base.intra_op_threads, max(1, self._cores)),
            instances=given.instances or base.instances,
            queue_limit=given.queue_limit or base.queue_limit,
            spin_duration_us=base.spin_duration_us if given.spin_us is None else given.spin_us,
            batch_limit=(config.batching.limit or base.batch_limit) if rows.independent else 1,
            lone_threads=self._lone_threads(config, base),
        )
        if serving.get("graph_level") and measured is None:
            settings = replace(settings, graph_level=str(serving["graph_level"]), session_options=options)
        return settings

    def _lone_threads(self, config: ModelConfig, base: RuntimeSettings) -> int:
        given = config.runtime
        if given.lone_threads is not None:
            return min(given.lone_threads, self._cores)
        fixed = given.threads or given.instances or config.limits.memory_mb or config.platform == "torch"
        return 0 if fixed else base.lone_threads

    def defaults(self, config: ModelConfig) -> RuntimeSettings:
        """Before anything was measured here: one core a call, which serves many best, and all cores for a call that is alone."""
        lone = self._cores if self._cores > 1 and config.tune_for != "throughput" else 0
        return RuntimeSettings(
            1, max(1, self._cores), DEFAULT_BATCH_LIMIT, DEFAULT_QUEUE_LIMIT, spin_duration_us=LONE_SPIN_US if lone else 0, lone_threads=lone
        )  # fmt: skip
