"""The rows of the table: a name and the recipe that is asked for, with a time budget where it trains. What each does is docs/optimizers.md's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PRUNE: Final = "structured-pruning(ratio={ratio},epochs=100,minutes={third}),distill(epochs=100,minutes={rest})"
SEARCH: Final = "architecture-search(strategy={name},trials=8,trial_rows=256,search_minutes={half},epochs=100,minutes={half})"


@dataclass(frozen=True)
class Row:
    """`recipe` as `hone optimize --with` takes it; {minutes}, {half}, {third} and {rest} (two thirds) stand for shares of the budget."""

    name: str
    recipe: str
    trains: bool = False

    def asked(self, minutes: float) -> str:
        shares = {"minutes": minutes, "half": minutes / 2, "third": minutes / 3, "rest": minutes * 2 / 3}
        return self.recipe.format(**{name: round(value, 2) for name, value in shares.items()})


def _searched(strategy: str) -> Row:
    return Row(f"search-{strategy}", SEARCH.replace("{name}", strategy), trains=True)


def _pruned(ratio: float, after: str = "", suffix: str = "") -> Row:
    return Row(f"pruned-{ratio:.0%}".rstrip("%") + suffix, PRUNE.replace("{ratio}", f"{ratio}") + after, trains=True)


def _split(method: str) -> Row:
    return Row(method, method + "(epochs=100,minutes={minutes})", trains=True)


ROWS: Final = {
    row.name: row
    for row in (
        Row("graph", "graph"),
        Row("int8-static", "int8-static"),
        Row("w8a16", "mixed-precision(form=w8a16)"),
        Row("conv8-linear16", "mixed-precision(form=conv8-linear16)"),
        Row("by-sensitivity", "mixed-precision(form=sensitivity,share=0.2)"),
        Row("codebook-kmeans", "codebook(bits=4)"),
        Row("codebook-entropy", "codebook(levels=entropy,bits=4)"),
        Row("int8-aware", "int8-aware"),
        Row("low-rank", "low-rank(energy=0.9)"),
        Row("codebook-perceptual", "codebook(levels=perceptual,bits=3,samples=64)"),
        Row("qat", "qat(epochs=100,minutes={minutes})", trains=True),
        _pruned(0.3, ",int8-static", "-int8"),
        Row("pruned-30-qat", "structured-pruning(ratio=0.3,epochs=100,minutes={rest}),qat(epochs=100,minutes={third})", trains=True),
        _pruned(0.3),
        _pruned(0.5, ",int8-static", "-int8"),
        _split("tucker"),
        _split("spatial"),
        _split("cp"),
        _split("depthwise"),
        Row("sensitivity-pruning", "sensitivity-pruning(ratio=0.5,epochs=100,minutes={minutes})", trains=True),
        Row("l1-sparsity", "l1-sparsity(epochs=100,minutes={minutes})", trains=True),
        _searched("evolution"),
        _searched("reinforcement"),
        _searched("darts"),
    )
}
QUICK: Final = ("graph", "int8-static", "codebook-kmeans")


class UnknownRow(ValueError):
    """The text has the rows that there are."""


def chosen(names: str) -> list[Row]:
    """Rows by comma-separated names, in the table's order; '' for all. Raises UnknownRow."""
    wanted = [name.strip() for name in names.split(",") if name.strip()]
    if unknown := [name for name in wanted if name not in ROWS]:
        raise UnknownRow(f"there is no row {unknown[0]!r}; there are {', '.join(ROWS)}")
    return [row for name, row in ROWS.items() if not wanted or name in wanted]
