"""Pooling, from its definition."""

import pytest
import torch

from tests.trainers.encoders.tiny import padded
from trainers.encoders.pooling import MODES, hide_tokens, pool, pooled_tokens


def naive(tokens, mode, first=0):
    """One vector from token vectors [m, D] that begin at the text's token number `first`."""
    if mode == "weighted_mean":
        weights = torch.arange(first + 1, first + len(tokens) + 1)
        return sum(w * t for w, t in zip(weights, tokens, strict=True)) / weights.sum()
    if mode == "max":
        return torch.stack([column.max() for column in tokens.T])
    return {"cls": tokens[0], "last": tokens[-1]}.get(mode, tokens.mean(0))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompts", [None, [0, 2, 3]])
def test_pooling_equals_a_loop_over_texts_with_gradients(mode, prompts):
    _, mask = padded([1, 5, 8])
    hidden = torch.randn(3, 8, 4, requires_grad=True)
    got = pool(hidden, pooled_tokens(mask, mode, prompts and torch.tensor(prompts)), mode)
    starts = prompts or [0, 0, 0]
    texts = [hidden[i, start:length] for i, (start, length) in enumerate(zip(starts, [1, 5, 8], strict=True))]
    want = torch.stack([naive(tokens, mode, start) for tokens, start in zip(texts, starts, strict=True)])
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(*(torch.autograd.grad(x, hidden, torch.ones_like(x))[0] for x in (got, want)))


@pytest.mark.parametrize("mode", ["mean", "max", "weighted_mean"])
def test_several_spans_a_text_are_pooled_each_as_a_text_of_its_own(mode):
    hidden, spans = torch.randn(2, 6, 4), torch.rand(2, 3, 6) < 0.5
    spans[1, 2] = False
    got = pool(hidden, spans, mode)
    assert got.shape == (2, 3, 4)
    for s in range(3):
        torch.testing.assert_close(got[:, s], pool(hidden, spans[:, s], mode))


@pytest.mark.parametrize("mode", ["mean", "max", "weighted_mean", "last"])
def test_a_text_of_nothing_but_its_prompt_is_the_zero_vector_with_finite_gradients(mode):
    _, mask = padded([3])
    hidden = torch.randn(1, 3, 4, requires_grad=True)
    vector = pool(hidden, pooled_tokens(mask, mode, torch.tensor([3])), mode)
    vector.sum().backward()
    assert vector.abs().sum() == 0
    assert hidden.grad.abs().sum() == 0


def test_token_dropout_hides_a_share_and_never_every_pooled_token():
    torch.manual_seed(0)
    _, mask = padded([1, 2, 50] * 400)
    pooled = pooled_tokens(mask, "mean", None)
    hidden_mask, hidden_pooled = hide_tokens(mask, pooled, 0.4, "mean")
    assert hidden_pooled.any(1).all()
    assert torch.equal(hidden_mask.bool(), hidden_pooled)
    assert hidden_mask[2::3].float().mean() == pytest.approx(0.6, abs=0.02)
    assert not torch.equal(hide_tokens(mask, pooled, 0.9, "max")[1], pooled)
    last = pooled_tokens(mask, "last", None)
    mask_last, kept_last = hide_tokens(mask, last, 0.9, "last")
    assert torch.equal(kept_last, last)
    assert mask_last[last].all()
