"""A worker's device, and workers that begin with the same weights."""

from __future__ import annotations

import os

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
