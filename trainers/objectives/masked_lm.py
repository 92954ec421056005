"""Losses on token states, for which vectors aren't enough; masked language modelling is the one that is here.

A head lives in the module, where token states are, and sees one chunk of texts at a time. So it gives back a sum over
the chunk and how many terms are in it, and the mean over the global batch is made outside:

    L = weight * S / N,     S = sum over chunks and workers of `total`,  N = the same of `terms`

N is known after the first encoding of all chunks, so that the gradient of each chunk's `total` is weight / N, cached or
not. What a head draws at random it draws from torch's generator, which the step seeds for each chunk: the second
encoding of a cached chunk hides the same tokens as the first.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from data_services.schema import UsageError
from trainers.collectives import Group
from trainers.objectives.sections.wrappers import MaskedLM

NOTHING = -100
"""The target of a token that isn't predicted."""


class Altered(NamedTuple):
    """What the backbone sees in the place of the texts, input_ids [n, L] int64, and what a head makes of each token,
    targets [n, L] int64, NOTHING where it is not asked."""

    input_ids: Tensor
    targets: Tensor


class HeadLoss(NamedTuple):
    """total: scalar float32, the sum of a chunk's terms, with gradient; terms: scalar, how many they are."""

    total: Tensor
    terms: Tensor


class AuxiliaryHead(Protocol):
    """A loss on token states. In training the module calls `alter` on a chunk, runs the backbone on what it gives,
    beside the pass that makes the vectors, and calls the head with the states; in eval mode it does neither. Every
    chunk is put through both, whatever it holds: every worker makes the same calls."""

    def alter(self, input_ids: Tensor, attention_mask: Tensor, prompt_tokens: Tensor | None = None) -> Altered:
        """input_ids and attention_mask [n, L] int64; prompt_tokens [n] int64, leading tokens that stay as they are."""
        ...

    def __call__(self, token_states: Tensor, targets: Tensor) -> HeadLoss:
        """token_states [n, L, H] of the altered texts, targets [n, L]."""
        ...


class MaskedLMHead(nn.Module):
    """Predicts tokens that were hidden from the backbone, as BERT does.

        total = sum_t -log softmax(E h_t + c)_{x_t},     h_t = LayerNorm(GELU(A state_t + a))

    t runs over the chosen tokens: each token of a text with probability `share`, but for special ones, the prompt and
    texts of a single token, which have no context (what stands for an empty chunk among them). `masked` of them are
    replaced by the mask token, `random` by any token, the rest stay as they are. E is the backbone's own table of
    embeddings. Nats a token. It needs attention to both sides: a causal state hasn't seen its token's right context.

    Logits take 4 bytes a chosen token and word of the vocabulary, and twice that in the backward pass.
    Sources: Devlin et al., BERT, arXiv:1810.04805, section 3.1; beside a contrastive loss: Wu et al., CLEAR,
    arXiv:2012.15466.
    """

    special: Tensor

    def __init__(
        self, section: MaskedLM, embeddings: nn.Embedding, hidden: int, mask_id: int | None, special_ids: Sequence[int]
    ) -> None:
        """embeddings [V, E] of the backbone, tied; hidden: H; mask_id and special_ids as the tokenizer has them.

        Raises UsageError where there is no mask token.
        """
        super().__init__()
        if mask_id is None:
            raise UsageError(
                "masked_lm: the model's tokenizer has no mask token; remove masked_lm, or use one that has"
            )
        words, width = embeddings.weight.shape
        self._section, self._mask_id = section, mask_id
        self.transform = nn.Sequential(nn.Linear(hidden, width), nn.GELU(), nn.LayerNorm(width))
        self.decoder = nn.Linear(width, words, device="meta")  # a module of its own, so that ZeRO-3 gathers the table
        self.decoder.weight, self.decoder.bias = embeddings.weight, nn.Parameter(torch.zeros(words))
        special = torch.zeros(words, dtype=torch.bool)
        special[list(special_ids)] = True
        self.register_buffer("special", special, persistent=False)

    def alter(self, input_ids: Tensor, attention_mask: Tensor, prompt_tokens: Tensor | None = None) -> Altered:
        valid = attention_mask.bool()
        open_to_choice = valid & ~self.special[input_ids] & (valid.sum(1, keepdim=True) > 1)
        if prompt_tokens is not None:
            position = torch.arange(input_ids.shape[1], device=input_ids.device)
            open_to_choice &= position >= prompt_tokens[:, None]
        chosen, lot, any_token = self._draw(input_ids)
        chosen = (chosen < self._section.share) & open_to_choice
        masked = chosen & (lot < self._section.masked)
        random = chosen & ~masked & (lot < self._section.masked + self._section.random)
        altered = torch.where(random, any_token, input_ids).masked_fill(masked, self._mask_id)
        return Altered(altered, input_ids.masked_fill(~chosen, NOTHING))

    def _draw(self, like: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Two numbers in [0, 1) and a token for each place, [n, L]."""
        chosen, lot = torch.rand(2, *like.shape, device=like.device)
        return chosen, lot, torch.randint_like(like, self.decoder.out_features)

    def forward(self, token_states: Tensor, targets: Tensor) -> HeadLoss:
        chosen = targets != NOTHING
        logits = self.decoder(self.transform(token_states[chosen]))
        total = cross_entropy(
            logits.to(torch.promote_types(logits.dtype, torch.float32)), targets[chosen], reduction="sum"
        )
        return HeadLoss(total, chosen.sum())


class HeadShare(NamedTuple):
    """gradient: dL/dtotal of every chunk; metrics: `masked_lm`, the mean S / N, and `masked_tokens`, N, of all
    workers."""

    gradient: float
    metrics: dict[str, float]


def share_of_head(of_chunks: Sequence[HeadLoss], weight: float, group: Group) -> HeadShare:
    """What this worker's chunks give, and what all of them come to. Collective."""
    own = torch.stack([torch.stack([total.detach().double(), terms.double()]) for total, terms in of_chunks]).sum(0)
    total, terms = group.all_reduce(own).tolist()
    return HeadShare(weight / max(terms, 1.0), {"masked_lm": total / max(terms, 1.0), "masked_tokens": terms})
