"""Padding-free encoding: what is packed equals what is padded, vectors and gradients, and what can't be is refused."""

import pytest
import torch
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

from data_services.schema import UsageError
from tests.trainers.encoders.tiny import tiny
from trainers.config import AdapterConfig, ModelConfig
from trainers.encoders import packed
from trainers.encoders.adapters import add_adapter
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.packed import Layout, jagged, prepare, run, text_by_text
from trainers.encoders.spec import ModelSpec
from trainers.encoders.text import TextEncoder

VOCABULARY, WIDTH = 90, 32
LENGTHS = [9, 1, 12, 9, 0, 4]
PACKED = ModelConfig(path="a folder", packing="on")


def backbone_of(architecture, causal=False, **sizes):
    from transformers import AutoConfig, AutoModel

    common = {
        "vocab_size": VOCABULARY,
        "hidden_size": WIDTH,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "max_position_embeddings": 40,
        "pad_token_id": 1,
        "bos_token_id": 1,
        "eos_token_id": 1,
    }
    config = AutoConfig.for_model(architecture, **common | sizes)
    config.use_cache = False
    if not causal:
        config.is_causal = False
    torch.manual_seed(0)
    model = AutoModel.from_config(config, attn_implementation="eager")
    with torch.no_grad():
        for p in model.parameters():  # weights as they are initialised make every token nearly the same
            p.add_(torch.randn_like(p) * 0.15)
    return model


GROUPED = {"num_key_value_heads": 2, "head_dim": 8}
WINDOW = GROUPED | {"sliding_window": 3}
QWEN_WINDOW = WINDOW | {"use_sliding_window": True, "max_window_layers": 1}
BOTH_KINDS = ["sliding_attention", "full_attention"]
ARCHITECTURES = {
    "qwen3": ("qwen3", False, GROUPED),
    "qwen3 causal": ("qwen3", True, GROUPED),
    "qwen3 causal, one layer with a window": ("qwen3", True, QWEN_WINDOW),
    "llama": ("llama", False, GROUPED),
    "mistral with a window": ("mistral", False, WINDOW),
    "mistral causal with a window": ("mistral", True, WINDOW),
    "gemma": ("gemma", False, GROUPED),
    "gemma2 causal, window and soft cap": (
        "gemma2",
        True,
        WINDOW | {"attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 8},
    ),
    "gemma3 both ways with a window": (
        "gemma3_text",
        True,
        WINDOW | {"use_bidirectional_attention": True, "query_pre_attn_scalar": 8, "layer_types": BOTH_KINDS},
    ),
    "bert": ("bert", True, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "roberta": ("roberta", True, {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}),
    "modernbert with a window": ("modernbert", True, {"local_attention": 4, "global_attn_every_n_layers": 2}),
}


def texts(lengths=LENGTHS):
    mask = (torch.arange(max(lengths)) < torch.tensor(lengths)[:, None]).long()
    generator = torch.Generator().manual_seed(1)
    return torch.randint(3, VOCABULARY, mask.shape, generator=generator) * mask, mask


def outcome(model, packing, ids, mask):
    """Token vectors where there are tokens, and the gradients of all weights for a random upstream one."""
    model.zero_grad()
    hidden = run(model, ids, mask, packing).last_hidden_state
    generator = torch.Generator().manual_seed(2)
    upstream = torch.randn(hidden.shape, generator=generator).to(hidden) * mask[:, :, None]
    hidden.backward(upstream)
    return hidden.detach() * mask[:, :, None], {name: p.grad for name, p in model.named_parameters()}


def vectors_of(model, ids, mask):
    return run(model, ids, mask, packed=True).last_hidden_state


def check_equal(a, b):
    torch.testing.assert_close(a[0], b[0], rtol=1e-5, atol=1e-5)
    for name, gradient in b[1].items():
        if gradient is None or a[1][name] is None:
            assert a[1][name] is gradient, name
        else:
            scale = max(1.0, float(gradient.abs().max()))
            torch.testing.assert_close(a[1][name], gradient, rtol=1e-5, atol=1e-5 * scale, msg=name)


@pytest.mark.parametrize("holes", [False, True])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_packed_texts_have_the_vectors_and_gradients_of_padded_ones(name, holes):
    architecture, causal, sizes = ARCHITECTURES[name]
    model, (ids, mask) = backbone_of(architecture, causal, **sizes).train(), texts()
    if holes:  # as token dropout leaves them; no text loses its first token
        mask = mask * (torch.rand(mask.shape, generator=torch.Generator().manual_seed(3)) > 0.3)
        mask[:4, 0] = 1
    padded = outcome(model, False, ids, mask)
    assert prepare(model, PACKED)
    check_equal(outcome(model, True, ids, mask), padded)


def test_texts_do_not_see_each_other_and_their_order_does_not_matter():
    model, (ids, mask) = backbone_of("qwen3", **GROUPED).eval(), texts()
    prepare(model, PACKED)
    together = vectors_of(model, ids, mask)
    changed = ids.clone()
    changed[0, :9] += 1
    other = vectors_of(model, changed, mask)
    assert not torch.allclose(other[0], together[0], atol=1e-2)
    assert torch.equal(other[1:], together[1:])
    order = torch.tensor([3, 5, 4, 0, 2, 1])
    torch.testing.assert_close(vectors_of(model, ids[order], mask[order]), together[order])


def test_a_layout_by_hand():
    layout = Layout.of(torch.tensor([[1, 1, 0], [0, 0, 0], [1, 0, 1], [1, 0, 0]]))
    assert layout.lengths == [1, 2, 2]
    assert layout.runs == [(1, 1), (2, 2)]
    assert layout.places.tolist() == [9, 0, 1, 6, 8]
    assert layout.positions.tolist() == [0, 0, 1, 0, 2]
    assert layout.bounds.tolist() == [0, 1, 3, 5]


def test_a_chunk_without_tokens_runs_and_its_vectors_take_no_part(tmp_path):
    model = backbone_of("qwen3", **GROUPED)
    prepare(model, PACKED)
    ids, mask = texts([1, 1])
    hidden = vectors_of(model, ids, mask * 0)
    assert hidden.shape == (2, 1, WIDTH)
    hidden.sum().backward()


def dense(query, key, value, lengths, causal):
    """Naive twin: each text by itself, in float64."""
    mixed = []
    for q, k, v in zip(*(x.double().split(lengths) for x in (query, key, value)), strict=True):
        scores = torch.einsum("ihd,jhd->hij", q, k)
        if causal:
            scores = scores.masked_fill(torch.ones(scores.shape[1:]).triu(1).bool(), -torch.inf)
        mixed.append(torch.einsum("hij,jhd->ihd", scores.softmax(-1), v))
    return torch.cat(mixed)


@pytest.mark.parametrize(
    ("kernel", "causal"),
    [("text_by_text", False), ("text_by_text", True), ("jagged", False)],  # on a CPU torch has no causal jagged one
)
def test_kernels_equal_each_text_by_itself(kernel, causal):
    torch.manual_seed(0)
    layout = Layout.of(texts()[1])
    parts = [torch.randn(sum(layout.lengths), 2, 8, requires_grad=True) for _ in range(3)]
    if kernel == "jagged":
        got = jagged(*parts, layout, causal)
    else:
        function = (lambda b, h, q, k: k <= q) if causal else (lambda b, h, q, k: q >= 0)
        pattern = packed.Pattern(function, False, torch.float32)
        assert pattern.shape(layout) == ("causal" if causal else "all")
        got = text_by_text(*parts, layout, pattern.biases(layout))
    want = dense(*parts, layout.lengths, causal)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
    upstream = torch.randn_like(got)
    gradients = torch.autograd.grad(got, parts, upstream), torch.autograd.grad(want, parts, upstream.double())
    for ours, theirs in zip(*gradients, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


# the encoder


def encoders(**keys):
    """Two encoders of the same weights, padded and packed."""
    made = []
    for packing in (False, True):
        model = backbone_of("qwen3", **GROUPED)
        spec = ModelSpec("qwen3", "mean", True, 40, {"query": "find", "document": ""}, False, WIDTH)
        packing = packing and prepare(model, PACKED)
        encoder = TextEncoder(model, spec, **keys)
        encoder.packed = packing
        made.append(encoder)
    return made


@pytest.mark.parametrize("mode", ["mean", "cls", "last"])
def test_prompts_stay_out_of_pooling_and_hidden_tokens_out_of_attention(mode):
    ids, mask = texts([9, 3, 12])
    results = []
    for encoder in encoders(token_dropout=0.3):
        object.__setattr__(encoder.spec, "pooling", mode)
        torch.manual_seed(4)
        vectors = encoder.train()(TowerInputs(ids, mask, torch.tensor([2, 1, 0])))
        vectors.backward(torch.linspace(-1, 1, vectors.numel()).view(vectors.shape))
        results.append((vectors, {name: p.grad for name, p in encoder.named_parameters()}))
    check_equal(results[1], results[0])


def test_dropout_works_on_packed_texts_and_is_replayed_by_the_generator():
    _, encoder = encoders(dropout=0.2)
    ids, mask = texts([9, 3, 12])

    def train(seed):
        torch.manual_seed(seed)
        return encoder.train()(TowerInputs(ids, mask, torch.zeros(3, dtype=torch.int64)))

    assert torch.equal(train(1), train(1))
    assert not torch.allclose(train(1), train(2), atol=1e-3)


def test_a_pretrained_encoder_is_the_same_packed(minilm):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(minilm, add_pooling_layer=False, attn_implementation="eager").eval()
    ids, mask = texts([9, 3, 30])
    padded = outcome(model, False, ids, mask)
    assert prepare(model, PACKED)
    check_equal(outcome(model, True, ids, mask), padded)


def test_an_adapted_backbone_is_the_same_packed():
    results = []
    for packing in (False, True):
        model = backbone_of("qwen3", **GROUPED)
        packing = packing and prepare(model, PACKED)
        torch.manual_seed(0)
        add_adapter(model, AdapterConfig(targets=["q_proj", "v_proj"]))
        results.append(outcome(model, packing, *texts()))
    assert any("lora_B" in name and gradient.any() for name, gradient in results[0][1].items())
    check_equal(*results)


@pytest.mark.parametrize(
    "keys",
    [
        {},
        {"mean_layers": 2},
        {"layers": [1, -1]},
        {"bidirectional": False},
        {"gradient_checkpointing": True},
        {"pooling": "tokens", "token_dropout": 0.0},
    ],
)
def test_an_encoder_of_a_recipe_is_the_same_packed(tmp_path, keys):
    padded, _ = tiny(tmp_path / "m", **{"token_dropout": 0.2} | keys)
    encoder, _ = tiny(tmp_path / "m", packing="on", **{"token_dropout": 0.2} | keys)
    assert (padded.packed, encoder.packed) == (False, True)
    encoder.dropout.p = padded.dropout.p = 0.0
    results = []
    for each in (padded, encoder):
        torch.manual_seed(4)
        vectors = each.train()(TowerInputs(*texts([9, 3, 0, 30])))
        vectors.backward(torch.linspace(-1, 1, vectors.numel()).view(vectors.shape))
        results.append((vectors, {name: p.grad for name, p in each.named_parameters()}))
    check_equal(*results)


def test_operations_per_token_are_counted_as_they_are_done():
    """Of texts of one length; a third of the count is the forward pass. Norms count as matrices there: 2 %."""
    _, encoder = encoders()
    lengths = [10] * 7 + [0]
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        encoder.eval()(TowerInputs(*texts(lengths), torch.zeros(8, dtype=torch.int64)))
    pooling = 2 * 8 * 10 * WIDTH
    forward = counter.get_total_flops() - pooling
    assert forward == pytest.approx(sum(lengths) * encoder.flops_per_token(10) / 3, rel=0.02)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["qwen3", "qwen3 causal", "mistral with a window", "bert"])
def test_packed_texts_have_the_vectors_and_gradients_of_padded_ones_on_a_gpu(name, dtype):
    architecture, causal, sizes = ARCHITECTURES[name]
    model = backbone_of(architecture, causal, **sizes).train()
    ids, mask = (x.cuda() for x in texts())
    want = outcome(model.cuda(), False, ids, mask)
    assert prepare(model.cpu(), PACKED)
    vectors, gradients = outcome(model.cuda().to(dtype), True, ids, mask)
    tolerance = 1e-4 if dtype == torch.float32 else 5e-2
    assert (vectors - want[0]).norm() < tolerance * want[0].norm()
    for name, gradient in want[1].items():
        if gradient is not None:
            assert (gradients[name] - gradient).norm() < tolerance * gradient.norm() + 1e-6, name


# what is refused


def test_what_cannot_be_packed_is_refused_by_name():
    with pytest.raises(UsageError, match=r"model.packing: on, but model.attention is sdpa"):
        prepare(backbone_of("qwen3", **GROUPED), ModelConfig(path="x", packing="on", attention="sdpa"))
    mamba = {"state_size": 4, "pad_token_id": 0}
    with pytest.raises(UsageError, match=r"on, but transformers lets nobody replace the attention of mamba"):
        prepare(backbone_of("mamba", **mamba), PACKED)


def test_an_architecture_that_mixes_neighbours_is_found_by_value():
    class Leaking(torch.nn.Module):
        """Adds to each token the one before it in the row."""

        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, *arguments, **named):
            mixed, weights = self.inner(*arguments, **named)
            return mixed + F.pad(mixed, (0, 0, 1, -1)), weights

    model = backbone_of("qwen3", **GROUPED)
    model.layers[0].self_attn = Leaking(model.layers[0].self_attn)
    with pytest.raises(UsageError, match=r"model.packing: on, but qwen3 mixes texts that share a row"):
        prepare(model, PACKED)


def test_a_packed_backbone_takes_no_padded_texts():
    model = backbone_of("qwen3", **GROUPED)
    prepare(model, PACKED)
    ids, mask = texts()
    with pytest.raises(ValueError, match="layout is needed"):
        model(input_ids=ids, attention_mask=mask)


def test_off_and_auto_leave_the_backbone_as_it_is():
    model = backbone_of("qwen3", **GROUPED)
    for packing in ("off", "auto"):
        assert not prepare(model, ModelConfig(path="x", packing=packing))
        assert model.config._attn_implementation == "eager"
