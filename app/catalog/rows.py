"""The owner's word in model.yaml beside what a card says: whether requests may share a call of a version, and what a PyTorch model takes. Pure."""

from __future__ import annotations

from dataclasses import replace

from app.catalog.card_facts import GoldenCard, RowsProof
from app.catalog.model_config import ModelConfig
from app.domain import Signature


def with_rows(signature: Signature, rows: RowsProof) -> Signature:
    return replace(signature, batchable=rows.independent, rows_reason=rows.reason)


def as_declared(card: GoldenCard, config: ModelConfig) -> GoldenCard:
    """A PyTorch model takes and gives what model.yaml says now, which may change beside the same weights. Raises ModelRejected."""
    if card.kind != "torch" or config.source is None:
        return card
    return replace(card, signature=config.source.signature())


def dependent_by_word(config: ModelConfig) -> RowsProof | None:
    """The one word about rows that holds for what was built from golden, too: what was built may depend where golden does not."""
    if config.batching.rows != "dependent":
        return None
    return RowsProof(False, "stated by the owner in model.yaml (rows: dependent)", True)


def rows_by_word(proven: RowsProof, signature: Signature, config: ModelConfig) -> RowsProof:
    """The owner's word in model.yaml wins over what was measured, but not over shapes that cannot be joined."""
    stated = config.batching.rows
    if stated == "auto":
        return proven
    if dependent := dependent_by_word(config):
        return dependent
    if not all(spec.shape and spec.shape[0] == -1 for spec in (*signature.inputs, *signature.outputs)):
        return proven
    return RowsProof(True, "stated by the owner in model.yaml (rows: independent)", True)
