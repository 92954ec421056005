"""The contrastive loss of token vectors is that of released late-interaction trainers on the same vectors.

Sentence Transformers' is called; PyLate's, whose pins disagree with ours, is written out from its definition.
"""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy, normalize

from tests.twins import random_shares
from trainers.collectives import Group
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.sections.contrastive import ContrastiveSection

peer = pytest.importorskip("sentence_transformers.multi_vector_encoder.losses")

ROWS, TOKENS, DIM, SCALE = 6, 5, 8, 2.0
SETTINGS = {
    "similarity": "max_sim",
    "temperature": 1 / SCALE,
    "directions": "query_to_document",
    "mask_same_document": False,
    "mask_same_query": False,
}


def drawn(further: int):
    """A batch of `further` hard negatives a query, float32, without weights. Components aren't negative: PyLate takes
    the similarity of padding for 0, which so is never the largest."""
    (share,) = random_shares(further, [(ROWS, (1 + further) * ROWS)], DIM, tokens=TOKENS)
    queries, documents = (normalize(x.abs(), dim=-1).float() for x in (share.queries, share.documents))
    return replace(share, queries=queries, documents=documents, weights=None)


def ours(share):
    """(loss, dL/dqueries, dL/ddocuments)"""
    leaves = [x.clone().requires_grad_() for x in (share.queries, share.documents)]
    objective = Contrastive(ContrastiveSection.model_validate(SETTINGS), Group())
    loss = objective(replace(share, queries=leaves[0], documents=leaves[1])).loss
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def assert_equal(found, expected):
    for mine, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=1e-6)


class Table(nn.Module):
    """In the place of a model: text i has token vectors `rows`[i], of which the first `lengths`[i] count."""

    def __init__(self, rows, lengths):
        super().__init__()
        self.rows, self.mask = nn.Parameter(rows), torch.arange(rows.shape[1]) < lengths[:, None]

    def forward(self, features, **_):
        ids = features["input_ids"][:, 0]
        return {"token_embeddings": self.rows[ids], "attention_mask": self.mask[ids]}


@pytest.mark.parametrize("further", [0, 2])
@pytest.mark.parametrize("cached", [False, True])
def test_sentence_transformers(further, cached):
    share = drawn(further)
    lengths = torch.cat([share.query_keys.lengths, share.document_keys.lengths])
    table = Table(torch.cat([share.queries, share.documents]), lengths)
    plain, in_chunks = peer.MultiVectorMultipleNegativesRankingLoss, peer.CachedMultiVectorMultipleNegativesRankingLoss
    make = partial(in_chunks, mini_batch_size=4) if cached else plain
    columns = torch.arange(len(lengths))[:, None].split(ROWS)
    loss = make(table, scale=SCALE)([{"input_ids": ids, "attention_mask": torch.ones_like(ids)} for ids in columns])
    loss.backward()
    assert_equal(ours(share), (loss.detach(), *table.rows.grad.split([ROWS, len(lengths) - ROWS])))


@pytest.mark.parametrize("further", [0, 2])
def test_pylate(further):
    """losses.Contrastive over scores.colbert_scores: hidden tokens' similarities are multiplied by 0, a document's
    largest is taken for each query token, their sums go into a cross-entropy."""
    share = drawn(further)
    queries, documents = (x.clone().requires_grad_() for x in (share.queries, share.documents))
    asked, given = (torch.arange(TOKENS) < keys.lengths[:, None] for keys in (share.query_keys, share.document_keys))
    similar = torch.einsum("ash,bth->abst", queries, documents) * asked[:, None, :, None] * given[None, :, None]
    scores = similar.amax(3).sum(2)
    loss = cross_entropy(scores * SCALE, torch.arange(ROWS))
    assert_equal(ours(share), (loss.detach(), *torch.autograd.grad(loss, [queries, documents])))
