"""What AdamW is told: which parameters decay, and the learning rate of a step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from trainers.config import OptimizerConfig


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up that reaches `lr` at its last step, then a cosine to its floor.

    A pure function of the step, so a resumed run needs no scheduler state.
    """
    if step < config.warmup_steps:
        return config.lr * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return config.lr * (config.min_lr_share + (1 - config.min_lr_share) * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Trainable parameters in two groups: matrices, which decay, and norms, biases and embedding tables.

    An embedding table stays one where an output layer shares it.
    """
    spared = {
        id(p)
        for module in model.modules()
        if isinstance(module, nn.Embedding) or "norm" in type(module).__name__.lower()
        for p in module.parameters(recurse=False)
    }
    groups: list[dict[str, Any]] = [
        {"params": [], "weight_decay": weight_decay},
        {"params": [], "weight_decay": 0.0},
    ]
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and id(p) not in spared and not name.endswith("bias")
            groups[0 if decays else 1]["params"].append(p)
    return [group for group in groups if group["params"]]
