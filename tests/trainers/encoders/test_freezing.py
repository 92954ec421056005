"""Weights that training leaves alone, and layers that are computed again."""

import pytest
import torch

from data_services.schema import UsageError
from tests.trainers.encoders.tiny import TINY, of, padded, tiny, train_tokenizer
from trainers.config import ModelConfig
from trainers.encoders.freezing import frozen_names
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.model_folder import prepare_model_folder


def test_weights_whose_names_match_a_pattern_are_frozen(tmp_path):
    encoder, _ = tiny(tmp_path / "m", head={"sizes": [8]}, freeze=["backbone.embed_tokens.*", "*.layers.0.*"])
    frozen = {name for name, p in encoder.named_parameters() if not p.requires_grad}
    names = {name for name, _ in encoder.named_parameters()}
    assert frozen == {name for name in names if "embed_tokens" in name or ".layers.0." in name}
    assert "readout.head.0.weight" in names - frozen


@pytest.mark.parametrize(
    ("patterns", "message"),
    [
        (["b.x", "b.laers.*"], r"b.laers.\* matches no weight; the nearest names are b.layers.1, b.layers.0, b.x"),
        (["*"], r"\* leaves no weight to train"),
    ],
)
def test_patterns_that_freeze_nothing_or_everything_are_refused(patterns, message):
    with pytest.raises(UsageError, match="model.freeze: " + message):
        frozen_names(["b.x", "b.layers.0", "b.layers.1"], patterns)


def test_patterns_are_checked_when_the_model_folder_is_made(tmp_path):
    config = ModelConfig(config=TINY, head={"sizes": [8]}, freeze=["readout.head.1.*"])
    with pytest.raises(UsageError, match=r"readout.head.1.\* matches no weight; the nearest names are readout.head.0"):
        prepare_model_folder(config, tmp_path / "m", train_tokenizer)


@pytest.mark.parametrize("architecture", ["qwen3", "bert"])
def test_gradient_checkpointing_gives_the_same_gradients_with_dropout_and_keeps_less(tmp_path, architecture):
    kept, gradients = [], []
    ids, mask = padded([30, 40])
    for recompute in (False, True):
        tower = of(architecture).model_copy(update={"dropout": 0.3})
        encoder, _ = tiny(tmp_path / "m", tower, gradient_checkpointing=recompute, pooling="mean")
        torch.manual_seed(3)
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, saved=saved: saved.append(t) or t, lambda t: t):
            vectors = encoder.train()(TowerInputs(ids, mask))
        vectors.backward(torch.linspace(-1, 1, vectors.numel()).view_as(vectors))
        kept.append(sum(t.numel() for t in saved))
        gradients.append([p.grad for p in encoder.parameters()])
    for plain, recomputed in zip(*gradients, strict=True):
        torch.testing.assert_close(plain, recomputed)
    assert kept[1] < kept[0] / 2


def test_an_architecture_that_cannot_recompute_is_refused(tmp_path, monkeypatch):
    from transformers import Qwen3Model

    monkeypatch.setattr(Qwen3Model, "supports_gradient_checkpointing", False)
    with pytest.raises(UsageError, match=r"model.gradient_checkpointing: qwen3 can't do it"):
        tiny(tmp_path / "m", gradient_checkpointing=True)
