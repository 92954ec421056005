"""The same run without Ray: what its workers compute when nothing but torch.distributed starts them."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def plain_run(recipe: Path, home: Path) -> tuple[Any, Any]:
    """A prepared run and its task, for workers that Ray has no part in."""
    from cluster.config import load_recipe
    from cluster.prepare import prepare
    from cluster.worker import Task

    ready = prepare(load_recipe(recipe), home, None)
    return ready, Task(ready.recipe, ready.run, ready.plan.steps, ready.lineage())


def train_without_ray(task: Any, reader: Any) -> int:
    """On a rank: the whole run; the step reached."""
    import torch.distributed as dist

    from cluster.worker import train_on_worker
    from data_services.stream import LocalStream

    budget = task.recipe.engine.budget_tokens
    return train_on_worker(task, LocalStream(reader, dist.get_world_size(), dist.get_rank(), budget))
