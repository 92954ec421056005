"""A small CLIP's training step against open_clip's training loop: the same pictures, captions and sizes of both towers,
image decoding included, one process each with the same threads; and the batch that either holds in the same memory."""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.common import child, in_turns, machine, machine_line, options, ratios, shown, spread, write

SIDES = "benchmarks.clip_sides"
RATIOS = (8, 16, 32)  # of our batch over the peer's that are tried


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--batch", type=int, default=128, help="pairs of a step")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run, after 2 that warm up")
    parser.add_argument("--accum-freq", type=int, default=4, help="of open_clip's own caching, which is shown too")
    args = parser.parse_args()
    missing = [name for name in ("open_clip", "torchvision", "ftfy", "timm") if find_spec(name) is None]
    if missing:
        sys.exit(f"the peer needs {', '.join(missing)}: see benchmarks/README.md, clip_step, for how it is installed")
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-benchmark-") as home:
        figures = measure(args, Path(home))
    write(args.json, figures | {"machine": about})


def measure(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """All runs, then the figures; prints them as they come."""
    rounds, timed = (1, 2) if args.quick else (args.rounds, args.steps)
    setting = {"home": str(home), "batch": args.batch, "length": {"warm_up": 2, "timed": timed}}
    threads = args.threads
    made = child(SIDES, "prepare", {"home": str(home), "pairs": args.batch * 8}, threads)
    sides: dict[str, tuple[str, dict[str, Any]]] = {
        "gyre": ("ours", {}),
        "open_clip": ("peer", {"workers": 0}),
        "open_clip, a loader process": ("peer", {"workers": 1}),
        f"open_clip, accum-freq {args.accum_freq}": ("peer", {"workers": 0, "accum_freq": args.accum_freq}),
    }
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in sides}
    for i, side in in_turns(list(sides), rounds):
        name, more = sides[side]
        last = child(SIDES, name, setting | more | {"precision": made["precision"]}, threads)
        runs[side].append(last)
        told = f"{last['pairs_per_s']:.1f} pairs/s, {last['grown_bytes'] / 2**20:.0f} MiB grown"
        print(f"  round {i + 1}, {side}: {told}", flush=True)
    return summary(args, setting, runs, made["precision"])


def summary(
    args: argparse.Namespace, setting: dict[str, Any], runs: dict[str, list[dict[str, Any]]], precision: str
) -> dict[str, Any]:
    """The ratios: to the faster of the peer's loaders, and to the memory of its plain loop."""
    speed = {side: [run["pairs_per_s"] for run in its] for side, its in runs.items()}
    loaders = ("open_clip", "open_clip, a loader process")
    best = max(loaders, key=lambda side: spread(speed[side])["median"])
    room = max(run["grown_bytes"] for run in runs["open_clip"])
    ratio, tried = 0, {}
    for times in RATIOS[:1] if args.quick else RATIOS:
        larger = setting | {"batch": args.batch * times, "length": {"warm_up": 1, "timed": 1}}
        held = child(SIDES, "ours", larger | {"precision": precision, "caching": "on"}, args.threads)["grown_bytes"]
        tried[times] = held
        ratio = times if held <= room else ratio
    figures = {
        "over_open_clip": ratios(speed["gyre"], speed[best]),
        "batch_ratio": ratio,
        "peer": best,
        "precision": precision,
        "pairs_per_s": {side: spread(values) for side, values in speed.items()},
        "grown_bytes": {side: max(run["grown_bytes"] for run in its) for side, its in runs.items()},
        "grown_bytes_at_batch_ratio": tried,
        "setting": {"batch": args.batch, "threads": args.threads, "steps": setting["length"]["timed"]},
    }
    print(f"over {best}, {precision}: {shown(ratios(speed['gyre'], speed[best]))}")
    print(f"batch in the memory of open_clip's plain loop ({room / 2**20:.0f} MiB): {ratio} times as large or more")
    return figures


if __name__ == "__main__":
    main()
