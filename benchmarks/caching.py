"""What gradient caching costs: a step that encodes twice against one that keeps the graphs of the same chunks.

Ours is the whole step of `benchmarks.step` with `engine.caching` on and off; the peer is Sentence Transformers'
trainer with its cached loss and its plain loss, on the same weights, pairs and batches, both in bf16 where the machine
has it, else in fp32. A forward is about half of a backward, so encoding once more costs 4/3; the goal is 1.4.

The peer's cached loss runs twice: with mini-batches of 32 texts, its default, which pad less than the whole batch
that the plain loss encodes, and with one mini-batch of all, where both pad alike.
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

RATIOS = {
    "cached_over_plain": ("ours_cached", "ours_plain"),
    "st_cached_over_plain": ("st_cached", "st_plain"),
    "st_cached_whole_over_plain": ("st_cached_whole", "st_plain"),
}
GOAL = 1.4


def main() -> None:
    against_trainer(__doc__ or "", measure)


def measure(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """All runs, then the figures; prints them as they come."""
    from trainers.device import fast_bf16

    rounds, length = (1, Length(1, 2)) if args.quick else (args.rounds, Length(3, args.steps))
    precision = "bf16" if fast_bf16("cpu") else "fp32"

    def run(kind: str, **more: Any) -> dict[str, Any]:
        given = {"home": str(home), "batch": args.batch, "length": asdict(length)} | more
        return child("benchmarks.step_runs", kind, given, args.threads)

    def peer(mini_batch: int | None) -> dict[str, Any]:
        return run("peer", peer=asdict(Peer(precision, "eager", mini_batch)))

    run("prepare")
    sides: dict[str, Callable[[], dict[str, Any]]] = {
        "ours_cached": lambda: run("ours", caching="on"),
        "ours_plain": lambda: run("ours", caching="off"),
        "st_cached": lambda: peer(32),
        "st_plain": lambda: peer(None),
        "st_cached_whole": lambda: peer(args.batch),
    }
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for i, side in in_turns(list(sides), rounds):
        runs[side].append(sides[side]())
        print(f"  round {i + 1}, {side}: {runs[side][-1]['seconds'] / length.timed:.2f} s a step", flush=True)
    figures = summary(runs, length)
    figures["peer"] = {"version": f"sentence-transformers {version('sentence-transformers')}", "attention": "eager"}
    setting = {"batch": args.batch, "threads": args.threads, "rounds": rounds, "precision": precision}
    figures["setting"] = setting | asdict(length)
    show(figures)
    return figures


def summary(runs: dict[str, list[dict[str, Any]]], length: Length) -> dict[str, Any]:
    """The figures of all rounds, each with its spread. runs: by side, one result a round."""
    seconds = {side: [r["seconds"] / length.timed for r in results] for side, results in runs.items()}
    figures: dict[str, Any] = {key: ratios(seconds[above], seconds[below]) for key, (above, below) in RATIOS.items()}
    figures["seconds_per_step"] = {side: spread(values) for side, values in seconds.items()}
    figures["peak_rss_bytes"] = {side: max(r["peak_rss_bytes"] for r in results) for side, results in runs.items()}
    return figures


def show(figures: dict[str, Any]) -> None:
    setting, peer = figures["setting"], figures["peer"]
    print(
        f"batch {setting['batch']}, {setting['precision']}, {setting['threads']} threads, {setting['rounds']} rounds; "
        f"{peer['version']}, {peer['attention']} attention"
    )
    for side, seconds in figures["seconds_per_step"].items():
        memory = figures["peak_rss_bytes"][side] / 2**30
        print(f"{side:>16}  {shown(seconds)} s a step, peak {memory:.1f} GiB")
    for key, (above, below) in RATIOS.items():
        goal = f", goal {GOAL}" if key == "cached_over_plain" else ""
        print(f"{shown(figures[key])} times  {above} over {below}{goal}")


if __name__ == "__main__":
    main()
