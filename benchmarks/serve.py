"""`gyre serve` under many clients against a plain loop: the same model, texts and cores.

    served   requests of one text over HTTP from 32 clients at once, each on a connection of its own
    loop     SentenceTransformer.encode(text) for one text after another, in one process with all threads
    whole    SentenceTransformer.encode(texts) in a single call, batches of 32: what no server could know

all-MiniLM-L6-v2 in fp32 on docstrings of the built-in corpus. Models are loaded and warm before the clock starts; the
clients run on the same cores as the server.
"""

from __future__ import annotations

import argparse
import http.client
import json
import os
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import child, child_main, in_turns, machine, machine_line, options, ratios, shown, spread, write
from benchmarks.embed import corpus_of, model_folder

SIDES = ("served", "loop", "whole")
WARM_UP = 64


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--texts", type=int, default=2048, help="requests of a round")
    parser.add_argument("--clients", type=int, default=32)
    parser.add_argument("--cores", type=int, default=os.cpu_count(), help="threads of the model")
    parser.add_argument("--rounds", type=int, default=3, help="runs of each side")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    with tempfile.TemporaryDirectory(prefix="gyre-benchmark-") as home:
        figures = measure(args, Path(home))
    write(args.json, figures | {"machine": about})


def measure(args: argparse.Namespace, home: Path) -> dict[str, Any]:
    """All runs; prints their figures."""
    from cluster.serving.deployment import ServeConfig, serving

    rounds, texts = (1, 96) if args.quick else (args.rounds, args.texts)
    given = {"home": str(home), "texts": texts}
    child("benchmarks.serve", "prepare", {"home": str(home)}, 1)
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    with serving(ServeConfig(str(model_folder()), port=free_port()), home) as server:
        for _, side in in_turns(SIDES, rounds):
            more = {"url": server.url, "clients": args.clients} if side == "served" else {}
            runs[side].append(child("benchmarks.serve", side, given | more, args.cores))
    figures = summary(runs)
    print(f"{texts} requests of one text, {args.clients} clients, {args.cores} cores, {rounds} rounds")
    for side in SIDES:
        print(f"{side:>7}  {shown(figures['texts_per_s'][side], '{:8.1f}')} texts/s")
    print(f"{shown(figures['over_encode_loop'])} times  served over loop; {shown(figures['over_one_call'])} over whole")
    p50, p95 = (shown(figures[key], "{:.0f}") for key in ("p50_ms", "p95_ms"))
    print(f"{p95} ms  95th percentile of a request; median {p50}")
    return figures


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """runs: by side, one result a round. Ratios above 1: the server is the faster."""
    speed = {side: [run["texts"] / run["seconds"] for run in found] for side, found in runs.items()}
    return {
        "over_encode_loop": ratios(speed["served"], speed["loop"]),
        "over_one_call": ratios(speed["served"], speed["whole"]),
        "p50_ms": spread([run["p50_ms"] for run in runs["served"]]),
        "p95_ms": spread([run["p95_ms"] for run in runs["served"]]),
        "texts_per_s": {side: spread(values) for side, values in speed.items()},
    }


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


# The sides, each in a process of its own.


def prepare(home: str) -> dict[str, Any]:
    """Converts the corpus, so that no timed run does."""
    return {"texts": len(corpus_of(Path(home)))}


def queries(home: str, texts: int) -> list[str]:
    """The first lines of the corpus's documents: as short as queries are."""
    found = corpus_of(Path(home)).read(0, texts + WARM_UP)[1]
    return [text.strip().splitlines()[0][:200] for text in found if isinstance(text, str)]


def served(home: str, texts: int, url: str, clients: int) -> dict[str, Any]:
    """Requests are dealt to the clients; each sends its next when it has its answer."""
    asked = queries(home, texts)
    place = url.removeprefix("http://").removesuffix("/v1")
    ask_all(place, asked[:WARM_UP], clients)
    began = time.perf_counter()
    taken = ask_all(place, asked[WARM_UP:], clients)
    seconds = time.perf_counter() - began
    p50, p95 = (float(1000 * np.quantile(taken, q)) for q in (0.5, 0.95))
    return {"texts": len(taken), "seconds": seconds, "p50_ms": p50, "p95_ms": p95}


def ask_all(place: str, texts: list[str], clients: int) -> list[float]:
    """Seconds of each request; fails where one isn't answered by 200."""
    taken: list[float] = []

    def client(own: list[str]) -> None:
        connection = http.client.HTTPConnection(place, timeout=120)
        for text in own:
            began = time.perf_counter()
            connection.request("POST", "/v1/embeddings", json.dumps({"input": text, "encoding_format": "base64"}))
            answer = connection.getresponse()
            body = answer.read()
            if answer.status != 200:
                raise RuntimeError(f"{answer.status}: {body[:200]!r}")
            taken.append(time.perf_counter() - began)
        connection.close()

    threads = [threading.Thread(target=client, args=(texts[i::clients],)) for i in range(clients)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if len(taken) != len(texts):
        raise RuntimeError(f"{len(texts) - len(taken)} of {len(texts)} requests failed")
    return taken


def loop(home: str, texts: int) -> dict[str, Any]:
    """One text after another."""
    model, asked = _peer(), queries(home, texts)
    for text in asked[:WARM_UP]:
        model.encode(text)
    began = time.perf_counter()
    for text in asked[WARM_UP:]:
        model.encode(text)
    return {"texts": len(asked) - WARM_UP, "seconds": time.perf_counter() - began}


def whole(home: str, texts: int) -> dict[str, Any]:
    """All texts in one call."""
    model, asked = _peer(), queries(home, texts)
    model.encode(asked[:WARM_UP])
    began = time.perf_counter()
    model.encode(asked[WARM_UP:])
    return {"texts": len(asked) - WARM_UP, "seconds": time.perf_counter() - began}


def _peer() -> Any:
    from sentence_transformers import SentenceTransformer

    return SentenceTransformer(str(model_folder()), device="cpu")


if __name__ == "__main__":
    sides: dict[str, Callable[..., dict[str, Any]]] = {
        "prepare": prepare,
        "served": served,
        "loop": loop,
        "whole": whole,
    }
    child_main(sides) if sys.argv[1:2] and sys.argv[1] in sides else main()
