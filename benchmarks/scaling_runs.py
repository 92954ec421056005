"""Our whole step over W gloo processes, and what it does there: bytes, messages, memory, time, waiting for others.

The real tower, engine, momentum encoder, queue, objective and loop's report; batches of texts of one length. Bytes and
messages are counted beneath all of them, where torch hands a collective to its backend, by the ring formulas of
trainers/collectives.py.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.profiler import ProfilerActivity, profile
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.common import child_main
from benchmarks.scaling_here import Setting
from data_services.collate import GlobalBatch, share_batch
from data_services.schema import Batch, Ragged
from trainers.collectives import Group
from trainers.config import EngineConfig, ModelConfig, MomentumConfig, OptimizerConfig, QueueConfig
from trainers.ema import MomentumEncoder
from trainers.encoders.spec import ModelSpec
from trainers.encoders.text import TextEncoder
from trainers.engine import Engine
from trainers.model import Trained
from trainers.negative_queue import Queues
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.keys import Keys
from trainers.objectives.sections.contrastive import ContrastiveSection
from trainers.step import ContrastiveStep, Memory, graph_bytes

WARM_UP = 2


def tower_of(setting: Setting) -> TextEncoder:
    """As `build_encoder` makes it on a CPU, without a tokenizer to name."""
    from transformers import AutoConfig, AutoModel

    from trainers.config import AdapterConfig
    from trainers.encoders import packed
    from trainers.encoders.adapters import add_adapter
    from trainers.encoders.backbone import checkpoint_gradients
    from trainers.encoders.cpu_kernels import fuse_norms

    config = AutoConfig.for_model(
        "qwen3",
        hidden_size=setting.hidden,
        num_hidden_layers=setting.layers,
        num_attention_heads=setting.heads,
        num_key_value_heads=setting.heads,
        head_dim=setting.hidden // setting.heads,
        intermediate_size=setting.intermediate,
        vocab_size=setting.vocabulary,
        use_cache=False,
    )
    backbone: Any = AutoModel.from_config(config, attn_implementation="gyre_cpu")
    backbone.config.is_causal = False
    fuse_norms(backbone)
    packing = packed.prepare(backbone, ModelConfig(path="", packing="off"))
    if setting.checkpointed:
        checkpoint_gradients(backbone)
    if setting.adapter_rank:
        add_adapter(backbone, AdapterConfig(rank=setting.adapter_rank, alpha=2.0 * setting.adapter_rank))
    prompts = {"query": "", "document": ""}
    spec = ModelSpec("qwen3", "mean", True, setting.tokens, prompts, True, setting.hidden)
    encoder = TextEncoder(backbone, spec)
    encoder.packed = packing
    return encoder


def step_of(setting: Setting, group: Group) -> ContrastiveStep:
    """With a full queue."""
    torch.manual_seed(0)
    config = EngineConfig.model_validate(
        {
            "zero_stage": setting.zero_stage,
            "precision": setting.precision,
            "budget_tokens": setting.budget_tokens,
            "reduction": "per_chunk" if setting.per_chunk else "once",
        }
    )
    engine = Engine(Trained(tower_of(setting), {}), config, OptimizerConfig(), total_steps=100, device="cpu")
    memory = None
    if setting.rows:
        queues = Queues(QueueConfig(rows=setting.rows), setting.hidden, group)
        _fill(queues, setting, group)
        memory = Memory(MomentumEncoder(engine, MomentumConfig()), queues)
    objective = Contrastive(ContrastiveSection(tile=setting.tile), group)
    return ContrastiveStep(engine, objective, memory, cached=setting.cached, seed=0, group=group)


def _fill(queues: Queues, setting: Setting, group: Group) -> None:
    """A batch at a time, as training does, so that every worker's rows are as old as the others'."""
    each = setting.batch // group.size
    for step in range(setting.rows // setting.batch):
        vectors = torch.nn.functional.normalize(torch.randn(each, setting.hidden), dim=1)
        ids = torch.arange(each) + (step * group.size + group.rank) * each
        keys = Keys(ids, ids, rejects=torch.full_like(ids, -(2**63)), tasks=torch.zeros_like(ids))
        queues.enqueue({"documents": (vectors, keys)}, step, {"documents": [each] * group.size})


def batch_of(setting: Setting, step: int) -> GlobalBatch:
    random, b = np.random.default_rng(step), setting.batch

    def texts() -> Ragged:
        return Ragged.of(list(random.integers(1, setting.vocabulary, (b, setting.tokens))))

    ids = np.arange(b) + (step + 1) * setting.batch * 1_000
    return GlobalBatch(
        step=step,
        queries=texts(),
        documents=texts(),
        owners=np.arange(b),
        relations=np.ones(b, np.int8),
        query_ids=ids,
        document_ids=ids,
        rows=np.arange(b),
        prompt_tokens=np.zeros(2 * b, np.int64),
        tasks=np.zeros(b, np.int64),
    )


class Wire(TorchDispatchMode):
    """Counts the collectives that torch hands to its backend while it is entered: by kind, how many and what bytes this
    worker puts on the wire."""

    KINDS = {
        "allgather_": "all_gather",
        "_allgather_base_": "all_gather",
        "allreduce_": "all_reduce",
        "reduce_scatter_": "reduce_scatter",
        "_reduce_scatter_base_": "reduce_scatter",
    }

    def __init__(self, size: int) -> None:
        super().__init__()
        self._size = size
        self.bytes: Counter[str] = Counter()
        self.messages: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None) -> Any:
        if func.namespace == "c10d":
            name = func._schema.name.removeprefix("c10d::")
            kind = self.KINDS.get(name, name)
            whole = max(sum(t.nbytes for t in _tensors(arg)) for arg in args[:2])
            rounds = 2 if kind == "all_reduce" else 1
            self.bytes[kind] += rounds * whole * (self._size - 1) // self._size
            self.messages[kind] += 1
        return func(*args, **(kwargs or {}))


def _tensors(value: Any) -> list[Tensor]:
    if isinstance(value, Tensor):
        return [value]
    return [t for one in value for t in _tensors(one)] if isinstance(value, list | tuple) else []


def run(setting: dict[str, Any], steps: int) -> dict[str, Any]:
    """On W processes: `seconds_per_step` over `steps` steps after some that warm up, of the slowest; `collective_s` of
    another that took `profiled_s`, waiting included; `wire_bytes` and `messages` of a step; the largest `memory`, see
    `measured`."""
    with tempfile.TemporaryDirectory(prefix="gyre-scaling-") as folder:
        mp.spawn(_worker, (setting, steps, folder), nprocs=setting["workers"])
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    largest = {key: max(r[key] for r in results) for key in ("seconds_per_step", "rss_bytes")}
    memory = {key: max(r["memory"][key] for r in results) for key in results[0]["memory"]}
    return results[0] | largest | {"memory": memory}


def collectives(workers: int) -> dict[str, float]:
    """alpha_s, of a ring's step, and bandwidth, bytes a second and worker, from all-reduces of two sizes."""
    with tempfile.TemporaryDirectory(prefix="gyre-scaling-") as folder:
        mp.spawn(_all_reduces, (workers, folder), nprocs=workers)
        small, large = json.loads((Path(folder) / "0.json").read_text())
    rounds = 2 * (workers - 1)
    sent = rounds / workers * (SIZES[1] - SIZES[0])
    return {"alpha_s": small / rounds, "bandwidth": sent / (large - small)}


SIZES = (64, 1 << 22)


def _all_reduces(rank: int, workers: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=workers)
    fastest = []
    for size in SIZES:
        x = torch.zeros(size // 4)
        taken = []
        for _ in range(30):
            began = time.perf_counter()
            dist.all_reduce(x)
            taken.append(time.perf_counter() - began)
        fastest.append(sorted(taken)[len(taken) // 2])
    if rank == 0:
        (Path(folder) / "0.json").write_text(json.dumps(fastest))
    dist.destroy_process_group()


def _worker(rank: int, setting: dict[str, Any], steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=setting["workers"])
    result = timed(Setting(**setting), steps)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


def measured(setting: Setting) -> dict[str, Any]:
    """What a step of this worker sends and takes, in the default process group: `wire_bytes` and `messages` by kind,
    and in `memory` the bytes it holds (`held`), keeps for one text's backward, and makes at most in a step."""
    group = Group()
    with Wire(group.size) as wire:
        step = step_of(setting, group)
        step(_share(setting, 0, group))
        wire.bytes.clear()
        wire.messages.clear()
        step(_share(setting, 1, group))
        counted = {"wire_bytes": dict(wire.bytes), "messages": dict(wire.messages)}
    batch = _share(setting, 2, group)
    memory = {**held(step), "graph_bytes": graph_bytes(step.engine, setting.tokens)}
    memory["step"] = most_allocated(lambda: step(batch))
    return counted | {"memory": memory, "chunks": len(batch.chunks)}


def timed(setting: Setting, steps: int) -> dict[str, Any]:
    """`measured`, and what steps after it take."""
    counted, group = measured(setting), Group()
    step = step_of(setting, group)
    batches = [_share(setting, t, group) for t in range(WARM_UP + steps)]
    for batch in batches[:WARM_UP]:
        step(batch)
    group.barrier()
    began = time.perf_counter()
    for batch in batches[WARM_UP:]:
        step(batch)
    group.barrier()
    spent = {"seconds_per_step": (time.perf_counter() - began) / steps, "rss_bytes": _status("VmHWM")}
    began = time.perf_counter()
    with profile(activities=[ProfilerActivity.CPU]) as profiled:
        step(batches[-1])
        spent["profiled_s"] = time.perf_counter() - began
    waited = sum(event.time_range.elapsed_us() for event in profiled.events() if event.name.startswith("gloo:"))
    return counted | spent | {"collective_s": waited / 1e6}


def _share(setting: Setting, t: int, group: Group) -> Batch:
    return share_batch(batch_of(setting, t), group.size, setting.budget_tokens)[group.rank]


def held(step: ContrastiveStep) -> dict[str, int]:
    """Bytes of the tensors that this worker keeps from step to step, by part."""
    engine = step.engine
    weights = [getattr(p, "ds_tensor", p) for p in engine.names]
    masters, moments = [shard.tensor for shard in engine.shards], [*engine._moments("exp_avg")]
    own = _storages(weights)
    parts = {
        "weights": sum(own.values()),
        "masters": sum(size for at, size in _storages(masters).items() if at not in own),
        "moments": 2 * sum(_storages(moments).values()),
    }
    if step.memory and step.memory.queues:
        encoder: Any = step.memory.encoder
        parts["average"] = sum(_storages([*encoder._averages, *encoder._copies._flat]).values())
        parts["queue"] = sum(queue.nbytes for queue in step.memory.queues.by_name.values())
    return parts


def _storages(tensors: list[Tensor]) -> dict[int, int]:
    """Bytes of each storage once, by its address."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def most_allocated(call: Callable[[], Any]) -> int:
    """The most bytes that tensors made during the call take at one moment of it."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        call()
    with tempfile.NamedTemporaryFile(suffix=".json") as file:
        profiled.export_chrome_trace(file.name)
        events = json.loads(Path(file.name).read_text())["traceEvents"]
    return max(event["args"]["Total Allocated"] for event in events if event.get("name") == "[memory]")


def _status(key: str) -> int:
    """Bytes of a line of /proc/self/status."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(key))


if __name__ == "__main__":
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    child_main({"run": run, "collectives": collectives})
