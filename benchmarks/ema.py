"""What the momentum encoder costs: its update and its forward as shares of a training step, and its memory.

W gloo workers of one thread each train a random Qwen3 tower by in-batch soft-max, every weight (full) or LoRA updates
beside frozen ones (lora), and after each step move the average and encode the documents with it. A step is encoding,
loss, backward and optimizer, without the momentum encoder; both are timed from barrier to barrier.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import child, child_main, in_turns, machine, machine_line, options, shown, spread, write

if TYPE_CHECKING:
    from torch import nn

    from trainers.engine import Engine

SIDES = ("full", "lora")


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--workers", type=int, default=2, help="W")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=256, help="width of the tower")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--rank", type=int, default=16, help="of the LoRA updates, on all linear layers")
    parser.add_argument("--pairs", type=int, default=32, help="of a worker's batch")
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    parser.add_argument("--steps", type=int, default=8, help="timed steps of a run, after 2 that warm up")
    parser.add_argument("--rounds", type=int, default=5, help="runs of each side")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    figures = measure(args)
    write(args.json, figures | {"machine": about})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """All runs, then the figures; prints them as they come."""
    setting = {k: v for k, v in vars(args).items() if k not in ("json", "quick", "rounds")}
    rounds = 1 if args.quick else args.rounds
    if args.quick:
        setting |= {"steps": 2, "layers": 2, "hidden": 64}
    runs: dict[str, list[dict[str, Any]]] = {side: [] for side in SIDES}
    for i, side in in_turns(SIDES, rounds):
        runs[side].append(child("benchmarks.ema", "run", setting | {"side": side}, threads=1))
        last = runs[side][-1]
        times = f"update {last['update_s'] * 1e3:.2f} ms of a step's {last['step_s'] * 1e3:.0f}"
        print(f"  round {i + 1}, {side}: {times}", flush=True)
    figures = summary(runs)
    for side in SIDES:
        print(
            f"{side}: update {shown(figures['update_share_of_step'][side], '{:.2%}')}, "
            f"forward {shown(figures['forward_share_of_step'][side], '{:.1%}')} of a step; "
            f"{figures['bytes_a_worker'][side] / 2**20:.1f} MiB a worker beside a model of "
            f"{figures['model_bytes'][side] / 2**20:.1f}"
        )
    return figures | {"setting": setting | {"rounds": rounds}}


def summary(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The figures of all rounds by side, the shares with their spread."""
    return {
        **{
            f"{part}_share_of_step": {side: spread([r[f"{part}_s"] / r["step_s"] for r in runs[side]]) for side in runs}
            for part in ("update", "forward")
        },
        "bytes_a_worker": {side: max(r["bytes"] for r in results) for side, results in runs.items()},
        "model_bytes": {side: results[0]["model_bytes"] for side, results in runs.items()},
    }


def run(workers: int, **setting: Any) -> dict[str, Any]:
    """One side: medians over the steps of the slowest worker's seconds."""
    import json

    from torch import multiprocessing

    with tempfile.TemporaryDirectory(prefix="gyre-benchmark-") as home:
        multiprocessing.start_processes(worker, (workers, home, setting), nprocs=workers, start_method="spawn")
        results = [json.loads((Path(home) / str(rank)).read_text()) for rank in range(workers)]
    return {key: max(result[key] for result in results) for key in results[0]}


def worker(rank: int, workers: int, home: str, setting: dict[str, Any]) -> None:
    import json
    import statistics

    import torch
    import torch.distributed as dist

    from trainers.config import MomentumConfig
    from trainers.ema import MomentumEncoder

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{home}/store", rank=rank, world_size=workers)
    tower = make_tower(setting)
    model_bytes = sum(p.numel() * p.element_size() for p in tower.parameters())
    engine = make_engine(tower, setting)
    before = held_bytes()
    momentum = MomentumEncoder(engine, MomentumConfig(decay=0.999))
    added = held_bytes() - before
    seconds: dict[str, list[float]] = {"step": [], "update": [], "forward": []}
    generator = torch.Generator().manual_seed(rank)

    def timed(name: str, function: Any, *arguments: Any) -> None:
        dist.barrier()
        began = time.perf_counter()
        function(*arguments)
        dist.barrier()
        seconds[name].append(time.perf_counter() - began)

    for _ in range(2 + setting["steps"]):
        ids = torch.randint(2, 1000, (2 * setting["pairs"], setting["tokens"]), generator=generator)
        timed("step", take_step, engine, ids)
        timed("update", momentum.update)
        timed("forward", lambda ids=ids: momentum.forward(input_ids=ids[setting["pairs"] :]))
    result = {f"{name}_s": statistics.median(values[2:]) for name, values in seconds.items()}
    result |= {"bytes": added, "model_bytes": model_bytes}
    (Path(home) / str(rank)).write_text(json.dumps(result))
    dist.destroy_process_group()


def make_tower(setting: dict[str, Any]) -> nn.Module:
    import torch
    from torch import nn
    from transformers import AutoConfig, AutoModel

    from trainers.config import AdapterConfig
    from trainers.encoders.adapters import add_adapter

    class Tower(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            sizes = {"hidden_size": setting["hidden"], "intermediate_size": 3 * setting["hidden"]}
            heads = {"num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": setting["hidden"] // 4}
            config = AutoConfig.for_model(
                "qwen3", vocab_size=8192, num_hidden_layers=setting["layers"], **sizes, **heads
            )
            self.backbone = AutoModel.from_config(config)

        def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
            hidden = self.backbone(input_ids=input_ids).last_hidden_state
            return nn.functional.normalize(hidden.float().mean(1), dim=-1)

    torch.manual_seed(0)
    tower = Tower()
    if setting["side"] == "lora":
        add_adapter(tower.backbone, AdapterConfig(rank=setting["rank"]))
    return tower


def make_engine(tower: nn.Module, setting: dict[str, Any]) -> Engine:
    from trainers.config import EngineConfig, OptimizerConfig
    from trainers.engine import Engine

    return Engine(tower, EngineConfig(zero_stage=setting["zero_stage"]), OptimizerConfig(lr=1e-4), total_steps=1000)


def take_step(engine: Engine, ids: Any) -> None:
    """In-batch soft-max over this worker's own pairs; queries are the first half of the texts."""
    import torch

    h = engine.forward(input_ids=ids)
    vectors = h.detach().requires_grad_()
    queries, documents = vectors.chunk(2)
    torch.nn.functional.cross_entropy(queries @ documents.T / 0.05, torch.arange(len(queries))).backward()
    assert vectors.grad is not None
    engine.backward([h], [vectors.grad], last=True)
    engine.step()


def held_bytes() -> int:
    """Of every tensor there is, each memory once."""
    import gc

    import torch

    gc.collect()
    tensors = [x for x in gc.get_objects() if isinstance(x, torch.Tensor)]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}.values())


if __name__ == "__main__":
    child_main({"run": run}) if sys.argv[1:2] == ["run"] else main()
