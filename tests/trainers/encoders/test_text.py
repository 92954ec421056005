"""The text tower: unit vectors, dropout, what the loss sees and what is exported, texts in batches."""

import copy

import numpy as np
import pytest
import torch

from data_services.tokenizer import FolderTokenizer
from tests.trainers.encoders.tiny import TEXTS, TINY, of, padded, tiny, train_tokenizer
from trainers.config import ModelConfig
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.local import LocalEncoder
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.text import build_encoder


def test_vectors_are_unit_and_do_not_depend_on_padding_or_neighbours(qwen):
    encoder, _ = qwen
    ids, mask = padded([3, 9, 20])
    together = encoder(TowerInputs(ids, mask))
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    for i, length in enumerate([3, 9, 20]):
        alone = encoder(TowerInputs(ids[i : i + 1, :length], mask[i : i + 1, :length]))
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-6)


def test_a_text_of_no_tokens_is_the_zero_vector_with_finite_gradients(qwen):
    encoder, _ = qwen
    ids, mask = padded([0, 3])
    vectors = encoder(TowerInputs(ids, mask))
    vectors.sum().backward()
    assert vectors[0].abs().sum() == 0
    assert all(torch.isfinite(p.grad).all() for p in encoder.parameters())
    encoder.zero_grad()


def test_weights_come_from_the_torch_generator_and_preparing_leaves_it_alone(tmp_path):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    config = ModelConfig(config=TINY)
    prepare_model_folder(config, tmp_path / "m", train_tokenizer)
    assert torch.equal(before, torch.get_rng_state())
    first, second = build_encoder(config, tmp_path / "m"), build_encoder(config, tmp_path / "m")
    torch.manual_seed(5)
    again = build_encoder(config, tmp_path / "m")
    weights = [next(iter(e.state_dict().values())) for e in (first, second, again)]
    assert torch.equal(weights[0], weights[2])
    assert not torch.equal(weights[0], weights[1])


def test_dropout_is_replayed_by_the_generator_and_gone_in_evaluation(tmp_path):
    encoder, spec = tiny(tmp_path / "m", token_dropout=0.2)
    assert spec.added_dropout == TINY.dropout
    ids, mask = padded([12, 30])

    def train(seed):
        torch.manual_seed(seed)
        return encoder.train()(TowerInputs(ids, mask))

    assert torch.equal(train(1), train(1))
    assert not torch.allclose(train(1), train(2), atol=1e-3)
    encoder.eval()
    assert torch.equal(encoder(TowerInputs(ids, mask)), encoder(TowerInputs(ids, mask)))
    encoder.train().token_dropout, encoder.dropout.p = 0.0, 0.0
    torch.testing.assert_close(encoder(TowerInputs(ids, mask)), encoder.eval()(TowerInputs(ids, mask)))


def test_an_architecture_with_its_own_dropout_gets_none_added(tmp_path):
    encoder, spec = tiny(tmp_path / "m", of("bert"))
    assert spec.added_dropout == 0
    assert encoder.backbone.config.hidden_dropout_prob == TINY.dropout
    assert not [name for name, _ in encoder.named_parameters() if "pooler" in name]


def test_flops_per_token_by_hand(qwen):
    encoder, _ = qwen
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    norms = 2 * (2 * 32 + 2 * 16) + 32
    assert encoder.flops_per_token(10) == 6 * (matrices + norms) + 12 * 2 * 10 * 32


def test_frozen_weights_cost_less_and_nothing_goes_back_below_the_lowest_trained_one(qwen):
    encoder = copy.deepcopy(qwen[0]).requires_grad_(False)
    layer, final_norm = 4 * 32 * 32 + 3 * 32 * 48 + 2 * 32 + 2 * 16, 32
    attention = 12 * 2 * 10 * 32
    assert encoder.flops_per_token(10) == 2 * (2 * layer + final_norm) + attention
    encoder.backbone.layers[1].requires_grad_()
    assert encoder.flops_per_token(10) == 2 * layer + 6 * layer + 4 * final_norm + attention
    encoder.backbone.layers[1].requires_grad_(False)
    encoder.backbone.get_input_embeddings().requires_grad_()
    assert encoder.flops_per_token(10) == 4 * (2 * layer + final_norm) + attention


def test_local_encoder_keeps_the_order_of_the_texts_and_the_budget(qwen, tmp_path):
    encoder, spec = qwen
    tiny(tmp_path / "m")
    tokenize = FolderTokenizer(tmp_path / "m", spec.max_tokens, spec.prompts)
    texts = TEXTS * 3
    small, large = (LocalEncoder(encoder, tokenize, budget).encode(texts, "query") for budget in (50, 10**6))
    np.testing.assert_allclose(small, large, atol=1e-6)
    one_by_one = [LocalEncoder(encoder, tokenize).encode([text], "query")[0] for text in texts]
    np.testing.assert_allclose(small, one_by_one, atol=1e-6)
    assert LocalEncoder(encoder, tokenize).encode([], "query").shape == (0, 32)


def test_leaving_the_prompt_out_of_pooling_needs_its_length(tmp_path):
    encoder, _ = tiny(tmp_path / "m", query_prompt="find: ", pool_prompt=False)
    ids, mask = padded([8])
    with pytest.raises(ValueError, match="prompt_tokens"):
        encoder(TowerInputs(ids, mask))
    without = encoder(TowerInputs(ids, mask, torch.tensor([3])))
    assert not torch.allclose(without, encoder(TowerInputs(ids, mask, torch.tensor([0]))))
