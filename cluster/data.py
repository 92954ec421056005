"""`gyre data stats|dedupe|split|cluster`: opens the sources, writes the results whole or not at all."""

from __future__ import annotations

import shutil
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cluster.paths import home
from data_services.mine import Progress
from data_services.rewrite import new_folder, publish, recipe_keys, rewrite_some
from data_services.schema import Column, RunError, UsageError, class_id
from data_services.sources import SourceConfig, open_source

if TYPE_CHECKING:
    from data_services.clustering import Side as ClusterBy
    from data_services.near_duplicates import By as SameBy
    from data_services.splitting import By as SideBy
    from data_services.statistics import CountTokens, SourceStats

DEDUPED, SPLIT, CLUSTERED = "_deduped.json", "_split.json", "_clustered.json"
_ANY_LENGTH = 1 << 30  # tokens: nothing is cut before it is counted


@dataclass(frozen=True)
class Written:
    """A written source. keys: as which a recipe reads its columns; counts: rows by what became of them."""

    folder: Path
    keys: dict[str, str]
    counts: dict[str, int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self) | {"folder": str(self.folder)}


def stats(
    source: SourceConfig,
    *,
    against: SourceConfig | None = None,
    near: float | None = 0.8,
    tokenizer: str | None = None,
    root: Path | None = None,
    on_progress: Progress = lambda what, done, of: None,
) -> SourceStats:
    """What is in a source. near: similarity from which on rows are near duplicates, None: only exact ones are sought;
    tokenizer: a MODEL whose tokens are counted, words without one."""
    from data_services.near_duplicates import find_duplicates
    from data_services.statistics import count_words, describe

    root = root or home()
    count = _count_tokens(tokenizer, root) if tokenizer else count_words
    opened, elsewhere = open_source(source, root), open_source(against, root) if against else None
    found = find_duplicates(opened, "pair", near, elsewhere, partial(on_progress, "comparing rows"))
    constants = [getattr(source, name) for name in Column.CLASSES]
    names = {class_id(name[1:]): name[1:] for name in constants if name and name.startswith("=")}
    return describe(opened, found, names, count)


def _count_tokens(model: str, root: Path) -> CountTokens:
    from cluster.models.reference import resolve
    from data_services.tokenizer import FolderTokenizer

    tokenizer = FolderTokenizer(resolve(model, root).folder, _ANY_LENGTH, {})
    return lambda texts, side: tokenizer(texts, side).lengths


def dedupe(
    source: SourceConfig,
    out: Path,
    *,
    by: SameBy = "pair",
    near: float | None = 0.8,
    against: SourceConfig | None = None,
    root: Path | None = None,
    on_progress: Progress = lambda what, done, of: None,
) -> Written:
    """The source without rows that repeat an earlier one, and without those that `against` holds.

    Raises UsageError where `out` is there and not empty, RunError where no row would be left.
    """
    from data_services.near_duplicates import find_duplicates

    root = root or home()
    opened, elsewhere = open_source(source, root), open_source(against, root) if against else None
    with ExitStack() as stack:
        making = new_folder(out)
        stack.callback(shutil.rmtree, making, ignore_errors=True)
        found = find_duplicates(opened, by, near, elsewhere, partial(on_progress, "comparing rows"))
        kept = rewrite_some(opened, making / "source", found.keep)
        if not kept:
            raise RunError(f"no row of {source.path} would be left: the evaluation source holds all of them")
        counts = {"kept": kept, "exact duplicates": found.exact, "near duplicates": found.near}
        counts |= {f"in {against.path}, {how}": n for how, n in (found.contaminated or {}).items()} if against else {}
        manifest = {"source": opened.fingerprint, "by": by, "near": near, "counts": counts}
        manifest |= {"against": elsewhere.fingerprint} if elsewhere else {}
        publish(making, out, manifest, DEDUPED)
    return Written(out.absolute(), recipe_keys(opened.columns), counts)


def split(
    source: SourceConfig,
    out: Path,
    shares: dict[str, float],
    *,
    by: SideBy = "query",
    seed: int = 0,
    root: Path | None = None,
) -> Written:
    """The source's rows dealt to sides, one folder each. Raises UsageError where a side gets none."""
    from data_services.splitting import write_split

    opened = open_source(source, root or home())
    with ExitStack() as stack:
        making = new_folder(out)
        stack.callback(shutil.rmtree, making, ignore_errors=True)
        counts = write_split(opened, shares, by, seed, making / "source")
        manifest = {"source": opened.fingerprint, "by": by, "seed": seed, "shares": shares, "counts": counts}
        publish(making, out, manifest, SPLIT)
    return Written(out.absolute(), recipe_keys(opened.columns), counts)


def cluster(
    model: str,
    source: SourceConfig,
    out: Path,
    clusters: int,
    *,
    by: ClusterBy = "query",
    seed: int = 0,
    workers: int | None = None,
    root: Path | None = None,
    on_progress: Progress = lambda what, done, of: None,
) -> Written:
    """The source's rows with the cluster of their query, or first positive, by a model's vectors; see `clustering`.

    Vectors are kept under the home, as those of a mining are. workers: that encode; None: as for `gyre embed`.
    """
    from cluster.embedding import vectors_of, workers_on
    from cluster.models.folder import fingerprint
    from cluster.models.reference import resolve
    from data_services import clustering
    from data_services.mining.texts import write_texts

    if not 2 <= clusters <= clustering.MOST_CLUSTERS:
        raise UsageError(f"--clusters {clusters}: between 2 and {clustering.MOST_CLUSTERS:,} can be made")
    root = root or home()
    opened, ref = open_source(source, root), resolve(model, root)
    of_model = fingerprint(ref.folder)
    with ExitStack() as stack:
        making = new_folder(out)
        stack.callback(shutil.rmtree, making, ignore_errors=True)
        texts = write_texts(making / "texts.arrow", [opened], [Column.QUERY if by == "query" else Column.POSITIVES])
        on = stack.enter_context(workers_on(workers, root))
        vectors = vectors_of(texts, by, ref.folder, of_model, root, on, on_progress)
        numbers = clustering.cluster(vectors, clusters, seed)
        clustering.write_clustered(opened, texts, by, numbers, making / "source")
        sizes = np.bincount(numbers, minlength=clusters)
        manifest = {"source": opened.fingerprint, "model": ref.name, "fingerprint": of_model, "by": by, "seed": seed}
        publish(making, out, manifest | {"clusters": clusters, "texts": sizes.tolist()}, CLUSTERED)
    counts = {"least": int(sizes.min()), "mean": round(len(texts) / clusters), "most": int(sizes.max())}
    return Written(out.absolute(), recipe_keys(opened.columns | {Column.CLUSTER}), counts)


def threshold(near: float) -> float | None:
    """`--near` as a similarity; 0 looks for exact duplicates only. UsageError where it is no share."""
    if not 0 <= near <= 1:
        raise UsageError(f"--near {near:g}: a similarity is between 0 (exact duplicates only) and 1")
    return near or None
