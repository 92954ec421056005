"""What follows the backbone, from its definition, and what of it is kept."""

import pytest
import torch
from torch.nn import functional as F

from tests.trainers.encoders.tiny import padded, tiny
from trainers.encoders.heads import ACTIVATIONS, Head
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.latent_attention import LatentAttention
from trainers.encoders.sentence_transformer import ACTIVATIONS as NAMES
from trainers.encoders.spec import Dense


def naive_latent_attention(module: LatentAttention, token: torch.Tensor, heads: int) -> torch.Tensor:
    """One token [H], head by head."""
    width = len(token) // heads
    key, value = module.key_value(module.latent_norm(module.latents)).split(len(token), dim=1)
    query, seen = module.query(module.norm(token)), []
    for h in range(heads):
        part = slice(h * width, (h + 1) * width)
        scores = torch.stack([query[part] @ k for k in key[:, part]]) / width**0.5
        seen.append(sum(p * v for p, v in zip(scores.softmax(0), value[:, part], strict=True)))
    token = token + module.out(torch.cat(seen))
    wide = module.widen(module.feed_norm(token))
    content, gate = wide[: 4 * len(token)], wide[4 * len(token) :]
    return token + module.narrow(content * gate * (1 + torch.erf(gate / 2**0.5)) / 2)


def test_latent_attention_equals_a_loop_over_tokens_and_heads_with_gradients():
    torch.manual_seed(0)
    module = LatentAttention(8, count=5, heads=2).double()
    hidden = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    got = module(hidden)
    want = torch.stack([torch.stack([naive_latent_attention(module, token, 2) for token in text]) for text in hidden])
    torch.testing.assert_close(got, want)
    inputs, upstream = [hidden, *module.parameters()], torch.randn_like(got)
    gradients = (torch.autograd.grad(x, inputs, upstream) for x in (got, want))
    for mine, naive in zip(*gradients, strict=True):
        torch.testing.assert_close(mine, naive)


def test_latent_pooling_is_the_mean_of_what_tokens_saw(tmp_path):
    encoder, spec = tiny(tmp_path / "m", pooling="latent", latent={"count": 3, "heads": 2})
    assert (spec.latent.count, spec.latent.heads) == (3, 2)
    ids, mask = padded([2, 6])
    hidden = encoder.readout.latent(encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state)
    means = torch.stack([hidden[0, :2].mean(0), hidden[1].mean(0)])
    torch.testing.assert_close(encoder(TowerInputs(ids, mask)), F.normalize(means, dim=1))


@pytest.mark.parametrize("activation", ACTIVATIONS)
def test_a_head_is_its_linear_layers_and_activations(activation):
    head = Head([Dense(4, 3, True, activation), Dense(3, 2, False, "tanh")])
    x = torch.randn(5, 4)
    inner = ACTIVATIONS[activation]()(x @ head[0].weight.T + head[0].bias)
    torch.testing.assert_close(head(x), torch.tanh(inner @ head[1].weight.T))
    assert head.bfloat16()(x).dtype == torch.float32


def test_activations_have_the_names_by_which_sentence_transformers_finds_them():
    assert {name: f"{kind.__module__}.{kind.__qualname__}" for name, kind in ACTIVATIONS.items()} == NAMES


def test_only_the_loss_sees_a_training_head_in_evaluation_mode_too(tmp_path):
    head = {"sizes": [32, 16], "last_activation": "tanh", "use": "training"}
    encoder, spec = tiny(tmp_path / "m", head=head)
    assert (encoder.dim, encoder.training_dim) == (32, 16)
    ids, mask = padded([4, 9])
    pooled = encoder.embed(TowerInputs(ids, mask))
    plain, _ = tiny(tmp_path / "plain")
    torch.testing.assert_close(pooled, plain(TowerInputs(ids, mask)))
    hidden = plain.backbone(input_ids=ids, attention_mask=mask).last_hidden_state
    means = torch.stack([text[: n.sum()].mean(0) for text, n in zip(hidden, mask, strict=True)])
    torch.testing.assert_close(encoder(TowerInputs(ids, mask)), F.normalize(encoder.readout.head(means), dim=1))
    assert spec.exported().head == ()


def test_vectors_keep_their_length_where_the_recipe_says_so(tmp_path):
    encoder, _ = tiny(tmp_path / "m", normalize=False)
    unit, _ = tiny(tmp_path / "unit")
    ids, mask = padded([4, 9])
    vectors = encoder(TowerInputs(ids, mask))
    assert not torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=0.1)
    torch.testing.assert_close(F.normalize(vectors, dim=1), unit(TowerInputs(ids, mask)))


def test_several_layers_stand_side_by_side_in_training_and_the_last_alone_is_kept(tmp_path):
    encoder, spec = tiny(tmp_path / "m", layers=[0, 1, -1], head={"sizes": [6]})
    assert spec.layers == (0, 1, 2)
    assert (encoder.dim, encoder.training_dim) == (6, 18)
    ids, mask = padded([4, 9])
    states = encoder.backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    parts = encoder(TowerInputs(ids, mask)).split(6, dim=1)
    for state, part in zip(states, parts, strict=True):
        torch.testing.assert_close(part, encoder.readout(state, mask.bool(), training=True))
    torch.testing.assert_close(parts[2], encoder.embed(TowerInputs(ids, mask)))
    torch.testing.assert_close(states[2], encoder.backbone(input_ids=ids, attention_mask=mask).last_hidden_state)


def test_the_mean_of_the_last_layers_is_taken_token_by_token(tmp_path):
    encoder, _ = tiny(tmp_path / "m", mean_layers=2)
    ids, mask = padded([4, 9])
    states = encoder.backbone(input_ids=ids, attention_mask=mask, output_hidden_states=True).hidden_states
    want = encoder.readout((states[1] + states[2]) / 2, mask.bool(), training=True)
    torch.testing.assert_close(encoder(TowerInputs(ids, mask)), want)
    torch.testing.assert_close(encoder.embed(TowerInputs(ids, mask)), want)
