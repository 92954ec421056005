"""A tower of the user's own does what the recipe asks of a tower, or is refused by the key that it leaves out."""

from dataclasses import replace

import pytest
from torch import nn

from data_services.schema import UsageError
from tests.trainers.encoders.tiny import TINY, train_tokenizer
from trainers.config import AdapterConfig, ModelConfig
from trainers.encoders.custom import checked
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.spec import ModelSpec
from trainers.encoders.text import TextEncoder, build_encoder

PLAIN = ModelConfig(config=TINY, max_tokens=40, encoder="mine:tower")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    place = tmp_path_factory.mktemp("custom") / "model"
    prepare_model_folder(PLAIN, place, train_tokenizer)
    return place


def asking(**keys) -> ModelConfig:
    return PLAIN.model_copy(update=keys)


# what the recipe asks of the model beside PLAIN, and what is said of a tower that knows PLAIN alone
LEFT_OUT = {
    "packing": ({"packing": "on"}, "model.packing: on, but mine:tower returned an encoder that pads"),
    "lora": ({"adapter": AdapterConfig()}, "model.adapter: mine:tower returned an encoder without lora"),
    "dora": ({"adapter": AdapterConfig(kind="dora")}, "without dora"),
    "token dropout": ({"token_dropout": 0.1}, "model.token_dropout: 0.1, but mine:tower returned an encoder with 0.0"),
    "checkpointing": ({"gradient_checkpointing": True}, "model.gradient_checkpointing: true, but mine:tower returned"),
    "freezing": ({"freeze": ["backbone.embed_tokens.*"]}, "that trains backbone.embed_tokens.weight"),
    "attention": ({"attention": "sdpa"}, "model.attention: sdpa, but mine:tower returned an encoder whose attention"),
}


@pytest.mark.parametrize(("keys", "told"), LEFT_OUT.values(), ids=LEFT_OUT)
def test_a_tower_that_leaves_out_what_the_recipe_asks_is_refused(folder, keys, told):
    spec, recipe = ModelSpec.load(folder), asking(**keys)
    with pytest.raises(UsageError, match=told):
        checked(build_encoder(PLAIN, folder), recipe, spec)
    checked(build_encoder(recipe, folder), recipe, spec)


def test_a_tower_without_the_dropout_or_with_another_pooling_is_refused(folder):
    spec, made = ModelSpec.load(folder), build_encoder(PLAIN, folder)
    with pytest.raises(UsageError, match=r"model.config.dropout: 0.1, but mine:tower returned an encoder with 0.0"):
        checked(TextEncoder(made.backbone, replace(spec, added_dropout=0.0)), PLAIN, spec)
    other = TextEncoder(made.backbone, replace(spec, pooling="cls"), dropout=spec.added_dropout)
    with pytest.raises(UsageError, match="returned an encoder with pooling cls, and the model folder says mean"):
        checked(other, PLAIN, spec)


def test_something_else_and_a_weight_that_no_export_holds_are_refused(folder):
    spec, made = ModelSpec.load(folder), build_encoder(PLAIN, folder)
    with pytest.raises(UsageError, match="mine:tower returned a Linear; it must return a TextEncoder"):
        checked(nn.Linear(2, 2), PLAIN, spec)
    assert checked(made, PLAIN, spec) is made
    made.gate = nn.Linear(2, 2)
    with pytest.raises(UsageError, match=r"has the weight gate.weight, which an export can't hold"):
        checked(made, PLAIN, spec)
