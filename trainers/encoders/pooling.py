"""From token vectors to one vector a text. Shapes: n texts, L tokens (padded on the right), D dimensions.

The rules are Sentence Transformers' (`Pooling`), so that an exported model is the trained one: a prompt left
out of pooling is left out of every mode; of a text of nothing but its prompt "mean" and "last" make the zero
vector, "cls" its first token.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

PoolingMode = Literal["mean", "cls", "last"]
MODES: tuple[PoolingMode, ...] = ("mean", "cls", "last")


def pooled_tokens(mask: Tensor, mode: PoolingMode, prompt_tokens: Tensor | None) -> Tensor:
    """Which tokens a text's vector is the mean of: [n, L] bool.

    mask           [n, L], 1 where there is a token
    prompt_tokens  [n] leading tokens that take no part, or None where all do
    """
    pooled = mask.bool()
    position = torch.arange(mask.shape[1], device=mask.device)
    if prompt_tokens is not None:
        pooled = pooled & (position >= prompt_tokens[:, None])
    if mode == "mean":
        return pooled
    if mode == "cls":
        chosen = pooled.int().argmax(1, keepdim=True)  # the first; position 0 where there is none
    else:
        chosen = torch.where(pooled, position, -1).amax(1, keepdim=True)
    return position == chosen


def pool(hidden: Tensor, pooled: Tensor) -> Tensor:
    """Mean in fp32 of the chosen tokens: hidden [n, L, D], pooled [n, L] bool -> [n, D] float32."""
    weights = pooled.float() / pooled.sum(1, keepdim=True).clamp(min=1)
    return torch.bmm(weights[:, None, :], hidden.float()).squeeze(1)


def hide_tokens(mask: Tensor, pooled: Tensor, share: float, mode: PoolingMode) -> tuple[Tensor, Tensor]:
    """Token dropout: (mask, pooled) without a random `share` of the tokens, drawn from the torch generator.

    The token that "cls" and "last" pool stays, and a text that would lose every pooled token keeps them all.
    """
    keep = torch.rand(mask.shape, device=mask.device) >= share
    if mode != "mean":
        keep = keep | pooled
    keep = keep | ~(keep & pooled).any(1, keepdim=True)
    return mask * keep.to(mask.dtype), pooled & keep
