"""The rows of the table: a name and the recipe that is asked for, with a time budget where it trains. What each does is docs/optimizers.md's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Final

PRUNE: Final = "structured-pruning(ratio={ratio},{train},minutes={third}),distill({train},minutes={rest})"
FEATURES: Final = PRUNE.format(ratio=0.3, train="{train}", third="{third}", rest="{rest},features=0.1,attention=1")
"""Golden's features, by adapters, and its attention maps beside its soft answers."""
SEARCH: Final = "architecture-search(strategy={name},trials=8,trial_rows=256,search_minutes={half},{train},minutes={half})"
TRAIN: Final = {
    "cpu": "epochs=100,mirror=true",
    "cuda": "epochs=1000,patience=1000,mirror=true,alpha=0.3,batch=512,optimizer=sgd,rate=0.1,weight_decay=0.0005",
}
"""How a row trains. On cores the clock ends it after one or two passes; on a GPU there are dozens, and no reason to stop before the rate is down."""
SMALL: Final = "epochs=1000,patience=1000,mirror=true,alpha=0,batch=128,optimizer=sgd,rate=0.1,weight_decay=0.0005"
"""A student of a tenth of golden's operations: by labels alone, since golden's answers would take most of the time."""


@dataclass(frozen=True)
class Row:
    """`recipe` as `hone optimize --with` takes it; {minutes}, {half}, {third} and {rest} (two thirds) are shares of the budget, {train} is TRAIN's."""

    name: str
    recipe: str
    trains: bool = False

    def asked(self, minutes: float, device: str = "cpu") -> str:
        shares = {"minutes": minutes, "half": minutes / 2, "third": minutes / 3, "rest": minutes * 2 / 3}
        return self.recipe.format(train=TRAIN[device], **{name: round(value, 2) for name, value in shares.items()})


def _searched(strategy: str) -> Row:
    return Row(f"search-{strategy}", SEARCH.replace("{name}", strategy), trains=True)


def _pruned(ratio: float, after: str = "", suffix: str = "") -> Row:
    return Row(f"pruned-{ratio:.0%}".rstrip("%") + suffix, PRUNE.replace("{ratio}", f"{ratio}") + after, trains=True)


def _split(method: str) -> Row:
    return Row(method, method + "({train},minutes={minutes})", trains=True)


ROWS: Final = {
    row.name: row
    for row in (
        Row("graph", "graph"),
        Row("int8-static", "int8-static"),
        Row("int8-rescued", "int8-static(equalize=true,bias_correction=true)"),
        Row("int8-dynamic", "int8-dynamic"),
        Row("int4-linear", "int4-linear"),
        Row("w8a16", "mixed-precision(form=w8a16)"),
        Row("conv8-linear16", "mixed-precision(form=conv8-linear16)"),
        Row("by-sensitivity", "mixed-precision(form=sensitivity,share=0.2)"),
        Row("by-sensitivity-time", "mixed-precision(form=sensitivity,count=time,share=0.5)"),
        Row("codebook-kmeans", "codebook(bits=4)"),
        Row("codebook-entropy", "codebook(levels=entropy,bits=4)"),
        Row("int8-aware", "int8-aware"),
        Row("low-rank", "low-rank(rank=sensitivity,ratio=0.35)"),
        Row("codebook-perceptual", "codebook(levels=perceptual,bits=3,samples=64)"),
        Row("codebook-trained", "trained-codebook(bits=3,{train},minutes={minutes})", trains=True),
        Row("qat", "qat({train},minutes={minutes})", trains=True),
        _pruned(0.3, ",int8-static", "-int8"),
        Row("pruned-30-qat", "structured-pruning(ratio=0.3,{train},minutes={rest}),qat({train},minutes={third})", trains=True),
        _pruned(0.3),
        _pruned(0.5, ",int8-static", "-int8"),
        Row("pruned-30-features", FEATURES, trains=True),
        Row("pruned-70-int8", f"structured-pruning(ratio=0.7,{SMALL},minutes={{minutes}}),int8-static", trains=True),
        _split("tucker"),
        Row("tucker-int8", "tucker({train},minutes={minutes}),int8-static", trains=True),
        _split("spatial"),
        _split("cp"),
        _split("depthwise"),
        Row("sensitivity-pruning", "sensitivity-pruning(ratio=0.5,{train},minutes={minutes})", trains=True),
        Row("l1-sparsity", "l1-sparsity({train},minutes={minutes})", trains=True),
        Row("l1-weights", "l1-sparsity(on=weights,ratio=0.7,{train},minutes={minutes})", trains=True),
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
