"""`gyre data plan`: the rows of one global batch, before anything is trained."""

from __future__ import annotations

import contextlib
import tempfile
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.config import Recipe
from cluster.paths import find_run, run_home
from data_services.schema import Column, UsageError

if TYPE_CHECKING:
    import pyarrow as pa

    from data_services.assemble import GlobalBatch
    from data_services.order import Plan
    from data_services.schema import Kinds, Tokenize
    from data_services.store import StoredSource


@dataclass(frozen=True)
class PlannedRow:
    """A row of the batch: where it is stored, what it says, which worker gets it, the tokens of what it shows.

    query, positive  texts; of images and sounds what they are
    """

    source: str
    row: int
    id: str
    worker: int
    tokens: int
    query: str
    positive: str


@dataclass(frozen=True)
class PlannedBatch:
    """A global batch, in the plan's order.

    steps       of the whole run
    weights     of each source at this step
    duplicates  rows that share their query or a positive with a row before them: the loss masks each other's
    clusters    how many rows are of which cluster, of a plan of neighbours
    tokens      of each worker
    """

    step: int
    steps: int
    weights: dict[str, float]
    rows: list[PlannedRow]
    duplicates: int
    tokens: list[int]
    clusters: dict[int, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def planned_batch(recipe: Recipe, step: int, workers: int | None = None, run: str | None = None) -> PlannedBatch:
    """What training would see at a step, with as many workers as the recipe has or `workers`.

    run  takes the tokenizer of this run; else it is made as for training. Raises UsageError for a step that the
         plan doesn't have.
    """
    from data_services.sources import open_source
    from data_services.stream import plan_of, reader_of

    root = run_home(recipe.cluster.storage)
    world_size, data = workers or recipe.cluster.workers, recipe.data
    if world_size > data.batch:
        raise UsageError(f"--workers {world_size} is more than data.batch ({data.batch}): every worker needs a query")
    sources = tuple(open_source(source, root) for source in data.sources)
    plan = plan_of(data, sources, recipe.seed)
    if not 0 <= step < plan.steps:
        raise UsageError(f"--step {step}: the plan has steps 0 … {plan.steps - 1}")
    kinds = [source.kinds for source in sources]
    with _tokenizer(recipe, sources, root, run) as tokenize:
        reader = reader_of(data, plan, sources, tokenize)
        return _described(plan, kinds, *reader.records(step), reader(step), world_size)


@contextlib.contextmanager
def _tokenizer(recipe: Recipe, sources: tuple[StoredSource, ...], root: Path, run: str | None) -> Iterator[Tokenize]:
    """That of a run, or the one that training would make, in a folder that goes with it."""
    from cluster.models.folder import tokenizer_of
    from cluster.prepare import make_model_folder

    if run is not None:
        yield tokenizer_of(find_run(run, root).model)
        return
    with tempfile.TemporaryDirectory(prefix="gyre-plan-") as folder:
        make_model_folder(recipe, Path(folder) / "model", sources, root)
        yield tokenizer_of(Path(folder) / "model")


def _described(
    plan: Plan, kinds: Sequence[Kinds], table: pa.Table, keys: np.ndarray, batch: GlobalBatch, workers: int
) -> PlannedBatch:
    """kinds: of the plan's sources"""
    from data_services.assemble import SOURCE_SHIFT, choose_positive
    from data_services.collate import deal, token_costs
    from data_services.media.checks import readable
    from data_services.order import Carried, duplicate_rows

    table = table.take(np.flatnonzero(np.isin(keys, batch.rows)))  # less what can't be decoded
    costs = token_costs(batch)
    worker = np.empty(len(costs), np.int64)
    for rank, share in enumerate(deal(costs, workers)):
        worker[share] = rank
    positives = table.column(Column.POSITIVES).to_pylist()
    chosen = choose_positive(np.array([len(texts) for texts in positives]), batch.rows, batch.step, plan.seed)
    names, weights = [source.name for source in plan.sources], plan.weights(batch.step)
    ids, queries = (table.column(name).to_pylist() for name in (Column.ID, Column.QUERY))
    rows = [
        PlannedRow(
            source=names[key >> SOURCE_SHIFT],
            row=key & (1 << SOURCE_SHIFT) - 1,
            id=ids[i],
            worker=int(worker[i]),
            tokens=int(costs[i]),
            query=str(readable(queries[i], kinds[key >> SOURCE_SHIFT].query)),
            positive=str(readable(positives[i][chosen[i]], kinds[key >> SOURCE_SHIFT].document)),
        )
        for i, key in enumerate(batch.rows.tolist())
    ]
    lists = table.column(Column.POSITIVE_IDS).to_pylist()
    flat = np.array([x for one in lists for x in one], np.int64)
    shared = duplicate_rows(Carried.of(batch.query_ids, flat, np.array([len(one) for one in lists])))
    tokens = np.bincount(worker, weights=costs, minlength=workers).astype(int).tolist()
    clusters: Counter[int] = Counter(table.column(Column.CLUSTER).to_pylist()) if plan.neighbours else Counter()
    of_cluster = dict(sorted(clusters.items()))
    return PlannedBatch(batch.step, plan.steps, weights, rows, len(shared), tokens, of_cluster)
