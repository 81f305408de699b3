"""A PyTorch module from its Source and back: weights loaded strictly, new weights saved with the form they need, ONNX exported and tried.

Imports torch, so methods import it inside their functions. Knows no method; what a changed module looks like is optimizers.torch_structure's.
"""

from __future__ import annotations

import contextlib
import logging
import re
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Final

import numpy as np
import torch
from numpy.typing import NDArray
from onnx import ModelProto
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_model
from torch import Tensor, nn

from optimizers import torch_module
from optimizers.artifact import Artifact, Source
from optimizers.base import Budget, NotApplicable
from optimizers.census import census
from optimizers.onnx_file import read
from optimizers.onnx_graph import fold_batchnorm, initializers, name_nodes, save, weight_bytes
from optimizers.running import ORT_ERRORS, RunRefused, brief, raise_if_memory, runner
from optimizers.samples import Samples
from optimizers.session import Settings, open_session
from optimizers.torch_structure import KEY, Structure, apply, structure_of
from optimizers.trial import fitting

OPSET: Final = 18
TRIED_BATCHES: Final = (1, 2, 7)
"""An exporter that saw one row may take 1 for a constant (pytorch#157621), so every export is run at these."""
SAME: Final = 1e-3
"""How far PyTorch's and ONNX Runtime's outputs may be apart, as a share of the largest: rounding in another order."""
LIMIT: Final = 1 << 30
GOLDEN_SOURCE: Final = "golden_source"
_COLOUR: Final = re.compile(r"\x1b\[[0-9;]*m")
_RAISED_AT: Final = re.compile(r'The following call raised this error:\s+File "(?P<file>[^"]+)", line (?P<line>\d+), in .*\n(?P<code>.+)')
Outputs = tuple[Tensor, ...]


@dataclass(frozen=True)
class Signature:
    """Inputs in the order of the module's arguments, outputs in that of its results. `free`: input to its variable axes."""

    inputs: tuple[str, ...]
    outputs: tuple[str, ...]
    free: dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Opened:
    """A module that gives the parent's answers, as checked on `rows`."""

    module: nn.Module
    signature: Signature
    rows: Samples


def open_source(artifact: Artifact, samples: Samples, method: str) -> Opened:
    """The parent's module. Raises NotApplicable: no source, no rows to try it on, or it does not answer as the parent's ONNX file."""
    if artifact.source is None:
        raise NotApplicable(
            f"{method} needs the PyTorch source of the model: name it in model.yaml (source: {{factory, weights}}), with the weights in the "
            "version's folder and the factory's folder in the worker's HONE_FACTORIES; a step that rewrites the ONNX file, such as int8-static, comes after the steps that train"
        )
    if not len(samples) or not samples.stacked:
        raise NotApplicable(
            f"{method} needs inputs with a batch axis to train on, and there are none: name some in model.yaml (samples: train)"
        )
    model = read(artifact.path).model
    fitting(samples, model)
    signature = signature_of(model)
    module = load_module(artifact.source)
    rows = samples.rows(slice(0, 8))
    error = difference(module, artifact.path, signature, rows)
    if error > SAME:
        raise NotApplicable(
            f"the PyTorch source does not answer as the model it should be the source of: outputs differ by {error:.2g} of their largest "
            f"(allowed {SAME:g}); export the model again from {artifact.source.weights.name}, or name the weights it was exported from"
        )
    return Opened(trainable(module), signature, rows)


def trainable(module: nn.Module) -> nn.Module:
    """`module`, with all weights open to training: a factory may have frozen some."""
    for parameter in module.parameters():
        parameter.requires_grad_(parameter.is_floating_point())
    return module


def signature_of(model: ModelProto) -> Signature:
    weights = initializers(model.graph)
    inputs = [value for value in model.graph.input if value.name not in weights]
    free = {v.name: tuple(i for i, dim in enumerate(v.type.tensor_type.shape.dim) if not dim.HasField("dim_value")) for v in inputs}
    return Signature(tuple(v.name for v in inputs), tuple(v.name for v in model.graph.output), free)


def make(factory: str) -> nn.Module:
    """Call 'file.py:function', loaded by path. Raises NotApplicable with what went wrong in it."""
    try:
        made: nn.Module = torch_module.make(factory)
    except torch_module.NotLoadable as error:
        raise NotApplicable(str(error)) from error
    return made


def load_module(source: Source) -> nn.Module:
    """The factory's module in the form that the weights file states, with its weights, in eval mode.

    Strict, but two names of one tied weight may share one entry (safetensors keeps one of them). Raises NotApplicable, listing names.
    """
    try:
        with safe_open(source.weights, "pt") as file:
            structure = Structure.from_json((file.metadata() or {}).get(KEY, ""))
        values = load_file(source.weights)
    except (OSError, SafetensorError, ValueError, TypeError) as error:
        raise NotApplicable(f"{source.weights.name} cannot be read as safetensors: {error}") from None
    module = apply(structure, make(source.factory))
    own = module.state_dict(keep_vars=True)
    wrong = [f"{n} {list(v.shape)} for {list(own[n].shape)}" for n, v in values.items() if n in own and v.shape != own[n].shape]
    given = {_place(own[name]) for name in own if name in values}
    lacking = [name for name in own if name not in values and _place(own[name]) not in given]
    unknown = sorted(values.keys() - own.keys())
    for names, said in ((lacking, "misses"), (unknown, "has, unknown to the module,"), (wrong, "has other shapes:")):
        if names:
            raise NotApplicable(f"{source.weights.name} does not fit {Path(source.factory).name}: it {said} {', '.join(names[:8])}")
    module.load_state_dict(values, strict=False)
    return module.eval()


def _place(tensor: Tensor) -> tuple[int, tuple[int, ...]]:
    return tensor.data_ptr(), tuple(tensor.shape)


def save_source(module: nn.Module, factory: str, path: Path) -> Source:
    """Write the weights, with the form of the module in their metadata; read back and compared by name and value."""
    plain = contiguous(module)
    save_model(plain, str(path), metadata={KEY: structure_of(plain, make(factory)).to_json()})
    source = Source(factory, path)
    again = load_module(source).state_dict()
    if different := [name for name, value in plain.state_dict().items() if not torch.equal(value, again[name])]:
        raise NotApplicable(f"the weights do not survive being saved: {', '.join(different[:5])}")
    return source


def golden_source(artifact: Artifact) -> Source | None:
    """The source of golden itself, which steps hand on: the teacher where layers inside it are looked at."""
    given = artifact.extra.get(GOLDEN_SOURCE)
    if given:
        return Source(given["factory"], Path(given["weights"]))
    return artifact.source if artifact.golden in {None, artifact.path} else None


def tensors_of(samples: Samples, signature: Signature) -> Outputs:
    return tuple(torch.from_numpy(np.ascontiguousarray(samples.inputs[name])) for name in signature.inputs)


def outputs_of(result: Any, names: Sequence[str]) -> Outputs:
    """What a module returned as one tensor per output name. Raises NotApplicable where that cannot be told."""
    if isinstance(result, dict):
        values = [result.get(name) for name in names]
    else:
        values = list(result) if isinstance(result, tuple | list) else [result]
    values = values[: len(names)]
    if len(values) < len(names) or not all(isinstance(value, Tensor) for value in values):
        raise NotApplicable(f"the module does not return a tensor for each of the outputs {', '.join(names)}")
    return tuple(value for value in values if isinstance(value, Tensor))


def delivered(
    opened: Opened, module: nn.Module, artifact: Artifact, step: dict[str, Any], facts: dict[str, Any], folder: Path, factory: str = ""
) -> Artifact:
    """The artifact one step further: `module` exported, tried at several batch sizes, and saved as the source of the next step."""
    assert artifact.source is not None
    path = export(module, opened.signature, opened.rows, folder / "model.onnx")
    source = save_source(module, factory or artifact.source.factory, folder / "weights.safetensors")
    before, after = counted(artifact.path, opened.rows), counted(path, opened.rows)
    facts = {"method": step["method"], **facts, "before": before, "after": after, "opset": OPSET, "custom_domains": []}
    first = golden_source(artifact)
    made = artifact.derived(path, step, facts, source)
    kept = {GOLDEN_SOURCE: {"factory": first.factory, "weights": str(first.weights)}} if first else {}
    return replace(made, extra={**made.extra, **kept})


def _why(error: BaseException) -> str:
    """PyTorch's own reason, without its advice, and the line of the owner's code where it says which."""
    while error.__cause__ is not None:
        error = error.__cause__
    text = _COLOUR.sub("", str(error))
    at = _RAISED_AT.search(text)
    where = f" (line {at['line']} of {Path(at['file']).name}: {at['code'].strip()})" if at else ""
    return f"{type(error).__name__}: {text.strip().partition(chr(10))[0][:400]}{where}"


def counted(path: Path, rows: Samples) -> dict[str, Any]:
    """Parameters, multiply-adds of one row, bytes on disk."""
    file = read(path)
    found = census(file.model, path.parent, rows.row_shapes())
    return {"parameters": found.parameters, "nonzeros": found.nonzeros, "multiply_adds": found.multiply_adds, "bytes": file.bytes}


def export(module: nn.Module, signature: Signature, rows: Samples, path: Path) -> Path:
    """Write `module` as ONNX with the parent's names and free axes. Raises NotApplicable where the file does not answer as the module."""
    module = contiguous(module)
    tried = _tried(rows, signature)
    example = tensors_of(_repeated(rows, 2) if rows.stacked else tried[0], signature)
    free: Any = tuple(dict.fromkeys(signature.free[name], torch.export.Dim.AUTO) or None for name in signature.inputs)
    wrapped = _in_order(module, example, signature)
    free = free if wrapped is module else (free,)
    try:
        with quiet():
            program = torch.onnx.export(
                wrapped, example, dynamo=True, input_names=list(signature.inputs), output_names=list(signature.outputs),
                dynamic_shapes=free, opset_version=OPSET, external_data=False, verbose=False,
            )  # fmt: skip
    except Exception as error:
        raise_if_memory(error)
        raise NotApplicable(f"PyTorch cannot export the module: {_why(error)}") from error
    assert program is not None
    model: ModelProto = program.model_proto
    _tidy(model)
    fold_batchnorm(model)
    name_nodes(model)
    if weight_bytes(model) > LIMIT:
        raise NotApplicable(f"the module has {weight_bytes(model)} bytes of weights; more than {LIMIT} are not exported")
    save(model, path)
    for some in tried:
        apart = difference(module, path, signature, some)
        if apart > SAME:
            raise NotApplicable(f"the exported file differs from the module by {apart:.2g} of its largest output at batch {len(some)}")
    return path


def _tried(rows: Samples, signature: Signature) -> list[Samples]:
    """Batches that an export is tried on; whole calls as they are."""
    if not rows.stacked:
        return [Samples({name: values[at] for name, values in rows.inputs.items()}) for at in range(min(3, len(rows)))]
    free = all(0 in axes for axes in signature.free.values())
    return [_repeated(rows, batch) for batch in (TRIED_BATCHES if free else (len(rows),))]


class _InOrder(nn.Module):
    """A module that gives a dict, or more than is declared, as one that gives the declared outputs in their order."""

    def __init__(self, module: nn.Module, names: tuple[str, ...]) -> None:
        super().__init__()
        self.module, self.names = module, names

    def forward(self, *inputs: Tensor) -> Outputs:
        return outputs_of(self.module(*inputs), self.names)


@torch.no_grad()
def _in_order(module: nn.Module, example: Outputs, signature: Signature) -> nn.Module:
    """`module` itself where its results are the declared outputs already. Raises NotApplicable where it does not take the inputs."""
    result = answered(module, example, signature)
    plain = isinstance(result, Tensor) or (isinstance(result, tuple | list) and len(result) == len(signature.outputs))
    return module if plain else _InOrder(module, signature.outputs).eval()


def answered(module: nn.Module, inputs: Outputs, signature: Signature) -> Any:
    """What the module returns. Raises NotApplicable where it does not take the inputs."""
    try:
        return module.eval()(*inputs)
    except (RuntimeError, TypeError, ValueError, IndexError, AttributeError) as error:
        raise_if_memory(error)
        raise NotApplicable(f"the module does not take the model's inputs ({', '.join(signature.inputs)}): {brief(error)}") from None


def _tidy(model: ModelProto) -> None:
    """Nothing in the file names this machine or this run, and the axes are called as everywhere."""
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output, *model.graph.value_info):
        del value.metadata_props[:]
    del model.metadata_props[:], model.graph.metadata_props[:]
    model.producer_name, model.producer_version = "hone", ""


def contiguous(module: nn.Module) -> nn.Module:
    """`module` in eval mode with its weights in the usual memory layout, whatever it was trained in."""
    module.eval().to(memory_format=torch.contiguous_format)  # type: ignore[call-overload]
    return module


def _repeated(rows: Samples, batch: int) -> Samples:
    return rows.rows([i % len(rows) for i in range(batch)])


@torch.no_grad()
def difference(module: nn.Module, path: Path, signature: Signature, rows: Samples) -> float:
    """The largest distance of the two forms' outputs, as a share of the largest output."""
    try:
        run = runner(open_session(path, Settings(graph_level="none")))
        seen = run({name: rows.inputs[name] for name in signature.inputs})
    except (*ORT_ERRORS, RunRefused) as error:
        raise_if_memory(error)
        raise NotApplicable(f"{path.name} does not run at batch {len(rows)}: {brief(error)}") from None
    answers = outputs_of(answered(module, tensors_of(rows, signature), signature), signature.outputs)
    return max(_apart(answer.numpy(), np.asarray(value)) for answer, value in zip(answers, seen, strict=True))


def _apart(left: NDArray[Any], right: NDArray[Any]) -> float:
    if left.shape != right.shape:
        return float("inf")
    return float(np.abs(left.astype(np.float64) - right).max(initial=0.0) / max(float(np.abs(right).max(initial=0.0)), 1e-6))


@contextlib.contextmanager
def quiet() -> Iterator[None]:
    """Libraries warn about their own insides."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)


@contextlib.contextmanager
def torch_for(budget: Budget) -> Iterator[None]:
    """Seeds and threads of this job, and as they were afterwards."""
    threads = torch.get_num_threads()
    torch.set_num_threads(max(1, budget.threads))
    torch.manual_seed(budget.seed)
    try:
        yield
    finally:
        torch.set_num_threads(threads)
