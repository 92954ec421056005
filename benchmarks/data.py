"""Rows a second to the trainer: our feed, torch's DataLoader over `datasets`, plain Ray Data, mosaicml-streaming.

The same short generated rows for all, in batches of one size, tokenised or not, on the same cores; whoever receives
them does nothing else. Steady state: the first 32 batches count for nothing but `first_batch_s`, and neither does the
start of processes that serve a whole run (Ray, given apart). Beside them stands the tokenizer alone, on texts in
memory. Ours and the two loaders shuffle, plain Ray Data doesn't; ours also keeps duplicates apart, as no other does.

`pip install datasets` first. mosaicml-streaming can't live beside gyre (it wants an older numpy): it gets an
environment of its own, made in --peer-env, with the torch of this one.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.common import child, in_turns, machine, machine_line, options, ratios, shown, spread, write

SIDES = ("ours", "dataloader", "ray_data", "streaming", "tokenizer")
STREAMING = "mosaicml-streaming==0.13.0"
MODULE = "benchmarks.data_sides"
GROWTH = (100_000, 1_000_000, 10_000_000)  # rows, for memory and resume


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--rows", type=int, default=1_000_000, help="rows of the source")
    parser.add_argument("--take", type=int, default=300_000, help="rows that a run takes of it")
    parser.add_argument("--batch", type=int, default=256, help="rows of a batch")
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="processes that read, of each side")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    parser.add_argument("--largest", type=int, default=GROWTH[-1], help="rows up to which memory is watched")
    parser.add_argument("--without", nargs="*", default=[], choices=SIDES[1:4], help="peers to leave out")
    parser.add_argument(
        "--peer-env", type=Path, default=Path("~/.cache/gyre-benchmarks/streaming"), help="environment of streaming"
    )
    args = parser.parse_args()
    if args.quick:
        args.rows, args.take, args.rounds, args.largest = 20_000, 8_000, 1, 40_000
    if "dataloader" not in args.without and importlib.util.find_spec("datasets") is None:
        sys.exit("the DataLoader reads through `datasets`: pip install datasets, or give --without dataloader")
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-benchmark-") as folder:
        runs = measure(args, folder)
        figures = summary(runs) | growth(args, folder)
    show(figures)
    write(args.json, figures | {"machine": about})


def measure(args: argparse.Namespace, folder: str) -> dict[bool, dict[str, list[dict[str, Any]]]]:
    """All runs, tokenising or not, by side."""
    sides = [side for side in SIDES if side not in args.without]
    child(MODULE, "prepare", {"folder": folder, "rows": args.rows}, 1)
    python = None
    if "streaming" in sides:
        python = peer_python(args.peer_env.expanduser())
        peer(python, "prepare", {"folder": folder})
    given = {"folder": folder, "batch": args.batch, "take": args.take, "cores": args.cores}
    runs: dict[bool, dict[str, list[dict[str, Any]]]] = {}
    for tokenise in (True, False):
        named = [side for side in sides if tokenise or side != "tokenizer"]
        runs[tokenise] = {side: [] for side in named}
        for _, side in in_turns(named, args.rounds):
            if side == "streaming":
                result = peer(python, "run", given | {"tokenise": tokenise})
            else:
                threads = args.cores if side == "tokenizer" else 1
                result = child(MODULE, side, given | {"rows": args.rows, "tokenise": tokenise}, threads)
            runs[tokenise][side].append(result)
    return runs


def summary(runs: dict[bool, dict[str, list[dict[str, Any]]]]) -> dict[str, Any]:
    """Ratios of neighbouring runs, ours over each peer: above 1 ours is the faster."""
    figures: dict[str, Any] = {}
    for tokenise, by_side in runs.items():
        speed = {side: [run["rows_per_s"] for run in results] for side, results in by_side.items()}
        found: dict[str, Any] = {
            f"over_{side}": ratios(speed["ours"], speed[side])
            for side in ("dataloader", "ray_data", "streaming")
            if side in speed
        }
        if tokenise:
            found["share_of_tokenizer"] = ratios(speed["ours"], speed["tokenizer"])
            firsts = {side: [run["first_batch_s"] for run in by_side[side]] for side in by_side if side != "tokenizer"}
            found["first_batch_s"] = spread(firsts["ours"])
            found["first_batch_s_of"] = {side: spread(values) for side, values in firsts.items()}
            found["cluster_start_s"] = spread([run["cluster_start_s"] for run in by_side["ours"]])
        found["rows_per_s"] = {side: spread(values) for side, values in speed.items()}
        figures |= found if tokenise else {"without_tokenising": found}
    return figures


def growth(args: argparse.Namespace, folder: str) -> dict[str, Any]:
    """Our peak memory as the source grows, and what starting at 90 % of an epoch takes beyond starting at 0."""
    peaks, later = {}, []
    sizes = [rows for rows in GROWTH if rows <= args.largest] or [args.largest // 2, args.largest]
    for rows in sizes:
        with tempfile.TemporaryDirectory(prefix="gyre-benchmark-", dir=folder) as grown:
            child(MODULE, "prepare", {"folder": grown, "rows": rows}, 1)
            given = {"folder": grown, "rows": rows, "batch": args.batch, "cores": args.cores, "tokenise": True}
            peaks[rows] = child(MODULE, "ours", given | {"take": min(args.take, rows)}, 1)["peak_bytes"]
            few = given | {"take": 16 * args.batch}
            for _ in range(args.rounds):
                at = {share: child(MODULE, "ours", few | {"start": share}, 1)["first_batch_s"] for share in (0.0, 0.9)}
                later.append((rows, at[0.9] - at[0.0]))
    by_rows = {rows: spread([s for of, s in later if of == rows]) for rows in peaks}
    return {
        "resume_s": by_rows[max(by_rows)],
        "resume_s_of_rows": by_rows,
        "peak_bytes_of_rows": peaks,
        "memory_growth": peaks[max(peaks)] / peaks[min(peaks)],
    }


def show(figures: dict[str, Any]) -> None:
    for title, found in (("tokenising", figures), ("not tokenising", figures["without_tokenising"])):
        print(title)
        for side, speed in found["rows_per_s"].items():
            over = f", ours is {shown(found[f'over_{side}'])} times as fast" if f"over_{side}" in found else ""
            print(f"{side:>12}  {shown(speed, '{:9.0f}')} rows/s{over}")
    print(f"{shown(figures['share_of_tokenizer'])} of the tokenizer alone")
    for side, seconds in figures["first_batch_s_of"].items():
        print(f"{shown(seconds)} s to the first batch, {side}")
    print(f"{shown(figures['cluster_start_s'])} s to start Ray before that")
    for rows, peak in figures["peak_bytes_of_rows"].items():
        later = shown(figures["resume_s_of_rows"][rows])
        print(f"{rows:>11,} rows: peak {peak / 2**20:.0f} MiB; at 90 % the first batch comes {later} s later than at 0")


# The environment of the peer.


def peer_python(folder: Path) -> str:
    """The interpreter of an environment with mosaicml-streaming, made where it isn't there."""
    python = folder / "bin" / "python"
    if not (folder / "made").exists():
        print(f"making an environment for {STREAMING} in {folder}")
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(folder)], check=True)
        # torch first: what pip finds for this machine, before a dependency asks for the largest build.
        for packages in ([f"torch=={version('torch').split('+')[0]}"], [STREAMING, "pyarrow", "tokenizers"]):
            command = [str(python), "-m", "pip", "install", "--quiet", *packages]
            if subprocess.run(command).returncode:
                sys.exit(f"{' '.join(packages)} can't be installed in {folder}; give --without streaming")
        (folder / "made").touch()
    return str(python)


def peer(python: str | None, name: str, arguments: dict[str, Any]) -> dict[str, Any]:
    """A function of `benchmarks/data_streaming.py` in that environment."""
    assert python is not None, "made before the first run"
    script = Path(__file__).with_name("data_streaming.py")
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "RAYON_NUM_THREADS": "1"}
    env.pop("PYTHONPATH", None)
    done = subprocess.run([python, str(script), name, json.dumps(arguments)], env=env, capture_output=True, text=True)
    if done.returncode:
        sys.exit(f"streaming {name}:\n" + "\n".join(_last(done.stderr)))
    return json.loads(_last(done.stdout)[-1])


def _last(text: str) -> Sequence[str]:
    return text.strip().splitlines()[-15:]


if __name__ == "__main__":
    main()
