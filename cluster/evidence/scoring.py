"""A finished run's evidence: every model over the same candidates, each split a task of the cluster."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING

from cluster.config import Recipe
from cluster.paths import RunPaths
from cluster.prepare import Prepared

if TYPE_CHECKING:
    import numpy as np

    from data_services.items import Item, Kinds
    from data_services.sources import RetrievalPool
    from data_services.store import StoredSource
    from evaluation.retrieval import EvaluationConfig, Scores
    from evaluation.vectors import Vectors


@dataclass(frozen=True)
class Scored:
    """rows: {"bm25" | "bm25_tuned" | "untrained" | "trained": {metric: value}}, of pairs of two kinds also those of
    `evaluation.both_ways`; the others: see TrainResult, over_bm25 is empty where there is no BM25."""

    rows: dict[str, dict[str, float]]
    over_bm25: dict[str, float]
    geometry: dict[str, dict[str, float]]
    probes: dict[str, dict[str, float]]


def score_everywhere(ready: Prepared) -> dict[str, Scored]:
    """The scores of each split of the recipe, by split."""
    import ray

    cluster = ready.recipe.cluster
    task = ray.remote(num_cpus=cluster.cpus_per_worker, num_gpus=cluster.gpus_per_worker)(score_split)
    asked = {s: task.remote(ready.recipe, ready.run, s, pool, ready.sources[0]) for s, pool in ready.pools.items()}
    return {split: ray.get(reference) for split, reference in asked.items()}


def score_split(recipe: Recipe, run: RunPaths, split: str, pool: StoredSource, training: StoredSource) -> Scored:
    """The baselines, the model before training and after it. Per-query values, and what a report shows, go to the run's
    folder.

    training  what a baseline of images looks at
    """
    from cluster.evidence.baselines import untrained
    from cluster.models.folder import exported_encoder
    from data_services.sources import retrieval_pool
    from evaluation.both_ways import every_way
    from evaluation.look import look
    from evaluation.significance import paired_bootstrap
    from evaluation.vectors import Remembered
    from trainers.checkpoint import write_json

    queries, documents, relevant = task = retrieval_pool(pool)
    scores = baselines(task, pool.kinds, training, recipe.evaluation)
    models = {
        "untrained": Remembered(untrained(recipe, run)),
        "trained": Remembered(exported_encoder(run.export)),
    }
    for name, encoder in models.items():
        scores |= every_way(name, encoder, queries, documents, relevant, recipe.evaluation)
    save_per_query(run, split, queries, {name: s.per_query for name, s in scores.items()})
    metric = f"ndcg@{recipe.evaluation.k}"
    seen = look({name: (encoder, scores[name]) for name, encoder in models.items()}, *task, metric)
    write_json(run.look(split), seen.model_dump(mode="json"))
    rows = {name: s.metrics for name, s in scores.items()}
    over_bm25 = {}
    if "bm25" in scores:
        difference = paired_bootstrap(scores["trained"].per_query[metric], scores["bm25"].per_query[metric])
        over_bm25 = asdict(difference)
    asked = recipe.evaluation
    probes = {name: _probed(encoder.vectors, task, pool) for name, encoder in models.items()} if asked.classes else {}
    return Scored(rows, over_bm25, seen.geometry if asked.geometry else {}, probes)


def _probed(vectors: Vectors, task: RetrievalPool, pool: StoredSource) -> dict[str, float]:
    from data_services.sources import pool_classes
    from evaluation.probes import probe_accuracies

    side, classes = pool_classes(pool)
    return probe_accuracies(vectors.of(task.queries if side == "query" else task.documents, side), classes)


def baselines(
    task: RetrievalPool, kinds: Kinds, training: StoredSource, evaluation: EvaluationConfig
) -> dict[str, Scores]:
    """What needs no model: BM25 between texts, the nearest pixels from texts to images; of other kinds nothing."""
    from data_services.fronts import thumbnails
    from data_services.items import TEXT, Kinds
    from data_services.sources import retrieval_pool
    from evaluation.both_ways import pixel_rows
    from evaluation.retrieval import bm25_rows

    if kinds == TEXT:
        return bm25_rows(*task, evaluation)
    if kinds != Kinds("text", "image") or training.kinds != kinds:
        return {}
    known = retrieval_pool(training)
    first = [known.documents[min(its)] for its in known.relevant]
    pictures = thumbnails(task.documents), thumbnails(first)
    return pixel_rows(task.queries, pictures[0], task.relevant, known.queries, pictures[1], evaluation)


def save_per_query(run: RunPaths, split: str, queries: list[Item], values: dict[str, dict[str, np.ndarray]]) -> None:
    """evaluation/SPLIT.parquet: a row a query (its id where it is no text), a column `model metric` each; of rows of
    the way back, which have other queries, none."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    from data_services.items import item_id
    from evaluation.both_ways import BACK, BY_PROMPTS

    there = {model: row for model, row in values.items() if not model.endswith((BACK, BY_PROMPTS))}
    columns = {f"{model} {metric}": x for model, row in there.items() for metric, x in row.items()}
    names = [query if isinstance(query, str) else f"{item_id(query):x}" for query in queries]
    path = run.evaluation(split)
    path.parent.mkdir(exist_ok=True)
    pq.write_table(pa.table({"query": names, **columns}), path)
