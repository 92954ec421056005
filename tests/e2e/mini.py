"""A recipe so small that a step takes no time, in which everything has state, and its data."""

from __future__ import annotations

import json
import random
from pathlib import Path

STEPS = 64  # enough that a run is still under way when it is killed, on a fast machine too


def write_pairs(folder: Path) -> Path:
    """train, validation and heldout as JSONL: a query shares words with its document, drawn from a fixed seed."""
    draw = random.Random(0)
    words = ["".join(draw.choices("abcdefghijklmnopqrstuvwxyz", k=draw.randint(3, 9))) for _ in range(400)]
    folder.mkdir()
    for split, rows in (("train", 480), ("validation", 32), ("heldout", 32)):
        with open(folder / f"{split}.jsonl", "w") as file:
            for _ in range(rows):
                topic = draw.sample(words, 5)
                document = draw.sample(topic, 4) + draw.choices(words, k=draw.randint(2, 12))
                file.write(json.dumps({"query": " ".join(topic[:3]), "positive": " ".join(document)}) + "\n")
    return folder


def mini_recipe(pairs: Path) -> dict:
    """Everything that has state is on: queue, momentum, dropout, warm-up, several chunks a batch, sharding."""
    return {
        "name": "mini",
        "data": {"sources": [{"path": str(pairs)}], "batch": 32, "steps": STEPS},
        "model": {
            "config": {"hidden": 32, "layers": 1, "heads": 2, "intermediate": 64, "vocabulary": 512, "dropout": 0.1},
            "max_tokens": 32,
            "token_dropout": 0.1,
        },
        "queue": {"rows": 128},
        "momentum": {"decay": 0.9},
        "optimizer": {"lr": 0.01, "warmup_steps": 4},
        "engine": {"zero_stage": 2, "precision": "auto", "budget_tokens": 256, "caching": "on"},
        "checkpoint": {"every_steps": 5, "keep": 2},
        "cluster": {"workers": 2, "threads_per_worker": 1},
    }
