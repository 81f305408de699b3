"""The rows as a Markdown table, in docs/optimizers.md between two marks: one table for hosts with VNNI, one for others. It judges nothing."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Final

from benchmarks.report import between, replaced
from benchmarks.report import table as markdown_table
from examples.resnet18_cifar10.records import GOLDEN, Records
from examples.resnet18_cifar10.rows import ROWS

PART: Final = "cifar10"
PART_VNNI: Final = "cifar10-vnni"
ROWS_OF: Final = "Rows"
OTHERS: Final = "Others"
HEAD: Final = ("row", "recipe", "job", "accuracy", "bytes (packed)", "multiply-adds", "× fp32, batch 1", "batch 8", "× eager, batch 1", "batch 8")  # fmt: skip


def write(document: Path, found: Records, part: str = "", rows: Iterable[str] = ROWS) -> None:
    """`part`: '' for the one of the host's class. Lines of rows that are not in `found` stay as they are. Raises ValueError where a mark is missing."""
    text, part = document.read_text(), part or part_of(found)
    document.write_text(replaced(text, part, lambda: _beside(between(text, part), found, list(rows))))


def _beside(old: str, found: Records, rows: list[str]) -> str:
    """The table of `found` with the lines and the origins of what only the `old` one has."""
    about, _, lines = markdown(found, rows).partition("\n\n")
    new = {_row(line): line for line in lines.splitlines()[2:]}
    kept = {
        _row(line): line for line in old.splitlines() if line.startswith("| ") and _row(line) in (GOLDEN, *rows) and _row(line) not in new
    }
    if not kept:
        return f"{about}\n\n{lines}"
    origins = [line for line in old.splitlines() if line and not line.startswith("|") and _still(line, kept)]
    of_all = [f"{OTHERS}: {line}" if not line.startswith((ROWS_OF, OTHERS)) else line for line in origins]
    both = {**kept, **new}
    ordered = [both[name] for name in (GOLDEN, *rows) if name in both]
    return "\n\n".join([f"{ROWS_OF} {', '.join(new)}: {about}", *of_all, "\n".join([*lines.splitlines()[:2], *ordered])])


def _row(line: str) -> str:
    return line.split("|")[1].strip()


def _still(origin: str, kept: Iterable[str]) -> bool:
    """Whether a paragraph tells where a row that stays is from."""
    return not origin.startswith(ROWS_OF) or not set(origin[len(ROWS_OF) :].split(":")[0].strip().split(", ")).isdisjoint(kept)


def part_of(found: Records) -> str:
    """The table of the class of host that measured last."""
    return PART_VNNI if any("vnni" in run["host_class"] for run in found.runs[-1:]) else PART


def markdown(found: Records, rows: Iterable[str] = ROWS) -> str:
    """Golden first, then the rows in their own order; a row that built nothing gives the service's reason instead of figures."""
    lines = [_line(name, found.rows[name], found.rows) for name in (GOLDEN, *rows) if name in found.rows]
    return f"{_about(found)}\n\n{markdown_table(HEAD, lines)}"


def _about(found: Records) -> str:
    if not found.runs:
        return "Nothing was measured yet."
    last = found.runs[-1]
    commands = list(dict.fromkeys(run["command"] for run in found.runs))
    others = [row["measured"]["others"] for row in found.rows.values() if row.get("measured", {}).get("others") is not None]
    load = f"others used {min(others):.0%} to {max(others):.0%} of the cores while rows were measured" if others else "load unknown"
    return (
        f"{last['date']} · {last['cpu']}, {last['cores']} cores · host class `{last['host_class']}` · ONNX Runtime {last['onnxruntime']} · "
        f"{', '.join(f'`{command}`' for command in commands)} · {load}. Times are CPU time of one thread, paired and in turns on one core; "
        "a figure above 1 says how many times faster, with its 95 % interval."
    )


def _line(name: str, row: dict[str, Any], rows: dict[str, dict[str, Any]]) -> list[str]:
    seen = row.get("measured")
    if not seen:
        reason = "built, not measured yet" if row.get("file") else f"{row.get('outcome', '')}: {row.get('text', '')}".replace("|", "/")
        return [name, f"`{row['recipe']}`", _given(row), reason, *[""] * 6]
    golden = rows.get(GOLDEN, {}).get("measured")
    return [
        name, f"`{row['recipe']}`", _given(row), _accuracy(seen, golden), _size(seen), _millions(seen["multiply_adds"]),
        *(_times(seen["faster"].get(key)) for key in ("fp32-1", "fp32-8", "eager-1", "eager-8")),
    ]  # fmt: skip


def _millions(count: int | None) -> str:
    """Operators that the count does not know (4-bit products) have none."""
    return "–" if count is None else f"{count / 1e6:.1f} M"


def _given(row: dict[str, Any]) -> str:
    load = f", others using {row['others']:.0%} of the cores" if row.get("others") is not None else ""
    parts = [row.get("given", ""), f"{row['built_s']:.0f} s{load}" if row.get("built_s") else ""]
    parts += [f"the service's verdict: {row['outcome']}"] if row.get("file") and row.get("outcome") else []
    return "; ".join(part for part in parts if part)


def _accuracy(seen: dict[str, Any], golden: dict[str, Any] | None) -> str:
    share = seen["right"] / seen["images"]
    text = f"{share:.2%}" if seen["images"] == 10_000 else f"{share:.1%} of the first {seen['images']}"
    if golden is None or golden["images"] != seen["images"] or seen["key"] == golden["key"]:
        return text
    return f"{text} ({(share - golden['right'] / golden['images']) * 100:+.2f})"


def _size(seen: dict[str, Any]) -> str:
    return f"{seen['bytes']:,}" + (f" ({seen['packed']:,})" if seen.get("packed") else "")


def _times(ratio: list[float] | None) -> str:
    """Ratios of time, below 1 where faster, as how many times faster."""
    if ratio is None:
        return "–"
    estimate, low, high = inverted(ratio)
    return f"{estimate:.2f} [{low:.2f}, {high:.2f}]"


def inverted(ratio: Sequence[float]) -> tuple[float, float, float]:
    """How many times faster, with its interval, of a ratio of times; infinite where the machine was too loud for a bound."""
    estimate, low, high = (1 / value if value else math.inf for value in ratio)
    return estimate, high, low
