"""One shape for every method: `optimize(artifact, config, samples, budget) -> Artifact`. The config's type selects the method.

To add a method, write a frozen dataclass that derives from Config and a function under @method(ThatConfig); nothing else lists it.
"""

from __future__ import annotations

import dataclasses
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, ClassVar, Final

from optimizers.artifact import Artifact
from optimizers.samples import Samples

DEVICES: Final = ("auto", "cpu", "cuda")


class NotApplicable(Exception):
    """The method does not apply to this model here; the text says why, naming the node or module where there is one."""


class Cancelled(Exception):
    """The budget said stop: cancelled by a person, or out of time."""


class Rejected(Exception):
    """A model file was checked and refused; the text names the file or node, the rule and the remedy."""


class Need(StrEnum):
    """What a method needs. PYTORCH alone says that it starts from no ONNX file."""

    ONNX = "ONNX file"
    SOURCE = "PyTorch source"
    CALIBRATION = "calibration inputs"
    UNLABELLED = "unlabelled inputs"
    LABELLED = "labelled training data"
    TRAINING = "inputs to train on (labelled or not)"
    HERE = "the host that serves"
    PYTORCH = "PyTorch golden"


class Gain(StrEnum):
    """What a method can give."""

    SMALLER = "smaller file"
    FEWER_OPERATIONS = "fewer operations"
    FASTER = "faster on this host"
    LESS_MEMORY = "less memory while it serves"


@dataclass(frozen=True)
class Outlook:
    """What a method brings and costs by rule of thumb, for a planner that has measured nothing yet: times as fast, CPU seconds with its proof.

    `int8`: it computes with bytes, which gains twice as much where the host has faster products of bytes than of floats.
    """

    gain: float = 1.0
    cpu_s: float = 600.0
    int8: bool = False


@dataclass(frozen=True)
class Config:
    """Base of all method configs. Values must be JSON-able; equal configs are equal recipes."""

    method: ClassVar[str] = ""
    summary: ClassVar[str] = ""
    needs: ClassVar[frozenset[Need]] = frozenset({Need.ONNX})
    gives: ClassVar[frozenset[Gain]] = frozenset()
    lossless: ClassVar[bool] = False
    outlook: ClassVar[Outlook] = Outlook()
    then: ClassVar[tuple[str, ...]] = ()
    """Methods that a planner lets follow on what this one gives."""
    extra: ClassVar[str] = ""
    """Name of the pip extra the method needs ('optimize' for torch), or ''."""
    search: ClassVar[Mapping[str, tuple[Any, ...]]] = {}
    """Field to the values that a search over this method may try."""

    def to_json(self) -> dict[str, Any]:
        return {"method": self.method, **dataclasses.asdict(self)}


@dataclass(frozen=True)
class Progress:
    """Where a long job is: shares are 0..1."""

    method: str
    step: str
    share: float
    detail: dict[str, Any] = field(default_factory=dict)


@dataclass
class Budget:
    """Bounds and the two-way line of a running job: call `tick` often, in every loop."""

    seconds: float = 1800.0
    threads: int = 1
    device: str = "cpu"
    """Where trainings run: cpu, cuda, or auto (cuda where PyTorch finds one). Everything else runs on cores."""
    memory_bytes: int = 0
    seed: int = 0
    scratch: str = ""
    """A folder the method may fill; empty means a temporary one."""
    keep: str = ""
    """A folder whose files outlive a kill of this process, for checkpoints of trainings, the finished ones too: a second run of the same job
    goes on where the first was. Whoever names it removes it after the job; empty means that none are kept."""
    target: str = ""
    """Host class key the result is meant for; empty means this host."""
    on_progress: Callable[[Progress], None] = lambda progress: None
    cancelled: Callable[[], bool] = lambda: False
    started: float = field(default_factory=time.monotonic)

    def __post_init__(self) -> None:
        if self.device not in DEVICES:
            raise ValueError(f"device {self.device!r} is none of {', '.join(DEVICES)}")

    def folder(self, name: str) -> Path:
        """A new folder of its own for one step, inside `scratch` (or the system's temporary folder)."""
        parent = Path(self.scratch) if self.scratch else Path(tempfile.gettempdir())
        parent.mkdir(parents=True, exist_ok=True)
        return Path(tempfile.mkdtemp(prefix=f"{name}-", dir=parent))

    @property
    def left_s(self) -> float:
        return self.seconds - (time.monotonic() - self.started)

    def tick(self, method: str, step: str, share: float, **detail: Any) -> None:
        """Report progress; raise Cancelled when a person or the clock said stop."""
        self.on_progress(Progress(method, step, share, detail))
        if self.cancelled():
            raise Cancelled(f"{method} was cancelled during {step}")
        if self.left_s <= 0:
            raise Cancelled(f"{method} used up its {self.seconds:.0f} s during {step}")


Method = Callable[[Artifact, Any, Samples, Budget], Artifact]
_methods: dict[type[Config], Method] = {}


def method(config_type: type[Config]) -> Callable[[Method], Method]:
    """Register `function` as the method that `config_type` selects."""

    def register(function: Method) -> Method:
        _methods[config_type] = function
        return function

    return register


def optimize(artifact: Artifact, config: Config, samples: Samples, budget: Budget) -> Artifact:
    """Apply one method. Raises NotApplicable with the reason, Rejected for a file that is no model, Cancelled, or ValueError for a budget's
    target that names no class of hosts."""
    try:
        chosen = _methods[type(config)]
    except KeyError:
        raise NotApplicable(
            f"{config.method or type(config).__name__}: no method for it is imported; take configs from optimizers.catalogue.parse_step, or import their module"
        ) from None
    if artifact.is_torch and Need.PYTORCH not in config.needs:
        raise NotApplicable(
            f"{config.method} works on ONNX files, and {artifact.path.name} holds the weights of a PyTorch model: let export come first"
        )
    budget.tick(config.method, "start", 0.0)
    return chosen(artifact, config, samples, budget)


def registered() -> Iterator[type[Config]]:
    """Every config type whose method is imported, by name."""
    return iter(sorted(_methods, key=lambda config: config.method))
