"""A trial seen from outside: the validation split, scored by the trial's own workers with the model as exported."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.prepare import Prepared

if TYPE_CHECKING:
    from cluster.worker import Training
    from data_services.schema import Encoder, Item
    from trainers.collectives import Group


def validate(training: Training, ready: Prepared, queries: int | None) -> dict[str, float]:
    """Every metric of the validation split, of the model that would be exported now. Collective.

    queries  how many of the split's are scored, None: all; against every candidate

    Each worker encodes its share of the texts. Training's random state is afterwards what it was.
    """
    import torch

    from cluster.models.folder import exported_encoder
    from data_services.sources import retrieval_pool
    from evaluation.retrieval import evaluate_encoder

    recipe, folder, group = ready.recipe, ready.run.root / "validated", training.group
    pool = retrieval_pool(ready.pools[recipe.evaluation.validation or ""])
    asked = spread(len(pool.queries), queries)
    device = training.step.engine.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        training.write_model(folder, recipe.momentum.export)
        encoder = SharedEncoder(exported_encoder(folder, str(device)), group)
        relevant = [pool.relevant[i] for i in asked]
        scores = evaluate_encoder(
            encoder, [pool.queries[i] for i in asked], pool.documents, relevant, recipe.evaluation.k
        )
    group.barrier()
    if group.rank == 0:
        shutil.rmtree(folder)
    return scores.metrics


def spread(count: int, most: int | None) -> list[int]:
    """Positions of `most` of `count`, evenly spread, the same for every trial; all of them for None."""
    if most is None or most >= count:
        return list(range(count))
    return [i * count // most for i in range(most)]


class SharedEncoder:
    """An `Encoder` over all workers: each encodes every W-th text and has all vectors afterwards. Collective."""

    def __init__(self, encoder: Encoder, group: Group) -> None:
        self._encoder: Any = encoder
        self._group = group
        self.gives_tokens = getattr(encoder, "gives_tokens", False)

    def encode(self, texts: Sequence[Item], field: str) -> np.ndarray:
        own = self._encoder.encode(texts[self._group.rank :: self._group.size], field)
        vectors = np.empty((len(texts), own.shape[1]), own.dtype)
        for rank, part in enumerate(self._group.gather_objects(own)):
            vectors[rank :: self._group.size] = part
        return vectors

    def encode_tokens(self, texts: Sequence[Item], field: str) -> list[np.ndarray]:
        own = self._encoder.encode_tokens(texts[self._group.rank :: self._group.size], field)
        vectors: list[np.ndarray] = [np.empty(0)] * len(texts)
        for rank, part in enumerate(self._group.gather_objects(own)):
            vectors[rank :: self._group.size] = part
        return vectors
