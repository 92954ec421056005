"""From token vectors to one vector a text. Shapes: n texts, L tokens (padded on the right), S spans, D dimensions.

The rules are Sentence Transformers' (`Pooling`), so that an exported model is the trained one: a prompt left
out of pooling is left out of every mode; of a text of nothing but its prompt "mean", "weighted_mean" and "last" make
the zero vector, "cls" its first token. "max" makes the zero vector too, where theirs is not a number.
"""

from __future__ import annotations

from typing import get_args

import torch
from torch import Tensor

from trainers.config import PoolingMode

MODES: tuple[PoolingMode, ...] = get_args(PoolingMode)


def pooled_tokens(mask: Tensor, mode: PoolingMode, prompt_tokens: Tensor | None) -> Tensor:
    """Which tokens a text's vector is made of: [n, L] bool. Only "cls" and "last" choose one among them.

    mask           [n, L], 1 where there is a token
    prompt_tokens  [n] leading tokens that take no part, or None where all do
    """
    pooled = mask.bool()
    position = torch.arange(mask.shape[1], device=mask.device)
    if prompt_tokens is not None:
        pooled = pooled & (position >= prompt_tokens[:, None])
    if mode == "cls":
        return position == pooled.int().argmax(1, keepdim=True)  # the first; position 0 where there is none
    if mode == "last":
        return position == torch.where(pooled, position, -1).amax(1, keepdim=True)
    return pooled


def pool(hidden: Tensor, pooled: Tensor, mode: PoolingMode = "mean") -> Tensor:
    """hidden [n, L, D], pooled [n, L] bool -> [n, D] float32; or of several spans a text, [n, S, L] -> [n, S, D].

    "max" takes the largest of each dimension, every other mode a mean of the chosen tokens; "weighted_mean" gives the
    i-th token of the text the weight i (SGPT, Muennighoff 2022: later tokens of a causal tower have read more).
    Spans are the vectors of sub-sentence encoders (Chen et al. 2023).
    """
    hidden = hidden.float()
    if mode == "max":
        spread = hidden if pooled.ndim == 2 else hidden[:, None]
        largest = spread.masked_fill(~pooled[..., None], -torch.inf).amax(-2)
        return largest.masked_fill(~pooled.any(-1, keepdim=True), 0.0)
    weights = pooled.float()
    if mode == "weighted_mean":
        weights = weights * torch.arange(1, hidden.shape[1] + 1, device=hidden.device)
    weights = weights / weights.sum(-1, keepdim=True).clamp(min=1)
    if pooled.ndim == 3:
        return torch.bmm(weights, hidden)
    return torch.bmm(weights[:, None, :], hidden).squeeze(1)


def hide_tokens(mask: Tensor, pooled: Tensor, share: float, mode: PoolingMode) -> tuple[Tensor, Tensor]:
    """Token dropout: (mask, pooled) without a random `share` of the tokens, drawn from the torch generator.

    The token that "cls" and "last" pool stays, and a text that would lose every pooled token keeps them all.
    """
    keep = torch.rand(mask.shape, device=mask.device) >= share
    if mode in ("cls", "last"):
        keep = keep | pooled
    keep = keep | ~(keep & pooled).any(1, keepdim=True)
    return mask * keep.to(mask.dtype), pooled & keep
