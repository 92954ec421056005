"""A recipe's choices: what its model says unless the recipe does, and what doesn't go together."""

import json

import pytest

from data_services.schema import UsageError
from tests.trainers.encoders.tiny import TINY, of, tiny, train_tokenizer
from trainers.config import ModelConfig
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.spec import Dense, Latent, ModelSpec


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"token_dim": 8}, "model.token_dim: is for pooling tokens, and it is mean"),
        ({"query_length": 8}, "model.query_length: is for pooling tokens"),
        ({"skip_punctuation": True}, "model.skip_punctuation: is for pooling tokens"),
        ({"latent": {"count": 4}}, "model.latent: is for pooling latent, and it is mean"),
        (
            {"pooling": "latent", "latent": {"heads": 5}},
            "model.latent.heads: 32 hidden units can't be dealt to 5 heads",
        ),
        ({"pooling": "tokens", "head": {"sizes": [4]}}, "model.head: pooling tokens has model.token_dim"),
        ({"pooling": "tokens", "layers": [1, 2]}, "model.layers: pooling tokens"),
        ({"pooling": "tokens", "token_dropout": 0.1}, "model.token_dropout: pooling tokens keeps them all"),
        ({"pooling": "tokens", "query_prompt": "q", "pool_prompt": False}, "model.pool_prompt: false, but pooling"),
        ({"pooling": "tokens", "query_length": 50}, "model.query_length: 50 is more than max_tokens 40"),
        ({"layers": [1]}, r"model.layers: \[1\] of a model of 2 layers; give rising numbers .* 2 or -1"),
        ({"layers": [2, 1, 2]}, "model.layers:"),
        ({"layers": [-4, -1]}, "model.layers:"),
        ({"layers": [1, 2], "mean_layers": 2}, "model.layers: has no meaning beside mean_layers"),
        ({"mean_layers": 4}, "model.mean_layers: 4, but the model has 2 layers"),
        (
            {"task_prompts": {"sts": {"query": "so long a prompt " * 9}}},
            "model.task_prompts: sts-query of .* tokens leave",
        ),
        ({"pool_prompt": False}, "model.pool_prompt: there is no prompt"),
    ],
)
def test_choices_that_do_not_go_together_are_refused_by_name_and_leave_no_folder(tmp_path, keys, message):
    with pytest.raises(UsageError, match=message):
        tiny(tmp_path / "m", **keys)
    assert not (tmp_path / "m").exists()


def test_queries_cannot_be_filled_up_without_a_token_to_do_it(tmp_path):
    def without_mask(vocabulary, folder):
        train_tokenizer(vocabulary, folder)
        file = folder / "tokenizer_config.json"
        settings = json.loads(file.read_text())
        settings.pop("mask_token")
        file.write_text(json.dumps(settings))

    config = ModelConfig(config=TINY, pooling="tokens", query_length=8)
    with pytest.raises(UsageError, match=r"model.query_length: the tokenizer has neither a mask token nor"):
        prepare_model_folder(config, tmp_path / "m", without_mask)


def test_a_head_without_width_is_refused():
    with pytest.raises(ValueError, match="a layer of 0 outputs"):
        ModelConfig(config=TINY, head={"sizes": [4, 0]})


def test_a_head_widens_and_narrows_with_an_activation_behind_each_layer(tmp_path):
    head = {"sizes": [64, 8], "activation": "gelu", "last_activation": "tanh", "bias": False}
    _, spec = tiny(tmp_path / "m", head=head)
    assert spec.head == (Dense(32, 64, False, "gelu"), Dense(64, 8, False, "tanh"))
    assert spec.dim == 8


def test_prompts_stand_under_the_names_of_field_and_task(tmp_path):
    tasks = {"sts": {"query": "same: "}, "qa": {"query": "ask: ", "document": "answer: "}}
    _, spec = tiny(tmp_path / "m", query_prompt="find: ", task_prompts=tasks)
    named = {"sts-query": "same: ", "qa-query": "ask: ", "qa-document": "answer: "}
    assert spec.prompts == {"query": "find: ", "document": ""} | named


@pytest.mark.parametrize(
    "keys",
    [
        {"pooling": "latent", "layers": [1, 2]},
        {"head": {"sizes": [4, 2], "use": "training"}, "normalize": False},
        {"tower": of("bert"), "pooling": "tokens", "query_length": 9, "skip_punctuation": True, "token_dim": 4},
    ],
)
def test_a_spec_is_read_as_it_was_written(tmp_path, keys):
    _, spec = tiny(tmp_path / "m", **keys)
    assert ModelSpec.load(tmp_path / "m") == spec


def test_latent_attention_has_the_published_sizes_unless_told(tmp_path):
    _, spec = tiny(tmp_path / "m", pooling="latent")
    assert spec.latent == Latent(512, 8)
