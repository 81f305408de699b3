"""Trained centroids: a module whose weights are looked up in a few levels per layer learns the levels, and its file stores them.

Deep Compression (Han et al. 2016, arXiv:1510.00149): the gradient of a level is the sum of those of the weights that share it.
Normalizations are folded first, as the file's are: a level is one value for its whole layer only then.
"""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from typing import Any, Final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from optimizers import codebook_graph
from optimizers.artifact import Artifact
from optimizers.base import Budget, NotApplicable
from optimizers.clustering import kmeans
from optimizers.codebook import TrainedCodebookConfig
from optimizers.fake_quantization import LAYERS, folded
from optimizers.lessons import facts_of
from optimizers.onnx_file import size_of
from optimizers.samples import Samples
from optimizers.torch_source import counted, export, torch_for
from optimizers.workshop import Workshop

CHUNK: Final = 32
EXACT: Final = 1e-5
"""A layer of the file whose weights lie this close to its levels, relative to their size, holds trained ones."""


class _LookUp(torch.autograd.Function):
    """levels[index]; backward, each level gets the sum over its places, by bincount: on cores faster than what indexing does by itself."""

    @staticmethod
    def forward(ctx: Any, levels: Tensor, index: Tensor) -> Tensor:
        ctx.save_for_backward(index)
        ctx.count = len(levels)
        return levels[index]

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (index,) = ctx.saved_tensors
        summed = torch.bincount(index.reshape(-1), weights=gradients[0].reshape(-1), minlength=ctx.count)
        return summed.to(gradients[0].dtype), None


class Levels(nn.Module):
    """A parametrization: the weight is what `index` says of `levels`, whatever the weight was. With `zeros` the first level is 0 and stays so."""

    index: Tensor
    nought: Tensor

    def __init__(self, weight: Tensor, bits: int, sparsity: float) -> None:
        super().__init__()
        flat = weight.detach().numpy().ravel()
        zero = codebook_graph.smallest(flat, sparsity)
        found = kmeans(flat[~zero], (1 << bits) - bool(zero.any()))
        places = np.where(zero, 0, found.codes(flat) + bool(zero.any()))
        self.levels = nn.Parameter(torch.from_numpy(found.centres.astype(np.float32)))
        self.register_buffer("nought", torch.zeros(int(zero.any())))
        self.register_buffer("index", torch.from_numpy(places).reshape(weight.shape))

    def forward(self, weight: Tensor) -> Tensor:
        looked_up: Tensor = _LookUp.apply(torch.cat([self.nought, self.levels]), self.index)  # type: ignore[no-untyped-call]
        return looked_up


def share(module: nn.Module, bits: int, sparsity: float) -> list[str]:
    """Let each layer look its weight up. Left alone: weights of two layers, and those not larger than their codebook. The names of the others."""
    owners = Counter(own.data_ptr() for part in module.modules() for own in part.parameters(recurse=False))
    shared = []
    for name, layer in list(module.named_modules()):
        if not isinstance(layer, LAYERS) or owners[layer.weight.data_ptr()] > 1 or layer.weight.numel() < 1 << (bits + 1):
            continue
        parametrize.register_parametrization(layer, "weight", Levels(layer.weight, bits, sparsity))
        own: Any = layer.parametrizations
        own.weight.original.requires_grad_(False)
        shared.append(name)
    return shared


def build(artifact: Artifact, config: TrainedCodebookConfig, samples: Samples, budget: Budget) -> Artifact:
    """The artifact with trained codebooks. Raises NotApplicable with the reason."""
    started = time.monotonic()
    with torch_for(budget):
        work = Workshop.open(artifact, config, samples, budget)
        lesson = work.lesson()
        module = folded(work.opened.module, tuple(value[:CHUNK] for value in lesson.held))
        shared = share(module, config.bits, config.sparsity)
        if not shared:
            raise NotApplicable("there is no convolution or linear layer of its own weight that is larger than its codebook")
        with torch.no_grad():
            before = lesson.score(module.eval())[0]
        trained = work.fine_tune(module, lesson, "training", span=(0.1, 0.8))
        for name in shared:
            parametrize.remove_parametrizations(module.get_submodule(name), "weight", leave_parametrized=True)
        plain = export(module, work.opened.signature, work.opened.rows, work.folder / "float.onnx")
    assert trained is not None
    made = codebook_graph.build(replace(artifact, path=plain), replace(config.plain(), sparsity=0.0), Samples({}), budget)
    inner = made.facts[-1]
    facts: dict[str, Any] = {
        **inner, "method": config.method, "shared_layers": len(shared), "sparsity": config.sparsity,
        "trained_layers": sum(each["error"] < EXACT for each in inner["layers"]), "score_untrained": before,
        "training": {**facts_of(lesson, samples), **trained.facts()}, "seed": budget.seed,
        "before": counted(artifact.path, work.opened.rows), "after": counted(plain, work.opened.rows),
        "bytes_before": size_of(artifact.path), "seconds": time.monotonic() - started,
    }  # fmt: skip
    budget.tick(config.method, "done", 1.0)
    return artifact.derived(made.path, config.to_json(), facts)
