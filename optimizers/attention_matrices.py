"""The attention matrices of a module while it runs, whoever computes them, and which of golden's a student should have.

TinyBERT (Jiao et al. 2020, arXiv:1909.10351) compares them layer by layer, MiniLM (Wang et al. 2020, arXiv:2002.10957) as distributions.
"""

from __future__ import annotations

import math
from typing import Any, Final

import torch
from torch import Tensor
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from optimizers.base import NotApplicable

SOFTMAXES: Final = frozenset({functional.softmax, torch.softmax, Tensor.softmax})


class MatrixWatch(TorchFunctionMode):
    """While it is entered, `seen` gets each attention matrix [N, H, L, S] in the order in which they are made.

    Seen are nn.MultiheadAttention, scaled_dot_product_attention and every softmax over the last axis of four. Answers do not change.
    """

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None) -> Any:
        given = kwargs or {}
        if func is functional.multi_head_attention_forward:
            return self._multi_head(func, args, given)
        if func is functional.scaled_dot_product_attention:
            self._note(dot_product_weights(*args, **given))
            return func(*args, **given)
        result = func(*args, **given)
        axis = given.get("dim", args[1] if len(args) > 1 else None)
        if func in SOFTMAXES and axis in {-1, 3}:
            self._note(result)
        return result

    def _multi_head(self, func: Any, args: tuple[Any, ...], given: dict[str, Any]) -> Any:
        out, weights = func(*args, **{**given, "need_weights": True, "average_attn_weights": False})
        self._note(weights)
        if not given.get("need_weights", True):
            return out, None
        return out, weights.mean(-3) if given.get("average_attn_weights", True) else weights

    def _note(self, weights: Tensor) -> None:
        if weights.ndim == 4:
            self.seen.append(weights)


def dot_product_weights(
    query: Tensor, key: Tensor, value: Tensor, attn_mask: Tensor | None = None, dropout_p: float = 0.0, is_causal: bool = False,
    scale: float | None = None, enable_gqa: bool = False,
) -> Tensor:  # fmt: skip
    """softmax(q kᵀ · scale + mask), which scaled_dot_product_attention does not give; without dropout."""
    if enable_gqa:
        key = key.repeat_interleave(query.shape[-3] // key.shape[-3], -3)
    scores = query @ key.transpose(-2, -1) * (1 / math.sqrt(query.shape[-1]) if scale is None else scale)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -math.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores.softmax(-1)


def paired(student: list[Tensor], golden: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
    """Each matrix of the student with one of golden's, spread evenly, the last with the last. Raises NotApplicable where they do not fit."""
    if not student or not golden:
        who = "golden" if not golden else "the student"
        raise NotApplicable(
            f"{who} runs no attention: no nn.MultiheadAttention, no scaled_dot_product_attention and no softmax over [N, heads, L, L]"
        )
    pairs = [(own, golden[math.ceil((at + 1) * len(golden) / len(student)) - 1]) for at, own in enumerate(student)]
    for own, theirs in pairs:
        if own.shape[-2:] != theirs.shape[-2:]:
            raise NotApplicable(f"the student attends over {list(own.shape[-2:])} places, golden over {list(theirs.shape[-2:])}")
    return pairs
