"""The element-wise work of a small transformer on a CPU, with fewer passes over memory and fewer random draws.

In bf16 on one core a two-layer tower of width 256 spends half of its step outside matrix products. Three things
are cheap to avoid: a norm that is computed in fp32 copies, attention whose soft-max is written out in fp32, and a
dropout that draws one random number a unit. In fp32 all are the functions they replace, to rounding; in bf16 they
round at other places, by as much.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, eager_mask

ATTENTION = "gyre_cpu"


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """Eager attention: query [n, h, L, A], key and value [n, h or fewer, L, A], mask added to [n, h, L, L].

    The scale goes into the queries and the mask is added in place; the soft-max computes in fp32 inside but reads
    and writes the type of its input. Returns [n, L, h, A], as transformers' attention functions do.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    scores = torch.matmul(query * scale, key.transpose(2, 3))
    for bias in (attention_mask, position_bias):
        if bias is not None:
            scores += bias
    weights = nn.functional.dropout(scores.softmax(-1), dropout, module.training)
    return torch.matmul(weights, value).transpose(1, 2).contiguous(), None


AttentionInterface.register(ATTENTION, attention)
AttentionMaskInterface.register(ATTENTION, eager_mask)


class RMSNorm(torch.autograd.Function):
    """x [..., H], weight [H] -> x / sqrt(mean(x²) + eps) · weight (Zhang and Sennrich 2019), in the type of x.

    With n = x·r, r = rsqrt(mean(x²) + eps): dx = r·(g·w − n·mean(g·w·n)), dw = Σ g·n. The mean square is summed in
    fp32 at least; no fp32 copy of x is written.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True, dtype=torch.promote_types(x.dtype, torch.float32))
        rms = norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_().to(x.dtype)
        normal = x * rms
        ctx.save_for_backward(normal, weight, rms)
        return normal * weight

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor, None]:
        (gradient,) = gradients
        normal, weight, rms = ctx.saved_tensors
        product = (gradient * normal).reshape(-1, weight.shape[0])
        mean = torch.mv(product, weight).div_(weight.shape[0]).view(rms.shape)
        return (gradient * weight).addcmul_(normal, mean, value=-1).mul_(rms), product.sum(0), None


def fuse_norms(model: nn.Module) -> int:
    """Let `RMSNorm` compute every norm of the model that is one, probed by value; returns how many."""
    fused = 0
    for module in model.modules():
        if hasattr(module, "variance_epsilon") and _is_rms_norm(module):
            module.forward = MethodType(_forward, module)
            fused += 1
    return fused


def _forward(module: Any, hidden_states: Tensor) -> Tensor:
    return RMSNorm.apply(hidden_states, module.weight, module.variance_epsilon)


@torch.no_grad()
def _is_rms_norm(module: Any) -> bool:
    probe = torch.linspace(-1, 2, 3 * module.weight.shape[0], dtype=module.weight.dtype).view(3, -1)
    return torch.allclose(module(probe), _forward(module, probe), rtol=1e-5, atol=1e-6)


class Dropout(nn.Dropout):
    """nn.Dropout; on a CPU one random byte a unit decides, so that the share is a multiple of 1/256 there."""

    def forward(self, input: Tensor) -> Tensor:
        if not self.training or self.p == 0 or input.device.type != "cpu":
            return super().forward(input)
        dropped = max(1, round(self.p * 256))
        draws = torch.empty((input.numel() + 7) // 8, dtype=torch.int64).random_(-(2**63), None)
        bytes_ = draws.view(torch.uint8)[: input.numel()].view(input.shape)
        return input * (bytes_ >= dropped).to(input.dtype).mul_(256 / (256 - dropped))
