"""A finished run's evidence: every model over the same candidates, each split a task of the cluster."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cluster.config import Recipe
from cluster.paths import RunPaths
from cluster.prepare import Prepared

if TYPE_CHECKING:
    import numpy as np

    from data_services.store import StoredSource


@dataclass(frozen=True)
class Scored:
    """rows: {"bm25" | "bm25_tuned" | "untrained" | "trained": {metric: value}}; over_bm25: see TrainResult."""

    rows: dict[str, dict[str, float]]
    over_bm25: dict[str, float]


def score_everywhere(ready: Prepared) -> dict[str, Scored]:
    """The scores of each split of the recipe, by split."""
    import ray

    cluster = ready.recipe.cluster
    task = ray.remote(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)(score_split)
    asked = {split: task.remote(ready.recipe, ready.run, split, pool) for split, pool in ready.pools.items()}
    return {split: ray.get(reference) for split, reference in asked.items()}


def score_split(recipe: Recipe, run: RunPaths, split: str, pool: StoredSource) -> Scored:
    """BM25, the model before training and after it. Per-query values go to the run's folder, for comparisons."""
    from cluster.baselines import untrained
    from cluster.models import exported_encoder
    from data_services.sources import retrieval_pool
    from evaluation.retrieval import bm25_rows, evaluate_encoder
    from evaluation.significance import paired_bootstrap

    queries, documents, relevant = retrieval_pool(pool)
    scores = bm25_rows(queries, documents, relevant, recipe.evaluation)
    for name, encoder in {"untrained": untrained(recipe, run), "trained": exported_encoder(run.export)}.items():
        scores[name] = evaluate_encoder(encoder, queries, documents, relevant, recipe.evaluation.k)
    save_per_query(run, split, queries, {name: s.per_query for name, s in scores.items()})
    metric = f"ndcg@{recipe.evaluation.k}"
    difference = paired_bootstrap(scores["trained"].per_query[metric], scores["bm25"].per_query[metric])
    return Scored({name: s.metrics for name, s in scores.items()}, asdict(difference))


def save_per_query(run: RunPaths, split: str, queries: list[str], values: dict[str, dict[str, np.ndarray]]) -> None:
    """evaluation/SPLIT.parquet: a row a query, a column `model metric` each."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns = {f"{model} {metric}": x for model, row in values.items() for metric, x in row.items()}
    path = run.evaluation(split)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"query": queries, **columns}), path)
