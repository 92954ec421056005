"""What AdamW is told: which parameters decay, and the learning rate of a step."""

from __future__ import annotations

import math
from typing import Any

from torch import nn

from trainers.config import OptimizerConfig
from trainers.objectives.sections.numbers import ends_of, value_at


def learning_rate(config: OptimizerConfig, step: int, total_steps: int) -> float:
    """Rate of step 0, 1, ...: linear warm-up that reaches `lr` at its last step, then a cosine to its floor.

    A pure function of the step, so a resumed run needs no scheduler state.
    """
    highest = value_at(config.lr, step / total_steps)
    if step < config.warmup_steps:
        return highest * (step + 1) / config.warmup_steps
    progress = min(1.0, (step - config.warmup_steps) / max(1, total_steps - config.warmup_steps))
    return highest * (config.min_lr_share + (1 - config.min_lr_share) * 0.5 * (1 + math.cos(math.pi * progress)))


def parameter_groups(model: nn.Module, config: OptimizerConfig) -> list[dict[str, Any]]:
    """Trainable parameters in groups: matrices, which decay; norms and biases; embedding tables.

    An embedding table stays one where an output layer shares it. `lr_share` of a group is what its learning rate is
    of `config.lr`, of its first value where that changes.
    """
    modules = [m for m in model.modules() if not isinstance(m, nn.Embedding)]
    tables = {id(m.weight) for m in model.modules() if isinstance(m, nn.Embedding)}
    norms = {id(p) for m in modules if "norm" in type(m).__name__.lower() for p in m.parameters(recurse=False)}
    matrices: dict[str, Any] = {"params": [], "weight_decay": config.weight_decay, "lr_share": 1.0}
    spared: dict[str, Any] = {"params": [], "weight_decay": 0.0, "lr_share": 1.0}
    embeddings = spared
    if config.embedding_lr is not None:
        embeddings = {"params": [], "weight_decay": 0.0, "lr_share": config.embedding_lr / ends_of(config.lr)[0]}
    for name, p in model.named_parameters():
        if p.requires_grad:
            decays = p.ndim >= 2 and id(p) not in norms and not name.endswith("bias")
            group = embeddings if id(p) in tables else matrices if decays else spared
            group["params"].append(p)
    groups = [matrices, spared] if embeddings is spared else [matrices, spared, embeddings]
    return [group for group in groups if group["params"]]
