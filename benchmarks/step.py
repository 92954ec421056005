"""Our whole training step against Sentence Transformers' trainer, on the built-in corpus.

One process each with the same threads, the same weights (the quickstart's tower, exported once as a Sentence
Transformers folder), the same pairs in the same batches, AdamW, clipping at 1.0. Timed from the end of one
optimizer step to the end of the next, so reading and tokenising are in it on both sides. Dropout is off on both
sides (Sentence Transformers has none for this architecture). Ours computes both directions of the loss and reports
its metrics by step; the peer reports nothing.

The peer is measured at its defaults, and at the best of several settings (`tuned`) at our precision, bf16 where the
machine has it, chosen by short runs. Queue and momentum encoder are off for the ratios; a fourth run has them on and
says what they cost.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common import against_trainer, child, in_turns, ratios, shown, spread
from benchmarks.step_runs import Length, Peer

DEFAULT = Peer()


def tuned(precision: str, quick: bool) -> list[Peer]:
    """Settings to choose the peer's best from. Small mini-batches pad less, large ones compute more at once."""
    if quick:
        return [Peer(precision, "eager", 32), Peer(precision, "eager", None)]
    sizes = (8, 16, 32, 64, 128, None)
    return [Peer(precision, attention, size) for attention in ("eager", "sdpa") for size in sizes]


def main() -> None:
    against_trainer(__doc__ or "", measure)


def measure(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """All runs, then the figures; prints them as they come."""
    from trainers.device import fast_bf16

    rounds, length = (1, Length(1, 2)) if args.quick else (args.rounds, Length(3, args.steps))

    def run(kind: str, of: Length = length, **more: Any) -> dict[str, Any]:
        given = {"home": str(home), "batch": args.batch, "length": asdict(of)} | more
        return child("benchmarks.step_runs", kind, given, args.threads)

    run("prepare")
    tried = {}
    precision = "bf16" if fast_bf16("cpu") else "fp32"
    for peer in tuned(precision, args.quick):
        tried[peer] = run("peer", Length(1, 2) if args.quick else Length(2, 4), peer=asdict(peer))
        print(f"  tried {peer.line}: {_figures(tried[peer])}", flush=True)
    best = max(tried, key=lambda peer: tried[peer]["pairs_per_s"])

    sides: dict[str, Callable[[], dict[str, Any]]] = {
        "ours": lambda: run("ours"),
        "st_tuned": lambda: run("peer", peer=asdict(best)),
        "st_defaults": lambda: run("peer", peer=asdict(DEFAULT)),
        "ours_with_memory": lambda: run("ours", memory=True),
    }
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for i, side in in_turns(list(sides), rounds):
        runs[side].append(sides[side]())
        print(f"  round {i + 1}, {side}: {_figures(runs[side][-1])}", flush=True)
    figures = summary(runs)
    figures["peer"] = {
        "version": f"sentence-transformers {version('sentence-transformers')}",
        "equal_precision": best.line,
        "defaults": DEFAULT.line,
        "tried": {peer.line: result["pairs_per_s"] for peer, result in tried.items()},
    }
    figures["setting"] = {"batch": args.batch, "threads": args.threads, "rounds": rounds, **asdict(length)}
    show(figures)
    return figures


def _figures(result: dict[str, Any]) -> str:
    return f"{result['pairs_per_s']:.1f} pairs/s, {result['peak_rss_bytes'] / 2**30:.1f} GiB"


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of all rounds, each with its spread. runs: by side, one result a round."""
    speed = {side: [r["pairs_per_s"] for r in results] for side, results in runs.items()}
    shares = [r["shares"] for r in runs["ours_with_memory"]]
    figures: dict[str, Any] = {
        "over_st_equal_precision": ratios(speed["ours"], speed["st_tuned"]),
        "over_st_defaults": ratios(speed["ours"], speed["st_defaults"]),
        **{f"{part}_share_of_step": spread([s[part] for s in shares]) for part in shares[0]},
        "queue_and_ema_share_of_step": spread([s["queue"] + s["ema"] for s in shares]),
        "pairs_per_s": {side: spread(values) for side, values in speed.items()},
        "peak_rss_bytes": {side: max(r["peak_rss_bytes"] for r in results) for side, results in runs.items()},
        "ours_cached": runs["ours"][0]["cached"],
    }
    return figures


def show(figures: dict[str, Any]) -> None:
    peer, setting = figures["peer"], figures["setting"]
    print(f"batch {setting['batch']}, {setting['threads']} threads, {setting['rounds']} rounds; {peer['version']}")
    for side, speed in figures["pairs_per_s"].items():
        memory = figures["peak_rss_bytes"][side] / 2**30
        print(f"{side:>18}  {shown(speed, '{:6.1f}')} pairs/s, peak {memory:.1f} GiB")
    for key, what in {
        "over_st_equal_precision": f"over {peer['equal_precision']}",
        "over_st_defaults": f"over {peer['defaults']}",
    }.items():
        print(f"{shown(figures[key])} times  {what}")
    for part in ("queue", "ema", "queue_and_ema", "momentum_forward"):
        print(f"{shown(figures[f'{part}_share_of_step'], '{:.1%}')} of a step  {part}")


if __name__ == "__main__":
    main()
