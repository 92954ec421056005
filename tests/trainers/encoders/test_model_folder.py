"""Model folders: what they refuse."""

import json
import shutil

import pytest

from data_services.schema import UsageError
from tests.trainers.encoders.tiny import TINY, tiny, train_tokenizer
from trainers.config import ModelConfig
from trainers.encoders.model_folder import prepare_model_folder


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"path": "no/such-model"}, "model.path: 'no/such-model' is neither a folder"),
        ({"config": {"architecture": "qwen33"}}, "did you mean 'qwen3'"),
        ({"config": {"hidden": 30, "heads": 4}}, "model.config.heads: 30 hidden units over 4 heads"),
        ({"query_prompt": "one two three four five six seven", "max_tokens": 5}, "model.query_prompt: its"),
        ({"pool_prompt": False}, "model.pool_prompt: there is no prompt"),
        ({"init_from": "/nowhere"}, "/nowhere"),
    ],
)
def test_recipes_that_cannot_be_honoured_are_refused_and_leave_no_folder(tmp_path, keys, message):
    tower = {} if "path" in keys else {"config": TINY.model_dump() | keys.pop("config", {})}
    with pytest.raises(UsageError, match=message):
        prepare_model_folder(ModelConfig(**tower, **keys), tmp_path / "m", train_tokenizer)
    assert not (tmp_path / "m").exists()


def test_more_tokens_than_positions_are_refused(minilm, tmp_path):
    with pytest.raises(UsageError, match=r"model.max_tokens: 600 is more than the 512 positions"):
        prepare_model_folder(ModelConfig(path=str(minilm), max_tokens=600), tmp_path / "m")


def test_pickled_weights_are_refused(minilm, tmp_path):
    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((minilm / "config.json").read_text())
    (source / "pytorch_model.bin").write_bytes(b"")
    with pytest.raises(UsageError, match="no safetensors weights"):
        prepare_model_folder(ModelConfig(path=str(source)), tmp_path / "m")


class Malicious:
    """Unpickled, it leaves a file."""

    def __init__(self, proof):
        self.proof = proof

    def __reduce__(self):
        return open, (str(self.proof), "w")


def _poisoned(folder, proof):
    """Every name under which a library would look for pickled weights."""
    import pickle

    for name in ("pytorch_model.bin", "adapter_model.bin", "model.pt", "pytorch_model-00001-of-00001.bin"):
        (folder / name).write_bytes(pickle.dumps(Malicious(proof)))
    index = {"metadata": {}, "weight_map": {"x": "pytorch_model-00001-of-00001.bin"}}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index))


def test_a_malicious_pickle_is_refused_and_never_run(minilm, tmp_path):
    source, proof = tmp_path / "source", tmp_path / "was-run"
    shutil.copytree(minilm, source, ignore=shutil.ignore_patterns("*.safetensors", "*.bin"))
    _poisoned(source, proof)
    with pytest.raises(UsageError, match="no safetensors weights; convert them, gyre loads no pickles"):
        prepare_model_folder(ModelConfig(path=str(source)), tmp_path / "m")
    assert not (tmp_path / "m").exists()
    shutil.copy(minilm / "model.safetensors", source / "model.safetensors")
    prepare_model_folder(ModelConfig(path=str(source)), tmp_path / "m")  # beside safetensors it is left aside
    assert not list((tmp_path / "m").glob("*.bin"))
    assert not proof.exists()


def test_a_pickled_adapter_is_refused_and_never_run(tmp_path):
    from trainers.encoders.adapters import CONFIG_FILE, load_adapted

    folder, proof = tmp_path / "adapter", tmp_path / "was-run"
    folder.mkdir()
    (folder / CONFIG_FILE).write_text(json.dumps({"base_model_name_or_path": "base"}))
    _poisoned(folder, proof)
    with pytest.raises(UsageError, match=r"has no adapter_model\.safetensors; convert the adapter"):
        load_adapted(folder, "eager", False)
    assert not proof.exists()


def test_weights_that_would_begin_at_random_are_refused(minilm, tmp_path):
    from safetensors.torch import load_file, save_file

    source = tmp_path / "source"
    source.mkdir()
    (source / "config.json").write_text((minilm / "config.json").read_text())
    weights = load_file(minilm / "model.safetensors")
    del weights["encoder.layer.2.output.dense.bias"]
    save_file(weights, source / "model.safetensors", {"format": "pt"})
    with pytest.raises(UsageError, match=r"lacks 1 weights of its BertModel, encoder.layer.2.output.dense.bias"):
        prepare_model_folder(ModelConfig(path=str(source)), tmp_path / "m")


def test_an_attention_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"model.attention: flash_attention_2"):
        tiny(tmp_path / "m", attention="flash_attention_2")
