"""A model on disk as the optimizers see it: one ONNX file (with external data beside it, if any) or a PyTorch golden, and how it came to be."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Final

Declared = tuple[str, str, tuple[int, ...]]
"""Name, datatype of the Open Inference Protocol and shape (-1: any size) of one input or output of a module."""
WEIGHTS_SUFFIX: Final = ".safetensors"


@dataclass(frozen=True)
class Source:
    """PyTorch source of a model: `factory` is 'path/to/file.py:function', `weights` a .safetensors file.

    `inputs` and `outputs`, in the order of forward(), where no ONNX file says them.
    """

    factory: str
    weights: Path
    inputs: tuple[Declared, ...] = ()
    outputs: tuple[Declared, ...] = ()


@dataclass(frozen=True)
class Artifact:
    """`path` is the ONNX file, or the .safetensors of a PyTorch golden, which `export` makes one of. `recipe` holds the configs (as JSON) that led from golden to here; `facts` what each step reports."""

    path: Path
    task: str = "generic"
    recipe: tuple[dict[str, Any], ...] = ()
    facts: tuple[dict[str, Any], ...] = ()
    source: Source | None = None
    golden: Path | None = None
    """The golden ONNX file, the reference for quality and the teacher; None means that this is it."""
    extra: dict[str, Any] = field(default_factory=dict)

    @property
    def is_torch(self) -> bool:
        return self.path.suffix == WEIGHTS_SUFFIX

    def derived(self, path: Path, step: dict[str, Any], facts: dict[str, Any], source: Source | None = None) -> Artifact:
        """The artifact one step further: `path` was made from self by `step`."""
        return replace(
            self, path=path, recipe=(*self.recipe, step), facts=(*self.facts, facts), source=source, golden=self.golden or self.path
        )

    def files(self) -> list[Path]:
        """The ONNX file and every regular file that lies beside it as external data (same stem or *.data)."""
        beside = [
            p
            for p in self.path.parent.iterdir()
            if p.is_file()
            and p != self.path
            and (p.suffix in {".data", ".bin", ".weights", ".safetensors"} or p.name.startswith(self.path.name))
        ]
        return [self.path, *sorted(beside)]


def sha256_of(*paths: Path) -> str:
    """One hash over the names and contents of files, in order."""
    total = hashlib.sha256()
    for path in paths:
        digest = hashlib.sha256()
        with path.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
        total.update(f"{path.name}\0{digest.hexdigest()}\n".encode())
    return total.hexdigest()
