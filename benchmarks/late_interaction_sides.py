"""The two sides that `benchmarks.late_interaction` measures.

gathered is PyLate's mechanism, written anew from pylate 1f1f47c (2026-04-30), losses/contrastive.py and
scores/colbert.py: documents gathered with gradient, token similarities of all own queries with all documents as one
tensor, padding multiplied away, maximum and sum. Its loss is counted once a worker, as a mean over its own queries.
"""

from __future__ import annotations

import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import Tensor
from torch.nn.functional import cross_entropy, normalize

from benchmarks.common import child_main
from benchmarks.negatives_sides import _GatherWithGradient, _most_allocated
from trainers.collectives import Group
from trainers.objectives.contrastive import Contrastive
from trainers.objectives.embedded import Embedded
from trainers.objectives.keys import UNKNOWN, Keys
from trainers.objectives.sections.contrastive import ContrastiveSection

TEMPERATURE = 1.0


def ours(queries: Tensor, documents: Tensor, setting: dict[str, int], group: Group) -> None:
    b, d = len(queries), len(documents)
    section = ContrastiveSection(
        temperature=TEMPERATURE, similarity="max_sim", directions="query_to_document", tile=1024
    )
    ids = torch.arange(d) + group.rank * d
    answers = torch.where(torch.arange(d) < b, ids, UNKNOWN)
    query_keys = Keys(ids[:b], ids[:b], lengths=torch.full((b,), queries.shape[1]))
    document_keys = Keys(answers, ids, lengths=torch.full((d,), documents.shape[1]))
    owners = torch.arange(d) % b
    Contrastive(section, group)(
        Embedded(queries, documents, query_keys, document_keys, owners, b * group.size)
    ).loss.backward()


def gathered(queries: Tensor, documents: Tensor, setting: dict[str, int], group: Group) -> None:
    everyone = _GatherWithGradient.apply(documents, group)
    similar = torch.einsum("ash,bth->abst", queries, everyone)
    mask = torch.ones(everyone.shape[:2])
    scores = (similar * mask[None, :, None, :]).amax(3).sum(2) / TEMPERATURE
    own = torch.arange(len(queries)) + group.rank * len(documents)
    cross_entropy(scores, own).backward()


SIDES = {"ours": ours, "gathered": gathered}


def run(side: str, setting: dict[str, int], steps: int) -> dict[str, Any]:
    """`steps` steps of a side: seconds_per_step and tensor_bytes of the worst worker, wire_bytes of the mean one."""
    with tempfile.TemporaryDirectory(prefix="gyre-late-") as folder:
        mp.spawn(_worker, (side, setting, steps, folder), nprocs=setting["workers"])
        results = [json.loads(path.read_text()) for path in sorted(Path(folder).glob("*.json"))]
    wire = sum(r.pop("wire_bytes") for r in results) / len(results)
    return {"wire_bytes": wire} | {key: max(r[key] for r in results) for key in results[0]}


def _worker(rank: int, side: str, setting: dict[str, int], steps: int, folder: str) -> None:
    torch.set_num_threads(1)
    torch.manual_seed(rank)
    size = setting["workers"]
    dist.init_process_group("gloo", init_method=f"file://{folder}/meet", rank=rank, world_size=size)
    group, b = Group(), setting["batch"] // size

    def tokens(texts: int, each: int) -> Tensor:
        return normalize(torch.randn(texts, each, setting["dim"]), dim=2).requires_grad_()

    queries = tokens(b, setting["query_tokens"])
    documents = tokens(b * (1 + setting["negatives"]), setting["document_tokens"])

    def step() -> None:
        queries.grad = documents.grad = None
        SIDES[side](queries, documents, setting, group)

    step()
    group.barrier()
    group.reset_traffic()
    began = time.perf_counter()
    for _ in range(steps):
        step()
    seconds = (time.perf_counter() - began) / steps
    result = {"seconds_per_step": seconds, "wire_bytes": sum(group.traffic.values()) / steps}
    result["tensor_bytes"] = _most_allocated(step)
    (Path(folder) / f"{rank}.json").write_text(json.dumps(result))
    dist.destroy_process_group()


if __name__ == "__main__":
    child_main({"run": run})
