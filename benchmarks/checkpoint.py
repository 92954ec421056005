"""What a checkpoint costs training: written before the next step, and beside the steps that follow.

W workers of one thread each train a random Qwen3 tower, every weight. In turns, so that a slow minute of the machine
falls on all: a stretch of steps without a checkpoint, one that begins with a checkpoint that is waited for, one that
begins with a checkpoint written beside it. A delay is what a stretch took longer than the one without; the copy to host
memory, which every step that saves waits for, is timed by itself. On a machine whose cores all train, the thread that
writes takes its time from them, which is in the delay too.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.common import child, child_main, in_turns, machine, machine_line, options, shown, spread, write

if TYPE_CHECKING:
    from trainers.engine import Engine

MODES = ("without", "waited_for", "beside")


def main() -> None:
    parser = options(__doc__ or "")
    parser.add_argument("--workers", type=int, default=2, help="W")
    parser.add_argument("--zero-stage", type=int, default=2)
    parser.add_argument("--hidden", type=int, default=512, help="width of the tower")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--pairs", type=int, default=32, help="of a worker's batch")
    parser.add_argument("--tokens", type=int, default=64, help="of a text")
    parser.add_argument("--steps", type=int, default=12, help="of a stretch")
    parser.add_argument("--rounds", type=int, default=5, help="stretches of each kind")
    parser.add_argument("--folder", type=Path, help="where checkpoints go; none: a temporary folder")
    args = parser.parse_args()
    about = machine()
    print(machine_line(about))
    write(args.json, measure(args) | {"machine": about})


def measure(args: argparse.Namespace) -> dict[str, Any]:
    setting = {k: v for k, v in vars(args).items() if k not in ("json", "quick", "folder")}
    if args.quick:
        setting |= {"steps": 2, "rounds": 1, "layers": 1, "hidden": 64}
    with tempfile.TemporaryDirectory(prefix="gyre-benchmark-", dir=args.folder) as home:
        figures = summary(child("benchmarks.checkpoint", "run", setting | {"home": home}, threads=1))
    print(
        f"a step {shown(figures['step_s'], '{:.3f}')} s; a checkpoint of {figures['bytes_a_worker'] / 2**20:.0f} MiB a "
        f"worker delays training by {shown(figures['delay_waited_for_s'], '{:.3f}')} s waited for, "
        f"{shown(figures['delay_beside_s'], '{:.3f}')} s written beside it; the copy alone takes "
        f"{shown(figures['copy_s'], '{:.3f}')} s\n"
        f"beyond the copy: {shown(figures['beside_beyond_copy_share_of_step'], '{:.1%}')} of a step"
    )
    return figures | {"setting": setting}


def summary(result: dict[str, Any]) -> dict[str, Any]:
    """Figures of all rounds, from the seconds of every stretch by mode and of every copy."""
    stretches, copies, steps = result["stretches"], result["copies"], result["steps"]
    plain = stretches["without"]
    step = [seconds / steps for seconds in plain]
    delays = {mode: [a - b for a, b in zip(stretches[mode], plain, strict=True)] for mode in MODES[1:]}
    beyond = [(delay - copy) / s for delay, copy, s in zip(delays["beside"], copies, step, strict=True)]
    return {
        "step_s": spread(step),
        **{f"delay_{mode}_s": spread(values) for mode, values in delays.items()},
        "copy_s": spread(copies),
        "beside_beyond_copy_share_of_step": spread(beyond),
        "bytes_a_worker": result["bytes"],
    }


def run(workers: int, home: str, **setting: Any) -> dict[str, Any]:
    """All stretches, in one process a worker; rank 0's seconds, from barrier to barrier."""
    from torch import multiprocessing

    multiprocessing.start_processes(worker, (workers, home, setting), nprocs=workers, start_method="spawn")
    return json.loads((Path(home) / "result").read_text())


def worker(rank: int, workers: int, home: str, setting: dict[str, Any]) -> None:
    import torch
    import torch.distributed as dist

    from benchmarks.ema import make_engine, make_tower
    from trainers.checkpoint import latest
    from trainers.collectives import Group
    from trainers.config import CheckpointConfig
    from trainers.saving import CheckpointStore

    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(workers)}
    torch.set_num_threads(1)
    backend = "cuda:nccl,cpu:gloo" if torch.cuda.is_available() else "gloo"
    dist.init_process_group(backend, init_method=f"file://{home}/store", rank=rank, world_size=workers)
    engine, group, root = make_engine(make_tower(setting | {"side": "full"}), setting), Group(), Path(home) / "saved"
    configs = {mode: CheckpointConfig(asynchronous=mode == "beside") for mode in MODES}
    stores = {mode: CheckpointStore(root / mode, config, group) for mode, config in configs.items()}
    ids = torch.randint(2, 1000, (2 * setting["pairs"], setting["tokens"])).to(engine.device)
    stretches: dict[str, list[float]] = {mode: [] for mode in MODES}
    copies: list[float] = []
    stretch(engine, ids, stores["waited_for"], True, 3)  # warms up
    for turn, mode in in_turns(MODES, setting["rounds"]):
        dist.barrier()
        began = time.perf_counter()
        copied = stretch(engine, ids, stores[mode], mode != "without", setting["steps"])
        stretches[mode].append(time.perf_counter() - began)
        if mode == "beside":
            copies.append(copied)
        stores[mode].settle()  # outside the time: a run has more steps between checkpoints
        if rank == 0:
            print(f"  round {turn + 1}, {mode}: {stretches[mode][-1]:.3f} s", file=sys.stderr, flush=True)
    if rank == 0:
        newest = latest(root / "beside")
        assert newest is not None
        sizes = max(size for size, _ in newest.files.values())
        found = {"stretches": stretches, "copies": copies, "steps": setting["steps"], "bytes": sizes}
        (Path(home) / "result").write_text(json.dumps(found))
    dist.destroy_process_group()


def stretch(engine: Engine, ids: Any, store: Any, save: bool, steps: int) -> float:
    """Steps as the loop takes them, the first of which saves. Seconds of the copy."""
    import torch

    copied = 0.0
    for i in range(steps):
        take_step(engine, ids)
        busy = torch.tensor(store.busy, dtype=torch.float32, device=engine.device)
        store.advance(tuple(flag > 0 for flag in store.group.all_reduce(busy).tolist()))
        if save and i == 0:
            began = time.perf_counter()
            tensors = engine.state()
            copied = time.perf_counter() - began
            store.save(engine.global_steps, tensors, {})
    return copied


def take_step(engine: Engine, ids: Any) -> None:
    """In-batch soft-max over this worker's own pairs; queries are the first half of the texts."""
    import torch

    h = engine.forward(input_ids=ids)
    vectors = h.detach().requires_grad_()
    queries, documents = vectors.chunk(2)
    targets = torch.arange(len(queries), device=ids.device)
    torch.nn.functional.cross_entropy(queries @ documents.T / 0.05, targets).backward()
    assert vectors.grad is not None
    engine.backward([h], [vectors.grad], last=True)
    engine.step()


if __name__ == "__main__":
    child_main({"run": run}) if sys.argv[1:2] == ["run"] else main()
