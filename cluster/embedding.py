"""`gyre embed`: a corpus to vectors, in this process or over all workers of a cluster."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from cluster.config import ClusterConfig
from cluster.models.folder import fingerprint, open_encoder
from cluster.models.reference import resolve
from cluster.paths import home
from cluster.sections import source_section
from data_services.embed import EmbedConfig, EmbeddedCorpus, OnRay, SourceTexts, Workers, embed, in_process
from data_services.schema import Encoder, UsageError
from data_services.sources import SourceConfig, open_source

if TYPE_CHECKING:
    from data_services.mining.texts import TextTable
    from data_services.mining.vectors import Vectors

Progress = Callable[[dict[str, Any]], None]


@dataclass(frozen=True)
class EmbeddingJob:
    """What is embedded, and where.

    workers  processes that encode, one model each; None: one for each GPU; where there is none, one for each node
    """

    model: str
    source: SourceConfig
    out: Path
    config: EmbedConfig = field(default_factory=EmbedConfig)
    workers: int | None = None


@dataclass(frozen=True)
class EmbeddingResult:
    """encoded, seconds: rows of this run alone, without those that an earlier one had finished."""

    corpus: EmbeddedCorpus
    model: str
    encoded: int
    seconds: float

    def as_dict(self) -> dict[str, Any]:
        about = {"model": self.model, "encoded": self.encoded, "seconds": self.seconds}
        return self.corpus.as_dict() | about


def embed_source(
    job: EmbeddingJob, root: Path | None = None, on_progress: Progress = lambda event: None
) -> EmbeddingResult:
    """The vectors of a source's documents, or queries, each text once; goes on with what an earlier run finished.

    Raises UsageError for what isn't there or doesn't fit, RunError where the disk is full or workers keep dying.
    """
    ref = resolve(job.model, root)
    texts = SourceTexts(open_source(job.source, root or home()), job.config.field)
    follower = _Follower(on_progress)
    with workers_on(job.workers, job.out.absolute().parent) as workers:
        corpus = embed(
            texts,
            partial(load_encoder, ref.folder, job.config.field),
            job.out.absolute(),
            job.config,
            model=fingerprint(ref.folder),
            workers=workers,
            on_progress=follower,
        )
    return EmbeddingResult(corpus, ref.name, follower.encoded, follower.seconds)


def corpus_section(path: str, keys: Sequence[str]) -> SourceConfig:
    """A source by its path and `key=value` arguments; `text=FIELD` stands for query=FIELD positive=FIELD."""
    named = [key.removeprefix("text=") for key in keys if key.startswith("text=")]
    rest = [key for key in keys if not key.startswith("text=")]
    return source_section(path, rest + [f"{side}={text}" for text in named for side in ("query", "positive")])


def load_encoder(folder: Path, field: str) -> Encoder:
    """The model on this process's GPU, or CPU where it has none, for as long as the process lives."""
    import torch

    with open_encoder(folder, "cuda" if torch.cuda.is_available() else "cpu") as encoder:
        if getattr(encoder, "gives_tokens", False):
            raise UsageError(f"{folder} has a vector for each token of a text; one for each text is needed here")
        encoder.encode(["."], field)  # loads the tokenizer while its folder is there
        return encoder


def vectors_of(
    texts: TextTable,
    side: Literal["query", "document"],
    folder: Path,
    of_model: str,
    root: Path,
    workers: Workers,
    on_progress: Callable[[str, int, int], None],
) -> Vectors:
    """The vectors of a table of texts by the model in a folder, kept under HOME/vectors by the contents of both.

    of_model  the model's fingerprint; on_progress takes (what, done, of)
    """
    path = root / "vectors" / f"{of_model[:16]}-{side}-{texts.fingerprint[:16]}.f32"
    return vectors_at(path, texts, side, folder, of_model, workers, partial(on_progress, f"encoding {side} texts"))


def vectors_at(
    path: Path,
    texts: TextTable,
    side: Literal["query", "document"],
    folder: Path,
    of_model: str,
    workers: Workers,
    on_progress: Callable[[int, int], None],
) -> Vectors:
    """The same in the file `path`, which an earlier call may have made, or begun. on_progress takes (done, of)."""
    from data_services.mining.vectors import kept

    def embedded(into: Path) -> EmbeddedCorpus:
        load, config = partial(load_encoder, folder, side), EmbedConfig(field=side)
        return embed(texts, load, into, config, model=of_model, workers=workers, on_progress=on_progress)

    return kept(path, embedded)


class _Follower:
    """Rows that are done to events of `console.Progress`, with rate and ETA.

    The rate counts from the end of the first shard, once there are more: before it the models were loaded.
    """

    def __init__(self, on_progress: Progress) -> None:
        self._tell = on_progress
        self._seen: list[tuple[float, int]] = []  # when the run began and when its first shard ended, rows done then

    def __call__(self, done: int, rows: int) -> None:
        now = time.monotonic()
        self._last = now, done
        event = {"kind": "step", "unit": "text", "step": done, "steps": rows}
        if self.encoded:
            since, before = self._seen[-1] if done > self._seen[-1][1] else self._seen[0]
            rate = (done - before) / max(now - since, 1e-9)
            event |= {"texts_per_s": rate, "eta_s": (rows - done) / rate if rate else None}
        if len(self._seen) < 2:
            self._seen.append(self._last)
        self._tell(event)

    @property
    def encoded(self) -> int:
        """Rows of this run."""
        return self._last[1] - self._seen[0][1] if self._seen else 0

    @property
    def seconds(self) -> float:
        return self._last[0] - self._seen[0][0]


@contextlib.contextmanager
def workers_on(asked: int | None, storage: Path) -> Iterator[Workers]:
    """Where shards are written: in this process where it is one worker without a cluster, else on Ray.

    asked  processes; None: one for each GPU, where there is none one for each node
    """
    from cluster.session import cluster_address, connect

    here = ClusterConfig()
    if cluster_address(here) is None:
        actors, gpus = _on_this_machine(asked)
        if actors == 1:
            yield in_process
            return
        threads = max((os.cpu_count() or 1) // actors, 1)
        config = ClusterConfig(workers=actors, cpus_per_worker=threads, gpus_per_worker=gpus)
        with connect(config, storage):
            yield OnRay(actors, threads, gpus)
        return
    with connect(here, storage):
        yield _on_cluster(asked)


def workers_up() -> Workers:
    """On the cluster that is up, and has a GPU or several nodes; else in this process."""
    ray = sys.modules.get("ray")
    if ray is None or not ray.is_initialized():
        return in_process
    if len(ray.nodes()) == 1 and not ray.cluster_resources().get("GPU"):
        return in_process
    return _on_cluster(None)


def _on_cluster(asked: int | None) -> Workers:
    """On the cluster that is up."""
    import ray

    from cluster.session import check_placement

    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    cards = int(sum(node.get("GPU", 0) for node in nodes))
    actors = asked or cards or len(nodes)
    cpus = sum(node.get("CPU", 0) for node in nodes)
    threads, gpus = max(int(cpus - 1) // actors, 1), 1 if cards else 0
    check_placement(ClusterConfig(workers=actors, cpus_per_worker=threads, gpus_per_worker=gpus), nodes)
    return OnRay(actors, threads, gpus)


def _on_this_machine(asked: int | None) -> tuple[int, int]:
    """(workers, GPUs of each)."""
    import torch

    cards = torch.cuda.device_count()
    if cards and asked and asked > cards:
        raise UsageError(f"--workers {asked}: this machine has {cards} GPUs, and each worker takes one; lower it")
    return asked or cards or 1, 1 if cards else 0
