"""The sides that `benchmarks.negatives` measures: our step over given embeddings, and how peers get their negatives.

Each peer's mechanism is written anew from its released source, over the same embeddings and the same collectives:

    replicated              facebookresearch/contriever 39fb220 (2023-04-07), src/moco.py and train.py: the queue is a
                            buffer on every worker, cloned before every product; the keys are gathered and written into
                            it; DistributedDataParallel, at its defaults, sends buffers again before every forward
    replicated_quiet        the same with broadcast_buffers=False, which Contriever doesn't set
    gathered                mlfoundations/open_clip 89fb801 (2026-06-27), src/open_clip/loss.py at its defaults: both
                            sides gathered without gradient but for the own slice, all B x B logits on every worker
    gathered_local          the same with --local-loss --gather-with-grad: b x B logits each way
    gathered_with_gradient  Sentence Transformers 6.2.0, multiple_negatives_ranking.py with gather_across_devices: both
                            sides gathered with gradient, b x B logits of the queries

Bytes are those of `Group.traffic`, for every side; a gather's backward is counted (and done) as a reduce-scatter, as
NCCL does it, and not as the all-to-all that torch falls back to with gloo.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, normalize
from torch.nn.parallel import DistributedDataParallel
from torch.profiler import ProfilerActivity, profile

from benchmarks.common import child_main
from benchmarks.negatives import Setting
from trainers.collectives import Group
from trainers.config import QueueConfig
from trainers.negative_queue import Queues
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.embedded import Embedded
from trainers.objectives.keys import Keys
from trainers.objectives.sections.contrastive import ContrastiveSection

TEMPERATURE = 0.05


class Side(Protocol):
    """Made on every worker with (setting, group), its queue full."""

    kept: int
    """Bytes that it keeps between steps on this worker."""
    broadcast: int
    """Bytes a step that this worker broadcasts beside what the group counts."""

    def step(self, queries: Tensor, documents: Tensor) -> None:
        """Leaves the loss's gradient in queries [b, D] and documents [b, D]; then the documents join the queue."""


class Ours:
    """The contrastive objective at its defaults, both directions, masks and metrics included, and the queue."""

    broadcast = 0

    def __init__(self, setting: Setting, group: Group) -> None:
        self._setting, self._group, self._steps = setting, group, 0
        self._queues = Queues(QueueConfig(rows=setting.rows), setting.dim, group)
        self._objective = Contrastive(ContrastiveSection(temperature=TEMPERATURE), group)
        if setting.rows:
            self._queues.restore([self._filled()] * group.size)
        self.kept = sum(queue.nbytes for queue in self._queues.by_name.values())

    def step(self, queries: Tensor, documents: Tensor) -> None:
        keys, owners = self._keys(), torch.arange(len(queries))
        rows = self._queues.rows(self._steps)
        # Every worker's share is known: a training step learns it where it sees that all were configured alike.
        sizes = [len(queries)] * self._group.size
        counts = tuple((b, b) for b in sizes)
        batch = queries, documents, keys, keys, owners, self._setting.batch, self._steps
        self._objective(Embedded(*batch, queues=rows, counts=counts)).loss.backward()
        self._queues.enqueue({"documents": (documents.detach(), self._keys())}, self._steps, {"documents": sizes})
        self._steps += 1

    def _filled(self) -> dict[str, Tensor]:
        """This worker's part of the queue after K / B steps."""
        self._steps = self._setting.rows // self._setting.batch
        steps = torch.arange(self._steps).repeat_interleave(self._setting.local)
        numbers = torch.cat([self._numbers(step) for step in range(self._steps)])
        columns = {"query_ids": numbers, "document_ids": numbers, "sequence": numbers, "steps": steps}
        columns |= {"vectors": random_rows(len(numbers), self._setting.dim), "next": torch.tensor([self._setting.rows])}
        return {f"documents.{name}": column for name, column in columns.items()}

    def _keys(self) -> Keys:
        """Texts that occur once."""
        ids = self._numbers(self._steps)
        return Keys(ids, ids)

    def _numbers(self, step: int) -> Tensor:
        """[b] numbers of the rows that this worker enqueues in a step."""
        first = (step * self._group.size + self._group.rank) * self._setting.local
        return torch.arange(first, first + self._setting.local)


class OursInBatch(Ours):
    """The same without a queue."""

    def __init__(self, setting: Setting, group: Group) -> None:
        super().__init__(Setting(setting.workers, setting.dim, setting.batch, 0), group)


class _ReplicatedLoss(nn.Module):
    """A query against its own key and the whole queue, which is a buffer on every worker: logits [b, 1 + K]."""

    queue: Tensor
    pointer: Tensor

    def __init__(self, setting: Setting, group: Group) -> None:
        super().__init__()
        self._group = group
        self.register_buffer("queue", random_rows(setting.rows, setting.dim).T.contiguous())
        self.register_buffer("pointer", torch.zeros(1, dtype=torch.int64))
        self.one = nn.Parameter(torch.ones(()))  # DistributedDataParallel refuses a module without weights

    def forward(self, queries: Tensor, keys: Tensor) -> Tensor:
        keys = keys.detach()
        positive = (queries * keys).sum(1, keepdim=True)
        logits = torch.cat([positive, queries @ self.queue.clone()], 1) / TEMPERATURE
        target = torch.zeros(len(queries), dtype=torch.int64)
        loss = cross_entropy(logits, target)
        self._enqueue(keys)
        float((logits.argmax(1) == target).float().mean())
        return loss * self.one

    @torch.no_grad()
    def _enqueue(self, keys: Tensor) -> None:
        everyone = self._group.all_gather(keys, [len(keys)] * self._group.size)
        start, rows = int(self.pointer), self.queue.shape[1]
        if rows % len(everyone):
            raise ValueError(f"a replicated queue of {rows} rows doesn't divide by {len(everyone)} keys a step")
        self.queue[:, start : start + len(everyone)] = everyone.T
        self.pointer[0] = (start + len(everyone)) % rows


class Replicated:
    broadcast_buffers = True

    def __init__(self, setting: Setting, group: Group) -> None:
        loss = _ReplicatedLoss(setting, group)
        self.kept = sum(buffer.nbytes for buffer in loss.buffers())
        sent = self.kept * (group.size - 1) if self.broadcast_buffers and group.rank == 0 else 0
        self.broadcast = sent
        self._loss = (
            loss if group.size == 1 else DistributedDataParallel(loss, broadcast_buffers=self.broadcast_buffers)
        )

    def step(self, queries: Tensor, documents: Tensor) -> None:
        self._loss(queries, documents).backward()


class ReplicatedQuiet(Replicated):
    broadcast_buffers = False


class _GatherWithGradient(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, group: Group) -> Tensor:
        ctx.group, ctx.sizes = group, [len(rows)] * group.size
        return group.all_gather(rows, ctx.sizes).clone() if group.size == 1 else group.all_gather(rows, ctx.sizes)

    @staticmethod
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None]:
        return ctx.group.reduce_scatter(upstream[0], ctx.sizes), None


class Gathered:
    """All B x B logits on every worker; gradient for the own slice only."""

    kept = broadcast = 0

    def __init__(self, setting: Setting, group: Group) -> None:
        self._group = group

    def step(self, queries: Tensor, documents: Tensor) -> None:
        logits = self._everyone(queries) @ self._everyone(documents).T / TEMPERATURE
        target = torch.arange(len(logits))
        ((cross_entropy(logits, target) + cross_entropy(logits.T, target)) / 2).backward()

    def _everyone(self, rows: Tensor) -> Tensor:
        parts = list(self._group.all_gather(rows.detach(), [len(rows)] * self._group.size).split(len(rows)))
        parts[self._group.rank] = rows
        return torch.cat(parts)


class GatheredLocal:
    """Own queries against all documents and own documents against all queries, gathered with gradient."""

    kept = broadcast = 0

    def __init__(self, setting: Setting, group: Group) -> None:
        self._group = group

    def step(self, queries: Tensor, documents: Tensor) -> None:
        everyone = [_GatherWithGradient.apply(side, self._group) for side in (queries, documents)]
        target = torch.arange(len(queries)) + self._group.rank * len(queries)
        there, back = (
            own @ all_.T / TEMPERATURE for own, all_ in zip((queries, documents), everyone[::-1], strict=True)
        )
        ((cross_entropy(there, target) + cross_entropy(back, target)) / 2).backward()


class GatheredWithGradient:
    """Own queries against all documents; both sides are gathered with gradient, and normalised again."""

    kept = broadcast = 0

    def __init__(self, setting: Setting, group: Group) -> None:
        self._group = group

    def step(self, queries: Tensor, documents: Tensor) -> None:
        everyone = [_GatherWithGradient.apply(side, self._group) for side in (queries, documents)]
        own = torch.arange(len(queries)) + self._group.rank * len(queries)
        similarity = normalize(everyone[0][own], dim=1) @ normalize(everyone[1], dim=1).T
        scores = similarity / TEMPERATURE
        (scores.logsumexp(1) - scores[torch.arange(len(queries)), own]).mean().backward()


SIDES: dict[str, Callable[[Setting, Group], Side]] = {
    "ours": Ours,
    "ours_in_batch": OursInBatch,
    "replicated": Replicated,
    "replicated_quiet": ReplicatedQuiet,
    "gathered": Gathered,
    "gathered_local": GatheredLocal,
    "gathered_with_gradient": GatheredWithGradient,
}


def random_rows(rows: int, dim: int) -> Tensor:
    """[rows, dim] unit vectors."""
    return normalize(torch.randn(rows, dim), dim=1)


def run(side: str, setting: dict[str, int], steps: int, what: str) -> dict[str, Any]:
    """`steps` steps of a side on W gloo processes, after one that warms up.

    what: "time" gives seconds_per_step, of the slowest worker. "memory" gives of the largest worker kept_bytes, what
    the side keeps between steps; tensor_bytes, that and the most that tensors take beside it at one moment of a step,
    by torch's allocator; rss_bytes, by how much resident memory at its peak in a step exceeds that with embeddings
    only. Both give wire_bytes, what a worker sends in a step, the mean of all.
    """
    if what == "memory":  # without these, freed memory counts as taken, more or less of it by the order of sizes
        os.environ |= {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
    with tempfile.TemporaryDirectory(prefix="gyre-negatives-") as folder:
        mp.spawn(_worker, (side, setting, steps, what, folder), nprocs=setting["workers"])
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    wire = sum(r.pop("wire_bytes") for r in results) / len(results)
    return {"wire_bytes": wire} | {key: max(r[key] for r in results) for key in results[0]}


def _worker(rank: int, side: str, setting: dict[str, int], steps: int, what: str, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    size = setting["workers"]
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    measure = {"time": time_of, "memory": memory_of}[what]
    result = measure(side, Setting(**setting), steps)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    if size > 1:
        dist.destroy_process_group()


def _begin(setting: Setting) -> tuple[Group, Callable[[Side], None]]:
    """The workers, connected, and what takes a step of a side over this worker's embeddings."""
    group = Group()
    queries, documents = (random_rows(setting.local, setting.dim).requires_grad_() for _ in range(2))
    group.all_gather(torch.zeros(1), [1] * group.size)
    group.reduce_scatter(torch.zeros(group.size), [1] * group.size)
    group.all_reduce(torch.zeros(1))
    (queries @ documents.T).sum().backward()

    def step(side: Side) -> None:
        queries.grad = documents.grad = None
        side.step(queries, documents)

    return group, step


def time_of(name: str, setting: Setting, steps: int) -> dict[str, float]:
    group, step = _begin(setting)
    side = SIDES[name](setting, group)
    step(side)
    group.barrier()
    group.reset_traffic()
    began = time.perf_counter()
    for _ in range(steps):
        step(side)
    group.barrier()
    return {"seconds_per_step": (time.perf_counter() - began) / steps, "wire_bytes": _wire(group, side, steps)}


def memory_of(name: str, setting: Setting, steps: int) -> dict[str, float]:
    group, step = _begin(setting)
    _collect()
    baseline = _status("VmRSS")
    side = SIDES[name](setting, group)
    step(side)
    _collect()
    group.reset_traffic()
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    for _ in range(steps):
        step(side)
    rss = _status("VmHWM") - baseline
    wire = _wire(group, side, steps)
    tensors = side.kept + _most_allocated(lambda: step(side))
    return {"rss_bytes": rss, "tensor_bytes": tensors, "kept_bytes": side.kept, "wire_bytes": wire}


def _wire(group: Group, side: Side, steps: int) -> float:
    return sum(group.traffic.values()) / steps + side.broadcast


def _collect() -> None:
    """Frees what nothing refers to, and gives freed memory back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


def _most_allocated(call: Callable[[], None]) -> int:
    """The most bytes that tensors made during the call take at one moment of it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiled.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


if __name__ == "__main__":
    child_main({"run": run})
