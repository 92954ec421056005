"""Padding-free encoding against padding: forward and backward of the tower over the built-in corpus's batches.

    random  each field of a batch padded to its longest text, in the order of the plan, as most trainers do
    sorted  chunks of like length under the token budget, padded (`data_services.collate.cut`)
    packed  the same chunks, each as one row without padding (`model.packing: on`)

The same texts, weights and threads; no loss, no optimizer. Two towers from random weights: the quickstart's, and one
of six layers of width 384. Dropout is off.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import child, child_main, in_turns, machine, machine_line, options, ratios, shown, spread, write

if TYPE_CHECKING:
    import numpy as np

    from data_services.schema import Batch
    from trainers.encoders.text import TextEncoder

SIDES = ("random", "sorted", "packed")
TOWERS: dict[str, dict[str, int]] = {
    "quickstart": {},
    "six_layers": {"hidden": 384, "layers": 6, "heads": 6, "intermediate": 1024},
}
WARM_UP = 2


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--batch", type=int, default=128, help="pairs of a batch")
    parser.add_argument("--batches", type=int, default=6, help="timed batches of a run, after 2 that warm up")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each process")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-benchmark-") as home:
        figures = {tower: measure(args, home, tower) for tower in TOWERS}
    write(args.json, figures | {"machine": about})


def measure(args: argparse.Namespace, home: str, tower: str) -> dict[str, Any]:
    """All runs of one tower; prints its figures."""
    rounds, batches, warm_up = (1, 1, 0) if args.quick else (args.rounds, args.batches, WARM_UP)
    given = {"home": home, "tower": tower, "batch": args.batch, "batches": batches, "warm_up": warm_up}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for _, side in in_turns(SIDES, rounds):
        runs[side].append(child("benchmarks.padding", "run", given | {"side": side}, args.threads))
    figures = summary(runs)
    print(f"{tower}: batch {args.batch}, {args.threads} threads, {rounds} rounds of {batches} batches")
    for side in SIDES:
        speed, computed = figures["tokens_per_s"][side], figures["computed_per_token"][side]
        print(f"{side:>8}  {shown(speed, '{:8.0f}')} tokens/s, {computed:.2f} computed for each")
    for key in ("sorted_over_random", "packed_over_random", "packed_over_sorted"):
        print(f"{shown(figures[key])} times  {key.replace('_', ' ')}")
    return figures


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """runs: by side, one result a round. Ratios are of speeds: above 1 the first side is the faster."""
    speed = {side: [r["tokens"] / r["seconds"] for r in results] for side, results in runs.items()}
    return {
        "sorted_over_random": ratios(speed["sorted"], speed["random"]),
        "packed_over_random": ratios(speed["packed"], speed["random"]),
        "packed_over_sorted": ratios(speed["packed"], speed["sorted"]),
        "tokens_per_s": {side: spread(values) for side, values in speed.items()},
        "computed_per_token": {side: results[0]["computed"] / results[0]["tokens"] for side, results in runs.items()},
        "peak_rss_bytes": {side: max(r["peak_rss_bytes"] for r in results) for side, results in runs.items()},
    }


def run(home: str, tower: str, batch: int, batches: int, warm_up: int, side: str) -> dict[str, Any]:
    """Seconds for the timed batches, their tokens, and the tokens computed for them."""
    import resource
    import time

    encoder, given = tower_and_batches(Path(home), tower, batch, warm_up + batches, side == "packed")
    seconds, tokens, computed = 0.0, 0, 0
    for i, one in enumerate(given):
        began = time.perf_counter()
        padded = encode(encoder, one, groups_of(one, side))
        if i >= warm_up:
            seconds += time.perf_counter() - began
            tokens += one.tokens
            computed += one.tokens if side == "packed" else padded
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"seconds": seconds, "tokens": tokens, "computed": computed, "peak_rss_bytes": peak}


def groups_of(batch: Batch, side: str) -> Sequence[np.ndarray]:
    """The texts encoded together: indices into queries followed by documents."""
    import numpy as np

    if side != "random":
        return batch.chunks
    return np.split(np.arange(len(batch.queries) + len(batch.documents)), [len(batch.queries)])


def encode(encoder: TextEncoder, batch: Batch, groups: Sequence[np.ndarray]) -> int:
    """Forward and backward of every group; returns the tokens of the padded tensors."""
    import torch

    from data_services.schema import Ragged
    from trainers.encoders.inputs import TowerInputs

    texts, padded = Ragged.concat([batch.queries, batch.documents]), 0
    for group in groups:
        ids, mask = (torch.from_numpy(x) for x in texts.take(group).padded())
        vectors = encoder(TowerInputs(ids, mask))
        vectors.backward(torch.ones_like(vectors))
        padded += ids.numel()
    encoder.zero_grad()
    return padded


def tower_and_batches(
    home: Path, tower: str, batch: int, batches: int, packing: bool
) -> tuple[TextEncoder, list[Batch]]:
    """The tower in the precision that is fast here, and the first batches of the quickstart's plan."""
    import torch

    from benchmarks.common import QUICKSTART
    from cluster.config import load_recipe
    from cluster.models import tokenizer_of
    from cluster.prepare import make_model_folder
    from data_services.sources import open_source
    from data_services.stream import BatchReader, LocalStream, plan_of
    from trainers.device import fast_bf16
    from trainers.encoders.text import build_encoder

    sizes = {"dropout": 0, "lexical_init": False} | TOWERS[tower]
    changes: dict[str, Any] = {f"model.config.{key}": value for key, value in sizes.items()}
    changes |= {"model.token_dropout": 0, "model.packing": "on" if packing else "off", "data.batch": batch}
    recipe = load_recipe(QUICKSTART, [f"{key}={value}" for key, value in changes.items()])
    sources, folder = [open_source(s, home) for s in recipe.data.sources], home / tower
    if not folder.exists():
        make_model_folder(recipe, folder, tuple(sources))
    reader = BatchReader(plan_of(recipe.data, sources, recipe.seed), sources, tokenizer_of(folder))
    stream = LocalStream(reader, 1, 0, recipe.engine.budget_tokens)(0)
    torch.manual_seed(recipe.seed)
    encoder = build_encoder(recipe.model, folder).train()
    if fast_bf16("cpu"):
        encoder = encoder.bfloat16()
    return encoder, [next(stream) for _ in range(batches)]


if __name__ == "__main__":
    child_main({"run": run}) if sys.argv[1:2] == ["run"] else main()
