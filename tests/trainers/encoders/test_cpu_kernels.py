"""The CPU's own kernels are the functions they replace."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from tests.trainers.encoders.tiny import padded, tiny
from trainers.encoders import cpu_kernels
from trainers.encoders.backbone import load_backbone
from trainers.encoders.inputs import TowerInputs
from trainers.encoders.text import TextEncoder


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
    inputs = TowerInputs(*padded([5, 17]))
    gradient = torch.randn(2, 32)
    for encoder in (fast, plain):
        encoder(inputs).backward(gradient)
    torch.testing.assert_close(fast(inputs), plain(inputs), rtol=1e-5, atol=1e-6)
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
