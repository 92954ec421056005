"""What `benchmarks.data` runs in processes of its own: the rows, and each side that reads them."""

from __future__ import annotations

import logging
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import child_main

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

    from data_services.order import Plan
    from data_services.schema import Ragged
    from data_services.store import StoredSource

GROUP_ROWS, FILE_ROWS = 1024, 1 << 19
MAX_TOKENS, VOCABULARY = 64, 8192
POOL = 20_000  # distinct sentences; a row's texts are two of them and its number
WARM_UP = 32  # batches that count for nothing but the first one's time


# The rows, as Parquet that every side can read.


def prepare(folder: str, rows: int) -> dict[str, Any]:
    """`rows` short pairs as `stored/` (our columns) and `plain/` (query, positive), and a tokenizer trained on them."""
    import pyarrow.parquet as pq

    from data_services.tokenizer import train_bpe

    root, pool = Path(folder), sentences()
    for name in ("stored", "plain"):
        (root / name).mkdir(parents=True, exist_ok=True)
    if not (root / "tokenizer").exists():
        train_bpe(pool, VOCABULARY, root / "tokenizer")
    for first in range(0, rows, FILE_ROWS):
        table = records(pool, first, min(FILE_ROWS, rows - first))
        pq.write_table(table, root / "stored" / f"part-{first // FILE_ROWS:05}.parquet", row_group_size=GROUP_ROWS)
        plain = table.select(["query"]).append_column("positive", table["positives"].combine_chunks().flatten())
        pq.write_table(plain, root / "plain" / f"part-{first // FILE_ROWS:05}.parquet", row_group_size=GROUP_ROWS)
    return {"rows": rows}


def sentences() -> list[str]:
    """POOL short texts, the same ones everywhere: words of a made-up language, the frequent ones short."""
    import numpy as np

    rng = np.random.Generator(np.random.PCG64(0))
    letters = np.array(list("etaoinshrdlucmfwypvbgkjqxz"))
    words = ["".join(rng.choice(letters, 2 + i.bit_length() // 2 + int(rng.integers(3)))) for i in range(5000)]
    lengths, ranks = rng.integers(4, 16, POOL), np.minimum(rng.zipf(1.2, POOL * 16), 5000) - 1
    return [" ".join(words[r] for r in ranks[16 * i : 16 * i + n]) for i, n in enumerate(lengths)]


def records(pool: list[str], first: int, count: int) -> pa.Table:
    """Rows first … first+count-1 of an endless source without duplicates."""
    import numpy as np
    import pyarrow as pa
    import pyarrow.compute as pc

    from data_services.columns import SCHEMA

    number = np.arange(first, first + count)
    numerals = pa.array(number).cast(pa.string())
    one = np.ones(count + 1, np.int32).cumsum(dtype=np.int32) - 1

    def text(salt: int) -> pa.Array:
        which = (number * 2654435761 + salt) % POOL
        return pc.binary_join_element_wise(pa.array(pool).take(which), numerals, " ")

    columns: dict[str, Any] = {
        "id": numerals,
        "query": text(0),
        "positives": pa.ListArray.from_arrays(one, text(7919)),
        "negatives": pa.ListArray.from_arrays(np.zeros(count + 1, np.int32), pa.array([], pa.string())),
        "query_id": pa.array(number),
        "positive_ids": pa.ListArray.from_arrays(one, pa.array(number)),
        "negative_ids": pa.ListArray.from_arrays(np.zeros(count + 1, np.int32), pa.array([], pa.int64())),
    }
    arrays = [columns.get(field.name, pa.nulls(count, field.type)) for field in SCHEMA]
    return pa.Table.from_arrays([pa.array(a) if not isinstance(a, pa.Array) else a for a in arrays], schema=SCHEMA)


# The sides. Each gives rows/s in steady state and the seconds to its first batch, the machinery's start left out.


def ours(
    folder: str, rows: int, batch: int, take: int, cores: int, tokenise: bool, start: float = 0.0
) -> dict[str, Any]:
    """The plan run by Ray Data, from the share `start` of an epoch on."""
    import ray

    from data_services.ray_feed import ray_dataset, worker_batches
    from data_services.stream import BatchReader
    from data_services.tokenizer import FolderTokenizer

    source = stored(Path(folder), rows)
    first = int(start * (rows // batch))
    plan = plan_over(source, batch, min(first + take // batch, rows // batch))  # a feed that ends is shut down cleanly
    tokenizer: Any = FolderTokenizer(Path(folder) / "tokenizer", MAX_TOKENS, {}) if tokenise else Nothing()
    reader = BatchReader(plan, [source], tokenizer)
    began = time.perf_counter()
    ray.init("local", num_cpus=cores, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    seconds = time.perf_counter() - began

    def feed() -> Iterator[Any]:
        splits: list[Any] = ray_dataset(reader, 1, first, 1 << 14).streaming_split(1, equal=False)
        return worker_batches(splits[0], 0, first, plan.steps)

    try:
        return measured(feed, batch, (plan.steps - first) * batch) | {"cluster_start_s": seconds}
    finally:
        ray.shutdown()


class Nothing:
    """In the place of a tokenizer, where only reading and dealing is timed: a token a text."""

    def __call__(self, texts: list[str], field: str, tasks: Any = None) -> Ragged:
        import numpy as np

        from data_services.schema import Ragged

        return Ragged(np.zeros(len(texts), np.int32), np.arange(len(texts) + 1))

    def prompt_tokens(self, field: str, task: int | None = None) -> int:
        return 0


def stored(root: Path, rows: int) -> StoredSource:
    from data_services.store import StoredSource

    of_files = [min(FILE_ROWS, rows - first) for first in range(0, rows, FILE_ROWS)]
    groups = [[min(GROUP_ROWS, n - at) for at in range(0, n, GROUP_ROWS)] for n in of_files]
    return StoredSource(
        name="rows",
        folder=root / "stored",
        names=tuple(f"part-{i:05}.parquet" for i in range(len(of_files))),
        row_groups=tuple(size for sizes in groups for size in sizes),
        groups_per_file=tuple(len(sizes) for sizes in groups),
        fingerprint=f"{rows} rows",
        quarantined={},
    )


def plan_over(source: StoredSource, batch: int, steps: int) -> Plan:
    from data_services.order import Plan, RowGroups, SourceShape

    shape = SourceShape(source.name, source.rows, RowGroups.of(source.row_groups), source.fingerprint)
    return Plan(0, batch, [shape], steps=steps, ids={source.fingerprint: source})


def dataloader(folder: str, rows: int, batch: int, take: int, cores: int, tokenise: bool) -> dict[str, Any]:
    """torch's DataLoader over `datasets`, shuffled, a worker process a core; its collate function tokenises."""
    import datasets
    from torch.utils.data import DataLoader

    files = [str(file) for file in sorted((Path(folder) / "plain").glob("*.parquet"))]
    data = datasets.load_dataset("parquet", data_files=files, split="train", cache_dir=str(Path(folder) / "hf"))
    collate = Padded(folder) if tokenise else as_they_are
    loader = DataLoader(data, batch, shuffle=True, num_workers=cores, collate_fn=collate, drop_last=True)
    return measured(lambda: iter(loader), batch, take)


def ray_data(folder: str, rows: int, batch: int, take: int, cores: int, tokenise: bool) -> dict[str, Any]:
    """Plain Ray Data: read, tokenise in batches, iterate, in the order of the files."""
    import ray

    ray.init("local", num_cpus=cores, include_dashboard=False, logging_level=logging.ERROR, log_to_driver=False)
    ray.data.DataContext.get_current().enable_progress_bars = False

    def feed() -> Iterator[Any]:
        data = ray.data.read_parquet(str(Path(folder) / "plain")).limit(take)
        if tokenise:
            data = data.map_batches(PaddedColumns(folder), batch_size=batch, zero_copy_batch=True)
        return iter(data.iter_batches(batch_size=batch, prefetch_batches=2))

    try:
        return measured(feed, batch, take)
    finally:
        ray.shutdown()


def tokenizer(folder: str, rows: int, batch: int, take: int, cores: int, tokenise: bool) -> dict[str, Any]:
    """The tokenizer alone, on texts in memory, over all cores."""
    import pyarrow.parquet as pq

    table = pq.ParquetFile(next(iter(sorted((Path(folder) / "plain").glob("*.parquet"))))).read().slice(0, take)
    backend = backend_of(folder, pad=False)

    def feed() -> Iterator[Any]:
        for first in range(0, table.num_rows - batch + 1, batch):
            part = table.slice(first, batch)
            yield [backend.encode_batch_fast(part[name].to_pylist()) for name in ("query", "positive")]

    return measured(feed, batch, min(take, table.num_rows))


def backend_of(folder: str, pad: bool) -> Any:
    """The tokenizer of `prepare` as it comes from the `tokenizers` library."""
    from tokenizers import Tokenizer

    backend = Tokenizer.from_file(str(Path(folder) / "tokenizer" / "tokenizer.json"))
    backend.enable_truncation(MAX_TOKENS)
    if pad:
        backend.enable_padding()
    return backend


def as_they_are(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    return rows


class Padded:
    """A collate function: token ids of queries and positives, padded tensors."""

    def __init__(self, folder: str) -> None:
        self.folder = folder
        self._backend: Any = None

    def __call__(self, rows: list[dict[str, str]]) -> dict[str, Any]:
        import torch

        self._backend = self._backend or backend_of(self.folder, pad=True)
        texts = {name: [row[name] for row in rows] for name in ("query", "positive")}
        return {n: torch.tensor([e.ids for e in self._backend.encode_batch_fast(t)]) for n, t in texts.items()}

    def __getstate__(self) -> dict[str, Any]:
        return {"folder": self.folder, "_backend": None}


class PaddedColumns:
    """The same for a batch of columns, to a fixed width: Ray Data's blocks are tables."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def __call__(self, batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        import numpy as np

        backend = backend_of(self.folder, pad=False)
        backend.enable_padding(length=MAX_TOKENS)
        return {n: np.array([e.ids for e in backend.encode_batch_fast(t.tolist())], np.int32) for n, t in batch.items()}


# The watch.


def measured(feed: Callable[[], Iterator[Any]], batch: int, take: int) -> dict[str, Any]:
    """Of so many rows: seconds to the first batch, rows/s after WARM_UP batches, peak memory of all processes."""
    batches = take // batch
    warm_up = min(WARM_UP, batches // 2)
    with PeakMemory() as memory:
        began = steady = time.perf_counter()
        iterator = feed()
        first_s = 0.0
        for done in range(1, batches + 1):
            next(iterator)
            if done == 1:
                first_s = time.perf_counter() - began
            if done == warm_up:
                steady = time.perf_counter()
        seconds = time.perf_counter() - steady
    del iterator
    return {
        "rows_per_s": (batches - warm_up) * batch / seconds,
        "first_batch_s": first_s,
        "peak_bytes": memory.peak_bytes,
    }


class PeakMemory:
    """The most memory that this process and those it started had at once, shared pages divided among who share them."""

    EVERY_S = 1.0

    def __init__(self) -> None:
        self.peak_bytes = 0
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> PeakMemory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._look()
        self._ended.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._ended.wait(self.EVERY_S):
            self._look()

    def _look(self) -> None:
        import psutil

        total = 0
        for process in [psutil.Process(os.getpid()), *psutil.Process(os.getpid()).children(recursive=True)]:
            try:
                total += process.memory_full_info().pss
            except psutil.Error:  # ended meanwhile
                continue
        self.peak_bytes = max(self.peak_bytes, total)


if __name__ == "__main__":
    child_main(
        {"prepare": prepare, "ours": ours, "dataloader": dataloader, "ray_data": ray_data, "tokenizer": tokenizer}
    )
