"""The side of mosaicml-streaming, in an environment of its own: run by `benchmarks.data`, imports nothing of gyre."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

MAX_TOKENS, WARM_UP = 64, 32  # as in benchmarks.data_sides


def prepare(folder: str) -> dict[str, float]:
    """`plain/` as shards of its own format, in `mds/`."""
    import pyarrow.parquet as pq
    from streaming import MDSWriter

    began, root = time.perf_counter(), Path(folder)
    with MDSWriter(out=str(root / "mds"), columns={"query": "str", "positive": "str"}) as writer:
        for file in sorted((root / "plain").glob("*.parquet")):
            for piece in pq.ParquetFile(file).iter_batches(1 << 14):
                for row in piece.to_pylist():
                    writer.write(row)
    return {"seconds": time.perf_counter() - began}


class Padded:
    """A collate function: token ids of queries and positives, padded tensors."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._backend: Any = None

    def __call__(self, rows):
        import torch

        if self._backend is None:
            from tokenizers import Tokenizer

            self._backend = Tokenizer.from_file(str(Path(self.folder) / "tokenizer" / "tokenizer.json"))
            self._backend.enable_truncation(MAX_TOKENS)
            self._backend.enable_padding()
        texts = {name: [row[name] for row in rows] for name in ("query", "positive")}
        return {n: torch.tensor([e.ids for e in self._backend.encode_batch(t)]) for n, t in texts.items()}

    def __getstate__(self):
        return {"folder": self.folder, "_backend": None}


def as_they_are(rows):
    return rows


def run(folder: str, batch: int, take: int, cores: int, tokenise: bool) -> dict[str, float]:
    """Shuffled, a worker process a core, as `benchmarks.data_sides.measured` measures."""
    from streaming import StreamingDataset
    from torch.utils.data import DataLoader

    batches = take // batch
    warm_up = min(WARM_UP, batches // 2)
    collate = Padded(folder) if tokenise else as_they_are
    began = steady = time.perf_counter()
    data = StreamingDataset(local=str(Path(folder) / "mds"), shuffle=True, batch_size=batch)
    iterator = iter(DataLoader(data, batch, num_workers=cores, collate_fn=collate, drop_last=True))
    first_s = 0.0
    for done in range(1, batches + 1):
        next(iterator)
        if done == 1:
            first_s = time.perf_counter() - began
        if done == warm_up:
            steady = time.perf_counter()
    return {"rows_per_s": (batches - warm_up) * batch / (time.perf_counter() - steady), "first_batch_s": first_s}


if __name__ == "__main__":
    name, arguments = sys.argv[1:]
    functions: dict[str, Any] = {"prepare": prepare, "run": run}
    print(json.dumps(functions[name](**json.loads(arguments))), flush=True)
