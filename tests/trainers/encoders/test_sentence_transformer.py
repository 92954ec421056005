"""Reading Sentence Transformers folders."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from data_services.schema import UsageError
from trainers.config import ModelConfig
from trainers.encoders.model_folder import prepare_model_folder
from trainers.encoders.sentence_transformer import read_settings, read_weights
from trainers.encoders.spec import Dense, ModelSpec


def test_a_sentence_transformers_folder_says_pooling_length_and_prompts(minilm, tmp_path):
    spec = prepare_model_folder(ModelConfig(path=str(minilm)), tmp_path / "m")
    assert (spec.architecture, spec.pooling, spec.max_tokens, spec.dim) == ("bert", "mean", 256, 384)
    assert spec.prompts == {"query": "", "document": ""}
    assert spec.bidirectional
    assert ModelSpec.load(tmp_path / "m") == spec
    config = ModelConfig(path=str(minilm), max_tokens=100, pooling="cls", query_prompt="q: ", pool_prompt=False)
    spec = prepare_model_folder(config, tmp_path / "m")
    assert (spec.max_tokens, spec.pooling, spec.prompts["query"], spec.pool_prompt) == (
        100,
        "cls",
        "q: ",
        False,
    )


def st_folder(folder: Path, kinds=("Transformer", "Pooling"), bert=None, general=None, **settings) -> Path:
    """A folder of these modules, each with the config that `settings` gives under its name."""
    listed = []
    for i, kind in enumerate(kinds):
        place = folder / (f"{i}_{kind}" if i else "")
        place.mkdir(parents=True, exist_ok=True)
        listed.append({"idx": i, "path": place.name if i else "", "type": f"x.{kind}"})
        (place / "config.json").write_text(json.dumps(settings.get(kind, {})))
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "sentence_bert_config.json").write_text(json.dumps(bert or {}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(general or {}))
    return folder


def test_settings_are_read_in_their_old_and_new_forms(tmp_path):
    new = {"pooling_mode": "lasttoken", "include_prompt": False}
    prompts = {"prompts": {"query": "q: ", "passage": "p: ", "sts-query": "s: "}}
    settings = read_settings(st_folder(tmp_path, Pooling=new, bert={"max_seq_length": 77}, general=prompts))
    assert (settings.pooling, settings.pool_prompt, settings.max_tokens) == ("last", False, 77)
    assert settings.prompts == prompts["prompts"] | {"document": "p: "}
    old = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    default = {"prompts": {"any": "a: "}, "default_prompt_name": "any"}
    settings = read_settings(st_folder(tmp_path, Pooling=old, general=default))
    assert (settings.pooling, settings.pool_prompt, settings.max_tokens) == ("cls", True, None)
    assert settings.prompts == {"any": "a: ", "query": "a: ", "document": "a: "}
    assert read_settings(tmp_path / "1_Pooling") is None


DENSE = {"in_features": 4, "out_features": 3, "activation_function": "torch.nn.modules.activation.Tanh"}
TOKENS = ("Transformer", "Dense", "MultiVectorMask", "Normalize")


def test_projections_are_read_with_their_activations(tmp_path):
    settings = read_settings(st_folder(tmp_path, ("Transformer", "Pooling", "Dense", "Dense"), Dense=DENSE))
    assert settings.head == (Dense(4, 3, True, "tanh"),) * 2
    assert settings.normalize  # cosine similarity, or none named: as well normalised


@pytest.mark.parametrize("similarity", ["dot", "dot_product"])
def test_a_model_that_compares_by_dot_product_is_left_unnormalised(tmp_path, similarity):
    assert not read_settings(st_folder(tmp_path, general={"similarity_fn_name": similarity})).normalize
    whole = ("Transformer", "Pooling", "Normalize")
    assert read_settings(st_folder(tmp_path, whole, general={"similarity_fn_name": similarity})).normalize


def test_late_interaction_is_read_with_what_counts_as_a_token(tmp_path):
    source = {"module_input_name": "token_embeddings"}
    mask = {"skiplist_words": ["!", "."], "skiplist_tasks": ["document"]}
    expansion = {"query_expansion": {"strategy": "min", "attend": True, "length": 32}}
    folder = st_folder(tmp_path, TOKENS, expansion, Dense=DENSE | source, MultiVectorMask=mask, Normalize=source)
    settings = read_settings(folder)
    assert (settings.pooling, settings.query_length, settings.skipped) == ("tokens", 32, ["!", "."])
    assert settings.normalize
    assert settings.pool_prompt
    assert not read_settings(st_folder(tmp_path, TOKENS[:3], Dense=DENSE)).normalize


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"kinds": ("Transformer", "Pooling", "LayerNorm")}, "the modules Transformer, Pooling, LayerNorm; gyre reads"),
        ({"kinds": ("Transformer", "Dense", "Pooling")}, "the modules Transformer, Dense, Pooling; gyre reads"),
        ({"Pooling": {"pooling_mode": ["mean", "max"]}}, r"pools by mean \+ max"),
        ({"Pooling": {"pooling_mode_mean_sqrt_len_tokens": True}}, "pools by mean_sqrt_len_tokens"),
        ({"bert": {"do_lower_case": True}}, "do_lower_case"),
        ({"bert": {"query_length": 32}}, "query_length"),
        ({"kinds": TOKENS, "bert": {"query_expansion": {"strategy": "fixed", "length": 32}}}, "expands queries by"),
        ({"kinds": TOKENS, "MultiVectorMask": {"skiplist_tasks": ["query"]}}, "MultiVectorMask that gyre can't"),
        ({"kinds": TOKENS, "Normalize": {}}, "normalises sentence_embedding"),
        ({"kinds": TOKENS, "Dense": DENSE | {"use_residual": True}}, "Dense module with a residual"),
        ({"kinds": TOKENS, "Dense": DENSE | {"activation_function": "my.Swish"}}, "activation my.Swish"),
    ],
)
def test_what_a_text_encoder_cannot_express_is_refused_by_name(tmp_path, keys, message):
    usual = {"Dense": DENSE, "Normalize": {"module_input_name": "token_embeddings"}}
    with pytest.raises(UsageError, match=message):
        read_settings(st_folder(tmp_path, **usual | keys))


def test_projections_without_safetensors_are_refused(tmp_path):
    settings = read_settings(st_folder(tmp_path, ("Transformer", "Pooling", "Dense"), Dense=DENSE))
    with pytest.raises(UsageError, match=r"2_Dense/model.safetensors is missing; gyre loads no pickles"):
        read_weights(settings)


def test_layers_of_unequal_weight_are_refused(tmp_path):
    kinds = ("Transformer", "WeightedLayerPooling", "Pooling")
    folder, file = st_folder(tmp_path, kinds), tmp_path / "1_WeightedLayerPooling" / "model.safetensors"
    save_file({"layer_weights": torch.ones(3)}, file)
    assert read_settings(folder).mean_layers == 3
    save_file({"layer_weights": torch.tensor([1.0, 2.0])}, file)
    with pytest.raises(UsageError, match="weighs its layers differently"):
        read_settings(folder)
