"""One vector a token: which tokens have one, where they lie, and what the encoder makes of them."""

import numpy as np
import pytest
import torch
from torch.nn import functional as F

from data_services.tokenizer import FolderTokenizer
from tests.trainers.encoders.tiny import TEXTS, of, padded, tiny
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.late_interaction import fill_queries, kept_first, without_skipped
from trainers.encoders.local import LocalEncoder


def test_kept_tokens_come_first_in_their_order_with_gradients():
    vectors = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    kept = torch.tensor([[1, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 1]]).bool()
    got = kept_first(vectors, kept)
    for row, mask, source in zip(got, kept, vectors, strict=True):
        assert torch.equal(row[: mask.sum()], source[mask])
        assert row[mask.sum() :].abs().sum() == 0
    upstream = torch.randn_like(got)
    got.backward(upstream)
    for mask, gradient, back in zip(kept, vectors.grad, upstream, strict=True):
        assert torch.equal(gradient[mask], back[: mask.sum()])
        assert gradient[~mask].abs().sum() == 0


@pytest.mark.parametrize("length", [2, 4, 7])
def test_queries_alone_are_filled_up_to_the_length(length):
    ids, mask = padded([2, 5, 3])
    filled, seen = fill_queries(ids, mask, torch.tensor([True, True, False]), length, mask_id=99)
    assert filled.shape == (3, max(5, length))
    for i, (own, query) in enumerate([(2, True), (5, True), (3, False)]):
        tokens = max(own, length) if query else own
        assert torch.equal(filled[i, :own], ids[i, :own])
        assert (filled[i, own:tokens] == 99).all()
        assert seen[i].tolist() == [1] * tokens + [0] * (filled.shape[1] - tokens)


def test_documents_alone_lose_skipped_tokens():
    ids = torch.tensor([[5, 7, 9], [5, 7, 9]])
    kept = without_skipped(torch.ones(2, 3).bool(), ids, torch.tensor([True, False]), torch.tensor([7, 4]))
    assert kept.tolist() == [[True, True, True], [True, False, True]]


def test_the_encoder_gives_projected_unit_vectors_of_each_text_and_their_count(tmp_path):
    encoder, spec = tiny(tmp_path / "m", pooling="tokens", token_dim=6)
    assert (spec.dim, spec.training_dim, spec.hidden) == (6, 6, 32)
    ids, mask = padded([3, 9])
    vectors = encoder(TowerInputs(ids, mask))
    assert torch.equal(encoder.token_counts(TowerInputs(ids, mask)), torch.tensor([3, 9]))
    hidden = encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    want = F.normalize(hidden @ encoder.readout.head[0].weight.T, dim=-1) * mask[..., None]
    torch.testing.assert_close(vectors, want)


@pytest.fixture(scope="module")
def colbert(tmp_path_factory):
    folder = tmp_path_factory.mktemp("colbert") / "m"
    keys = {"token_dim": 16, "query_length": 12, "skip_punctuation": True, "max_tokens": 24}
    encoder, spec = tiny(folder, of("bert"), pooling="tokens", query_prompt="q ", **keys)
    return encoder, FolderTokenizer(folder, spec.max_tokens, spec.prompts)


def test_queries_and_documents_of_one_chunk_have_the_tokens_of_their_kind(colbert):
    encoder, tokenize = colbert
    ids, mask = (torch.from_numpy(x) for x in tokenize(["a, b.", "a, b."], "document").padded())
    with pytest.raises(ValueError, match=r"queries \[n\] is needed"):
        encoder(TowerInputs(ids, mask))
    inputs = TowerInputs(ids, mask, queries=torch.tensor([True, False]))
    assert encoder.token_counts(inputs).tolist() == [12, 3]  # [CLS] a b
    assert encoder(inputs).shape == (2, 12, 16)


def test_token_vectors_do_not_depend_on_the_batch_and_are_those_that_training_sees(colbert):
    encoder, tokenize = colbert
    local = LocalEncoder(encoder, tokenize, batch_tokens=60)
    for field in ("query", "document"):
        together = local.encode_tokens(TEXTS, field)
        for text, vectors in zip(TEXTS, together, strict=True):
            (alone,) = local.encode_tokens([text], field)
            np.testing.assert_allclose(vectors, alone, atol=1e-5)
            ids, mask = (torch.from_numpy(x) for x in tokenize([text], field).padded())
            seen = encoder(TowerInputs(ids, mask, queries=torch.tensor([field == "query"])))
            np.testing.assert_allclose(seen[0, : len(vectors)].detach().numpy(), vectors, atol=1e-5)
    assert local.encode_tokens([], "query") == []
    with pytest.raises(ValueError, match="call encode_tokens"):
        local.encode(TEXTS, "query")
