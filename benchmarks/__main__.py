"""`make bench`: python -m benchmarks [serving] [swaps] [costs] [--quick] [--model FOLDER] [--samples FILE.npz] [--json FILE] [--docs]

Without names all three run. `--docs` writes what was measured into docs/performance.md.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Final

from benchmarks import costs, machine, models, report, serving, swaps, wrk

PARTS: Final = ("serving", "swaps", "costs")
DOCUMENT: Final = Path(__file__).parent.parent / "docs" / "performance.md"


def main(argv: Sequence[str] | None = None) -> int:
    arguments = _parser().parse_args(argv)
    parts = arguments.parts or list(PARTS)
    if "serving" in parts and not wrk.available():
        print("wrk is not on this machine (Debian: apt-get install wrk): the closed-loop part needs it", file=sys.stderr)
        return 1
    results: dict[str, Any] = {"machine": machine.description()}
    with tempfile.TemporaryDirectory(prefix="hone-bench-") as name:
        folder = Path(name)
        for part in PARTS:
            if part in parts:
                results[part] = _run(part, arguments, folder / part)
    text = report.markdown(results)
    print("\n" + text)
    if arguments.json:
        arguments.json.write_text(json.dumps(results, indent=1))
    if arguments.docs:
        report.write(DOCUMENT, results)
    return 0 if report.sound(results) else 1


def _run(part: str, arguments: argparse.Namespace, folder: Path) -> Any:
    folder.mkdir(parents=True)
    repository = folder / "repository"
    if part == "serving":
        chosen = _models(arguments, repository)
        effort = serving.QUICK if arguments.quick else serving.FULL
        return serving.measure(chosen, repository, folder, replace(effort, rounds=arguments.rounds or effort.rounds), _say)
    if part == "swaps":
        return swaps.measure(repository, folder, arguments.swaps or (50 if arguments.quick else 1000), _say)
    return costs.measure(repository, folder, costs.QUICK if arguments.quick else costs.FULL, _say)


def _models(arguments: argparse.Namespace, repository: Path) -> list[models.BenchModel]:
    """The float model, the same in int8, and the linear one."""
    source: Path = arguments.model or models.DEMO
    name = source.name if source.is_dir() else source.stem
    plain = models.copied(source, repository, name)
    known = {
        "fp32": lambda: plain,
        "int8": lambda: models.quantized(plain, repository, _samples(arguments)),
        "linear": lambda: models.linear(repository),
    }
    return [known[kind]() for kind in arguments.kinds.split(",")]


def _samples(arguments: argparse.Namespace) -> models.Floats | None:
    if arguments.samples is None:
        return None
    from optimizers.samples import Samples

    (values,) = Samples.load(arguments.samples).inputs.values()
    return values[:256].astype("float32")


def _say(text: str) -> None:
    print(text, flush=True)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[[], *PARTS], metavar="PART", help=f"{', '.join(PARTS)}; default: all")
    parser.add_argument("--quick", action="store_true", help="a minute or two instead of an hour; noisy")
    parser.add_argument("--model", type=Path, help="a model's folder in Triton's layout, or an .onnx file (default: the demo's)")
    parser.add_argument("--samples", type=Path, help=".npz to calibrate int8 with (default: made up)")
    parser.add_argument("--kinds", default="fp32,int8,linear", help="which of fp32, int8, linear to serve (all)")
    parser.add_argument("--rounds", type=int, help="turns of each server at each number of connections (7; with --quick 3)")
    parser.add_argument("--swaps", type=int, help="how many swaps (1000; with --quick 50)")
    parser.add_argument("--json", type=Path, help="write all results to this file")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/performance.md")
    return parser


if __name__ == "__main__":
    sys.exit(main())
