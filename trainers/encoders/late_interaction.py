"""What is peculiar to one vector a token (ColBERT, Khattab & Zaharia 2020). Shapes: n texts, L tokens, D dimensions.

The rules are those of Sentence Transformers' MultiVectorEncoder: queries may be filled up with mask tokens, whose
vectors count, and the documents' punctuation may have no vector.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def fill_queries(
    input_ids: Tensor, attention_mask: Tensor, queries: Tensor, length: int, mask_id: int
) -> tuple[Tensor, Tensor]:
    """Query augmentation: input_ids, attention_mask [n, L] of at least `length` tokens, the rows that `queries` [n]
    bool says filled with the mask token up to `length`. Every token attends to those as to any other."""
    missing = max(0, length - input_ids.shape[1])
    input_ids, attention_mask = (F.pad(x, (0, missing)) for x in (input_ids, attention_mask))
    position = torch.arange(input_ids.shape[1], device=input_ids.device)
    filled = (attention_mask == 0) & (position < length) & queries[:, None]
    return input_ids.masked_fill(filled, mask_id), attention_mask.masked_fill(filled, 1)


def without_skipped(kept: Tensor, input_ids: Tensor, queries: Tensor, skipped: Tensor) -> Tensor:
    """kept [n, L] bool less the documents' tokens whose ids are among `skipped`."""
    return kept & (queries[:, None] | ~torch.isin(input_ids, skipped))


def kept_first(vectors: Tensor, kept: Tensor) -> Tensor:
    """vectors [n, L, D] with those that `kept` [n, L] names moved to the front, in their order, and zeros behind."""
    order = (~kept).int().argsort(dim=1, stable=True)
    moved = vectors.gather(1, order[..., None].expand_as(vectors))
    return moved * kept.gather(1, order)[..., None]
