"""What is written about a version: golden's card, a built version's card, and a proof for one class of host; and their JSON form.

Cards never change once written; proofs lie beside them and are measured again. Knows neither paths nor locks.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final, TypeAlias, TypeVar

from pydantic import TypeAdapter, ValidationError

from app.domain import JSON, RuntimeSettings, Signature, TensorSpec, Verdict
from app.errors import ModelRejected

SCHEMA: Final = 1
MAX_CARD_BYTES: Final = 32 << 20


@dataclass(frozen=True, slots=True)
class CardFile:
    """One file of a version as it was when the card was written."""

    name: str
    bytes: int
    sha256: str


@dataclass(frozen=True, slots=True)
class RowsProof:
    """Whether a row's answer is the same in any company, and how that is known. `stated`: by the owner's word in model.yaml."""

    independent: bool
    reason: str
    stated: bool = False


@dataclass(frozen=True, slots=True)
class GoldenCard:
    """What the user deployed, as Hone first saw it. `sha256` is over all `files`; `seen_at` in unix seconds, for people."""

    model: str
    version: str
    sha256: str
    files: tuple[CardFile, ...]
    signature: Signature
    rows: RowsProof
    kind: str = "onnx"
    seen_at: float = 0.0
    facts: JSON = field(default_factory=dict)
    schema: int = SCHEMA

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Draft:
    """What a job says of a version it built; publishing gives it its name. (`job`, `try_index`) is published once at most.

    `parent` is the version that it was made from, `golden` the deployed one that it is held to; `try_index` counts the job's alternatives.
    """

    job: str
    try_index: int
    golden: str
    golden_sha256: str
    parent: str
    recipe: tuple[JSON, ...]
    signature: Signature
    rows: RowsProof
    why: str = ""
    facts: tuple[JSON, ...] = ()
    kind: str = "onnx"


@dataclass(frozen=True, slots=True)
class BuiltCard:
    """A version that Hone built: its draft, and what was found on disk when it was published."""

    model: str
    version: str
    sha256: str
    files: tuple[CardFile, ...]
    draft: Draft
    built_at: float = 0.0
    schema: int = SCHEMA

    @property
    def bytes(self) -> int:
        return sum(file.bytes for file in self.files)

    @property
    def signature(self) -> Signature:
        return self.draft.signature

    @property
    def rows(self) -> RowsProof:
        return self.draft.rows

    @property
    def kind(self) -> str:
        return self.draft.kind


Card: TypeAlias = GoldenCard | BuiltCard


@dataclass(frozen=True, slots=True)
class Proof:
    """What was measured of one version on one class of host; valid for these very files and this golden only.

    `fidelity`, `latency` and `detail` are the judge's reports as they stand in the timeline; `quietness` is the share of time in which the
    measuring process had its core when it wanted it (1: a quiet host), None where that was not measured.
    """

    host_class: str
    sha256: str
    golden_sha256: str
    verdict: Verdict
    summary: str = ""
    fidelity: JSON = field(default_factory=dict)
    latency: JSON = field(default_factory=dict)
    settings: RuntimeSettings | None = None
    rows: RowsProof | None = None
    quietness: float | None = None
    detail: JSON = field(default_factory=dict)
    measured_at: float = 0.0
    schema: int = SCHEMA

    def settings_over(self, careful: RuntimeSettings) -> RuntimeSettings | None:
        """What it passed with. Of a judgement that it did not pass (a busy host, a failure) `careful` with what makes it compute rightly here: a
        layout that was only measured changes nothing at the next start. None where nothing was found."""
        if self.settings is None or self.verdict is Verdict.PASSED:
            return self.settings
        return replace(careful, graph_level=self.settings.graph_level, session_options=self.settings.session_options)


Fact = TypeVar("Fact", GoldenCard, BuiltCard, Proof)
_adapters: dict[type[Any], TypeAdapter[Any]] = {}


def dump(fact: GoldenCard | BuiltCard | Proof) -> bytes:
    """The JSON of a card or proof, for people too. NaN and infinity become null, numpy's numbers plain ones."""
    return _adapter(type(fact)).dump_json(fact, indent=2, fallback=_plain) + b"\n"


def load(kind: type[Fact], raw: bytes, where: str) -> Fact:
    """Read what `dump` wrote. Raises ModelRejected when it is damaged, or of a newer Hone."""
    try:
        fact: Fact = _adapter(kind).validate_json(raw)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise ModelRejected(f"{where} is damaged: {place + ': ' if place else ''}{first['msg']}") from None
    if fact.schema > SCHEMA:
        raise ModelRejected(f"{where} has schema {fact.schema}, this Hone reads up to {SCHEMA}; it was written by a newer one")
    return fact


def _adapter(kind: type[Any]) -> TypeAdapter[Any]:
    if kind not in _adapters:
        _adapters[kind] = TypeAdapter(kind)
    return _adapters[kind]


def _plain(value: Any) -> Any:
    return value.item() if hasattr(value, "item") else str(value)


def source_json(factory: str, signature: Signature) -> JSON:
    """What optimizers.torch_module.TorchSource reads: how the weights of a PyTorch version are run, by FILE.py:FUNCTION."""
    inputs, outputs = ([[one.name, one.datatype, list(one.shape)] for one in each] for each in (signature.inputs, signature.outputs))
    return {"factory": factory, "inputs": inputs, "outputs": outputs}


def signature_of(report: Mapping[str, Any]) -> Signature:
    """The Signature in an inspection's report."""

    def specs(entries: list[JSON]) -> tuple[TensorSpec, ...]:
        return tuple(TensorSpec(e["name"], e["datatype"], tuple(e["shape"]), bool(e.get("optional", False))) for e in entries)

    rows = report["rows"]
    return Signature(specs(report["inputs"]), specs(report["outputs"]), bool(rows["independent"]), str(rows["reason"]))
