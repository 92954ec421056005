"""Which tokens see which: every decoder family of note both ways, or an error that says which layers can't."""

import pytest
import torch

from data_services.schema import UsageError
from tests.trainers.encoders.tiny import of, padded, tiny
from trainers.encoders.backbone import load_backbone
from trainers.encoders.direction import set_direction


@pytest.mark.parametrize("attention", ["auto", "eager", "sdpa"])
@pytest.mark.parametrize("bidirectional", [True, False])
def test_a_later_token_changes_earlier_ones_only_when_bidirectional(tmp_path, attention, bidirectional):
    encoder, spec = tiny(
        tmp_path / "m",
        bidirectional=bidirectional,
        attention=attention,
        pooling="cls" if bidirectional else "last",
    )
    assert spec.bidirectional == bidirectional
    ids, mask = padded([9, 6])
    changed = ids.clone()
    changed[1, 5] += 1
    hidden, other = (encoder.backbone(input_ids=x, attention_mask=mask).last_hidden_state for x in (ids, changed))
    assert torch.equal(hidden[1, :5], other[1, :5]) != bidirectional
    assert torch.equal(hidden[0], other[0])


FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "gemma3_text"]


@pytest.mark.parametrize("bidirectional", [True, False])
@pytest.mark.parametrize("family", FAMILIES)
def test_in_every_layer_of_every_family_each_token_attends_to_what_it_should(tmp_path, family, bidirectional):
    tiny(tmp_path / "m", of(family), bidirectional=bidirectional, pooling="last")
    backbone = load_backbone(tmp_path / "m", "eager").eval()
    ids, mask = padded([6])
    attended = backbone(input_ids=ids, attention_mask=mask, output_attentions=True).attentions
    assert len(attended) == 2
    for weights in attended:  # [1, h, 6, 6]
        assert (weights.tril() > 0).sum() == weights.shape[1] * 21
        assert ((weights.triu(1) > 0).sum() == weights.shape[1] * 15) == bidirectional
        assert (weights.triu(1) == 0).all() != bidirectional


def model_of(architecture, **sizes):
    from transformers import AutoConfig, AutoModel

    usual = {"vocab_size": 50, "hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2}
    ids = {"pad_token_id": 0, "bos_token_id": 0, "eos_token_id": 0}
    return AutoModel.from_config(AutoConfig.for_model(architecture, **usual | ids | sizes))


def test_a_sliding_window_reaches_both_ways_and_no_further(tmp_path):
    model = model_of("mistral", num_key_value_heads=2, intermediate_size=24, num_hidden_layers=1, sliding_window=2)
    assert set_direction(model, True)
    ids, mask = padded([9], vocabulary=50)
    changed = ids.clone()
    changed[0, 4] += 1
    before, after = (model(input_ids=x, attention_mask=mask).last_hidden_state[0] for x in (ids, changed))
    moved = (before - after).abs().amax(1) > 1e-6
    assert moved.nonzero().flatten().tolist() == [2, 3, 4, 5, 6]


@pytest.mark.parametrize(
    ("architecture", "sizes", "where"),
    [
        ("mamba", {"state_size": 4}, "dropped;"),
        ("rwkv", {"attention_hidden_size": 16}, "dropped;"),
        (
            "lfm2",
            {"num_key_value_heads": 2, "layer_types": ["conv", "full_attention"]},
            r"dropped in 1 of its 2 layers \(layers.0, …\);",
        ),
    ],
)
def test_recurrent_layers_are_found_alone_and_between_layers_of_attention(architecture, sizes, where):
    model = model_of(architecture, **sizes)
    assert not set_direction(model, None)
    assert not set_direction(model, False)
    with pytest.raises(
        UsageError, match=f"model.bidirectional: true, but the causal order of {architecture} can't be {where}"
    ):
        set_direction(model, True)


def test_an_encoder_cannot_be_made_causal(tmp_path):
    with pytest.raises(UsageError, match=r"model.bidirectional: false, but bert attends both ways"):
        tiny(tmp_path / "m", of("bert"), bidirectional=False)
