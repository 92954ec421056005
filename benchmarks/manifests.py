"""What checkpoints of many workers cost in metadata: the part that is done by rank 0 alone, or by every worker at once.

Synthetic checkpoints whose files are a few bytes each. What is timed is what grows with the number of workers: the
workers' sizes and checksums as rank 0 receives them, the manifest it writes, the listing that every command and restart
reads, the look at every file's size before an older checkpoint goes, and its removal. A step without a checkpoint costs
none of it; what a step adds is two numbers in an all-reduce that is there anyway.
"""

from __future__ import annotations

import argparse
import pickle
import tempfile
import time
from pathlib import Path
from typing import Any

from benchmarks.common import machine, machine_line, options, shown, spread, write


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--workers", type=int, default=1024)
    parser.add_argument("--checkpoints", type=int, default=4, help="that stand at once")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--folder", type=Path, help="where they are made; none: a temporary folder")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    write(args.json, measure(args) | {"machine": about})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    workers, rounds = (16, 1) if args.quick else (args.workers, args.rounds)
    found: dict[str, list[float]] = {}
    with tempfile.TemporaryDirectory(prefix="gyre-benchmark-", dir=args.folder) as root:
        for number in range(rounds):
            for name, seconds in once(Path(root) / str(number), workers, args.checkpoints).items():
                found.setdefault(name, []).append(seconds)
    figures = {f"{name}_s": spread(seconds) for name, seconds in found.items()}
    for name, figure in figures.items():
        print(f"{name.removesuffix('_s')}: {shown(figure, '{:.4f}')} s of {workers} workers")
    return figures | {"setting": {"workers": workers, "checkpoints": args.checkpoints, "rounds": rounds}}


def once(root: Path, workers: int, checkpoints: int) -> dict[str, float]:
    """Seconds of each part."""
    from trainers.checkpoint import STATE, committed, described, rank_file, remove, write_manifest

    seconds: dict[str, float] = {}

    def timed(name: str, work: Any) -> Any:
        began = time.perf_counter()
        result = work()
        seconds[name] = time.perf_counter() - began
        return result

    for step in range(1, checkpoints + 1):
        folder = root / f"step-{step:08d}.000000"
        folder.mkdir(parents=True)
        for name in (STATE, *(rank_file(rank, workers) for rank in range(workers))):
            (folder / name).write_bytes(b"x" * 64)
        share = described(folder / STATE)
        received = pickle.dumps([share] * workers)
        shares = timed("receive", lambda received=received: pickle.loads(received))
        files = {STATE: share} | {rank_file(rank, workers): of for rank, of in enumerate(shares)}
        timed("manifest", lambda folder=folder, step=step, files=files: write_manifest(folder, step, 0.0, files))
    every = timed("listing", lambda: committed(root))
    assert not timed("sizes", lambda: every[-1].damage(contents=False))
    timed("removal", lambda: remove(every[0].folder))
    return seconds


if __name__ == "__main__":
    main()
