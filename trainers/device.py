"""A worker's device, and workers that begin with the same weights."""

from __future__ import annotations

import os
import platform
from typing import Literal

import torch
import torch.distributed as dist
from torch import nn


def prepare_device(device: torch.device | str | None, deterministic: bool) -> torch.device:
    """The worker's own device, the GPU of its LOCAL_RANK or the CPU; on a GPU with deterministic kernels if asked."""
    if device is None:
        cuda = torch.cuda.is_available()
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}" if cuda else "cpu"
    device = torch.device(device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
        if deterministic:
            os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
            torch.backends.cudnn.benchmark = False
            torch.use_deterministic_algorithms(True)
    return device


def fast_bf16(device: torch.device | str) -> bool:
    """Whether the hardware has bf16 products. A CPU that has none emulates them, up to 90 times slower than fp32."""
    if torch.device(device).type != "cpu":
        return True
    if platform.machine() in ("arm64", "aarch64"):
        return torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def choose_precision(choice: Literal["auto", "bf16", "fp32"], device: torch.device) -> Literal["bf16", "fp32"]:
    """`engine.precision`; auto is bf16 where every worker's hardware has it, else fp32. Collective."""
    if choice != "auto":
        return choice
    fast = torch.tensor([fast_bf16(device)], dtype=torch.float32, device=device)
    dist.all_reduce(fast, dist.ReduceOp.MIN)
    return "bf16" if fast.item() else "fp32"


@torch.no_grad()
def agree(model: nn.Module, device: torch.device) -> None:
    """Every worker takes rank 0's weights, in fp32, and buffers, so that seeds need not match."""
    for p in model.parameters():
        p.data = p.data.float()
    if dist.get_world_size() > 1:
        for tensor in [*model.parameters(), *model.buffers()]:
            shared = tensor.detach().to(device, copy=True).contiguous()
            dist.broadcast(shared, src=0)
            tensor.data.copy_(shared)
